/**
 * The paper's ablations on the quickstart's data: every variant of the alignment vector with several seeds, and a
 * table.
 *
 *   npm run ablate -- [--fast] [--seeds N] [--only adaptive,none] [--out DIR] [--base DIR]
 *
 * The towers, data and scores are those of a finished quickstart (--base; it is run first where there is none).
 * Finished cells are kept as JSON lines in the output folder and skipped when the command is given again.
 */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { AlignGPTError } from 'aligngpt'
import { Command, InvalidArgumentError } from 'commander'
import { TESTS } from '../quickstart/records.js'
import { SCORES, VISION } from '../quickstart/settings.js'
import { type Base, type Cell, runCell, runCells, type Steps, table, VARIANTS, type Variant } from './cells.js'

const STEPS: Record<'full' | 'fast', Steps> = {
  full: { pretrain: 100, finetune: 800 },
  fast: { pretrain: 8, finetune: 20 },
}

const json = <T>(file: string): T => JSON.parse(fs.readFileSync(file, 'utf8')) as T

/** The parts of a finished quickstart. */
function openBase(dir: string, fast: boolean): Base {
  const data = path.join(dir, 'data')
  const { fast: isFast } = json<{ fast: boolean }>(path.join(data, 'data.json'))
  if (isFast !== fast)
    throw new AlignGPTError(
      'ERR_ARGUMENT',
      `[ablate] --base ${dir}: expected a ${fast ? 'fast' : 'full'} quickstart, got a ${isFast ? 'fast' : 'full'} one`,
    )
  const questions = TESTS.map((t) => [t, json<Base['questions'][string]>(path.join(data, `questions_${t}.json`))])
  return {
    model: { llm: path.join(dir, 'models', 'llm'), clip: path.join(dir, 'models', 'clip'), ...VISION },
    images: path.join(data, 'images'),
    pairs: path.join(data, 'pairs.json'),
    scores: json<number[]>(path.join(dir, SCORES)),
    instructions: path.join(data, 'instructions.json'),
    questions: Object.fromEntries(questions),
  }
}

function quickstart(dir: string, fast: boolean): void {
  console.log(`${dir} holds no finished quickstart: running it first`)
  const script = fileURLToPath(new URL('../quickstart/main.ts', import.meta.url))
  const args = ['--import', 'tsx', script, '--out', dir, ...(fast ? ['--fast'] : [])]
  const { status, signal } = spawnSync(process.execPath, args, { stdio: 'inherit' })
  if (status !== 0)
    throw new AlignGPTError('ERR_DATA', `[ablate] quickstart: expected status 0, got ${signal ?? status}`)
}

function count(text: string): number {
  const n = Number(text)
  if (!Number.isInteger(n) || n < 1) throw new InvalidArgumentError('expected an integer > 0')
  return n
}

/** Aborted by the first SIGINT or SIGTERM, which is then the process's exit status; the second ends the process. */
function interruptible(): AbortSignal {
  const controller = new AbortController()
  for (const [name, status] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)
    process.on(name, () => {
      if (controller.signal.aborted) process.exit(status)
      process.exitCode = status
      console.error(`\n${name}: leaving the cell that runs; those before it are kept (once more to stop at once)`)
      controller.abort()
    })
  return controller.signal
}

async function main(): Promise<void> {
  const command = new Command('ablate')
    .description('the ablations of the paper on the data of the quickstart')
    .option('--fast', 'few steps on little data: shows the way, its numbers mean nothing', false)
    .option('--seeds <n>', 'seeds of each variant', count, 3)
    .option('--only <names>', `some of ${VARIANTS.map((v) => v.name).join(', ')}`)
    .option('--out <dir>', 'where results and table go (runs/ablate)')
    .option('--base <dir>', 'folder of a quickstart (runs/quickstart)')
    .parse()
  const o = command.opts()
  const suffix = o.fast ? '-fast' : ''
  const [out, dir] = [o.out ?? `runs/ablate${suffix}`, o.base ?? `runs/quickstart${suffix}`].map((d) => path.resolve(d))
  const names: string[] | undefined = o.only?.split(',')
  const unknown = names?.find((n) => !VARIANTS.some((v) => v.name === n))
  if (unknown !== undefined) command.error(`--only: ${unknown} is no variant`)
  const variants = VARIANTS.filter((v) => names?.includes(v.name) ?? true)
  const seeds = Array.from({ length: o.seeds }, (_, i) => i + 1)

  if (![SCORES, 'result.json'].every((f) => fs.existsSync(path.join(dir, f)))) quickstart(dir, o.fast)
  const base = openBase(dir, o.fast)
  fs.mkdirSync(out, { recursive: true })
  const steps = STEPS[o.fast ? 'fast' : 'full']
  const one = async (v: Variant, seed: number, signal: AbortSignal): Promise<Cell> => {
    const cell = await runCell(base, v, seed, steps, path.join(out, 'data'), signal)
    const tests = Object.entries(cell.accuracy[v.name]).map(([t, a]) => `${t} ${(100 * a).toFixed(1)} %`)
    console.log(`${v.name}, seed ${seed}: ${tests.join(', ')} (${cell.seconds.toFixed(1)} s)`)
    return cell
  }
  const file = path.join(out, 'cells.jsonl')
  const signal = interruptible()
  const cells = await runCells(variants, seeds, steps, file, (v, seed) => one(v, seed, signal)).catch((e) => {
    if (e !== signal.reason) throw e
    console.error('stopped: the same command goes on from the finished cells')
    return null
  })
  if (!cells) return
  const text = table(cells)
  fs.writeFileSync(path.join(out, 'table.md'), `${text}\n`)
  const seconds = cells.reduce((s, c) => s + c.seconds, 0)
  console.log(
    `\n${text}\n\n${cells.length} cells, ${(seconds / 60).toFixed(1)} min in all; ${path.join(out, 'table.md')}`,
  )
}

try {
  await main()
} catch (e) {
  const known = e instanceof AlignGPTError || (e as NodeJS.ErrnoException).syscall !== undefined
  console.error(known ? `${(e as { code: string }).code} ${(e as Error).message}` : e)
  process.exitCode = 1
}

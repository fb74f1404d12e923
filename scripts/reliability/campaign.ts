/**
 * Runs that are killed again and again (kill -9) and continued, against runs that are not: the losses and the weights must be the
 * same bits and every checkpoint must be whole after every kill.
 */
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { findCheckpoint, listCheckpoints, verifyCheckpoint } from '../../ts/src/train/checkpoint.js'
import { Rng } from '../../ts/src/util/rng.js'
import type { ChildJob } from './child.js'

const base = fileURLToPath(new URL('../../ts/test/golden/base/', import.meta.url))
const child = fileURLToPath(new URL('./child.ts', import.meta.url))
const STEPS = 60
const EVERY = 2

type Variant = Pick<ChildJob, 'phase' | 'dtype' | 'options'>
const VARIANTS: Record<string, Variant> = {
  'f32, pre-training, evaluation': {
    phase: 'pretrain',
    dtype: 'f32',
    options: { batch: 4, evalShare: 0.3, evalEvery: 3, lr: 0.02 },
  },
  'bf16, instruction tuning, accumulation': {
    phase: 'finetune',
    dtype: 'bf16',
    options: { batch: 3, microBatch: 1, lr: 1e-3, skipOutliers: { warmup: 5, z: 1 } },
  },
  'f32, instruction tuning, recompute': {
    phase: 'finetune',
    dtype: 'f32',
    options: { batch: 2, recompute: true, lr: 1e-3 },
  },
  'bf16, instruction tuning, compact state': {
    phase: 'finetune',
    dtype: 'bf16',
    options: { batch: 2, optimizerState: 'compact', lr: 1e-3 },
  },
}

function jobOf(v: Variant, out: string): ChildJob {
  const data = path.join(base, v.phase === 'pretrain' ? 'data_phase1.json' : 'data_phase2.json')
  const options = { ...v.options, out, steps: STEPS, seed: 7, saveEvery: EVERY, workers: 0, resume: true }
  return { ...v, options, model: path.join(base, 'model/aligngpt'), data, images: path.join(base, 'images') }
}

interface Ended {
  status: number | null
  signal: NodeJS.Signals | null
  output: string
}
/** @param killAt from outside: so many ms after the process has printed so many steps */
function run(job: ChildJob, killAt?: { steps: number; ms: number }): Promise<Ended> {
  return new Promise((resolve) => {
    const p = spawn(process.execPath, ['--import', 'tsx', child, JSON.stringify(job)])
    let output = ''
    let waiting = killAt
    const listen = (d: Buffer): void => {
      output += d
      if (!waiting || (output.match(/^step /gm)?.length ?? 0) < waiting.steps) return
      setTimeout(() => p.kill('SIGKILL'), waiting.ms)
      waiting = undefined
    }
    p.stdout.on('data', listen)
    p.stderr.on('data', listen)
    p.on('close', (status, signal) => resolve({ status, signal, output }))
  })
}

/** What must be the same: each step's numbers, those of each evaluation, the weights and those of the best model. */
function outcome(out: string): { steps: string[]; weights: Buffer } {
  const lines = fs.readFileSync(path.join(out, 'log.jsonl'), 'utf8').trim().split('\n')
  const steps = lines.map((line) => {
    const { step, loss, lr, gradNorm, coefficients, skipped, evaluation } = JSON.parse(line)
    const evaluated = evaluation && { ...evaluation, seconds: undefined }
    return JSON.stringify({ step, loss, lr, gradNorm, coefficients, skipped, evaluated })
  })
  const folders = [out, path.join(out, 'best')].filter((f) => fs.existsSync(f))
  const weights = Buffer.concat(folders.map((f) => fs.readFileSync(path.join(f, 'model.safetensors'))))
  return { steps, weights }
}

export interface CrashReport {
  kills: number
  /** of them while a checkpoint was being written */
  insideSave: number
  /** runs that came to their end, and those whose losses or weights were not those of the undisturbed one */
  runs: number
  different: string[]
  /** checkpoints looked at after kills, and those that were not whole */
  checkpoints: number
  unloadable: string[]
  /** steps that had to be done again */
  lost: number
}

/** A run that is not disturbed. */
interface Whole extends ReturnType<typeof outcome> {
  /** to the file system, of one save */
  calls: number
}

async function undisturbed(name: string, out: string): Promise<Whole> {
  const { status, output } = await run(jobOf(VARIANTS[name], out))
  if (status !== 0) throw new Error(`${name}: the undisturbed run failed: ${output}`)
  const calls = [...output.matchAll(/calls (\d+)/g)].map((m) => Number(m[1]))
  return { ...outcome(out), calls: Math.round(((calls.at(-1) as number) - calls[0]) / (STEPS / EVERY - 1)) }
}

/** Kills `kills` processes: three of five at a random call of a save, the others from outside at a random moment. */
export async function crash(
  folder: string,
  kills: number,
  seed: number,
  tell: (text: string) => void,
): Promise<CrashReport> {
  const rng = new Rng(seed)
  const report: CrashReport = {
    kills: 0,
    insideSave: 0,
    runs: 0,
    different: [],
    checkpoints: 0,
    unloadable: [],
    lost: 0,
  }
  const names = Object.keys(VARIANTS)
  const whole = new Map<string, Whole>()
  for (let i = 0; report.kills < kills; i++) {
    const name = names[i % names.length]
    const expected = whole.get(name) ?? (await undisturbed(name, path.join(folder, `${name}, undisturbed`)))
    whole.set(name, expected)
    const most = Math.min(Math.ceil(kills / names.length), kills - report.kills)
    await campaign(name, path.join(folder, `${name}, ${i}`), expected, most, rng, report)
    tell(`${name}: ${report.kills} kills so far, ${report.insideSave} inside a save`)
  }
  return report
}

/** One run from its beginning to its end, killed up to `most` times. */
async function campaign(
  name: string,
  out: string,
  expected: Whole,
  most: number,
  rng: Rng,
  report: CrashReport,
): Promise<void> {
  const job = jobOf(VARIANTS[name], out)
  for (let left = most; ; left--) {
    const inSave = report.kills % 5 < 3
    const steps = 3 + rng.int(8) // a few saves first
    const die = inSave ? { steps, call: rng.int(expected.calls) } : undefined
    const killAt = inSave ? undefined : { steps: steps + 1, ms: rng.int(30) }
    const ended = left > 0 ? await run({ ...job, die }, killAt) : await run(job)
    if (ended.signal !== 'SIGKILL') {
      if (ended.status !== 0) throw new Error(`${name}: ${ended.output}`)
      break
    }
    report.kills++
    inspect(path.join(out, 'checkpoints'), inSave, ended.output, report)
  }
  report.runs++
  const got = outcome(out)
  if (got.steps.join('\n') !== expected.steps.join('\n')) report.different.push(`${name}: losses`)
  if (!got.weights.equals(expected.weights)) report.different.push(`${name}: weights`)
}

/** What a kill left. */
function inspect(checkpoints: string, inSave: boolean, output: string, report: CrashReport): void {
  const names = fs.existsSync(checkpoints) ? fs.readdirSync(checkpoints) : []
  if (inSave || names.some((n) => n.endsWith('.tmp'))) report.insideSave++
  const steps = listCheckpoints(checkpoints)
  for (const step of steps) {
    report.checkpoints++
    try {
      verifyCheckpoint(path.join(checkpoints, `step-${step}`))
    } catch (e) {
      report.unloadable.push(String(e))
    }
  }
  const done = Number([...output.matchAll(/^step (\d+)/gm)].at(-1)?.[1] ?? -1) + 1
  report.lost += Math.max(0, done - (steps[0] ?? 0))
}

export interface DamageReport {
  flips: number
  cuts: number
  /** damage that was not seen, or after which the one before was not taken with a message */
  missed: string[]
  loads: number
  /** messages about whole ones */
  falseAlarms: string[]
}

/** Damages copies of the newest of the (two or more) checkpoints in a folder, byte by byte and by cutting. */
export function damage(
  checkpoints: string,
  o: { flips: number; cuts: number; loads: number; seed: number },
): DamageReport {
  const rng = new Rng(o.seed, 1)
  const [newest, before] = listCheckpoints(checkpoints)
  const folder = path.join(checkpoints, `step-${newest}`)
  const files = fs.readdirSync(folder).map((f) => path.join(folder, f))
  const report: DamageReport = { flips: 0, cuts: 0, missed: [], loads: 0, falseAlarms: [] }
  const check = (file: string, what: string, change: (bytes: Buffer) => Buffer): void => {
    const good = fs.readFileSync(file)
    fs.writeFileSync(file, change(Buffer.from(good)))
    const said: string[] = []
    const found = findCheckpoint(checkpoints, (text) => said.push(text))
    fs.writeFileSync(file, good)
    if (found?.manifest.step !== before || said.length !== 1) report.missed.push(`${path.basename(file)}: ${what}`)
  }
  for (; report.flips < o.flips; report.flips++) {
    const file = files[report.flips % files.length]
    const at = rng.int(fs.statSync(file).size)
    const flipped = 1 + rng.int(255)
    check(file, `byte ${at} ^ ${flipped}`, (b) => {
      b[at] ^= flipped
      return b
    })
  }
  for (; report.cuts < o.cuts; report.cuts++) {
    const file = files[report.cuts % files.length]
    const length = rng.int(fs.statSync(file).size)
    check(file, `cut to ${length}`, (b) => b.subarray(0, length))
  }
  for (; report.loads < o.loads; report.loads++)
    if (findCheckpoint(checkpoints, (text) => report.falseAlarms.push(text))?.manifest.step !== newest)
      report.falseAlarms.push('the newest was not taken')
  return report
}

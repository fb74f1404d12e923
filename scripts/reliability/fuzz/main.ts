/**
 * Reads millions of damaged inputs and makes millions of wrong calls: `npm run fuzz -- --minutes 10`. Each reader, and the native
 * core, has a process of its own. Ends with status 1 when anything did not end as it must (docs/reliability.md).
 */
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command } from 'commander'
import { integer } from '../../../ts/src/cli/options.js'
import type { Job } from './child.js'
import { readers } from './readers.js'
import type { Finding, Report } from './verdict.js'

const NATIVE_CALLS = 1_000_000
// A call that is not back by then hangs; shorter ones are timed where they are made.
const HANGS = 15_000
// A process that starts makes inputs of all readers first, on a machine that may be busy.
const STARTS = 180_000

interface Outcome {
  reader: string
  target: number
  seconds: number
  done: number
  accepted: number
  refused: number
  slowestMs: number
  codes: Record<string, number>
  findings: Finding[]
}

const shared = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir()
const here = (name: string): string => fileURLToPath(new URL(name, import.meta.url))

/** One process: its reports until it ends, or until none has come for too long. */
function watch(job: Job, onReport: (r: Report) => void): Promise<{ how: string; stderr: string }> {
  return new Promise((resolve) => {
    const program = here(job.reader === 'native' ? './native-child.ts' : './child.ts')
    const p = spawn(process.execPath, ['--expose-gc', '--import', 'tsx', program, JSON.stringify(job)], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let [text, stderr, hung] = ['', '', false]
    const stop = (): void => {
      hung = true
      p.kill('SIGKILL')
    }
    let timer = setTimeout(stop, STARTS)
    p.stdout.on('data', (d) => {
      clearTimeout(timer)
      timer = setTimeout(stop, HANGS)
      const lines = (text + d).split('\n')
      text = lines.pop() as string
      for (const line of lines) onReport(JSON.parse(line))
    })
    p.stderr.on('data', (d) => {
      stderr = (stderr + d).slice(-4000)
    })
    p.on('close', (status, signal) => {
      clearTimeout(timer)
      resolve({ how: hung ? 'hang' : signal ? `killed by ${signal}` : status ? `status ${status}` : '', stderr })
    })
  })
}

interface Wanted {
  seed: number
  runs?: number
  ms: number
  target: number
  findings: string
}

/** All inputs of one reader; after a crash a new process goes on behind it. */
async function campaign(reader: string, o: Wanted, save: (o: Outcome) => void): Promise<Outcome> {
  const runs = o.runs ?? o.target
  const sum: Outcome = {
    ...{ reader, target: o.target, seconds: 0, done: 0, accepted: 0, refused: 0 },
    ...{ slowestMs: 0, codes: {}, findings: [] },
  }
  const started = Date.now()
  for (let tries = 0; tries < 5 && sum.done < runs && Date.now() - started < o.ms; tries++) {
    const folder = fs.mkdtempSync(path.join(shared, 'aligngpt-fuzz-'))
    const before = structuredClone(sum)
    const job: Job = {
      ...{ reader, seed: o.seed, from: before.done, runs: runs - before.done },
      ...{ ms: o.ms - (Date.now() - started), folder, findings: o.findings },
    }
    const { how, stderr } = await watch(job, (r) => {
      sum.done = before.done + r.done
      sum.accepted = before.accepted + r.accepted
      sum.refused = before.refused + r.refused
      sum.slowestMs = Math.max(before.slowestMs, Math.round(r.slowest))
      sum.seconds = Math.round((Date.now() - started) / 1000)
      for (const [code, n] of Object.entries(r.codes)) sum.codes[code] = (before.codes[code] ?? 0) + n
      if (r.finding) sum.findings.push(r.finding)
      save(sum)
    })
    if (how) {
      const kept = path.join(o.findings, `${reader}-${o.seed}-${how.replace(/\W+/g, '-')}-${tries}`)
      fs.cpSync(folder, kept, { recursive: true })
      sum.findings.push({ reader, seed: o.seed, number: sum.done, cause: how, message: stderr, file: kept })
      sum.done += 1
    }
    fs.rmSync(folder, { recursive: true, force: true })
  }
  return sum
}

const o = new Command('fuzz')
  .description('reads damaged inputs and makes wrong native calls')
  .option('--minutes <n>', 'for all of them together', Number, 10)
  .option('--only <names>', 'readers, with commas; native: the calls of the native core')
  .option('--runs <n>', 'inputs of each; default: what docs/reliability.md names', integer)
  .option('--seed <n>', 'of the inputs', integer, 1)
  .option('--out <folder>', 'findings and results.json', 'runs/fuzz')
  .parse()
  .opts()

const scratch = fs.mkdtempSync(path.join(shared, 'aligngpt-fuzz-'))
const targets = Object.entries(await readers(scratch)).map(([name, { target }]): [string, number] => [name, target])
fs.rmSync(scratch, { recursive: true })
targets.push(['native', NATIVE_CALLS])
const only = o.only?.split(',') as string[] | undefined
for (const name of only ?? [])
  if (!targets.some(([n]) => n === name)) throw new Error(`--only: no ${name} in ${targets.map(([n]) => n)}`)
const chosen = targets.filter(([name]) => only?.includes(name) ?? true)
const out = path.resolve(o.out)
fs.mkdirSync(out, { recursive: true })

const until = Date.now() + o.minutes * 60_000
const outcomes: Outcome[] = []
const save = (now?: Outcome): void =>
  fs.writeFileSync(path.join(out, 'results.json'), JSON.stringify([...outcomes, ...(now ? [now] : [])], null, 1))
for (const [i, [reader, target]] of chosen.entries()) {
  const ms = Math.max(0, (until - Date.now()) / (chosen.length - i))
  const outcome = await campaign(reader, { seed: o.seed, runs: o.runs, ms, target, findings: out }, save)
  outcomes.push(outcome)
  save()
  const { done, accepted, refused, seconds, slowestMs, findings } = outcome
  console.log(
    `${reader.padEnd(14)} ${done} inputs, ${accepted} read, ${refused} refused, ${seconds} s, slowest ${slowestMs} ms`,
  )
  for (const f of findings)
    console.log(`  WRONG: ${f.cause}\n    seed ${f.seed}, input ${f.number}: ${f.file}\n    ${f.message.slice(0, 600)}`)
}
const wrong = outcomes.reduce((n, { findings }) => n + findings.length, 0)
const unread = outcomes.filter(({ done }) => done === 0).map(({ reader }) => reader)
if (unread.length) console.log(`WRONG: nothing was tried of ${unread.join(', ')}`)
console.log(wrong ? `${wrong} findings in ${out}` : 'as it must be')
process.exitCode = wrong || unread.length ? 1 : 0

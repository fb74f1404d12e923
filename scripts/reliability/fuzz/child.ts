/** Fuzzes one reader in a process of its own and reports on stdout, so that a crash is seen and ends nothing else. */
import fs from 'node:fs'
import path from 'node:path'
import sharp from 'sharp'
import { native } from '../../../ts/src/core/native.js'
import { Dice, hostileValues, keysOf, mutate, mutateJson } from './mutate.js'
import { type Reader, readers } from './readers.js'
import { causeOf, type Report, refusal } from './verdict.js'

export interface Job {
  reader: string
  seed: number
  from: number
  runs: number
  ms: number
  /** in memory, for inputs */
  folder: string
  findings: string
}
const SLOW = 2000
const job: Job = JSON.parse(process.argv[2])
process.chdir(job.folder)
// A cache of pictures looks as a leak does.
sharp.cache(false)
sharp.concurrency(1)
process.on('warning', () => {})

const reader: Reader = (await readers(job.folder))[job.reader]
const file = path.join(job.folder, reader.file ?? 'input')
fs.mkdirSync(path.dirname(file), { recursive: true })
const words = (reader.words ?? []).map((w) => Buffer.from(w, 'latin1'))
const hostile = reader.values ? hostileValues(job.seed) : []
const keys = [...keysOf(reader.values), '__proto__', 'constructor', 'toString']
const fd = fs.openSync(file, 'w+')
const at = { seen: new Set<string>(), baseline: 0, heap: 0, files: 0 }
const state: Report = { done: 0, accepted: 0, refused: 0, codes: {}, slowest: 0, rss: 0, heap: 0, files: 0, handles: 0 }

function inputOf(number: number): Buffer {
  const dice = new Dice(job.seed, number)
  // one in eight of the values is cut or changed as bytes are
  if (reader.values && dice.roll(8)) return mutateJson(dice, reader.values, hostile, keys)
  return mutate(dice, reader.seeds, words)
}

/** Reads one input; undefined: it went well, else what is wrong. */
async function attempt(bytes: Buffer, count: boolean): Promise<{ cause: string; message: string } | undefined> {
  // The input lies in a file in any case: after a crash it is there.
  fs.writeSync(fd, bytes, 0, bytes.length, 0)
  fs.ftruncateSync(fd, bytes.length)
  const start = performance.now()
  let wrong: { cause: string; message: string } | undefined
  try {
    const pending = reader.read(bytes, file)
    if (pending instanceof Promise) await pending
    if (count) state.accepted++
  } catch (e) {
    const code = refusal(e, false)
    if (code === null) wrong = { cause: causeOf(e), message: e instanceof Error ? (e.stack ?? e.message) : String(e) }
    else if (count) {
      state.refused++
      state.codes[code] = (state.codes[code] ?? 0) + 1
    }
  }
  const ms = performance.now() - start
  if (ms > state.slowest) state.slowest = ms
  if (!wrong && ms > SLOW) wrong = { cause: 'slow', message: `${Math.round(ms)} ms` }
  return wrong
}

/** Leaves out what is not needed for the same cause. */
async function minimise(bytes: Buffer, cause: string): Promise<Buffer> {
  let best = bytes
  let tries = 300
  for (let size = best.length >> 1; size >= 1 && tries > 0; size >>= 1)
    for (let from = 0; from < best.length && tries-- > 0; ) {
      const shorter = Buffer.concat([best.subarray(0, from), best.subarray(from + size)])
      if ((await attempt(shorter, false))?.cause === cause) best = shorter
      else from += size
    }
  return best
}

const send = (report: Report): void => {
  fs.writeSync(1, `${JSON.stringify(report)}\n`)
}

async function found(number: number, bytes: Buffer, cause: string, message: string): Promise<void> {
  if (at.seen.has(cause)) return
  at.seen.add(cause)
  const small = cause === 'slow' ? bytes : await minimise(Buffer.from(bytes), cause)
  const name = `${job.reader}-${job.seed}-${number}`
  fs.writeFileSync(path.join(job.findings, name), small)
  const { reader, seed } = job
  send({ ...state, finding: { reader, seed, number, cause, message, file: path.join(job.findings, name) } })
}

function look(): void {
  globalThis.gc?.()
  const { rss, heapUsed, external } = process.memoryUsage()
  state.rss = rss
  state.heap = heapUsed + external
  state.files = fs.readdirSync('/proc/self/fd').length
  state.handles = native.memory().handles
}

/** What has grown since the warm-up. */
async function growth(first: Report): Promise<void> {
  const none = Buffer.alloc(0)
  if (state.files > first.files) await found(-1, none, 'descriptors', `${first.files} -> ${state.files}`)
  if (state.handles > first.handles) await found(-2, none, 'tensors', `${first.handles} -> ${state.handles}`)
  if (state.heap > first.heap + 2 ** 24) await found(-3, none, 'heap', `${first.heap} -> ${state.heap}`)
  if (state.rss > first.rss + 2 ** 27) await found(-4, none, 'memory', `${first.rss} -> ${state.rss}`)
}

const started = Date.now()
let told = started
let first: Report | undefined
for (let number = job.from; number < job.from + job.runs; number++) {
  const bytes = inputOf(number)
  const wrong = await attempt(bytes, true)
  state.done++
  if (wrong) await found(number, bytes, wrong.cause, wrong.message)
  if ((number & 63) === 0 && Date.now() - told > 1000) {
    told = Date.now()
    if (!first && told - started > Math.min(10_000, job.ms / 4)) {
      look()
      first = { ...state }
    }
    send(state)
    // lets what waits for a turn of the event loop go
    await new Promise((resolve) => setImmediate(resolve))
    if (told - started > job.ms) break
  }
}
await new Promise((resolve) => setTimeout(resolve, 50))
look()
if (first) await growth(first)
send({ ...state, end: true })

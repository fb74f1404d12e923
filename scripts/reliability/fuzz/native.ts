/**
 * Calls every function of the native core with arguments of its types and of all others, from several threads: stale and foreign
 * handles, sizes that are none, buffers that are gone, objects that change while they are read.
 */
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import type { MessagePort } from 'node:worker_threads'
import { native } from '../../../ts/src/core/native.js'
import { startThread } from '../../../ts/src/util/worker.js'
import type { Job } from './child.js'
import { Dice } from './mutate.js'
import { causeOf, Planted, type Report, refusal } from './verdict.js'

const THREADS = 3
/** Not called: they end the process, or are about signals. */
const LEFT_OUT = ['exit', 'secondSignalEnds']
const SLOW = 2000
const ROUND = 2000

/** The types of arguments and result of every function, as native.ts has them. */
function signatures(): { name: string; arguments: string[]; result: string }[] {
  const source = fs.readFileSync(fileURLToPath(new URL('../../../ts/src/core/native.ts', import.meta.url)), 'utf8')
  const body = /export interface Native \{([\s\S]*?)\n\}/.exec(source)?.[1] ?? ''
  const found = [...body.matchAll(/^ {2}(\w+)\(([^)]*)\): (.*)$/gm)].map(([, name, list, result]) => ({
    name,
    arguments: list.split(/,(?![^<]*>)/).flatMap((a) => (a.includes(':') ? [a.slice(a.indexOf(':') + 1).trim()] : [])),
    result,
  }))
  const missing = Object.keys(native).filter((k) => !found.some(({ name }) => name === k))
  if (missing.length) throw new Error(`no types of ${missing}`)
  return found.filter(({ name }) => !LEFT_OUT.includes(name))
}

/** The fields of the objects that some take. */
function fields(type: string): [string, string][] {
  const source = fs.readFileSync(fileURLToPath(new URL('../../../ts/src/core/native.ts', import.meta.url)), 'utf8')
  const body = new RegExp(`export interface ${type} \\{([\\s\\S]*?)\\n\\}`).exec(source)?.[1] ?? ''
  return [...body.matchAll(/^ {2}(\w+): (.*)$/gm)].map(([, k, t]) => [k, t])
}
const OBJECTS = Object.fromEntries(['NativeAlignMix', 'NativeQkvLinear', 'NativeAdamW'].map((t) => [t, fields(t)]))

const NUMBERS = [0, 1, 2, 3, 4, 8, 0.5, -1, 1e-5, -0.5]
const ODD = [Number.NaN, Infinity, -Infinity, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 53, 2 ** 53 - 1, -(2 ** 53), 1e300, 1.5]
/** Lists of more entries than an argument may have, made once. */
const LONG = [Object.assign([], { length: 2 ** 32 - 1 }), Object.assign([], { length: 2 ** 24 + 1 })]
const LONG_TEXT = 'x'.repeat(70_000)
const WORDS = 'f32 bf16 f64 i32 i64 cpu gelu quick_gelu silu none relu exp level gate fixed uniform normal tanh'.split(
  ' ',
)

/** Allocations and file calls succeed again. */
function allowAll(): void {
  native.failAfter(-1)
  native.failFiles(-1, 1, false)
}

/** An argument for people; what runs when it is looked at is left alone. */
function say(v: unknown): string {
  if (ArrayBuffer.isView(v)) return `${v.constructor.name}(${v.byteLength})`
  if (typeof v === 'string') return JSON.stringify(v.slice(0, 60))
  return typeof v === 'object' && v !== null ? (plain.has(v) ? JSON.stringify(v) : 'an object') : String(v)
}
/** Objects and lists with nothing planted. */
const plain = new WeakSet<object>()

class Caller {
  readonly dice: Dice
  live: number[] = []
  stale: number[] = []
  tickets: number[] = []
  depth = 0
  constructor(
    seed: number,
    thread: number,
    /** a few handles of every thread */
    readonly foreign: Float64Array,
    readonly file: string,
  ) {
    this.dice = new Dice(seed, thread)
  }

  handle(): number {
    if (this.dice.roll(20) || !this.live.length) {
      while (this.live.length) {
        const at = this.dice.roll(this.live.length)
        if (native.isLive(this.live[at])) return this.live[at]
        // it went with a scope, or in a call
        this.live.splice(at, 1)
      }
      try {
        return this.live[this.live.push(native.zeros([2, 2], 'f32')) - 1]
      } catch {
        // another thread lets an allocation fail
        return 0
      }
    }
    return this.dice.roll(2)
      ? this.foreign[this.dice.roll(this.foreign.length)]
      : this.dice.pick([...this.stale, 0, 1e9])
  }

  /** Sizes; none that the machine would really give: those between a million elements and what no machine has. */
  shape(): number[] {
    const shape = Array.from({ length: this.dice.roll(5) }, () =>
      this.dice.roll(30) ? this.dice.pick([0, 1, 2, 2, 4, 4, 8, 16]) : this.dice.pick(ODD),
    )
    const n = shape.reduce((a, b) => a * Math.abs(b), 1)
    const kept = n > 1e6 && n < 2 ** 40 ? [2, 2] : shape
    plain.add(kept)
    return kept
  }

  data(): unknown {
    const n = this.dice.pick([0, 1, 2, 4, 4, 8, 16, 64])
    const make = this.dice.pick([Float32Array, Float32Array, Float64Array, Int32Array])
    if (this.dice.roll(8)) return Int32Array === make ? new Int32Array(n).fill(1) : new make(n).fill(0.5)
    switch (this.dice.roll(6)) {
      case 0: {
        const gone = new Float32Array(n)
        structuredClone(gone.buffer, { transfer: [gone.buffer] })
        return gone
      }
      case 1:
        return new Float32Array(new SharedArrayBuffer(4 * n))
      case 2:
        return new BigInt64Array(n)
      case 3:
        return new Uint8Array(n)
      case 4: {
        const growing = new (ArrayBuffer as unknown as new (n: number, o: object) => ArrayBuffer)(64, {
          maxByteLength: 256,
        })
        const view = new Float32Array(growing)
        ;(growing as unknown as { resize(n: number): void }).resize?.(8)
        return view
      }
      default:
        return new DataView(new ArrayBuffer(8))
    }
  }

  /** A value that no argument expects, or that does something when it is looked at. */
  hostile(): unknown {
    const planted = (): never => {
      throw new Planted('planted')
    }
    const take = (): number => {
      // takes a tensor away while the arguments are read
      const h = this.live.pop()
      if (h !== undefined && native.isLive(h)) native.dispose(h)
      return h ?? 0
    }
    switch (this.dice.roll(12)) {
      case 0:
        return new Proxy([1, 2], { get: planted })
      case 1:
        return Object.defineProperty([1, 2, 3], 1, { get: planted })
      case 2: {
        const list = [this.handle(), 0, this.handle()]
        return Object.defineProperty(list, 1, { get: take })
      }
      case 3: {
        const list: unknown[] = [this.handle(), 0, this.handle(), this.handle()]
        return Object.defineProperty(list, 1, {
          get: () => {
            list.length = 2
            return take()
          },
        })
      }
      case 4:
        return new Proxy({}, { get: (_, k) => (this.dice.roll(40) ? this.value(String(k)) : planted()) })
      case 5:
        return this.dice.pick([undefined, null, true, false, Symbol('s'), 10n, () => 1, new Date(0), /x/])
      case 6:
        return this.dice.pick(['', LONG_TEXT, 'a\0b', '\ud800', ...WORDS])
      case 7:
        return this.dice.pick([...ODD, ...NUMBERS])
      case 8:
        return this.data()
      case 9:
        return this.dice.pick(LONG)
      case 10:
        return [Array(3), new Array(1 + this.dice.roll(3)), [[]], [null]][this.dice.roll(4)]
      default:
        return { x: this.handle(), valueOf: planted, toString: planted }
    }
  }

  /** A value of a type as native.ts has it. */
  value(type: string): unknown {
    const { dice } = this
    if (type.endsWith(' | null')) return dice.roll(3) ? this.value(type.slice(0, -7)) : null
    if (/^\(.*\)\[\]$/.test(type)) return Array.from({ length: dice.roll(3) }, () => this.value(type.slice(1, -3)))
    if (type === 'number[]') return this.shape()
    if (type.endsWith('[]')) return Array.from({ length: dice.roll(4) }, () => this.value(type.slice(0, -2)))
    if (type.startsWith("'")) return dice.pick([...type.matchAll(/'(\w+)'/g)].map((m) => m[1]))
    if (type in OBJECTS) return Object.fromEntries(OBJECTS[type].map(([k, t]) => [k, this.argument(t, 60)]))
    switch (type) {
      case 'H':
        return this.handle()
      case 'number':
        return dice.roll(10) ? dice.pick(NUMBERS) : dice.pick(ODD)
      case 'boolean':
        return dice.roll(2) === 0
      case 'Dtype':
        return dice.pick(['f32', 'f32', 'bf16', 'f64', 'i32', 'i64'])
      case 'Device':
        return dice.roll(20) ? 'cpu' : 'cuda'
      case 'TensorData':
        return this.data()
      case 'string':
        return dice.roll(3) ? dice.pick(WORDS) : this.file
      default:
        return this.hostile()
    }
  }

  argument(type: string, odds: number): unknown {
    return this.dice.roll(odds) ? this.value(type) : this.hostile()
  }

  argumentsOf(name: string, types: readonly string[]): unknown[] {
    const list = types.map((t) => this.argument(t, 25))
    const [count] = list
    if (name === 'setThreads' && typeof count === 'number' && count > 4 && count <= 1024) list[0] = 2
    // neither kills, nor keeps all files from being read
    if (name === 'failFiles') list[2] = false
    if (name === 'receive' && this.tickets.length && this.dice.roll(4)) list[0] = this.tickets.at(-1)
    if (name === 'scopeEnd' && this.dice.roll(4)) list[0] = this.depth
    if (/^(read|write)File$|^fileCall$/.test(name))
      for (const [i, v] of list.entries()) if (typeof v === 'string' && v !== 'f32') list[i] = this.file
    if (this.dice.roll(60) === 0) list.pop()
    if (this.dice.roll(60) === 0) list.push(this.hostile())
    return list
  }

  /** Takes up what a call gave. */
  keep(name: string, result: unknown, [first]: unknown[]): void {
    if (name === 'receive') this.tickets = this.tickets.filter((t) => t !== first)
    if (name === 'scopeBegin') this.depth = result as number
    else if (name === 'scopeEnd') this.depth--
    else if (name === 'send') this.tickets.push(result as number)
    else this.live.push(...(Array.isArray(result) ? result : [result]).filter((h) => typeof h === 'number'))
    while (this.live.length > 40) this.drop(this.live.shift() as number)
  }

  drop(h: number): void {
    if (native.isLive(h)) native.dispose(h)
    this.stale = [...this.stale.slice(-7), h]
  }

  /** Everything goes; nothing may be left then. @returns handles that are */
  clear(): number {
    allowAll()
    native.setGradEnabled(true)
    for (; this.depth > 0; this.depth--) native.scopeEnd(this.depth)
    for (const t of this.tickets.splice(0)) this.live.push(native.receive(t))
    for (const h of this.live.splice(0)) this.drop(h)
    return native.memory().handles
  }
}

export interface Start {
  job: Job
  thread: number
  foreign: Float64Array
}
const FUNCTIONS = signatures()
const RESULTS = new Set(['H', 'H[]', 'H | null', 'scopeBegin'])

/** One thread's calls and what came of them. */
class Thread {
  readonly state: Report = {
    ...{ done: 0, accepted: 0, refused: 0, codes: {}, slowest: 0 },
    ...{ rss: 0, heap: 0, files: 0, handles: 0 },
  }
  readonly #seen = new Set<string>()
  readonly #last: number
  readonly #caller: Caller
  readonly #file: string
  constructor(
    readonly start: Start,
    readonly send: (r: Report) => void,
  ) {
    const { job, thread, foreign } = start
    this.#file = path.join(job.folder, `file-${thread}`)
    this.#last = fs.openSync(path.join(job.folder, `last-call-${thread}`), 'w')
    this.#caller = new Caller(job.seed, job.from * 16 + thread, foreign, this.#file)
  }

  found(number: number, cause: string, message: string, call = ''): void {
    if (this.#seen.has(cause)) return
    this.#seen.add(cause)
    const { seed, findings } = this.start.job
    const file = path.join(findings, `native-${seed}-${this.start.thread}-${number}`)
    fs.writeFileSync(file, `${call}\n${message}\n`)
    const finding = { reader: 'native', seed, number, cause, message: `${call}\n${message}`, file }
    this.send({ ...this.state, finding })
  }

  #one(number: number): void {
    const [caller, { state }] = [this.#caller, this]
    const f = caller.dice.pick(FUNCTIONS)
    const list = caller.argumentsOf(f.name, f.arguments)
    const call = `${f.name}(${list.map(say).join(', ')})`
    fs.writeSync(this.#last, `${call.slice(0, 250).padEnd(250)}\n`, 0)
    const start = performance.now()
    try {
      const result = (native as unknown as Record<string, (...a: unknown[]) => unknown>)[f.name](...list)
      state.accepted++
      if (RESULTS.has(f.result) || ['scopeBegin', 'scopeEnd', 'send'].includes(f.name))
        caller.keep(f.name, result, list)
    } catch (e) {
      const code = refusal(e, true)
      if (code === null) this.found(number, `${f.name}: ${causeOf(e)}`, String((e as Error)?.stack ?? e), call)
      else {
        state.refused++
        state.codes[code] = (state.codes[code] ?? 0) + 1
      }
    }
    const ms = performance.now() - start
    if (ms > state.slowest) state.slowest = ms
    if (ms > SLOW) this.found(number, `${f.name}: slow`, `${Math.round(ms)} ms`, call)
  }

  async calls(): Promise<void> {
    const { job, thread, foreign } = this.start
    const [caller, { state }] = [this.#caller, this]
    const started = Date.now()
    let told = started
    const mine = Math.ceil(job.runs / THREADS)
    for (let n = 0; n < mine && ((n & 63) !== 0 || Date.now() - started < job.ms); n++) {
      if (n % ROUND === 0) {
        const left = caller.clear()
        if (left) this.found(n, 'tensors', `${left} left`)
        fs.writeFileSync(this.#file, Buffer.alloc(256))
      }
      // now and then an allocation or a file call fails, but not for long
      if (n % 100 === 99) allowAll()
      this.#one(n)
      state.done++
      if (caller.live.length) foreign[4 * thread + (n & 3)] = caller.live[0]
      if ((n & 63) === 0 && Date.now() - told > 1000) {
        told = Date.now()
        this.send(state)
        await new Promise((resolve) => setImmediate(resolve))
      }
    }
    const left = caller.clear()
    if (left) this.found(-1, 'tensors', `${left} left`)
    fs.closeSync(this.#last)
    this.send(state)
  }
}

/** The thread of startThread. */
export async function work(start: Start, port: MessagePort): Promise<void> {
  await new Thread(start, (r) => port.postMessage(r)).calls()
}

/** What all threads' reports come to. */
function merged(own: Report, others: Iterable<Report>): Report {
  const all = { ...own, codes: { ...own.codes } }
  for (const r of others) {
    all.done += r.done
    all.accepted += r.accepted
    all.refused += r.refused
    all.slowest = Math.max(all.slowest, r.slowest)
    for (const [code, n] of Object.entries(r.codes)) all.codes[code] = (all.codes[code] ?? 0) + n
  }
  return all
}

/** All threads; this one calls too. */
export async function fuzzNative(job: Job, send: (r: Report) => void): Promise<void> {
  process.chdir(job.folder)
  native.setThreads(2)
  const before = native.memory().inUse
  const files = fs.readdirSync('/proc/self/fd').length
  const foreign = new Float64Array(new SharedArrayBuffer(8 * 4 * THREADS))
  const others = new Map<number, Report>()
  const own = new Thread({ job, thread: 0, foreign }, (r) => send(merged(r, others.values())))
  const ends = Array.from({ length: THREADS - 1 }, (_, i) => {
    const data = { job, thread: i + 1, foreign } satisfies Start
    const worker = startThread(import.meta.url, 'native', data)
    worker.on('message', ({ finding, ...r }: Report) => {
      others.set(i, r)
      if (finding) own.send({ ...own.state, finding })
    })
    return new Promise((resolve, reject) => worker.on('exit', resolve).on('error', reject))
  })
  await own.calls()
  await Promise.all(ends)
  allowAll()
  native.trim()
  const { inUse } = native.memory()
  if (inUse !== before) own.found(-2, 'memory', `${before} -> ${inUse} bytes of tensors`)
  const now = fs.readdirSync('/proc/self/fd').length
  if (now > files + 2) own.found(-3, 'descriptors', `${files} -> ${now}`)
  own.send({ ...own.state, end: true })
}

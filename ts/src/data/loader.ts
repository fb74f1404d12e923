/**
 * Batches for training, prepared ahead of time. Worker threads decode pictures into shared memory, so the next batch can
 * be taken without the event loop; with 0 workers the same is done inline. What comes out is a pure function of
 * (data, options, step): neither the number of workers nor timing changes it.
 */
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import { type PackedBatch, packBatch } from '../models/packed-batch.js'
import type { ImageLimits } from '../processing/image/decode.js'
import { type PictureTask, preparePicture } from '../processing/image/prepare.js'
import { normaliseInto, normaliseTable, type Preprocess } from '../processing/image/preprocess.js'
import { buildSample, type Sample, type SampleOptions } from '../processing/sample.js'
import type { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { startThread } from '../util/worker.js'
import type { Dataset } from './dataset.js'
import { DropLog, type Dropped } from './drop-log.js'
import { BAD, ERROR_BYTES, PENDING, type SharedSlots, type WorkerMessage } from './image-worker.js'

export interface LoaderOptions extends SampleOptions {
  tokenizer: Tokenizer
  preprocess: Preprocess
  /** samples of an optimiser step */
  batch: number
  /** samples of a micro-batch; default: batch */
  micro?: number
  seed: number
  /** number of steps; default: one epoch */
  steps?: number
  /** first step, when a run continues; default 0 */
  startStep?: number
  groupByLength?: boolean
  shuffle?: boolean
  gateText?: 'all' | 'instruction'
  /** false: sequences without a place for an alignment vector */
  align?: boolean
  /** share of records that may have unusable pictures before the run stops; default 0.01 */
  maxBad?: number
  /** takes note of records that are left out; default: a log of the loader's own */
  dropped?: DropLog
  /** augment pictures (random numbers of seed, epoch and record) */
  augment?: boolean
  /** decode threads; 0: in this thread. Default: at most 4, one less than the processors */
  workers?: number
  /** micro-batches that are prepared ahead; default 2 */
  ahead?: number
  limits?: ImageLimits
  /** longest wait for pictures, seconds; default 300 */
  timeout?: number
}

/** One micro-batch and its place in the run. */
export interface LoadedBatch {
  step: number
  epoch: number
  /** 0..microCount-1 within the step */
  micro: number
  microCount: number
  /** null when every sample of it had to be left out */
  packed: PackedBatch | null
  /** of the records in `packed` */
  indices: number[]
}

/** A micro-batch in preparation. */
interface Job {
  step: number
  epoch: number
  micro: number
  microCount: number
  indices: number[]
  samples: Sample[]
  /** per sample its place among the pictures, -1 for text */
  picture: number[]
  pictures: number
  /** noted when the micro-batch is taken, so that the state belongs to the step */
  skipped: Dropped[]
  truncated: number[]
  slot: number
  /** inline only */
  inline: Promise<(Uint8Array | Error)[]> | null
}

type Plan = Pick<Job, 'step' | 'epoch' | 'micro' | 'microCount' | 'indices'>

/** Threads on which Node runs sharp's work for all workers together, unless UV_THREADPOOL_SIZE says otherwise. */
const SHARP_THREADS = 4

/** Fixed set of threads with their shared memory. */
class Pool {
  readonly slots: SharedSlots
  private readonly workers: Worker[] = []
  private failure: Error | null = null
  private next = 0
  constructor(count: number, slotCount: number, capacity: number, pictureBytes: number) {
    const room = slotCount * capacity
    this.slots = {
      pixels: new SharedArrayBuffer(room * pictureBytes),
      errors: new SharedArrayBuffer(room * ERROR_BYTES),
      status: new SharedArrayBuffer(4 * room),
      done: new SharedArrayBuffer(4 * slotCount),
      ready: new SharedArrayBuffer(4),
      capacity,
      pictureBytes,
    }
    const lanes = Math.max(2, Math.ceil(SHARP_THREADS / count))
    for (let i = 0; i < count; i++) {
      const w = startThread(import.meta.url, 'data/image-worker', {
        decodeSlots: this.slots,
        lanes,
        ready: this.slots.ready,
      })
      w.unref()
      w.on('error', (e) => {
        this.failure ??= e
      })
      this.workers.push(w)
    }
  }

  private check(): void {
    if (this.failure || Atomics.load(new Int32Array(this.slots.ready), 0) < 0)
      throw mismatch(
        'ERR_DATA',
        'loader',
        'decode worker',
        'a running worker',
        String(this.failure ?? 'failed to start'),
        this.failure,
      )
  }
  /** Waits until all workers run. */
  async started(timeoutMs: number): Promise<void> {
    const ready = new Int32Array(this.slots.ready)
    const end = Date.now() + timeoutMs
    while (Atomics.load(ready, 0) < this.workers.length) {
      this.check()
      if (Date.now() > end)
        throw mismatch('ERR_DATA', 'loader', 'decode workers', 'a start in time', `${timeoutMs} ms passed`)
      await sleep(2)
    }
  }
  submit(slot: number, tasks: PictureTask[]): void {
    new Int32Array(this.slots.status).fill(PENDING, slot * this.slots.capacity, (slot + 1) * this.slots.capacity)
    Atomics.store(new Int32Array(this.slots.done), slot, 0)
    tasks.forEach((task, i) => {
      this.workers[this.next++ % this.workers.length].postMessage({ slot, i, task } satisfies WorkerMessage)
    })
  }
  /** Waits for `count` pictures of a slot, leaving the event loop free. */
  async wait(slot: number, count: number, timeoutMs: number): Promise<void> {
    const done = new Int32Array(this.slots.done)
    const end = Date.now() + timeoutMs
    while (Atomics.load(done, slot) < count) {
      this.check()
      if (Date.now() > end) throw this.late(slot, count, timeoutMs)
      await sleep(1)
    }
  }
  /** The same without the event loop. */
  waitSync(slot: number, count: number, timeoutMs: number): void {
    const done = new Int32Array(this.slots.done)
    const end = Date.now() + timeoutMs
    for (let n = Atomics.load(done, slot); n < count; n = Atomics.load(done, slot)) {
      this.check()
      if (Date.now() > end) throw this.late(slot, count, timeoutMs)
      Atomics.wait(done, slot, n, 1000)
    }
  }
  private late(slot: number, count: number, timeoutMs: number): AlignGPTError {
    const n = Atomics.load(new Int32Array(this.slots.done), slot)
    return mismatch('ERR_DATA', 'loader', 'decode workers', `${count} pictures in ${timeoutMs} ms`, `${n}`)
  }
  /** The finished picture, or why there is none. The bytes are valid until the slot is used again. */
  result(slot: number, i: number): Uint8Array | Error {
    const { status, errors, pixels, capacity, pictureBytes } = this.slots
    const at = slot * capacity + i
    if (Atomics.load(new Int32Array(status), at) !== BAD) return new Uint8Array(pixels, at * pictureBytes, pictureBytes)
    const text = Buffer.from(new Uint8Array(errors, at * ERROR_BYTES, ERROR_BYTES))
    return new AlignGPTError('ERR_IMAGE', text.toString('utf8', 0, text.indexOf(0)))
  }
  /** Lets the workers finish what they have and ends them. */
  async close(): Promise<void> {
    await Promise.all(
      this.workers.map(async (w) => {
        const ended = new Promise((resolve) => w.once('exit', resolve))
        w.ref()
        w.postMessage(null satisfies WorkerMessage)
        const timer = setTimeout(() => void w.terminate(), 5000)
        await ended
        clearTimeout(timer)
      }),
    )
  }
}

function checkOptions(o: LoaderOptions): void {
  const whole = (name: string, v: number, min: number): void => {
    if (!Number.isInteger(v) || v < min) throw mismatch('ERR_ARGUMENT', 'loader', name, `an integer >= ${min}`, show(v))
  }
  whole('batch', o.batch, 1)
  whole('micro', o.micro ?? 1, 1)
  whole('startStep', o.startStep ?? 0, 0)
  whole('steps', o.steps ?? 0, 0)
  whole('workers', o.workers ?? 0, 0)
  whole('ahead', o.ahead ?? 1, 1)
  whole('patches', o.patches, 1)
}

/** Micro-batch after micro-batch. Open it with openLoader, close it when done. */
export class Loader {
  /** what was left out so far */
  readonly dropped: DropLog
  /** steps of the whole run */
  readonly steps: number
  readonly stepsPerEpoch: number
  private readonly jobs: Job[] = []
  private readonly plan: Generator<Plan>
  private readonly table: Float32Array
  private readonly pool: Pool | null
  private readonly slotCount: number
  /** seconds spent waiting for pictures so far */
  waited = 0
  private scheduled = 0
  private closed = false
  private busy = false

  /** Use openLoader. */
  constructor(
    private readonly dataset: Dataset,
    private readonly options: LoaderOptions,
  ) {
    checkOptions(options)
    const { batch, micro = batch, preprocess, ahead = 2 } = options
    this.dropped = options.dropped ?? new DropLog(dataset)
    this.stepsPerEpoch = dataset.stepsPerEpoch(batch)
    this.steps = options.steps ?? this.stepsPerEpoch
    if (this.steps > 0 && dataset.length === 0)
      throw mismatch('ERR_DATA', 'loader', dataset.file, 'at least one record', 'none')
    this.plan = this.makePlan()
    this.table = normaliseTable(preprocess)
    this.slotCount = ahead + 1
    const workers = options.workers ?? Math.min(4, Math.max(1, availableParallelism() - 1))
    const capacity = Math.min(micro, batch)
    this.pool = workers > 0 ? new Pool(workers, this.slotCount, capacity, preprocess.crop ** 2 * 3) : null
  }

  /** Waits for the workers and starts the first micro-batches. */
  async start(): Promise<this> {
    await this.pool?.started(this.timeoutMs)
    this.fill()
    return this
  }

  private get timeoutMs(): number {
    return 1000 * (this.options.timeout ?? 300)
  }

  /** What every micro-batch consists of, in order. */
  private *makePlan(): Generator<Plan> {
    const { batch, micro = batch, seed, startStep = 0, groupByLength, shuffle } = this.options
    for (let step = startStep; step < this.steps; ) {
      const epoch = Math.floor(step / this.stepsPerEpoch)
      const start = step % this.stepsPerEpoch
      for (const indices of this.dataset.batches({ batch, seed, epoch, groupByLength, shuffle, start })) {
        if (step >= this.steps) return
        const microCount = Math.ceil(indices.length / micro)
        for (let k = 0; k < microCount; k++)
          yield { step, epoch, micro: k, microCount, indices: [...indices.slice(k * micro, (k + 1) * micro)] }
        step++
      }
    }
  }

  /** Starts micro-batches until `ahead` are under way. */
  private fill(): void {
    const ahead = this.options.ahead ?? 2
    while (this.jobs.length < ahead) {
      const next = this.plan.next()
      if (next.done) return
      this.jobs.push(this.begin(next.value))
    }
  }

  /** Renders and tokenises the samples of a micro-batch and hands its pictures out. */
  private begin(p: Plan): Job {
    const { tokenizer, preprocess, augment, seed, limits = {} } = this.options
    const slot = this.scheduled++ % this.slotCount
    const empty = { indices: [], samples: [], picture: [], pictures: 0, skipped: [], truncated: [], inline: null }
    const job: Job = { ...p, ...empty, slot }
    const tasks: PictureTask[] = []
    for (const index of p.indices) {
      const sample = buildSample(this.dataset.record(index), tokenizer, this.options)
      const { id, image, skip } = sample
      if (skip) {
        job.skipped.push({ index, id, image, reason: skip })
        continue
      }
      if (sample.length < sample.fullLength) job.truncated.push(index)
      job.indices.push(index)
      job.samples.push(sample)
      job.picture.push(image === null ? -1 : tasks.length)
      if (image === null) continue
      const augmentation: PictureTask['augmentation'] = augment ? [seed, augmentStream(p.epoch, index)] : null
      tasks.push({
        source: this.dataset.picture(image),
        preprocess: plain(preprocess),
        augmentation,
        limits,
      })
    }
    job.pictures = tasks.length
    if (this.pool) this.pool.submit(job.slot, tasks)
    else job.inline = Promise.all(tasks.map((t) => preparePicture(t).catch((e: Error) => e)))
    return job
  }

  /** Packs a finished micro-batch; samples with bad pictures are noted and left out. */
  private finish(job: Job, result: (i: number) => Uint8Array | Error): LoadedBatch {
    const { patches, gateText, align, preprocess, maxBad = 0.01 } = this.options
    const kept: Sample[] = []
    const indices: number[] = []
    const pixels: (Uint8Array | null)[] = []
    job.samples.forEach((sample, k) => {
      const u8 = job.picture[k] < 0 ? null : result(job.picture[k])
      if (u8 instanceof Error) {
        this.dropped.noteBad({ index: job.indices[k], id: sample.id, image: sample.image, reason: u8.message })
        return
      }
      kept.push(sample)
      indices.push(job.indices[k])
      pixels.push(u8)
    })
    for (const d of job.skipped) this.dropped.noteSkipped(d)
    for (const i of job.truncated) this.dropped.noteTruncated(i)
    this.dropped.check(maxBad)
    const fill = (out: Float32Array, offset: number, b: number): void =>
      normaliseInto(pixels[b] as Uint8Array, this.table, out, offset)
    const packed = kept.length ? packBatch(kept, patches, { gateText, align, size: preprocess.crop, fill }) : null
    const { step, epoch, micro, microCount } = job
    return { step, epoch, micro, microCount, packed, indices }
  }

  private take(): Job | undefined {
    if (this.closed) throw mismatch('ERR_ARGUMENT', 'loader', 'next', 'an open loader', 'a closed one')
    this.fill()
    return this.jobs.shift()
  }

  /**
   * The next micro-batch, null after the last.
   * @throws AlignGPTError ERR_DATA: too many bad pictures (with the list), a record that cannot be rendered
   */
  async next(): Promise<LoadedBatch | null> {
    // Two calls at once would have more micro-batches in flight than there is shared memory for.
    if (this.busy) throw mismatch('ERR_ARGUMENT', 'loader', 'next', 'one call at a time', 'a second one')
    this.busy = true
    try {
      return await this.advance()
    } finally {
      this.busy = false
    }
  }

  private async advance(): Promise<LoadedBatch | null> {
    const job = this.take()
    if (!job) return null
    const { pool } = this
    // The next one starts before this one is waited for, so that workers are never without work.
    this.fill()
    const from = performance.now()
    if (!pool) {
      const results = await (job.inline as Promise<(Uint8Array | Error)[]>)
      this.waited += (performance.now() - from) / 1000
      return this.finish(job, (i) => results[i])
    }
    await pool.wait(job.slot, job.pictures, this.timeoutMs)
    this.waited += (performance.now() - from) / 1000
    return this.finish(job, (i) => pool.result(job.slot, i))
  }

  /** The same without the event loop; needs workers. @throws AlignGPTError also ERR_ARGUMENT without workers */
  nextSync(): LoadedBatch | null {
    const { pool } = this
    if (!pool) throw mismatch('ERR_ARGUMENT', 'loader', 'nextSync', 'at least one worker', '0')
    if (this.busy) throw mismatch('ERR_ARGUMENT', 'loader', 'nextSync', 'one call at a time', 'a second one')
    const job = this.take()
    if (!job) return null
    this.fill()
    const from = performance.now()
    pool.waitSync(job.slot, job.pictures, this.timeoutMs)
    this.waited += (performance.now() - from) / 1000
    return this.finish(job, (i) => pool.result(job.slot, i))
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<LoadedBatch> {
    for (let b = await this.next(); b; b = await this.next()) yield b
  }

  /** Ends the workers; nothing is left running. */
  async close(): Promise<void> {
    if (this.closed) return
    this.closed = true
    await Promise.all(this.jobs.map((j) => j.inline))
    this.jobs.length = 0
    await this.pool?.close()
    this.dataset.close()
  }
}

/** A stream of its own for every record and epoch; the order of the epoch uses streams below 2^32. */
const augmentStream = (epoch: number, index: number): number => (epoch + 1) * 0x100000000 + index

/** Only what a worker needs: a config's raw content may be large. */
const plain = ({ size, crop, mean, std, pad }: Preprocess): Preprocess => ({ size, crop, mean, std, pad })

/**
 * Opens a loader: workers run and the first micro-batches are under way.
 * @throws AlignGPTError ERR_ARGUMENT, ERR_DATA
 */
export async function openLoader(dataset: Dataset, options: LoaderOptions): Promise<Loader> {
  const loader = new Loader(dataset, options)
  try {
    return await loader.start()
  } catch (e) {
    await loader.close()
    throw e
  }
}

/**
 * Batches for training, prepared ahead of time. Worker threads decode pictures into shared memory, so the next batch can
 * be taken without the event loop; with 0 workers the same is done inline. What comes out is a pure function of
 * (data, options, step): neither the number of workers nor timing changes it.
 */
import { availableParallelism } from 'node:os'
import type { DataRecord } from '../formats/record-file.js'
import { type PackedBatch, packBatch } from '../models/packed-batch.js'
import type { ImageLimits } from '../processing/image/decode.js'
import { type ImageTask, prepareImage } from '../processing/image/prepare.js'
import { normaliseInto, normaliseTable, type Preprocess } from '../processing/image/preprocess.js'
import { buildSample, type Sample, type SampleOptions } from '../processing/sample.js'
import type { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import type { Dataset } from './dataset.js'
import { DropLog, type Dropped } from './drop-log.js'
import { ImagePool } from './image-pool.js'
import { augmentStream } from './order.js'

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
  /** share of records that may be unusable, they or their pictures, before the run stops; default 0.01 */
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
  /** records that are no sample; a run has left them out before it starts (Dataset.usable) */
  unusable: Dropped[]
  slot: number
  /** inline only */
  inline: Promise<(Uint8Array | Error)[]> | null
}

type Plan = Pick<Job, 'step' | 'epoch' | 'micro' | 'microCount' | 'indices'>

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
  const { maxBad = 0 } = o
  if (!(maxBad >= 0 && maxBad <= 1))
    throw mismatch('ERR_ARGUMENT', 'loader', 'maxBad', 'a share of the records, 0..1', show(maxBad))
}

/** Micro-batch after micro-batch. Open it with openLoader, close it when done. */
export class Loader {
  /** what was left out so far */
  readonly dropped: DropLog
  /** steps of the whole run */
  readonly steps: number
  readonly stepsPerEpoch: number
  readonly #dataset: Dataset
  readonly #options: LoaderOptions
  readonly #jobs: Job[] = []
  readonly #plan: Generator<Plan>
  readonly #table: Float32Array
  readonly #pool: ImagePool | null
  readonly #slotCount: number
  /** seconds spent waiting for pictures so far */
  waited = 0
  #scheduled = 0
  #closed = false
  #busy = false

  /** Use openLoader. */
  constructor(dataset: Dataset, options: LoaderOptions) {
    checkOptions(options)
    this.#dataset = dataset
    this.#options = options
    const { batch, micro = batch, preprocess, ahead = 2 } = options
    this.dropped = options.dropped ?? new DropLog(dataset)
    this.stepsPerEpoch = dataset.stepsPerEpoch(batch)
    this.steps = options.steps ?? this.stepsPerEpoch
    if (this.steps > 0 && dataset.length === 0)
      throw mismatch('ERR_DATA', 'loader', dataset.file, 'at least one record', 'none')
    this.#plan = this.#makePlan()
    this.#table = normaliseTable(preprocess)
    this.#slotCount = ahead + 1
    const workers = options.workers ?? Math.min(4, Math.max(1, availableParallelism() - 1))
    const capacity = Math.min(micro, batch)
    this.#pool = workers > 0 ? new ImagePool(workers, this.#slotCount, capacity, preprocess.crop ** 2 * 3) : null
  }

  /** Waits for the workers and starts the first micro-batches. */
  async start(): Promise<this> {
    await this.#pool?.started(this.#timeoutMs)
    this.#fill()
    return this
  }

  get #timeoutMs(): number {
    return 1000 * (this.#options.timeout ?? 300)
  }

  /** What every micro-batch consists of, in order. */
  *#makePlan(): Generator<Plan> {
    const { batch, micro = batch, seed, startStep = 0, groupByLength, shuffle } = this.#options
    for (let step = startStep; step < this.steps; ) {
      const epoch = Math.floor(step / this.stepsPerEpoch)
      const start = step % this.stepsPerEpoch
      for (const indices of this.#dataset.batches({ batch, seed, epoch, groupByLength, shuffle, start })) {
        if (step >= this.steps) return
        const microCount = Math.ceil(indices.length / micro)
        for (let k = 0; k < microCount; k++)
          yield { step, epoch, micro: k, microCount, indices: [...indices.slice(k * micro, (k + 1) * micro)] }
        step++
      }
    }
  }

  /** Starts micro-batches until `ahead` are under way. */
  #fill(): void {
    const ahead = this.#options.ahead ?? 2
    while (this.#jobs.length < ahead) {
      const next = this.#plan.next()
      if (next.done) return
      this.#jobs.push(this.#begin(next.value))
    }
  }

  /** Renders and tokenises the samples of a micro-batch and hands its pictures out. */
  #begin(p: Plan): Job {
    const { preprocess, augment, seed, limits = {} } = this.#options
    const slot = this.#scheduled++ % this.#slotCount
    const empty = { indices: [], samples: [], picture: [], pictures: 0, inline: null }
    const left = { skipped: [], truncated: [], unusable: [] }
    const job: Job = { ...p, ...empty, ...left, slot }
    const tasks: ImageTask[] = []
    for (const index of p.indices) {
      const record = this.#dataset.record(index)
      const sample = this.#sample(record)
      const { id, image } = record
      if (sample instanceof Error) {
        job.unusable.push({ index, id, image, reason: sample.message })
        continue
      }
      const { skip } = sample
      if (skip) {
        job.skipped.push({ index, id, image, reason: skip })
        continue
      }
      if (sample.length < sample.fullLength) job.truncated.push(index)
      job.indices.push(index)
      job.samples.push(sample)
      job.picture.push(image === null ? -1 : tasks.length)
      if (image === null) continue
      const augmentation: ImageTask['augmentation'] = augment ? [seed, augmentStream(p.epoch, index)] : null
      tasks.push({
        source: this.#dataset.picture(image),
        preprocess: plain(preprocess),
        augmentation,
        limits,
      })
    }
    job.pictures = tasks.length
    if (this.#pool) this.#pool.submit(job.slot, tasks)
    else job.inline = Promise.all(tasks.map((t) => prepareImage(t).catch((e: Error) => e)))
    return job
  }

  /** The sample of a record, or why it is none. */
  #sample(record: DataRecord): Sample | Error {
    try {
      return buildSample(record, this.#options.tokenizer, this.#options)
    } catch (e) {
      if (e instanceof AlignGPTError && e.code === 'ERR_DATA') return e
      throw e
    }
  }

  /** Packs a finished micro-batch; samples with bad pictures are noted and left out. */
  #finish(job: Job, result: (i: number) => Uint8Array | Error): LoadedBatch {
    const { patches, gateText, align, preprocess, maxBad = 0.01 } = this.#options
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
    for (const d of job.unusable) this.dropped.noteBad(d)
    for (const d of job.skipped) this.dropped.noteSkipped(d)
    for (const i of job.truncated) this.dropped.noteTruncated(i)
    this.dropped.check(maxBad)
    const fill = (out: Float32Array, offset: number, b: number): void =>
      normaliseInto(pixels[b] as Uint8Array, this.#table, out, offset)
    const packed = kept.length ? packBatch(kept, patches, { gateText, align, size: preprocess.crop, fill }) : null
    const { step, epoch, micro, microCount } = job
    return { step, epoch, micro, microCount, packed, indices }
  }

  #take(): Job | undefined {
    if (this.#closed) throw mismatch('ERR_ARGUMENT', 'loader', 'next', 'an open loader', 'a closed one')
    this.#fill()
    return this.#jobs.shift()
  }

  /**
   * The next micro-batch, null after the last.
   * @throws AlignGPTError ERR_DATA: too many bad records and pictures (with the list)
   */
  async next(): Promise<LoadedBatch | null> {
    // Two calls at once would have more micro-batches in flight than there is shared memory for.
    if (this.#busy) throw mismatch('ERR_ARGUMENT', 'loader', 'next', 'one call at a time', 'a second one')
    this.#busy = true
    try {
      return await this.#advance()
    } finally {
      this.#busy = false
    }
  }

  async #advance(): Promise<LoadedBatch | null> {
    const job = this.#take()
    if (!job) return null
    const pool = this.#pool
    // The next one starts before this one is waited for, so that workers are never without work.
    this.#fill()
    const from = performance.now()
    if (!pool) {
      const results = await (job.inline as Promise<(Uint8Array | Error)[]>)
      this.waited += (performance.now() - from) / 1000
      return this.#finish(job, (i) => results[i])
    }
    await pool.wait(job.slot, job.pictures, this.#timeoutMs)
    this.waited += (performance.now() - from) / 1000
    return this.#finish(job, (i) => pool.result(job.slot, i))
  }

  /** The same without the event loop; needs workers. @throws AlignGPTError also ERR_ARGUMENT without workers */
  nextSync(): LoadedBatch | null {
    const pool = this.#pool
    if (!pool) throw mismatch('ERR_ARGUMENT', 'loader', 'nextSync', 'at least one worker', '0')
    if (this.#busy) throw mismatch('ERR_ARGUMENT', 'loader', 'nextSync', 'one call at a time', 'a second one')
    const job = this.#take()
    if (!job) return null
    this.#fill()
    const from = performance.now()
    pool.waitSync(job.slot, job.pictures, this.#timeoutMs)
    this.waited += (performance.now() - from) / 1000
    return this.#finish(job, (i) => pool.result(job.slot, i))
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<LoadedBatch> {
    for (let b = await this.next(); b; b = await this.next()) yield b
  }

  /** Ends the workers; nothing is left running. */
  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await Promise.all(this.#jobs.map((j) => j.inline))
    this.#jobs.length = 0
    await this.#pool?.close()
    this.#dataset.close()
  }
}

/** Only what a worker needs: a config's raw content may be large. */
const plain = ({ size, crop, mean, std, pad, exifOrientation }: Preprocess): Preprocess => ({
  ...{ size, crop, mean, std, pad, exifOrientation },
})

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

/**
 * A data set: a LLaVA data file and its pictures. The file is read once to check every record and remember where it lies;
 * later a record is read by its byte range alone. The order of training is a pure function of (seed, epoch).
 */
import fs from 'node:fs'
import path from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { imageOf } from '../formats/image-key.js'
import { type SavedOptions, savedArrays } from '../formats/index-cache.js'
import { unpackParquet } from '../formats/parquet.js'
import { type DataRecord, type RecordRange, splitRecords, wordCount } from '../formats/record-file.js'
import {
  expandShards,
  type ImageFiles,
  type ImageSource,
  type LinkOptions,
  openImages,
} from '../processing/image/source.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { headOf } from '../util/file-kind.js'
import { Numbers } from '../util/growable-array.js'
import { permutation } from '../util/rng.js'
import { epochOrder, HOLD_OUT_STREAM, type OrderOptions } from './order.js'
import { type BadRecord, type Diagnosis, diagnose, needSome, type RecordNeeds, unmet } from './record-check.js'

/** Of the saved index: a change of what a record means makes it another one. */
const INDEX = 'records, version 2'
// Records that are looked at before the event loop gets its turn.
const AT_ONCE = 1000

/** A data file and its image folder. Open it with loadDataset. */
export class Dataset {
  readonly #pictures: ImageFiles | null
  readonly #saved: SavedOptions & LinkOptions
  #offsets: Float64Array = new Float64Array(0)
  #sizes: Uint32Array = new Uint32Array(0)
  /** words, negative for text-only records (as LLaVA's modality_lengths) */
  #words: Int32Array = new Int32Array(0)
  /** of a part of the file: the place of each record in the file */
  #numbers: Uint32Array | null = null
  #bad: readonly BadRecord[] = []
  #fd: number | null = null

  /** Use loadDataset. */
  constructor(
    readonly file: string,
    pictures: ImageFiles | null,
    saved: SavedOptions & LinkOptions = {},
  ) {
    this.#pictures = pictures
    this.#saved = saved
  }

  /** Folder or tar files of the pictures, null when none was given. */
  get images(): string | null {
    return this.#pictures?.where ?? null
  }

  /** Whether links in the folder of the pictures may lead out of it. */
  get followLinks(): boolean {
    return this.#saved.followLinks ?? false
  }

  /** Where the picture of this name lies. */
  picture(name: string): ImageSource {
    return this.#pictures?.locate(name) ?? { name, problem: 'a data set without pictures' }
  }

  /** Number of records. */
  get length(): number {
    return this.#offsets.length
  }

  /** Records of the file that no run can use, in the file's order: they are not among those of the data set. */
  get bad(): readonly BadRecord[] {
    return this.#bad
  }

  /**
   * Takes the index saved beside the file, or reads every record.
   * @throws AlignGPTError ERR_DATA: no list of records, or none that can be used
   */
  async open(fresh = false): Promise<this> {
    this.close()
    this.#numbers = null
    this.#bad = []
    const { offsets, sizes, words } = await savedArrays(this.file, INDEX, this.#saved, () => this.#read(), fresh)
    this.#offsets = offsets as Float64Array
    this.#sizes = sizes as Uint32Array
    this.#words = words as Int32Array
    if (this.images === null) {
      const i = this.#words.findIndex((w) => w > 0)
      if (i >= 0) throw this.#needsImages(i)
    }
    if (this.#words.includes(0)) this.#leaveOut([...this.#words.keys()].filter((i) => this.#words[i] === 0))
    return this
  }

  /** Takes records out that are marked as bad; what is wrong with them is read again. */
  #leaveOut(indices: number[]): void {
    const bad = indices.map((index): BadRecord => {
      const found = this.#diagnose(index)
      const { offset: byte, bytes } = this.range(index)
      if (!found.fault)
        throw mismatch('ERR_DATA', 'data', `${this.file} at byte ${byte}`, 'the record seen before', 'another one')
      return { index, id: found.id, byte, bytes, kind: found.fault.kind, reason: found.fault.reason }
    })
    const good = this.#words.reduce((n, w) => n + Number(w !== 0), 0)
    needSome(this.file, good, bad)
    const left = this.subset(Uint32Array.from(this.#words.keys()).filter((i) => this.#words[i] !== 0))
    this.#offsets = left.#offsets
    this.#sizes = left.#sizes
    this.#words = left.#words
    this.#numbers = left.#numbers
    this.#bad = bad
  }

  /** Reads the file again, for example after levels were written into it. @throws AlignGPTError ERR_DATA */
  async reindex(): Promise<void> {
    await this.open(true)
  }

  #needsImages(index: number): AlignGPTError {
    const what = `${this.file}: record ${index}`
    return mismatch('ERR_DATA', 'data', what, 'an images folder, since it names a picture', 'none')
  }

  /** Reads and checks every record; a bad one has no words. */
  async #read(): Promise<{ offsets: Float64Array; sizes: Uint32Array; words: Int32Array }> {
    const [offsets, sizes, words] = [new Numbers(), new Numbers(), new Numbers()]
    let n = 0
    let broken = ''
    const add = (bytes: Buffer, offset: number): void => {
      const found = diagnose(bytes, this.file, offset, n)
      const record = found.fault ? null : found.record
      if (found.fault?.kind === 'json') broken ||= found.fault.reason
      if (record && record.image !== null && this.images === null) throw this.#needsImages(n)
      const length = record ? Math.max(wordCount(record), 1) : 0
      offsets.push(offset)
      sizes.push(bytes.length)
      words.push(record?.image === null ? -length : length)
      n++
    }
    // Where brackets or quotes do not match, the first record that is no JSON says more than where they end.
    await splitRecords(this.file, add).catch((e: Error) => {
      if (!broken || !(e instanceof AlignGPTError)) throw e
      throw new AlignGPTError('ERR_DATA', `[data] ${this.file} ${broken}; from there on: ${e.message}`, { cause: e })
    })
    return {
      offsets: offsets.values.slice(),
      sizes: Uint32Array.from(sizes.values),
      words: Int32Array.from(words.values),
    }
  }

  /** Place of a record in the file. */
  place(index: number): number {
    return this.#numbers ? this.#numbers[index] : index
  }

  /** Some of the records, in the order of their indices here, as a data set that has only them. */
  subset(indices: readonly number[] | Int32Array | Uint32Array): Dataset {
    const part = new Dataset(this.file, this.#pictures, this.#saved)
    part.#offsets = Float64Array.from(indices, (i) => this.#offsets[i])
    part.#sizes = Uint32Array.from(indices, (i) => this.#sizes[i])
    part.#words = Int32Array.from(indices, (i) => this.#words[i])
    part.#numbers = Uint32Array.from(indices, (i) => this.place(i))
    return part
  }

  /**
   * Takes a random share of the records out, at least one: a pure function of (number of records, share, seed). Both parts keep the
   * file's order.
   * @throws AlignGPTError ERR_DATA when no record would be left
   */
  holdOut(share: number, seed: number): { rest: Dataset; held: Dataset } {
    const count = Math.max(1, Math.round(share * this.length))
    if (count >= this.length)
      throw mismatch('ERR_DATA', 'data', `${this.file}: records`, `more than the ${count} held out`, `${this.length}`)
    const order = permutation(this.length, seed, HOLD_OUT_STREAM)
    const [held, rest] = [order.slice(0, count).sort(), order.slice(count).sort()]
    const parts = { rest: this.subset(rest), held: this.subset(held) }
    parts.rest.#bad = this.#bad
    return parts
  }

  /**
   * The records that a run can use: this data set, or a part of it without those that do not meet the needs, which are added to `bad`.
   * @throws AlignGPTError ERR_DATA when there is none
   */
  async usable(needs: RecordNeeds): Promise<Dataset> {
    const bad: BadRecord[] = []
    const good: number[] = []
    for (let i = 0; i < this.length; i++) {
      if (i % AT_ONCE === AT_ONCE - 1) await turn()
      const found = this.#diagnose(i)
      const fault = found.fault ?? unmet(found.record, needs, found.raw)
      if (!fault) good.push(i)
      else {
        const id = found.fault ? found.id : found.record.id
        const { offset: byte, bytes } = this.range(i)
        bad.push({ index: this.place(i), id, byte, bytes, ...fault })
      }
    }
    this.close()
    if (bad.length === 0) return this
    const all = [...this.#bad, ...bad].sort((a, b) => a.index - b.index)
    needSome(this.file, good.length, all)
    const part = this.subset(good)
    part.#bad = all
    return part
  }

  /** Byte range of a record in the file. */
  range(index: number): RecordRange {
    if (!Number.isInteger(index) || index < 0 || index >= this.length)
      throw mismatch('ERR_ARGUMENT', 'data', 'record index', `0..${this.length - 1}`, show(index))
    return { offset: this.#offsets[index], bytes: this.#sizes[index] }
  }

  /** Words of a record on average; 0 of none. */
  get meanWords(): number {
    return this.#words.reduce((n, w) => n + Math.abs(w), 0) / Math.max(1, this.length)
  }

  /** Whether a record names a picture; known without reading it. */
  hasImage(index: number): boolean {
    return this.#words[index] > 0
  }

  /** Number of records that name a picture. */
  get withImage(): number {
    return this.#words.reduce((n, w) => n + Number(w > 0), 0)
  }

  /** Reads one record from the file. @throws AlignGPTError ERR_DATA, ERR_ARGUMENT */
  record(index: number): DataRecord {
    const found = this.#diagnose(index)
    if (!found.fault) return found.record
    const what = `${this.file} at byte ${this.range(index).offset}: record ${this.place(index)}`
    throw mismatch('ERR_DATA', 'data', what, 'the record seen before', `one with ${found.fault.reason}`)
  }

  /** The key that names the image of the first record that has one, as another tool may call it; null without any. */
  imageKey(): string | null {
    const index = this.#words.findIndex((w) => w > 0)
    if (index < 0) return null
    const found = this.#diagnose(index)
    const image = found.fault ? null : imageOf(found.raw as Record<string, unknown>)
    // One that no key of the record names stands in its messages.
    return image && !image.problem ? (image.key ?? 'messages') : null
  }

  #diagnose(index: number): Diagnosis {
    const { offset, bytes } = this.range(index)
    this.#fd ??= fs.openSync(this.file, 'r')
    const b = Buffer.allocUnsafe(bytes)
    for (let done = 0; done < bytes; ) {
      const n = fs.readSync(this.#fd, b, done, bytes - done, offset + done)
      if (n === 0)
        throw mismatch('ERR_DATA', 'data', `${this.file} at byte ${offset + done}`, 'the record seen before', 'the end')
      done += n
    }
    return diagnose(b, this.file, offset, this.place(index))
  }

  /** Every record in file order. */
  *[Symbol.iterator](): Generator<DataRecord> {
    for (let i = 0; i < this.length; i++) yield this.record(i)
  }

  /** Closes the file; it is opened again when a record is read. */
  close(): void {
    if (this.#fd !== null) fs.closeSync(this.#fd)
    this.#fd = null
  }

  /** Record indices in the order of an epoch; a pure function of the file and the options. */
  order(options: OrderOptions): Int32Array {
    return epochOrder(this.#words, options)
  }

  /** Steps of one epoch; the last batch may be smaller. */
  stepsPerEpoch(batch: number): number {
    return Math.ceil(this.length / batch)
  }

  /** Record indices of one batch after the other, from batch `start` of the epoch on. */
  *batches(options: OrderOptions & { start?: number }): Generator<Int32Array> {
    if (!Number.isInteger(options.batch) || options.batch < 1)
      throw mismatch('ERR_ARGUMENT', 'data', 'batch', 'a positive integer', show(options.batch))
    const order = this.order(options)
    for (let i = (options.start ?? 0) * options.batch; i < order.length; i += options.batch)
      yield order.slice(i, i + options.batch)
  }
}

export interface DatasetOptions extends SavedOptions, LinkOptions {
  /**
   * folder the `image` names are relative to (pictures outside it are refused), or tar files with them
   * (`shards/{00000..00009}.tar`, see openImages); default for Parquet: the embedded pictures
   */
  images?: string
  /** the same, where neither `images` is given nor pictures are embedded */
  defaultImages?: string
  /** where Parquet is unpacked; default `<file>.unpacked` */
  unpacked?: string
}

/** Pictures of Parquet rows: embedded, others by their name. */
const bothOf = (embedded: ImageFiles, named: ImageFiles): ImageFiles => ({
  where: named.where,
  locate: (name) => {
    const found = embedded.locate(name)
    return 'problem' in found ? named.locate(name) : found
  },
})

/**
 * The data file itself and its pictures, after Parquet has been unpacked.
 * @throws AlignGPTError ERR_DATA: a folder of pictures beside a file that has them all embedded
 */
export async function openSources(
  file: string,
  { images, defaultImages, unpacked, ...saved }: DatasetOptions,
): Promise<{ records: string; pictures: ImageFiles | null }> {
  const full = path.resolve(file)
  const open = (where: string | undefined): Promise<ImageFiles> | null =>
    where === undefined ? null : openImages(where, saved)
  const isParquet = file.endsWith('.parquet') || (headOf(full)?.toString('latin1', 0, 4) ?? '') === 'PAR1'
  if (!isParquet) return { records: full, pictures: await open(images ?? defaultImages) }
  const u = await unpackParquet(expandShards(full), saved, unpacked)
  if (u.pictures === null) return { records: u.records, pictures: await open(images ?? defaultImages) }
  const embedded = await openImages(u.pictures, saved)
  if (images === undefined || path.resolve(images) === embedded.where) return { records: u.records, pictures: embedded }
  if (u.named === 0) {
    const expected = 'none, since all pictures are embedded in the file (leave --images out, or the column)'
    throw mismatch('ERR_DATA', 'data', `${file}: images`, expected, images)
  }
  return { records: u.records, pictures: bothOf(embedded, await openImages(images, saved)) }
}

/**
 * Opens a LLaVA data file: JSON array, JSON lines, or Parquet (one file, or `train-{00000..00009}.parquet`). Every record is
 * checked now, or was when the index beside a large file was saved; pictures are looked at when needed. Bad records are left out: `bad`
 * has them, with byte, id and what is wrong.
 * @throws AlignGPTError ERR_DATA: file, byte offset or record, what was expected
 */
export async function loadDataset(file: string, options: DatasetOptions = {}): Promise<Dataset> {
  const { records, pictures } = await openSources(file, options)
  return new Dataset(records, pictures, options).open()
}

/**
 * LLaVA data files: a JSON array of records, or one record after the other (JSON lines). The file is read once, in
 * pieces, to check every record and remember where it lies; later a record is read by its byte range alone.
 * The order of training is a pure function of (seed, epoch).
 */
import fs from 'node:fs'
import path from 'node:path'
import { type AlignGPTError, mismatch, show } from './errors.js'
import { decodeUtf8, parseJson } from './json.js'
import type { DataRecord, Turn } from './prompt.js'
import { permutation } from './rng.js'

export { ALIGN_ROW, IMAGE_ROW, type PackedBatch, type PackOptions, packBatch } from './batch.js'
export { type LoadedBatch, type Loader, type LoaderOptions, openLoader } from './loader.js'

const CHUNK = 1 << 20
const MAX_RECORD = 256 * 1024 * 1024
const ROLES: Record<string, Turn['from']> = {
  human: 'human',
  user: 'human',
  gpt: 'gpt',
  assistant: 'gpt',
  system: 'system',
}

/** Byte range of one record in its file. */
export interface RecordRange {
  offset: number
  bytes: number
}

/** A record that was left out of its batch, and why. */
export interface Dropped {
  index: number
  id: string
  /** file name of the picture, null for text */
  image: string | null
  reason: string
}

/** What a run remembers about its data; plain JSON. */
export interface DatasetState {
  /** pictures that could not be used */
  bad: Dropped[]
  /** samples that do not fit the length limit */
  skipped: Dropped[]
  /** indices of samples whose text was cut */
  truncated: number[]
}

const dataError = (file: string, at: number, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'data', `${file} at byte ${at}`, expected, got)

const isSpace = (c: number): boolean => c === 32 || c === 10 || c === 13 || c === 9
const charOf = (c: number): string => JSON.stringify(String.fromCharCode(c))

/** Splits a growing byte stream into records; only brackets and strings are looked at, JSON.parse checks the rest. */
class Splitter {
  private depth = 0
  private inString = false
  private escaped = false
  /** where the current record starts in the buffer; -1: between records */
  private start = -1
  private mode: 'unknown' | 'array' | 'lines' | 'done' = 'unknown'
  /** what may come between records of an array */
  private next: 'value or end' | 'value' | 'comma or end' = 'value or end'
  constructor(
    private readonly file: string,
    private readonly emit: (record: Buffer, offset: number) => void,
  ) {}

  /** Scans `b` from `from` on; `base` is the file offset of b[0]. Returns where the unfinished record starts. */
  scan(b: Buffer, from: number, base: number): number {
    for (let i = from; i < b.length; i++) {
      const c = b[i]
      if (this.start < 0) this.between(c, base + i, i)
      else if (this.inString) {
        if (this.escaped) this.escaped = false
        else if (c === 92) this.escaped = true
        else if (c === 34) this.inString = false
      } else if (c === 34) this.inString = true
      else if (c === 123 || c === 91) this.depth++
      else if (c === 125 || c === 93) {
        if (--this.depth > 0) continue
        this.emit(b.subarray(this.start, i + 1), base + this.start)
        this.start = -1
        this.next = 'comma or end'
      }
    }
    const keep = this.start < 0 ? b.length : this.start
    if (this.start >= 0) this.start = 0
    return keep
  }

  /** A byte outside records. */
  private between(c: number, at: number, i: number): void {
    if (isSpace(c)) return
    if (this.mode === 'unknown') {
      if (c === 91) {
        this.mode = 'array'
        return
      }
      if (c !== 123) throw dataError(this.file, at, "'[' of an array or '{' of a record", charOf(c))
      this.mode = 'lines'
    }
    if (this.mode === 'done') throw dataError(this.file, at, 'nothing after the array', charOf(c))
    if (this.mode === 'array') {
      if (c === 93 && this.next !== 'value') {
        this.mode = 'done'
        return
      }
      if (this.next === 'comma or end') {
        if (c !== 44) throw dataError(this.file, at, "',' or ']'", charOf(c))
        this.next = 'value'
        return
      }
    }
    if (c !== 123) throw dataError(this.file, at, "'{' of a record", charOf(c))
    this.start = i
    this.depth = 1
  }

  /** The file is over. */
  finish(base: number, size: number): void {
    if (this.start >= 0) {
      const expected = `'}' of the record that starts at byte ${base}`
      throw dataError(this.file, size, this.inString ? `'"' and ${expected}` : expected, 'the end of the file')
    }
    if (this.mode === 'array') {
      const expected = this.next === 'comma or end' ? "',' or ']'" : this.next === 'value' ? "'{' of a record" : "']'"
      throw dataError(this.file, size, expected, 'the end of the file')
    }
    if (this.mode === 'unknown') throw dataError(this.file, size, "'[' of an array or '{' of a record", 'an empty file')
  }
}

/**
 * Reads a data file in pieces and calls `emit` with the bytes of every record in turn.
 * @throws AlignGPTError ERR_DATA with file, byte offset and what was expected
 */
export async function splitRecords(file: string, emit: (record: Buffer, offset: number) => void): Promise<void> {
  let handle: fs.promises.FileHandle
  try {
    handle = await fs.promises.open(file, 'r')
  } catch (e) {
    throw mismatch('ERR_DATA', 'data', file, 'a readable file', (e as NodeJS.ErrnoException).code ?? String(e), e)
  }
  try {
    const splitter = new Splitter(file, emit)
    let rest: Buffer = Buffer.alloc(0)
    let base = 0
    for (let first = true; ; first = false) {
      const chunk = Buffer.allocUnsafe(CHUNK)
      const { bytesRead } = await handle.read(chunk, 0, CHUNK, base + rest.length)
      if (bytesRead === 0) break
      let fresh = chunk.subarray(0, bytesRead)
      if (first && fresh.length >= 3 && fresh.readUIntBE(0, 3) === 0xefbbbf) {
        fresh = fresh.subarray(3)
        base = 3
      }
      const b: Buffer = rest.length ? Buffer.concat([rest, fresh]) : fresh
      const keep = splitter.scan(b, rest.length, base)
      rest = b.subarray(keep)
      base += keep
      if (rest.length > MAX_RECORD)
        throw dataError(file, base, `a record of at most ${MAX_RECORD} bytes`, 'a longer one')
    }
    splitter.finish(base, base + rest.length)
  } finally {
    await handle.close()
  }
}

/**
 * Checks one parsed record: id (string or number; absent: its index), image (optional string), conversations
 * ([{from: human|user|gpt|assistant|system, value}]), similarity (optional level, integer >= 0).
 * @throws AlignGPTError ERR_DATA naming file, record and key
 */
export function parseRecord(raw: unknown, file: string, index: number): DataRecord {
  const r = raw as Record<string, unknown>
  const { id = index, image = null, conversations, similarity = null } = r
  const bad = (key: string, expected: string, got: unknown): AlignGPTError =>
    mismatch(
      'ERR_DATA',
      'data',
      `${file}: record ${index} (id ${show(id)}) ${key}`,
      expected,
      got === undefined ? 'nothing' : show(got),
    )
  if (typeof id !== 'string' && typeof id !== 'number') throw bad('id', 'a string or number', id)
  if (image !== null && (typeof image !== 'string' || image === '')) throw bad('image', 'a file name', image)
  if (!Array.isArray(conversations) || !conversations.length)
    throw bad('conversations', 'an array of turns', conversations)
  if (
    similarity !== null &&
    !(Number.isInteger(similarity) && (similarity as number) >= 0 && (similarity as number) < 2 ** 31)
  )
    throw bad('similarity', 'an integer level', similarity)
  const turns = conversations.map((c: unknown, i): Turn => {
    const { from, value } = (c ?? {}) as Record<string, unknown>
    if (typeof from !== 'string' || !Object.hasOwn(ROLES, from))
      throw bad(`conversations[${i}].from`, Object.keys(ROLES).join(' | '), from)
    if (typeof value !== 'string') throw bad(`conversations[${i}].value`, 'a string', value)
    return { from: ROLES[from], value }
  })
  return {
    id: String(id),
    image: image as string | null,
    conversations: turns,
    similarity: similarity as number | null,
  }
}

/** Number of white-space separated words of all turns: LLaVA's measure of length. */
const wordCount = (r: DataRecord): number =>
  r.conversations.reduce((n, t) => n + (t.value.match(/\S+/g)?.length ?? 0), 0)

export interface OrderOptions {
  /** samples of a global batch */
  batch: number
  seed: number
  epoch: number
  /** batches of one modality, longest samples first (LLaVA's group_by_modality_length) */
  groupByLength?: boolean
  /** false: file order */
  shuffle?: boolean
}

/** A data file and its image folder. Open it with loadDataset. */
export class Dataset {
  private offsets = new Float64Array(0)
  private sizes = new Uint32Array(0)
  /** words, negative for text-only records (as LLaVA's modality_lengths) */
  private words = new Int32Array(0)
  private count = 0
  private fd: number | null = null
  private readonly bad = new Map<number, Dropped>()
  private readonly skipped = new Map<number, Dropped>()
  private readonly truncated = new Set<number>()

  /** Use loadDataset. */
  constructor(
    readonly file: string,
    /** folder of the pictures, null when none was given */
    readonly images: string | null,
  ) {}

  /** Number of records. */
  get length(): number {
    return this.count
  }

  /** Reads the file again, for example after levels were written into it. @throws AlignGPTError ERR_DATA */
  async reindex(): Promise<void> {
    this.close()
    let [offsets, sizes, words] = [new Float64Array(1024), new Uint32Array(1024), new Int32Array(1024)]
    let n = 0
    const grow = <T extends Float64Array | Uint32Array | Int32Array>(a: T): T => {
      const bigger = new (a.constructor as new (n: number) => T)(2 * a.length)
      bigger.set(a)
      return bigger
    }
    await splitRecords(this.file, (bytes, offset) => {
      if (n === offsets.length) [offsets, sizes, words] = [grow(offsets), grow(sizes), grow(words)]
      const record = parseRecord(this.parse(bytes, offset), this.file, n)
      if (record.image !== null && this.images === null)
        throw mismatch(
          'ERR_DATA',
          'data',
          `${this.file}: record ${n}`,
          'an images folder, since it names a picture',
          'none',
        )
      offsets[n] = offset
      sizes[n] = bytes.length
      words[n] = record.image === null ? -Math.max(wordCount(record), 1) : Math.max(wordCount(record), 1)
      n++
    })
    this.offsets = offsets.slice(0, n)
    this.sizes = sizes.slice(0, n)
    this.words = words.slice(0, n)
    this.count = n
  }

  private parse(bytes: Buffer, offset: number): unknown {
    return parseJson(decodeUtf8(bytes, this.file, 'ERR_DATA', offset), this.file, 'ERR_DATA', offset)
  }

  /** Byte range of a record in the file. */
  range(index: number): RecordRange {
    if (!Number.isInteger(index) || index < 0 || index >= this.count)
      throw mismatch('ERR_ARGUMENT', 'data', 'record index', `0..${this.count - 1}`, show(index))
    return { offset: this.offsets[index], bytes: this.sizes[index] }
  }

  /** Reads one record from the file. @throws AlignGPTError ERR_DATA, ERR_ARGUMENT */
  record(index: number): DataRecord {
    const { offset, bytes } = this.range(index)
    this.fd ??= fs.openSync(this.file, 'r')
    const b = Buffer.allocUnsafe(bytes)
    for (let done = 0; done < bytes; ) {
      const n = fs.readSync(this.fd, b, done, bytes - done, offset + done)
      if (n === 0) throw dataError(this.file, offset + done, 'the record seen before', 'the end of the file')
      done += n
    }
    return parseRecord(this.parse(b, offset), this.file, index)
  }

  /** Every record in file order. */
  *[Symbol.iterator](): Generator<DataRecord> {
    for (let i = 0; i < this.count; i++) yield this.record(i)
  }

  /** Closes the file; it is opened again when a record is read. */
  close(): void {
    if (this.fd !== null) fs.closeSync(this.fd)
    this.fd = null
  }

  /** Record indices in the order of an epoch; a pure function of the file and the options. */
  order(options: OrderOptions): Int32Array {
    const { seed, epoch, batch, shuffle = true } = options
    if (!shuffle) return Int32Array.from({ length: this.count }, (_, i) => i)
    if (!options.groupByLength) return permutation(this.count, seed, 4 * epoch)
    return groupByModalityLength(this.words, batch, seed, epoch)
  }

  /** Steps of one epoch; the last batch may be smaller. */
  stepsPerEpoch(batch: number): number {
    return Math.ceil(this.count / batch)
  }

  /** Record indices of one batch after the other, from batch `start` of the epoch on. */
  *batches(options: OrderOptions & { start?: number }): Generator<Int32Array> {
    if (!Number.isInteger(options.batch) || options.batch < 1)
      throw mismatch('ERR_ARGUMENT', 'data', 'batch', 'a positive integer', show(options.batch))
    const order = this.order(options)
    for (let i = (options.start ?? 0) * options.batch; i < order.length; i += options.batch)
      yield order.slice(i, i + options.batch)
  }

  /** Notes a picture that could not be used. */
  noteBad(d: Dropped): void {
    if (!this.bad.has(d.index)) this.bad.set(d.index, d)
  }
  /** Notes a sample that does not fit. */
  noteSkipped(d: Dropped): void {
    if (!this.skipped.has(d.index)) this.skipped.set(d.index, d)
  }
  /** Notes a sample whose text was cut. */
  noteTruncated(index: number): void {
    this.truncated.add(index)
  }
  /** What was left out so far. */
  get state(): DatasetState {
    return { bad: [...this.bad.values()], skipped: [...this.skipped.values()], truncated: [...this.truncated] }
  }
  /** Continues from a saved state. */
  restore(state: DatasetState): void {
    for (const d of state.bad) this.noteBad(d)
    for (const d of state.skipped) this.noteSkipped(d)
    for (const i of state.truncated) this.noteTruncated(i)
  }
  /**
   * Stops a run whose data is broken.
   * @param maxBad share of the records that may have unusable pictures
   * @throws AlignGPTError ERR_DATA with the list
   */
  checkBad(maxBad: number): void {
    const n = this.bad.size
    if (n <= maxBad * this.count) return
    const list = [...this.bad.values()].slice(0, 50).map((d) => `\n  ${d.id}: ${d.image}: ${d.reason}`)
    const more = n > list.length ? `\n  ... and ${n - list.length} more` : ''
    const got = `${n} of ${this.count}:${list.join('')}${more}`
    throw mismatch(
      'ERR_DATA',
      'data',
      `${this.file}: unusable pictures`,
      `at most ${100 * maxBad} % of the records`,
      got,
    )
  }
}

/**
 * LLaVA's group_by_modality_length: shuffled within each modality, cut into batches that are sorted by length (longest
 * first), batches shuffled; the incomplete ones of both modalities come last.
 * @param words length of each record in words, negative for text-only records
 */
export function groupByModalityLength(words: Int32Array, batch: number, seed: number, epoch: number): Int32Array {
  const pick = (sign: number, stream: number): number[][] => {
    const all = [...words.keys()].filter((i) => words[i] * sign > 0)
    const order = [...permutation(all.length, seed, 4 * epoch + stream)].map((i) => all[i])
    const out: number[][] = []
    for (let i = 0; i < order.length; i += batch)
      // Ties by index: the result must not depend on the engine's sort.
      out.push(order.slice(i, i + batch).sort((a, b) => Math.abs(words[b]) - Math.abs(words[a]) || a - b))
    return out
  }
  const groups = [pick(1, 1), pick(-1, 2)].filter((g) => g.length)
  const rest = groups.flatMap((g) => (g[g.length - 1].length < batch ? (g.pop() as number[]) : []))
  const full = groups.flat()
  const order = [...permutation(full.length, seed, 4 * epoch + 3)]
  return Int32Array.from([...order.flatMap((i) => full[i]), ...rest])
}

/**
 * Opens a LLaVA data file: JSON array or JSON lines. Every record is checked now; pictures are looked at when needed.
 * @param options.images folder the `image` names are relative to; pictures outside it are refused
 * @throws AlignGPTError ERR_DATA: file, byte offset or record, what was expected
 */
export async function loadDataset(file: string, options: { images?: string } = {}): Promise<Dataset> {
  if (options.images !== undefined && !fs.statSync(options.images, { throwIfNoEntry: false })?.isDirectory())
    throw mismatch('ERR_DATA', 'data', 'images', 'a folder', options.images)
  const dataset = new Dataset(path.resolve(file), options.images === undefined ? null : path.resolve(options.images))
  await dataset.reindex()
  return dataset
}

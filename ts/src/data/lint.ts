/**
 * The data linter: reads a data file record by record, without stopping at the first mistake, and its pictures, and says what
 * training would refuse, leave out, or take in a way that was hardly meant.
 */

import fs from 'node:fs'
import { type DataRecord, IMAGE_TEXT, splitRecords, wordCount } from '../formats/record-file.js'
import { MODEL_DEFAULTS } from '../models/config/variants.js'
import { type Style, styleOf } from '../processing/conversation/styles.js'
import { type ImageLimits, imageHeader, loadImage, MAX_PIXELS } from '../processing/image/decode.js'
import { type ImageFiles, type ImageSource, MAX_BYTES, resolveImage } from '../processing/image/source.js'
import { buildSample, type SampleOptions } from '../processing/sample.js'
import type { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError, show } from '../util/errors.js'
import { readRange } from '../util/files.js'
import { Numbers } from '../util/growable-array.js'
import { hash53 } from '../util/hash.js'
import { Fingerprints } from '../util/hash-map.js'
import { type DatasetOptions, openSources } from './dataset.js'
import { diagnose, type RecordNeeds, unmet } from './record-check.js'

/** Errors keep a record, or the whole file, out of training; a warning is trained on, but probably not as it was meant. */
export const PROBLEMS = {
  syntax: ['error', 'the file is no list of records from there on; the rest was not read'],
  json: ['error', 'a record that is no JSON or no UTF-8'],
  record: ['error', 'a key that is missing or of the wrong type'],
  role: ['error', 'a turn from nobody known'],
  turns: ['error', 'turns that do not alternate, or not as the prompt style needs them'],
  image: ['error', 'a picture that is named in a way that is not understood, more than one, or a video'],
  placeholders: ['error', 'more than one <image>, one in an answer, or one without a picture'],
  'no-answer': ['error', 'nothing to learn: the label mask is empty'],
  level: ['error', 'a level that is not whole, negative or too high'],
  'no-level': ['error', 'a picture without a level, which pre-training needs'],
  'too-long': ['error', 'left out: picture or answers do not fit into the longest sequence'],
  missing: ['error', 'a picture that is not there'],
  escaping: ['error', 'a picture outside the folder'],
  oversize: ['error', 'a picture above the limits'],
  corrupt: ['error', 'a picture that cannot be read'],
  orientation: ['warning', 'a picture that its EXIF says to turn, as a telephone held upright; it is not turned'],
  cut: ['warning', 'text that is cut at the longest sequence'],
  'empty-answer': ['warning', 'an answer without text'],
  'foreign-placeholder': ['warning', 'what other tools put in place of a picture: it stays text'],
  'special-token': ['warning', 'the text of a special token in a turn: training makes it that token'],
  'some-levels': ['warning', 'a picture without a level where other records have one'],
  'image-without-placeholder': ['warning', 'a picture without <image>: it goes in front of the first question'],
  'duplicate-id': ['warning', 'an id that an earlier record has'],
  duplicate: ['warning', 'the picture and the turns of an earlier record'],
} as const
export type ProblemKind = keyof typeof PROBLEMS

/** One mistake and its place. */
export interface Finding {
  kind: ProblemKind
  /** index of the record, from 0 */
  record: number
  /** null where it could not be read */
  id: string | null
  /** first byte of the record in the file; where reading ended for `syntax` */
  byte: number
  message: string
}

export interface CheckOptions extends Pick<DatasetOptions, 'images' | 'followLinks' | 'unpacked' | 'onNotice'> {
  /** with it lengths are tokens of the spliced sequence, otherwise words */
  tokenizer?: Tokenizer
  /** how records are rendered, `plain` for pre-training; default the tokenizer's (styleOf) */
  style?: Style
  /** rows a picture takes, default 576 */
  patches?: number
  /** longest sequence, rows; default 2048 */
  maxLength?: number
  /** alignment levels of the model, default 8 */
  levels?: number
  /** decode every picture instead of reading its header */
  decode?: boolean
  limits?: ImageLimits
  /** pictures will be turned as their EXIF says: no warning of it */
  exifOrientation?: boolean
  /** findings of each kind that the report holds, default 20; all are counted */
  limit?: number
  onProgress?: (done: number, total: number, unit: 'bytes' | 'pictures') => void
  signal?: AbortSignal
  /** asked now and then; true ends the check with a report of what was looked at so far */
  stop?: () => boolean
}

export interface Lengths {
  unit: 'tokens' | 'words'
  min: number
  median: number
  p95: number
  max: number
  mean: number
  /** records of `from` <= length < `to`; borders are powers of two */
  histogram: { from: number; to: number; count: number }[]
}

export interface CheckReport {
  /** what was read: the file, or what a Parquet file was unpacked into */
  file: string
  bytes: number
  /** records found, good ones and bad ones */
  records: number
  withImage: number
  /** different pictures, how many of them were looked at (none without `images`), and how many could be read */
  pictures: { named: number; looked: number; read: number }
  errors: number
  warnings: number
  counts: Partial<Record<ProblemKind, number>>
  /** in file order, at most `limit` of each kind */
  findings: Finding[]
  /** null when no record could be rendered */
  lengths: Lengths | null
  seconds: number
  /** ended by `stop`: what was not looked at yet is missing */
  stopped: boolean
}

/** Ends the reading of records. */
const STOPPED = new Error('stopped')

const messageOf = (e: unknown): string => (e instanceof Error ? e.message : String(e))

/** Collects what is wrong with the records of one file. */
class Checker {
  readonly counts: Partial<Record<ProblemKind, number>> = {}
  readonly findings: Finding[] = []
  records = 0
  withImage = 0
  readonly lengths = new Numbers()
  /** of the first record that names a picture: index, byte, bytes */
  readonly first = [new Numbers(), new Numbers(), new Numbers()] as const
  readonly #file: string
  readonly #o: CheckOptions
  readonly #ids = new Fingerprints()
  readonly #contents = new Fingerprints()
  readonly #names = new Fingerprints()
  readonly #sample: SampleOptions
  readonly #needs: RecordNeeds
  #levels = 0
  readonly #withoutLevel: { index: number; id: string; byte: number }[] = []

  constructor(file: string, o: CheckOptions) {
    this.#file = file
    this.#o = o
    const { style = styleOf(o.tokenizer), patches = MODEL_DEFAULTS.patches, maxLength = MODEL_DEFAULTS.maxLength } = o
    this.#sample = { style, patches, maxLength }
    this.#needs = { style, levels: o.levels ?? MODEL_DEFAULTS.levels, levelled: true }
  }

  note(kind: ProblemKind, record: number, id: string | null, byte: number, message: string): void {
    const n = (this.counts[kind] ?? 0) + 1
    this.counts[kind] = n
    if (n <= (this.#o.limit ?? 20)) this.findings.push({ kind, record, id, byte, message })
  }

  /** One record's bytes. */
  add(bytes: Buffer, byte: number): void {
    const index = this.records++
    const found = diagnose(bytes, this.#file, byte, index)
    if (found.fault) {
      this.note(found.fault.kind, index, found.id, byte, found.fault.reason)
      return
    }
    const { raw, record } = found
    const note = (kind: ProblemKind, message: string): void => this.note(kind, index, record.id, byte, message)
    this.#duplicates(record, index, 'id' in (raw as object), note)
    if (record.image !== null) this.#picture(record.image, index, byte, bytes.length)
    this.#turns(record, note)
    const fault = unmet(record, this.#needs, raw)
    // As long as no record has one, the levels are still to be written.
    if (fault?.kind === 'no-level') this.#withoutLevel.push({ index, id: record.id, byte })
    else if (fault) note(fault.kind, fault.reason)
    if (!fault || fault.kind === 'no-level') this.#length(record, note)
    if (record.similarity !== null) this.#levels++
  }

  /** Missing levels: what `levels` would write where no record has one, else mistakes. */
  end(): void {
    if (this.#levels === 0) return
    const kind = this.#needs.style === 'plain' ? 'no-level' : 'some-levels'
    for (const { index, id, byte } of this.#withoutLevel)
      this.note(kind, index, id, byte, `similarity: expected a level, which ${this.#levels} records have, got nothing`)
  }

  #duplicates(r: DataRecord, index: number, named: boolean, note: (k: ProblemKind, m: string) => void): void {
    const same = this.#contents.get(hash53(textOf(r)))
    if (same === undefined) this.#contents.set(hash53(textOf(r)), index)
    else note('duplicate', `the same as record ${same}`)
    if (!named) return
    const earlier = this.#ids.get(hash53(r.id))
    if (earlier === undefined) this.#ids.set(hash53(r.id), index)
    else note('duplicate-id', `record ${earlier} has it too`)
  }

  /** Notes where a picture is named first. */
  #picture(name: string, index: number, byte: number, bytes: number): void {
    this.withImage++
    if (this.#names.get(hash53(name)) !== undefined) return
    this.#names.set(hash53(name), index)
    for (const [k, x] of [index, byte, bytes].entries()) this.first[k].push(x)
  }

  #turns(record: DataRecord, note: (kind: ProblemKind, message: string) => void): void {
    const texts = record.conversations.filter((t) => t.from !== 'system')
    const placed = texts.some((t) => t.value.includes(IMAGE_TEXT))
    if (record.image !== null && !placed) note('image-without-placeholder', show(record.image))
    const blank = texts.findIndex((t) => t.from === 'gpt' && t.value.trim() === '')
    if (blank >= 0) note('empty-answer', `turn ${blank} is ${show(texts[blank].value)}`)
    const foreign = texts.flatMap((t) => FOREIGN.exec(t.value.replaceAll(IMAGE_TEXT, '')) ?? [])
    if (foreign.length) note('foreign-placeholder', show(foreign[0]))
    const special = texts.flatMap((t) => this.#o.tokenizer?.specialTokensIn(t.value) ?? [])
    const forged = special.filter((token) => token !== IMAGE_TEXT)
    if (forged.length) note('special-token', [...new Set(forged)].map(show).join(', '))
  }

  #length(record: DataRecord, note: (kind: ProblemKind, message: string) => void): void {
    if (!this.#o.tokenizer) {
      this.lengths.push(wordCount(record))
      return
    }
    const s = buildSample(record, this.#o.tokenizer, this.#sample)
    this.lengths.push(s.fullLength)
    if (s.skip) note('too-long', s.skip)
    else if (s.length < s.fullLength) note('cut', `${s.fullLength} rows, the limit is ${this.#sample.maxLength}`)
  }
}

/** Places of pictures and other media as LLaVA-NeXT, Qwen-VL, InternVL, MiniGPT-4, Gemma, Phi and others write them. */
const FOREIGN =
  /<\|?(?:(?:image|img|vision|video|audio)[\w ]{0,20}|ImageHere|start_of_image|im_start|im_patch)\|?>|\[IMG\]|<\/?img>/i

/** What makes two records the same but for their names. */
const textOf = (r: DataRecord): string =>
  `${r.image ?? ''}\0${r.conversations.map((t) => `${t.from}\0${t.value}`).join('\0')}`

/** What is wrong with a picture, null when nothing is. */
async function imageProblem(source: ImageSource, o: CheckOptions): Promise<[ProblemKind, string] | null> {
  const { maxBytes = MAX_BYTES, maxPixels = MAX_PIXELS } = o.limits ?? {}
  if ('problem' in source) return ['missing', source.problem]
  try {
    const bytes = 'root' in source ? fs.statSync(resolveImage(source.root, source.name, source)).size : source.bytes
    if (bytes > maxBytes) return ['oversize', `expected at most ${maxBytes} bytes, got ${bytes}`]
  } catch (e) {
    // resolveImage passes on what the file system said as the cause; without one the path leads outside.
    return [(e as Error).cause ? 'missing' : 'escaping', messageOf(e)]
  }
  try {
    const header = await imageHeader(source, { maxBytes, maxPixels: Number.POSITIVE_INFINITY })
    const { width, height, format, orientation } = header
    if (width * height > maxPixels)
      return ['oversize', `expected at most ${maxPixels} pixels, got ${width} x ${height}`]
    if (o.decode) await loadImage(source, { maxBytes, maxPixels })
    // TIFF is always turned, as Pillow does it
    if (orientation === 1 || format === 'TIFF' || o.exifOrientation) return null
    return ['orientation', `expected EXIF orientation 1 or the setting exifOrientation, got ${orientation}`]
  } catch (e) {
    if (!(e instanceof AlignGPTError)) throw e
    return ['corrupt', e.message]
  }
}

// Enough to keep the decoding threads busy; each may hold a large picture.
const AT_ONCE = 16

/** Looks at every picture once; it is reported with the first record that names it. */
async function checkImages(
  checker: Checker,
  file: string,
  pictures: ImageFiles,
  o: CheckOptions,
): Promise<{ looked: number; read: number }> {
  const [indices, offsets, sizes] = checker.first.map((n) => n.values)
  const fd = fs.openSync(file, 'r')
  let read = 0
  const one = async (k: number): Promise<() => void> => {
    const bytes = readRange(fd, offsets[k], sizes[k], file)
    const { record: r } = diagnose(bytes, file, offsets[k], indices[k]) as { record: DataRecord }
    const problem = await imageProblem(pictures.locate(r.image as string), o)
    return () => {
      if (problem) checker.note(problem[0], indices[k], r.id, offsets[k], problem[1])
      else read++
    }
  }
  try {
    for (let at = 0; at < indices.length; at += AT_ONCE) {
      o.signal?.throwIfAborted()
      if (o.stop?.()) return { looked: at, read }
      const some = Array.from({ length: Math.min(AT_ONCE, indices.length - at) }, (_, i) => one(at + i))
      for (const report of await Promise.all(some)) report()
      o.onProgress?.(Math.min(at + AT_ONCE, indices.length), indices.length, 'pictures')
    }
  } finally {
    fs.closeSync(fd)
  }
  return { looked: indices.length, read }
}

/** Lengths with their histogram; null when there are none. */
function summarise(lengths: Float64Array, unit: Lengths['unit']): Lengths | null {
  const s = lengths.slice().sort()
  if (s.length === 0) return null
  const counts: number[] = []
  for (const x of s) {
    const k = x < 1 ? 0 : Math.floor(Math.log2(x)) + 1
    counts[k] = (counts[k] ?? 0) + 1
  }
  const histogram = Array.from(counts, (count = 0, k) => ({ from: k ? 2 ** (k - 1) : 0, to: 2 ** k, count }))
  const at = (share: number): number => s[Math.min(s.length - 1, Math.floor(share * s.length))]
  const mean = s.reduce((a, b) => a + b, 0) / s.length
  const lowest = histogram.findIndex((h) => h.count > 0)
  const [min, max] = [s[0], s[s.length - 1]]
  return { unit, min, median: at(0.5), p95: at(0.95), max, mean, histogram: histogram.slice(lowest) }
}

/**
 * Checks a data file (JSON array, JSON lines, Parquet) and, when `images` is given, every picture that it names.
 * Never throws for what is wrong with the data.
 * @throws AlignGPTError ERR_DATA: no such file or folder; the signal's reason when aborted
 */
export async function checkDataset(file: string, options: CheckOptions = {}): Promise<CheckReport> {
  const began = performance.now()
  const { images, followLinks, unpacked, onNotice } = options
  const { records: source, pictures } = await openSources(file, { images, followLinks, unpacked, onNotice })
  const bytes = fs.statSync(source, { throwIfNoEntry: false })?.size ?? 0
  const checker = new Checker(source, options)
  let [told, stopped] = [0, false]
  const emit = (b: Buffer, offset: number): void => {
    checker.add(b, offset)
    if (offset - told < 1 << 22) return
    told = offset
    options.signal?.throwIfAborted()
    if (options.stop?.()) throw STOPPED
    options.onProgress?.(offset, bytes, 'bytes')
  }
  try {
    await splitRecords(source, emit)
  } catch (e) {
    // The splitter says in its message at which byte; a file that cannot be opened has no such place.
    const at = /at byte (\d+):/.exec(messageOf(e))
    stopped = e === STOPPED
    if (!stopped && (!(e instanceof AlignGPTError) || !at)) throw e
    if (at) checker.note('syntax', checker.records, null, Number(at[1]), messageOf(e))
  }
  checker.end()
  const { looked, read } = pictures ? await checkImages(checker, source, pictures, options) : { looked: 0, read: 0 }
  const { counts, findings, records, withImage } = checker
  const total = (severity: string): number =>
    Object.entries(counts).reduce((n, [k, c]) => n + (PROBLEMS[k as ProblemKind][0] === severity ? c : 0), 0)
  return {
    file: source,
    bytes,
    records,
    withImage,
    pictures: { named: checker.first[0].values.length, looked, read },
    errors: total('error'),
    warnings: total('warning'),
    counts,
    findings: findings.sort((a, b) => a.byte - b.byte),
    lengths: summarise(checker.lengths.values, options.tokenizer ? 'tokens' : 'words'),
    seconds: (performance.now() - began) / 1000,
    stopped: stopped || (pictures !== null && looked < checker.first[0].values.length),
  }
}

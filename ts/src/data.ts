/** LLaVA-style JSON -> packed batches. Records are found by byte offset and read one at a time. */
import fs from 'node:fs'
import path from 'node:path'
import type { PreprocessorConfig } from './config.js'
import { AlignGPTError } from './errors.js'
import { loadPixels, resolveImage } from './image.js'
import { encodeTurns, IGNORE, IMAGE_PLACEHOLDER, type PromptStyle, type Turn } from './prompt.js'
import { permutation } from './random.js'
import type { Tokenizer } from './tokenizer.js'

/** One record of a LLaVA JSON file. */
export interface DataRecord {
  id: string
  image?: string
  conversations: Turn[]
  /** alignment level, written by `levels` */
  similarity?: number
}

interface Span {
  offset: number
  bytes: number
}

function malformed(file: string, offset: number, expected: string, got: string): never {
  throw new AlignGPTError('ERR_DATA', `[data] ${file}: byte ${offset}: expected ${expected}, got ${got}`)
}

/** Byte ranges of the objects of a JSON array (or of JSON lines), found in one pass without parsing them. */
function indexRecords(file: string): Span[] {
  const fd = fs.openSync(file, 'r')
  const spans: Span[] = []
  const chunk = Buffer.alloc(1 << 20)
  let depth = 0
  let inString = false
  let escaped = false
  let start = -1
  let array = false
  let closed = false
  let at = 0
  try {
    for (let n = fs.readSync(fd, chunk); n > 0; n = fs.readSync(fd, chunk)) {
      for (let i = 0; i < n; i++, at++) {
        const c = chunk[i]
        if (inString) {
          if (escaped) escaped = false
          else if (c === 92) escaped = true
          else if (c === 34) inString = false
          continue
        }
        if (c === 34 && depth > 0) inString = true
        else if (c === 123 || (c === 91 && (depth > 0 || array))) {
          if (depth++ === 0) {
            if (c !== 123 || closed) malformed(file, at, 'an object', String.fromCharCode(c))
            start = at
          }
        } else if (c === 125 || (c === 93 && depth > 0)) {
          if (depth === 0) malformed(file, at, "'{'", String.fromCharCode(c))
          if (--depth === 0) spans.push({ offset: start, bytes: at - start + 1 })
        } else if (depth === 0) {
          if (c === 91 && !array && spans.length === 0) array = true
          else if (c === 93 && array && !closed) closed = true
          else if (c > 32 && !(c === 44 && array) && !(at < 3 && c >= 0xbb))
            malformed(file, at, 'an object of the list', JSON.stringify(String.fromCharCode(c)))
        }
      }
    }
  } finally {
    fs.closeSync(fd)
  }
  if (depth > 0) malformed(file, start, 'a complete object', 'the end of the file')
  if (array && !closed) malformed(file, at, "']'", 'the end of the file')
  return spans
}

const roles: Record<string, Turn['from']> = {
  human: 'human',
  user: 'human',
  gpt: 'gpt',
  assistant: 'gpt',
  system: 'system',
}

function parseRecord(file: string, offset: number, index: number, text: string): DataRecord {
  let raw: Record<string, unknown>
  try {
    raw = JSON.parse(text)
  } catch (e) {
    return malformed(file, offset, 'valid JSON', (e as Error).message)
  }
  const id = raw.id === undefined ? String(index) : String(raw.id)
  const where = `record '${id}'`
  if (raw.image !== undefined && raw.image !== null && typeof raw.image !== 'string')
    malformed(file, offset, `${where}: image as text`, JSON.stringify(raw.image))
  if (!Array.isArray(raw.conversations))
    malformed(file, offset, `${where}: conversations as a list`, JSON.stringify(raw.conversations) ?? 'nothing')
  const conversations = raw.conversations.map((t: { from?: unknown; value?: unknown }, i): Turn => {
    const from = Object.hasOwn(roles, String(t?.from)) ? roles[String(t?.from)] : undefined
    if (!from) malformed(file, offset, `${where}: turn ${i} from human or gpt`, JSON.stringify(t?.from) ?? 'nothing')
    if (typeof t.value !== 'string')
      malformed(file, offset, `${where}: turn ${i} with a text`, JSON.stringify(t.value) ?? 'nothing')
    return { from, value: t.value }
  })
  const similarity = raw.similarity
  if (similarity !== undefined && (!Number.isInteger(similarity) || (similarity as number) < 0))
    malformed(file, offset, `${where}: similarity as a level >= 0`, JSON.stringify(similarity))
  const image = (raw.image as string | null | undefined) ?? undefined
  return {
    id,
    conversations,
    ...(image && { image }),
    ...(similarity !== undefined && { similarity: similarity as number }),
  }
}

/** A LLaVA JSON file and the folder its pictures are in. */
export class Dataset {
  readonly #spans: Span[]
  readonly #fd: number
  constructor(
    readonly file: string,
    readonly images: string,
  ) {
    if (!fs.existsSync(file)) throw new AlignGPTError('ERR_DATA', `[data] ${file}: expected a JSON file, got none`)
    this.#spans = indexRecords(file)
    this.#fd = fs.openSync(file, 'r')
  }
  get length(): number {
    return this.#spans.length
  }
  /** @throws ERR_DATA with file, byte offset and what was expected */
  record(index: number): DataRecord {
    const span = this.#spans[index]
    if (!span) throw new AlignGPTError('ERR_ARGUMENT', `[data] record: expected 0..${this.length - 1}, got ${index}`)
    const buffer = Buffer.alloc(span.bytes)
    fs.readSync(this.#fd, buffer, 0, span.bytes, span.offset)
    return parseRecord(this.file, span.offset, index, buffer.toString('utf8'))
  }
  *[Symbol.iterator](): Generator<DataRecord> {
    for (let i = 0; i < this.length; i++) yield this.record(i)
  }
  /** Bytes of a record: a stand-in for its length that needs no parsing. */
  size(index: number): number {
    return this.#spans[index].bytes
  }
  close(): void {
    fs.closeSync(this.#fd)
  }
}

/**
 * Opens a LLaVA-style JSON array (or JSON lines): records {id, image?, conversations: [{from, value}], similarity?}.
 * @param o.images folder the `image` paths are relative to (default: the file's own)
 */
export async function loadDataset(file: string, o: { images?: string } = {}): Promise<Dataset> {
  return new Dataset(file, o.images ?? path.dirname(file))
}

/**
 * Which records make up step `step`: a pure function of (seed, step). Every epoch has its own order.
 * @param o.groupByLength records of a batch have similar lengths (LLaVA's grouping: sort within groups of 16 batches)
 */
export function batchIndices(
  data: Dataset,
  step: number,
  batch: number,
  o: { seed: number; shuffle?: boolean; groupByLength?: boolean },
): number[] {
  const perEpoch = Math.ceil(data.length / batch)
  const epoch = Math.floor(step / perEpoch)
  const order = epochOrder(data, epoch, batch, o)
  const at = (step % perEpoch) * batch
  return Array.from(order.subarray(at, at + batch))
}

const orders = new WeakMap<Dataset, { key: string; order: Int32Array }>()
function epochOrder(
  data: Dataset,
  epoch: number,
  batch: number,
  o: { seed: number; shuffle?: boolean; groupByLength?: boolean },
): Int32Array {
  const key = JSON.stringify([epoch, batch, o])
  const known = orders.get(data)
  if (known?.key === key) return known.order
  let order =
    o.shuffle === false
      ? Int32Array.from({ length: data.length }, (_, i) => i)
      : permutation(data.length, o.seed, epoch)
  if (o.groupByLength) {
    const batches: Int32Array[] = []
    const group = batch * 16
    for (let i = 0; i < order.length; i += group) {
      const sorted = order.slice(i, i + group).sort((a, b) => data.size(b) - data.size(a) || a - b)
      for (let j = 0; j < sorted.length; j += batch) batches.push(sorted.subarray(j, j + batch))
    }
    // the one short batch stays last, so every other step has a full one
    const full = batches.filter((b) => b.length === batch)
    const short = batches.filter((b) => b.length < batch)
    const shuffled = Array.from(permutation(full.length, o.seed, epoch + 0x40000000), (i) => full[i])
    order = Int32Array.from([...shuffled, ...short].flatMap((b) => Array.from(b)))
  }
  orders.set(data, { key, order })
  return order
}

// ---- samples and batches ----------------------------------------------------------------------------------
/** One record, ready to be packed. */
export interface Sample {
  id: string
  /** path below the image folder */
  image?: string
  ids: number[]
  labels: number[]
  level?: number
  pixels?: Float32Array
}

/** Samples joined without padding. T tokens, B samples, M pictures, P patches. */
export interface PackedBatch {
  /** [T] token id, -1 alignment row, -2 image row */
  tokens: Int32Array
  /** [T] not shifted, -100 = no loss */
  labels: Int32Array
  /** [B+1] */
  offsets: Int32Array
  /** [T] position in its sequence */
  positions: Int32Array
  /** [R] rows whose next token carries a label, and that label */
  lossRows: Int32Array
  lossTargets: Int32Array
  /** [M] first image row, alignment row, and index of the sample */
  imageRows: Int32Array
  alignRows: Int32Array
  imageSamples: Int32Array
  /** text that enters the gate's mean (no BOS, no picture; of the uncut sample), [M+1] offsets */
  gateIds: Int32Array
  gateOffsets: Int32Array
  /** [M, 3, S, S] */
  pixels: Float32Array
  imageSize: number
  /** [M] alignment level, -1 where a record has none */
  levels: Int32Array
  ids: string[]
}

export const ALIGN_ROW = -1
export const IMAGE_ROW = -2

export interface PackOptions {
  patches: number
  imageSize: number
  /** longest spliced sequence */
  maxLength?: number
  /** all: as the official code; instruction: answers stay out of the gate's mean */
  gateText?: 'all' | 'instruction'
}

/** The spliced sequence of one sample: [BOS, ALIGN, ... placeholder -> P image rows ...], cut to maxLength. */
function splice(s: Sample, o: PackOptions): { tokens: number[]; labels: number[]; image: number } | null {
  const at = s.ids.indexOf(IMAGE_PLACEHOLDER)
  const max = o.maxLength ?? Number.POSITIVE_INFINITY
  if (at < 0) return { tokens: s.ids.slice(0, max), labels: s.labels.slice(0, max), image: -1 }
  const rows = Array<number>(o.patches)
  const tokens = [s.ids[0], ALIGN_ROW, ...s.ids.slice(1, at), ...rows.fill(IMAGE_ROW), ...s.ids.slice(at + 1)]
  const labels = [s.labels[0], IGNORE, ...s.labels.slice(1, at), ...rows.fill(IGNORE), ...s.labels.slice(at + 1)]
  if (at + 1 + o.patches > max) return null // the picture itself does not fit
  return { tokens: tokens.slice(0, max), labels: labels.slice(0, max), image: at + 1 }
}

/** Joins samples. Those whose picture does not fit into maxLength are left out and listed. */
export function packBatch(samples: readonly Sample[], o: PackOptions): { batch: PackedBatch; skipped: string[] } {
  const tokens: number[] = []
  const labels: number[] = []
  const positions: number[] = []
  const offsets = [0]
  const [lossRows, lossTargets]: number[][] = [[], []]
  const [imageRows, alignRows, imageSamples, levels]: number[][] = [[], [], [], []]
  const gateIds: number[] = []
  const gateOffsets = [0]
  const pixels: Float32Array[] = []
  const ids: string[] = []
  const skipped: string[] = []
  for (const s of samples) {
    const spliced = splice(s, o)
    if (!spliced) {
      skipped.push(s.id)
      continue
    }
    const first = tokens.length
    for (const [i, t] of spliced.tokens.entries()) {
      tokens.push(t)
      labels.push(spliced.labels[i])
      positions.push(i)
      if (i > 0 && spliced.labels[i] !== IGNORE) {
        lossRows.push(first + i - 1)
        lossTargets.push(spliced.labels[i])
      }
    }
    if (spliced.image >= 0) {
      imageRows.push(first + spliced.image)
      alignRows.push(first + 1)
      imageSamples.push(ids.length)
      levels.push(s.level ?? -1)
      s.ids.forEach((t, i) => {
        if (i > 0 && t !== IMAGE_PLACEHOLDER && (o.gateText !== 'instruction' || s.labels[i] === IGNORE))
          gateIds.push(t)
      })
      gateOffsets.push(gateIds.length)
      if (!s.pixels) throw new AlignGPTError('ERR_ARGUMENT', `[data] sample '${s.id}': expected its pixels, got none`)
      pixels.push(s.pixels)
    }
    offsets.push(tokens.length)
    ids.push(s.id)
  }
  const plane = 3 * o.imageSize ** 2
  const allPixels = new Float32Array(pixels.length * plane)
  for (const [i, p] of pixels.entries()) allPixels.set(p, i * plane)
  const pack = (list: number[]): Int32Array => Int32Array.from(list)
  return {
    batch: {
      tokens: pack(tokens),
      labels: pack(labels),
      offsets: pack(offsets),
      positions: pack(positions),
      lossRows: pack(lossRows),
      lossTargets: pack(lossTargets),
      imageRows: pack(imageRows),
      alignRows: pack(alignRows),
      imageSamples: pack(imageSamples),
      gateIds: pack(gateIds),
      gateOffsets: pack(gateOffsets),
      pixels: allPixels,
      imageSize: o.imageSize,
      levels: pack(levels),
      ids,
    },
    skipped,
  }
}

export interface SampleOptions {
  tokenizer: Tokenizer
  preprocessor: PreprocessorConfig
  style: PromptStyle
  /** pad pictures to a square first (instruction tuning and inference), or plain CLIP preprocessing (pre-training) */
  pad: boolean
  system?: string
  /** ends where the assistant is to answer */
  open?: boolean
}

/** A record's tokens and labels, and its picture. @throws ERR_IMAGE, ERR_DATA */
export async function makeSample(record: DataRecord, images: string, o: SampleOptions): Promise<Sample> {
  const { ids, labels } = encodeTurns(o.tokenizer, o.style, record.conversations, {
    image: record.image !== undefined,
    open: o.open,
    system: o.system,
    id: record.id,
  })
  const sample: Sample = { id: record.id, ids, labels, level: record.similarity }
  if (record.image === undefined) return sample
  const pixels = await loadPixels(resolveImage(images, record.image), o.preprocessor, o.pad)
  return { ...sample, image: record.image, pixels }
}

/**
 * Packing: the samples of a batch one behind the other, without padding. A sequence is [BOS, ALIGN, ...] with the
 * picture's placeholder replaced by its P rows; a text-only sequence has neither.
 */

import { IGNORE, IMAGE_TOKEN, type Sample } from '../processing/sample.js'
import { mismatch, show } from '../util/errors.js'

/** Marks in PackedBatch.tokens. */
export const ALIGN_ROW = -1
export const IMAGE_ROW = -2

/** B sequences of together T rows, M of them with a picture of P rows. Plain arrays, ready for the native core. */
export interface PackedBatch {
  /** [T] token id; -1 = ALIGN row, -2 = picture row */
  tokens: Int32Array
  /** [T] label of each row, aligned with tokens (not shifted); -100 = none */
  labels: Int32Array
  /** [B+1] first row of each sequence, then T */
  offsets: Int32Array
  /** [T] position in its sequence */
  positions: Int32Array
  /** rows whose next row in the same sequence is labelled */
  lossRows: Int32Array
  /** label of the row after each of lossRows */
  lossTargets: Int32Array
  /** [M] first picture row of each picture */
  imageRows: Int32Array
  /** [M] ALIGN row of each picture's sequence; none when packed without */
  alignRows: Int32Array
  /** [M] sequence (0..B-1) of each picture */
  imageSamples: Int32Array
  /** text tokens that enter the gate's mean, of the uncut texts */
  gateIds: Int32Array
  /** [M+1] range of gateIds of each picture */
  gateOffsets: Int32Array
  /** [M, 3, S, S] normalised */
  pixels: Float32Array
  /** [M] alignment level; -1 = not scored */
  levels: Int32Array
  /** side S of a picture, pixels */
  imageSize: number
  /** [B] names of the samples */
  ids: string[]
  /** [M] file names */
  images: string[]
}

export interface PackOptions {
  /** which text the gate's mean sees; 'instruction' leaves answers out. Default 'all' (the official code) */
  gateText?: 'all' | 'instruction'
  /** false: no place for an alignment vector (Mix 'none'); a sample's `length` counts one all the same. Default true */
  align?: boolean
  /** side of a picture, pixels; default 0: no pixels are filled in */
  size?: number
  /** writes picture m (of sequence b) as [3, size, size] at `offset` of `out` */
  fill?: (out: Float32Array, offset: number, b: number, m: number) => void
}

interface Rows {
  tokens: number[]
  labels: number[]
  positions: number[]
  lossRows: number[]
  lossTargets: number[]
  imageRows: number[]
  alignRows: number[]
}

/** Appends one sequence. */
function appendSequence(r: Rows, s: Sample, patches: number, align: boolean): void {
  const start = r.tokens.length
  const push = (id: number, label: number): void => {
    r.positions.push(r.tokens.length - start)
    if (label !== IGNORE && r.tokens.length > start) {
      r.lossRows.push(r.tokens.length - 1)
      r.lossTargets.push(label)
    }
    r.tokens.push(id)
    r.labels.push(label)
  }
  s.ids.forEach((id, i) => {
    if (id === IMAGE_TOKEN) {
      r.imageRows.push(r.tokens.length)
      for (let p = 0; p < patches; p++) push(IMAGE_ROW, IGNORE)
    } else push(id, s.labels[i])
    if (i === 0 && s.image !== null && align) {
      r.alignRows.push(r.tokens.length)
      push(ALIGN_ROW, IGNORE)
    }
  })
}

/**
 * Packs samples into one batch.
 * @param patches rows of a picture, P
 * @throws AlignGPTError ERR_DATA: a sample marked `skip`, or whose placeholder and picture do not go together
 */
export function packBatch(samples: readonly Sample[], patches: number, options: PackOptions = {}): PackedBatch {
  const { gateText = 'all', align = true, size = 0, fill } = options
  const r: Rows = { tokens: [], labels: [], positions: [], lossRows: [], lossTargets: [], imageRows: [], alignRows: [] }
  const offsets = [0]
  const imageSamples: number[] = []
  const gateIds: number[] = []
  const gateOffsets = [0]
  samples.forEach((s, b) => {
    if (s.skip) throw mismatch('ERR_DATA', 'batch', `sample ${show(s.id)}`, 'a usable sample', s.skip)
    const places = s.ids.reduce((n, id) => n + (id === IMAGE_TOKEN ? 1 : 0), 0)
    if (places !== (s.image === null ? 0 : 1) || s.ids[0] === IMAGE_TOKEN)
      throw mismatch('ERR_DATA', 'batch', `sample ${show(s.id)}`, 'one placeholder after BOS per picture', `${places}`)
    appendSequence(r, s, patches, align)
    offsets.push(r.tokens.length)
    if (s.image === null) return
    imageSamples.push(b)
    s.gateIds.forEach((id, i) => {
      if (gateText === 'all' || !s.gateAnswer[i]) gateIds.push(id)
    })
    gateOffsets.push(gateIds.length)
  })
  const pixels = new Float32Array(imageSamples.length * 3 * size * size)
  if (fill) for (const [m, b] of imageSamples.entries()) fill(pixels, m * 3 * size * size, b, m)
  const withImage = imageSamples.map((b) => samples[b])
  return {
    tokens: Int32Array.from(r.tokens),
    labels: Int32Array.from(r.labels),
    offsets: Int32Array.from(offsets),
    positions: Int32Array.from(r.positions),
    lossRows: Int32Array.from(r.lossRows),
    lossTargets: Int32Array.from(r.lossTargets),
    imageRows: Int32Array.from(r.imageRows),
    alignRows: Int32Array.from(r.alignRows),
    imageSamples: Int32Array.from(imageSamples),
    gateIds: Int32Array.from(gateIds),
    gateOffsets: Int32Array.from(gateOffsets),
    pixels,
    levels: Int32Array.from(withImage, (s) => s.level ?? -1),
    imageSize: size,
    ids: samples.map((s) => s.id),
    images: withImage.map((s) => s.image as string),
  }
}

/** Lists of a batch that ops take as tensors. */
export const BATCH_TENSORS = [
  ...(['tokens', 'offsets', 'positions', 'lossRows', 'lossTargets', 'imageRows', 'alignRows'] as const),
  ...(['gateIds', 'gateOffsets', 'levels', 'pixels'] as const),
]
export type BatchTensor = (typeof BATCH_TENSORS)[number]

function extended(list: Int32Array, length: number, value: number): Int32Array {
  const out = new Int32Array(length).fill(value)
  out.set(list)
  return out
}

/** The next multiple of 64 and of a sixteenth of n's power of two: at most 16 sizes from each power to the next. */
function roundedUp(n: number): number {
  const step = Math.max(64, 2 ** (Math.floor(Math.log2(Math.max(n, 1))) - 4))
  return Math.ceil(n / step) * step
}
const powerOfTwo = (n: number): number => (n === 0 ? 0 : 2 ** Math.ceil(Math.log2(n)))

/**
 * The batch with a tail that counts for nothing, so that few shapes occur: one more sequence without labels, rows of the LM head without
 * a target, words of no gate. The number of rows grows to a multiple of 64 and of a sixteenth of its power of two, short lists to the next power.
 */
export function padBatch(b: PackedBatch): PackedBatch {
  const rows = roundedUp(b.tokens.length)
  const losses = powerOfTwo(b.lossRows.length)
  return {
    ...b,
    tokens: extended(b.tokens, rows, 0),
    labels: extended(b.labels, rows, IGNORE),
    offsets: extended(b.offsets, b.offsets.length + 1, rows),
    positions: extended(b.positions, rows, 0),
    lossRows: extended(b.lossRows, losses, 0),
    lossTargets: extended(b.lossTargets, losses, IGNORE),
    gateIds: extended(b.gateIds, powerOfTwo(b.gateIds.length), -1),
  }
}

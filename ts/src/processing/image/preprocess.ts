/**
 * Decoded images as transformers' CLIPImageProcessor prepares them: optional padding to a square, bicubic resize in Pillow's fixed
 * point, centre crop, normalisation.
 */
import { mismatch } from '../../util/errors.js'
import type { PreprocessorConfig } from '../preprocessor-config.js'
import type { RgbImage } from './decode.js'
import { resizeBicubic } from './resize.js'

/** How a decoded picture becomes the vision tower's input. */
export type Preprocess = Pick<PreprocessorConfig, 'size' | 'crop' | 'mean' | 'std'> & {
  /** pad to a square with the mean colour first (instruction tuning, inference) */
  pad: boolean
  /** turn it as its EXIF says, when it is decoded */
  exifOrientation?: boolean
}

/** Colour of the padding: the mean, truncated to 8 bits, (122, 116, 104) for CLIP. */
export const padColour = (mean: readonly number[]): [number, number, number] =>
  [0, 1, 2].map((c) => Math.trunc(mean[c] * 255)) as [number, number, number]

/**
 * Padding (if asked for), shortest edge to `size` with the long side floored, centre crop with floored offsets.
 * @returns uint8 [crop, crop, 3]
 */
export function preprocessImage(image: RgbImage, p: Preprocess): Uint8Array {
  const { width: w, height: h } = image
  const side = Math.max(w, h)
  const pad = p.pad && w !== h
  const [fw, fh] = pad ? [side, side] : [w, h]
  const long = Math.trunc((p.size * Math.max(fw, fh)) / Math.min(fw, fh))
  const [nw, nh] = fw <= fh ? [p.size, long] : [long, p.size]
  const window = { x: Math.floor((nw - p.crop) / 2), y: Math.floor((nh - p.crop) / 2), width: p.crop, height: p.crop }
  if (!pad) return resizeBicubic(image, nw, nh, window)
  // The odd pixel of padding goes to the right or the bottom.
  const frame = { width: side, height: side, left: (side - w) >> 1, top: (side - h) >> 1, colour: padColour(p.mean) }
  return resizeBicubic(image, nw, nh, window, frame)
}

/** Normalised value of every 8-bit value, per channel: [3 * 256], float32 arithmetic as numpy does it. */
export function normaliseTable(p: Pick<Preprocess, 'mean' | 'std'>): Float32Array {
  const table = new Float32Array(3 * 256)
  for (let c = 0; c < 3; c++) {
    const [mean, std] = [Math.fround(p.mean[c]), Math.fround(p.std[c])]
    for (let v = 0; v < 256; v++) {
      const scaled = Math.fround(v * (1 / 255))
      table[256 * c + v] = Math.fround(Math.fround(scaled - mean) / std)
    }
  }
  return table
}

/**
 * Writes uint8 [S, S, 3] as normalised float32 [3, S, S] at `offset` of `out`.
 * @param table from normaliseTable
 */
export function normaliseInto(u8: Uint8Array, table: Float32Array, out: Float32Array, offset = 0): void {
  const n = u8.length / 3
  if (offset + 3 * n > out.length)
    throw mismatch('ERR_SHAPE', 'normalise', 'output', `at least ${offset + 3 * n} numbers`, `${out.length}`)
  for (let i = 0, s = 0; i < n; i++, s += 3) {
    out[offset + i] = table[u8[s]]
    out[offset + n + i] = table[256 + u8[s + 1]]
    out[offset + 2 * n + i] = table[512 + u8[s + 2]]
  }
}

/** uint8 [S, S, 3] -> normalised float32 [3, S, S]. */
export function normalise(u8: Uint8Array, p: Pick<Preprocess, 'mean' | 'std'>): Float32Array {
  const out = new Float32Array(u8.length)
  normaliseInto(u8, normaliseTable(p), out)
  return out
}

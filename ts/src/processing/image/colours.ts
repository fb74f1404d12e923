/** Samples of a file to 8-bit RGB by Pillow's rules for the modes (its Convert.c), and turning. */
import type { RgbImage } from './format.js'

/** Samples of a picture as its file has them: [height, width, channels]. */
export interface Samples {
  data: ArrayLike<number>
  width: number
  height: number
  channels: number
}

/** Mode I;16, I and F: clipped, not scaled. */
export function clippedGrey({ data, width, height, channels }: Samples): Uint8Array {
  const out = new Uint8Array(3 * width * height)
  for (let s = 0, d = 0; d < out.length; s += channels, d += 3) {
    const v = data[s]
    out[d] = out[d + 1] = out[d + 2] = v > 255 ? 255 : v > 0 ? v : 0
  }
  return out
}

/** The product of two bytes as a byte: a * b / 255, rounded. */
const product = (a: number, b: number): number => {
  const t = a * b + 128
  return ((t >> 8) + t) >> 8
}

/** Mode CMYK without a colour profile. @param shift 8 for 16-bit samples */
export function cmykToRgb({ data, channels, width, height }: Samples, shift = 0): Uint8Array {
  const out = new Uint8Array(3 * width * height)
  for (let s = 0, d = 0; d < out.length; s += channels, d += 3) {
    const white = 255 - (data[s + 3] >> shift)
    for (let c = 0; c < 3; c++) out[d + c] = white - product(data[s + c] >> shift, white)
  }
  return out
}

/**
 * Mode P. Colours beyond the palette are black.
 * @param palette RGB triples
 */
export function paletteToRgb(indices: Uint8Array, palette: Uint8Array): Uint8Array {
  const table = new Uint8Array(768)
  table.set(palette.subarray(0, 768))
  const out = new Uint8Array(3 * indices.length)
  for (let i = 0, d = 0; i < indices.length; i++, d += 3) {
    const s = 3 * indices[i]
    out[d] = table[s]
    out[d + 1] = table[s + 1]
    out[d + 2] = table[s + 2]
  }
  return out
}

/** Modes 1 and L. */
export function greyToRgb(grey: Uint8Array): Uint8Array {
  const out = new Uint8Array(3 * grey.length)
  for (let i = 0, d = 0; i < grey.length; i++, d += 3) out[d] = out[d + 1] = out[d + 2] = grey[i]
  return out
}

/** Samples of 1 to 8 bits, packed from the high bit on, one byte each. */
export function unpackBits(row: Uint8Array, bits: number, count: number): Uint8Array {
  if (bits === 8) return row.subarray(0, count)
  const out = new Uint8Array(count)
  const mask = (1 << bits) - 1
  for (let i = 0; i < count; i++) {
    const at = i * bits
    out[i] = (row[at >> 3] >> (8 - bits - (at & 7))) & mask
  }
  return out
}

/** Where a turned picture's pixels come from: start and steps per column and per row, in pixels of the source. */
function path(o: number, w: number, h: number): [number, number, number] {
  const last = w * h - 1
  switch (o) {
    case 2:
      return [w - 1, -1, w]
    case 3:
      return [last, -1, -w]
    case 4:
      return [last - (w - 1), 1, -w]
    case 5:
      return [0, w, 1]
    case 6:
      return [last - (w - 1), -w, 1]
    case 7:
      return [last, -w, -1]
    default:
      return [w - 1, w, -1]
  }
}

/** The picture upright, by the number that EXIF and TIFF give its orientation. */
export function turned(image: RgbImage, orientation: number): RgbImage {
  if (!(orientation > 1 && orientation <= 8)) return image
  const { data, alpha, width: w, height: h } = image
  const [width, height] = orientation >= 5 ? [h, w] : [w, h]
  const [start, right, down] = path(orientation, w, h)
  const out: RgbImage = { data: new Uint8Array(data.length), width, height }
  if (alpha) out.alpha = new Uint8Array(alpha.length)
  for (let y = 0, d = 0; y < height; y++)
    for (let x = 0, s = start + y * down; x < width; x++, d++, s += right) {
      out.data[3 * d] = data[3 * s]
      out.data[3 * d + 1] = data[3 * s + 1]
      out.data[3 * d + 2] = data[3 * s + 2]
      if (alpha && out.alpha) out.alpha[d] = alpha[s]
    }
  return out
}

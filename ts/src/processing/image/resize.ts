/** Pillow's bicubic resize, bit for bit. */
import type { RgbImage } from './decode.js'

const BITS = 22
const HALF = 1 << (BITS - 1)

/** Taps of one axis: output pixel i reads `count[i]` inputs from `first[i]` on with weights from `at[i]` on. */
interface Taps {
  first: Int32Array
  count: Int32Array
  at: Int32Array
  weights: Int32Array
  /** sum of the weights that fall on the padding, per output pixel */
  outside: Int32Array
}

function cubic(x: number): number {
  const a = Math.abs(x)
  if (a < 1) return (1.5 * a - 2.5) * a * a + 1
  return a < 2 ? ((-0.5 * a + 2.5) * a - 4) * a + 2 : 0
}

/**
 * Pillow's precompute_coeffs (a = -0.5, antialiased) for output pixels `from`..`from + n - 1` of an axis that is resized
 * from `inSize` to `outSize`; of the inputs only `inner` from `offset` on are real, the others are padding.
 */
function taps(inSize: number, outSize: number, from: number, n: number, offset: number, inner: number): Taps {
  const scale = inSize / outSize
  const filter = Math.max(scale, 1)
  const support = 2 * filter
  const width = Math.ceil(support) * 2 + 1
  const t: Taps = {
    first: new Int32Array(n),
    count: new Int32Array(n),
    at: new Int32Array(n),
    weights: new Int32Array(n * width),
    outside: new Int32Array(n),
  }
  const k = new Float64Array(width)
  for (let i = 0; i < n; i++) {
    const center = (from + i + 0.5) * scale
    const lo = Math.max(Math.trunc(center - support + 0.5), 0)
    const hi = Math.min(Math.trunc(center + support + 0.5), inSize)
    let sum = 0
    for (let j = 0; j < hi - lo; j++) {
      k[j] = cubic((j + lo - center + 0.5) * (1 / filter))
      sum += k[j]
    }
    const begin = Math.min(Math.max(lo, offset), offset + inner)
    const end = Math.max(Math.min(hi, offset + inner), begin)
    t.first[i] = begin - offset
    t.count[i] = end - begin
    t.at[i] = i * width
    for (let j = 0; j < hi - lo; j++) {
      const w = k[j] / sum
      const fixed = Math.trunc((w < 0 ? -0.5 : 0.5) + w * (1 << BITS))
      const at = lo + j
      if (at >= begin && at < end) t.weights[i * width + at - begin] = fixed
      else t.outside[i] += fixed
    }
  }
  return t
}

/** Into the range of a byte. */
export const clip8 = (v: number): number => (v < 0 ? 0 : v > 255 ? 255 : v)

/** One pass along rows: source rows [h, w, 3] -> [h, n, 3]. */
function horizontal(
  src: Uint8Array,
  w: number,
  firstRow: number,
  rows: number,
  t: Taps,
  pad: readonly number[],
): Uint8Array {
  const n = t.first.length
  const out = new Uint8Array(rows * n * 3)
  const { first, count, at, weights, outside } = t
  for (let y = 0, d = 0; y < rows; y++) {
    const row = (firstRow + y) * w * 3
    for (let x = 0; x < n; x++, d += 3) {
      const o = outside[x]
      let r = HALF + Math.imul(o, pad[0])
      let g = HALF + Math.imul(o, pad[1])
      let b = HALF + Math.imul(o, pad[2])
      let s = row + first[x] * 3
      for (let j = at[x], e = at[x] + count[x]; j < e; j++, s += 3) {
        const k = weights[j]
        r = (r + Math.imul(src[s], k)) | 0
        g = (g + Math.imul(src[s + 1], k)) | 0
        b = (b + Math.imul(src[s + 2], k)) | 0
      }
      out[d] = clip8(r >> BITS)
      out[d + 1] = clip8(g >> BITS)
      out[d + 2] = clip8(b >> BITS)
    }
  }
  return out
}

/** One pass along columns: [rows, n, 3] -> [t.length, n, 3]; `pad` [n, 3] is what a row of padding became. */
function vertical(src: Uint8Array, firstRow: number, stride: number, t: Taps, pad: Uint8Array): Uint8Array {
  const m = t.first.length
  const out = new Uint8Array(m * stride)
  const acc = new Int32Array(stride)
  for (let y = 0; y < m; y++) {
    const o = t.outside[y]
    for (let x = 0; x < stride; x++) acc[x] = HALF + Math.imul(o, pad[x])
    for (let j = 0; j < t.count[y]; j++) {
      const k = t.weights[t.at[y] + j]
      const row = (t.first[y] - firstRow + j) * stride
      for (let x = 0; x < stride; x++) acc[x] += Math.imul(src[row + x], k)
    }
    const d = y * stride
    for (let x = 0; x < stride; x++) out[d + x] = clip8(acc[x] >> BITS)
  }
  return out
}

/** Part of a resized picture: `x, y, width, height` in output pixels. */
interface Window {
  x: number
  y: number
  width: number
  height: number
}

/**
 * Pillow's 8-bit bicubic resize (two passes, each rounded to 8 bits with 22-bit fixed-point weights), bit for bit.
 * Only the window is computed. The padding is never stored, so a long thin picture costs no more than its own pixels.
 * @param pad frame around the picture: side lengths of the whole, position of the picture in it, colour
 * @returns [window.height, window.width, 3]
 */
export function resizeBicubic(
  image: RgbImage,
  width: number,
  height: number,
  window: Window = { x: 0, y: 0, width, height },
  pad?: { width: number; height: number; left: number; top: number; colour: readonly number[] },
): Uint8Array {
  const colour = pad?.colour ?? [0, 0, 0]
  const tx = taps(pad?.width ?? image.width, width, window.x, window.width, pad?.left ?? 0, image.width)
  const ty = taps(pad?.height ?? image.height, height, window.y, window.height, pad?.top ?? 0, image.height)
  let firstRow = image.height
  let lastRow = 0
  for (let i = 0; i < ty.first.length; i++) {
    if (!ty.count[i]) continue
    firstRow = Math.min(firstRow, ty.first[i])
    lastRow = Math.max(lastRow, ty.first[i] + ty.count[i])
  }
  const rows = Math.max(lastRow - firstRow, 0)
  const middle = horizontal(image.data, image.width, firstRow, rows, tx, colour)
  // A row of padding through the first pass.
  const blank = new Uint8Array(window.width * 3)
  for (let x = 0; x < window.width; x++) {
    let sum = tx.outside[x]
    for (let j = 0; j < tx.count[x]; j++) sum += tx.weights[tx.at[x] + j]
    for (let c = 0; c < 3; c++) blank[3 * x + c] = clip8((HALF + Math.imul(sum, colour[c])) >> BITS)
  }
  return vertical(middle, firstRow, window.width * 3, ty, blank)
}

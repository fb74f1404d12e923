/**
 * Pictures, exactly as Pillow and transformers' CLIPImageProcessor prepare them: decode (sharp), RGB by dropping alpha,
 * optional padding to a square, bicubic resize in Pillow's fixed point, centre crop, normalisation.
 * EXIF orientation and colour profiles are ignored, as Pillow's Image.open does.
 */

import { AlignGPTError, mismatch } from '../util/errors.js'
import { Rng } from '../util/rng.js'
import { MAX_BYTES, type PictureSource, readFilePart, readPicture } from './image-source.js'
import type { PreprocessorConfig } from './preprocessor-config.js'

/** 8-bit RGB picture, rows from the top: data [height, width, 3]. */
export interface RgbImage {
  data: Uint8Array
  width: number
  height: number
  /** [height, width], only when asked for and present in the file */
  alpha?: Uint8Array
}

export interface ImageLimits {
  /** largest file, bytes; default 256 MiB */
  maxBytes?: number
  /** largest picture, pixels; default 50 million */
  maxPixels?: number
}

/** How a decoded picture becomes the vision tower's input. */
export type Preprocess = Pick<PreprocessorConfig, 'size' | 'crop' | 'mean' | 'std'> & {
  /** pad to a square with the mean colour first (instruction tuning, inference) */
  pad: boolean
}

export const MAX_PIXELS = 50_000_000
// The resize needs memory in proportion to the longer side, whatever the shorter one is.
const MAX_SIDE = 1 << 20
// What Pillow reads as a bitmap too. Above all no SVG or PDF: they are programs that draw.
const FORMATS = new Set(['jpeg', 'png', 'webp', 'gif', 'tiff', 'heif', 'avif'])

const bad = (what: string, expected: string, got: string, cause?: unknown): AlignGPTError =>
  mismatch('ERR_IMAGE', 'image', what, expected, got, cause)

/** Expands 1 to 4 interleaved channels to RGB; grey is repeated, alpha is set apart. */
function toRgb(raw: Buffer, channels: number, withAlpha: boolean): { data: Uint8Array; alpha?: Uint8Array } {
  const n = raw.length / channels
  const alpha = withAlpha && channels % 2 === 0 ? new Uint8Array(n) : undefined
  // no Uint8Array.from with a function: that takes as long as the decoding
  if (alpha) for (let i = 0, s = channels - 1; i < n; i++, s += channels) alpha[i] = raw[s]
  if (channels === 3) return { data: raw }
  const data = new Uint8Array(3 * n)
  const [g, b] = channels < 3 ? [0, 0] : [1, 2]
  for (let i = 0, s = 0, d = 0; i < n; i++, s += channels, d += 3) {
    data[d] = raw[s]
    data[d + 1] = raw[s + g]
    data[d + 2] = raw[s + b]
  }
  return { data, alpha }
}

/** Imported with the first picture, since it takes longer than everything else of this package; once, since asking again takes time too. */
let importing: Promise<typeof import('sharp')> | undefined
const decoderLibrary = (): Promise<typeof import('sharp')> => {
  importing ??= import('sharp')
  return importing
}

/** Opens a picture and checks what its header says. @throws AlignGPTError ERR_IMAGE */
async function openPicture(bytes: Uint8Array, name: string, maxPixels: number) {
  const { default: sharp } = await decoderLibrary()
  const open = { limitInputPixels: maxPixels, failOn: 'error', ignoreIcc: true, sequentialRead: true } as const
  const { format, width, height } = await sharp(bytes, { ...open, limitInputPixels: false }).metadata()
  if (!format || !FORMATS.has(format)) throw bad(name, [...FORMATS].join(' '), format ?? 'an unknown format')
  if (!width || !height || width * height > maxPixels)
    throw bad(name, `at most ${maxPixels} pixels`, `${width} x ${height}`)
  if (Math.max(width, height) > MAX_SIDE) throw bad(name, `sides up to ${MAX_SIDE}`, `${width} x ${height}`)
  return { width, height, decoder: () => sharp(bytes, open) }
}

/** Any failure as an error about the picture `name`. */
const asImageError = (e: unknown, name: string): AlignGPTError =>
  e instanceof AlignGPTError ? e : bad(name, 'a picture that can be decoded', (e as Error).message.split('\n')[0], e)

/**
 * Decodes a picture to RGB: alpha is dropped, not blended; grey and palette become RGB; 16 bits become 8 (high byte);
 * of an animation the first frame is taken.
 * @param input path, or the file's bytes
 * @param options.alpha also return the alpha channel, if there is one
 * @param options.name name for messages when `input` is bytes
 * @throws AlignGPTError ERR_IMAGE: unreadable, too large, truncated, damaged, no picture of a known format
 */
export async function decodeImage(
  input: string | Uint8Array,
  options: ImageLimits & { alpha?: boolean; name?: string } = {},
): Promise<RgbImage> {
  const name = options.name ?? (typeof input === 'string' ? input : 'picture')
  const { maxPixels = MAX_PIXELS, maxBytes = MAX_BYTES } = options
  const bytes = typeof input === 'string' ? readFilePart(input, { maxBytes }) : input
  if (bytes.byteLength > maxBytes) throw bad(name, `at most ${maxBytes} bytes`, `${bytes.byteLength}`)
  if (bytes.byteLength === 0) throw bad(name, 'a picture', 'an empty file')
  try {
    const { decoder } = await openPicture(bytes, name, maxPixels)
    const raw = decoder().toColourspace('srgb').raw({ depth: 'uchar' })
    const { data, info } = await raw.toBuffer({ resolveWithObject: true })
    if (info.channels > 4 || data.length !== info.width * info.height * info.channels)
      throw bad(name, '1 to 4 channels', `${info.channels}`)
    return { ...toRgb(data, info.channels, options.alpha === true), width: info.width, height: info.height }
  } catch (e) {
    throw asImageError(e, name)
  }
}

/** Decodes a picture of a data set; see readPicture and decodeImage. */
export async function loadImage(
  source: PictureSource,
  options: ImageLimits & { alpha?: boolean } = {},
): Promise<RgbImage> {
  const { maxBytes } = options
  return decodeImage(readPicture(source, { maxBytes }), { ...options, name: source.name })
}

// Holds the header of nearly every picture, behind colour profiles and EXIF too.
const HEAD = 128 * 1024

/**
 * Side lengths of a picture from its header; pixels are not decoded and mostly not read.
 * @throws AlignGPTError ERR_IMAGE as decodeImage does, but for damage behind the header
 */
export async function imageHeader(
  source: PictureSource,
  { maxBytes = MAX_BYTES, maxPixels = MAX_PIXELS }: ImageLimits = {},
): Promise<{ width: number; height: number }> {
  const { name } = source
  const look = async (bytes: Uint8Array): Promise<{ width: number; height: number }> => {
    if (bytes.length === 0) throw bad(name, 'a picture', 'an empty file')
    const { width, height } = await openPicture(bytes, name, maxPixels)
    return { width, height }
  }
  const head = readPicture(source, { maxBytes, head: HEAD })
  try {
    // A header that does not fit into its usual room is looked for in the whole file.
    return await look(head).catch((e) =>
      head.length < HEAD ? Promise.reject(e) : look(readPicture(source, { maxBytes })),
    )
  } catch (e) {
    throw asImageError(e, name)
  }
}

/** Colour of the padding: the mean, truncated to 8 bits, (122, 116, 104) for CLIP. */
export const padColour = (mean: readonly number[]): [number, number, number] =>
  [0, 1, 2].map((c) => Math.trunc(mean[c] * 255)) as [number, number, number]

// ---- Pillow's bicubic resize ------------------------------------------------------------------------------------------

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

const clip8 = (v: number): number => (v < 0 ? 0 : v > 255 ? 255 : v)

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

// ---- augmentation -------------------------------------------------------------------------------------------------------

/** Blends a picture with alpha over one colour; without alpha the picture itself. */
export function compositeOver(image: RgbImage, colour: readonly number[]): RgbImage {
  const { data, alpha, width, height } = image
  if (!alpha) return image
  const out = new Uint8Array(data.length)
  for (let i = 0; i < alpha.length; i++)
    for (let c = 0; c < 3; c++)
      out[3 * i + c] = Math.round((data[3 * i + c] * alpha[i] + colour[c] * (255 - alpha[i])) / 255)
  return { data: out, width, height }
}

/**
 * Mild augmentation for training: random background where there is alpha, small rotation, scale and shift (edges are
 * repeated, the background beside a picture with alpha is its colour), brightness, contrast and saturation.
 * A pure function of the picture and the stream of random numbers.
 */
export function augment(image: RgbImage, rng: Rng): RgbImage {
  const colour = [rng.int(256), rng.int(256), rng.int(256)]
  const { data: src, width: w, height: h } = compositeOver(image, colour)
  const between = (lo: number, hi: number): number => lo + (hi - lo) * rng.next()
  const angle = between(-0.17, 0.17)
  const zoom = between(0.85, 1.15)
  const [dx, dy] = [between(-0.06, 0.06) * w, between(-0.06, 0.06) * h]
  const [gain, contrast, saturation] = [between(0.85, 1.15), between(0.85, 1.15), between(0.7, 1.3)]
  const [cos, sin] = [Math.cos(angle) / zoom, Math.sin(angle) / zoom]
  const background = image.alpha ? colour : null
  const out = new Uint8Array(src.length)
  const beside = background !== null
  for (let y = 0, d = 0; y < h; y++)
    for (let x = 0; x < w; x++, d += 3) {
      const u = x - (w - 1) / 2 - dx
      const v = y - (h - 1) / 2 - dy
      const px = cos * u + sin * v + (w - 1) / 2
      const py = cos * v - sin * u + (h - 1) / 2
      let r = colour[0]
      let g = colour[1]
      let b = colour[2]
      if (!beside || (px >= -0.5 && py >= -0.5 && px <= w - 0.5 && py <= h - 0.5)) {
        // bilinear, in scalars: this loop runs for every pixel of every training picture
        const cx = px < 0 ? 0 : px > w - 1 ? w - 1 : px
        const cy = py < 0 ? 0 : py > h - 1 ? h - 1 : py
        const x0 = cx | 0
        const y0 = cy | 0
        const fx = cx - x0
        const fy = cy - y0
        const i00 = 3 * (y0 * w + x0)
        const i01 = x0 + 1 < w ? i00 + 3 : i00
        const below = y0 + 1 < h ? 3 * w : 0
        const i10 = i00 + below
        const i11 = i01 + below
        const w00 = (1 - fx) * (1 - fy)
        const w01 = fx * (1 - fy)
        const w10 = (1 - fx) * fy
        const w11 = fx * fy
        r = src[i00] * w00 + src[i01] * w01 + src[i10] * w10 + src[i11] * w11
        g = src[i00 + 1] * w00 + src[i01 + 1] * w01 + src[i10 + 1] * w10 + src[i11 + 1] * w11
        b = src[i00 + 2] * w00 + src[i01 + 2] * w01 + src[i10 + 2] * w10 + src[i11 + 2] * w11
      }
      const grey = 0.299 * r + 0.587 * g + 0.114 * b
      out[d] = clip8(Math.round(((grey + (r - grey) * saturation - 128) * contrast + 128) * gain))
      out[d + 1] = clip8(Math.round(((grey + (g - grey) * saturation - 128) * contrast + 128) * gain))
      out[d + 2] = clip8(Math.round(((grey + (b - grey) * saturation - 128) * contrast + 128) * gain))
    }
  return { data: out, width: w, height: h }
}

/** Pictures as long as there is room: those of a small data set are decoded in its first epoch only. */
export class PictureCache {
  readonly #kept = new Map<string, RgbImage>()
  /** @param room bytes */
  constructor(private room = 64 * 2 ** 20) {}
  /** The picture of this key, made when it is not kept. */
  async get(key: string, make: () => Promise<RgbImage>): Promise<RgbImage> {
    const known = this.#kept.get(key)
    if (known) return known
    const image = await make()
    const bytes = image.data.length + (image.alpha?.length ?? 0)
    // Somebody else may have made it meanwhile.
    if (bytes > this.room || this.#kept.has(key)) return image
    this.room -= bytes
    this.#kept.set(key, image)
    return image
  }
}

/**
 * What a decode worker does for one picture; also the inline way.
 * @returns uint8 [crop, crop, 3]
 */
export async function preparePicture(task: PictureTask, cache?: PictureCache): Promise<Uint8Array> {
  const { source, preprocess, augmentation, limits } = task
  const keep = (key: unknown[], make: () => Promise<RgbImage>): Promise<RgbImage> =>
    cache ? cache.get(JSON.stringify(key), make) : make()
  if (augmentation) {
    const decoded = await keep([source, limits], () => loadImage(source, { ...limits, alpha: true }))
    return preprocessImage(augment(decoded, new Rng(...augmentation)), preprocess)
  }
  // Always the same, and smaller than what was decoded: the result is kept.
  const { crop } = preprocess
  const make = async (): Promise<RgbImage> => {
    const data = preprocessImage(await loadImage(source, limits), preprocess)
    return { data, width: crop, height: crop }
  }
  return (await keep([source, limits, preprocess], make)).data
}

/** Everything needed to prepare a picture, in plain values that can be sent to a worker. */
export interface PictureTask {
  source: PictureSource
  preprocess: Preprocess
  /** null, or seed and stream of the random numbers */
  augmentation: [number, number] | null
  limits: ImageLimits
}

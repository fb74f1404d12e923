/** Pictures -> pixel values, bit for bit what Pillow and CLIPImageProcessor give. Decoding is sharp's. */
import fs from 'node:fs'
import path from 'node:path'
import sharp, { type OutputInfo } from 'sharp'
import type { PreprocessorConfig } from './config.js'
import { AlignGPTError } from './errors.js'

export interface Rgb {
  /** [height, width, 3] */
  data: Uint8Array
  width: number
  height: number
}
export const MAX_PIXELS = 50_000_000
const MAX_FILE = 256 * 1024 * 1024

function refuse(name: string, expected: string, got: string): never {
  throw new AlignGPTError('ERR_IMAGE', `[image] ${name}: expected ${expected}, got ${got}`)
}

/** The real path of `name` below `root`. @throws ERR_IMAGE when it is missing or leads outside */
export function resolveImage(root: string, name: string): string {
  let real: string
  let realRoot: string
  try {
    realRoot = fs.realpathSync(root)
    real = fs.realpathSync(path.resolve(root, name))
  } catch {
    return refuse(name, `a file below ${root}`, 'none')
  }
  if (!real.startsWith(realRoot + path.sep)) refuse(name, `a file below ${root}`, 'a path that leads outside')
  return real
}

/**
 * Decodes a picture to RGB: alpha is dropped (not blended), palettes and grey are expanded, EXIF orientation is ignored,
 * as `Image.open(f).convert('RGB')` does.
 * @throws ERR_IMAGE for anything that is not a whole picture of at most 50 Mpx
 */
export async function decodeImage(
  file: string | Uint8Array,
  name = typeof file === 'string' ? file : 'picture',
): Promise<Rgb> {
  if (typeof file === 'string') {
    const stat = fs.statSync(file, { throwIfNoEntry: false })
    if (!stat?.isFile()) refuse(name, 'a file', stat ? 'something else' : 'none')
    if (stat.size > MAX_FILE) refuse(name, `at most ${MAX_FILE} bytes`, `${stat.size}`)
  }
  let raw: { data: Buffer; info: OutputInfo }
  try {
    raw = await sharp(file, { limitInputPixels: MAX_PIXELS, failOn: 'truncated' })
      .removeAlpha()
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true })
  } catch (e) {
    return refuse(name, `a whole picture of at most ${MAX_PIXELS} pixels`, (e as Error).message)
  }
  const { width, height, channels } = raw.info
  if (channels === 3) return { data: raw.data, width, height }
  const data = new Uint8Array(width * height * 3)
  for (let i = 0; i < width * height; i++) data.fill(raw.data[i * channels], i * 3, i * 3 + 3)
  return { data, width, height }
}

/** Pads the short side on both ends with a colour (default: CLIP's mean); the odd pixel goes right or below. */
export function padToSquare(img: Rgb, colour: readonly number[] = [122, 116, 104]): Rgb {
  const { width, height } = img
  if (width === height) return img
  const side = Math.max(width, height)
  const data = new Uint8Array(side * side * 3)
  for (let i = 0; i < side * side; i++) data.set(colour, i * 3)
  const left = (side - width) >> 1
  const top = (side - height) >> 1
  for (let y = 0; y < height; y++)
    data.set(img.data.subarray(y * width * 3, (y + 1) * width * 3), ((y + top) * side + left) * 3)
  return { data, width: side, height: side }
}

function cubic(v: number): number {
  const x = Math.abs(v)
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0
}

interface Weights {
  first: Int32Array
  count: Int32Array
  /** [out, taps] in 22-bit fixed point */
  fixed: Int32Array
  taps: number
}

/** Pillow's antialiased bicubic (a = -0.5) weights from n to m samples. */
function weightsOf(n: number, m: number): Weights {
  const scale = n / m
  const stretch = Math.max(scale, 1)
  const taps = Math.ceil(4 * stretch) + 2
  const w: Weights = { first: new Int32Array(m), count: new Int32Array(m), fixed: new Int32Array(m * taps), taps }
  for (let i = 0; i < m; i++) {
    const center = (i + 0.5) * scale
    const lo = Math.max(Math.trunc(center - 2 * stretch + 0.5), 0)
    const hi = Math.min(Math.trunc(center + 2 * stretch + 0.5), n)
    const k = Array.from({ length: hi - lo }, (_, j) => cubic((j + lo - center + 0.5) / stretch))
    const total = k.reduce((a, b) => a + b, 0)
    w.first[i] = lo
    w.count[i] = hi - lo
    for (const [j, v] of k.entries()) {
      const share = v / total
      w.fixed[i * taps + j] = Math.trunc((share < 0 ? -0.5 : 0.5) + share * 4194304)
    }
  }
  return w
}

/** One pass: samples are `stride` apart, lines `lineStride`; both in bytes, channels side by side. */
function resample(
  src: Uint8Array,
  dst: Uint8Array,
  w: Weights,
  lines: number,
  o: { srcStep: number; srcLine: number; dstStep: number; dstLine: number },
): void {
  const m = w.first.length
  for (let line = 0; line < lines; line++)
    for (let i = 0; i < m; i++) {
      let [r, g, b] = [2097152, 2097152, 2097152]
      let at = line * o.srcLine + w.first[i] * o.srcStep
      for (let j = 0, k = i * w.taps; j < w.count[i]; j++, k++, at += o.srcStep) {
        const f = w.fixed[k]
        r += f * src[at]
        g += f * src[at + 1]
        b += f * src[at + 2]
      }
      const to = line * o.dstLine + i * o.dstStep
      // sums stay below 2^53; clamping before the shift keeps it within 32 bits
      dst[to] = r <= 0 ? 0 : r >= 1069547520 ? 255 : r >> 22
      dst[to + 1] = g <= 0 ? 0 : g >= 1069547520 ? 255 : g >> 22
      dst[to + 2] = b <= 0 ? 0 : b >= 1069547520 ? 255 : b >> 22
    }
}

/** Pillow's 8-bit bicubic resize: horizontal, then vertical, each rounded to bytes. */
export function resizeBicubic(img: Rgb, width: number, height: number): Rgb {
  let current = img
  if (img.width !== width) {
    const data = new Uint8Array(img.height * width * 3)
    resample(img.data, data, weightsOf(img.width, width), img.height, {
      srcStep: 3,
      srcLine: img.width * 3,
      dstStep: 3,
      dstLine: width * 3,
    })
    current = { data, width, height: img.height }
  }
  if (current.height !== height) {
    const data = new Uint8Array(height * width * 3)
    resample(current.data, data, weightsOf(current.height, height), width, {
      srcStep: width * 3,
      srcLine: 3,
      dstStep: width * 3,
      dstLine: 3,
    })
    current = { data, width, height }
  }
  return current
}

/** Resize of the shortest edge and centre crop, after padding to a square if wanted. -> [crop, crop, 3] bytes */
export function cropped(img: Rgb, c: PreprocessorConfig, pad: boolean): Rgb {
  const source = pad
    ? padToSquare(
        img,
        c.mean.map((m) => Math.trunc(m * 255)),
      )
    : img
  const { width: w, height: h } = source
  const long = Math.trunc((c.size * Math.max(w, h)) / Math.min(w, h))
  const [nw, nh] = w <= h ? [c.size, long] : [long, c.size]
  const resized = resizeBicubic(source, nw, nh)
  if (nw === c.crop && nh === c.crop) return resized
  const data = new Uint8Array(c.crop * c.crop * 3)
  const left = Math.floor((nw - c.crop) / 2)
  const top = Math.floor((nh - c.crop) / 2)
  for (let y = 0; y < c.crop; y++)
    for (let x = 0; x < c.crop; x++) {
      const [sx, sy] = [x + left, y + top]
      if (sx < 0 || sy < 0 || sx >= nw || sy >= nh) continue // a crop larger than the picture is filled with zeros
      const from = (sy * nw + sx) * 3
      data.set(resized.data.subarray(from, from + 3), (y * c.crop + x) * 3)
    }
  return { data, width: c.crop, height: c.crop }
}

/** Bytes [S, S, 3] -> (x / 255 - mean) / std as [3, S, S], in the float steps of CLIPImageProcessor. */
export function normalize(img: Rgb, c: PreprocessorConfig, out: Float32Array, offset = 0): void {
  const n = img.width * img.height
  for (let ch = 0; ch < 3; ch++) {
    const mean = Math.fround(c.mean[ch])
    const std = Math.fround(c.std[ch])
    const lut = Float32Array.from({ length: 256 }, (_, v) => Math.fround(Math.fround(v * (1 / 255)) - mean) / std)
    for (let i = 0; i < n; i++) out[offset + ch * n + i] = lut[img.data[i * 3 + ch]]
  }
}

/** File -> pixel values [3, crop, crop]. @throws ERR_IMAGE */
export async function loadPixels(
  file: string | Uint8Array,
  c: PreprocessorConfig,
  pad: boolean,
): Promise<Float32Array> {
  const out = new Float32Array(3 * c.crop * c.crop)
  normalize(cropped(await decodeImage(file), c, pad), c, out)
  return out
}

/**
 * Images of files and bytes as Pillow decodes them (by sharp): RGB by dropping alpha. EXIF orientation and colour profiles are
 * ignored, as Pillow's Image.open does.
 */
import { AlignGPTError, mismatch } from '../../util/errors.js'
import { type ImageSource, MAX_BYTES, readFilePart, readImage } from './source.js'

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
async function openImage(bytes: Uint8Array, name: string, maxPixels: number) {
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
    const { decoder } = await openImage(bytes, name, maxPixels)
    const raw = decoder().toColourspace('srgb').raw({ depth: 'uchar' })
    const { data, info } = await raw.toBuffer({ resolveWithObject: true })
    if (info.channels > 4 || data.length !== info.width * info.height * info.channels)
      throw bad(name, '1 to 4 channels', `${info.channels}`)
    return { ...toRgb(data, info.channels, options.alpha === true), width: info.width, height: info.height }
  } catch (e) {
    throw asImageError(e, name)
  }
}

/** Decodes a picture of a data set; see readImage and decodeImage. */
export async function loadImage(
  source: ImageSource,
  options: ImageLimits & { alpha?: boolean } = {},
): Promise<RgbImage> {
  const { maxBytes } = options
  return decodeImage(readImage(source, { maxBytes }), { ...options, name: source.name })
}

// Holds the header of nearly every picture, behind colour profiles and EXIF too.
const HEAD = 128 * 1024

/**
 * Side lengths of a picture from its header; pixels are not decoded and mostly not read.
 * @throws AlignGPTError ERR_IMAGE as decodeImage does, but for damage behind the header
 */
export async function imageHeader(
  source: ImageSource,
  { maxBytes = MAX_BYTES, maxPixels = MAX_PIXELS }: ImageLimits = {},
): Promise<{ width: number; height: number }> {
  const { name } = source
  const look = async (bytes: Uint8Array): Promise<{ width: number; height: number }> => {
    if (bytes.length === 0) throw bad(name, 'a picture', 'an empty file')
    const { width, height } = await openImage(bytes, name, maxPixels)
    return { width, height }
  }
  const head = readImage(source, { maxBytes, head: HEAD })
  try {
    // A header that does not fit into its usual room is looked for in the whole file.
    return await look(head).catch((e) =>
      head.length < HEAD ? Promise.reject(e) : look(readImage(source, { maxBytes })),
    )
  } catch (e) {
    throw asImageError(e, name)
  }
}

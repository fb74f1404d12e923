/** Pictures that libvips decodes (by sharp), brought to what Pillow makes of the same samples. */
import type { Sharp } from 'sharp'
import { clippedGrey, cmykToRgb, type Samples } from './colours.js'
import { damaged, type Format, type Header, type RgbImage } from './format.js'
import { isDeepGreyPng } from './gates.js'
import type { TiffHeader } from './tiff.js'

/** Imported with the first picture, since it takes longer than everything else of this package; once, since asking again takes time too. */
let importing: Promise<typeof import('sharp')> | undefined
const decoderLibrary = (): Promise<typeof import('sharp')> => {
  importing ??= import('sharp')
  return importing
}

// The sides are checked before by this package. EXIF is not applied and profiles are not used unless asked for.
const OPEN = { limitInputPixels: false, failOn: 'error', ignoreIcc: true, sequentialRead: true } as const

/** What the library says about a picture before it decodes it. */
interface LibraryHeader extends Header {
  space: string
  depth: string
  channels: number
}

/** @throws whatever the library says */
export async function libraryHeader(b: Uint8Array, format: Format): Promise<LibraryHeader> {
  const { default: sharp } = await decoderLibrary()
  const { width, height, orientation = 1, space = '', depth = '', channels = 0 } = await sharp(b, OPEN).metadata()
  if (!width || !height) throw damaged(format)
  return { width, height, orientation, space, depth, channels }
}

/** Expands 1 to 6 interleaved channels to RGB; grey is repeated, alpha is set apart. */
function toRgb(raw: Buffer, channels: number, withAlpha: boolean): { data: Uint8Array; alpha?: Uint8Array } {
  const n = raw.length / channels
  const alpha = withAlpha && (channels === 2 || channels >= 4) ? new Uint8Array(n) : undefined
  // no Uint8Array.from with a function: that takes as long as the decoding
  if (alpha) for (let i = 0, s = channels === 2 ? 1 : 3; i < n; i++, s += channels) alpha[i] = raw[s]
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

const ARRAYS = {
  uchar: Uint8Array,
  char: Uint8Array,
  ushort: Uint16Array,
  short: Int16Array,
  // mode I is signed, whatever the file says
  uint: Int32Array,
  int: Int32Array,
  float: Float32Array,
} as const
type Depth = keyof typeof ARRAYS

/** The samples of the file, in the colours that it has. */
async function samplesOf(picture: Sharp, space: string, depth: Depth): Promise<Samples> {
  const raw = picture.pipelineColourspace(space).toColourspace(space).raw({ depth })
  const { data: b, info } = await raw.toBuffer({ resolveWithObject: true })
  const { width, height, channels } = info
  const data = new ARRAYS[depth](b.buffer.slice(b.byteOffset, b.byteOffset + b.length))
  if (data.length !== width * height * channels) throw new Error(`${data.length} samples`)
  return { data, width, height, channels }
}

/** Decodes PNG, JPEG, WebP, TIFF or AVIF. @throws whatever the library says */
export async function decodeByLibrary(
  b: Uint8Array,
  format: Format,
  header: Header | LibraryHeader | TiffHeader,
  withAlpha: boolean,
): Promise<RgbImage> {
  const { default: sharp } = await decoderLibrary()
  const { space, depth, channels } = 'space' in header ? header : await libraryHeader(b, format)
  const tiff = 'keepWhiteIsZero' in header ? header : null
  const picture = sharp(b, OPEN)
  const deepGrey = depth !== 'uchar' && (channels === 1 || (format === 'PNG' && isDeepGreyPng(b)))
  if (space === 'cmyk' || deepGrey) {
    const s = await samplesOf(picture, space, depth as Depth)
    const { width, height } = s
    if (!deepGrey) return { data: cmykToRgb(s, depth === 'ushort' ? 8 : 0), width, height }
    if (tiff?.keepWhiteIsZero && depth === 'ushort') s.data = (s.data as Uint16Array).map((v) => 65535 - v)
    return { data: clippedGrey(s), width, height }
  }
  const raw = picture.toColourspace('srgb').raw({ depth: 'uchar' })
  const { data, info } = await raw.toBuffer({ resolveWithObject: true })
  const { width, height } = info
  if (info.channels > 6 || data.length !== width * height * info.channels) throw new Error(`${info.channels} channels`)
  return { ...toRgb(data, info.channels, withAlpha && tiff?.alpha !== false), width, height }
}

/**
 * Images of files and bytes as Pillow has them after `Image.open(file).convert('RGB')`, to the last bit: alpha is dropped,
 * colour profiles are ignored. PNG, JPEG, WebP, TIFF and AVIF are decoded by libvips (sharp), the others here.
 */
import { bmpHeader, decodeBmp } from './bmp.js'
import { turned } from './colours.js'
import { asImageError, badImage, type Format, type Header, type RgbImage, readableFormat } from './format.js'
import { checkAvif, checkJpeg, checkPng } from './gates.js'
import { decodeGif, gifHeader } from './gif.js'
import { decodeByLibrary, libraryHeader } from './library.js'
import { decodePnm, pnmHeader } from './pnm.js'
import { type ImageSource, MAX_BYTES, readFilePart, readImage } from './source.js'
import { tiffHeader } from './tiff.js'

export type { RgbImage }

export interface ImageLimits {
  /** largest file, bytes; default 256 MiB */
  maxBytes?: number
  /** largest picture, pixels; default 50 million */
  maxPixels?: number
}

export interface DecodeOptions extends ImageLimits {
  /** also return the alpha channel, if there is one */
  alpha?: boolean
  /** turn a picture as its EXIF orientation says; a TIFF always is, as Pillow does it */
  exifOrientation?: boolean
}

export const MAX_PIXELS = 50_000_000
// The resize needs memory in proportion to the longer side, whatever the shorter one is.
const MAX_SIDE = 1 << 20

/** What the header says, sides as stored. @throws where it is none, or of a kind that is not read */
async function headerOf(b: Uint8Array, format: Format): Promise<Header> {
  switch (format) {
    case 'GIF':
      return gifHeader(b)
    case 'BMP':
      return bmpHeader(b)
    case 'PNM':
      return pnmHeader(b)
    case 'TIFF':
      return tiffHeader(b)
    case 'PNG':
      checkPng(b)
      break
    case 'JPEG':
      checkJpeg(b)
      break
    case 'AVIF':
      checkAvif(b)
      break
  }
  return libraryHeader(b, format)
}

function decodeFormat(b: Uint8Array, format: Format, header: Header, alpha: boolean): RgbImage | Promise<RgbImage> {
  switch (format) {
    case 'GIF':
      return decodeGif(b, alpha)
    case 'BMP':
      return decodeBmp(b, alpha)
    case 'PNM':
      return decodePnm(b)
    default:
      return decodeByLibrary(b, format, header, alpha)
  }
}

function checkSize({ width, height }: Header, name: string, maxPixels: number): void {
  if (width < 1 || height < 1) throw badImage(name, 'a picture with pixels', `${width} x ${height}`)
  if (width * height > maxPixels) throw badImage(name, `at most ${maxPixels} pixels`, `${width} x ${height}`)
  if (Math.max(width, height) > MAX_SIDE) throw badImage(name, `sides up to ${MAX_SIDE}`, `${width} x ${height}`)
}

/**
 * Decodes a picture to RGB as Pillow does: alpha is dropped, not blended; palette becomes RGB, grey is repeated; 16 bits of
 * colour become 8 (high byte), grey of 16 bits is clipped; of an animation the first frame is taken.
 * @param input path, or the file's bytes
 * @param options.name name for messages when `input` is bytes
 * @throws AlignGPTError ERR_IMAGE: unreadable, too large, truncated, damaged, of a format or kind that is not read
 */
export async function decodeImage(
  input: string | Uint8Array,
  options: DecodeOptions & { name?: string } = {},
): Promise<RgbImage> {
  const name = options.name ?? (typeof input === 'string' ? input : 'picture')
  const { maxPixels = MAX_PIXELS, maxBytes = MAX_BYTES } = options
  const bytes = typeof input === 'string' ? readFilePart(input, { maxBytes }) : input
  if (bytes.byteLength > maxBytes) throw badImage(name, `at most ${maxBytes} bytes`, `${bytes.byteLength}`)
  const format = readableFormat(bytes, name)
  try {
    const header = await headerOf(bytes, format)
    checkSize(header, name, maxPixels)
    const image = await decodeFormat(bytes, format, header, options.alpha === true)
    return format === 'TIFF' || options.exifOrientation ? turned(image, header.orientation) : image
  } catch (e) {
    throw asImageError(e, name, format)
  }
}

/** Decodes a picture of a data set; see readImage and decodeImage. */
export async function loadImage(source: ImageSource, options: DecodeOptions = {}): Promise<RgbImage> {
  const { maxBytes } = options
  return decodeImage(readImage(source, { maxBytes }), { ...options, name: source.name })
}

// Holds the header of nearly every picture, behind colour profiles and EXIF too.
const HEAD = 128 * 1024

/** What imageHeader finds. */
export interface ImageHeader extends Header {
  format: Format
}

/**
 * Format, side lengths and EXIF orientation of a picture from its header; pixels are not decoded and mostly not read.
 * The sides are those of the decoded picture that is not turned (of TIFF turned).
 * @throws AlignGPTError ERR_IMAGE as decodeImage does, but for damage behind the header
 */
export async function imageHeader(
  source: ImageSource,
  { maxBytes = MAX_BYTES, maxPixels = MAX_PIXELS }: ImageLimits = {},
): Promise<ImageHeader> {
  const { name } = source
  const head = readImage(source, { maxBytes, head: HEAD })
  const format = readableFormat(head, name)
  const look = async (bytes: Uint8Array): Promise<ImageHeader> => {
    const { width, height, orientation } = await headerOf(bytes, format)
    checkSize({ width, height, orientation }, name, maxPixels)
    const across = format === 'TIFF' && orientation >= 5
    return { format, orientation, ...(across ? { width: height, height: width } : { width, height }) }
  }
  try {
    // A header that does not fit into its usual room is looked for in the whole file.
    return await look(head).catch((e) =>
      head.length < HEAD ? Promise.reject(e) : look(readImage(source, { maxBytes })),
    )
  } catch (e) {
    throw asImageError(e, name, format)
  }
}

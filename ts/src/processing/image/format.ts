/** Which format a file has, by its first bytes: the pictures that are read, and the names of what is not. */
import { AlignGPTError, mismatch } from '../../util/errors.js'

export type Format = 'PNG' | 'JPEG' | 'GIF' | 'TIFF' | 'WebP' | 'BMP' | 'PNM' | 'AVIF'
export const FORMATS: readonly Format[] = ['PNG', 'JPEG', 'GIF', 'TIFF', 'WebP', 'BMP', 'PNM', 'AVIF']

/** 8-bit RGB picture, rows from the top: data [height, width, 3]. */
export interface RgbImage {
  data: Uint8Array
  width: number
  height: number
  /** [height, width], only when asked for and present in the file */
  alpha?: Uint8Array
}

/** What a header says; sides as the file stores them. */
export interface Header {
  width: number
  height: number
  /** of EXIF or TIFF, 1 to 8 */
  orientation: number
}

/** An error about the picture `name`. */
export const badImage = (name: string, expected: string, got: string, cause?: unknown): AlignGPTError =>
  mismatch('ERR_IMAGE', 'image', name, expected, got, cause)

/**
 * Why a picture of a known format cannot be read. It becomes an error with the picture's name in decode.ts. The words come
 * from this package alone: what a library says depends on its threads.
 */
export class Unreadable extends Error {}
export const unreadable = (got: string): Unreadable => new Unreadable(got)
/** A picture that ends too early or contradicts itself. */
export const damaged = (format: string): Unreadable => unreadable(`a damaged or truncated ${format}`)

/** What is no error of this package becomes one that says no more than the format. */
export function asImageError(e: unknown, name: string, format: string): AlignGPTError {
  if (e instanceof AlignGPTError) return e
  const got = e instanceof Unreadable ? e.message : damaged(format).message
  return badImage(name, 'a picture that can be decoded', got, e)
}

const text = (b: Uint8Array, from: number, to: number): string => Buffer.from(b.subarray(from, to)).toString('latin1')

/** Bytes at the start, or at an offset, in Latin-1. */
const OTHERS: [string, string, number?][] = [
  ['JPEG XL', '\xff\x0a'],
  ['JPEG XL', '\0\0\0\x0cJXL '],
  ['JPEG 2000', '\0\0\0\x0cjP  '],
  ['JPEG 2000', '\xff\x4f\xff\x51'],
  ['JPEG XR', 'II\xbc\x01'],
  ['PSD', '8BPS'],
  ['PDF', '%PDF'],
  ['EPS', '%!PS'],
  ['EPS', '\xc5\xd0\xd3\xc6'],
  ['ICO', '\0\0\x01\0'],
  ['CUR', '\0\0\x02\0'],
  ['ICNS', 'icns'],
  ['DDS', 'DDS '],
  ['QOI', 'qoif'],
  ['SGI', '\x01\xda'],
  ['PCX', '\x0a\x05\x01'],
  ['OpenEXR', 'v/1\x01'],
  ['Radiance HDR', '#?R'],
  ['FITS', 'SIMPLE  ='],
  ['WMF', '\xd7\xcd\xc6\x9a'],
  ['EMF', ' EMF', 40],
  ['DjVu', 'AT&TFORM'],
  ['XCF', 'gimp xcf'],
  ['XPM', '/* XPM */'],
  ['XBM', '#define'],
  ['BPG', 'BPG\xfb'],
  ['FLIF', 'FLIF'],
  ['DICOM', 'DICM', 128],
  ['HDF5', '\x89HDF'],
  ['PFM', 'Pf'],
  ['PFM', 'PF'],
  ['PAM', 'P7\n'],
  ['MNG', '\x8aMNG'],
  ['JNG', '\x8bJNG'],
  ['AVI video', 'AVI ', 8],
  ['WAVE sound', 'WAVE', 8],
  ['WebM or Matroska video', '\x1a\x45\xdf\xa3'],
  ['MPEG video', '\0\0\x01\xba'],
  ['Ogg', 'OggS'],
  ['NumPy array', '\x93NUMPY'],
  ['ZIP archive', 'PK\x03\x04'],
  ['gzip', '\x1f\x8b'],
  ['bzip2', 'BZh'],
  ['xz', '\xfd7zXZ'],
  ['Zstandard', '\x28\xb5\x2f\xfd'],
  ['7-Zip archive', "7z\xbc\xaf'\x1c"],
  ['RAR archive', 'Rar!'],
  ['Git LFS pointer', 'version https://git-lfs'],
  ['Parquet', 'PAR1'],
]

const HEVC = /hei[csxm]|hev[cx]/
/** Files of boxes: `ftyp`, then the brands. */
function ofBrands(b: Uint8Array): string | null {
  if (text(b, 4, 8) !== 'ftyp') return null
  const size = Math.min(new DataView(b.buffer, b.byteOffset).getUint32(0), 256, b.length)
  const major = text(b, 8, 12)
  const brands = `${major} ${text(b, 16, size)}`
  if (major === 'avis') return 'AVIF sequence'
  if (brands.includes('avif')) return 'AVIF'
  if (HEVC.test(brands)) return 'HEIC (HEVC)'
  if (/mif1|msf1|heif/.test(brands)) return 'HEIF'
  return major.startsWith('crx') ? 'CR3' : 'MP4 or QuickTime video'
}

/** Text that is taken for a picture where a download failed. */
function ofText(b: Uint8Array): string | null {
  const start = text(b, 0, 1024)
    .replace(/^\xef\xbb\xbf/, '')
    .trimStart()
  if (/^<svg[\s>]|^<(\?xml|!--|!DOCTYPE svg)[\s\S]*<svg[\s>]/i.test(start)) return 'SVG'
  if (/^<(!doctype html|html|head|body)/i.test(start)) return 'HTML page'
  if (start.startsWith('<?xml')) return 'XML'
  return /^[[{]/.test(start) ? 'JSON' : null
}

/** The format of a file by its first bytes, read or not; null when they say nothing. */
export function formatOf(b: Uint8Array): string | null {
  const start = text(b, 0, 16)
  // at the end: what it begins with looks like other formats
  if (text(b, b.length - 18, b.length - 2) === 'TRUEVISION-XFILE') return 'TGA'
  if (start.startsWith('\x89PNG\r\n\x1a\n')) return 'PNG'
  if (start.startsWith('\xff\xd8\xff')) return 'JPEG'
  if (/^GIF8[79]a/.test(start)) return 'GIF'
  if (/^(II[*+]\0|MM\0[*+])/.test(start)) return 'TIFF'
  if (/^RIFF[\s\S]{4}WEBP/.test(start)) return 'WebP'
  // two letters are few: the size of the header that follows has to be one of those there are
  if (start.startsWith('BM') && b.length >= 18 && [12, 40, 52, 56, 64, 108, 124].includes(b[14])) return 'BMP'
  if (/^P[1-6][ \t\n\v\f\r]/.test(start)) return 'PNM'
  const other = OTHERS.find(([, magic, at = 0]) => text(b, at, at + magic.length) === magic)
  if (other) return other[0]
  return ofBrands(b) ?? ofText(b)
}

/** The format, if it is one that is read. @throws AlignGPTError ERR_IMAGE with its name if it is not */
export function readableFormat(b: Uint8Array, name: string): Format {
  if (b.length === 0) throw badImage(name, 'a picture', 'an empty file')
  const format = formatOf(b)
  if (format === null || !FORMATS.includes(format as Format))
    throw badImage(name, `a picture that can be decoded (${FORMATS.join(', ')})`, format ?? 'an unknown format')
  return format as Format
}

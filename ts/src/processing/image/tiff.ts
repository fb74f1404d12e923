/**
 * What the first directory of a TIFF says, and whether that is a kind whose pixels are known to be Pillow's. The pixels
 * themselves are libtiff's, which both use.
 */
import { damaged, type Header, unreadable } from './format.js'

/** Bytes of one value, by type. */
const SIZES: Record<number, number> = { 1: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8 }
// more than any list that is looked at here
const MAX_VALUES = 64

const WIDTH = 256
const HEIGHT = 257
const BITS = 258
const COMPRESSION = 259
const PHOTOMETRIC = 262
const FILL_ORDER = 266
const ORIENTATION = 274
const SAMPLES = 277
const PLANAR = 284
const COLOUR_MAP = 320
const EXTRA = 338
const SAMPLE_FORMAT = 339

/** Integers of the first directory by tag; of long lists the first values. */
function firstDirectory(b: Uint8Array): { tags: Map<number, number[]>; little: boolean } {
  const view = new DataView(b.buffer, b.byteOffset, b.byteLength)
  const little = b[0] === 0x49
  const u16 = (at: number): number => view.getUint16(at, little)
  const u32 = (at: number): number => view.getUint32(at, little)
  const u64 = (at: number): number => Number(view.getBigUint64(at, little))
  const big = u16(2) === 43
  if (big && !little) throw unreadable('a big-endian BigTIFF')
  const at = big ? u64(8) : u32(4)
  const count = big ? u64(at) : u16(at)
  const tags = new Map<number, number[]>()
  for (let k = 0, e = at + (big ? 8 : 2); k < count; k++, e += big ? 20 : 12) {
    const [tag, type] = [u16(e), u16(e + 2)]
    const size = SIZES[type]
    if (!size) continue
    const n = big ? u64(e + 4) : u32(e + 4)
    const field = e + (big ? 12 : 8)
    const start = n * size <= (big ? 8 : 4) ? field : big ? u64(field) : u32(field)
    const value = (i: number): number => {
      const p = start + i * size
      return size === 1 ? view.getUint8(p) : size === 2 ? u16(p) : size === 4 ? u32(p) : u64(p)
    }
    tags.set(
      tag,
      Array.from({ length: Math.min(n, MAX_VALUES) }, (_, i) => value(i)),
    )
  }
  return { tags, little }
}

const UNCOMPRESSED = 1
const JPEG = 7
const READ = [UNCOMPRESSED, 2, 3, 4, 5, JPEG, 8, 32773, 32946]
const COMPRESSIONS: Record<number, string> = {
  6: 'old JPEG',
  9: 'JBIG',
  32809: 'ThunderScan',
  34676: 'SGILog',
  34677: 'SGILog',
  34712: 'JPEG 2000',
  34887: 'LERC',
  34892: 'lossy DNG',
  34925: 'LZMA',
  50000: 'Zstandard',
  50001: 'WebP',
  50002: 'JPEG XL',
  52546: 'JPEG XL',
}
const PHOTOMETRICS: Record<number, string> = {
  ...{ 0: 'grey', 1: 'grey', 2: 'RGB', 3: 'palette', 4: 'mask', 5: 'CMYK', 6: 'YCbCr', 8: 'CIELab' },
  ...{ 9: 'ICCLab', 10: 'ITULab', 32803: 'camera raw', 32844: 'LogL', 32845: 'LogLuv', 34892: 'linear raw' },
}

/** How the samples of a directory become RGB. */
export interface TiffHeader extends Header {
  /** sample format 1: unsigned, 2: signed, 3: float */
  sampleFormat: number
  bits: number
  alpha: boolean
  /** the library would invert these, and Pillow does not */
  keepWhiteIsZero: boolean
}

/** Colours and samples that Pillow knows (its OPEN_INFO) and that come out alike. */
function isRead(o: {
  photometric: number
  bits: number
  samples: number
  extra: number[]
  format: number
  fill: number
  little: boolean
  compression: number
}): boolean {
  const { photometric, bits, samples, extra, format, fill, little } = o
  const unspecified = extra.slice(1).every((e) => e === 0)
  if (fill !== 1 && (samples > 3 || bits > 8)) return false
  switch (photometric) {
    case 0:
    case 1:
      if (samples === 2) return photometric === 1 && bits === 8 && format === 1 && extra.join() === '2' && fill === 1
      if (samples !== 1 || extra.length) return false
      if (bits === 32) return format === 3 || (photometric === 1 && (format === 2 || little))
      if (bits === 16) return format === 1 ? photometric === 1 || little : format === 2 && photometric === 1
      if (format === 2) return bits === 8 && photometric === 1 && fill === 1
      return format === 1 && [1, 2, 4, 8].includes(bits)
    case 2:
      if (format !== 1 || samples < 3 || extra[0] === 1) return false
      if (bits === 16) return samples === 3 + extra.length ? samples <= 4 : samples === 4 && !extra.length
      if (bits !== 8 || samples > 6) return false
      if (samples === 3 + extra.length) return unspecified && (samples === 3 || [0, 2, 999].includes(extra[0]))
      return samples === 4 && !extra.length
    case 3:
      if (format !== 1) return false
      if (samples === 1) return extra.length === 0 && [1, 2, 4, 8].includes(bits)
      return false
    case 5:
      if (format !== 1 || samples !== 4 + extra.length) return false
      return bits === 8 ? samples <= 6 && extra.every((e) => e === 0) : bits === 16 && samples === 4
    case 6:
      // elsewhere Pillow reads them with other sizes than they have
      return o.compression === JPEG && bits === 8 && samples === 3 && format === 1
    default:
      return false
  }
}

/** The header of a TIFF that is read. @throws with the kind of the others */
export function tiffHeader(b: Uint8Array): TiffHeader {
  const { tags, little } = firstDirectory(b)
  const one = (tag: number, otherwise: number): number => tags.get(tag)?.[0] ?? otherwise
  const [width, height] = [one(WIDTH, 0), one(HEIGHT, 0)]
  if (!width || !height) throw damaged('TIFF')
  const compression = one(COMPRESSION, UNCOMPRESSED)
  if (!READ.includes(compression))
    throw unreadable(`a TIFF with ${COMPRESSIONS[compression] ?? `unknown (${compression})`} compression`)
  const photometric = one(PHOTOMETRIC, 0)
  const samples = one(SAMPLES, 1)
  const all = tags.get(BITS) ?? [1]
  const bits = all[0]
  const formats = tags.get(SAMPLE_FORMAT) ?? [1]
  const format = formats[0]
  const extra = tags.get(EXTRA) ?? []
  const planar = one(PLANAR, 1)
  const orientation = one(ORIENTATION, 1)
  const fill = one(FILL_ORDER, 1)
  const alike = all.every((n) => n === bits) && formats.every((f) => f === format)
  // of 16-bit planes Pillow reads the bytes of another order; of unused planes it makes other modes
  const planes = planar === 1 || (bits === 8 && extra.length === 0 && (photometric !== 6 || compression !== JPEG))
  const narrowMap = photometric === 3 && !(tags.get(COLOUR_MAP)?.length ?? 0)
  if (
    !alike ||
    !planes ||
    narrowMap ||
    !isRead({ photometric, bits, samples, extra, format, fill, little, compression })
  ) {
    const kind = PHOTOMETRICS[photometric] ?? `photometric ${photometric}`
    const type = ['', '', ' signed', ' float'][format] ?? ''
    const more = extra.length ? ` (extra ${extra.join(' ')})` : ''
    throw unreadable(`a TIFF of ${kind}, ${samples} x ${bits} bits${type}${more}${planar === 2 ? ', in planes' : ''}`)
  }
  if (orientation > 8) throw unreadable(`a TIFF with orientation ${orientation}`)
  return {
    ...{ width, height, orientation, bits, sampleFormat: format },
    alpha: samples === 2 || (photometric === 2 && samples > 3 && extra[0] !== 0),
    keepWhiteIsZero: photometric === 0 && bits >= 16,
  }
}

/** Windows and OS/2 bitmaps as Pillow reads them: 1, 4, 8, 16, 24 and 32 bits, RLE4, RLE8 and the usual bit fields. */
import { greyToRgb, paletteToRgb, unpackBits } from './colours.js'
import { damaged, type Header, type RgbImage, unreadable } from './format.js'

const RAW = 0
const RLE8 = 1
const RLE4 = 2
const BITFIELDS = 3

/** Position of red, green, blue and alpha in a pixel of 32 bits by the masks that Pillow knows; alpha -1: none. */
const ORDERS: Record<string, readonly [number, number, number, number]> = {
  'ff0000 ff00 ff 0': [2, 1, 0, -1],
  'ff000000 ff0000 ff00 0': [3, 2, 1, -1],
  'ff000000 ff00 ff 0': [3, 1, 0, -1],
  'ff000000 ff0000 ff00 ff': [3, 2, 1, 0],
  'ff ff00 ff0000 ff000000': [0, 1, 2, 3],
  'ff0000 ff00 ff ff000000': [2, 1, 0, 3],
  'ff000000 ff00 ff ff0000': [3, 1, 0, 2],
  '0 0 0 0': [2, 1, 0, 3],
}
const BGR: readonly [number, number, number, number] = [2, 1, 0, -1]

interface Bitmap extends Header {
  bits: number
  compression: number
  /** rows from the top */
  down: boolean
  /** r, g, b, a */
  masks: number[]
  /** colours of the palette, and bytes of each */
  colours: number
  entry: number
  /** where the palette and the pixels begin */
  paletteAt: number
  pixelsAt: number
}

function readHeader(b: Uint8Array): Bitmap {
  const view = new DataView(b.buffer, b.byteOffset, b.byteLength)
  const size = view.getUint32(14, true)
  if (b.length < 14 + size) throw damaged('BMP')
  const u16 = (at: number): number => view.getUint16(14 + at, true)
  const u32 = (at: number): number => view.getUint32(14 + at, true)
  const old = size === 12
  const down = !old && b[14 + 11] === 0xff
  const height = old ? u16(6) : u32(8)
  const bits = u16(old ? 10 : 14)
  const compression = old ? RAW : u32(16)
  let paletteAt = 14 + size
  let masks = [0, 0, 0, 0]
  if (compression === BITFIELDS) {
    // a header of 40 bytes has the masks behind it
    const at = size >= 52 ? 40 : size
    if (14 + at + 12 > b.length) throw damaged('BMP')
    masks = [u32(at), u32(at + 4), u32(at + 8), size >= 56 ? u32(at + 12) : 0]
    if (size < 52) paletteAt += 12
  }
  const entry = old ? 3 : 4
  const colours = (old ? 0 : u32(32)) || 1 << bits
  let pixelsAt = view.getUint32(10, true)
  // Some writers forget the palette when they say where the pixels are.
  if (pixelsAt === 14 + size && bits <= 8) pixelsAt += entry * colours
  return {
    ...{ bits, compression, down, masks, colours, entry, paletteAt, orientation: 1 },
    pixelsAt: pixelsAt || paletteAt + (bits <= 8 ? entry * colours : 0),
    width: old ? u16(4) : u32(4),
    height: down ? 2 ** 32 - height : height,
  }
}

/** Header of a bitmap that Pillow reads. @throws for kinds that it does not */
export function bmpHeader(b: Uint8Array): Bitmap {
  const h = readHeader(b)
  if (![1, 4, 8, 16, 24, 32].includes(h.bits)) throw unreadable(`a BMP of ${h.bits} bits`)
  if (h.compression > BITFIELDS) throw unreadable(`a BMP of compression ${h.compression}`)
  if (h.bits <= 8 && h.colours > 65536) throw unreadable(`a BMP with a palette of ${h.colours}`)
  const rle = h.compression === RLE8 || h.compression === RLE4
  if (rle && h.bits > 8) throw unreadable(`a BMP of ${h.bits} bits with run lengths`)
  if (h.compression === BITFIELDS && !masksKnown(h))
    throw unreadable(`a BMP with bit fields ${h.masks.map((m) => m.toString(16)).join(' ')}`)
  return h
}

const key = (masks: number[]): string => masks.map((m) => m.toString(16)).join(' ')
function masksKnown({ bits, masks }: Bitmap): boolean {
  if (bits === 32) return key(masks) in ORDERS
  const rgb = key(masks.slice(0, 3))
  return bits === 24 ? rgb === 'ff0000 ff00 ff' : bits === 16 && (rgb === 'f800 7e0 1f' || rgb === '7c00 3e0 1f')
}

/** Indices of a run-length encoded bitmap, in the order of the file. */
function runs(b: Uint8Array, h: Bitmap): Uint8Array {
  const { width, height } = h
  const out = new Uint8Array(width * height)
  const four = h.compression === RLE4
  let [at, d, x] = [h.pixelsAt, 0, 0]
  const put = (v: number): void => {
    if (d < out.length) out[d] = v
    d++
  }
  while (d < out.length && at + 1 < b.length) {
    const [n, v] = [b[at], b[at + 1]]
    at += 2
    if (n > 0) {
      const room = Math.max(0, Math.min(n, width - x))
      for (let i = 0; i < room; i++) put(four ? (i % 2 === 0 ? v >> 4 : v & 15) : v)
      x += room
    } else if (v === 0) {
      d = Math.ceil(d / width) * width
      x = 0
    } else if (v === 1) break
    else if (v === 2) {
      if (at + 2 > b.length) break
      d += b[at] + b[at + 1] * width
      at += 2
      x = d % width
    } else {
      const bytes = four ? v >> 1 : v
      if (at + bytes > b.length) break
      for (let i = 0; i < bytes; i++) {
        if (!four) put(b[at + i])
        else {
          put(b[at + i] >> 4)
          put(b[at + i] & 15)
        }
      }
      x += v
      at += bytes
      at += at & 1
    }
  }
  if (d < out.length) throw damaged('BMP')
  return out
}

/** Each row of a bitmap without run lengths, from the top. */
function* rowsOf(b: Uint8Array, h: Bitmap): Generator<[number, Uint8Array]> {
  const used = Math.ceil((h.width * h.bits) / 8)
  const stride = Math.floor((h.width * h.bits + 31) / 32) * 4
  if (h.pixelsAt + stride * (h.height - 1) + used > b.length) throw damaged('BMP')
  for (let y = 0; y < h.height; y++) {
    const at = h.pixelsAt + stride * (h.down ? y : h.height - 1 - y)
    yield [y, b.subarray(at, at + used)]
  }
}

/** Pixels of up to 8 bits: palette, or grey where the palette is a ramp. */
function decodeIndexed(b: Uint8Array, h: Bitmap): Uint8Array {
  const { width, height, colours, entry } = h
  const indices = new Uint8Array(width * height)
  if (h.compression === RAW) for (const [y, row] of rowsOf(b, h)) indices.set(unpackBits(row, h.bits, width), y * width)
  else {
    const all = runs(b, h)
    for (let y = 0; y < height; y++)
      indices.set(all.subarray(y * width, (y + 1) * width), (h.down ? y : height - 1 - y) * width)
  }
  const palette = new Uint8Array(3 * Math.min(colours, 256))
  const there = b.subarray(h.paletteAt, h.paletteAt + entry * colours)
  for (let i = 0; i < palette.length / 3 && entry * i + 3 <= there.length; i++)
    for (let c = 0; c < 3; c++) palette[3 * i + c] = there[entry * i + 2 - c]
  const grey = (i: number): number => (colours === 2 ? 255 * i : i)
  const ramp = colours <= 256 && palette.every((v, i) => v === grey(Math.trunc(i / 3)))
  if (!ramp) return paletteToRgb(indices, palette)
  return greyToRgb(colours === 2 ? indices.map((v) => 255 * v) : indices)
}

/** Pixels of 16 bits: 5, 5, 5 or 5, 6, 5. */
function decode16(b: Uint8Array, h: Bitmap, out: Uint8Array): void {
  const green = h.masks[0] === 0xf800 ? 63 : 31
  const red = green === 63 ? 11 : 10
  for (const [y, row] of rowsOf(b, h))
    for (let x = 0, d = 3 * y * h.width; x < h.width; x++, d += 3) {
      const v = row[2 * x] | (row[2 * x + 1] << 8)
      out[d] = (((v >> red) & 31) * 255) / 31
      out[d + 1] = (((v >> 5) & green) * 255) / green
      out[d + 2] = ((v & 31) * 255) / 31
    }
}

/** Decodes a bitmap; `alpha`: also its alpha, where Pillow finds one. */
export function decodeBmp(b: Uint8Array, alpha: boolean): RgbImage {
  const h = bmpHeader(b)
  const { width, height, bits } = h
  if (bits <= 8) return { data: decodeIndexed(b, h), width, height }
  const data = new Uint8Array(3 * width * height)
  if (bits === 16) decode16(b, h, data)
  if (bits === 16) return { data, width, height }
  const [r, g, bl, a] = bits === 32 && h.compression === BITFIELDS ? ORDERS[key(h.masks)] : BGR
  const out: RgbImage = { data, width, height }
  if (alpha && a >= 0) out.alpha = new Uint8Array(width * height)
  for (const [y, row] of rowsOf(b, h))
    for (let x = 0, s = 0, d = y * width; x < width; x++, s += bits / 8, d++) {
      data[3 * d] = row[s + r]
      data[3 * d + 1] = row[s + g]
      data[3 * d + 2] = row[s + bl]
      if (out.alpha) out.alpha[d] = row[s + a]
    }
  return out
}

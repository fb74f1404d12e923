/**
 * First frame of a GIF as Pillow has it: on the whole screen, what the frame leaves free has the transparent colour, or colour 0;
 * transparent pixels keep their colour of the palette.
 */
import { greyToRgb, paletteToRgb } from './colours.js'
import { damaged, type Header, type RgbImage } from './format.js'

const LARGEST_CODE = 4096

/** What stands before the pixels of the first frame. */
interface Frame extends Header {
  left: number
  top: number
  frameWidth: number
  frameHeight: number
  interlaced: boolean
  /** RGB triples; null where index and grey are the same */
  palette: Uint8Array | null
  transparent: number | null
  /** where the minimal code size stands */
  at: number
}

/** A part of the file. @throws when it ends before */
function part(b: Uint8Array, at: number, bytes: number): Uint8Array {
  if (at + bytes > b.length) throw damaged('GIF')
  return b.subarray(at, at + bytes)
}

/** Pillow takes a palette whose colours are their index, grey, for none. */
const isRamp = (p: Uint8Array): boolean => p.every((v, i) => v === Math.trunc(i / 3))

/** Position behind a chain of blocks. */
function skipBlocks(b: Uint8Array, from: number): number {
  let at = from
  for (let n = part(b, at, 1)[0]; n > 0; n = part(b, at, 1)[0]) at += 1 + n
  return at + 1
}

function readFrame(b: Uint8Array): Frame {
  const view = new DataView(b.buffer, b.byteOffset, b.byteLength)
  const u16 = (at: number): number => view.getUint16(at, true)
  const screen = part(b, 0, 13)
  let at = 13
  let palette: Uint8Array | null = null
  const readPalette = (flags: number): Uint8Array => {
    const p = part(b, at, 3 << ((flags & 7) + 1))
    at += p.length
    return p
  }
  if (screen[10] & 128) palette = readPalette(screen[10])
  let transparent: number | null = null
  for (;;) {
    const kind = part(b, at, 1)[0]
    if (kind === 0x21) {
      const control = part(b, at, 3)
      if (control[1] === 0xf9 && control[2] >= 4) {
        const body = part(b, at + 3, 4)
        if (body[0] & 1) transparent = body[3]
      }
      at = skipBlocks(b, at + 2)
    } else if (kind === 0x2c) break
    else if (kind === 0x3b) throw damaged('GIF')
    else at++
  }
  const flags = part(b, at, 10)[9]
  const [left, top, frameWidth, frameHeight] = [u16(at + 1), u16(at + 3), u16(at + 5), u16(at + 7)]
  at += 10
  if (flags & 128) palette = readPalette(flags)
  part(b, at, 1)
  return {
    ...{ left, top, frameWidth, frameHeight, transparent, at, orientation: 1 },
    width: Math.max(u16(6), left + frameWidth),
    height: Math.max(u16(8), top + frameHeight),
    interlaced: (flags & 64) !== 0,
    palette: palette && !isRamp(palette) ? palette : null,
  }
}

/** Codes of a chain of blocks, and where a code ends, as GIF's variant of LZW writes them. */
class Codes {
  #at: number
  #left = 0
  #buffer = 0
  #count = 0
  constructor(
    private readonly b: Uint8Array,
    at: number,
  ) {
    this.#at = at
  }
  /** The next `size` bits. @throws at the end of the file or of the blocks */
  next(size: number): number {
    while (this.#count < size) {
      if (this.#left === 0) {
        this.#left = this.b[this.#at++] ?? 0
        if (this.#left === 0 || this.#at + this.#left > this.b.length) throw damaged('GIF')
      }
      this.#buffer |= this.b[this.#at++] << this.#count
      this.#left--
      this.#count += 8
    }
    const code = this.#buffer & ((1 << size) - 1)
    this.#buffer >>>= size
    this.#count -= size
    return code
  }
}

/** `count` indices. @throws when there are fewer, or a code that cannot be */
function decodeLzw(b: Uint8Array, at: number, count: number): Uint8Array {
  const bits = b[at]
  if (bits > 11 || bits < 1) throw damaged('GIF')
  const codes = new Codes(b, at + 1)
  const [clear, end] = [1 << bits, (1 << bits) + 1]
  const out = new Uint8Array(count)
  // of each code: the code before its last index, that index, and how many it stands for
  const before = new Uint16Array(LARGEST_CODE)
  const last = new Uint8Array(LARGEST_CODE)
  const length = new Uint16Array(LARGEST_CODE)
  for (let i = 0; i < clear; i++) [last[i], length[i]] = [i, 1]
  let [next, size, previous, first] = [clear + 2, bits + 1, -1, 0]
  for (let d = 0; d < count; ) {
    const code = codes.next(size)
    if (code === clear) {
      ;[next, size, previous] = [clear + 2, bits + 1, -1]
      continue
    }
    if (code === end || code > next || (previous < 0 && code > clear)) throw damaged('GIF')
    // a code that is being made just now stands for the one before and its own first index
    const whole = code === next && previous >= 0 ? previous : code
    const n = length[whole] + (whole === code ? 0 : 1)
    let c = whole
    for (let i = d + length[whole] - 1; i >= d; i--) {
      if (i < count) out[i] = last[c]
      first = last[c]
      c = before[c]
    }
    if (whole !== code && d + n - 1 < count) out[d + n - 1] = first
    d += n
    if (previous >= 0 && next < LARGEST_CODE) {
      before[next] = previous
      last[next] = first
      length[next] = length[previous] + 1
      if (next === (1 << size) - 1 && size < 12) size++
      next++
    }
    previous = code
  }
  return out
}

/** Rows in the order in which an interlaced frame has them. */
function* interlacedRows(height: number): Generator<number> {
  for (const [first, step] of [
    [0, 8],
    [4, 8],
    [2, 4],
    [1, 2],
  ])
    for (let y = first; y < height; y += step) yield y
}

export const gifHeader = (b: Uint8Array): Header => readFrame(b)

/** Decodes the first frame; `alpha`: 0 where it is transparent. */
export function decodeGif(b: Uint8Array, alpha: boolean): RgbImage {
  const f = readFrame(b)
  const { width, height, frameWidth: w, transparent } = f
  const indices = new Uint8Array(width * height).fill(transparent ?? 0)
  const pixels = decodeLzw(b, f.at, w * f.frameHeight)
  const rows = f.interlaced ? interlacedRows(f.frameHeight) : Array.from({ length: f.frameHeight }, (_, y) => y)
  let s = 0
  for (const y of rows) {
    indices.set(pixels.subarray(s, s + w), (f.top + y) * width + f.left)
    s += w
  }
  const data = f.palette ? paletteToRgb(indices, f.palette) : greyToRgb(indices)
  if (!alpha || transparent === null) return { data, width, height }
  return { data, width, height, alpha: indices.map((v) => (v === transparent ? 0 : 255)) }
}

/** PBM, PGM and PPM, plain and raw, as Pillow reads them. */
import { greyToRgb, unpackBits } from './colours.js'
import { damaged, type Header, type RgbImage } from './format.js'

interface Pnm extends Header {
  /** the digit behind the P */
  kind: number
  largest: number
  /** where the samples begin */
  at: number
}

const isSpace = (c: number): boolean => c === 32 || (c >= 9 && c <= 13)
const HASH = 35

/** A number of at most ten digits at or behind `from`, and the position behind the one space that follows. */
function token(b: Uint8Array, from: number): [number, number] {
  let at = from
  let digits = ''
  for (; at < b.length; at++) {
    if (b[at] === HASH) while (at < b.length && b[at] !== 10 && b[at] !== 13) at++
    else if (!isSpace(b[at])) digits += String.fromCharCode(b[at])
    else if (digits) break
    if (digits.length > 10) throw damaged('PNM')
  }
  if (!/^\d+$/.test(digits)) throw damaged('PNM')
  return [Number(digits), at + 1]
}

/** Size and kind. */
export function pnmHeader(b: Uint8Array): Pnm {
  const kind = b[1] - 48
  const [width, next] = token(b, 3)
  const [height, then] = token(b, next)
  const [largest, at] = kind === 1 || kind === 4 ? [1, then] : token(b, then)
  if (largest < 1 || largest > 65535) throw damaged('PNM')
  return { kind, width, height, largest, at, orientation: 1 }
}

/** To the nearest, halves to the even one, as Python rounds. */
function round(v: number): number {
  const low = Math.floor(v)
  const over = v - low
  return over > 0.5 || (over === 0.5 && low % 2 === 1) ? low + 1 : low
}

/** What a sample becomes. Grey of 16 bits is clipped, as of other formats. */
function scaled(h: Pnm): (v: number) => number {
  const { largest } = h
  if (largest === 255) return (v) => v
  const wide = largest > 255 && (h.kind === 2 || h.kind === 5)
  return (v) => Math.min(255, round((v / largest) * (wide ? 65535 : 255)))
}

/** The numbers of a plain file. */
function plainSamples(b: Uint8Array, h: Pnm, count: number): Uint8Array {
  const out = new Uint8Array(count)
  const to = scaled(h)
  let at = h.at
  for (let i = 0; i < count; i++) {
    if (h.kind === 1) {
      // digits of a bitmap need no space between them
      for (; isSpace(b[at]) || b[at] === HASH; at++)
        if (b[at] === HASH) while (at < b.length && b[at] !== 10 && b[at] !== 13) at++
      if (b[at] !== 48 && b[at] !== 49) throw damaged('PNM')
      out[i] = b[at++] === 48 ? 255 : 0
    } else {
      const [v, next] = token(b, at)
      if (v > h.largest) throw damaged('PNM')
      out[i] = to(v)
      at = next
    }
  }
  return out
}

/** The bytes of a raw file. */
function rawSamples(b: Uint8Array, h: Pnm, count: number): Uint8Array {
  const out = new Uint8Array(count)
  if (h.kind === 4) {
    const stride = Math.ceil(h.width / 8)
    if (h.at + stride * h.height > b.length) throw damaged('PNM')
    for (let y = 0; y < h.height; y++) {
      const row = b.subarray(h.at + y * stride, h.at + (y + 1) * stride)
      out.set(unpackBits(row, 1, h.width), y * h.width)
    }
    return out.map((v) => (v ? 0 : 255))
  }
  const bytes = h.largest > 255 ? 2 : 1
  if (h.at + bytes * count > b.length) throw damaged('PNM')
  const to = scaled(h)
  for (let i = 0, s = h.at; i < count; i++, s += bytes) out[i] = to(bytes === 1 ? b[s] : (b[s] << 8) | b[s + 1])
  return out
}

export function decodePnm(b: Uint8Array): RgbImage {
  const h = pnmHeader(b)
  const colour = h.kind === 3 || h.kind === 6
  const count = h.width * h.height * (colour ? 3 : 1)
  const samples = h.kind < 4 ? plainSamples(b, h, count) : rawSamples(b, h, count)
  return { data: colour ? samples : greyToRgb(samples), width: h.width, height: h.height }
}

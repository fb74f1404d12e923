/** What the headers of PNG, JPEG, WebP and AVIF must say before libvips decodes them. */
import { crc32 } from 'node:zlib'
import { damaged, unreadable } from './format.js'

const viewOf = (b: Uint8Array): DataView => new DataView(b.buffer, b.byteOffset, b.byteLength)

const [BITS, COLOUR] = [24, 25]
/** Pillow clips grey of 16 bits, and takes the high byte of grey with alpha; a transparent colour is not alpha for it. */
export const isDeepGreyPng = (b: Uint8Array): boolean => b[BITS] === 16 && b[COLOUR] === 0

/** Checks the chunks in front of the pixels, each by its sum, as Pillow does. */
export function checkPng(b: Uint8Array): void {
  const view = viewOf(b)
  for (let at = 8; at + 12 <= b.length; ) {
    const n = view.getUint32(at)
    const kind = Buffer.from(b.subarray(at + 4, at + 8)).toString('latin1')
    // what is behind the part of the file that was read is left to the library
    if (kind === 'IDAT' || at + 12 + n > b.length) return
    if (crc32(b.subarray(at + 4, at + 8 + n)) !== view.getUint32(at + 8 + n)) throw damaged('PNG')
    at += 12 + n
  }
}

/** Frames: which coding the markers SOF0 to SOF15 mean. */
const CODINGS: Record<number, string> = { 3: 'lossless', 5: 'hierarchical', 6: 'hierarchical', 7: 'lossless' }

/** Finds the frame of a JPEG: 8 bits, 1, 3 or 4 components, sequential or progressive. */
export function checkJpeg(b: Uint8Array): void {
  const view = viewOf(b)
  for (let at = 2; at + 9 < b.length; ) {
    if (b[at] !== 0xff) throw damaged('JPEG')
    const marker = b[at + 1]
    // fill bytes, and markers without a length
    if (marker === 0xff) at++
    else if (marker === 1 || (marker >= 0xd0 && marker <= 0xd8)) at += 2
    else if (marker === 0xf7) throw unreadable('a JPEG-LS')
    else if (marker === 0xda || marker === 0xd9) throw damaged('JPEG')
    else if (marker >= 0xc0 && marker <= 0xcf && marker !== 0xc4 && marker !== 0xc8 && marker !== 0xcc) {
      const coding = CODINGS[marker & 7]
      if (coding) throw unreadable(`a ${coding} JPEG`)
      if (b[at + 4] !== 8) throw unreadable(`a JPEG of ${b[at + 4]} bits`)
      if (![1, 3, 4].includes(b[at + 9])) throw unreadable(`a JPEG of ${b[at + 9]} components`)
      return
    } else at += 2 + view.getUint16(at + 2)
  }
}

/** The content of each box of a kind in the part of the file that was read. */
function* boxes(b: Uint8Array, kind: string): Generator<Uint8Array> {
  const file = Buffer.from(b.buffer, b.byteOffset, b.length)
  for (let at = file.indexOf(kind); at >= 0; at = file.indexOf(kind, at + 4)) yield b.subarray(at + 4)
}

/** Tells the AVIF that libheif and Pillow's libavif decode alike: 8 bits, colour at full resolution or none. */
export function checkAvif(b: Uint8Array): void {
  for (const c of boxes(b, 'av1C')) {
    const [deep, grey, across, down] = [c[2] & 0x40, c[2] & 0x10, c[2] & 8, c[2] & 4]
    if (deep) throw unreadable('an AVIF of more than 8 bits')
    if (!grey && (across || down)) throw unreadable(`an AVIF with colour ${down ? '4:2:0' : '4:2:2'}`)
  }
  for (const kind of ['irot', 'imir', 'clap', 'grid'])
    for (const _ of boxes(b, kind)) throw unreadable(`an AVIF that is turned, cut or put together (${kind})`)
}

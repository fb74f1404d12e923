/**
 * Tar files without unpacking: where each member lies. POSIX ustar, with long names of GNU and pax; nothing of a tar is
 * ever written to a path that it names. Format: POSIX.1-2001 pax, "ustar Interchange Format".
 */
import fs from 'node:fs'
import path from 'node:path'
import { type AlignGPTError, mismatch } from '../util/errors.js'

const BLOCK = 512
// A name or a pax header longer than this is not one.
const MAX_EXTENSION = 1 << 20

/** What a tar holds under a name. */
export interface TarEntry {
  /** normal: see memberName */
  name: string
  /** first byte of its content in the tar */
  offset: number
  bytes: number
  /** first byte of its headers */
  start: number
  /** name of the member that a link leads to; null: it leads out of the tar */
  link?: string | null
  /** what it is when it is neither a regular file nor a link */
  other?: string
}

/** A regular file in a tar. */
export type TarMember = Pick<TarEntry, 'name' | 'offset' | 'bytes'>

/** A name as tar would unpack it: without `.`, doubled and leading slashes, `a/..` inside taken away. */
export const memberName = (name: string): string => path.posix.normalize(name).replace(/^\/+|(?<=.)\/$/g, '')

/** Types of a header that are not files or links. */
const OTHERS: Record<string, string> = {
  3: 'a device',
  4: 'a device',
  5: 'a folder',
  6: 'a pipe',
  D: 'a folder',
  S: 'a sparse file',
  M: 'a file that goes on in another tar',
}

const bad = (file: string, at: number, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'tar', `${file} at byte ${at}`, expected, got)

/** Reads `b.length` bytes at `at`; fewer only at the end of the file. */
function readAt(fd: number, b: Buffer, at: number): number {
  let done = 0
  while (done < b.length) {
    const n = fs.readSync(fd, b, done, b.length - done, at + done)
    if (n === 0) break
    done += n
  }
  return done
}

/** Text of a field, up to its first 0. */
function text(b: Buffer, from: number, length: number): string {
  const field = b.subarray(from, from + length)
  const end = field.indexOf(0)
  return field.toString('utf8', 0, end < 0 ? length : end)
}

/** A number: octal digits, or base 256 (GNU) when the top bit is set. NaN when it is neither. */
function number(b: Buffer, from: number, length: number): number {
  if (b[from] & 0x80) {
    let n = b[from] & 0x7f
    for (let i = 1; i < length; i++) n = n * 256 + b[from + i]
    return n
  }
  const digits = text(b, from, length).trim()
  return /^[0-7]*$/.test(digits) ? Number.parseInt(digits || '0', 8) : Number.NaN
}

/** The checksum counts its own field as spaces. */
function checksumFits(b: Buffer): boolean {
  let sum = 8 * 32
  for (let i = 0; i < BLOCK; i++) if (i < 148 || i >= 156) sum += b[i]
  return sum === number(b, 148, 8)
}

/** What extended headers say about the next member. */
interface Extra {
  path?: string
  size?: string
  linkpath?: string
  sparse?: true
}

/** Records `length key=value\n` of a pax header. */
function paxValues(b: Buffer): Extra {
  const out: Extra = {}
  for (let at = 0; at < b.length; ) {
    const space = b.indexOf(32, at)
    const length = space < 0 ? Number.NaN : Number(b.toString('latin1', at, space))
    if (!(length > space - at && at + length <= b.length)) throw new Error('a broken pax record')
    const record = b.toString('utf8', space + 1, at + length - 1)
    const equals = record.indexOf('=')
    const key = record.slice(0, equals)
    if (key === 'path' || key === 'size' || key === 'linkpath') out[key] = record.slice(equals + 1)
    if (key.startsWith('GNU.sparse.')) out.sparse = true
    at += length
  }
  return out
}

interface Header {
  name: string
  bytes: number
  type: string
  link: string
}

/** A header block as name, size, type and what a link leads to. */
function parseHeader(b: Buffer, file: string, at: number): Header {
  if (!checksumFits(b)) throw bad(file, at, 'the header of an uncompressed tar', 'a wrong checksum')
  const bytes = number(b, 124, 12)
  if (!Number.isSafeInteger(bytes)) throw bad(file, at, 'the size of a member', 'no number')
  // Only ustar has a prefix; old GNU tars keep other things there.
  const prefix = b.toString('latin1', 257, 263) === 'ustar\0' ? text(b, 345, 155) : ''
  const name = text(b, 0, 100)
  return {
    name: prefix ? `${prefix}/${name}` : name,
    bytes,
    type: String.fromCharCode(b[156]),
    link: text(b, 157, 100),
  }
}

/** Where a link leads: a symbolic one from its own folder, a hard one from the top. */
function linkTarget(name: string, target: string, symbolic: boolean): string | null {
  if (symbolic && target.startsWith('/')) return null
  const full = memberName(symbolic ? path.posix.join(path.posix.dirname(name), target) : target)
  return full === '..' || full.startsWith('../') ? null : full
}

/** The entry of a header and what extended headers before it said. */
function entryOf(h: Header, extra: Extra, at: Pick<TarEntry, 'offset' | 'bytes' | 'start'>): TarEntry {
  const own = extra.path ?? h.name
  const entry: TarEntry = { name: memberName(own), ...at }
  const file = h.type === '0' || h.type === '\0' || h.type === '7'
  if (h.type === '1' || h.type === '2') entry.link = linkTarget(entry.name, extra.linkpath ?? h.link, h.type === '2')
  else if (extra.sparse) entry.other = OTHERS.S
  else if (file && own.endsWith('/')) entry.other = OTHERS[5]
  else if (!file) entry.other = OTHERS[h.type] ?? 'a member of an unknown type'
  return entry
}

/**
 * Everything in a tar, in order, without reading its content.
 * @param from first byte of the headers of an entry
 * @throws AlignGPTError ERR_DATA with the byte where it is no tar, or cut short
 */
export function* tarEntries(file: string, from = 0): Generator<TarEntry> {
  const fd = fs.openSync(file, 'r')
  try {
    const size = fs.fstatSync(fd).size
    const block = Buffer.alloc(BLOCK)
    let extra: Extra = {}
    let start = from
    for (let at = from; at < size; ) {
      if (readAt(fd, block, at) < BLOCK) throw bad(file, at, 'a header of 512 bytes', 'the end of the file')
      // A block of zeros ends the tar.
      if (block.every((x) => x === 0)) return
      const header = parseHeader(block, file, at)
      const { type } = header
      const bytes = extra.size !== undefined && !'xgLK'.includes(type) ? Number(extra.size) : header.bytes
      const offset = at + BLOCK
      if (!(bytes >= 0 && offset + bytes <= size))
        throw bad(file, at, `'${header.name}' of ${bytes} bytes`, `the end of the file at ${size}`)
      const next = offset + Math.ceil(bytes / BLOCK) * BLOCK
      if (type === 'x' || type === 'L' || type === 'K') {
        extra = { ...extra, ...readExtension(fd, file, offset, bytes, type) }
      } else if (type !== 'g' && type !== 'V') {
        yield entryOf(header, extra, { offset, bytes, start })
        extra = {}
        start = next
      } else if (Object.keys(extra).length === 0) start = next
      at = next
    }
  } finally {
    fs.closeSync(fd)
  }
}

/** Every regular file of a tar, in order. @throws as tarEntries */
export function* tarMembers(file: string): Generator<TarMember> {
  for (const { name, offset, bytes, link, other } of tarEntries(file))
    if (link === undefined && other === undefined) yield { name, offset, bytes }
}

/** What a pax ('x') or GNU long name ('L', 'K' of a link) block says about the next member. */
function readExtension(fd: number, file: string, offset: number, bytes: number, type: string): Extra {
  if (bytes > MAX_EXTENSION) throw bad(file, offset, `an extended header of at most ${MAX_EXTENSION} bytes`, `${bytes}`)
  const b = Buffer.alloc(bytes)
  readAt(fd, b, offset)
  if (type === 'L') return { path: text(b, 0, bytes) }
  if (type === 'K') return { linkpath: text(b, 0, bytes) }
  try {
    return paxValues(b)
  } catch (e) {
    throw bad(file, offset, 'a pax header', (e as Error).message)
  }
}

/** Writes a tar member after member; the names are plain files of at most 100 bytes. */
export class TarWriter {
  private at = 0
  constructor(private readonly fd: number) {}

  add(name: string, content: Uint8Array): void {
    const header = Buffer.alloc(BLOCK)
    header.write(name, 0, 100)
    header.write('0000644\0', 100)
    header.write('0000000\0', 108)
    header.write('0000000\0', 116)
    header.write(`${content.length.toString(8).padStart(11, '0')}\0`, 124)
    header.write('00000000000\0', 136)
    header.write('        0', 148)
    header.write('ustar\x0000', 257)
    let sum = 0
    for (const x of header) sum += x
    header.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148)
    this.write(header)
    this.write(content)
    const over = content.length % BLOCK
    if (over) this.write(Buffer.alloc(BLOCK - over))
  }
  /** Two blocks of zeros end a tar. */
  end(): void {
    this.write(Buffer.alloc(2 * BLOCK))
  }
  private write(b: Uint8Array): void {
    for (let done = 0; done < b.length; ) done += fs.writeSync(this.fd, b, done, b.length - done, this.at + done)
    this.at += b.length
  }
}

/**
 * Arrays computed from a large file, saved beside it so that the next start need not read it again: the index of a data
 * file, of a tar. What was saved is used only when size, modification time and a hash of the source's ends are the same.
 */
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import { mismatch } from '../util/errors.js'
import { writeAll, writeAtomic } from '../util/files.js'

/** Sources from this size on are worth a saved index; smaller ones are read in less than a second. */
export const WORTH_SAVING = 64 * 2 ** 20

const MAGIC = 'ALGNIDX2'
const ENDS = 64 * 1024
const TYPES = { f64: Float64Array, u32: Uint32Array, i32: Int32Array } as const
type Arrays = Record<string, Float64Array | Uint32Array | Int32Array>

/** Identity of a source file. */
export interface Stamp {
  size: number
  /** nanoseconds, as text */
  mtime: string
  /** sha256 of the first and the last 64 KiB */
  ends: string
}

interface Header {
  kind: string
  stamp: Stamp
  arrays: { name: string; type: keyof typeof TYPES; length: number }[]
  /** sha256 of all arrays */
  hash: string
}

/** Size, modification time and a hash of both ends of a file. @throws AlignGPTError ERR_DATA */
export function stampOf(file: string): Stamp {
  let fd: number
  try {
    fd = fs.openSync(file, 'r')
  } catch (e) {
    throw mismatch('ERR_DATA', 'data', file, 'a readable file', (e as NodeJS.ErrnoException).code ?? String(e), e)
  }
  try {
    const { size, mtimeNs } = fs.fstatSync(fd, { bigint: true })
    const hash = createHash('sha256')
    const b = Buffer.alloc(ENDS)
    hash.update(b.subarray(0, fs.readSync(fd, b, 0, ENDS, 0)))
    hash.update(b.subarray(0, fs.readSync(fd, b, 0, ENDS, Math.max(0, Number(size) - ENDS))))
    return { size: Number(size), mtime: `${mtimeNs}`, ends: hash.digest('hex') }
  } finally {
    fs.closeSync(fd)
  }
}

const sameStamp = (a: Stamp, b: Stamp): boolean => a.size === b.size && a.mtime === b.mtime && a.ends === b.ends
const bytesOf = (a: ArrayBufferView): Buffer => Buffer.from(a.buffer, a.byteOffset, a.byteLength)

/** Writes arrays atomically. @throws the system's error when the folder cannot be written */
export function saveArrays(file: string, kind: string, stamp: Stamp, arrays: Arrays): void {
  const hash = createHash('sha256')
  for (const a of Object.values(arrays)) hash.update(bytesOf(a))
  const header: Header = {
    kind,
    stamp,
    arrays: Object.entries(arrays).map(([name, a]) => ({
      name,
      type: a instanceof Float64Array ? 'f64' : a instanceof Uint32Array ? 'u32' : 'i32',
      length: a.length,
    })),
    hash: hash.digest('hex'),
  }
  writeAtomic(file, (fd) => {
    const text = Buffer.from(JSON.stringify(header))
    const front = Buffer.alloc(12)
    front.write(MAGIC, 'latin1')
    front.writeUInt32LE(text.length, 8)
    writeAll(fd, Buffer.concat([front, text]), 0)
    let at = 12 + text.length
    for (const a of Object.values(arrays)) {
      writeAll(fd, bytesOf(a), at)
      at += a.byteLength
    }
  })
}

/** Reads a whole file range or fails. */
function readExactly(fd: number, bytes: number, at: number): Buffer {
  const b = Buffer.alloc(bytes)
  for (let done = 0; done < bytes; ) {
    const n = fs.readSync(fd, b, done, bytes - done, at + done)
    if (n === 0) throw new Error('it is cut short')
    done += n
  }
  return b
}

function parseSaved(fd: number, kind: string, stamp: Stamp): Arrays {
  const size = fs.fstatSync(fd).size
  const front = readExactly(fd, 12, 0)
  if (front.toString('latin1', 0, 8) !== MAGIC) throw new Error('it is not an index of this version')
  const length = front.readUInt32LE(8)
  if (12 + length > size) throw new Error('it is cut short')
  const header = JSON.parse(readExactly(fd, length, 12).toString()) as Header
  if (header.kind !== kind) throw new Error(`it is an index of ${header.kind}, not of ${kind}`)
  if (!sameStamp(header.stamp, stamp)) throw new Error('the file has changed since')
  const arrays: Arrays = {}
  const hash = createHash('sha256')
  let at = 12 + length
  for (const { name, type, length: n } of header.arrays) {
    const make = TYPES[type]
    if (at + n * make.BYTES_PER_ELEMENT > size) throw new Error('it is cut short')
    const b = readExactly(fd, n * make.BYTES_PER_ELEMENT, at)
    hash.update(b)
    arrays[name] = new make(b.buffer as ArrayBuffer, b.byteOffset, n)
    at += b.length
  }
  if (hash.digest('hex') !== header.hash) throw new Error('its checksum does not fit')
  return arrays
}

/**
 * Arrays saved for a source with this stamp.
 * @returns the arrays, or why they cannot be used; null when nothing was saved
 */
export function loadArrays(file: string, kind: string, stamp: Stamp): { arrays: Arrays } | { reason: string } | null {
  let fd: number
  try {
    fd = fs.openSync(file, 'r')
  } catch (e) {
    const { code } = e as NodeJS.ErrnoException
    return code === 'ENOENT' ? null : { reason: `it cannot be read (${code})` }
  }
  try {
    return { arrays: parseSaved(fd, kind, stamp) }
  } catch (e) {
    return { reason: (e as Error).message }
  } finally {
    fs.closeSync(fd)
  }
}

export interface SavedOptions {
  /** where the arrays are kept; default: `<source>.index`, for sources from 64 MiB on. false: nowhere */
  index?: string | false
  /** told when a saved index is not used, or cannot be written; default: process.emitWarning */
  onNotice?: (text: string) => void
}

/**
 * The arrays of a source: from its saved index, or computed and then saved.
 * @param compute reads the source
 * @param fresh compute in any case
 */
export async function savedArrays(
  source: string,
  kind: string,
  o: SavedOptions,
  compute: () => Arrays | Promise<Arrays>,
  fresh = false,
): Promise<Arrays> {
  const stamp = stampOf(source)
  const index = o.index ?? (stamp.size >= WORTH_SAVING ? `${source}.index` : false)
  if (index === false) return compute()
  const notice = o.onNotice ?? ((text: string) => process.emitWarning(text, 'AlignGPTWarning'))
  const saved = fresh ? null : loadArrays(index, kind, stamp)
  if (saved && 'arrays' in saved) return saved.arrays
  if (saved) notice(`[data] ${index} is built again: ${saved.reason}`)
  const arrays = await compute()
  try {
    // The stamp from before the source was read: if it changed meanwhile, the index is stale and known to be.
    saveArrays(index, kind, stamp, arrays)
  } catch (e) {
    notice(
      `[data] ${index} cannot be kept (${(e as NodeJS.ErrnoException).code}): the next start reads ${source} again`,
    )
  }
  return arrays
}

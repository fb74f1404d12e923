/**
 * The safetensors format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, JSON header,
 * tensor bytes. Only the header is read here; tensor bytes are described by file ranges and read by whoever needs them.
 */
import fs from 'node:fs'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { namingOthers } from '../util/file-kind.js'
import { readRange, withFile, writeAll, writeAtomic } from '../util/files.js'
import { scanJson } from '../util/json.js'

/** Bytes per element of every dtype the format knows. */
export const DTYPE_BYTES = {
  F64: 8,
  I64: 8,
  U64: 8,
  F32: 4,
  I32: 4,
  U32: 4,
  F16: 2,
  BF16: 2,
  I16: 2,
  U16: 2,
  I8: 1,
  U8: 1,
  BOOL: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
} as const
export type StoredDtype = keyof typeof DTYPE_BYTES

/** One tensor on disk: `bytes` bytes, row-major, little-endian, at byte `offset` of the file `path`. */
export interface TensorEntry {
  name: string
  dtype: StoredDtype
  shape: number[]
  offset: number
  bytes: number
  path: string
}

/** A tensor to write: its bytes, a function that makes them when their turn comes, or one that writes them itself. */
export type TensorToWrite = { name: string; dtype: StoredDtype; shape: readonly number[] } & (
  | { data: Uint8Array | (() => Uint8Array) }
  | { write: (path: string, offset: number) => void }
)

export const MAX_HEADER_BYTES = 100_000_000

const isSize = (x: unknown): x is number => typeof x === 'number' && Number.isSafeInteger(x) && x >= 0

/** Number of elements. @throws AlignGPTError ERR_SHAPE when it is no safe integer */
export function elements(shape: readonly number[], where: string): number {
  let n = 1
  for (const d of shape) n *= d
  // A zero dimension must not hide an overflow of the others: the format's own reader refuses that as well.
  if (!isSize(shape.reduce((a, d) => a * Math.max(d, 1), 1)))
    throw mismatch('ERR_SHAPE', 'safetensors', where, 'at most 2^53 elements', show(shape))
  return n
}

function parseEntry(file: string, name: string, raw: unknown, dataStart: number): TensorEntry {
  const where = `${file}: ${show(name)}`
  const bad = (what: string, expected: string, got: unknown, code = 'ERR_FORMAT'): AlignGPTError =>
    mismatch(code, 'safetensors', `${where} ${what}`, expected, show(got))
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) throw bad('entry', 'an object', raw)
  const { dtype, shape, data_offsets: offsets, ...rest } = raw as Record<string, unknown>
  if (Object.keys(rest).length) throw bad('entry', 'the keys dtype, shape and data_offsets', Object.keys(raw))
  if (typeof dtype !== 'string' || !Object.hasOwn(DTYPE_BYTES, dtype))
    throw bad('dtype', `one of ${Object.keys(DTYPE_BYTES).join(' ')}`, dtype, 'ERR_DTYPE')
  if (!Array.isArray(shape) || !shape.every(isSize)) throw bad('shape', 'an array of sizes', shape)
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize))
    throw bad('data_offsets', 'two byte offsets', offsets)
  const [begin, end] = offsets as [number, number]
  const bytes = elements(shape, `${where} shape`) * DTYPE_BYTES[dtype as StoredDtype]
  if (end < begin || end - begin !== bytes)
    throw bad('data_offsets', `${bytes} bytes for ${dtype} [${shape}]`, offsets, 'ERR_SHAPE')
  return { name, dtype: dtype as StoredDtype, shape, offset: dataStart + begin, bytes, path: file }
}

function parseHeader(file: string, text: string): { tensors: [string, unknown][]; metadata: Record<string, string> } {
  const scan = scanJson(text)
  if (scan.problem) {
    const at = `${file} header at character ${scan.problem.position}`
    throw mismatch('ERR_FORMAT', 'safetensors', at, scan.problem.expected, show(text.slice(scan.problem.position)))
  }
  if (!/^\s*\{/.test(text)) throw mismatch('ERR_FORMAT', 'safetensors', `${file} header`, 'a JSON object', show(text))
  const seen = new Set<string>()
  for (const { key } of scan.members) {
    if (seen.has(key))
      throw mismatch('ERR_FORMAT', 'safetensors', `${file} header`, 'distinct names', `${show(key)} twice`)
    seen.add(key)
  }
  const header = JSON.parse(text) as Record<string, unknown>
  const metadata: Record<string, string> = {}
  const raw = Object.hasOwn(header, '__metadata__') ? header.__metadata__ : {}
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw))
    throw mismatch('ERR_FORMAT', 'safetensors', `${file} __metadata__`, 'an object of strings', show(raw))
  for (const [k, v] of Object.entries(raw)) {
    if (typeof v !== 'string')
      throw mismatch('ERR_FORMAT', 'safetensors', `${file} __metadata__ ${show(k)}`, 'a string', show(v))
    metadata[k] = v
  }
  return { tensors: Object.entries(header).filter(([k]) => k !== '__metadata__'), metadata }
}

/**
 * Reads and checks the header of a safetensors file; tensor bytes are not touched.
 * Refused, each by name: a file shorter than its header says, a header over 100 MB, not UTF-8, not JSON or with a name
 * twice, an unknown dtype, offsets that overlap, leave a hole or leave the file, a size that is not shape * dtype.
 * @throws AlignGPTError ERR_FORMAT | ERR_DTYPE | ERR_SHAPE
 */
export function openSafetensors(file: string): { entries: Map<string, TensorEntry>; metadata: Record<string, string> } {
  return namingOthers('safetensors', file, 'a safetensors file', ['safetensors'], () => readHeader(file))
}

function readHeader(file: string): ReturnType<typeof openSafetensors> {
  return withFile(file, (fd, size) => {
    if (size < 8) throw mismatch('ERR_FORMAT', 'safetensors', file, 'at least 8 bytes', `${size}`)
    const length = readRange(fd, 0, 8, file).readBigUInt64LE()
    if (length > MAX_HEADER_BYTES)
      throw mismatch('ERR_FORMAT', 'safetensors', `${file} header`, `at most ${MAX_HEADER_BYTES} bytes`, `${length}`)
    const n = Number(length)
    if (8 + n > size)
      throw mismatch('ERR_FORMAT', 'safetensors', `${file} header`, `a file of at least ${8 + n} bytes`, `${size}`)
    let text: string
    try {
      text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(readRange(fd, 8, n, file))
    } catch (e) {
      if (e instanceof AlignGPTError) throw e
      throw mismatch('ERR_FORMAT', 'safetensors', `${file} header`, 'UTF-8', 'invalid bytes', e)
    }
    const { tensors, metadata } = parseHeader(file, text)
    const list = tensors.map(([name, raw]) => parseEntry(file, name, raw, 8 + n))
    checkCoverage(file, list, 8 + n, size)
    return { entries: new Map(list.map((e) => [e.name, e])), metadata }
  })
}

/** The tensors must cover the data section without holes or overlap, to the last byte. */
function checkCoverage(file: string, list: TensorEntry[], start: number, size: number): void {
  let at = start
  for (const e of [...list].sort((a, b) => a.offset - b.offset || a.bytes - b.bytes)) {
    if (e.offset !== at) {
      const got = `${e.offset - start} (${e.offset < at ? 'overlap' : 'hole'})`
      throw mismatch('ERR_FORMAT', 'safetensors', `${file}: ${show(e.name)} begin`, `${at - start}`, got)
    }
    at += e.bytes
  }
  if (at !== size) {
    const what = at > size ? 'file is too short' : 'file has bytes no tensor owns'
    throw mismatch('ERR_FORMAT', 'safetensors', `${file}: ${what}`, `${at} bytes`, `${size}`)
  }
}

/** Reads the bytes of one tensor; meant for small ones and tests. */
export function readEntry(entry: TensorEntry): Buffer {
  return withFile(entry.path, (fd) => readRange(fd, entry.offset, entry.bytes, entry.path))
}

/** Value of an IEEE half. */
export function halfToFloat(h: number): number {
  const sign = h & 0x8000 ? -1 : 1
  const exponent = (h >> 10) & 31
  const fraction = h & 1023
  if (exponent === 0) return sign * fraction * 2 ** -24
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}

/** IEEE halves of f32 values, rounded to nearest, ties to even. */
export function floatToHalf(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length)
  return Uint16Array.from(bits, (b, i) => {
    const sign = (b >>> 16) & 0x8000
    const exponent = ((b >>> 23) & 255) - 112 // as the half has it
    if (Number.isNaN(values[i])) return sign | 0x7e00
    if (exponent > 30) return sign | 0x7c00
    // a subnormal keeps fewer bits, and they have no leading one of their own
    const shift = exponent > 0 ? 13 : 14 - exponent
    if (shift > 24) return sign
    const fraction = exponent > 0 ? b & 0x7fffff : (b & 0x7fffff) | 0x800000
    const kept = fraction >>> shift
    const rest = fraction - kept * 2 ** shift
    const half = 2 ** (shift - 1)
    const up = rest > half || (rest === half && kept & 1) ? 1 : 0
    return sign | ((exponent > 0 ? exponent << 10 : 0) + kept + up) // a carry goes into the exponent, as it should
  })
}

/** Reads one tensor of any float dtype (F64 F32 F16 BF16) or integer dtype (I64 I32 U8) as Float32Array. */
export function readFloats(entry: TensorEntry): Float32Array {
  const b = readEntry(entry)
  const n = b.length / DTYPE_BYTES[entry.dtype]
  const out = new Float32Array(n)
  const word = new DataView(new ArrayBuffer(4))
  const bf16 = (bits: number): number => {
    word.setUint32(0, bits << 16)
    return word.getFloat32(0)
  }
  const readers: Partial<Record<StoredDtype, (i: number) => number>> = {
    F32: (i) => b.readFloatLE(4 * i),
    F64: (i) => b.readDoubleLE(8 * i),
    F16: (i) => halfToFloat(b.readUInt16LE(2 * i)),
    BF16: (i) => bf16(b.readUInt16LE(2 * i)),
    I64: (i) => Number(b.readBigInt64LE(8 * i)),
    I32: (i) => b.readInt32LE(4 * i),
    U8: (i) => b[i],
  }
  const read = readers[entry.dtype]
  if (!read) throw mismatch('ERR_DTYPE', 'readFloats', entry.name, Object.keys(readers).join(' '), entry.dtype)
  for (let i = 0; i < n; i++) out[i] = read(i)
  return out
}

/**
 * Header bytes and the absolute offset of every tensor of a file to be written. Wide dtypes come first and the header is
 * padded with spaces, so every tensor is aligned to its element size.
 */
export function layoutSafetensors(
  tensors: readonly TensorToWrite[],
  metadata: Record<string, string> = {},
): { header: Buffer; order: { tensor: TensorToWrite; offset: number; bytes: number }[]; size: number } {
  const sorted = [...tensors].sort((a, b) => DTYPE_BYTES[b.dtype] - DTYPE_BYTES[a.dtype])
  const json: [string, unknown][] = Object.keys(metadata).length ? [['__metadata__', metadata]] : []
  const seen = new Set(['__metadata__'])
  const order: { tensor: TensorToWrite; offset: number; bytes: number }[] = []
  let at = 0
  for (const tensor of sorted) {
    const { name, dtype, shape } = tensor
    if (seen.has(name)) throw mismatch('ERR_ARGUMENT', 'safetensors', 'tensor name', 'distinct names', show(name))
    if (!Object.hasOwn(DTYPE_BYTES, dtype))
      throw mismatch('ERR_DTYPE', 'safetensors', name, 'a known dtype', show(dtype))
    if (!shape.every(isSize)) throw mismatch('ERR_SHAPE', 'safetensors', name, 'an array of sizes', show(shape))
    seen.add(name)
    const bytes = elements(shape, name) * DTYPE_BYTES[dtype]
    json.push([name, { dtype, shape, data_offsets: [at, at + bytes] }])
    order.push({ tensor, offset: at, bytes })
    at += bytes
  }
  // Built by hand: an object would move names that look like integers to the front and lose `__proto__`.
  let text = `{${json.map(([k, v]) => `${JSON.stringify(k)}:${JSON.stringify(v)}`).join(',')}}`
  text += ' '.repeat((8 - (Buffer.byteLength(text) % 8)) % 8)
  const body = Buffer.from(text)
  if (body.length > MAX_HEADER_BYTES)
    throw mismatch('ERR_FORMAT', 'safetensors', 'header', `at most ${MAX_HEADER_BYTES} bytes`, `${body.length}`)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(body.length))
  for (const o of order) o.offset += 8 + body.length
  return { header: Buffer.concat([length, body]), order, size: 8 + body.length + at }
}

/**
 * Writes a safetensors file atomically (temporary file, fsync, rename), one tensor in memory at a time when `data` is a
 * function, none when the source writes itself at the given path and offset.
 * @throws AlignGPTError ERR_ARGUMENT (a name twice), ERR_DTYPE, ERR_SHAPE (wrong number of bytes)
 */
export function writeSafetensors(
  file: string,
  tensors: Iterable<TensorToWrite>,
  metadata: Record<string, string> = {},
): void {
  const { header, order, size } = layoutSafetensors([...tensors], metadata)
  writeAtomic(file, (fd, temporary) => {
    fs.ftruncateSync(fd, size)
    writeAll(fd, header, 0)
    for (const { tensor, offset, bytes } of order) {
      if ('write' in tensor) {
        tensor.write(temporary, offset)
        continue
      }
      const data = typeof tensor.data === 'function' ? tensor.data() : tensor.data
      if (data.byteLength !== bytes)
        throw mismatch('ERR_SHAPE', 'safetensors', tensor.name, `${bytes} bytes`, `${data.byteLength}`)
      writeAll(fd, data, offset)
    }
    if (fs.fstatSync(fd).size !== size)
      throw mismatch('ERR_SHAPE', 'safetensors', file, `${size} bytes`, 'another size')
  })
}

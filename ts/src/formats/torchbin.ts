/**
 * Reader of PyTorch's zip checkpoints (`pytorch_model.bin`, `mm_projector_align.bin`). A pickle is a program; this is an
 * interpreter for the few instructions and names that a dictionary of tensors needs. It builds descriptions only, never
 * calls anything, and refuses everything else by name.
 */

import { type AlignGPTError, mismatch, show } from '../util/errors.js'
import { namingOthers } from '../util/file-kind.js'
import { readRange, withFile } from '../util/files.js'
import { DTYPE_BYTES, type StoredDtype, type TensorEntry } from './safetensors.js'

interface ZipEntry {
  offset: number
  size: number
}

const MAX_PICKLE = 256 * 1024 * 1024
const MAX_DIRECTORY = 256 * 1024 * 1024
const CONVERT =
  'python -c "import torch,sys; p=sys.argv[1]; torch.save(torch.load(p, map_location=\'cpu\', weights_only=True), p)" FILE'

const fail = (file: string, what: string, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_FORMAT', 'torchbin', `${file}: ${what}`, expected, got)

/** Reads a 64-bit size as a number. */
function size64(b: Buffer, at: number, file: string): number {
  const v = b.readBigUInt64LE(at)
  if (v > BigInt(Number.MAX_SAFE_INTEGER)) throw fail(file, 'zip', 'sizes below 2^53', `${v}`)
  return Number(v)
}

/** Position, length and number of entries of the central directory (zip64 included). */
function findDirectory(fd: number, size: number, file: string): { offset: number; length: number; count: number } {
  const tailSize = Math.min(size, 65557)
  const tail = readRange(fd, size - tailSize, tailSize, file)
  let at = tail.length - 22
  while (at >= 0 && (tail.readUInt32LE(at) !== 0x06054b50 || at + 22 + tail.readUInt16LE(at + 20) !== tail.length)) at--
  if (at < 0) throw fail(file, 'zip', 'an end record', 'none (truncated file?)')
  const end = {
    count: tail.readUInt16LE(at + 10),
    length: tail.readUInt32LE(at + 12),
    offset: tail.readUInt32LE(at + 16),
  }
  if (end.count !== 0xffff && end.length !== 0xffffffff && end.offset !== 0xffffffff) return end
  if (at < 20 || tail.readUInt32LE(at - 20) !== 0x07064b50) throw fail(file, 'zip', 'a zip64 locator', 'none')
  const where = size64(tail, at - 12, file)
  if (where + 56 > size) throw fail(file, 'zip64 record', `inside ${size} bytes`, `${where}`)
  const r = readRange(fd, where, 56, file)
  if (r.readUInt32LE(0) !== 0x06064b50) throw fail(file, 'zip', 'a zip64 end record', 'another signature')
  return { count: size64(r, 32, file), length: size64(r, 40, file), offset: size64(r, 48, file) }
}

/** Replaces the sizes that a zip64 extra field carries. */
function zip64Extra(extra: Buffer, e: { size: number; packed: number; local: number }, file: string): void {
  for (let p = 0; p + 4 <= extra.length; ) {
    const [id, n] = [extra.readUInt16LE(p), extra.readUInt16LE(p + 2)]
    const body = extra.subarray(p + 4, p + 4 + n)
    if (id === 1) {
      let q = 0
      for (const key of ['size', 'packed', 'local'] as const) {
        if (e[key] !== 0xffffffff) continue
        if (q + 8 > body.length) throw fail(file, 'zip64 field', 'a 64-bit size', 'too few bytes')
        e[key] = size64(body, q, file)
        q += 8
      }
    }
    p += 4 + n
  }
}

/** The stored files of a zip archive: name -> byte range. */
function readZip(fd: number, size: number, file: string): Map<string, ZipEntry> {
  const dir = findDirectory(fd, size, file)
  if (dir.offset + dir.length > size || dir.length > MAX_DIRECTORY)
    throw fail(file, 'zip directory', `inside ${size} bytes`, `${dir.offset}+${dir.length}`)
  const b = readRange(fd, dir.offset, dir.length, file)
  const entries = new Map<string, ZipEntry>()
  let p = 0
  for (let i = 0; i < dir.count; i++) {
    if (p + 46 > b.length || b.readUInt32LE(p) !== 0x02014b50) throw fail(file, `zip entry ${i}`, 'a header', 'none')
    const [n, m, k] = [b.readUInt16LE(p + 28), b.readUInt16LE(p + 30), b.readUInt16LE(p + 32)]
    if (p + 46 + n + m + k > b.length) throw fail(file, `zip entry ${i}`, 'a complete header', 'a cut one')
    const name = b.toString('utf8', p + 46, p + 46 + n)
    const e = { size: b.readUInt32LE(p + 24), packed: b.readUInt32LE(p + 20), local: b.readUInt32LE(p + 42) }
    zip64Extra(b.subarray(p + 46 + n, p + 46 + n + m), e, file)
    const [flags, method] = [b.readUInt16LE(p + 8), b.readUInt16LE(p + 10)]
    if (method !== 0 || flags & 1 || e.size !== e.packed)
      throw fail(file, `zip entry ${show(name)}`, 'stored, not packed or encrypted', `method ${method}, flags ${flags}`)
    if (e.local + 30 > size) throw fail(file, `zip entry ${show(name)}`, `inside ${size} bytes`, `${e.local}`)
    const local = readRange(fd, e.local, 30, file)
    if (local.readUInt32LE(0) !== 0x04034b50) throw fail(file, `zip entry ${show(name)}`, 'a local header', 'none')
    const offset = e.local + 30 + local.readUInt16LE(26) + local.readUInt16LE(28)
    if (offset + e.size > size)
      throw fail(file, `zip entry ${show(name)}`, `inside ${size} bytes`, `${offset}+${e.size}`)
    if (entries.has(name)) throw fail(file, 'zip', 'distinct names', `${show(name)} twice`)
    entries.set(name, { offset, size: e.size })
    p += 46 + n + m + k
  }
  return entries
}

// ---- the pickle machine -------------------------------------------------------------------------------------------

class Global {
  constructor(readonly name: string) {}
}
class Tuple {
  constructor(readonly items: Value[]) {}
}
class Dict {
  readonly map = new Map<Value, Value>()
}
class Storage {
  constructor(
    readonly dtype: StoredDtype,
    readonly key: string,
    readonly count: number,
  ) {}
}
class TensorValue {
  constructor(
    readonly storage: Storage,
    readonly start: number,
    readonly shape: number[],
    readonly stride: number[],
  ) {}
}
const MARK = Symbol('mark')
type Value = null | boolean | number | string | Global | Tuple | Value[] | Dict | Storage | TensorValue | typeof MARK

const STORAGES: Record<string, StoredDtype> = {
  'torch DoubleStorage': 'F64',
  'torch FloatStorage': 'F32',
  'torch HalfStorage': 'F16',
  'torch BFloat16Storage': 'BF16',
  'torch LongStorage': 'I64',
  'torch IntStorage': 'I32',
  'torch ShortStorage': 'I16',
  'torch CharStorage': 'I8',
  'torch ByteStorage': 'U8',
  'torch BoolStorage': 'BOOL',
}
const ORDERED = 'collections OrderedDict'
const REBUILD = 'torch._utils _rebuild_tensor_v2'
const PARAMETER = 'torch._utils _rebuild_parameter'
const ALLOWED = new Set([...Object.keys(STORAGES), ORDERED, REBUILD, PARAMETER])

const isIndex = (x: Value): x is number => typeof x === 'number' && Number.isSafeInteger(x) && x >= 0
const sizes = (v: Value): number[] | null =>
  v instanceof Tuple && v.items.every(isIndex) ? (v.items as number[]) : null

class Machine {
  private pos = 0
  private stack: Value[] = []
  private memo = new Map<number, Value>()
  constructor(
    private readonly b: Buffer,
    private readonly file: string,
  ) {}

  private error(expected: string, got: string): AlignGPTError {
    return fail(this.file, `pickle at byte ${this.pos}`, expected, got)
  }
  private take(n: number): number {
    const at = this.pos
    if (!(n >= 0) || at + n > this.b.length) throw this.error(`${n} more bytes`, `${this.b.length - at}`)
    this.pos += n
    return at
  }
  private text(n: number): string {
    const at = this.take(n)
    return this.b.toString('utf8', at, at + n)
  }
  private line(): string {
    const end = this.b.indexOf(10, this.pos)
    if (end < 0) throw this.error('a line', 'none')
    const s = this.b.toString('latin1', this.pos, end)
    this.pos = end + 1
    return s
  }
  private pop(): Value {
    if (!this.stack.length) throw this.error('a value on the stack', 'none')
    return this.stack.pop() as Value
  }
  private sinceMark(): Value[] {
    const at = this.stack.lastIndexOf(MARK)
    if (at < 0) throw this.error('a mark on the stack', 'none')
    const items = this.stack.splice(at)
    items.shift()
    return items
  }
  private top(): Value {
    if (!this.stack.length) throw this.error('a value on the stack', 'none')
    return this.stack[this.stack.length - 1]
  }
  private long(n: number): number {
    if (n > 8) throw this.error('an integer below 2^53', `${n} bytes`)
    const at = this.take(n)
    let v = 0n
    for (let i = n - 1; i >= 0; i--) v = (v << 8n) | BigInt(this.b[at + i])
    if (n && this.b[at + n - 1] & 128) v -= 1n << BigInt(8 * n)
    const x = Number(v)
    if (!Number.isSafeInteger(x)) throw this.error('an integer below 2^53', `${v}`)
    return x
  }
  private global(name: string): Global {
    if (!ALLOWED.has(name)) throw this.error(`one of the ${ALLOWED.size} names a state dict needs`, show(name))
    return new Global(name)
  }
  private set(pairs: Value[]): void {
    const d = this.top()
    if (!(d instanceof Dict) || pairs.length % 2) throw this.error('a dictionary and pairs', 'something else')
    for (let i = 0; i < pairs.length; i += 2) d.map.set(pairs[i], pairs[i + 1])
  }
  private append(items: Value[]): void {
    const list = this.top()
    if (!Array.isArray(list)) throw this.error('a list', 'something else')
    for (const x of items) list.push(x)
  }

  /** A storage named by ('storage', type, key, location, number of elements). */
  private persistent(id: Value): Storage {
    if (!(id instanceof Tuple) || id.items.length !== 5) throw this.error('a storage of five fields', 'something else')
    const [kind, type, key, , count] = id.items
    if (kind !== 'storage' || !(type instanceof Global) || !(type.name in STORAGES))
      throw this.error('a typed storage', type instanceof Global ? type.name : 'something else')
    if (typeof key !== 'string' || !isIndex(count)) throw this.error('a storage key and size', 'something else')
    return new Storage(STORAGES[type.name], key, count)
  }

  private reduce(f: Value, args: Value): Value {
    if (!(f instanceof Global) || !(args instanceof Tuple))
      throw this.error('a known function and a tuple', 'other values')
    const a = args.items
    if (f.name === ORDERED && a.length === 0) return new Dict()
    if (f.name === PARAMETER && a.length === 3 && a[0] instanceof TensorValue) return a[0]
    if (f.name === REBUILD && (a.length === 6 || a.length === 7)) {
      const [shape, stride] = [sizes(a[2]), sizes(a[3])]
      if (a[0] instanceof Storage && isIndex(a[1]) && shape && stride && shape.length === stride.length)
        return new TensorValue(a[0], a[1], shape, stride)
    }
    throw this.error('arguments of a plain tensor, parameter or dictionary', `${f.name} with ${a.length} arguments`)
  }

  private memoGet(i: number): Value {
    const v = this.memo.get(i)
    if (v === undefined) throw this.error(`value ${i} of the memo`, 'none')
    return v
  }

  run(): Value {
    for (;;) {
      const op = this.b[this.take(1)]
      if (op === 0x2e) return this.pop() // STOP
      if (!this.constant(op) && !this.structure(op)) {
        this.pos--
        throw this.error('an instruction that a state dict needs', `opcode 0x${op.toString(16)}`)
      }
    }
  }

  /** Instructions that push a constant, and the memo. */
  private constant(op: number): boolean {
    const { b, stack } = this
    switch (op) {
      case 0x80: // PROTO
        if (b[this.take(1)] > 5) throw this.error('pickle protocol 2 to 5', `${b[this.pos - 1]}`)
        return true
      case 0x95: // FRAME
        this.take(8)
        return true
      case 0x4e:
        return stack.push(null) > 0
      case 0x88:
        return stack.push(true) > 0
      case 0x89:
        return stack.push(false) > 0
      case 0x4a: // BININT
        return stack.push(b.readInt32LE(this.take(4))) > 0
      case 0x4b:
        return stack.push(b[this.take(1)]) > 0
      case 0x4d:
        return stack.push(b.readUInt16LE(this.take(2))) > 0
      case 0x8a: // LONG1
        return stack.push(this.long(b[this.take(1)])) > 0
      case 0x47: // BINFLOAT
        return stack.push(b.readDoubleBE(this.take(8))) > 0
      case 0x58: // BINUNICODE
        return stack.push(this.text(b.readUInt32LE(this.take(4)))) > 0
      case 0x8c: // SHORT_BINUNICODE
        return stack.push(this.text(b[this.take(1)])) > 0
      case 0x71: // BINPUT
        this.memo.set(b[this.take(1)], this.top())
        return true
      case 0x72: // LONG_BINPUT
        this.memo.set(b.readUInt32LE(this.take(4)), this.top())
        return true
      case 0x94: // MEMOIZE
        this.memo.set(this.memo.size, this.top())
        return true
      case 0x68: // BINGET
        return stack.push(this.memoGet(b[this.take(1)])) > 0
      case 0x6a: // LONG_BINGET
        return stack.push(this.memoGet(b.readUInt32LE(this.take(4)))) > 0
      default:
        return false
    }
  }

  /** Instructions that build tuples, lists, dictionaries, names and tensors. */
  private structure(op: number): boolean {
    const { stack } = this
    switch (op) {
      case 0x28:
        return stack.push(MARK) > 0
      case 0x29:
        return stack.push(new Tuple([])) > 0
      case 0x5d:
        return stack.push([]) > 0
      case 0x7d:
        return stack.push(new Dict()) > 0
      case 0x74: // TUPLE
        return stack.push(new Tuple(this.sinceMark())) > 0
      case 0x85:
      case 0x86:
      case 0x87: {
        const n = op - 0x84
        if (stack.length < n) throw this.error(`${n} values on the stack`, `${stack.length}`)
        return stack.push(new Tuple(stack.splice(stack.length - n))) > 0
      }
      case 0x63: // GLOBAL
        return stack.push(this.global(`${this.line()} ${this.line()}`)) > 0
      case 0x93: {
        const name = this.pop()
        const module = this.pop()
        if (typeof name !== 'string' || typeof module !== 'string') throw this.error('two names', 'other values')
        return stack.push(this.global(`${module} ${name}`)) > 0
      }
      case 0x51: // BINPERSID
        return stack.push(this.persistent(this.pop())) > 0
      case 0x52: {
        const args = this.pop()
        return stack.push(this.reduce(this.pop(), args)) > 0
      }
      case 0x73: {
        const v = this.pop()
        this.set([this.pop(), v])
        return true
      }
      case 0x75:
        this.set(this.sinceMark())
        return true
      case 0x61:
        this.append([this.pop()])
        return true
      case 0x65:
        this.append(this.sinceMark())
        return true
      case 0x62: // BUILD: a state_dict's `_metadata` attribute; nothing that loading needs
        this.pop()
        if (!(this.top() instanceof Dict)) throw this.error('BUILD of a dictionary', 'another object')
        return true
      default:
        return false
    }
  }
}

/** Turns a tensor description into a file range. */
function toEntry(file: string, name: string, t: TensorValue, zip: Map<string, ZipEntry>, prefix: string): TensorEntry {
  const { storage, shape, stride } = t
  const width = DTYPE_BYTES[storage.dtype]
  const blob = zip.get(`${prefix}data/${storage.key}`)
  const what = show(name)
  if (!blob) throw fail(file, what, `storage data/${storage.key}`, 'none')
  let count = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] > 1 && stride[i] !== count && !shape.includes(0))
      throw fail(file, what, `contiguous strides for [${shape}]`, `[${stride}]`)
    count *= shape[i]
    if (!Number.isSafeInteger(count)) throw fail(file, what, 'at most 2^53 elements', show(shape))
  }
  if (storage.count * width > blob.size)
    throw fail(file, `${what} storage`, `${storage.count * width} bytes`, `${blob.size}`)
  if (t.start + count > storage.count)
    throw fail(file, what, `at most ${storage.count} elements`, `${t.start}+${count}`)
  return { name, dtype: storage.dtype, shape, offset: blob.offset + t.start * width, bytes: count * width, path: file }
}

const TORCH_KINDS = ['a PyTorch file', 'a zip archive', 'a Python pickle']

/**
 * Tensors of a checkpoint written by torch.save (zip layout, PyTorch >= 1.6).
 * Entries point into the file; nothing is executed and there is no fallback. Numbers and other plain values beside the
 * tensors are ignored, nested dictionaries are refused by name.
 * @throws AlignGPTError ERR_FORMAT: an opcode or name off the whitelist, packed entries, a legacy file (with the command
 *   that converts it), strides that are not contiguous, ranges outside the file
 */
export function openTorchBin(file: string): Map<string, TensorEntry> {
  return namingOthers('torchbin', file, 'a PyTorch file', TORCH_KINDS, () => readTensors(file))
}

function readTensors(file: string): Map<string, TensorEntry> {
  return withFile(file, (fd, size) => {
    const magic = readRange(fd, 0, Math.min(4, size), file)
    if (magic.length < 4 || magic.readUInt32LE(0) !== 0x04034b50) {
      const legacy = magic[0] === 0x80 ? 'an old torch.save file' : 'no zip file'
      throw fail(file, 'checkpoint', `the zip layout of PyTorch >= 1.6 (convert with: ${CONVERT})`, legacy)
    }
    const zip = readZip(fd, size, file)
    const pickle = [...zip.keys()].find((n) => /^[^/]+\/data\.pkl$/.test(n)) ?? (zip.has('data.pkl') ? 'data.pkl' : '')
    const blob = zip.get(pickle)
    if (!blob) throw fail(file, 'zip', 'an entry data.pkl', 'none')
    if (blob.size > MAX_PICKLE) throw fail(file, 'data.pkl', `at most ${MAX_PICKLE} bytes`, `${blob.size}`)
    const prefix = pickle.slice(0, -'data.pkl'.length)
    const order = zip.get(`${prefix}byteorder`)
    if (order && readRange(fd, order.offset, Math.min(order.size, 16), file).toString() !== 'little')
      throw fail(file, 'byteorder', 'little', 'another')
    const root = new Machine(readRange(fd, blob.offset, blob.size, file), file).run()
    if (!(root instanceof Dict)) throw fail(file, 'data.pkl', 'a dictionary of tensors', 'something else')
    const entries = new Map<string, TensorEntry>()
    for (const [name, value] of root.map) {
      if (typeof name !== 'string') throw fail(file, 'key', 'a string', show(name === null ? null : typeof name))
      if (value instanceof TensorValue) entries.set(name, toEntry(file, name, value, zip, prefix))
      else if (value instanceof Dict) throw fail(file, show(name), 'a tensor', 'a dictionary')
    }
    return entries
  })
}

/** Makes hostile inputs out of valid ones: bytes that are changed, and JSON values in which parts are replaced. */
import fc from 'fast-check'

/** Fast random integers; the same seed and number give the same stream. */
export class Dice {
  #state: number
  constructor(seed: number, number = 0) {
    this.#state = (Math.imul(seed, 0x9e3779b1) ^ Math.imul(number + 1, 0x85ebca6b)) | 0
  }
  /** 0..n-1 */
  roll(n: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 4294967296) * n)
  }
  pick<T>(list: readonly T[]): T {
    return list[this.roll(list.length)]
  }
}

const EDGES = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 2 ** 31 + 8]

/** A number at a place, as length fields have it: 1, 2, 4 or 8 bytes in either order. */
function field(dice: Dice, b: Buffer): void {
  const bytes = dice.pick([1, 2, 4, 8])
  if (b.length < bytes) return
  // most lengths stand at the front
  const at = dice.roll(dice.roll(2) ? b.length - bytes + 1 : Math.min(b.length - bytes + 1, 64))
  const value = dice.roll(3) ? dice.pick(EDGES) : dice.roll(b.length * 2)
  if (bytes === 8) {
    b.writeBigUInt64LE(dice.roll(8) ? BigInt(value) : 0xffffffffffffffffn, at)
    return
  }
  const kept = bytes === 4 ? value >>> 0 : value & (2 ** (8 * bytes) - 1)
  if (dice.roll(2)) b.writeUIntLE(kept, at, bytes)
  else b.writeUIntBE(kept, at, bytes)
}

/** `b` with `count` bytes at `at` replaced by others. */
const replaced = (b: Buffer, at: number, count: number, by: Uint8Array): Buffer =>
  Buffer.concat([b.subarray(0, at), by, b.subarray(Math.min(b.length, at + count))])

/** Digits of a text are changed too: sizes, offsets and shapes stand there. */
const NUMBERS = ['-1', '0', '1e999', '4294967296', '9007199254740993', '1e-7', '00', '99999999999999999999', '1.5'].map(
  (t) => Buffer.from(t),
)

function once(dice: Dice, b: Buffer, seeds: readonly Buffer[], words: readonly Buffer[]): Buffer {
  const at = dice.roll(b.length + 1)
  switch (dice.roll(10)) {
    case 0:
    case 1:
      if (b.length) b[dice.roll(b.length)] ^= 1 << dice.roll(8)
      return b
    case 2:
      if (b.length) b[dice.roll(b.length)] = dice.roll(256)
      return b
    case 3:
    case 4:
      field(dice, b)
      return b
    case 5:
      return b.subarray(0, dice.roll(4) ? at : Math.max(0, b.length - 1 - dice.roll(16)))
    case 6: {
      const other = dice.pick(seeds)
      const from = dice.roll(other.length)
      return replaced(b, at, dice.roll(64), other.subarray(from, from + dice.roll(256)))
    }
    case 7:
      return replaced(b, at, dice.roll(32), Buffer.alloc(0))
    case 8: {
      const length = dice.roll(64)
      return replaced(b, at, 0, b.subarray(at, at + length))
    }
    default: {
      let digit = at
      while (digit < b.length && digit < at + 400 && !(b[digit] >= 48 && b[digit] <= 57)) digit++
      const isDigit = digit < b.length && b[digit] >= 48 && b[digit] <= 57
      if (isDigit && dice.roll(2)) return replaced(b, digit, 1 + dice.roll(3), dice.pick(NUMBERS))
      return replaced(b, at, dice.roll(8), words.length ? dice.pick(words) : dice.pick(NUMBERS))
    }
  }
}

/** A valid input with 1 to 6 changes; the seeds stay as they are. */
export function mutate(dice: Dice, seeds: readonly Buffer[], words: readonly Buffer[]): Buffer {
  let b: Buffer = Buffer.from(dice.pick(seeds))
  for (let n = 1 + dice.roll(dice.roll(3) ? 2 : 6); n > 0; n--) b = once(dice, b, seeds, words)
  return b
}

/** Values that no key expects; fast-check makes most of them. */
export function hostileValues(seed: number): unknown[] {
  const made = fc.sample(fc.jsonValue({ maxDepth: 3 }), { numRuns: 1500, seed })
  const numbers = fc.sample(fc.double({ noNaN: true, noDefaultInfinity: true }), { numRuns: 200, seed })
  let deep: unknown = []
  for (let i = 0; i < 2000; i++) deep = [deep]
  const own = [0, -0, -1, 1, 1.5, 2 ** 31, 2 ** 53, 2 ** 53 - 1, 1e308, '', ' ', '0', 'true', '\ud800', '\0', [], {}]
  const named = [{ __proto__: null }, JSON.parse('{"__proto__":{"x":1},"constructor":1,"toString":2}'), [[]], [null]]
  return [...made, ...numbers, ...own, ...named, null, true, false, 'a'.repeat(5000), Array(300).fill(7), deep]
}

type Parts = unknown[] | Record<string, unknown>
const isParts = (v: unknown): v is Parts => typeof v === 'object' && v !== null

/** A copy in which one part is replaced, left out, or has its key or its neighbour's value. */
function edited(dice: Dice, value: unknown, hostile: readonly unknown[], keys: readonly string[]): unknown {
  if (!isParts(value) || dice.roll(12) === 0) return dice.pick(hostile)
  if (Array.isArray(value)) {
    const copy = [...value]
    const at = dice.roll(copy.length)
    if (copy.length === 0 || dice.roll(12) === 0) copy.push(dice.pick(hostile))
    else if (dice.roll(8) === 0) copy.splice(at, 1)
    else copy[at] = edited(dice, copy[at], hostile, keys)
    return copy
  }
  const copy: Record<string, unknown> = { ...value }
  const own = Object.keys(copy)
  const key = own.length && dice.roll(5) ? dice.pick(own) : dice.pick(keys)
  const how = dice.roll(8)
  if (how === 0) delete copy[key]
  else if (how === 1 && own.length) copy[key] = copy[dice.pick(own)]
  else if (isParts(copy[key]) && dice.roll(5)) copy[key] = edited(dice, copy[key], hostile, keys)
  else copy[key] = dice.pick(hostile)
  return copy
}

/** The keys at every depth. */
export function keysOf(value: unknown, found = new Set<string>()): Set<string> {
  if (isParts(value))
    for (const [k, v] of Object.entries(value)) {
      if (!Array.isArray(value)) found.add(k)
      if (found.size < 500) keysOf(v, found)
    }
  return found
}

/** A value with 1 to 3 changes, as JSON. */
export function mutateJson(
  dice: Dice,
  seeds: readonly unknown[],
  hostile: readonly unknown[],
  keys: readonly string[],
): Buffer {
  let value = dice.pick(seeds)
  for (let n = 1 + dice.roll(3); n > 0; n--) value = edited(dice, value, hostile, keys)
  return Buffer.from(JSON.stringify(value) ?? 'null')
}

/**
 * Alignment levels: CLIP scores cut into N buckets, and the `similarity` field of a data file. Level 0 is aligned worst,
 * level N-1 best.
 */

import fs from 'node:fs'
import type { Dataset } from '../data/dataset.js'
import { mismatch, show } from '../util/errors.js'
import { writeAll, writeAtomic } from '../util/files.js'
import { decodeUtf8, scanJson } from '../util/json.js'

export type Buckets = 'width' | 'quantile'

export interface Levels {
  /** level of each score, 0..n-1 */
  levels: Int32Array
  /** n+1 ascending borders; bucket k holds scores from edges[k] on, the last one its upper border too */
  edges: number[]
  /** n counts */
  histogram: number[]
}

/**
 * Cuts scores into n buckets.
 * `width`: equal parts of the range, level = min(n-1, floor(n (s - min) / (max - min))) (the paper's rule). When all
 * scores are equal the range is empty and every level is n-1: nothing is aligned worse than anything else.
 * `quantile`: equal counts, level = floor(rank n / count) with ascending ranks, ties by position.
 * @param n number of levels, at least 1
 * @throws AlignGPTError ERR_DATA for a score that is not finite, ERR_ARGUMENT
 */
export function bucketLevels(scores: ArrayLike<number>, n: number, kind: Buckets = 'width'): Levels {
  if (!Number.isInteger(n) || n < 1)
    throw mismatch('ERR_ARGUMENT', 'levels', 'number of levels', 'an integer >= 1', show(n))
  if (kind !== 'width' && kind !== 'quantile')
    throw mismatch('ERR_ARGUMENT', 'levels', 'buckets', "'width' or 'quantile'", show(kind))
  const s = Float64Array.from(scores)
  const odd = s.findIndex((x) => !Number.isFinite(x))
  if (odd >= 0) throw mismatch('ERR_DATA', 'levels', `score ${odd}`, 'a finite number', `${s[odd]}`)
  const levels = new Int32Array(s.length)
  const edges = kind === 'width' ? byWidth(s, n, levels) : byQuantile(s, n, levels)
  const histogram = new Array<number>(n).fill(0)
  for (const l of levels) histogram[l]++
  return { levels, edges, histogram }
}

function byWidth(s: Float64Array, n: number, levels: Int32Array): number[] {
  let [min, max] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]
  for (const x of s) {
    if (x < min) min = x
    if (x > max) max = x
  }
  if (!s.length) [min, max] = [0, 0]
  s.forEach((x, i) => {
    levels[i] = max > min ? Math.min(n - 1, Math.floor((n * (x - min)) / (max - min))) : n - 1
  })
  return Array.from({ length: n + 1 }, (_, k) => (k === n ? max : min + (k * (max - min)) / n))
}

function byQuantile(s: Float64Array, n: number, levels: Int32Array): number[] {
  const order = [...s.keys()].sort((a, b) => s[a] - s[b] || a - b)
  order.forEach((i, rank) => {
    levels[i] = Math.floor((rank * n) / s.length)
  })
  if (!s.length) return new Array<number>(n + 1).fill(0)
  const at = (rank: number): number => s[order[Math.min(rank, s.length - 1)]]
  return Array.from({ length: n + 1 }, (_, k) => (k === n ? at(s.length) : at(Math.ceil((k * s.length) / n))))
}

/** Text of a record with its `similarity` set; everything else stays as it is, byte for byte. */
export function withSimilarity(record: string, level: number): string {
  const { members } = scanJson(record)
  if (!members) throw mismatch('ERR_DATA', 'levels', 'record', 'a JSON object', show(record))
  const mine = members.filter((m) => m.key === 'similarity')
  if (mine.length) {
    let out = ''
    let at = 0
    for (const m of mine) {
      out += record.slice(at, m.valueStart) + level
      at = m.valueEnd
    }
    return out + record.slice(at)
  }
  const last = members.at(-1)
  if (!last) return `{"similarity": ${level}}`
  // In the style of the record: what stands before its first key, and between the key and the value.
  const first = members[0]
  const indent = record.slice(record.indexOf('{') + 1, first.keyStart)
  const colon = record.slice(first.keyStart, first.valueStart).replace(/^"(?:[^"\\]|\\.)*"/, '')
  const space =
    indent === '' && members[1] ? record.slice(members[0].valueEnd, members[1].keyStart).replace(/^[^,]*,/, '') : indent
  return `${record.slice(0, last.valueEnd)},${space}"similarity"${colon}${level}${record.slice(last.valueEnd)}`
}

/** `similarity` of every record; null where a record has none. */
export function readLevels(dataset: Dataset): (number | null)[] {
  return Array.from({ length: dataset.length }, (_, i) => dataset.record(i).similarity)
}

/**
 * Writes levels into the `similarity` fields of a data set's file: atomically, record by record, everything else byte
 * for byte as it was. The data set is read again afterwards.
 * @param levels one integer >= 0 per record; -1 leaves a record as it is
 * @param target file to write; default: the data set's own, in place
 * @throws AlignGPTError ERR_ARGUMENT, ERR_DATA
 */
export async function writeLevels(dataset: Dataset, levels: ArrayLike<number>, target = dataset.file): Promise<void> {
  if (levels.length !== dataset.length)
    throw mismatch('ERR_ARGUMENT', 'levels', 'levels', `${dataset.length} of them`, `${levels.length}`)
  const source = fs.openSync(dataset.file, 'r')
  try {
    const size = fs.fstatSync(source).size
    const mode = fs.fstatSync(source).mode
    // A link stays a link.
    const real = fs.existsSync(target) ? fs.realpathSync(target) : target
    writeAtomic(real, (fd) => {
      fs.fchmodSync(fd, mode & 0o777)
      const out = new Appender(fd)
      let at = 0
      for (let i = 0; i < dataset.length; i++) {
        const level = levels[i]
        if (level === -1) continue
        if (!Number.isInteger(level) || level < 0)
          throw mismatch('ERR_ARGUMENT', 'levels', `level ${i}`, 'an integer >= 0, or -1', show(level))
        const { offset, bytes } = dataset.range(i)
        copyRange(source, at, offset, out)
        const b = Buffer.allocUnsafe(bytes)
        fs.readSync(source, b, 0, bytes, offset)
        out.add(Buffer.from(withSimilarity(decodeUtf8(b, dataset.file, 'ERR_DATA', offset), level)))
        at = offset + bytes
      }
      copyRange(source, at, size, out)
      out.flush()
    })
  } finally {
    fs.closeSync(source)
  }
  if (target === dataset.file) await dataset.reindex()
}

/** Collects small writes. */
class Appender {
  private parts: Buffer[] = []
  private waiting = 0
  private position = 0
  constructor(private readonly fd: number) {}
  add(b: Buffer): void {
    this.parts.push(b)
    this.waiting += b.length
    if (this.waiting > 1 << 20) this.flush()
  }
  flush(): void {
    writeAll(this.fd, Buffer.concat(this.parts), this.position)
    this.position += this.waiting
    this.waiting = 0
    this.parts = []
  }
}

function copyRange(fd: number, from: number, to: number, out: Appender): void {
  for (let at = from; at < to; ) {
    const b = Buffer.allocUnsafe(Math.min(to - at, 1 << 20))
    const n = fs.readSync(fd, b, 0, b.length, at)
    if (n === 0) throw mismatch('ERR_DATA', 'levels', 'data file', `${to} bytes`, `${at}`)
    out.add(b.subarray(0, n))
    at += n
  }
}

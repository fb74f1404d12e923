/** Alignment levels: CLIP scores cut into N buckets. Level 0 is aligned worst, level N-1 best. */
import { mismatch, show } from '../util/errors.js'

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

/** Two sides timed in turn, and what a row of the table is. */
import { watchOthers } from './others.js'
import type { Peer, PeerCase } from './peer.js'

export interface Row {
  name: string
  /** null: not measured, see `note` */
  ours: number | null
  peer: number | null
  unit: string
  /** larger is better for us; times and sizes: peer / ours */
  ratio: number | null
  /** half the interquartile range of the pairs' ratios, relative to the ratio */
  spread: number | null
  target: number
  /** what was compared, or why there is no number */
  note: string
  /** CPUs that other programs used while it was timed; null: not known */
  others?: number | null
  failed?: boolean
}

/** What a group of rows gets. */
export interface Context {
  peer: Peer
  threads: number
  /** folder for files of this run */
  temp: string
  /** milliseconds since the epoch after which nothing is repeated any more */
  deadline: number
  /** how much longer the run may wait for other programs, all in all */
  patience: { milliseconds: number }
  log: (line: string) => void
}

/** Rows that are measured together. */
export interface Group {
  /** name and target */
  rows: Record<string, number>
  /** @param wants whether a row was asked for */
  run(c: Context, wants: (row: string) => boolean): Promise<Result[]>
}
export type Result = Omit<Row, 'target'>

export interface Comparison {
  label: string
  /** seconds, medians */
  ours: number
  peer: number
  ratio: number
  spread: number
  pairs: number
  /** CPUs that other programs used meanwhile; null: not known */
  others: number | null
}

const PAIRS = 5
const ROUNDS = 3
/** OpenMP's threads spin for some milliseconds after a parallel region before they sleep; ours for less than one. */
const SETTLE = { peer: 60, ours: 3 }
/** CPUs used by other programs from which on a timing is disturbed: they slow PyTorch's waiting threads down several times. */
export const BUSY = 0.3

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

export function quantile(values: readonly number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b)
  const at = (sorted.length - 1) * q
  const low = Math.floor(at)
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low)
}
export const median = (values: readonly number[]): number => quantile(values, 0.5)
export const geomean = (values: readonly number[]): number =>
  Math.exp(values.reduce((s, v) => s + Math.log(v), 0) / values.length)

/** Half the interquartile range relative to the median. */
export function spreadOf(values: readonly number[]): number {
  return (quantile(values, 0.75) - quantile(values, 0.25)) / 2 / median(values)
}

function timeOurs(run: () => void, reps: number): number {
  const start = performance.now()
  for (let i = 0; i < reps; i++) run()
  return (performance.now() - start) / 1000 / reps
}

/** So many runs that one sample takes `seconds`. */
const repetitions = (one: number, seconds: number): number => Math.min(500, Math.max(1, Math.round(seconds / one)))

/**
 * Times both sides in turn: warm-up, then at least five pairs A B A B ..., more while the spread is wider than the
 * difference between the sides.
 * @param o.sample seconds a sample should last, runs are repeated for it; 0: one run
 * @param o.warmup runs before the first pair
 * @param o.warmPeer the peer needs none
 */
export async function compare(
  c: Context,
  label: string,
  ours: () => void,
  peer: PeerCase,
  o: { sample?: number; warmup?: number; warmPeer?: boolean } = {},
): Promise<Comparison> {
  const { sample = 0.02, warmup = 2 } = o
  timeOurs(ours, warmup)
  if (!o.warmPeer) await peer.time(warmup)
  const oursReps = sample ? repetitions(timeOurs(ours, 1), sample) : 1
  const peerReps = sample ? repetitions(await peer.time(1), sample) : 1
  const pairs: Pair[] = []
  for (let round = 0; round < ROUNDS; round++) {
    for (let i = 0; i < PAIRS; i++)
      pairs.push(
        await undisturbed(
          c,
          () => timeOurs(ours, oursReps),
          () => peer.time(peerReps),
        ),
      )
    if (Date.now() > c.deadline || !drowned(pairs)) break
  }
  const [a, b] = [median(pairs.map((p) => p.ours)), median(pairs.map((p) => p.peer))]
  const others = pairs[0].others === null ? null : median(pairs.map((p) => p.others as number))
  const result = { label, ours: a, peer: b, ratio: b / a, spread: spreadOf(ratiosOf(pairs)) }
  c.log(
    `${label}: ours ${milli(result.ours)}, PyTorch ${milli(result.peer)}, ratio ${result.ratio.toFixed(2)} ` +
      `± ${(100 * result.spread).toFixed(0)} % (${pairs.length} pairs${others === null ? '' : `, others ${others.toFixed(1)} CPUs`})`,
  )
  return { ...result, pairs: pairs.length, others }
}

const ratiosOf = (pairs: readonly Pair[]): number[] => pairs.map((p) => p.peer / p.ours)

function drowned(pairs: readonly Pair[]): boolean {
  const ratios = ratiosOf(pairs)
  return spreadOf(ratios) > Math.abs(Math.log(median(ratios)))
}

/** Seconds of one run on each side, one right after the other, and the CPUs other programs used meanwhile. */
interface Pair {
  ours: number
  peer: number
  others: number | null
}

/** Both sides once; again when other programs came in between, as long as there is patience. */
async function undisturbed(c: Context, ours: () => number, peer: () => Promise<number>): Promise<Pair> {
  for (;;) {
    await quiet(c)
    const began = performance.now()
    const used = watchOthers([process.pid, c.peer.pid])
    const a = ours()
    await pause(SETTLE.ours)
    const b = await peer()
    const others = used()
    if ((others ?? 0) < BUSY || c.patience.milliseconds <= 0) return { ours: a, peer: b, others }
    c.patience.milliseconds -= performance.now() - began
  }
}

/** Waits until both sides and all other programs are idle, as long as there is patience for the latter. */
export async function quiet(c: Context): Promise<void> {
  for (;;) {
    const used = watchOthers([process.pid, c.peer.pid])
    await pause(SETTLE.peer)
    if ((used() ?? 0) < BUSY || c.patience.milliseconds <= 0) return
    c.patience.milliseconds -= SETTLE.peer
  }
}

export const milli = (seconds: number): string => `${(1000 * seconds).toFixed(seconds < 0.01 ? 3 : 1)} ms`

/** Spread of a geometric mean of cases measured one after the other. */
const combined = (cs: readonly Comparison[]): number => Math.hypot(...cs.map((c) => c.spread)) / cs.length

/**
 * One row from several cases: geometric means.
 * @param work GFLOP of a case; with it the row is in GFLOP/s, without in milliseconds
 */
export function meanRow(name: string, cs: readonly Comparison[], note: string, work?: (i: number) => number): Result {
  const speed = (side: 'ours' | 'peer'): number =>
    geomean(cs.map((c, i) => (work ? work(i) / c[side] : 1000 * c[side])))
  return {
    name,
    ours: speed('ours'),
    peer: speed('peer'),
    unit: work ? 'GFLOP/s' : 'ms',
    ratio: geomean(cs.map((c) => c.ratio)),
    spread: combined(cs),
    note,
    others: cs.some((c) => c.others === null) ? null : Math.max(...cs.map((c) => c.others as number)),
  }
}

/** One row from the case in which we compare worst. */
export function worstRow(name: string, cs: readonly Comparison[], work?: (i: number) => number): Result {
  const i = cs.reduce((w, c, k) => (c.ratio < cs[w].ratio ? k : w), 0)
  const shown = work ? () => work(i) : undefined
  return meanRow(name, [cs[i]], cs[i].label, shown)
}

/** A row that cannot be measured yet. */
export const unavailable = (name: string, reason: string): Result => ({
  name,
  ours: null,
  peer: null,
  unit: '',
  ratio: null,
  spread: null,
  note: `not available: ${reason}`,
})

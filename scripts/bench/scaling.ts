/** How the cost of our step grows with the work, and what of it is not kernels. No peer: these are ours alone. */
import { native } from '../../ts/src/native.js'
import { memory } from '../../ts/src/tensor.js'
import { median } from './measure.js'
import { EVEN, type Size, STEP_SIZE, TrainStep, writeModel } from './model.js'

interface Point {
  /** rows of a step, layers, or size of the vocabulary */
  x: number
  seconds: number
  /** largest size of all tensors during a step */
  bytes: number
}
interface Curve {
  points: Point[]
  /** d log(seconds) / d log(x), by least squares; 1: proportional */
  timeExponent: number
  memoryExponent: number
  /** of the last two points alone, where constant parts weigh least */
  lastTimeExponent: number
}
export interface Scaling {
  tokens: Curve
  layers: Curve
  vocabulary: Curve
  outsideKernels: Outside
}
interface Outside {
  stepSeconds: number
  nativeCalls: number
  /** share of the step outside calls into the native core: JavaScript */
  javascript: number
  /** time of the same calls on the smallest tensors over the step's: binding, checks, tape and JavaScript, in a hot loop */
  smallest: number
  note: string
}

/** Small, so that 32 k rows fit into seconds: pictures of 64 patches, sequences of 128 rows. */
const SMALL: Size = {
  hidden: 256,
  inter: 688,
  layers: 2,
  heads: 4,
  vocab: 2048,
  image: 112,
  patch: 14,
  vision: { hidden: 128, inter: 512, layers: 2, heads: 4 },
}
const TEXT = 62
const ROWS = 128

/** Least-squares slope of log y over log x. */
function slope(xs: readonly number[], ys: readonly number[]): number {
  const [u, v] = [xs.map(Math.log), ys.map(Math.log)]
  const mean = (a: readonly number[]): number => a.reduce((s, x) => s + x, 0) / a.length
  const [mu, mv] = [mean(u), mean(v)]
  const top = u.reduce((s, x, i) => s + (x - mu) * (v[i] - mv), 0)
  return top / u.reduce((s, x) => s + (x - mu) ** 2, 0)
}

async function point(temp: string, size: Size, sequences: number, x: number): Promise<Point> {
  const step = await TrainStep.load(await writeModel(temp, size), 2, 'f32', new Array<number>(sequences).fill(TEXT))
  try {
    step.run()
    native.resetPeak()
    const times = Array.from({ length: 3 }, () => seconds(() => step.run()))
    return { x, seconds: median(times), bytes: memory().peak }
  } finally {
    step.dispose()
    native.trim()
  }
}

function seconds(run: () => void): number {
  const start = performance.now()
  run()
  return (performance.now() - start) / 1000
}

async function curve(xs: readonly number[], at: (x: number) => Promise<Point>): Promise<Curve> {
  const points: Point[] = []
  for (const x of xs) points.push(await at(x))
  const exponent = (ps: readonly Point[], y: 'seconds' | 'bytes'): number =>
    slope(
      ps.map((p) => p.x),
      ps.map((p) => p[y]),
    )
  return {
    points,
    timeExponent: exponent(points, 'seconds'),
    memoryExponent: exponent(points, 'bytes'),
    lastTimeExponent: exponent(points.slice(-2), 'seconds'),
  }
}

/** Replaces every export of the native core by one that also takes the time; `undo` puts the originals back. */
function timeNativeCalls(): { spent: () => { seconds: number; calls: number }; undo: () => void } {
  const exports = native as unknown as Record<string, (...args: unknown[]) => unknown>
  const originals = { ...exports }
  let total = 0
  let calls = 0
  for (const [name, original] of Object.entries(originals))
    exports[name] = (...args) => {
      const start = performance.now()
      try {
        return original(...args)
      } finally {
        total += performance.now() - start
        calls++
      }
    }
  return { spent: () => ({ seconds: total / 1000, calls }), undo: () => void Object.assign(exports, originals) }
}

/**
 * What of a step is not kernels. The core has no counter for the time in its kernels, so two numbers are measured: the
 * share outside native calls, and the time of the same sequence of calls where the kernels have next to nothing to do.
 */
async function outsideKernels(temp: string): Promise<Outside> {
  const step = await TrainStep.load(await writeModel(temp), 2, 'f32', EVEN)
  let full: number
  let spent: { seconds: number; calls: number }
  let traced: number
  try {
    for (let i = 0; i < 2; i++) step.run()
    full = median(Array.from({ length: 3 }, () => seconds(() => step.run())))
    const timed = timeNativeCalls()
    try {
      traced = seconds(() => step.run())
      spent = timed.spent()
    } finally {
      timed.undo()
    }
  } finally {
    step.dispose()
  }
  const vision = { ...STEP_SIZE.vision, hidden: 8, inter: 8, heads: 1 }
  const tiny: Size = { ...STEP_SIZE, hidden: 8, inter: 8, heads: 1, vocab: 16, image: 14, vision }
  const small = await TrainStep.load(await writeModel(temp, tiny), 2, 'f32', [2])
  try {
    for (let i = 0; i < 20; i++) small.run()
    const least = median(Array.from({ length: 50 }, () => seconds(() => small.run())))
    return {
      stepSeconds: full,
      nativeCalls: spent.calls,
      javascript: (traced - spent.seconds) / traced,
      smallest: least / full,
      note: 'no counter of kernel time in the native core: page faults of large blocks are not separated from kernels',
    }
  } finally {
    small.dispose()
  }
}

export async function measureScaling(temp: string, log: (line: string) => void): Promise<Scaling> {
  log('scaling: tokens, layers, vocabulary')
  const tokens = await curve([1024, 2048, 4096, 8192, 16384, 32768], (x) => point(temp, SMALL, x / ROWS, x))
  const layers = await curve([2, 4, 8, 16], (x) => point(temp, { ...SMALL, layers: x }, 8, x))
  const vocabulary = await curve([2048, 8192, 32768], (x) => point(temp, { ...SMALL, vocab: x }, 8, x))
  log('scaling: share outside kernels')
  return { tokens, layers, vocabulary, outsideKernels: await outsideKernels(temp) }
}

export function describeScaling(s: Scaling): string {
  const line = (name: string, c: Curve): string =>
    `${name} ${c.points[0].x}-${c.points.at(-1)?.x}: time ~ x^${c.timeExponent.toFixed(2)} ` +
    `(last two points ${c.lastTimeExponent.toFixed(2)}), memory ~ x^${c.memoryExponent.toFixed(2)}`
  const o = s.outsideKernels
  const percent = (x: number): string => `${(100 * x).toFixed(2)} %`
  return [
    'Cost of our phase-2 step against the work, f32, small model:',
    `  ${line('tokens per step', s.tokens)}`,
    `  ${line('layers', s.layers)}`,
    `  ${line('vocabulary', s.vocabulary)}`,
    `Step outside kernels (target < 3 %): JavaScript ${percent(o.javascript)} of ${o.nativeCalls} native calls' step; ` +
      `the same calls on the smallest tensors (binding, checks, tape): ${percent(o.smallest)}`,
  ].join('\n')
}

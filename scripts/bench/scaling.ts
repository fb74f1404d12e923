/** How the cost of our step grows with the work, and what of it is not kernels. No peer: these are ours alone. */
import { native } from '../../ts/src/core/native.js'
import { memory } from '../../ts/src/core/tensor.js'
import { median } from './measure.js'
import { EVEN, type Size, TrainStep, writeModel } from './model.js'

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
  /** of the step: JavaScript, binding, checks, tape, allocator */
  share: number
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

/** What of a step is not spent inside kernels. */
async function outsideKernels(temp: string): Promise<Outside> {
  const step = await TrainStep.load(await writeModel(temp), 2, 'f32', EVEN)
  try {
    for (let i = 0; i < 2; i++) step.run()
    const runs = Array.from({ length: 5 }, () => {
      const before = native.kernelSeconds()
      const stepSeconds = seconds(() => step.run())
      return { stepSeconds, share: 1 - (native.kernelSeconds() - before) / stepSeconds }
    })
    return { stepSeconds: median(runs.map((r) => r.stepSeconds)), share: median(runs.map((r) => r.share)) }
  } finally {
    step.dispose()
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
    `Step outside kernels (target < 3 %): ${percent(o.share)} of ${(1000 * o.stepSeconds).toFixed(0)} ms`,
  ].join('\n')
}

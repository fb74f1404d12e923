/** Steps that are out of the ordinary, found by their loss and gradient norm. */
import { mismatch, show } from '../util/errors.js'

export interface OutlierOptions {
  /** steps that are compared with, default 100 */
  window?: number
  /** a step further above the others than this is skipped, default 6 */
  z?: number
  /** steps before the first judgement, default 20 */
  warmup?: number
}

/** What each of them may be. */
export const OUTLIER_RANGES = {
  window: ['an integer >= 2', (x: number) => Number.isSafeInteger(x) && x >= 2],
  z: ['a number > 0', (x: number) => Number.isFinite(x) && x > 0],
  warmup: ['an integer > 0', (x: number) => Number.isSafeInteger(x) && x > 0],
} as const satisfies Record<keyof OutlierOptions, readonly [string, (x: number) => boolean]>

/** Part of a checkpoint. */
export interface OutlierState {
  losses: number[]
  norms: number[]
  skipped: number
}

const median = (values: readonly number[]): number => {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/**
 * How far `x` lies above the values, in standard deviations. Both are estimated from medians (Iglewicz & Hoaglin 1993), so outliers
 * may stay among the values: they do not hide the next one, and a level that stays becomes the normal one.
 */
export function zScore(x: number, values: readonly number[]): number {
  const middle = median(values)
  const spread = 1.4826 * median(values.map((v) => Math.abs(v - middle)))
  // Values that are all but equal say nothing about what is usual.
  return (x - middle) / Math.max(spread, 1e-3 * Math.abs(middle), Number.MIN_VALUE)
}

/** Says of a step, from its loss and gradient norm, whether it is out of the ordinary. A function of the steps before alone. */
export class Outliers {
  readonly #window: number
  readonly #z: number
  readonly #warmup: number
  #state: OutlierState = { losses: [], norms: [], skipped: 0 }

  constructor({ window = 100, z = 6, warmup = 20 }: OutlierOptions = {}) {
    for (const [name, value] of Object.entries({ window, z, warmup })) {
      const [expected, fits] = OUTLIER_RANGES[name as keyof OutlierOptions]
      if (!fits(value)) throw mismatch('ERR_ARGUMENT', 'train', `skipOutliers.${name}`, expected, show(value))
    }
    this.#window = window
    this.#z = z
    this.#warmup = warmup
  }

  get state(): OutlierState {
    const { losses, norms, skipped } = this.#state
    return { losses: [...losses], norms: [...norms], skipped }
  }
  restore(state: OutlierState): void {
    this.#state = { losses: [...state.losses], norms: [...state.norms], skipped: state.skipped }
  }
  /** Steps that were skipped. */
  get skipped(): number {
    return this.#state.skipped
  }

  /** Takes note of a step with finite numbers. */
  isOutlier(loss: number, norm: number): boolean {
    const { losses, norms } = this.#state
    const out =
      losses.length >= Math.min(this.#warmup, this.#window) &&
      (zScore(loss, losses) > this.#z || zScore(norm, norms) > this.#z)
    for (const [list, value] of [
      [losses, loss],
      [norms, norm],
    ] as const) {
      list.push(value)
      if (list.length > this.#window) list.shift()
    }
    if (out) this.#state.skipped++
    return out
  }
}

/** What watches over the steps of a run: outliers are skipped, and what was not a number can be looked at. */
import fs from 'node:fs'
import path from 'node:path'
import { native } from '../core/native.js'
import { scope } from '../core/tensor.js'
import { type StoredDtype, type TensorToWrite, writeSafetensors } from '../formats/safetensors.js'
import type { PackedBatch } from '../models/packed-batch.js'
import type { Parameter } from '../nn/adamw.js'
import { AlignGPTError } from '../util/errors.js'
import { writeJsonFile } from '../util/json.js'

export interface OutlierOptions {
  /** steps that are compared with, default 100 */
  window?: number
  /** a step further above the others than this is skipped, default 6 */
  z?: number
  /** steps before the first judgement, default 20 */
  warmup?: number
}

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
    for (const [name, value] of Object.entries({ window, z, warmup }))
      if (!(Number.isFinite(value) && value > 0))
        throw new AlignGPTError('ERR_ARGUMENT', `[train] skipOutliers.${name}: expected a number > 0, got ${value}`)
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

/** Records of some batches with their pictures, for a message. */
export function describeRecords(batches: readonly PackedBatch[]): string {
  const names = batches.flatMap((b) => {
    const pictures = new Map([...b.imageSamples].map((sample, m) => [sample, b.images[m]]))
    return b.ids.map((id, i) => (pictures.has(i) ? `${id} (${pictures.get(i)})` : id))
  })
  return `${names.slice(0, 32).join(', ')}${names.length > 32 ? ` and ${names.length - 32} more` : ''}`
}

const FIELDS = ['tokens', 'labels', 'offsets', 'positions', 'imageRows', 'alignRows', 'levels', 'pixels'] as const

function batchTensors(b: PackedBatch): TensorToWrite[] {
  return FIELDS.map((name) => {
    const data = b[name]
    const shape = name === 'pixels' ? [b.imageRows.length, 3, b.imageSize, b.imageSize] : [data.length]
    const dtype: StoredDtype = data instanceof Float32Array ? 'F32' : 'I32'
    return { name, dtype, shape, data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) }
  })
}

/** Norm of a tensor; where it is not finite, how many elements are not. */
function finiteness(handle: number): { norm: number; notFinite: number } {
  return scope(() => {
    const norm = Math.sqrt((native.read(native.sumSquares([handle])) as Float64Array)[0])
    let notFinite = 0
    if (!Number.isFinite(norm))
      for (const x of native.read(handle) as Float32Array) if (!Number.isFinite(x)) notFinite++
    return { norm, notFinite }
  })
}

/**
 * Leaves in a folder what a step consisted of: step.json with the numbers, the records and the norm of each parameter and its
 * gradient, and a safetensors file with the rows and pixels of each micro-batch.
 */
export function dumpStep(
  folder: string,
  numbers: Record<string, unknown>,
  batches: readonly PackedBatch[],
  parameters: readonly Parameter[],
): void {
  fs.mkdirSync(folder, { recursive: true })
  for (const [i, b] of batches.entries()) writeSafetensors(path.join(folder, `batch-${i}.safetensors`), batchTensors(b))
  // JSON has no NaN: numbers that are not finite are written as text
  const plain = (x: number): number | string => (Number.isFinite(x) ? x : String(x))
  const shown = (handle: number | null) => {
    if (handle === null) return null
    const { norm, notFinite } = finiteness(handle)
    return { norm: plain(norm), notFinite }
  }
  writeJsonFile(path.join(folder, 'step.json'), {
    ...Object.fromEntries(Object.entries(numbers).map(([k, v]) => [k, typeof v === 'number' ? plain(v) : v])),
    batches: batches.map((b) => ({ ids: b.ids, images: b.images })),
    parameters: parameters.map(({ name, tensor }) => ({
      name,
      weight: shown(tensor.h),
      gradient: scope(() => shown(native.grad(tensor.h))),
    })),
  })
}

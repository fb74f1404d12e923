/** A step that was not finite, so that it can be looked at. */
import fs from 'node:fs'
import path from 'node:path'
import { native } from '../core/native.js'
import { scope } from '../core/tensor.js'
import type { Parameter } from '../nn/adamw.js'
import { writeJsonFile } from '../util/json.js'

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
 * Leaves in a folder what a step consisted of: step.json with the numbers, and the norm of each parameter and its gradient.
 * @param dump writes the micro-batches; what it returns goes into step.json
 */
export function dumpStep(
  folder: string,
  numbers: Record<string, unknown>,
  parameters: readonly Parameter[],
  dump: (folder: string) => Record<string, unknown> = () => ({}),
): void {
  fs.mkdirSync(folder, { recursive: true })
  const batches = dump(folder)
  // JSON has no NaN: numbers that are not finite are written as text
  const plain = (x: number): number | string => (Number.isFinite(x) ? x : String(x))
  const shown = (handle: number | null) => {
    if (handle === null) return null
    const { norm, notFinite } = finiteness(handle)
    return { norm: plain(norm), notFinite }
  }
  writeJsonFile(path.join(folder, 'step.json'), {
    ...Object.fromEntries(Object.entries(numbers).map(([k, v]) => [k, typeof v === 'number' ? plain(v) : v])),
    ...batches,
    parameters: parameters.map(({ name, tensor }) => ({
      name,
      weight: shown(tensor.h),
      gradient: scope(() => shown(native.grad(tensor.h))),
    })),
  })
}

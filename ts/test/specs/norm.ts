/** Norms, softmax and unit rows. */
import * as ops from '../../src/core/ops.js'
import { unaryCases } from './elementwise.js'
import { type A, type Case, last, rows, type Spec } from './reference.js'

export const normCases: Case[] = [
  { inputs: [[3, 8], [8], [8]] },
  { inputs: [[1, 1], [1], [1]] },
  { inputs: [[0, 5], [5], [5]] },
  { inputs: [[2, 3, 33], [33], [33]] },
  { inputs: [[40, 17], [17], [17]] },
  { inputs: [[5, 100], [100], [100]] },
]
export const normalized = (row: A, eps: number, center: boolean): number[] => {
  const mean = center ? row.reduce((a, b) => a + b, 0) / row.length : 0
  const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / row.length
  return Array.from(row, (v) => (v - mean) / Math.sqrt(variance + eps))
}
export const norms: Spec[] = [
  {
    name: 'layerNorm',
    covers: ['layerNorm'],
    cases: normCases,
    run: ([x, w, b]) => ops.layerNorm(x, w, b, 1e-5),
    ref: ([x, w, b], [s]) => rows(x, last(s), (r) => normalized(r, 1e-5, true).map((v, i) => v * w[i] + b[i])),
  },
  {
    name: 'rmsNorm',
    covers: ['rmsNorm'],
    cases: normCases.map((c) => ({ inputs: c.inputs.slice(0, 2) })),
    run: ([x, w]) => ops.rmsNorm(x, w, 1e-6),
    ref: ([x, w], [s]) => rows(x, last(s), (r) => normalized(r, 1e-6, false).map((v, i) => v * w[i])),
  },
  {
    name: 'softmax',
    covers: ['softmax'],
    cases: unaryCases,
    range: 5,
    run: ([x]) => ops.softmax(x),
    ref: ([x], [s]) =>
      rows(x, Math.max(last(s), 1), (r) => {
        const top = Math.max(...r)
        const e = Array.from(r, (v) => Math.exp(v - top))
        const total = e.reduce((a, b) => a + b, 0)
        return e.map((v) => v / total)
      }),
  },
  {
    name: 'l2Normalize',
    covers: ['l2Normalize'],
    cases: unaryCases,
    run: ([x]) => ops.l2Normalize(x),
    ref: ([x], [s]) =>
      rows(x, Math.max(last(s), 1), (r) => {
        const n = Math.hypot(...r)
        return Array.from(r, (v) => v / n)
      }),
  },
]

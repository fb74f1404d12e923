/** Losses and sampling. */
import * as ops from '../../src/core/ops.js'
import { type A, i32, last, product, type Spec } from './reference.js'

export const nll = (logits: A, target: number): number => {
  const top = Math.max(...logits)
  return top + Math.log(logits.reduce((s, v) => s + Math.exp(v - top), 0)) - logits[target]
}
export const losses: Spec[] = [
  {
    name: 'crossEntropy',
    covers: ['crossEntropy'],
    cases: [
      [1, 1],
      [2, 3],
      [5, 33],
      [3, 64],
      [7, 10],
      [4, 100],
    ].map(([n, c]) => ({ inputs: [[n, c]] })),
    range: 4,
    run: ([x]) => ops.crossEntropy(x, i32(Array.from({ length: x.shape[0] }, (_, i) => (i * 3) % x.shape[1]))),
    ref: ([x], [[n, c]]) => {
      let s = 0
      for (let i = 0; i < n; i++) s += nll(x.subarray(i * c, (i + 1) * c), (i * 3) % c)
      return Float64Array.of(s / n)
    },
  },
  {
    name: 'lmHeadLoss',
    covers: ['lmHeadLoss'],
    cases: [
      {
        inputs: [
          [5, 4],
          [7, 4],
        ],
        o: { rows: [0, 2, 3], chunk: 2 },
      },
      {
        inputs: [
          [1, 1],
          [1, 1],
        ],
        o: { rows: [0], chunk: 8 },
      },
      {
        inputs: [
          [4, 3],
          [5, 3],
        ],
        o: { rows: [], chunk: 8 },
      },
      {
        inputs: [
          [9, 33],
          [40, 33],
        ],
        o: { rows: [8, 0, 1, 1, 5, 6, 7], chunk: 3 },
      },
      {
        inputs: [
          [30, 20],
          [100, 20],
        ],
        o: { rows: Array.from({ length: 29 }, (_, i) => i), chunk: 8 },
      },
      {
        inputs: [
          [3, 65],
          [33, 65],
        ],
        o: { rows: [2], chunk: 1 },
      },
    ],
    depth: (c) => last(c.inputs[0]),
    run: ([h, w], o) => {
      const targets = i32(o.rows.map((r: number) => (r * 5) % w.shape[0]))
      return ops.lmHeadLoss(h, w, i32(o.rows), targets, 3, o.chunk).loss
    },
    ref: ([h, w], [[, d], [v]], o) => {
      let s = 0
      for (const r of o.rows) s += nll(product(h.subarray(r * d, (r + 1) * d), w, 1, v, d, false, true), (r * 5) % v)
      return Float64Array.of(s / 3)
    },
  },
  {
    name: 'contrastiveLoss',
    covers: ['contrastiveLoss'],
    cases: [
      [1, 1],
      [2, 3],
      [5, 8],
      [3, 33],
      [16, 4],
      [7, 7],
    ].map(([n, d]) => ({ inputs: [[n, d], [n, d], [1]] })),
    depth: (c) => last(c.inputs[0]),
    run: ([a, b, s]) => ops.contrastiveLoss(a, b, s),
    ref: ([a, b, s], [[n, d]]) => {
      const z = product(a, b, n, n, d, false, true).map((v) => v * Math.exp(s[0]))
      let total = 0
      for (let i = 0; i < n; i++) {
        total += nll(z.subarray(i * n, (i + 1) * n), i)
        total += nll(
          Float64Array.from({ length: n }, (_, j) => z[j * n + i]),
          i,
        )
      }
      return Float64Array.of(total / 2 / n)
    },
  },
]

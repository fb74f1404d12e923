/** Elementwise ops, shapes and copies. */
import { native } from '../../src/core/native.js'
import * as ops from '../../src/core/ops.js'
import { Tensor } from '../../src/core/tensor.js'
import { type A, activations, type Case, i32, type Spec, sigmoid, size } from './reference.js'

export const unaryCases: Case[] = [
  { inputs: [[1]] },
  { inputs: [[0]] },
  { inputs: [[3, 7]] },
  { inputs: [[33]] },
  { inputs: [[5, 64]] },
  { inputs: [[2, 3, 129]] },
]
export const pairCases: Case[] = [
  {
    inputs: [
      [4, 6],
      [4, 6],
    ],
  },
  { inputs: [[4, 6], [6]] },
  {
    inputs: [
      [2, 3, 5],
      [3, 5],
    ],
  },
  { inputs: [[3, 33], [1]] },
  { inputs: [[0, 4], [4]] },
  { inputs: [[1], [1]] },
  { inputs: [[130, 70], [70]] },
]
export const suffix =
  (f: (a: number, b: number) => number) =>
  (x: A[]): A =>
    x[0].map((a, i) => f(a, x[1][i % x[1].length]))

export const elementwise: Spec[] = [
  ...(['gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'exp'] as const).map(
    (name): Spec => ({
      name,
      covers: ['unary'],
      cases: unaryCases,
      range: 4,
      run: ([x]) => new Tensor(native.unary(x.h, name)),
      ref: ([x]) => x.map(activations[name]),
    }),
  ),
  { name: 'add', covers: ['add'], cases: pairCases, run: ([a, b]) => ops.add(a, b), ref: suffix((a, b) => a + b) },
  { name: 'sub', covers: ['sub'], cases: pairCases, run: ([a, b]) => ops.sub(a, b), ref: suffix((a, b) => a - b) },
  { name: 'mul', covers: ['mul'], cases: pairCases, run: ([a, b]) => ops.mul(a, b), ref: suffix((a, b) => a * b) },
  {
    name: 'scale',
    covers: ['scale'],
    cases: unaryCases,
    run: ([x]) => ops.scale(x, -1.5),
    ref: ([x]) => x.map((v) => -1.5 * v),
  },
  {
    name: 'siluMul',
    covers: ['siluMul'],
    cases: unaryCases.map((c) => ({ inputs: [c.inputs[0], c.inputs[0]] })),
    range: 3,
    run: ([g, u]) => ops.siluMul(g, u),
    ref: ([g, u]) => g.map((v, i) => v * sigmoid(v) * u[i]),
  },
  {
    name: 'sum',
    covers: ['sum'],
    cases: unaryCases,
    depth: (c) => size(c.inputs[0]),
    run: ([x]) => ops.sum(x),
    ref: ([x]) => Float64Array.of(x.reduce((a, b) => a + b, 0)),
  },
  {
    name: 'mean',
    covers: ['mean'],
    cases: unaryCases.filter((c) => size(c.inputs[0]) > 0),
    run: ([x]) => ops.mean(x),
    ref: ([x]) => Float64Array.of(x.reduce((a, b) => a + b, 0) / x.length),
  },
  {
    name: 'reshape',
    covers: ['reshape'],
    cases: [
      { inputs: [[3, 4]], o: { to: [2, 6] } },
      { inputs: [[1]], o: { to: [] } },
      { inputs: [[0, 3]], o: { to: [3, 0] } },
      { inputs: [[5, 7]], o: { to: [35] } },
      { inputs: [[2, 2, 2]], o: { to: [4, 2] } },
      { inputs: [[9]], o: { to: [3, 3] } },
    ],
    run: ([x], o) => ops.reshape(x, o.to),
    ref: ([x]) => x,
  },
  {
    name: 'slice',
    covers: ['slice'],
    cases: [
      { inputs: [[5, 3]], o: { d: 0, a: 1, b: 4 } },
      { inputs: [[5, 3]], o: { d: 1, a: 1, b: 3 } },
      { inputs: [[2, 4, 3]], o: { d: 1, a: 0, b: 2 } },
      { inputs: [[7]], o: { d: 0, a: 3, b: 3 } },
      { inputs: [[1, 1]], o: { d: 1, a: 0, b: 1 } },
      { inputs: [[3, 5, 7]], o: { d: 2, a: 6, b: 7 } },
    ],
    run: ([x], o) => ops.slice(x, o.d, o.a, o.b),
    ref: ([x], [s], o) => {
      const inner = size(s.slice(o.d + 1))
      return x.filter((_, i) => {
        const at = Math.floor(i / inner) % s[o.d]
        return at >= o.a && at < o.b
      })
    },
  },
  {
    name: 'concat',
    covers: ['concat'],
    cases: [
      {
        inputs: [
          [2, 3],
          [4, 3],
        ],
        o: { d: 0 },
      },
      {
        inputs: [
          [2, 3],
          [2, 1],
          [2, 2],
        ],
        o: { d: 1 },
      },
      { inputs: [[1], [1]], o: { d: 0 } },
      {
        inputs: [
          [0, 4],
          [2, 4],
        ],
        o: { d: 0 },
      },
      {
        inputs: [
          [2, 3, 5],
          [2, 4, 5],
        ],
        o: { d: 1 },
      },
      { inputs: [[3, 33]], o: { d: 1 } },
    ],
    run: (xs, o) => ops.concat(xs, o.d),
    ref: (xs, shapes, o) => {
      const outer = size(shapes[0].slice(0, o.d))
      const widths = shapes.map((s) => size(s.slice(o.d)))
      const y: number[] = []
      for (let r = 0; r < outer; r++)
        for (const [i, x] of xs.entries()) y.push(...x.subarray(r * widths[i], (r + 1) * widths[i]))
      return Float64Array.from(y)
    },
  },
  ...(['gather', 'embedding'] as const).map(
    (name): Spec => ({
      name,
      covers: [name],
      cases: [
        { inputs: [[5, 3]], o: { index: [0, 4, 4, 2] } },
        { inputs: [[1, 1]], o: { index: [0] } },
        { inputs: [[4, 7]], o: { index: [] } },
        { inputs: [[6, 65]], o: { index: [5, 5, 5, 0, 1] } },
        { inputs: [[9, 33]], o: { index: [8, 0] } },
        { inputs: [[3, 130]], o: { index: [2, 1, 2, 1, 2, 1, 0] } },
      ],
      run: ([x], o) => (name === 'gather' ? ops.gather(x, i32(o.index)) : ops.embedding(i32(o.index), x)),
      ref: ([x], [s], o) =>
        Float64Array.from(o.index.flatMap((i: number) => [...x.subarray(i * s[1], (i + 1) * s[1])])),
    }),
  ),
  {
    name: 'castF32',
    covers: ['cast'],
    cases: unaryCases,
    gradient: false,
    run: ([x]) => ops.cast(ops.cast(x, 'f64'), 'f32'),
    ref: ([x]) => x.map(Math.fround),
  },
  {
    name: 'to',
    covers: ['to'],
    cases: unaryCases,
    run: ([x]) => ops.to(ops.scale(ops.to(x, 'cpu'), 2), x.device),
    ref: ([x]) => x.map((v) => 2 * v),
  },
]

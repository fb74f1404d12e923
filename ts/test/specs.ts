/**
 * One row per op: how to call it, a plain f64 reference, and the shapes to try. `op-checks.ts` makes from each row:
 * forward against the reference (f32, bf16, f64), gradient check in f64, run twice, one thread against two, no leak.
 */

import { native } from '../src/core/native.js'
import * as ops from '../src/core/ops.js'
import { noGrad, Tensor, tensor } from '../src/core/tensor.js'

type A = Float64Array
// biome-ignore lint/suspicious/noExplicitAny: each row has its own options
type Options = any
export interface Case {
  /** shapes of the float inputs */
  inputs: number[][]
  /** integers and flags the call needs */
  o?: Record<string, unknown>
}
export interface Spec {
  name: string
  /** native exports this row covers */
  covers: string[]
  cases: Case[]
  run(x: Tensor[], o: Options): Tensor
  ref(x: A[], shapes: number[][], o: Options): A
  /** longest sum, for the f32 tolerance */
  depth?(c: Case): number
  /** values are drawn from [-range, range] */
  range?: number
  gradient?: boolean
}

const size = (s: number[]): number => s.reduce((n, d) => n * d, 1)
const last = (s: number[]): number => s[s.length - 1]
const erf = (x: number): number => {
  // series for small, continued fraction for large arguments: 1e-15
  const a = Math.abs(x)
  if (a < 2.5) {
    let term = a
    let sum = a
    for (let n = 1; n < 100; n++) {
      term *= (-a * a) / n
      sum += term / (2 * n + 1)
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI)
  }
  let f = 0
  for (let n = 60; n > 0; n--) f = n / 2 / (a + f)
  return Math.sign(x) * (1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * (a + f)))
}
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x))
export const activations: Record<string, (x: number) => number> = {
  none: (x) => x,
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  quick_gelu: (x) => x * sigmoid(1.702 * x),
  silu: (x) => x * sigmoid(x),
  exp: Math.exp,
}

function product(a: A, b: A, m: number, n: number, k: number, ta: boolean, tb: boolean): A {
  const y = new Float64Array(m * n)
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let s = 0
      for (let p = 0; p < k; p++) s += a[ta ? p * m + i : i * k + p] * b[tb ? j * k + p : p * n + j]
      y[i * n + j] = s
    }
  return y
}
const rows = (x: A, cols: number, f: (row: A) => ArrayLike<number>): A => {
  const y = new Float64Array(x.length)
  for (let r = 0; r * cols < x.length; r++) y.set(Array.from(f(x.subarray(r * cols, (r + 1) * cols))), r * cols)
  return y
}
const i32 = (values: number[]): Tensor => tensor(Int32Array.from(values))

/** Softmax attention of one head, spelled out. */
export function attentionRef(q: A, k: A, v: A, o: Options): A {
  const { heads, kvHeads, causal, qo, ko } = o as {
    heads: number
    kvHeads: number
    causal: boolean
    qo: number[]
    ko: number[]
  }
  const dim = q.length / Math.max(qo[qo.length - 1], 1) / heads
  const scale = o.scale ?? 1 / Math.sqrt(dim)
  const out = new Float64Array(q.length)
  for (let s = 0; s + 1 < qo.length; s++) {
    const nq = qo[s + 1] - qo[s]
    const nk = ko[s + 1] - ko[s]
    for (let h = 0; h < heads; h++) {
      const g = Math.floor(h / (heads / kvHeads))
      for (let i = 0; i < nq; i++) {
        const n = causal ? Math.max(0, Math.min(nk, i + nk - nq + 1)) : nk
        const w: number[] = []
        for (let j = 0; j < n; j++) {
          let d = 0
          for (let c = 0; c < dim; c++)
            d += q[((qo[s] + i) * heads + h) * dim + c] * k[((ko[s] + j) * kvHeads + g) * dim + c]
          w.push(d * scale)
        }
        const top = Math.max(...w)
        const e = w.map((x) => Math.exp(x - top))
        const total = e.reduce((a, b) => a + b, 0)
        for (let c = 0; c < dim; c++)
          for (let j = 0; j < n; j++)
            out[((qo[s] + i) * heads + h) * dim + c] += (e[j] / total) * v[((ko[s] + j) * kvHeads + g) * dim + c]
      }
    }
  }
  return out
}

const unaryCases: Case[] = [
  { inputs: [[1]] },
  { inputs: [[0]] },
  { inputs: [[3, 7]] },
  { inputs: [[33]] },
  { inputs: [[5, 64]] },
  { inputs: [[2, 3, 129]] },
]
const pairCases: Case[] = [
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
const normCases: Case[] = [
  { inputs: [[3, 8], [8], [8]] },
  { inputs: [[1, 1], [1], [1]] },
  { inputs: [[0, 5], [5], [5]] },
  { inputs: [[2, 3, 33], [33], [33]] },
  { inputs: [[40, 17], [17], [17]] },
  { inputs: [[5, 100], [100], [100]] },
]
const suffix =
  (f: (a: number, b: number) => number) =>
  (x: A[]): A =>
    x[0].map((a, i) => f(a, x[1][i % x[1].length]))

const elementwise: Spec[] = [
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

const gemmShapes: [number, number, number][] = [
  [1, 1, 1],
  [2, 3, 4],
  [5, 7, 3],
  [0, 3, 2],
  [17, 33, 29],
  [40, 70, 130],
  [3, 80, 65],
]
const matrix: Spec[] = [
  ...[false, true].flatMap((ta) =>
    [false, true].map(
      (tb): Spec => ({
        name: `matmul${ta ? 'T' : 'N'}${tb ? 'T' : 'N'}`,
        covers: ['matmul'],
        cases: [...gemmShapes, [70, 300, 400] as [number, number, number]].map(([m, n, k]) => ({
          inputs: [ta ? [k, m] : [m, k], tb ? [n, k] : [k, n]],
          o: { m, n, k },
        })),
        depth: (c) => (c.o as { k: number }).k,
        run: ([a, b]) => ops.matmul(a, b, ta, tb),
        ref: ([a, b], _, o) => product(a, b, o.m, o.n, o.k, ta, tb),
      }),
    ),
  ),
  ...[true, false].map(
    (bias): Spec => ({
      name: `siluMulLinear${bias ? ' bias' : ''}`,
      covers: ['siluMulLinear'],
      cases: gemmShapes.map(([m, n, k]) => ({
        inputs: bias
          ? [[m, k], [m, k], [n, k], [n]]
          : [
              [m, k],
              [m, k],
              [n, k],
            ],
      })),
      depth: (c) => last(c.inputs[0]),
      run: ([g, u, w, b]) => ops.siluMulLinear(g, u, w, b),
      ref: ([g, u, w, b], [sg, , sw]) => {
        const h = g.map((v, i) => v * sigmoid(v) * u[i])
        return product(h, w, sg[0], sw[0], sw[1], false, true).map((v, i) => v + (b ? b[i % sw[0]] : 0))
      },
    }),
  ),
  ...(['none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'] as const).flatMap((act) =>
    [true, false].map(
      (bias): Spec => ({
        name: `linear ${act}${bias ? ' bias' : ''}`,
        covers: ['linear'],
        cases: gemmShapes.map(([m, n, k]) => ({
          inputs: bias
            ? [[m, k], [n, k], [n]]
            : [
                [m, k],
                [n, k],
              ],
        })),
        depth: (c) => last(c.inputs[0]),
        run: ([x, w, b]) => ops.linear(x, w, b, act),
        ref: ([x, w, b], [sx, sw]) =>
          product(x, w, sx[0], sw[0], sw[1], false, true).map((v, i) => activations[act](v + (b ? b[i % sw[0]] : 0))),
      }),
    ),
  ),
  {
    // op-checks.ts packs the inputs of every other row too
    name: 'linear with a packed weight',
    covers: ['pack', 'unpack'],
    cases: [...gemmShapes, [70, 300, 400] as const].map(([m, n, k]) => ({
      inputs: [
        [m, k],
        [n, k],
      ],
    })),
    depth: (c) => last(c.inputs[0]),
    run: ([x, w]) => {
      const frozen = w.detach()
      for (const transB of [true, false]) ops.pack(frozen, transB)
      return ops.linear(x, frozen)
    },
    ref: ([x, w], [sx, sw]) => product(x, w, sx[0], sw[0], sw[1], false, true),
  },
  {
    name: 'patchEmbedding',
    covers: ['patchEmbedding'],
    cases: [
      [1, 3, 4, 2, 5],
      [2, 3, 8, 4, 7],
      [3, 1, 6, 3, 2],
      [1, 1, 1, 1, 1],
      [2, 3, 32, 8, 33],
      [0, 3, 4, 2, 3],
    ].map(([m, c, s, p, d]) => ({
      inputs: [[m, c, s, s], [d, c, p, p], [d], [(s / p) ** 2 + 1, d]],
    })),
    depth: (c) => size(c.inputs[1].slice(1)),
    run: ([x, w, cls, pos]) => ops.patchEmbedding(x.detach(), w, cls, pos),
    ref: ([x, w, cls, pos], [[m, ch, s], [d, , p]]) => {
      const n = s / p
      const y = new Float64Array(m * (n * n + 1) * d)
      for (let i = 0; i < m; i++)
        for (let r = 0; r <= n * n; r++)
          for (let o = 0; o < d; o++) {
            let v = r === 0 ? cls[o] : 0
            if (r > 0)
              for (let c = 0; c < ch; c++)
                for (let a = 0; a < p; a++)
                  for (let b = 0; b < p; b++)
                    v +=
                      x[((i * ch + c) * s + Math.floor((r - 1) / n) * p + a) * s + ((r - 1) % n) * p + b] *
                      w[((o * ch + c) * p + a) * p + b]
            y[(i * (n * n + 1) + r) * d + o] = v + pos[r * d + o]
          }
      return y
    },
  },
]

const normalized = (row: A, eps: number, center: boolean): number[] => {
  const mean = center ? row.reduce((a, b) => a + b, 0) / row.length : 0
  const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / row.length
  return Array.from(row, (v) => (v - mean) / Math.sqrt(variance + eps))
}
const norms: Spec[] = [
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

const positions = (n: number): number[] => Array.from({ length: n }, (_, i) => (i * 7) % 11)
const table = (f: (x: number) => number, half: number): number[] =>
  Array.from({ length: 11 * half }, (_, i) => f(Math.floor(i / half) * 10000 ** (-(i % half) / half)))
const attentionCases: Case[] = [
  { heads: 2, kvHeads: 2, dim: 4, causal: true, qo: [0, 5], ko: [0, 5] },
  { heads: 2, kvHeads: 1, dim: 3, causal: false, qo: [0, 3, 4], ko: [0, 5, 6] },
  { heads: 4, kvHeads: 2, dim: 8, causal: true, qo: [0, 1, 1, 9], ko: [0, 1, 1, 9] },
  { heads: 1, kvHeads: 1, dim: 1, causal: true, qo: [0, 1], ko: [0, 1] },
  { heads: 2, kvHeads: 2, dim: 6, causal: true, qo: [0, 2, 5], ko: [0, 7, 12] },
  { heads: 3, kvHeads: 3, dim: 5, causal: false, qo: [0, 0], ko: [0, 4] },
  { heads: 2, kvHeads: 1, dim: 33, causal: true, qo: [0, 70, 150], ko: [0, 70, 150] },
  { heads: 1, kvHeads: 1, dim: 16, causal: false, qo: [0, 140], ko: [0, 300] },
].map((o) => ({
  inputs: [
    [o.qo.at(-1)!, o.heads * o.dim],
    [o.ko.at(-1)!, o.kvHeads * o.dim],
    [o.ko.at(-1)!, o.kvHeads * o.dim],
  ],
  o,
}))
const selfCases: Case[] = attentionCases
  .map((c) => c.o as { heads: number; kvHeads: number; dim: number; qo: number[]; ko: number[] })
  .filter((o) => String(o.qo) === String(o.ko))
  .map((o) => ({ inputs: [[o.qo.at(-1)!, (o.heads + 2 * o.kvHeads) * o.dim]], o }))
/** Positions and their tables for T rows. */
function ropeOf(x: Tensor, dim: number): { positions: Tensor; cos: Tensor; sin: Tensor } {
  const acc = x.dtype === 'f64' ? 'f64' : 'f32'
  const make = (f: (v: number) => number): Tensor =>
    tensor(Float64Array.from(table(f, dim / 2)), [11, dim / 2], acc, x.device)
  return { positions: i32(positions(x.shape[0])), cos: make(Math.cos), sin: make(Math.sin) }
}
/** Rows [queries | keys | values], spelled out. */
function qkvRef(x: A, shapes: number[][], w: A[], b: A[], plus: A | undefined, o: Options): A {
  const [[t, width]] = shapes
  const outputs = (o.h + 2 * o.kv) * o.d
  const bias = b.flatMap((v) => Array.from(v))
  const flat = Float64Array.from(w.flatMap((m) => Array.from(m)))
  const y = product(x, flat, t, outputs, width, false, true).map(
    (v, i) => v + (bias[i % outputs] ?? 0) + (plus?.[i] ?? 0),
  )
  if (!o.rope) return y
  const half = o.d / 2
  for (const [i, p] of positions(t).entries())
    for (let h = 0; h < o.h + o.kv; h++)
      for (let c = 0; c < half; c++) {
        const angle = p * 10000 ** (-c / half)
        const at = i * outputs + h * o.d + c
        const [u, v] = [y[at], y[at + half]]
        y[at] = u * Math.cos(angle) - v * Math.sin(angle)
        y[at + half] = v * Math.cos(angle) + u * Math.sin(angle)
      }
  return y
}
/** [rows, width, heads, kvHeads, dim] and what the call has besides. */
const qkvCases: Case[] = [
  { s: [1, 1, 1, 1, 2], rope: true },
  { s: [3, 5, 2, 2, 4], rope: true, bias: true },
  { s: [5, 7, 4, 2, 6], rope: true, plus: true },
  { s: [0, 3, 2, 1, 4], rope: true },
  { s: [7, 33, 3, 1, 66], rope: true, bias: true, plus: true },
  { s: [70, 40, 2, 1, 34], rope: true },
  { s: [4, 6, 2, 2, 5], bias: true },
  { s: [9, 8, 6, 3, 3] },
].map(({ s: [t, width, h, kv, d], rope = false, bias = false, plus = false }) => {
  const rows = [h, kv, kv].map((n) => n * d)
  return {
    inputs: [
      [t, width],
      ...rows.map((n) => [n, width]),
      ...(bias ? rows.map((n) => [n]) : []),
      ...(plus ? [[t, (h + 2 * kv) * d]] : []),
    ],
    o: { h, kv, d, rope, bias, plus },
  }
})
function runQkv(x: Tensor[], o: Options, apart: boolean): Tensor {
  const three = (first: number): [Tensor, Tensor, Tensor] => {
    if (apart) return [x[first], x[first + 1], x[first + 2]]
    const whole = ops.concat(x.slice(first, first + 3), 0)
    let at = 0
    return x.slice(first, first + 3).map((part) => {
      at += part.shape[0]
      return ops.slice(whole, 0, at - part.shape[0], at)
    }) as [Tensor, Tensor, Tensor]
  }
  return ops.qkvLinear(x[0], {
    heads: o.h,
    kvHeads: o.kv,
    weights: three(1),
    biases: o.bias ? three(4) : [],
    plus: o.plus ? x[x.length - 1] : null,
    rope: o.rope ? ropeOf(x[0], o.d) : undefined,
  })
}
const splitQkv = (x: A[], shapes: number[][], o: Options): A =>
  qkvRef(x[0], shapes, x.slice(1, 4), o.bias ? x.slice(4, 7) : [], o.plus ? x[x.length - 1] : undefined, o)
/** Columns first..end of rows of x. */
const columns = (x: A, width: number, first: number, end: number): A =>
  Float64Array.from(
    Array.from({ length: x.length / width }, (_, r) =>
      Array.from(x.subarray(r * width + first, r * width + end)),
    ).flat(),
  )

const attentions: Spec[] = [
  ...[true, false].map(
    (apart): Spec => ({
      name: apart ? 'qkvLinear' : 'qkvLinear, matrices behind each other',
      covers: ['qkvLinear'],
      cases: qkvCases,
      depth: (c) => c.inputs[0][1],
      run: (x, o) => runQkv(x, o, apart),
      ref: splitQkv,
    }),
  ),
  {
    name: 'qkvLinear into a cache',
    covers: ['qkvLinear'],
    cases: qkvCases.filter(({ o }) => o?.rope && !o.bias && !o.plus),
    depth: (c) => c.inputs[0][1],
    gradient: false,
    run: (x, o) =>
      noGrad(() => {
        const t = x[0].shape[0]
        const [k, v] = [0, 1].map(() => new Tensor(native.zeros([t + 1, 2, o.kv * o.d], x[0].dtype, x[0].device)))
        const slots = i32(Array.from({ length: t }, (_, i) => 2 * i + (i % 2)))
        const weights = [x[1], x[2], x[3]] as const
        const rope = ropeOf(x[0], o.d)
        const qkv = ops.qkvLinear(x[0], { heads: o.h, kvHeads: o.kv, weights, rope, cache: { k, v, slots } })
        return ops.concat(
          [qkv, k, v].map((a) => ops.reshape(a, [size([...a.shape])])),
          0,
        )
      }),
    ref: (x, shapes, o) => {
      const qkv = splitQkv(x, shapes, o)
      const [[t]] = shapes
      const width = o.kv * o.d
      const total = (o.h + 2 * o.kv) * o.d
      const caches = [o.h * o.d, o.h * o.d + width].map((first) => {
        const rowsOf = columns(qkv, total, first, first + width)
        const cache = new Float64Array((t + 1) * 2 * width)
        for (let i = 0; i < t; i++) cache.set(rowsOf.subarray(i * width, (i + 1) * width), (2 * i + (i % 2)) * width)
        return cache
      })
      return Float64Array.from([qkv, ...caches].flatMap((a) => Array.from(a)))
    },
  },
  {
    name: 'attention of rows with queries, keys and values',
    covers: ['attention'],
    cases: selfCases,
    range: 2,
    depth: (c) => c.inputs[0][0] + 16,
    run: ([qkv], o) => ops.selfAttention(qkv, i32(o.qo), o),
    ref: ([qkv], [[, total]], o) => {
      const [q, kv] = [o.heads * o.dim, o.kvHeads * o.dim]
      const part = (first: number, width: number): A => columns(qkv, total, first, first + width)
      return attentionRef(part(0, q), part(q, kv), part(q + kv, kv), o)
    },
  },
  {
    name: 'attention',
    covers: ['attention'],
    cases: attentionCases,
    range: 2,
    depth: (c) => c.inputs[1][0] + 16,
    run: ([q, k, v], o) => ops.attention(q, k, v, i32(o.qo), i32(o.ko), o),
    ref: ([q, k, v], _, o) => attentionRef(q, k, v, o),
  },
  {
    name: 'attentionCached',
    covers: ['attentionCached'],
    cases: attentionCases.filter((c) => (c.o as { causal: boolean }).causal),
    range: 2,
    depth: (c) => c.inputs[1][0] + 16,
    gradient: false,
    run: ([q, k, v], o) => {
      // every sequence gets its own blocks of 4, handed out backwards
      const batch = o.ko.length - 1
      const lens = Array.from({ length: batch }, (_, s) => o.ko[s + 1] - o.ko[s])
      const most = Math.max(1, ...lens.map((n) => Math.ceil(n / 4)))
      const blocks = batch * most
      const tableOf = Int32Array.from({ length: blocks }, (_, i) => blocks - 1 - i)
      const slots = lens.flatMap((n, s) =>
        Array.from({ length: n }, (_, j) => tableOf[s * most + (j >> 2)] * 4 + (j & 3)),
      )
      const width = k.shape[1]
      const source = Array<number>(blocks * 4).fill(0)
      for (const [i, slot] of slots.entries()) source[slot] = i
      const cache = [k, v].map((x) => ops.reshape(ops.gather(x, i32(source)), [blocks, 4, width]))
      const blockTable = tensor(tableOf, [batch, most])
      const dim = q.shape[1] / o.heads
      const qkv = ops.concat([q, new Tensor(native.zeros([q.shape[0], 2 * width], q.dtype, q.device))], 1)
      return new Tensor(
        native.attentionCached(
          qkv.h,
          cache[0].h,
          cache[1].h,
          i32(o.qo).h,
          blockTable.h,
          i32(lens).h,
          o.heads,
          o.kvHeads,
          1 / Math.sqrt(dim),
        ),
      )
    },
    ref: ([q, k, v], _, o) => attentionRef(q, k, v, o),
  },
]

// ---- alignMix -------------------------------------------------------------------------------------------
interface MixCase {
  images: number
  patches: number
  features: number
  hidden: number
  levels: number
  projector: boolean
  mode: 'level' | 'gate' | 'fixed'
  global?: boolean
}
/** A packed batch: each picture is [2 tokens with ALIGN between, image rows, 3 tokens]; a text-only sample at the end. */
function mixLayout(o: MixCase): {
  tokens: number[]
  imageRows: number[]
  alignRows: number[]
  gateIds: number[]
  gateOffsets: number[]
} {
  const l = {
    tokens: [] as number[],
    imageRows: [] as number[],
    alignRows: [] as number[],
    gateIds: [] as number[],
    gateOffsets: [0],
  }
  for (let m = 0; m < o.images; m++) {
    l.alignRows.push(l.tokens.length + 1)
    l.imageRows.push(l.tokens.length + 3)
    l.tokens.push(1, -1, 2, ...Array(o.patches).fill(-2), 3, (m + 4) % 9, 3)
    l.gateIds.push(2, 3, (m + 4) % 9, 3)
    l.gateOffsets.push(l.gateIds.length)
  }
  l.tokens.push(1, 5)
  return l
}
const mixInputs = (o: MixCase): number[][] => {
  const table = [
    [o.images * o.patches, o.features],
    [9, o.hidden],
    [o.levels, o.hidden],
  ]
  if (o.projector) table.push([o.hidden, o.features], [o.hidden])
  if (o.mode === 'gate') table.push([6, o.patches], [6], [o.levels - 1, 6], [o.levels - 1])
  return table
}
const mixCases: MixCase[] = [
  { images: 2, patches: 4, features: 3, hidden: 5, levels: 3, projector: true, mode: 'gate', global: true },
  { images: 1, patches: 1, features: 1, hidden: 1, levels: 2, projector: true, mode: 'gate', global: false },
  { images: 2, patches: 9, features: 33, hidden: 35, levels: 8, projector: true, mode: 'level' },
  { images: 3, patches: 2, features: 6, hidden: 6, levels: 4, projector: false, mode: 'gate', global: true },
  { images: 0, patches: 4, features: 3, hidden: 5, levels: 3, projector: true, mode: 'gate', global: true },
  { images: 2, patches: 16, features: 32, hidden: 48, levels: 6, projector: true, mode: 'fixed' },
  { images: 2, patches: 5, features: 70, hidden: 70, levels: 8, projector: true, mode: 'gate', global: true },
]
const fixedCoefficients = (o: MixCase): number[] =>
  Array.from({ length: o.images * o.levels }, (_, i) => ((i * 5) % 7) / 7)
const alignSpec: Spec = {
  name: 'alignMix',
  covers: ['alignMix'],
  cases: mixCases.map((o) => ({ inputs: mixInputs(o), o: o as unknown as Record<string, unknown> })),
  depth: (c) => (c.o as unknown as MixCase).features + (c.o as unknown as MixCase).hidden,
  run: (x, o: MixCase) => {
    const l = mixLayout(o)
    const [features, embed, table] = x
    const rest = x.slice(3)
    const [weight, bias] = o.projector ? rest.splice(0, 2) : [null, null]
    const acc = features.dtype === 'f64' ? 'f64' : 'f32'
    return ops.alignMix({
      x: features,
      weight,
      bias,
      embed,
      table,
      tokens: i32(l.tokens),
      imageRows: i32(l.imageRows),
      alignRows: i32(l.alignRows),
      patches: o.patches,
      mix:
        o.mode === 'gate'
          ? {
              mode: 'gate',
              ids: i32(l.gateIds),
              offsets: i32(l.gateOffsets),
              gate: rest as [Tensor, Tensor, Tensor, Tensor],
              global: o.global ?? true,
            }
          : o.mode === 'level'
            ? { mode: 'level', levels: i32(Array.from({ length: o.images }, (_, m) => (m * 3 + 1) % o.levels)) }
            : {
                mode: 'fixed',
                coefficients: tensor(Float64Array.from(fixedCoefficients(o)), [o.images, o.levels], acc, x[0].device),
              },
    }).inputsEmbeds
  },
  ref: (x, _, o: MixCase) => {
    const l = mixLayout(o)
    const [features, embed, table] = x
    const rest = x.slice(3)
    const [w, b] = o.projector ? rest.splice(0, 2) : [null, null]
    const H = o.hidden
    const out = new Float64Array(l.tokens.length * H)
    l.tokens.forEach((t, i) => {
      if (t >= 0) out.set(embed.subarray(t * H, (t + 1) * H), i * H)
    })
    for (let m = 0; m < o.images; m++) {
      const f = features.subarray(m * o.patches * o.features, (m + 1) * o.patches * o.features)
      const r = w && b ? product(f, w, o.patches, H, o.features, false, true).map((v, i) => v + b[i % H]) : f
      out.set(r, l.imageRows[m] * H)
      let coef = fixedCoefficients(o).slice(m * o.levels, (m + 1) * o.levels)
      if (o.mode === 'level') coef = coef.map((_, k) => Number(k === (m * 3 + 1) % o.levels))
      if (o.mode === 'gate') {
        const ids = l.gateIds.slice(l.gateOffsets[m], l.gateOffsets[m + 1])
        const mean = Array.from({ length: H }, (_, i) => ids.reduce((s, id) => s + embed[id * H + i], 0) / ids.length)
        const dots = Float64Array.from({ length: o.patches }, (_, p) =>
          mean.reduce((s, v, i) => s + v * r[p * H + i], 0),
        )
        const [w0, b0, w1, b1] = rest
        const h = product(dots, w0, 1, 6, o.patches, false, true).map((v, i) => activations.gelu(v + b0[i]))
        const z = product(h, w1, 1, o.levels - 1, 6, false, true).map((v, i) => Math.exp(v + b1[i]))
        const total = z.reduce((a, v) => a + v, 0)
        coef = [...z.map((v) => v / total), o.global ? 1 : 0]
      }
      for (let i = 0; i < H; i++) out[l.alignRows[m] * H + i] = coef.reduce((s, c, k) => s + c * table[k * H + i], 0)
    }
    return out
  },
}

// ---- losses ---------------------------------------------------------------------------------------------
const nll = (logits: A, target: number): number => {
  const top = Math.max(...logits)
  return top + Math.log(logits.reduce((s, v) => s + Math.exp(v - top), 0)) - logits[target]
}
const losses: Spec[] = [
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

export const specs: Spec[] = [...elementwise, ...matrix, ...norms, ...attentions, alignSpec, ...losses]

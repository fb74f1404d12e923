/** What a row is, and the plain f64 references that several topics share. */
import { type Tensor, tensor } from '../../src/core/tensor.js'

export type A = Float64Array
// biome-ignore lint/suspicious/noExplicitAny: each row has its own options
export type Options = any
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

export const size = (s: number[]): number => s.reduce((n, d) => n * d, 1)
export const last = (s: number[]): number => s[s.length - 1]
export const erf = (x: number): number => {
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
export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x))
export const activations: Record<string, (x: number) => number> = {
  none: (x) => x,
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  quick_gelu: (x) => x * sigmoid(1.702 * x),
  silu: (x) => x * sigmoid(x),
  exp: Math.exp,
}

export function product(a: A, b: A, m: number, n: number, k: number, ta: boolean, tb: boolean): A {
  const y = new Float64Array(m * n)
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let s = 0
      for (let p = 0; p < k; p++) s += a[ta ? p * m + i : i * k + p] * b[tb ? j * k + p : p * n + j]
      y[i * n + j] = s
    }
  return y
}
export const rows = (x: A, cols: number, f: (row: A) => ArrayLike<number>): A => {
  const y = new Float64Array(x.length)
  for (let r = 0; r * cols < x.length; r++) y.set(Array.from(f(x.subarray(r * cols, (r + 1) * cols))), r * cols)
  return y
}
export const i32 = (values: number[]): Tensor => tensor(Int32Array.from(values))

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

/** Attention, rotary embedding, the cache. */
import { native } from '../../src/core/native.js'
import * as ops from '../../src/core/ops.js'
import { noGrad, Tensor, tensor } from '../../src/core/tensor.js'
import { type A, attentionRef, type Case, i32, type Options, product, type Spec, size } from './reference.js'

export const positions = (n: number): number[] => Array.from({ length: n }, (_, i) => (i * 7) % 11)
export const table = (f: (x: number) => number, half: number): number[] =>
  Array.from({ length: 11 * half }, (_, i) => f(Math.floor(i / half) * 10000 ** (-(i % half) / half)))
export const attentionCases: Case[] = [
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
export const selfCases: Case[] = attentionCases
  .map((c) => c.o as { heads: number; kvHeads: number; dim: number; qo: number[]; ko: number[] })
  .filter((o) => String(o.qo) === String(o.ko))
  .map((o) => ({ inputs: [[o.qo.at(-1)!, (o.heads + 2 * o.kvHeads) * o.dim]], o }))
/** Positions and their tables for T rows. */
export function ropeOf(x: Tensor, dim: number): { positions: Tensor; cos: Tensor; sin: Tensor } {
  const acc = x.dtype === 'f64' ? 'f64' : 'f32'
  const make = (f: (v: number) => number): Tensor =>
    tensor(Float64Array.from(table(f, dim / 2)), [11, dim / 2], acc, x.device)
  return { positions: i32(positions(x.shape[0])), cos: make(Math.cos), sin: make(Math.sin) }
}
/** Rows [queries | keys | values], spelled out. */
export function qkvRef(x: A, shapes: number[][], w: A[], b: A[], plus: A | undefined, o: Options): A {
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
export const qkvCases: Case[] = [
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
export function runQkv(x: Tensor[], o: Options, apart: boolean): Tensor {
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
export const splitQkv = (x: A[], shapes: number[][], o: Options): A =>
  qkvRef(x[0], shapes, x.slice(1, 4), o.bias ? x.slice(4, 7) : [], o.plus ? x[x.length - 1] : undefined, o)
/** Columns first..end of rows of x. */
export const columns = (x: A, width: number, first: number, end: number): A =>
  Float64Array.from(
    Array.from({ length: x.length / width }, (_, r) =>
      Array.from(x.subarray(r * width + first, r * width + end)),
    ).flat(),
  )

export const attentions: Spec[] = [
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

/** alignMix. */
import * as ops from '../../src/core/ops.js'
import { type Tensor, tensor } from '../../src/core/tensor.js'
import { activations, i32, product, type Spec } from './reference.js'

export interface MixCase {
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
export function mixLayout(o: MixCase): {
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
export const mixInputs = (o: MixCase): number[][] => {
  const table = [
    [o.images * o.patches, o.features],
    [9, o.hidden],
    [o.levels, o.hidden],
  ]
  if (o.projector) table.push([o.hidden, o.features], [o.hidden])
  if (o.mode === 'gate') table.push([6, o.patches], [6], [o.levels - 1, 6], [o.levels - 1])
  return table
}
export const mixCases: MixCase[] = [
  { images: 2, patches: 4, features: 3, hidden: 5, levels: 3, projector: true, mode: 'gate', global: true },
  { images: 1, patches: 1, features: 1, hidden: 1, levels: 2, projector: true, mode: 'gate', global: false },
  { images: 2, patches: 9, features: 33, hidden: 35, levels: 8, projector: true, mode: 'level' },
  { images: 3, patches: 2, features: 6, hidden: 6, levels: 4, projector: false, mode: 'gate', global: true },
  { images: 0, patches: 4, features: 3, hidden: 5, levels: 3, projector: true, mode: 'gate', global: true },
  { images: 2, patches: 16, features: 32, hidden: 48, levels: 6, projector: true, mode: 'fixed' },
  { images: 2, patches: 5, features: 70, hidden: 70, levels: 8, projector: true, mode: 'gate', global: true },
]
export const fixedCoefficients = (o: MixCase): number[] =>
  Array.from({ length: o.images * o.levels }, (_, i) => ((i * 5) % 7) / 7)
export const alignSpec: Spec = {
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

/** Single operations against PyTorch's: matrix products, attention, AdamW, pointwise ops, alignMix, LM head. */
import { type Dtype, native } from '../../ts/src/core/native.js'
import * as ops from '../../ts/src/core/ops.js'
import { backward, noGrad, scope, Tensor, tensor, zeros } from '../../ts/src/core/tensor.js'
import { assertSame, type Digest, digest, integers, random, running, TOLERANCE } from './data.js'
import { type Comparison, type Context, compare, type Group, meanRow, type Result, worstRow } from './measure.js'

type Float = 'f32' | 'bf16'
const FLOATS: readonly Float[] = ['f32', 'bf16']

/** One operation of ours on inputs that live as long as the case; the counterpart of `Differentiated` in peer_kernels.py. */
export class Case {
  /** @param seed gradient of the result; 'one' for a loss, null: forward only */
  constructor(
    readonly inputs: Record<string, Tensor>,
    private readonly forward: () => Tensor,
    private readonly seed: Tensor | 'one' | null,
    private readonly constants: readonly Tensor[] = [],
  ) {
    if (seed !== null) for (const t of Object.values(inputs)) t.requiresGrad()
  }
  run(): void {
    this.#run(() => {})
  }
  #run(look: (out: Tensor) => void): void {
    scope(() => {
      if (this.seed === null) return look(noGrad(this.forward))
      for (const t of Object.values(this.inputs)) native.setGrad(t.h, null) // as PyTorch's grad = None
      const out = this.forward()
      backward(out, this.seed === 'one' ? undefined : this.seed)
      look(out)
    })
  }
  values(): Record<string, Digest> {
    const found: Record<string, Digest> = {}
    this.#run((out) => {
      found.out = digest(out)
      if (this.seed === null) return
      for (const [name, t] of Object.entries(this.inputs)) found[`d_${name}`] = digest(t.grad() as Tensor)
    })
    return found
  }
  dispose(): void {
    for (const t of [...Object.values(this.inputs), ...this.constants]) t.dispose()
    if (this.seed instanceof Tensor) this.seed.dispose()
  }
}

/** Checks that both sides compute the same, as TOLERANCE or `tolerance` says, and times them in turn. */
async function against(
  c: Context,
  label: string,
  mine: Case,
  kind: string,
  args: object,
  dtype: Float,
  tolerance: number = TOLERANCE[dtype],
): Promise<Comparison> {
  const peer = await c.peer.make(kind, args)
  try {
    await peer.time(1)
    assertSame(label, mine.values(), await peer.values(), tolerance)
    return await compare(c, label, () => mine.run(), peer)
  } finally {
    mine.dispose()
    await peer.drop()
  }
}

// ---- matrix products --------------------------------------------------------------------------------------
/** M, N, K of the products of a training step. */
const SHAPES = [
  [512, 512, 512],
  [1024, 1024, 1024],
  [2048, 2048, 2048],
  [2304, 2048, 512],
  [2304, 512, 2048],
  [576, 4096, 1024],
  [64, 32000, 512],
] as const

/** @param packed B is packed once, before anything is timed */
async function gemm(
  c: Context,
  m: number,
  n: number,
  k: number,
  trans: string,
  dtype: Float,
  packed = false,
): Promise<Comparison> {
  const label = `gemm ${dtype} ${m}x${n}x${k} ${trans}${packed ? ' packed' : ''}`
  const a = random(trans === 'TN' ? [k, m] : [m, k], 1, 1, dtype)
  const b = random(trans === 'NT' ? [n, k] : [k, n], 2, 1, dtype)
  if (packed) ops.pack(b, trans === 'NT')
  const product = (): Tensor => ops.matmul(a, b, trans === 'TN', trans === 'NT')
  const peer = await c.peer.make('gemm', { m, n, k, trans, dtype })
  try {
    await peer.time(1)
    const mine = scope(() => noGrad(() => digest(product())))
    assertSame(label, { c: mine }, await peer.values(), TOLERANCE[dtype])
    return await compare(c, label, () => scope(() => noGrad(() => void product())), peer)
  } finally {
    for (const t of [a, b]) t.dispose()
    await peer.drop()
  }
}

const gemmRows = (dtype: Float): Group => ({
  rows:
    dtype === 'f32'
      ? { 'gemm.f32.geomean': 1, 'gemm.f32.worst': 0.9 }
      : { 'gemm.bf16.geomean': 1.1, 'gemm.bf16.worst': 0.9, 'gemm.bf16.tn': 1.4 },
  async run(c) {
    const found: Comparison[] = []
    const work: number[] = []
    for (const [m, n, k] of SHAPES)
      for (const trans of ['NN', 'NT', 'TN']) {
        found.push(await gemm(c, m, n, k, trans, dtype))
        work.push(2e-9 * m * n * k)
      }
    const rows = [
      meanRow(`gemm.${dtype}.geomean`, found, '7 training shapes x NN, NT, TN', (i) => work[i]),
      worstRow(`gemm.${dtype}.worst`, found, (i) => work[i]),
    ]
    const tn = found.filter((f) => f.label.endsWith('TN'))
    if (dtype === 'bf16') rows.push(meanRow('gemm.bf16.tn', tn, 'weight gradients, 7 shapes', (i) => work[3 * i]))
    return rows
  },
})

const packedGemm: Group = {
  rows: { 'gemm.bf16.packed': 1.5 },
  async run(c) {
    const found: Comparison[] = []
    const work: number[] = []
    for (const [m, n, k] of SHAPES)
      for (const trans of ['NT', 'NN']) {
        found.push(await gemm(c, m, n, k, trans, 'bf16', true))
        work.push(2e-9 * m * n * k)
      }
    const note = '7 training shapes, a frozen weight packed once: forward (NT), input gradient (NN)'
    return [meanRow('gemm.bf16.packed', found, note, (i) => work[i])]
  },
}

// ---- attention --------------------------------------------------------------------------------------------
/** [sequences, rows of each], together about 2,048 rows. */
const LENGTHS = [
  [8, 256],
  [2, 1024],
  [1, 2048],
] as const

interface AttentionCase {
  lengths: readonly number[]
  heads: number
  dim: number
  causal: boolean
  dtype: Float
  backward: boolean
}

function attentionCase(a: AttentionCase): Case {
  const total = a.lengths.reduce((n, l) => n + l, 0)
  const make = (seed: number): Tensor => random([total, a.heads * a.dim], seed, 1, a.dtype)
  const [q, k, v] = [make(1), make(2), make(3)]
  const offsets = tensor(Int32Array.from(running(a.lengths))).persist()
  const o = { heads: a.heads, kvHeads: a.heads, causal: a.causal }
  const forward = (): Tensor => ops.attention(q, k, v, offsets, offsets, o)
  return new Case({ q, k, v }, forward, a.backward ? make(4) : null, [offsets])
}

const attentionRows = (dtype: Float): Group => ({
  rows: { [`attention.${dtype}.forward`]: 1.3, [`attention.${dtype}.both`]: dtype === 'f32' ? 1.3 : 2.5 },
  async run(c, wants) {
    const rows: Result[] = []
    for (const back of [false, true]) {
      const name = `attention.${dtype}.${back ? 'both' : 'forward'}`
      if (!wants(name)) continue
      const found: Comparison[] = []
      const work: number[] = []
      for (const causal of [true, false])
        for (const dim of [64, 128])
          for (const [batch, length] of LENGTHS) {
            const heads = 512 / dim
            const args = { batch, heads, length, dim, causal, dtype, backward: back }
            const mine = attentionCase({ ...args, lengths: new Array<number>(batch).fill(length) })
            const label = `${name} ${causal ? 'causal' : 'full'} B${batch} H${heads} S${length} D${dim}`
            found.push(await against(c, label, mine, 'attention', args, dtype))
            // 2 products forward, 5 back; half of the square when causal
            work.push(((back ? 14e-9 : 4e-9) * batch * length ** 2 * 512) / (causal ? 2 : 1))
          }
      rows.push(meanRow(name, found, 'causal and full, head dim 64 and 128, 256-2048 tokens', (i) => work[i]))
    }
    return rows
  },
})

/** Text lengths of the uneven rows, 16-512. */
export const UNEVEN = [512, 16, 208, 96, 384, 48, 288, 144]

const packedAttention: Group = {
  rows: { 'attention.packed': 2 },
  async run(c) {
    const found: Comparison[] = []
    for (const dim of [64, 128]) {
      const heads = 512 / dim
      const a = {
        lengths: UNEVEN.map((l) => l + 258),
        heads,
        dim,
        causal: true,
        dtype: 'bf16',
        backward: true,
      } as const
      const args = { lengths: a.lengths, heads, dim, dtype: a.dtype }
      found.push(
        await against(c, `attention.packed H${heads} D${dim}`, attentionCase(a), 'packed_attention', args, 'bf16'),
      )
    }
    return [meanRow('attention.packed', found, 'causal, 8 sequences of 274-770 rows, forward + backward, bf16')]
  },
}

// ---- AdamW ------------------------------------------------------------------------------------------------
/** 52.7 M parameters in 128 tensors: two tables and 14 layers of a LLaMA. */
const ADAMW_SHAPES: number[][] = [
  ...Array.from({ length: 2 }, () => [8192, 512]),
  ...Array.from({ length: 14 }, () => [
    ...Array.from({ length: 4 }, () => [512, 512]),
    [1376, 512],
    [1376, 512],
    [512, 1376],
    [512],
    [512],
  ]).flat(),
]

const adamw: Group = {
  rows: { adamw: 1.2 },
  async run(c) {
    const lr = 1e-3
    const parameters = ADAMW_SHAPES.map((s, i) => random(s, 2 * i, 0.02))
    const gradients = ADAMW_SHAPES.map((s, i) => random(s, 2 * i + 1, 1e-3))
    const moments = [0, 1].map(() => ADAMW_SHAPES.map((s) => zeros(s).persist()))
    const [p, g, m, v] = [parameters, gradients, ...moments].map((ts) => ts.map((t) => t.h))
    const each = <T>(value: T): T[] => parameters.map(() => value)
    let step = 0
    const state = { params: p, grads: g, masters: each(null), m, v, lrScale: each(1), weightDecay: each(0) }
    const rates = { beta1: 0.9, beta2: 0.999, eps: 1e-8, lr, normSquared: null, maxNorm: 0, seed: 0 }
    const run = (): void => native.adamw({ ...state, ...rates, step: ++step })
    const peer = await c.peer.make('adamw', { shapes: ADAMW_SHAPES, lr })
    try {
      run()
      await peer.time(1)
      const shown = [0, 2, 7, parameters.length - 1].map((i) => [i, digest(parameters[i])])
      assertSame('adamw', Object.fromEntries(shown), await peer.values(), TOLERANCE.f32)
      const found = await compare(c, 'adamw 52.7 M parameters, 128 tensors', run, peer)
      return [meanRow('adamw', [found], '52.7 M f32 parameters in 128 tensors, fused, the update alone')]
    } finally {
      for (const t of [parameters, gradients, ...moments].flat()) t.dispose()
      await peer.drop()
    }
  },
}

// ---- pointwise --------------------------------------------------------------------------------------------
const WIDTHS = { rmsNorm: 512, layerNorm: 512, gelu: 1376, siluMul: 1376 } as const

function pointwiseCase(name: keyof typeof WIDTHS, rows: number, dtype: Float): Case {
  const width = WIDTHS[name]
  const full = (seed: number): Tensor => random([rows, width], seed, 1, dtype)
  const x = full(1)
  const seed = full(4)
  const affine = (s: number, offset: number): Tensor => random([width], s, 0.5, dtype, offset)
  if (name === 'gelu') return new Case({ x }, () => ops.gelu(x), seed)
  if (name === 'siluMul') {
    const up = full(3)
    return new Case({ x, up }, () => ops.siluMul(x, up), seed)
  }
  const w = affine(2, 1)
  if (name === 'rmsNorm') return new Case({ x, w }, () => ops.rmsNorm(x, w, 1e-5), seed)
  const b = affine(3, 0)
  return new Case({ x, w, b }, () => ops.layerNorm(x, w, b, 1e-5), seed)
}

const pointwise: Group = {
  rows: { 'pointwise.worst': 1 },
  async run(c) {
    const rows = 2576
    const found: Comparison[] = []
    // PyTorch sums the weight gradients of a bf16 norm in bf16: off by 0.17 of their root mean square against f64
    const tolerance = { ...TOLERANCE, bf16: 3e-2 }
    for (const dtype of FLOATS)
      for (const name of Object.keys(WIDTHS) as (keyof typeof WIDTHS)[]) {
        const args = { name, rows, width: WIDTHS[name], dtype }
        const mine = pointwiseCase(name, rows, dtype)
        const label = `${name} ${dtype} ${rows}x${WIDTHS[name]}`
        found.push(await against(c, label, mine, 'pointwise', args, dtype, tolerance[dtype]))
      }
    return [worstRow('pointwise.worst', found)]
  },
}

// ---- alignMix ---------------------------------------------------------------------------------------------
interface Mix {
  images: number
  patches: number
  features: number
  hidden: number
  text: number
  vocab: number
  levels: number
}
const MIXES: Mix[] = [
  { images: 2, patches: 576, features: 1024, hidden: 4096, text: 64, vocab: 1024, levels: 8 },
  { images: 8, patches: 256, features: 256, hidden: 512, text: 64, vocab: 1024, levels: 8 },
]

function alignMixCase(o: Mix, dtype: Float): Case {
  const { images: m, patches, features, hidden, text, vocab, levels } = o
  const make = (shape: number[], seed: number, scale: number): Tensor => random(shape, seed, scale, dtype)
  const x = make([m * patches, features], 1, 1)
  const weight = make([hidden, features], 2, features ** -0.5)
  const bias = make([hidden], 3, 0.1)
  const embed = make([vocab, hidden], 4, 0.1)
  const table = make([levels, hidden], 5, 0.1)
  const w0 = make([256, patches], 6, patches ** -0.5)
  const b0 = make([256], 7, 0.1)
  const w1 = make([levels - 1, 256], 8, 0.1)
  const b1 = make([levels - 1], 9, 0.1)
  const ids = integers(m * text, 10, 2, vocab)
  const picture = new Array<number>(patches).fill(-2)
  const tokens = Array.from({ length: m }, (_, i) => [1, -1, ...picture, ...ids.subarray(i * text, (i + 1) * text)])
  const rows = 2 + patches + text
  const whole = (values: Iterable<number>): Tensor => tensor(Int32Array.from(values)).persist()
  const starts = (first: number): Tensor => whole(Array.from({ length: m }, (_, i) => i * rows + first))
  const [all, imageRows, alignRows] = [whole(tokens.flat()), starts(2), starts(1)]
  const [gateIds, offsets] = [whole(ids), whole(Array.from({ length: m + 1 }, (_, i) => i * text))]
  const gate: [Tensor, Tensor, Tensor, Tensor] = [w0, b0, w1, b1]
  const mix = { mode: 'gate', ids: gateIds, offsets, gate, global: true } as const
  const args = { x, weight, bias, embed, table, tokens: all, imageRows, alignRows, patches, mix }
  return new Case(
    { x, weight, bias, embed, w0, b0, w1, b1 },
    () => ops.alignMix(args).inputsEmbeds,
    make([m * rows, hidden], 11, 0.1),
    [table, all, imageRows, alignRows, gateIds, offsets],
  )
}

const alignMix: Group = {
  rows: { alignmix: 1.2 },
  async run(c) {
    const found: Comparison[] = []
    for (const dtype of FLOATS)
      for (const o of MIXES) {
        const label = `alignmix ${dtype} ${o.images}x${o.patches}x${o.features} -> ${o.hidden}`
        const both: Comparison[] = []
        for (const compiled of [false, true]) {
          const name = `${label} ${compiled ? 'compiled' : 'eager'}`
          both.push(await against(c, name, alignMixCase(o, dtype), 'alignmix', { ...o, dtype, compiled }, dtype))
        }
        found.push(both[0].peer < both[1].peer ? both[0] : both[1])
      }
    return [meanRow('alignmix', found, 'forward + backward, two sizes, f32 and bf16, better of eager and compiled')]
  },
}

// ---- LM head ----------------------------------------------------------------------------------------------
/** Every fifth row is labelled. */
export const HEAD = { rows: 2048, hidden: 512, vocab: 32000, every: 5 }

export function lmHeadCase(dtype: Dtype): Case {
  const { rows, hidden: width, vocab, every } = HEAD
  const hidden = random([rows, width], 1, 1, dtype)
  const weight = random([vocab, width], 2, 0.05, dtype)
  const labels = integers(rows, 3, 0, vocab)
  const labelled = Int32Array.from({ length: Math.ceil(rows / every) }, (_, i) => i * every)
  const at = tensor(labelled).persist()
  const targets = tensor(labelled.map((r) => labels[r])).persist()
  const forward = (): Tensor => ops.lmHeadLoss(hidden, weight, at, targets, labelled.length).loss
  return new Case({ hidden, weight }, forward, 'one', [at, targets])
}

const lmHead: Group = {
  rows: { 'lmhead.time': 4 },
  async run(c) {
    const found: Comparison[] = []
    for (const dtype of FLOATS)
      found.push(await against(c, `lmhead ${dtype}`, lmHeadCase(dtype), 'lmhead', { ...HEAD, dtype }, dtype))
    return [meanRow('lmhead.time', found, '2048 rows, 20 % labelled, 512 -> 32000, f32 and bf16; peer on all rows')]
  },
}

export const kernelGroups: Group[] = [
  gemmRows('f32'),
  gemmRows('bf16'),
  packedGemm,
  attentionRows('f32'),
  attentionRows('bf16'),
  packedAttention,
  alignMix,
  adamw,
  pointwise,
  lmHead,
]

/**
 * The ops, as thin as they can be: arguments are checked in C++ (native/ops), which also records how to go back.
 * Shapes: B batch, T tokens, D/H width, V vocabulary, P patches, M images, N alignment levels.
 */
import { native } from './native.js'
import { type Device, type Dtype, Tensor } from './tensor.js'

export type Activation = 'none' | 'gelu' | 'gelu_tanh' | 'quick_gelu' | 'silu'

const wrap = (h: number): Tensor => new Tensor(h)
const handle = (t: Tensor | null | undefined): number | null => t?.h ?? null

export const cast = (x: Tensor, dtype: Dtype): Tensor => wrap(native.cast(x.h, dtype))
/** The same values on another device. */
export const to = (x: Tensor, device: Device): Tensor => wrap(native.to(x.h, device))
/** The same elements in another shape. */
export const reshape = (x: Tensor, shape: readonly number[]): Tensor => wrap(native.reshape(x.h, [...shape]))
/** x[..., start:end, ...] along `dim`; a view when everything before `dim` has one element. */
export const slice = (x: Tensor, dim: number, start: number, end: number): Tensor =>
  wrap(native.slice(x.h, dim, start, end))
export const concat = (xs: readonly Tensor[], dim: number): Tensor =>
  wrap(
    native.concat(
      xs.map((x) => x.h),
      dim,
    ),
  )
/** Rows of x [n, ...] by index i32 [m] -> [m, ...]. */
export const gather = (x: Tensor, index: Tensor): Tensor => wrap(native.gather(x.h, index.h))
/** ids i32 [T], table [V, D] -> [T, D]; the gradient is summed in the order of T. */
export const embedding = (ids: Tensor, table: Tensor): Tensor => wrap(native.embedding(ids.h, table.h))
/** a + b; b has a's shape, a suffix of it, or one element. */
export const add = (a: Tensor, b: Tensor): Tensor => wrap(native.add(a.h, b.h))
export const sub = (a: Tensor, b: Tensor): Tensor => wrap(native.sub(a.h, b.h))
export const mul = (a: Tensor, b: Tensor): Tensor => wrap(native.mul(a.h, b.h))
export const scale = (x: Tensor, alpha: number): Tensor => wrap(native.scale(x.h, alpha))
/** GELU with erf. */
export const gelu = (x: Tensor): Tensor => wrap(native.unary(x.h, 'gelu'))
export const geluTanh = (x: Tensor): Tensor => wrap(native.unary(x.h, 'gelu_tanh'))
/** x * sigmoid(1.702 x), OpenAI CLIP's activation. */
export const quickGelu = (x: Tensor): Tensor => wrap(native.unary(x.h, 'quick_gelu'))
export const silu = (x: Tensor): Tensor => wrap(native.unary(x.h, 'silu'))
export const exp = (x: Tensor): Tensor => wrap(native.unary(x.h, 'exp'))
/** silu(gate) * up */
export const siluMul = (gate: Tensor, up: Tensor): Tensor => wrap(native.siluMul(gate.h, up.h))
export const sum = (x: Tensor): Tensor => wrap(native.sum(x.h))
export const mean = (x: Tensor): Tensor => wrap(native.mean(x.h))
/**
 * Keeps a frozen matrix [R, C] once more in the layout its products take fastest; the results are the same bits. Whatever
 * writes to it or makes it a parameter drops that, so it is never stale.
 * @param transB for x W^T (linear, the LM head, alignMix), else for x W (gradients of their inputs)
 * @returns bytes that takes, until `unpack` or the end of the tensor
 */
export const pack = (weight: Tensor, transB = true): number => native.pack(weight.h, transB)
export const unpack = (weight: Tensor): void => native.unpack(weight.h)
/** act(x W^T + b): x [..., K], weight [N, K], bias [N] -> [..., N] */
export const linear = (x: Tensor, weight: Tensor, bias?: Tensor | null, activation: Activation = 'none'): Tensor =>
  wrap(native.linear(x.h, weight.h, handle(bias), activation))
/** (silu(gate) * up) W^T + b: gate, up [..., K], weight [N, K], bias [N] -> [..., N]; backward computes the product again. */
export const siluMulLinear = (gate: Tensor, up: Tensor, weight: Tensor, bias?: Tensor | null): Tensor =>
  wrap(native.siluMulLinear(gate.h, up.h, weight.h, handle(bias)))
/** op(a) op(b) of two matrices. */
export const matmul = (a: Tensor, b: Tensor, transA = false, transB = false): Tensor =>
  wrap(native.matmul(a.h, b.h, transA, transB))
/** pixels [M, C, S, S], weight [D, C, p, p], cls [D], position [P+1, D] -> [M, P+1, D] (CLIP's input embedding). */
export const patchEmbedding = (pixels: Tensor, weight: Tensor, cls: Tensor, position: Tensor): Tensor =>
  wrap(native.patchEmbedding(pixels.h, weight.h, cls.h, position.h))
export const layerNorm = (x: Tensor, weight: Tensor, bias: Tensor, eps: number): Tensor =>
  wrap(native.layerNorm(x.h, weight.h, bias.h, eps))
export const rmsNorm = (x: Tensor, weight: Tensor, eps: number): Tensor => wrap(native.rmsNorm(x.h, weight.h, eps))
/** Over the last dimension. */
export const softmax = (x: Tensor): Tensor => wrap(native.softmax(x.h))
/** x / |x| per row of the last dimension, without an epsilon (as CLIP). */
export const l2Normalize = (x: Tensor): Tensor => wrap(native.l2Normalize(x.h))

export interface QkvArgs {
  heads: number
  kvHeads: number
  /** of queries [heads*dim, D], keys and values [kvHeads*dim, D]; one product where they lie behind each other (nn.ts, adjoin) */
  weights: readonly [Tensor, Tensor, Tensor]
  /** of all three, or none */
  biases?: readonly Tensor[]
  /** [T, (heads + 2*kvHeads)*dim], added to the products */
  plus?: Tensor | null
  /** rotary embedding of queries and keys, Hugging Face layout: positions i32 [T], cos and sin [max, dim/2] */
  rope?: { positions: Tensor; cos: Tensor; sin: Tensor }
  /** caches [blocks, block, kvHeads*dim] into whose rows `slots` (i32 [T], ascending) keys and values go, too; not differentiable */
  cache?: { k: Tensor; v: Tensor; slots: Tensor }
}
/** Queries, keys and values of rows x [T, D] beside each other: [T, (heads + 2*kvHeads)*dim], for `selfAttention`. */
export const qkvLinear = (x: Tensor, a: QkvArgs): Tensor =>
  wrap(
    native.qkvLinear({
      x: x.h,
      heads: a.heads,
      kvHeads: a.kvHeads,
      weights: a.weights.map((t) => t.h),
      biases: (a.biases ?? []).map((t) => t.h),
      plus: handle(a.plus),
      position: handle(a.rope?.positions),
      cos: handle(a.rope?.cos),
      sin: handle(a.rope?.sin),
      kCache: handle(a.cache?.k),
      vCache: handle(a.cache?.v),
      slots: handle(a.cache?.slots),
    }),
  )

export interface AttentionOptions {
  heads: number
  kvHeads: number
  causal: boolean
  /** default 1 / sqrt(head dim) */
  scale?: number
}
/** Packed sequences: q [T, heads*dim], k and v [S, kvHeads*dim], offsets i32 [B+1] -> [T, heads*dim]. */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  qOffsets: Tensor,
  kOffsets: Tensor,
  o: AttentionOptions,
): Tensor {
  const scale = o.scale ?? 1 / Math.sqrt(q.shape[1] / o.heads)
  return wrap(native.attention(q.h, k.h, v.h, qOffsets.h, kOffsets.h, o.heads, o.kvHeads, o.causal, scale))
}

/** The same for rows of `qkvLinear` [T, (heads + 2*kvHeads)*dim], each sequence attending to itself -> [T, heads*dim]. */
export function selfAttention(qkv: Tensor, offsets: Tensor, o: AttentionOptions): Tensor {
  const scale = o.scale ?? 1 / Math.sqrt(qkv.shape[1] / (o.heads + 2 * o.kvHeads))
  return wrap(native.attention(qkv.h, null, null, offsets.h, offsets.h, o.heads, o.kvHeads, o.causal, scale))
}

export interface AlignMixArgs {
  /** input of the last projector layer [M*P, features] */
  x: Tensor
  /** last projector layer [H, features]; null: identity */
  weight: Tensor | null
  bias: Tensor | null
  /** token embeddings [V, H] */
  embed: Tensor
  /** alignment embeddings [N, H] */
  table: Tensor
  /** i32 [T]: token id, -1 alignment row, -2 image row */
  tokens: Tensor
  /** i32 [M]: first image row of each picture in the packed sequence */
  imageRows: Tensor
  /** i32 [M] */
  alignRows: Tensor
  patches: number
  /** level: one-hot; gate: softmax of the gate, plus the global row; fixed: the given coefficients */
  mix:
    | { mode: 'level'; levels: Tensor }
    | { mode: 'gate'; ids: Tensor; offsets: Tensor; gate: [Tensor, Tensor, Tensor, Tensor]; global: boolean }
    | { mode: 'fixed'; coefficients: Tensor }
}
export interface AlignMixResult {
  /** [T, H] */
  inputsEmbeds: Tensor
  /** [M, H] (gate only, else no rows) */
  textMean: Tensor
  /** [M, P] */
  dots: Tensor
  /** [M, N-1] */
  gateLogits: Tensor
  /** weight of each row of the table, [M, N] */
  coefficients: Tensor
}
/**
 * The fused projector-plus-alignment mixing (arXiv 2405.14129, section 3): projects the image rows into their places in
 * the packed sequence, mixes the alignment vector and puts the token embeddings around them.
 */
export function alignMix(a: AlignMixArgs): AlignMixResult {
  const { mix } = a
  const [inputsEmbeds, textMean, dots, gateLogits, coefficients] = native
    .alignMix({
      x: a.x.h,
      weight: handle(a.weight),
      bias: handle(a.bias),
      embed: a.embed.h,
      table: a.table.h,
      tokens: a.tokens.h,
      imageRows: a.imageRows.h,
      alignRows: a.alignRows.h,
      patches: a.patches,
      mode: mix.mode,
      levels: mix.mode === 'level' ? mix.levels.h : null,
      coefficients: mix.mode === 'fixed' ? mix.coefficients.h : null,
      gateIds: mix.mode === 'gate' ? mix.ids.h : null,
      gateOffsets: mix.mode === 'gate' ? mix.offsets.h : null,
      gate: mix.mode === 'gate' ? mix.gate.map((t) => t.h) : [],
      global: mix.mode === 'gate' ? mix.global : false,
    })
    .map(wrap)
  return { inputsEmbeds, textMean, dots, gateLogits, coefficients }
}

/** Rows of the LM head at a time: as many as make 4 MB of f32 logits, which a CPU's cache holds. */
export const headChunk = (vocabulary: number): number => Math.min(1024, Math.max(64, Math.floor(2 ** 20 / vocabulary)))

/**
 * Cross entropy of hidden[rows] W^T against targets, summed and divided by `denominator`; logits exist for one chunk of
 * rows at a time. hidden [T, H], weight [V, H], rows and targets i32 [R]; a row whose target is -100 counts for nothing.
 * @param chunk rows, default headChunk
 * @param scale one number (f32; f64 for f64) on the device of `hidden`: loss and gradients are multiplied with it
 */
export function lmHeadLoss(
  hidden: Tensor,
  weight: Tensor,
  rows: Tensor,
  targets: Tensor,
  denominator: number,
  chunk = headChunk(weight.shape[0]),
  scale?: Tensor,
): { loss: Tensor; nll: Tensor } {
  const args = [hidden.h, weight.h, rows.h, targets.h, denominator, chunk, scale?.h ?? null] as const
  const [loss, nll] = native.lmHeadLoss(...args).map(wrap)
  return { loss, nll }
}
/** Mean cross entropy of logits [R, C] against targets i32 [R]. */
export const crossEntropy = (logits: Tensor, targets: Tensor): Tensor => wrap(native.crossEntropy(logits.h, targets.h))
/** CLIP's symmetric loss: image and text [B, D] with unit rows, logScale one element (natural log of the temperature's inverse). */
export const contrastiveLoss = (image: Tensor, text: Tensor, logScale: Tensor): Tensor =>
  wrap(native.contrastiveLoss(image.h, text.h, logScale.h))

/** How `sample` chooses. */
export interface SampleOptions {
  /** 0: always the most likely */
  temperature: number
  /** 0: all */
  topK: number
  /** 1: all */
  topP: number
}

/** Picks an entry of each row. @param logits f32 [B, V] @param uniform a number in [0, 1) for each row */
export const sample = (logits: Tensor, o: SampleOptions, uniform: number[]): number[] =>
  native.sample(logits.h, o.temperature, o.topK, o.topP, uniform)

/** Writes one value into every element. */
export const fill = (x: Tensor, value: number): void => native.fill(x.h, value)

/** What a training step takes of a device's memory, computed before anything is allocated. */

import { headChunk } from '../core/ops.js'
import { GATE_HIDDEN } from '../models/align.js'
import type { ClipVisionConfig } from '../models/config/clip.js'
import type { LanguageModelConfig } from '../models/config/language-model.js'
import type { Gate } from '../models/config/variants.js'
import type { OptimizerState } from '../nn/adamw.js'
import { isTarget, type LoraOptions } from '../nn/lora.js'
import { AlignGPTError } from '../util/errors.js'
import type { Phase } from './phases.js'

/** What the plan reads of a language model's config. */
type LanguageShape = LanguageModelConfig & { attention_bias?: boolean; mlp_bias?: boolean }

/** Sizes of a model; readAlignGPTConfig and readClipConfig give `llm` and `vision`. */
export interface PlanModel {
  llm: LanguageShape
  vision: ClipVisionConfig
  /** mm_projector_type: linear, mlpNx_gelu or identity */
  projector: string
  /** N, rows of the alignment table */
  levels: number
  /** form of the gate, default mlp */
  gate?: Gate
}

export interface PlanOptions {
  phase: Phase['name']
  dtype: 'f32' | 'bf16'
  /** samples run at once */
  microBatch: number
  /** samples of a step; default microBatch */
  batch?: number
  /** text tokens of a sample, without picture and alignment vector */
  textTokens: number
  /** of them with loss, default all */
  labelledTokens?: number
  recompute?: boolean
  /** default full */
  optimizerState?: OptimizerState
  /** adapters in instruction tuning, in place of the language model's own weights */
  lora?: LoraOptions
  /** moments and masters in main memory, for a model on a GPU */
  offloadOptimizer?: boolean
}

/** Bytes. `peak` is the most that is in use at once on the model's device, `host` what the optimizer keeps in main memory besides. */
export interface MemoryPlan {
  parameters: number
  trainable: number
  weights: number
  gradients: number
  moments: number
  /** what bf16 weights do not hold of the f32 values they stand for */
  masters: number
  /** kept from forward for backward */
  activations: number
  /** what the most demanding moment needs besides all that: the loss, the last layer's backward, or CLIP */
  transient: number
  peak: number
  host: number
  /** main memory a checkpoint takes while it is being written; for a model on the CPU it comes on top of `peak` */
  snapshot: number
  /** main memory of pictures that are decoded ahead of their step */
  pictures: number
  /** page-locked main memory that copies from and to a GPU go through; none of it for a model on the CPU */
  pinned: number
}

/** As the native allocator rounds (native/tensor.cc). */
function rounded(bytes: number): number {
  let step = 64
  if (bytes > 2 ** 20) step = 2 ** 16
  else if (bytes > 4096) step = 2 ** Math.floor(Math.log2(bytes)) / 8
  return Math.max(64, Math.ceil(bytes / step) * step)
}
/** Bytes of tensors with so many elements, of `size` bytes each. */
const tensors = (size: number, ...counts: number[]): number => counts.reduce((n, c) => n + rounded(c * size), 0)
const sum = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0)

function projectorShapes(kind: string, from: number, to: number): number[] {
  if (kind === 'identity') return []
  const layers = kind === 'linear' ? 1 : Number(/^mlp(\d+)x_gelu$/.exec(kind)?.[1])
  if (!(layers >= 1))
    throw new AlignGPTError('ERR_CONFIG', `[plan] projector: expected linear, mlpNx_gelu or identity, got ${kind}`)
  return Array.from({ length: layers }, (_, i) => [(i ? to : from) * to, to]).flat()
}

function layerShapes(c: LanguageShape): number[] {
  const [h, q, kv, i] = [
    c.hidden_size,
    c.num_attention_heads * c.head_dim,
    c.num_key_value_heads * c.head_dim,
    c.intermediate_size,
  ]
  const biases = [...(c.attention_bias ? [q, kv, kv, h] : []), ...(c.mlp_bias ? [i, i, h] : [])]
  return [h * q, h * kv, h * kv, q * h, h * i, h * i, i * h, h, h, ...biases]
}

/** A matrix of a layer: name, inputs, outputs. */
type Matrix = [name: string, inputs: number, outputs: number]

/** Rank of the adapters, and the matrices that get one, layer by layer. */
function adapted(c: LanguageShape, o: PlanOptions): { rank: number; layers: Matrix[][] } {
  const { rank = 8, targets } = o.lora ?? {}
  if (!o.lora || o.phase === 'pretrain') return { rank, layers: [] }
  const [h, i] = [c.hidden_size, c.intermediate_size]
  const [q, kv] = [c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim]
  const matrices: Matrix[] = [
    ['self_attn.q_proj', h, q],
    ['self_attn.k_proj', h, kv],
    ['self_attn.v_proj', h, kv],
    ['self_attn.o_proj', q, h],
    ['mlp.gate_proj', h, i],
    ['mlp.up_proj', h, i],
    ['mlp.down_proj', i, h],
  ]
  const layers = Array.from({ length: c.num_hidden_layers }, (_, n) =>
    matrices.filter(([name]) => isTarget(`model.layers.${n}.${name}`, targets)),
  )
  return { rank, layers }
}

const patchesOf = (v: ClipVisionConfig): number => Math.floor(v.image_size / v.patch_size) ** 2

/** Elements of each parameter, by the module the phases know it by. */
function parameterShapes(m: PlanModel): Record<'language' | 'projector' | 'table' | 'gate' | 'vision', number[]> {
  const { llm, vision: v, levels } = m
  const [h, d, i] = [llm.hidden_size, v.hidden_size, v.intermediate_size]
  const visionLayer = [d, d, d, d, ...[0, 1, 2, 3].flatMap(() => [d * d, d]), d * i, i, i * d, d]
  const head = llm.tie_word_embeddings ? [] : [llm.vocab_size * h]
  return {
    language: [
      llm.vocab_size * h,
      ...Array.from({ length: llm.num_hidden_layers }, () => layerShapes(llm)).flat(),
      h,
      ...head,
    ],
    projector: projectorShapes(m.projector, d, h),
    table: [levels * h],
    gate:
      m.gate === 'linear'
        ? [(levels - 1) * patchesOf(v), levels - 1]
        : [GATE_HIDDEN * patchesOf(v), GATE_HIDDEN, (levels - 1) * GATE_HIDDEN, levels - 1],
    vision: [
      ...[d, v.num_channels * v.patch_size ** 2 * d, (patchesOf(v) + 1) * d, d, d, d, d],
      ...Array.from({ length: v.num_hidden_layers }, () => visionLayer).flat(),
    ],
  }
}

/** Weights and what the optimizer keeps beside them. */
function stateBytes(
  m: PlanModel,
  o: PlanOptions,
): Omit<MemoryPlan, 'activations' | 'transient' | 'peak' | 'host' | 'pictures' | 'pinned'> {
  const { rank, layers } = adapted(m.llm, o)
  const lora = layers.flat().flatMap(([, inputs, outputs]) => [rank * inputs, outputs * rank])
  const shapes = { ...parameterShapes(m), lora }
  const learns =
    o.phase === 'pretrain'
      ? (['projector', 'table'] as const)
      : ([o.lora ? 'lora' : 'language', 'projector', 'gate'] as const)
  const trained = learns.flatMap((k) => shapes[k])
  const all = Object.values(shapes).flat()
  const compact = o.dtype === 'bf16' && o.optimizerState === 'compact'
  const flat = rounded(sum(trained) * (compact ? 2 : 4))
  const [size, kept] = [o.dtype === 'bf16' ? 2 : 4, compact ? 2 : 4]
  const masters = o.dtype === 'bf16' ? tensors(kept, ...trained) : 0
  const saved = [...new Set([...learns, 'projector', 'table', 'gate'] as const)].flatMap((k) => shapes[k])
  return {
    parameters: sum(all),
    trainable: sum(trained),
    weights: tensors(size, ...all),
    gradients: flat,
    moments: 2 * flat,
    masters,
    snapshot: tensors(size, ...saved) + 2 * tensors(kept, ...trained) + masters,
  }
}

// Two pieces and 64 small places for all copies (native/cuda/device.cc); three places for a parameter and its gradient (native/ops/optim.cc).
const STAGING = 2 * 2 ** 23 + 64 * 2 ** 16
const OFFLOAD_PLACES = 3 * 2 * 2 ** 22

/** What one layer keeps for backward besides its input (docs: ARCHITECTURE.md, Memory). */
function layerKeeps(c: LanguageShape, rows: number, size: number): number {
  const [h, i] = [rows * c.hidden_size, rows * c.intermediate_size]
  const [q, kv] = [rows * c.num_attention_heads * c.head_dim, rows * c.num_key_value_heads * c.head_dim]
  return tensors(size, q, kv, kv, q, h, i, i) + tensors(4, rows, rows, rows * c.num_attention_heads)
}

/**
 * The widest moment of a layer, of attention forward, MLP forward and MLP backward; an adapter of down_proj has a gradient of its
 * own for both inputs.
 */
function layerTransient(c: LanguageShape, rows: number, size: number, downAdapted: boolean): number {
  const [h, i] = [rows * c.hidden_size, rows * c.intermediate_size]
  const [q, kv] = [rows * c.num_attention_heads * c.head_dim, rows * c.num_key_value_heads * c.head_dim]
  return Math.max(
    tensors(size, h, q, kv, h),
    tensors(size, h, i, h),
    tensors(size, h, i, i, ...(downAdapted ? [i, i] : [])),
  )
}

/** CLIP has nothing to keep: the widest moment of a layer. */
function visionTransient(v: ClipVisionConfig, images: number, size: number): number {
  const rows = images * (patchesOf(v) + 1)
  const [d, pixels] = [rows * v.hidden_size, images * v.num_channels * v.image_size ** 2]
  const widest = Math.max(tensors(size, d, d, d, d, d, d), tensors(size, d, d, rows * v.intermediate_size, d))
  return widest + tensors(4, pixels) + (size === 2 ? tensors(2, pixels) : 0)
}

/** The loss: its rows and their gradient, a chunk of logits and its gradient, the head's own gradient. */
function headTransient(c: LanguageShape, labelled: number, size: number, trained: boolean): number {
  const chunk = Math.min(headChunk(c.vocab_size), labelled)
  const [h, logits] = [labelled * c.hidden_size, chunk * c.vocab_size]
  const own = trained ? tensors(4, c.vocab_size * c.hidden_size) : 0
  return tensors(size, h, h) + tensors(4, logits, labelled) + (size === 2 ? tensors(2, logits) : 0) + own
}

/** All micro-batches of a step are gathered before it is computed, so all of the next are decoded meanwhile. */
export const microBatchesAhead = (batch: number, microBatch: number): number =>
  Math.max(2, Math.ceil(batch / microBatch))

/**
 * Bytes a training step takes, by what they are for.
 * The native allocator's peak on the CPU agrees within 5 % for a small model (ts/test/41.plan.test.ts). Not in it: kernels'
 * scratch, and blocks that lie idle.
 * @throws ERR_CONFIG for an unknown projector, ERR_ARGUMENT for sizes that are not positive integers
 */
export function plan(m: PlanModel, o: PlanOptions): MemoryPlan {
  for (const key of ['microBatch', 'textTokens'] as const)
    if (!(Number.isInteger(o[key]) && o[key] > 0))
      throw new AlignGPTError('ERR_ARGUMENT', `[plan] ${key}: expected an integer > 0, got ${o[key]}`)
  const { llm, vision: v } = m
  const size = o.dtype === 'bf16' ? 2 : 4
  const [images, patches] = [o.microBatch, patchesOf(v)]
  const rows = images * (1 + patches + o.textTokens)
  const width = rows * llm.hidden_size
  const projected = projectorShapes(m.projector, v.hidden_size, llm.hidden_size).length / 2 - 1
  const state = stateBytes(m, o)

  const features = tensors(size, images * patches * v.hidden_size)
  const hiddenLayers = new Array<number>(Math.max(0, 2 * projected)).fill(images * patches * llm.hidden_size)
  const inputs = new Array<number>(llm.num_hidden_layers + 1).fill(width)
  const layer = layerKeeps(llm, rows, size)
  const base = features + tensors(size, ...hiddenLayers, ...inputs, width) // and the normed last state
  const lora = adapted(llm, o)
  const inner = lora.layers.map((matrices) => matrices.length * tensors(size, rows * lora.rank)) // x A^T
  const downAdapted = lora.layers.flat().some(([name]) => name === 'mlp.down_proj')
  const activations = base + (o.recompute ? 0 : llm.num_hidden_layers * layer + sum(inner))

  const head = headTransient(llm, images * (o.labelledTokens ?? o.textTokens), size, o.phase === 'finetune' && !o.lora)
  const again = o.recompute ? layer + Math.max(0, ...inner) + tensors(size, width) : 0 // one layer at a time, and its result
  const transient = Math.max(
    head,
    layerTransient(llm, rows, size, downAdapted) + again,
    visionTransient(v, images, size) - activations,
  )
  const kept = state.moments + state.masters
  const host = o.offloadOptimizer ? kept : 0
  const peak = state.weights + state.gradients + (kept - host) + activations + transient
  const ahead = microBatchesAhead(o.batch ?? o.microBatch, o.microBatch)
  const pictures = (ahead + 1) * o.microBatch * v.num_channels * v.image_size ** 2 // and those in use
  const pinned = STAGING + (o.offloadOptimizer ? OFFLOAD_PLACES : 0)
  return { ...state, activations, transient, peak, host, pictures, pinned }
}

/** The most samples at once whose step stays below `bytes`; 0 when not even one does. */
export function largestMicroBatch(m: PlanModel, o: Omit<PlanOptions, 'microBatch'>, bytes: number): number {
  const fits = (microBatch: number): boolean => plan(m, { ...o, microBatch }).peak <= bytes
  if (!fits(1)) return 0
  let [low, high] = [1, 2]
  while (fits(high)) [low, high] = [high, 2 * high]
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2)
    if (fits(middle)) low = middle
    else high = middle
  }
  return low
}

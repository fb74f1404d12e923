/** What AlignGPT adds to LLaVA (arXiv 2405.14129, section 3): projector, alignment embeddings, gate. */

import { type AlignMixArgs, type AlignMixResult, concat, embedding, gather, linear, scale } from '../core/ops.js'
import { type Device, type Dtype, type Tensor, tensor, zeros } from '../core/tensor.js'
import { Linear, Sequential } from '../nn/layers.js'
import { Module, type ParameterSource } from '../nn/module.js'
import { AlignGPTError } from '../util/errors.js'
import type { Alignment, Gate } from './config/variants.js'
import type { BatchTensor, PackedBatch } from './packed-batch.js'
import type { Projector } from './projector.js'

export const GATE_HIDDEN = 256
type GateTensors = [Tensor, Tensor, Tensor, Tensor]

/** How the alignment vector of a batch's pictures is made. */
export type Mix =
  /** one vector per level (pre-training): the batch's levels, or one level for all */
  | { mode: 'level'; level?: number }
  /** gate over the local vectors plus the global one (instruction tuning, inference); global: false is "local only" */
  | { mode: 'gate'; global?: boolean }
  /** given weights of all N rows, for every picture */
  | { mode: 'fixed'; coefficients: readonly number[] }
  /** no vector, and no place for one in the sequence */
  | { mode: 'none' }

/** How a variant of the model makes the vector in instruction tuning and at inference (the paper's ablations). */
export function mixOf(alignment: Alignment, levels: number): Mix {
  const local = (value: number): number[] => [...new Array<number>(levels - 1).fill(value), 1]
  switch (alignment) {
    case 'adaptive':
    case 'random':
      return { mode: 'gate' }
    case 'local':
      return { mode: 'gate', global: false }
    case 'global':
      return { mode: 'fixed', coefficients: local(0) }
    case 'average':
      return { mode: 'fixed', coefficients: local(1 / (levels - 1)) }
    case 'none':
      return { mode: 'none' }
  }
}

/** The table of alignment vectors [N, H], Xavier uniform; row N-1 is also the global one. */
export class AlignIndicators extends Module {
  readonly indicator_embs: Tensor
  constructor(s: ParameterSource, levels: number, hidden: number) {
    super()
    const bound = Math.sqrt(6 / (levels + hidden))
    this.indicator_embs = s.tensor('indicator_embs', [levels, hidden], { kind: 'uniform', bound })
  }
}

/**
 * From the dot products of image rows and mean text embedding to the weights of the local vectors: mlp is the official code's
 * Linear(P, 256) -> GELU(erf) -> Linear(256, N-1), linear the one matrix P -> N-1 that the paper writes.
 */
export class GatedWeightLayer extends Module {
  readonly mlp?: Sequential
  readonly linear?: Linear
  #mlp?: GateTensors
  constructor(s: ParameterSource, kind: Gate, patches: number, levels: number) {
    super()
    if (kind === 'linear') {
      this.linear = new Linear(s.at('linear'), patches, levels - 1, { bias: true })
      return
    }
    const m = s.at('mlp')
    const first = new Linear(m.at('0'), patches, GATE_HIDDEN, { bias: true })
    const second = new Linear(m.at('2'), GATE_HIDDEN, levels - 1, { bias: true })
    this.mlp = new Sequential({ '0': first, '2': second })
    this.#mlp = [first.weight, first.bias as Tensor, second.weight, second.bias as Tensor]
  }
  /** [w0, b0, w1, b1] as alignMix takes them; for the linear form, made in the scope of the call. */
  tensors(): GateTensors {
    if (this.#mlp) return this.#mlp
    // GELU(z) - GELU(-z) = z: the linear form is an MLP whose hidden layer holds W d and -W d, so there is one op for both
    const { weight, bias } = this.linear as Linear
    const [n] = weight.shape
    const signs = Float64Array.from({ length: 2 * n * n }, (_, i) => {
      const [row, column] = [Math.floor(i / (2 * n)), i % (2 * n)]
      return column % n === row ? (column < n ? 1 : -1) : 0
    })
    const { dtype, device } = weight
    const both = concat([weight, scale(weight, -1)], 0)
    return [both, zeros([2 * n], dtype, device), tensor(signs, [n, 2 * n], dtype, device), bias as Tensor]
  }
}

/** @throws ERR_DATA naming the first record whose level is not there or none of the model's */
export function checkLevels(b: PackedBatch, levels: number): void {
  const wrong = b.levels.findIndex((l) => l < 0 || l >= levels)
  if (wrong < 0) return
  const [record, got] = [b.ids[b.imageSamples[wrong]], b.levels[wrong]]
  const expected =
    got < 0 ? "a level in 'similarity', got none; run levels first" : `a level 0..${levels - 1}, got ${got}`
  throw new AlignGPTError('ERR_DATA', `[AlignGPT] record '${record}': expected ${expected}`)
}

/** Where a list becomes a tensor: on the CPU, pixels [M, 3, S, S] on the model's device. */
export type BatchTensors = (key: BatchTensor) => Tensor

/** New tensors in the scope of the call. */
export function tensorsOf(b: PackedBatch, device: Device): BatchTensors {
  return (key) => (key === 'pixels' ? tensor(b.pixels, pixelShape(b), 'f32', device) : tensor(b[key]))
}

export const pixelShape = (b: PackedBatch): number[] => [b.imageRows.length, 3, b.imageSize, b.imageSize]

/** What alignMix needs to know to make the vectors of a batch. */
export function mixArgs(
  b: PackedBatch,
  mix: Exclude<Mix, { mode: 'none' }>,
  at: BatchTensors,
  m: { levels: number; dtype: Dtype; device: Device; gate: GatedWeightLayer },
): AlignMixArgs['mix'] {
  const images = b.imageRows.length
  if (mix.mode === 'level') {
    const { level } = mix
    if (level !== undefined) return { mode: 'level', levels: tensor(new Int32Array(images).fill(level)) }
    checkLevels(b, m.levels)
    return { mode: 'level', levels: at('levels') }
  }
  if (mix.mode === 'fixed') {
    if (mix.coefficients.length !== m.levels)
      throw new AlignGPTError(
        'ERR_ARGUMENT',
        `[AlignGPT] coefficients: expected ${m.levels}, got ${mix.coefficients.length}`,
      )
    const rows = Array.from({ length: images }, () => mix.coefficients).flat()
    const acc = m.dtype === 'f64' ? 'f64' : 'f32'
    return { mode: 'fixed', coefficients: tensor(Float64Array.from(rows), [images, m.levels], acc, m.device) }
  }
  return {
    mode: 'gate',
    ids: at('gateIds'),
    offsets: at('gateOffsets'),
    gate: m.gate.tensors(),
    global: mix.global ?? true,
  }
}

/**
 * The packed input [T, H] without any alignment vector (LLaVA's): image rows and words in their places.
 * @param last input of the last projector layer, and that layer; embed [V, H]
 */
export function splice(
  b: PackedBatch,
  last: ReturnType<Projector['beforeLast']>,
  embed: Tensor,
  levels: number,
): AlignMixResult {
  const { x, weight, bias } = last
  const words = b.tokens.filter((t) => t >= 0)
  let [word, row] = [0, words.length]
  const order = b.tokens.map((t) => (t >= 0 ? word++ : row++))
  const rows = concat([embedding(tensor(words), embed), weight ? linear(x, weight, bias) : x], 0)
  const none = (columns: number): Tensor => zeros([0, columns])
  return {
    inputsEmbeds: gather(rows, tensor(order)),
    textMean: none(embed.shape[1]),
    dots: none(1),
    gateLogits: none(levels - 1),
    coefficients: none(levels),
  }
}

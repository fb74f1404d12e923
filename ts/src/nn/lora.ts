/**
 * LoRA (Hu et al. 2021, arXiv 2106.09685): the matrices of a module stay as they are and each chosen one gets a low-rank update
 * beside it, y = x W^T + (alpha / r) (x A^T) B^T. Names are PEFT's. There is no dropout on the way to A.
 */
import { add, cast, matmul, scale } from '../core/ops.js'
import { scope, type Tensor } from '../core/tensor.js'
import { AlignGPTError } from '../util/errors.js'
import { Linear } from './layers.js'
import type { LoraTargets } from './lora-targets.js'
import type { Module, ParameterSource } from './module.js'

/** r, where nothing is said */
export const LORA_RANK = 8

export interface LoraOptions {
  /** r, default 8 (LORA_RANK) */
  rank?: number
  /** the update counts alpha / r; default 2 r, LLaVA's ratio */
  alpha?: number
  /** ends of module names such as q_proj or layers.0.mlp.up_proj; default all-linear: every matrix of the layers */
  targets?: LoraTargets
}

const ADAPTER = /\.lora_[AB]$/
/** Whether a parameter of this name belongs to an adapter. */
export const isAdapter = (name: string): boolean => ADAPTER.test(name.replace(/\.weight$/, ''))

/** A matrix of a module and its name. */
export type NamedLinear = readonly [name: string, layer: Linear]

/** Every matrix below a module, those of adapters left out. @param prefix the module's own name */
export const matrices = (m: Module, prefix: string): NamedLinear[] =>
  [...m.namedModules(prefix)].filter((x): x is [string, Linear] => x[1] instanceof Linear && !ADAPTER.test(x[0]))

/** Those of the matrices that have an adapter. */
export const adapted = (all: readonly NamedLinear[]): NamedLinear[] => all.filter(([, layer]) => layer.lora_A)

/**
 * Gives matrices adapters whose values come from a source; all of them or none.
 * @param of rank of a matrix's adapter, and what it counts
 * @throws ERR_ARGUMENT when one has an adapter already
 */
export function attach(
  chosen: readonly NamedLinear[],
  of: (name: string) => { rank: number; scaling: number },
  s: ParameterSource,
): void {
  if (adapted(chosen).length)
    throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected one without adapters, got one that has them')
  const made: Linear[] = []
  try {
    for (const [name, { weight }] of chosen) {
      const [outputs, inputs] = weight.shape
      const { rank } = of(name)
      const at = s.at(name)
      // the usual initialisation is PEFT's kaiming_uniform_(a = sqrt 5): within 1 / sqrt(inputs)
      made.push(new Linear(at.at('lora_A'), inputs, rank, { bias: false }))
      made.push(new Linear(at.at('lora_B'), rank, outputs, { bias: false, init: { kind: 'constant', value: 0 } }))
    }
  } catch (e) {
    for (const l of made) l.dispose()
    throw e
  }
  for (const [i, [name, l]] of chosen.entries())
    Object.assign(l, { lora_A: made[2 * i], lora_B: made[2 * i + 1], scaling: of(name).scaling })
}

/** W + (alpha / r) B A, computed in f32 (f64 for f64 tensors) and rounded to W's dtype. */
export function merged(weight: Tensor, loraA: Tensor, loraB: Tensor, scaling: number): Tensor {
  const acc = weight.dtype === 'f64' ? 'f64' : 'f32'
  const [w, a, b] = [weight, loraA, loraB].map((t) => cast(t.detach(), acc))
  return cast(add(w, scale(matmul(b, a), scaling)), weight.dtype)
}
/** The weight of a matrix with its adapter merged, in the scope of the call. */
export const mergedWeight = ({ weight, lora_A, lora_B, scaling }: Linear): Tensor =>
  merged(weight, (lora_A as Linear).weight, (lora_B as Linear).weight, scaling)

/** Adds adapters to the weights and removes them. */
export function detach(layers: readonly NamedLinear[]): void {
  for (const [, l] of layers) {
    l.weight.write(scope(() => mergedWeight(l).toFloats()))
    l.lora_A?.dispose()
    l.lora_B?.dispose()
    l.lora_A = l.lora_B = undefined
  }
}

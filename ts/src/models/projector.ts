/** From vision features to the language model's width. */
import type { Tensor } from '../core/tensor.js'
import { Linear, Sequential } from '../nn/layers.js'
import type { Module, ParameterSource } from '../nn/module.js'
import { mismatch } from '../util/errors.js'
import { PROJECTORS, projectorDepth } from './config/variants.js'

/** `mm_projector_type` of a projector whose parameters have these names. */
export function projectorTypeOf(names: Iterable<string>): string {
  const all = [...names]
  if (all.includes('mm_projector.weight')) return 'linear'
  const last = Math.max(0, ...all.map((n) => Number(/^mm_projector\.(\d+)\./.exec(n)?.[1] ?? 0)))
  return `mlp${last / 2 + 1}x_gelu`
}

/**
 * The projector from vision features to the language model's width: `linear`, `mlpNx_gelu` (N linear layers with GELU
 * between them) or `identity`. Its last layer is not run here: alignMix writes its rows into the packed sequence.
 */
export class Projector {
  readonly module: Module | null
  #layers: Linear[]
  constructor(s: ParameterSource, kind: string, inputs: number, outputs: number) {
    const depth = projectorDepth(kind)
    if (depth === null) throw mismatch('ERR_CONFIG', 'config', 'mm_projector_type', PROJECTORS, kind)
    const made = (at: ParameterSource, first: boolean): Linear =>
      new Linear(at, first ? inputs : outputs, outputs, { bias: true })
    if (kind === 'linear') {
      const layer = made(s, true)
      this.module = layer
      this.#layers = [layer]
      return
    }
    this.#layers = Array.from({ length: depth }, (_, i) => made(s.at(String(2 * i)), i === 0))
    const named = this.#layers.map((layer, i): [string, Linear] => [String(2 * i), layer])
    this.module = depth ? new Sequential(Object.fromEntries(named)) : null
  }
  /** features [M*P, D] -> input of the last layer, and that layer. */
  beforeLast(features: Tensor): { x: Tensor; weight: Tensor | null; bias: Tensor | null } {
    const last = this.#layers.at(-1)
    const x = this.#layers.slice(0, -1).reduce((h, layer) => layer.forward(h, 'gelu'), features)
    return { x, weight: last?.weight ?? null, bias: last?.bias ?? null }
  }
}

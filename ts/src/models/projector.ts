/** From vision features to the language model's width. */
import type { Tensor } from '../core/tensor.js'
import { Linear, Sequential } from '../nn/layers.js'
import type { Module, ParameterSource } from '../nn/module.js'
import { AlignGPTError } from '../util/errors.js'

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
    const mlp = /^mlp(\d+)x_gelu$/.exec(kind)
    if (kind === 'identity') {
      this.module = null
      this.#layers = []
    } else if (kind === 'linear') {
      const layer = new Linear(s, inputs, outputs, { bias: true })
      this.module = layer
      this.#layers = [layer]
    } else if (mlp && Number(mlp[1]) >= 1) {
      const named: Record<string, Linear> = {}
      for (let i = 0; i < Number(mlp[1]); i++)
        named[String(2 * i)] = new Linear(s.at(String(2 * i)), i ? outputs : inputs, outputs, { bias: true })
      this.module = new Sequential(named)
      this.#layers = Object.values(named)
    } else {
      throw new AlignGPTError(
        'ERR_CONFIG',
        `[config] mm_projector_type: expected linear, mlpNx_gelu or identity, got ${kind}`,
      )
    }
  }
  /** features [M*P, D] -> input of the last layer, and that layer. */
  beforeLast(features: Tensor): { x: Tensor; weight: Tensor | null; bias: Tensor | null } {
    const last = this.#layers.at(-1)
    const x = this.#layers.slice(0, -1).reduce((h, layer) => layer.forward(h, 'gelu'), features)
    return { x, weight: last?.weight ?? null, bias: last?.bias ?? null }
  }
}

/** What AlignGPT adds to LLaVA (arXiv 2405.14129, section 3): projector, alignment embeddings, gate. */
import { AlignGPTError } from './errors.js'
import { Linear, Module, Sequential, type Source } from './nn.js'
import { type AlignMixArgs, type AlignMixResult, alignMix } from './ops.js'
import type { Tensor } from './tensor.js'

export const GATE_HIDDEN = 256

/**
 * The projector from vision features to the language model's width: `linear`, `mlpNx_gelu` (N linear layers with GELU
 * between them) or `identity`. Its last layer is not run here: alignMix writes its rows into the packed sequence.
 */
export class Projector {
  readonly module: Module | null
  #layers: Linear[]
  constructor(s: Source, kind: string, inputs: number, outputs: number) {
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

/** The table of alignment vectors [N, H], Xavier uniform; row N-1 is also the global one. */
export class AlignIndicators extends Module {
  readonly indicator_embs: Tensor
  constructor(s: Source, levels: number, hidden: number) {
    super()
    const bound = Math.sqrt(6 / (levels + hidden))
    this.indicator_embs = s.tensor('indicator_embs', [levels, hidden], { kind: 'uniform', bound })
  }
}

/** Linear(P, 256) -> GELU(erf) -> Linear(256, N-1) on the dot products of image rows and mean text embedding. */
export class GatedWeightLayer extends Module {
  readonly mlp: Sequential
  #tensors: [Tensor, Tensor, Tensor, Tensor]
  constructor(s: Source, patches: number, levels: number) {
    super()
    const m = s.at('mlp')
    const first = new Linear(m.at('0'), patches, GATE_HIDDEN, { bias: true })
    const second = new Linear(m.at('2'), GATE_HIDDEN, levels - 1, { bias: true })
    this.mlp = new Sequential({ '0': first, '2': second })
    this.#tensors = [first.weight, first.bias as Tensor, second.weight, second.bias as Tensor]
  }
  /** [w0, b0, w1, b1] as alignMix takes them */
  get tensors(): [Tensor, Tensor, Tensor, Tensor] {
    return this.#tensors
  }
}

/** Projector + mix + splice: see `alignMix` in ops.ts. */
export function mixInto(
  projector: Projector,
  features: Tensor,
  rest: Omit<AlignMixArgs, 'x' | 'weight' | 'bias'>,
): AlignMixResult {
  return alignMix({ ...projector.beforeLast(features), ...rest })
}

/**
 * AlignGPT as a phase trains it. On a GPU a micro-batch can be launched as a graph (ALIGNGPT_CUDA_GRAPHS=1): batches are padded so that
 * few shapes occur (padBatch), and each shape is recorded when it is met first.
 */
import { native } from '../core/native.js'
import { Graph, scope, type Tensor, tensor, wantsGraphs, zeros } from '../core/tensor.js'
import { checkLevels, type Mix, pixelShape } from '../models/align.js'
import type { AlignGPTNetwork, LossOptions } from '../models/aligngpt.js'
import { BATCH_TENSORS, type BatchTensor, type PackedBatch, padBatch } from '../models/packed-batch.js'
import type { Parameter } from '../nn/adamw.js'
import { mismatch } from '../util/errors.js'
import type { MicroOptions, MicroResult, TrainableModel } from './types.js'

/** Recorded shapes that are kept. */
const GRAPHS = 16

export interface PhaseResult extends MicroResult {
  /** [M, N] weights of the alignment vectors of the micro-batch's images */
  coefficients: Tensor
}

type Inputs = Required<Pick<LossOptions, 'tensors' | 'scale'>>

/**
 * Whether all that a micro-batch computes can be launched again: weights that are given, and a gate that is assembled from parts, come
 * from the host.
 */
const recordable = (model: AlignGPTNetwork, mix: Mix): boolean =>
  (mix.mode === 'level' && mix.level === undefined) || (mix.mode === 'gate' && model.config.mm_gate_type === 'mlp')

/** The network, the parameters that learn, and how the alignment vector is made. Whoever made it disposes it. */
export class PhaseModel implements TrainableModel<PackedBatch, PhaseResult> {
  readonly parameters: readonly Parameter[]
  readonly #model: AlignGPTNetwork
  readonly #mix: Mix
  readonly #recompute: boolean
  readonly #graphs: Graphs | null

  /** @param recompute layers are run again on the way back instead of keeping their activations */
  constructor(model: AlignGPTNetwork, mix: Mix, parameters: readonly Parameter[], recompute = false) {
    this.#model = model
    this.#mix = mix
    this.parameters = parameters
    this.#recompute = recompute
    this.#graphs = wantsGraphs(model.device) && recordable(model, mix) ? new Graphs(model, mix, recompute) : null
  }

  /** Labelled rows. */
  terms(batch: PackedBatch): number {
    return batch.lossRows.length
  }

  lossAndGradients(batch: PackedBatch, { denominator, micro }: MicroOptions): PhaseResult {
    if (!this.#graphs)
      return this.#model.lossAndGradients(batch, this.#mix, { denominator, recompute: this.#recompute })
    // A graph adds to the gradients always: they begin as zeros, which grad() makes of those that count no longer.
    if (micro === 0) for (const p of this.parameters) scope(() => void p.tensor.grad())
    return this.#graphs.run(batch, denominator)
  }

  /** Frees the graphs; the network stays. */
  dispose(): void {
    if (!this.#graphs) return
    this.#graphs.dispose()
    native.trim(this.#model.device)
  }
}

interface Recorded {
  graph: Graph<PhaseResult>
  rows: number
  /** the tables that the recorded work reads, whichever the model has by then */
  rotary: Tensor[]
}

/** Recorded micro-batches, one for each shape, which all work in the same memory. */
class Graphs {
  readonly #model: AlignGPTNetwork
  readonly #mix: Mix
  readonly #recompute: boolean
  /** the one launched last at the end */
  readonly #recorded = new Map<string, Recorded>()
  readonly #inputs = new Map<string, Tensor>()
  #warm = false

  constructor(model: AlignGPTNetwork, mix: Mix, recompute: boolean) {
    this.#model = model
    this.#mix = mix
    this.#recompute = recompute
  }

  /** Results in the scope of the call. */
  run(batch: PackedBatch, denominator: number): PhaseResult {
    const b = padBatch(batch)
    if (!this.#warm) {
      this.#warm = true // what is loaded and chosen when it is used first is there before anything is recorded
      return this.#model.lossAndGradients(b, this.#mix, { denominator, recompute: this.#recompute })
    }
    const { graph } = this.#recordedFor(b, this.#write(b, denominator))
    graph.launch()
    return scope(() => ({ loss: copyOf(graph.result.loss), coefficients: copyOf(graph.result.coefficients) }))
  }

  /** Puts the batch where the recorded work finds it. What ops check when they are recorded, and a batch may have otherwise, is checked here. */
  #write(b: PackedBatch, denominator: number): Inputs {
    if (this.#mix.mode === 'level') checkLevels(b, this.#model.levels)
    this.#checkIds(b)
    const at = new Map(BATCH_TENSORS.map((key) => [key, this.#input(key, b)]))
    const scale = this.#kept('scale', () => zeros([1], 'f32', this.#model.device))
    scale.write(Float32Array.of(1 / denominator))
    return { tensors: (key) => at.get(key) as Tensor, scale }
  }

  /** A tokenizer may know more than the embedding table has. */
  #checkIds(b: PackedBatch): void {
    const [vocabulary] = this.#model.language.embeddings.shape
    for (const key of ['tokens', 'lossTargets', 'gateIds'] as const) {
      const highest = b[key].reduce((a, id) => Math.max(a, id), 0)
      if (highest >= vocabulary) throw mismatch('ERR_RANGE', 'AlignGPT', key, `ids below ${vocabulary}`, `${highest}`)
    }
  }

  #input(key: BatchTensor, b: PackedBatch): Tensor {
    if (key !== 'pixels') {
      const t = this.#kept(`${key} ${b[key].length}`, () => tensor(b[key]))
      t.write(b[key])
      return t
    }
    const t = this.#kept(`pixels ${b.pixels.length}`, () => zeros(pixelShape(b), 'f32', this.#model.device))
    t.write(b.pixels)
    return t
  }

  #kept(name: string, make: () => Tensor): Tensor {
    const t = this.#inputs.get(name) ?? make().persist()
    this.#inputs.set(name, t)
    return t
  }

  #recordedFor(b: PackedBatch, inputs: Inputs): Recorded {
    const key = BATCH_TENSORS.map((k) => b[k].length).join()
    let recorded = this.#recorded.get(key)
    if (!recorded) {
      // The largest is recorded first, for the others find their memory there: fewer bytes in blocks that are large enough.
      if ([...this.#recorded.values()].some(({ rows }) => rows < b.tokens.length)) this.#forget(GRAPHS)
      else this.#forget(this.#recorded.size + 1 - GRAPHS)
      recorded = this.#record(b, inputs)
    }
    this.#recorded.delete(key)
    this.#recorded.set(key, recorded)
    return recorded
  }

  #record(b: PackedBatch, inputs: Inputs): Recorded {
    const [model, mix, recompute] = [this.#model, this.#mix, this.#recompute]
    const { cos, sin } = model.language.rotary(model.config.tokenizer_model_max_length)
    const rotary = [cos, sin].map((t) => t.detach().persist())
    const [beside] = this.#recorded.values()
    if (!beside) native.trim(model.device) // blocks of other sizes are of no use to it
    const work = (): PhaseResult => {
      const { loss, coefficients } = model.lossAndGradients(b, mix, { denominator: 1, ...inputs, recompute })
      return { loss: loss.persist(), coefficients: coefficients.persist() }
    }
    return { graph: new Graph(model.device, work, beside?.graph), rows: b.tokens.length, rotary }
  }

  /** Drops those that were launched longest ago. */
  #forget(count: number): void {
    for (const [key, { graph, rotary }] of [...this.#recorded].slice(0, Math.max(count, 0))) {
      graph.dispose()
      for (const t of [graph.result.loss, graph.result.coefficients, ...rotary]) t.dispose()
      this.#recorded.delete(key)
    }
  }

  dispose(): void {
    this.#forget(GRAPHS)
    for (const t of this.#inputs.values()) t.dispose()
    this.#inputs.clear()
  }
}

function copyOf(t: Tensor): Tensor {
  const copy = zeros(t.shape, t.dtype, t.device)
  native.copy(copy.h, t.h)
  return copy
}

/**
 * Sequences that are continued token by token against a paged key/value cache: a batch goes through the model once as prompts
 * (prefill), then one row for each sequence and token.
 */
import { cast, embedding, gather, linear, sample } from '../core/ops.js'
import { Graph, Indices, noGrad, scope, type Tensor, tensor, wantsGraphs } from '../core/tensor.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import { Cache } from '../models/kv-cache.js'
import type { PackedBatch } from '../models/packed-batch.js'
import type { Sampling } from './sampling.js'

/** A batch of sequences being continued. Frees its cache on `dispose`. */
export class Decoding {
  readonly #model: AlignGPTNetwork
  readonly #cache: Cache
  /** f32 [B, V]: scores of the next token of each sequence */
  #logits: Tensor
  readonly #ids = new Indices()
  readonly #positions = new Indices()
  readonly #offsets = new Indices()
  readonly #rows = new Indices()
  /** cover every position there will be; of its own, for the model's may be replaced */
  readonly #rotary: { cos: Tensor; sin: Tensor }
  /** which sequences went on in the last step */
  #going = ''
  #graph: Graph<Tensor> | undefined
  /** [M][N] weights of the alignment vectors of the pictures */
  readonly alpha: number[][]

  /** @param room tokens that each sequence may get, one number for all or one for each */
  constructor(model: AlignGPTNetwork, batch: PackedBatch, mix: Mix, room: number | readonly number[]) {
    this.#model = model
    const c = model.config.llm
    const sequences = batch.offsets.length - 1
    const counts = Array.from({ length: sequences }, (_, s) => batch.offsets[s + 1] - batch.offsets[s])
    const width = c.num_key_value_heads * c.head_dim
    const longest = Math.max(...counts.map((n, s) => n + (typeof room === 'number' ? room : room[s])))
    const { cos, sin } = model.language.rotary(longest)
    this.#rotary = { cos: cos.detach().persist(), sin: sin.detach().persist() }
    this.#cache = new Cache(c.num_hidden_layers, sequences, longest, width, model.dtype, model.device)
    const { logits, coefficients } = scope(() =>
      noGrad(() => {
        this.#cache.extend(counts)
        const embedded = model.embed(batch, mix)
        const hidden = model.hidden(embedded.inputsEmbeds, { ...model.packing(batch), cache: this.#cache })
        const last = counts.map((_, s) => batch.offsets[s + 1] - 1)
        return {
          logits: this.#head(gather(hidden, tensor(Int32Array.from(last)))),
          coefficients: embedded.coefficients,
        }
      }),
    )
    this.#logits = logits.persist()
    const flat = Array.from(coefficients.toFloats())
    coefficients.dispose()
    this.alpha = chunks(flat, model.levels)
  }

  #head(hidden: Tensor): Tensor {
    const logits = linear(hidden, this.#model.headWeight)
    return logits.dtype === 'f32' ? logits : cast(logits, 'f32')
  }

  get logits(): Tensor {
    return this.#logits
  }

  /** Picks the next token of every sequence. @param uniform one number in [0, 1) for each */
  sample(o: Omit<Sampling, 'seed'>, uniform: number[]): number[] {
    return sample(this.#logits, { temperature: o.temperature ?? 0, topK: o.topK ?? 0, topP: o.topP ?? 1 }, uniform)
  }

  /** Appends one token to each sequence that goes on (null: finished); `logits` are the new ones afterwards. */
  push(ids: readonly (number | null)[]): void {
    const counts = ids.map((id) => Number(id !== null))
    const offsets = [0]
    for (const n of counts) offsets.push(offsets[offsets.length - 1] + n)
    this.#ids.set(ids.filter((id) => id !== null))
    this.#offsets.set(offsets)
    this.#positions.set(this.#cache.extend(counts))
    // finished sequences keep a row, so that rows stay sequences
    this.#rows.set(offsets.slice(1).map((end) => Math.max(end - 1, 0)))
    const before = this.#going
    this.#going = counts.join()
    if (this.#graph && before === this.#going) {
      this.#graph.launch()
      return
    }
    this.#logits.dispose()
    this.#graph?.dispose()
    this.#graph = undefined
    if (wantsGraphs(this.#model.device) && before === this.#going) {
      this.#graph = new Graph(this.#model.device, () => this.#next()) // the step before warmed everything up
      this.#logits = this.#graph.result
      this.#graph.launch()
    } else {
      this.#logits = this.#next()
    }
  }

  /** Scores after the tokens in #ids. */
  #next(): Tensor {
    const packing = { offsets: this.#offsets.tensor, positions: this.#positions.tensor, ...this.#rotary }
    return scope(() =>
      noGrad(() => {
        const x = embedding(this.#ids.tensor, this.#model.language.embeddings)
        const hidden = this.#model.hidden(x, { ...packing, cache: this.#cache })
        return this.#head(gather(hidden, this.#rows.tensor))
      }),
    ).persist()
  }

  dispose(): void {
    this.#graph?.dispose()
    for (const t of [this.#cache, this.#logits, this.#ids, this.#positions, this.#offsets, this.#rows]) t.dispose()
    for (const t of [this.#rotary.cos, this.#rotary.sin]) t.dispose()
  }
}

function chunks(flat: number[], n: number): number[][] {
  return Array.from({ length: flat.length / n }, (_, i) => flat.slice(i * n, (i + 1) * n))
}

/** Inference: prefill once, then one token at a time against the key/value cache. */

import { native } from '../core/native.js'
import { cast, embedding, gather, linear } from '../core/ops.js'
import { Graph, Indices, noGrad, scope, type Tensor, tensor, wantsGraphs } from '../core/tensor.js'
import type { Turn } from '../formats/record-file.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import { Cache } from '../models/kv-cache.js'
import { type PackedBatch, packBatch } from '../models/packed-batch.js'
import { endTokens, type Style } from '../processing/conversation/styles.js'
import { decodeImage } from '../processing/image/decode.js'
import { normalise, preprocessImage } from '../processing/image/preprocess.js'
import { buildPrompt, type Sample } from '../processing/sample.js'
import { mismatch } from '../util/errors.js'
import { Rng } from '../util/rng.js'

export interface Sampling {
  /** 0: always the most likely token (default) */
  temperature?: number
  /** 0: all (default) */
  topK?: number
  /** 1: all (default) */
  topP?: number
  seed?: number
}

export interface GenerateRequest {
  prompt: string
  /** a file, or the bytes of one */
  image?: string | Uint8Array
  /** earlier turns, a system turn first if there is one; the picture belongs to the first human one */
  history?: readonly Turn[]
  /** which of the seed's random streams it is sampled with; default its place in the batch */
  stream?: number
}

export interface GenerateOptions extends Sampling {
  /** default 256 */
  maxNewTokens?: number
  /** prompt style; default the model's own (`conversation`) */
  style?: Style
  /** images are padded to a square first where the model's config wants it; default true, pre-training does not */
  pad?: boolean
  system?: string
  /** texts that end an answer; they are not part of it */
  stop?: readonly string[]
  /** how the alignment vector is made; default the model's way, { mode: 'level', level } is one level for all */
  mix?: Mix
  signal?: AbortSignal
}

export interface GeneratedPiece {
  text: string
  id: number
  /** weight of each local level (N-1) and of the global one; null without a picture or vector */
  alpha: number[] | null
}

export interface Generated {
  text: string
  /** the end token included */
  ids: number[]
  alpha: number[] | null
  /** end: end token or stop text; length: maxNewTokens reached */
  finish: 'end' | 'length'
}

/** A batch of sequences being continued. Frees its cache on `dispose`. */
export class Decoding {
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

  constructor(
    private readonly model: AlignGPTNetwork,
    batch: PackedBatch,
    mix: Mix,
    maxNewTokens: number,
  ) {
    const c = model.config.llm
    const sequences = batch.offsets.length - 1
    const counts = Array.from({ length: sequences }, (_, s) => batch.offsets[s + 1] - batch.offsets[s])
    const width = c.num_key_value_heads * c.head_dim
    const longest = Math.max(...counts) + maxNewTokens
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
    const logits = linear(hidden, this.model.headWeight)
    return logits.dtype === 'f32' ? logits : cast(logits, 'f32')
  }

  get logits(): Tensor {
    return this.#logits
  }

  /** Picks the next token of every sequence. @param uniform one number in [0, 1) for each */
  sample(o: Sampling, uniform: number[]): number[] {
    return native.sample(this.#logits.h, o.temperature ?? 0, o.topK ?? 0, o.topP ?? 1, uniform)
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
    if (wantsGraphs(this.model.device) && before === this.#going) {
      this.#graph = new Graph(this.model.device, () => this.#next()) // the step before warmed everything up
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
        const x = embedding(this.#ids.tensor, this.model.language.embeddings)
        const hidden = this.model.hidden(x, { ...packing, cache: this.#cache })
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

/** The prompt of a request. */
export function promptOf(model: AlignGPTNetwork, r: GenerateRequest, o: GenerateOptions, i: number): Sample {
  const turns: Turn[] = [...(r.history ?? []), { from: 'human', value: r.prompt }]
  const image = r.image !== undefined
  const first = turns.findIndex((t) => t.from === 'human')
  if (image && !turns.some((t) => t.value.includes('<image>')))
    turns[first] = { ...turns[first], value: `<image>\n${turns[first].value}` }
  const options = { style: o.style ?? model.conversation, system: o.system, patches: model.patches, id: `request ${i}` }
  return buildPrompt(turns, image ? 'picture' : null, model.tokenizer, options)
}

/**
 * An image as the vision tower wants it: [3, S, S].
 * @param pad as `AlignGPTNetwork.preprocess` takes it
 * @throws ERR_IMAGE
 */
export async function loadPixels(
  model: AlignGPTNetwork,
  image: string | Uint8Array,
  pad = true,
): Promise<Float32Array> {
  return normalise(preprocessImage(await decodeImage(image), model.preprocess(pad)), model.preprocessor)
}

/** Packs samples with the pixels of those that have a picture, for the way their vectors will be made. */
export function packWithPixels(
  model: AlignGPTNetwork,
  samples: readonly Sample[],
  pixels: readonly (Float32Array | null)[],
  mix: Mix,
  gateText: 'all' | 'instruction' = 'all',
): PackedBatch {
  return packBatch(samples, model.patches, {
    gateText,
    align: mix.mode !== 'none',
    size: model.imageSize,
    fill: (out, offset, b) => out.set(pixels[b] as Float32Array, offset),
  })
}

/** Ids that end an answer: the tokenizer's, the config's, the prompt style's. */
function endIds(model: AlignGPTNetwork, style: Style): Set<number> {
  const named = endTokens(style)
    .map((t) => model.tokenizer.tokenToId(t))
    .filter((id) => id !== undefined)
  return new Set([model.tokenizer.eosId, ...model.config.llm.eos_token_ids, ...named] as number[])
}

interface Progress extends Generated {
  done: boolean
  /** text already handed out, and text that may be the beginning of a stop text */
  held: string
}

/**
 * Answers a batch of requests; yields after every token of every sequence that goes on.
 * The sampled tokens are a pure function of (seed, request's place in the batch, token number).
 */
async function* decode(
  model: AlignGPTNetwork,
  requests: readonly GenerateRequest[],
  o: GenerateOptions,
): AsyncGenerator<{ index: number; piece: GeneratedPiece }, Generated[]> {
  const samples = requests.map((r, i) => promptOf(model, r, o, i))
  const limit = model.config.tokenizer_model_max_length
  const long = samples.find((s) => s.length > limit)
  if (long) throw mismatch('ERR_DATA', 'generate', long.id, `a prompt of at most ${limit} rows`, `${long.length}`)
  const pixels = await Promise.all(
    requests.map((r) => (r.image === undefined ? null : loadPixels(model, r.image, o.pad))),
  )
  const mix = o.mix ?? model.mix
  const batch = packWithPixels(model, samples, pixels, mix)
  const maxNew = o.maxNewTokens ?? 256
  const decoding = new Decoding(model, batch, mix, maxNew)
  try {
    const ends = endIds(model, o.style ?? model.conversation)
    const rngs = requests.map((r, i) => new Rng(o.seed ?? 0, r.stream ?? i))
    const streams = requests.map(() => model.tokenizer.stream({ skipSpecialTokens: true }))
    const alphas = requests.map((_, i) => decoding.alpha[batch.imageSamples.indexOf(i)] ?? null)
    const state: Progress[] = alphas.map((alpha) => ({
      text: '',
      ids: [],
      alpha,
      finish: 'length',
      done: false,
      held: '',
    }))
    for (let n = 0; n < maxNew && state.some((s) => !s.done); n++) {
      o.signal?.throwIfAborted()
      const ids = decoding.sample(
        o,
        rngs.map((r) => r.next()),
      )
      const next: (number | null)[] = []
      for (const [i, s] of state.entries()) {
        if (s.done) {
          next.push(null)
          continue
        }
        const id = ids[i]
        s.ids.push(id)
        const ended = ends.has(id)
        const text = accept(s, ended ? streams[i].end() : streams[i].push(id), o.stop ?? [], ended)
        if (ended) s.done = true
        if (s.done) s.finish = 'end'
        next.push(s.done ? null : id)
        yield { index: i, piece: { text, id, alpha: s.alpha } }
      }
      if (n + 1 < maxNew && next.some((id) => id !== null)) decoding.push(next)
      await new Promise((resolve) => setImmediate(resolve)) // signals and other work get their turn
    }
    for (const [i, s] of state.entries())
      if (!s.done) {
        const text = accept(s, streams[i].end(), o.stop ?? [], true)
        if (text) yield { index: i, piece: { text, id: s.ids.at(-1) ?? -1, alpha: s.alpha } }
      }
    return state.map(({ text, ids, alpha, finish }) => ({ text: text.trim(), ids, alpha, finish }))
  } finally {
    decoding.dispose()
  }
}

/** Adds text to an answer; returns what may be shown now. What could become a stop text is held back. */
function accept(s: Progress, added: string, stop: readonly string[], last: boolean): string {
  s.held += added
  const cut = stop.map((t) => s.held.indexOf(t)).filter((at) => at >= 0)
  if (cut.length) {
    const text = s.held.slice(0, Math.min(...cut))
    s.text += text
    s.held = ''
    s.done = true
    return text
  }
  let keep = 0
  if (!last)
    for (const t of stop)
      for (let n = Math.min(t.length - 1, s.held.length); n > keep; n--) if (s.held.endsWith(t.slice(0, n))) keep = n
  const text = s.held.slice(0, s.held.length - keep)
  s.held = s.held.slice(s.held.length - keep)
  s.text += text
  return text
}

/** Streams the answer to one request. */
export async function* generate(
  model: AlignGPTNetwork,
  o: GenerateRequest & GenerateOptions,
): AsyncGenerator<GeneratedPiece, Generated> {
  const run = decode(model, [o], o)
  for (;;) {
    const { value, done } = await run.next()
    if (done) return (value as Generated[])[0]
    yield (value as { piece: GeneratedPiece }).piece
  }
}

/** Answers many requests at once; the i-th result belongs to the i-th request. */
export async function generateBatch(
  model: AlignGPTNetwork,
  requests: readonly GenerateRequest[],
  o: GenerateOptions = {},
): Promise<Generated[]> {
  if (requests.length === 0) return []
  const run = decode(model, requests, o)
  for (;;) {
    const { value, done } = await run.next()
    if (done) return value as Generated[]
  }
}

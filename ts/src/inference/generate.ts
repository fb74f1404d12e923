/** Inference: requests in, answers out, one by one as a stream or many at once. */
import { setImmediate as turn } from 'node:timers/promises'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { StreamDecoder } from '../processing/tokenizer.js'
import { AlignGPTError } from '../util/errors.js'
import { Rng } from '../util/rng.js'
import { Decoding } from './engine.js'
import { endIds, type GenerateRequest, type PromptSettings, packWithPixels, prepare, type Ready } from './request.js'
import { type GenerationSettings, generationSettings, type Sampling } from './sampling.js'
import { StopText } from './stop-text.js'

export interface GenerateOptions extends Sampling, PromptSettings {
  /** longest answer, and never more than the context leaves. Default generation_config.json's `max_new_tokens`, else 256 */
  maxNewTokens?: number
  /** images are padded to a square first where the model's config wants it; default true, pre-training does not */
  pad?: boolean
  /** texts that end an answer; they are not part of it */
  stop?: readonly string[]
  /** how the alignment vector is made; default the model's way, { mode: 'level', level } is one level for all */
  mix?: Mix
  signal?: AbortSignal
}

export interface BatchOptions extends GenerateOptions {
  /** a request that cannot be answered gets an `error` in place of a text, and the others their answers; default: it ends all of them */
  keepGoing?: boolean
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
  /** end: end token or stop text; length: maxNewTokens reached, or the end of the model's context; error: see there */
  finish: 'end' | 'length' | 'error'
  /** with `keepGoing`: why there is no answer, ERR_DATA or ERR_IMAGE; `text` and `ids` are empty */
  error?: AlignGPTError
}

/** An answer on its way. */
interface Answering {
  ids: number[]
  /** tokens it may have */
  room: number
  alpha: number[] | null
  text: StopText
  stream: StreamDecoder
  rng: Rng
  finish: Generated['finish'] | null
}

/** Adds a token to an answer. */
function take(a: Answering, id: number, ends: ReadonlySet<number>): GeneratedPiece {
  a.ids.push(id)
  const ended = ends.has(id)
  let text = a.text.add(ended ? a.stream.end() : a.stream.push(id), ended)
  if (ended || a.text.stopped) a.finish = 'end'
  else if (a.ids.length >= a.room) {
    a.finish = 'length'
    text += a.text.add(a.stream.end(), true)
  }
  return { text, id, alpha: a.alpha }
}

/** What a batch of requests needs on its way; the caller disposes the decoding. */
function start(
  model: AlignGPTNetwork,
  ready: readonly Ready[],
  o: GenerateOptions,
  seed: number,
): { decoding: Decoding; answers: Answering[] } {
  const mix = o.mix ?? model.mix
  const [samples, pixels] = [ready.map((r) => r.sample), ready.map((r) => r.pixels)]
  const batch = packWithPixels(model, samples, pixels, mix)
  const rooms = ready.map((r) => r.room)
  const decoding = new Decoding(model, batch, mix, rooms)
  const answers = ready.map(
    ({ request, room }, i): Answering => ({
      ids: [],
      room,
      alpha: decoding.alpha[batch.imageSamples.indexOf(i)] ?? null,
      text: new StopText(o.stop ?? []),
      stream: model.tokenizer.stream({ skipSpecialTokens: true }),
      rng: new Rng(seed, request.stream ?? i),
      finish: room > 0 ? null : 'length',
    }),
  )
  return { decoding, answers }
}

/**
 * Answers a batch of requests; yields after every token of every sequence that goes on.
 * The sampled tokens are a pure function of (seed, request's place in the batch, token number).
 */
async function* decode(
  model: AlignGPTNetwork,
  ready: readonly Ready[],
  o: GenerateOptions,
  settings: GenerationSettings,
): AsyncGenerator<{ index: number; piece: GeneratedPiece }, Generated[]> {
  const ends = endIds(model, o.style ?? model.conversation)
  const { decoding, answers } = start(model, ready, o, settings.seed)
  try {
    while (answers.some((a) => a.finish === null)) {
      o.signal?.throwIfAborted()
      const uniform = answers.map((a) => a.rng.next())
      const ids = decoding.sample(settings, uniform)
      for (const [index, a] of answers.entries())
        if (a.finish === null) yield { index, piece: take(a, ids[index], ends) }
      const next = answers.map((a, i) => (a.finish === null ? ids[i] : null))
      if (next.some((id) => id !== null)) decoding.push(next)
      await turn() // signals and other work get their turn
    }
    return answers.map(({ text, ids, alpha, finish }) => ({
      text: text.text.trim(),
      ids,
      alpha,
      finish: finish ?? 'length',
    }))
  } finally {
    decoding.dispose()
  }
}

/**
 * Streams the answer to one request. What the options leave open is what the model's generation_config.json says.
 * @throws AlignGPTError ERR_DATA: a prompt that leaves no room in the model's context, turns that do not alternate; ERR_IMAGE
 */
export async function* generate(
  model: AlignGPTNetwork,
  o: GenerateRequest & GenerateOptions,
): AsyncGenerator<GeneratedPiece, Generated> {
  const settings = generationSettings(model.parts.generation, o)
  const ready = await prepare(model, o, { ...o, maxNewTokens: settings.maxNewTokens }, 'request 0')
  const run = decode(model, [ready], o, settings)
  for (;;) {
    const { value, done } = await run.next()
    if (done) return (value as Generated[])[0]
    yield (value as { piece: GeneratedPiece }).piece
  }
}

/** What is wrong with a request, for one that can be answered without it; anything else is thrown. */
function faultOf(e: unknown): AlignGPTError {
  if (e instanceof AlignGPTError && (e.code === 'ERR_DATA' || e.code === 'ERR_IMAGE')) return e
  throw e
}

/**
 * Answers many requests at once; the i-th result belongs to the i-th request.
 * @throws AlignGPTError as `generate`; with `keepGoing` what is wrong with a request is the `error` of its result
 */
export async function generateBatch(
  model: AlignGPTNetwork,
  requests: readonly GenerateRequest[],
  o: BatchOptions = {},
): Promise<Generated[]> {
  const settings = generationSettings(model.parts.generation, o)
  const options = { ...o, maxNewTokens: settings.maxNewTokens }
  const asked = await Promise.all(
    requests.map((r, i): Promise<Ready | AlignGPTError> => {
      const stream = r.stream ?? i // a request that is left out changes no draw of the others
      const ready = prepare(model, { ...r, stream }, options, `request ${i}`)
      return o.keepGoing ? ready.catch(faultOf) : ready
    }),
  )
  const ready = asked.filter((r): r is Ready => !(r instanceof AlignGPTError))
  const answers = ready.length ? await whole(decode(model, ready, o, settings)) : []
  const next = answers.values()
  return asked.map((r) =>
    r instanceof AlignGPTError
      ? { text: '', ids: [], alpha: null, finish: 'error', error: r }
      : (next.next().value as Generated),
  )
}

/** What a run of answers returns. */
async function whole<T>(run: AsyncGenerator<unknown, T>): Promise<T> {
  for (;;) {
    const { value, done } = await run.next()
    if (done) return value as T
  }
}

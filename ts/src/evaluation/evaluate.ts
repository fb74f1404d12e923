/** Accuracy on questions about images, each with the blind control: the same questions about other images. */
import { setImmediate as turn } from 'node:timers/promises'
import type { Turn } from '../formats/record-file.js'
import { generateBatch } from '../inference/generate.js'
import { type GenerateRequest, loadPixels, packWithPixels, placeImage, promptOf } from '../inference/request.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { Style } from '../processing/conversation/styles.js'
import { readImage } from '../processing/image/source.js'
import { buildSample, type Sample } from '../processing/sample.js'
import { AlignGPTError } from '../util/errors.js'
import { otherImages } from './blind.js'
import { type Candidates, candidates, chanceOf, isOpen, type Judge, judgeOf, matches, type OpenJudge } from './judge.js'
import { sampleLosses, type TooLong } from './likelihood.js'
import { type ImagePlace, imageFile, type Question } from './questions.js'

export interface EvaluateOptions {
  /** folder of the pictures, or what openImages gives; default: `image` is a path */
  images?: ImagePlace
  /** default: choice where there are options, yesno where the answer is yes or no, else exact */
  judge?: Judge
  style?: Style
  mix?: Mix
  /** questions run at once, default 16 */
  batch?: number
  /** of generated answers, default 32 */
  maxNewTokens?: number
  /** also ask about another picture, one with other content (default true where there are two of them) */
  blind?: boolean
  seed?: number
  signal?: AbortSignal
  /** asked between batches; true ends the evaluation with the questions asked so far */
  stop?: () => boolean
  /** told after each batch; the second list are the answers to shuffled pictures */
  onAnswers?: (answers: readonly Answer[], blind: readonly Answer[] | null) => void
}

export interface Answer {
  id: string
  answer: string
  given: string
  correct: boolean
  /** why it was left out: too long, no picture that can be read. It counts neither as right nor as wrong */
  problem?: string
  /** of a problem that is a mistake in the data: ERR_DATA, ERR_IMAGE */
  code?: string
  /** the end of the question or of its answers did not fit and was cut */
  cut?: true
}

export interface Evaluation extends TooLong {
  /** of the questions asked; NaN without any */
  accuracy: number
  /** accuracy with other pictures; null when not asked for, or without another picture */
  blind: number | null
  /** accuracy of guessing; null for open questions */
  chance: number | null
  /** questions asked: all, but for those left out and for `stop` */
  count: number
  /** of every question in turn, those left out too */
  answers: Answer[]
  /** those about other pictures; null where `blind` is */
  blindAnswers: Answer[] | null
}

/** Decoded images kept for the next questions about them. */
const KEPT_IMAGES = 256

/** A question that is judged by likelihood, and each of its possible answers as a sample. */
interface Closed extends Candidates {
  q: Question
  samples: Sample[]
  pixels: Float32Array | null
}

/** A mistake in a question, such as a picture that cannot be read; anything else is thrown. */
function faultOf(e: unknown): AlignGPTError {
  if (e instanceof AlignGPTError && (e.code === 'ERR_DATA' || e.code === 'ERR_IMAGE')) return e
  throw e
}
const leftOut = (q: Question, problem: string, code?: string): Answer => ({
  ...{ id: q.id, answer: q.answer, given: '', correct: false, problem },
  ...(code && { code }),
})

/** Asks questions. What does not fit is treated as training treats a sample that is too long. */
class Asker {
  readonly #model: AlignGPTNetwork
  readonly #o: EvaluateOptions
  readonly #mix: Mix
  readonly #pixels = new Map<string, Promise<Float32Array>>()

  constructor(model: AlignGPTNetwork, o: EvaluateOptions) {
    this.#model = model
    this.#o = o
    this.#mix = o.mix ?? model.mix
  }

  #image(name: string): string | Uint8Array {
    const { images } = this.#o
    return typeof images === 'object' ? readImage(images.locate(name)) : imageFile(name, images)
  }

  #load(name: string): Promise<Float32Array> {
    let p = this.#pixels.get(name)
    if (!p) {
      if (this.#pixels.size >= KEPT_IMAGES) this.#pixels.clear()
      p = loadPixels(this.#model, this.#image(name), true, name)
      this.#pixels.set(name, p)
    }
    return p
  }

  /** The conversation up to one of a question's possible answers, which alone is looked at. */
  #sample(q: Question, prompt: string, text: string): Sample {
    const { tokenizer, patches, config, conversation } = this.#model
    const asked: Turn[] = [...(q.history ?? []), { from: 'human', value: prompt }]
    const placed =
      q.image === undefined || q.imageTurn !== undefined
        ? { turns: asked, imageTurn: q.imageTurn }
        : placeImage(q.id, asked)
    const conversations: Turn[] = [...placed.turns, { from: 'gpt', value: text }]
    const record = { id: q.id, image: q.image ?? null, conversations, similarity: null, imageTurn: placed.imageTurn }
    return buildSample(record, tokenizer, {
      ...{ style: this.#o.style ?? conversation, patches, lastAnswer: true, literal: true },
      maxLength: config.tokenizer_model_max_length,
    })
  }

  /** Mean log-likelihood of each possible answer's tokens. */
  #likelihoods(questions: readonly Closed[]): number[][] {
    if (!questions.length) return []
    const samples = questions.flatMap((c) => c.samples)
    const pixels = questions.flatMap((c) => c.samples.map(() => c.pixels))
    // gateText 'instruction': as at inference, the gate must not see the answer that is being judged
    const batch = packWithPixels(this.#model, samples, pixels, this.#mix, 'instruction')
    const losses = sampleLosses(this.#model, batch, this.#mix).map(({ nll, tokens }) => -nll / Math.max(1, tokens))
    return questions.map((c) => losses.splice(0, c.samples.length))
  }

  /** A question with its possible answers as samples, or why it is left out. */
  async #prepare(q: Question, judge: Judge): Promise<Closed | Answer> {
    const c = candidates(q, judge)
    try {
      const samples = c.texts.map((text) => this.#sample(q, c.prompt, text))
      // the answers are compared, so all of them have to be there
      const skip = samples.find((s) => s.skip !== null)?.skip
      if (skip) return { ...leftOut(q, skip), answer: c.texts[c.right] }
      return { q, ...c, samples, pixels: q.image ? await this.#load(q.image) : null }
    } catch (e) {
      const { message, code } = faultOf(e)
      return { ...leftOut(q, message, code), answer: c.texts[c.right] }
    }
  }

  /** Answers to questions of which the possible answers are known. */
  async #closed(judged: readonly { q: Question; judge: Judge }[], answers: Map<Question, Answer>): Promise<void> {
    const fit: Closed[] = []
    for (const { q, judge } of judged) {
      const found = await this.#prepare(q, judge)
      if ('samples' in found) fit.push(found)
      else answers.set(q, found)
    }
    for (const [i, scores] of this.#likelihoods(fit).entries()) {
      const { q, texts, right, samples } = fit[i]
      const best = scores.indexOf(Math.max(...scores))
      const cut = samples.some((s) => s.length < s.fullLength)
      const answer = { id: q.id, answer: texts[right], given: texts[best], correct: best === right }
      answers.set(q, { ...answer, ...(cut && { cut }) })
    }
  }

  /** The request of an open question, or why it is left out. */
  #request(q: Question): GenerateRequest | Answer {
    const { question: prompt, history, imageTurn } = q
    try {
      const picture = q.image && { image: this.#image(q.image), name: q.image }
      const request = { prompt, history, imageTurn, ...picture }
      const { length } = promptOf(this.#model, request, { style: this.#o.style }, q.id)
      const limit = this.#model.context - 1
      return length > limit ? leftOut(q, `a prompt of ${length} rows, the limit is ${limit}`) : request
    } catch (e) {
      const { message, code } = faultOf(e)
      return leftOut(q, message, code)
    }
  }

  /** Answers to open questions: greedy, whatever generation_config.json says of sampling. */
  async #open(judged: readonly { q: Question; judge: OpenJudge }[], answers: Map<Question, Answer>): Promise<void> {
    const { maxNewTokens = 32, style, signal } = this.#o
    const fit: { q: Question; judge: OpenJudge; request: GenerateRequest }[] = []
    for (const { q, judge } of judged) {
      const found = this.#request(q)
      if ('prompt' in found) fit.push({ q, judge, request: found })
      else answers.set(q, found)
    }
    const greedy = { temperature: 0, topK: 0, topP: 1 }
    const requests = fit.map((a) => a.request)
    const options = { ...greedy, maxNewTokens, style, mix: this.#mix, signal, keepGoing: true }
    for (const [i, g] of (await generateBatch(this.#model, requests, options)).entries()) {
      const { q, judge } = fit[i]
      const cut = g.finish === 'length' && g.ids.length < maxNewTokens
      const answer = { id: q.id, answer: q.answer, given: g.text, correct: matches(g.text, q.answer, judge) }
      answers.set(q, g.error ? leftOut(q, g.error.message, g.error.code) : { ...answer, ...(cut && { cut }) })
    }
  }

  async ask(questions: readonly Question[]): Promise<Answer[]> {
    const judged = questions.map((q) => ({ q, judge: judgeOf(q, this.#o.judge) }))
    const answers = new Map<Question, Answer>()
    await this.#closed(
      judged.filter(({ judge }) => !isOpen(judge)),
      answers,
    )
    await this.#open(
      judged.filter((j): j is { q: Question; judge: OpenJudge } => isOpen(j.judge)),
      answers,
    )
    return questions.map((q) => answers.get(q) as Answer)
  }
}

/** Share of right answers among those to questions that were asked; NaN without any. */
export function accuracyOf(answers: readonly Answer[], right = (a: Answer): boolean => a.correct): number {
  const asked = answers.filter((a) => a.problem === undefined)
  return asked.filter(right).length / asked.length
}

/** Both are of the same questions: what was left out with its own picture is with another one. */
const both = (seen: readonly Answer[], blind: readonly Answer[]): Answer[] =>
  blind.map((b, i) => {
    const { problem, code } = seen[i]
    return problem === undefined ? b : { ...b, given: '', correct: false, problem, ...(code && { code }) }
  })

/**
 * Asks every question, and once more blind. Generated answers are the most likely ones (greedy): what the model's
 * generation_config.json says of sampling and length is for talking to it, not for measuring it. A question that is too long is treated as
 * training treats a sample that is: the end is cut, and where picture or answer do not fit it is left out. So is one whose picture cannot
 * be read: `leftOut` names it.
 * @throws AlignGPTError ERR_DATA without questions, or where an answer is none of the options
 */
export async function evaluate(
  model: AlignGPTNetwork,
  questions: readonly Question[],
  o: EvaluateOptions = {},
): Promise<Evaluation> {
  if (questions.length === 0)
    throw new AlignGPTError('ERR_DATA', '[evaluate] questions: expected at least one, got none')
  const asker = new Asker(model, o)
  const control = o.blind ?? questions.some((q) => q.image)
  const others = control ? otherImages(questions, o) : null
  const answers: Answer[] = []
  const blindAnswers: Answer[] = []
  const size = o.batch ?? 16
  for (let at = 0; at < questions.length && !o.stop?.(); at += size) {
    o.signal?.throwIfAborted()
    const seen = await asker.ask(questions.slice(at, at + size))
    const blind = others && both(seen, await asker.ask(others.slice(at, at + size)))
    answers.push(...seen)
    blindAnswers.push(...(blind ?? []))
    o.onAnswers?.(seen, blind)
    await turn()
  }
  const asked = questions.filter((_, i) => i < answers.length && answers[i].problem === undefined)
  return {
    accuracy: accuracyOf(answers),
    blind: others ? accuracyOf(blindAnswers) : null,
    chance: chanceOf(asked, o.judge),
    count: asked.length,
    answers,
    blindAnswers: others ? blindAnswers : null,
    cut: answers.filter((a) => a.cut).map((a) => a.id),
    leftOut: answers.flatMap(({ id, problem }) => (problem === undefined ? [] : [{ id, reason: problem }])),
  }
}

/** Accuracy on questions about pictures, each with the blind control: the same questions about other pictures. */
import { createHash } from 'node:crypto'
import { noGrad, scope } from '../core/tensor.js'
import type { Dataset } from '../data/dataset.js'
import type { Turn } from '../formats/record-file.js'
import { type GenerateRequest, generateBatch, loadPixels, packWithPixels, promptOf } from '../inference/generate.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { Style } from '../processing/conversation/styles.js'
import { type Pictures, readFilePart, readPicture, resolveImage } from '../processing/image/source.js'
import { buildSample, type Sample } from '../processing/sample.js'
import { AlignGPTError } from '../util/errors.js'
import { permutation } from '../util/rng.js'

export interface Question {
  id: string
  /** path of the picture, below `images` where that is given */
  image?: string
  question: string
  /** the conversation before it, with the true answers; a system turn first if there is one */
  history?: readonly Turn[]
  answer: string
  /** choices in words; the answer is one of them */
  options?: readonly string[]
}

/**
 * How an answer is judged. yesno and choice: the most likely of the possible answers (mean log-likelihood of its tokens);
 * letter: the most likely of A, B, C, ... after the lettered options; exact and contains: of the generated text, ignoring
 * case and punctuation.
 */
export type Judge = 'yesno' | 'choice' | 'letter' | 'exact' | 'contains'

export interface EvaluateOptions {
  /** folder of the pictures, or what openPictures gives; default: `image` is a path */
  images?: string | Pictures
  /** default: choice where there are options, yesno where the answer is yes or no, else exact */
  judge?: Judge
  style?: Style
  mix?: Mix
  /** questions run at once, default 16 */
  batch?: number
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
  /** why it was not asked, which counts as a wrong answer */
  problem?: string
}
export interface Evaluation {
  /** NaN when `stop` came before the first batch */
  accuracy: number
  /** accuracy with other pictures; null when not asked for, or without another picture */
  blind: number | null
  /** accuracy of guessing; null for open questions */
  chance: number | null
  /** questions asked: all, but for `stop` */
  count: number
  answers: Answer[]
  /** those about other pictures; null where `blind` is */
  blindAnswers: Answer[] | null
}

const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'

function judgeOf(q: Question, o: EvaluateOptions): Judge {
  if (o.judge) return o.judge
  if (q.options) return 'choice'
  return /^(yes|no)\b/i.test(q.answer) ? 'yesno' : 'exact'
}

/** What the model may say, and which of it is right. */
function candidates(q: Question, judge: Judge): { prompt: string; texts: string[]; right: number } {
  if (judge === 'yesno') return { prompt: q.question, texts: ['Yes', 'No'], right: /^yes\b/i.test(q.answer) ? 0 : 1 }
  const options = q.options ?? []
  const right = options.indexOf(q.answer)
  if (right < 0)
    throw new AlignGPTError(
      'ERR_DATA',
      `[evaluate] '${q.id}': answer: expected one of ${JSON.stringify(options)}, got ${q.answer}`,
    )
  if (judge === 'choice') return { prompt: q.question, texts: [...options], right }
  const listed = options.map((text, i) => `${LETTERS[i]}. ${text}`).join('\n')
  const prompt = `${q.question}\n${listed}\nAnswer with the option's letter from the given choices directly.`
  return { prompt, texts: options.map((_, i) => LETTERS[i]), right }
}

const normal = (text: string): string =>
  text
    .toLowerCase()
    .replace(/[^\p{L}\p{N}\s]/gu, '')
    .replace(/\s+/g, ' ')
    .trim()

/** Whether a generated answer is right, ignoring case and punctuation. */
export function matches(given: string, answer: string, judge: 'exact' | 'contains'): boolean {
  const [a, b] = [normal(given), normal(answer)]
  return judge === 'exact' || b === '' ? a === b : a.includes(b)
}

/** Decoded pictures kept for the next questions about them. */
const KEPT_PICTURES = 256

class Asker {
  readonly #pixels = new Map<string, Promise<Float32Array>>()
  constructor(
    private readonly model: AlignGPTNetwork,
    private readonly o: EvaluateOptions,
  ) {}

  #picture(image: string): string | Uint8Array {
    const { images } = this.o
    return typeof images === 'object' ? readPicture(images.locate(image)) : fileOf(image, images)
  }
  #load(image: string): Promise<Float32Array> {
    let p = this.#pixels.get(image)
    if (!p) {
      if (this.#pixels.size >= KEPT_PICTURES) this.#pixels.clear()
      p = loadPixels(this.model, this.#picture(image))
      this.#pixels.set(image, p)
    }
    return p
  }

  /** Mean log-likelihood of each candidate's answer tokens. */
  async likelihoods(questions: readonly { q: Question; prompt: string; texts: string[] }[]): Promise<number[][]> {
    const samples: Sample[] = []
    const pixels: (Float32Array | null)[] = []
    for (const { q, prompt, texts } of questions)
      for (const text of texts) {
        // without <image> the picture goes to the front of the first question
        const conversations: Turn[] = [
          ...(q.history ?? []),
          { from: 'human', value: prompt },
          { from: 'gpt', value: text },
        ]
        const record = { id: q.id, image: q.image ?? null, conversations, similarity: null }
        const options = {
          style: this.o.style ?? this.model.conversation,
          patches: this.model.patches,
          lastAnswer: true,
        }
        samples.push(buildSample(record, this.model.tokenizer, options))
        pixels.push(q.image ? await this.#load(q.image) : null)
      }
    // gateText 'instruction': as at inference, the gate must not see the answer that is being judged
    const mix = this.o.mix ?? this.model.mix
    const batch = packWithPixels(this.model, samples, pixels, mix, 'instruction')
    const nll = scope(() => noGrad(() => this.model.loss(batch, mix).nll.toFloats()))
    const sums = samples.map(() => ({ sum: 0, n: 0 }))
    let s = 0
    for (const [i, row] of batch.lossRows.entries()) {
      while (row >= batch.offsets[s + 1]) s++
      sums[s].sum -= nll[i]
      sums[s].n++
    }
    let at = 0
    return questions.map(({ texts }) => texts.map(() => sums[at].sum / Math.max(1, sums[at++].n)))
  }

  /** What the model says to each, or why it cannot be asked. */
  async #generate(questions: readonly Question[]): Promise<Map<Question, { text?: string; problem?: string }>> {
    const { maxNewTokens = 32, style, mix, signal } = this.o
    const options = { maxNewTokens, style, mix, signal }
    const limit = this.model.config.tokenizer_model_max_length
    const said = new Map<Question, { text?: string; problem?: string }>()
    const requests: GenerateRequest[] = []
    const asked = questions.filter((q, i) => {
      const { question: prompt, history } = q
      const request = { prompt, history, ...(q.image && { image: this.#picture(q.image) }) }
      const { length } = promptOf(this.model, request, options, i)
      if (length > limit) said.set(q, { problem: `a prompt of ${length} rows, the limit is ${limit}` })
      else requests.push(request)
      return length <= limit
    })
    for (const [i, { text }] of (await generateBatch(this.model, requests, options)).entries())
      said.set(asked[i], { text })
    return said
  }

  async ask(questions: readonly Question[]): Promise<Answer[]> {
    const judged = questions.map((q) => ({ q, judge: judgeOf(q, this.o) }))
    const answers = new Map<Question, Answer>()
    const closed = judged.filter(({ judge }) => judge !== 'exact' && judge !== 'contains')
    const asked = closed.map(({ q, judge }) => ({ q, ...candidates(q, judge) }))
    const scores = asked.length ? await this.likelihoods(asked) : []
    for (const [i, { q, texts, right }] of asked.entries()) {
      const best = scores[i].indexOf(Math.max(...scores[i]))
      answers.set(q, { id: q.id, answer: texts[right], given: texts[best], correct: best === right })
    }
    const open = judged.flatMap(({ q, judge }) => (judge === 'exact' || judge === 'contains' ? [{ q, judge }] : []))
    for (const [q, given] of await this.#generate(open.map(({ q }) => q))) {
      const judge = judgeOf(q, this.o) as 'exact' | 'contains'
      const { text = '', problem } = given
      const correct = problem === undefined && matches(text, q.answer, judge)
      answers.set(q, { id: q.id, answer: q.answer, given: text, correct, ...(problem && { problem }) })
    }
    return questions.map((q) => answers.get(q) as Answer)
  }
}

/** Hash of a picture file's bytes. @throws AlignGPTError ERR_IMAGE */
function contentOf(image: string, images: EvaluateOptions['images']): string {
  const bytes = typeof images === 'object' ? readPicture(images.locate(image)) : readFilePart(fileOf(image, images))
  return createHash('sha256').update(bytes).digest('base64')
}
const fileOf = (image: string, images: string | undefined): string => (images ? resolveImage(images, image) : image)

/**
 * The questions, each about another picture: a random cycle of all pictures that differ in content, so that none is about its own,
 * under whatever name. Null when there are no two.
 */
export function otherPictures(
  questions: readonly Question[],
  o: Pick<EvaluateOptions, 'images' | 'seed'>,
): Question[] | null {
  const names = [...new Set(questions.flatMap((q) => q.image || []))]
  const content = new Map(names.map((name) => [name, contentOf(name, o.images)]))
  const one = new Map([...content].map(([name, hash]) => [hash, name])) // of each content
  const cycle = [...one.keys()]
  if (cycle.length < 2) return null
  const order = permutation(cycle.length, o.seed ?? 0, 7)
  const next = new Map<string, string>()
  for (let i = 0; i < order.length; i++) next.set(cycle[order[i]], cycle[order[(i + 1) % order.length]])
  const other = (image: string): string => one.get(next.get(content.get(image) as string) as string) as string
  return questions.map((q) => (q.image ? { ...q, image: other(q.image) } : q))
}

/** Asks every question, and once more blind. */
export async function evaluate(
  model: AlignGPTNetwork,
  questions: readonly Question[],
  o: EvaluateOptions = {},
): Promise<Evaluation> {
  if (questions.length === 0)
    throw new AlignGPTError('ERR_DATA', '[evaluate] questions: expected at least one, got none')
  const asker = new Asker(model, o)
  const control = o.blind ?? questions.some((q) => q.image)
  const others = control ? otherPictures(questions, o) : null
  const answers: Answer[] = []
  const blindAnswers: Answer[] = []
  const size = o.batch ?? 16
  for (let at = 0; at < questions.length && !o.stop?.(); at += size) {
    o.signal?.throwIfAborted()
    const seen = await asker.ask(questions.slice(at, at + size))
    const blind = others && (await asker.ask(others.slice(at, at + size)))
    answers.push(...seen)
    blindAnswers.push(...(blind ?? []))
    o.onAnswers?.(seen, blind)
    await new Promise((resolve) => setImmediate(resolve))
  }
  const share = (list: readonly Answer[]): number => list.filter((a) => a.correct).length / list.length
  const odds = questions.slice(0, answers.length).map((q) => {
    const judge = judgeOf(q, o)
    return judge === 'yesno'
      ? 1 / 2
      : judge === 'choice' || judge === 'letter'
        ? 1 / (q.options?.length ?? 1)
        : Number.NaN
  })
  const chance = odds.every(Number.isFinite) ? odds.reduce((a, b) => a + b, 0) / odds.length : null
  const blind = others ? share(blindAnswers) : null
  return {
    ...{ accuracy: share(answers), blind, chance, count: answers.length, answers },
    blindAnswers: others ? blindAnswers : null,
  }
}

/**
 * Mean next-token loss over the labelled tokens of a dataset, in the format of instruction tuning.
 * @param o.stop asked between batches; true ends it with the loss of the records so far
 * @returns the loss, of so many tokens in so many records
 */
export async function evaluateLoss(
  model: AlignGPTNetwork,
  data: Pick<Dataset, 'length' | 'record' | 'picture'>,
  o: { batch?: number; style?: Style; mix?: Mix; stop?: () => boolean } = {},
): Promise<{ loss: number; tokens: number; records: number }> {
  let [sum, tokens, done] = [0, 0, 0]
  const size = o.batch ?? 16
  for (let at = 0; at < data.length && !o.stop?.(); at += size) {
    const records = Array.from({ length: Math.min(size, data.length - at) }, (_, i) => data.record(at + i))
    const options = { style: o.style ?? model.conversation, patches: model.patches } as const
    const samples = records.map((r) => buildSample(r, model.tokenizer, options))
    const load = (name: string): Promise<Float32Array> => loadPixels(model, readPicture(data.picture(name)))
    const pixels = await Promise.all(records.map((r) => (r.image === null ? null : load(r.image))))
    const mix = o.mix ?? model.mix
    const batch = packWithPixels(model, samples, pixels, mix, model.config.mm_gate_text)
    sum += scope(() => noGrad(() => model.loss(batch, mix, { denominator: 1 }).loss.item()))
    tokens += batch.lossRows.length
    done += records.length
    await new Promise((resolve) => setImmediate(resolve))
  }
  return { loss: sum / Math.max(tokens, 1), tokens, records: done }
}

/**
 * Evaluation while a run goes on, on records that it does not train on: their loss, by alignment level or by task, the gate's weights by
 * task, what the model answers to a few of them, and the best model so far. Nothing of it touches what training computes.
 */
import path from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { type Dataset, loadDataset } from '../data/dataset.js'
import { DropLog, type DropState } from '../data/drop-log.js'
import { type Loader, openLoader } from '../data/loader.js'
import type { BadRecord, RecordNeeds } from '../data/record-check.js'
import { type DataRecord, IMAGE_TEXT } from '../formats/record-file.js'
import { generateBatch } from '../inference/generate.js'
import { loadPixels } from '../inference/request.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { GateText } from '../models/config/variants.js'
import type { Style } from '../processing/conversation/styles.js'
import { readImage } from '../processing/image/source.js'
import { thumbnail } from '../processing/image/thumbnail.js'
import { buildSample } from '../processing/sample.js'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { digestFile } from '../util/files.js'
import { writeJsonFile } from '../util/json.js'
import { sampleLosses } from './likelihood.js'

export interface EvaluationOptions {
  /** share of the records that is held out: chosen by the seed, never trained on, evaluated every `evalEvery` steps */
  evalShare?: number
  /** in its place, a data file of its own */
  evalData?: string
  /** its pictures, as loadDataset's `images`; default: where those of the training data are */
  evalImages?: string
  /** steps between evaluations; default a tenth of the run. The last step is always followed by one */
  evalEvery?: number
}

/** Held-out records of one kind. */
export interface HeldOutGroup {
  samples: number
  /** labelled ones */
  tokens: number
  /** mean over the tokens, null without any */
  loss: number | null
}

export interface EvaluationInfo extends HeldOutGroup {
  /** the step it came after, from 0 */
  step: number
  steps: number
  loss: number
  /** the lowest loss so far; the model is in `out/best` */
  best: boolean
  seconds: number
  /** of each alignment level, where vectors are chosen by it (pre-training) */
  levels?: HeldOutGroup[]
  /** of each task, with the mean weights of the alignment vectors over its pictures (null without pictures or vectors) */
  tasks?: Record<string, HeldOutGroup & { coefficients: number[] | null }>
  /** what the model says to the records of samples.json */
  answers: { id: string; text: string }[]
}

/** The best evaluation of a run. */
export interface Best {
  /** the step it came after, from 0 */
  step: number
  loss: number
}

/** Part of a checkpoint. */
export interface HeldOutState {
  /** steps that were done at the last evaluation */
  evaluated: number
  best: Best | null
  dropped: DropState
}

/** Records that are shown with what the model says to them. */
const SAMPLES = 6
const SAMPLE_TOKENS = 32
const THUMBNAIL = 160
/** Tasks that are told apart; the rarer ones are counted together. */
const MAX_TASKS = 16

/** What the first question wants, when the record does not say it: judged by question and answer alone. */
export function taskOf(r: DataRecord): string {
  if (r.task) return r.task
  if (r.image === null) return 'text'
  const { question, answer } = firstTurns(r)
  const words = answer.split(/\s+/).length
  if (/^\(?[A-Z]\)?[.:]?$/.test(answer)) return 'choice'
  if (/^(yes|no)\b/i.test(answer) && words <= 10) return 'yes/no'
  if (/\b(describe|description|caption)\b/i.test(question)) return 'description'
  return words <= 5 ? 'short' : 'long'
}

/** The first question without its picture, and the answer to it. */
function firstTurns({ conversations }: DataRecord): { question: string; answer: string } {
  const at = conversations.findIndex((t) => t.from === 'human')
  const answer = conversations.slice(at + 1).find((t) => t.from === 'gpt')
  const question = at < 0 ? '' : conversations[at].value.replace(IMAGE_TEXT, '')
  return { question: question.trim(), answer: (answer?.value ?? '').trim() }
}

/** Sums over some samples. */
class Tally {
  samples = 0
  tokens = 0
  nll = 0
  pictures = 0
  coefficients: number[] = []
  add(t: Pick<Tally, 'samples' | 'tokens' | 'nll' | 'pictures' | 'coefficients'>): void {
    this.samples += t.samples
    this.tokens += t.tokens
    this.nll += t.nll
    this.pictures += t.pictures
    this.coefficients = t.coefficients.map((c, l) => c + (this.coefficients[l] ?? 0))
  }
  get group(): HeldOutGroup {
    return { samples: this.samples, tokens: this.tokens, loss: this.tokens ? this.nll / this.tokens : null }
  }
  get mean(): number[] | null {
    return this.pictures && this.coefficients.length ? this.coefficients.map((c) => c / this.pictures) : null
  }
}

/** A record that is shown. */
interface Shown {
  record: DataRecord
  picture: string | null
}

/** What an evaluation needs to know of the run. */
export interface HeldOutSettings extends EvaluationOptions {
  /** prompt style */
  style: Style
  /** images padded to a square first */
  pad: boolean
  mix: Mix
  /** folder that samples.json is written to */
  out?: string
  microBatch: number
  steps: number
  gateText: GateText
  workers?: number
  onMessage: (text: string) => void
  signal?: AbortSignal
  /** keeps the model as the best one so far; says whether that could be done */
  keep: (step: number) => boolean
}

/**
 * What a run trains on and what it is evaluated on, null when that is not asked for; without the records that it cannot use.
 * @throws AlignGPTError ERR_ARGUMENT, ERR_DATA
 */
export async function holdOut(
  data: Dataset,
  needs: RecordNeeds,
  o: EvaluationOptions & { seed?: number },
): Promise<{ trained: Dataset; held: Dataset | null }> {
  const trained = await data.usable(needs)
  if (o.evalShare !== undefined) {
    const { rest, held } = trained.holdOut(o.evalShare, o.seed ?? 0)
    return { trained: rest, held }
  }
  if (o.evalData === undefined) return { trained, held: null }
  const held = await loadDataset(o.evalData, { images: o.evalImages ?? data.images ?? undefined })
  if (held.length === 0) throw mismatch('ERR_DATA', 'train', `evalData ${o.evalData}`, 'records', 'none')
  return { trained, held: await held.usable(needs) }
}

/** The evaluations of one run. */
export class HeldOut {
  readonly #model: AlignGPTNetwork
  readonly #data: Dataset
  readonly #o: HeldOutSettings
  readonly #dropped: DropLog
  readonly #every: number
  #loader: Loader | null = null
  #shown: Shown[] | null = null
  #evaluated = 0
  #best: Best | null = null

  constructor(model: AlignGPTNetwork, data: Dataset, o: HeldOutSettings) {
    this.#model = model
    this.#data = data
    this.#o = o
    this.#dropped = new DropLog(data)
    this.#every = o.evalEvery ?? Math.max(1, Math.ceil(o.steps / 10))
  }

  /** What decides about the numbers. */
  get settings(): Record<string, unknown> {
    const { evalShare: share, evalData } = this.#o
    const data = evalData === undefined ? null : digestFile(this.#data.file)
    return { share: share ?? null, every: this.#every, records: this.#data.length, data }
  }
  /** Steps that were done at the last evaluation. */
  get evaluated(): number {
    return this.#evaluated
  }
  /** Records that were left out of its own data file. */
  get bad(): readonly BadRecord[] {
    return this.#data.bad
  }
  get best(): Best | null {
    return this.#best
  }
  get state(): HeldOutState {
    return { evaluated: this.#evaluated, best: this.#best, dropped: this.#dropped.state }
  }

  restore({ evaluated, best, dropped }: HeldOutState): void {
    this.#evaluated = evaluated
    this.#best = best
    this.#dropped.restore(dropped)
  }

  /** Whether an evaluation is missing after so many steps. */
  due(done: number): boolean {
    return done > this.#evaluated && (done % this.#every === 0 || done === this.#o.steps)
  }

  /** The evaluation that is due after so many steps, else null; null too when the signal came meanwhile: it is still due then. */
  async evaluate(done: number): Promise<EvaluationInfo | null> {
    if (!this.due(done)) return null
    const { steps } = this.#o
    const from = performance.now()
    const losses = await this.#losses()
    const answers = losses && (await this.#answers())
    if (!losses || !answers) return null
    const { loss } = losses
    this.#evaluated = done
    if (loss === null) return this.#nothing()
    const step = done - 1
    const best = loss < (this.#best?.loss ?? Number.POSITIVE_INFINITY) && this.#o.keep(step)
    if (best) this.#best = { step, loss }
    return { step, steps, ...losses, loss, best, answers, seconds: (performance.now() - from) / 1000 }
  }

  /** No evaluation, because no held-out record can be used: no reason to lose a run. */
  #nothing(): null {
    const { bad, skipped } = this.#dropped.state
    const [first] = [...bad, ...skipped]
    const why = first ? `, the first because of ${first.reason}` : ''
    this.#o.onMessage(`[train] ${this.#data.file}: none of the held-out records can be used${why}; training goes on`)
    return null
  }

  async close(): Promise<void> {
    await this.#loader?.close()
    this.#data.close()
  }

  async #open(): Promise<Loader> {
    const [model, data, o] = [this.#model, this.#data, this.#o]
    const evaluations = Math.ceil((o.steps - this.#evaluated) / this.#every)
    return openLoader(data, {
      tokenizer: model.tokenizer,
      preprocess: model.preprocess(o.pad),
      style: o.style,
      patches: model.patches,
      maxLength: model.config.tokenizer_model_max_length,
      batch: o.microBatch,
      steps: evaluations * data.stepsPerEpoch(o.microBatch),
      shuffle: false,
      seed: 0,
      gateText: o.gateText,
      workers: o.workers,
      dropped: this.#dropped,
      align: o.mix.mode !== 'none',
      maxBad: 1, // a few records: one bad picture may be a large share of them
    })
  }

  async #losses(): Promise<(HeldOutGroup & Pick<EvaluationInfo, 'levels' | 'tasks'>) | null> {
    const [model, o] = [this.#model, this.#o]
    this.#loader ??= await this.#open()
    const all = new Tally()
    const levels = Array.from({ length: model.levels }, () => new Tally())
    const tasks = new Map<string, Tally>()
    for (let batch = 0; batch < this.#loader.stepsPerEpoch; batch++) {
      if (o.signal?.aborted) return null
      const loaded = await this.#loader.next()
      if (!loaded?.packed) continue
      const { packed, indices } = loaded
      const level = new Map([...packed.imageSamples].map((sample, m) => [sample, packed.levels[m]]))
      for (const [i, { nll, tokens, coefficients }] of sampleLosses(model, packed, o.mix).entries()) {
        const sample = { samples: 1, nll, tokens, coefficients, pictures: Number(level.has(i)) }
        const task = taskOf(this.#data.record(indices[i]))
        if (!tasks.has(task)) tasks.set(task, new Tally())
        for (const tally of [all, levels[level.get(i) ?? -1], tasks.get(task)]) tally?.add(sample)
      }
      await turn() // a signal is heard between two batches
    }
    if (o.mix.mode === 'level') return { ...all.group, levels: levels.map((t) => t.group) }
    const named = [...commonest(tasks)].map(([task, t]) => [task, { ...t.group, coefficients: t.mean }])
    return { ...all.group, tasks: Object.fromEntries(named) }
  }

  /** The most likely answers to the shown records; null when the signal came. */
  async #answers(): Promise<EvaluationInfo['answers'] | null> {
    this.#shown ??= await this.#choose()
    const answers: EvaluationInfo['answers'] = []
    try {
      for (const { record } of this.#shown) {
        const text = await this.#answer(record)
        if (text !== null) answers.push({ id: record.id, text })
      }
      return answers
    } catch (e) {
      if (this.#o.signal?.aborted) return null
      throw e
    }
  }

  /** null where its picture has gone since it was chosen */
  async #answer(record: DataRecord): Promise<string | null> {
    const [model, o] = [this.#model, this.#o]
    const [system] = record.conversations
    let image: Buffer | undefined
    try {
      if (record.image !== null) image = readImage(this.#data.picture(record.image))
    } catch (e) {
      if (e instanceof AlignGPTError && e.code === 'ERR_IMAGE') return null
      throw e
    }
    const level = o.mix.mode === 'level' ? (o.mix.level ?? record.similarity ?? undefined) : undefined
    const [{ text }] = await generateBatch(model, [{ prompt: firstTurns(record).question, image }], {
      style: o.style,
      pad: o.pad,
      mix: o.mix.mode === 'level' ? { mode: 'level', level } : o.mix,
      temperature: 0, // the most likely answer, whatever generation_config.json says
      maxNewTokens: SAMPLE_TOKENS,
      signal: o.signal,
      ...(system.from === 'system' && { system: system.value }),
      ...(o.style === 'plain' && { stop: ['\n'] }), // a caption ends with its line
    })
    return text
  }

  /** Records from all over the held-out ones, and samples.json with their pictures. Those that cannot be used are left out. */
  async #choose(): Promise<Shown[]> {
    const [data, o] = [this.#data, this.#o]
    const count = Math.min(SAMPLES, data.length)
    const candidates = Array.from({ length: count }, (_, i) => data.record(Math.floor((i * data.length) / count)))
    const shown: Shown[] = []
    for (const record of candidates) if (this.#fits(record)) shown.push(...(await this.#look(record)))
    const described = shown.map(({ record, picture }) => {
      const { question: asked, answer: expected } = firstTurns(record)
      const question = this.#o.style === 'plain' ? '' : asked // which leaves questions out
      return { id: record.id, task: taskOf(record), level: record.similarity, question, expected, picture }
    })
    if (o.out) writeJsonFile(path.join(o.out, 'samples.json'), described)
    return shown
  }

  #fits(record: DataRecord): boolean {
    const [model, o] = [this.#model, this.#o]
    const { fullLength } = buildSample(record, model.tokenizer, { style: o.style, patches: model.patches })
    return fullLength <= model.config.tokenizer_model_max_length
  }

  async #look(record: DataRecord): Promise<Shown[]> {
    if (record.image === null) return [{ record, picture: null }]
    const source = this.#data.picture(record.image)
    try {
      await loadPixels(this.#model, readImage(source))
      return [{ record, picture: await thumbnail(source, THUMBNAIL) }]
    } catch {
      return [] // among the bad ones, as the loader found it
    }
  }
}

/** The tasks with the most samples, the others as one. */
function commonest(tasks: ReadonlyMap<string, Tally>): Map<string, Tally> {
  const sorted = [...tasks].sort(([a, x], [b, y]) => y.samples - x.samples || (a < b ? -1 : 1))
  if (sorted.length <= MAX_TASKS) return new Map(sorted)
  const rest = new Tally()
  for (const [, tally] of sorted.slice(MAX_TASKS - 1)) rest.add(tally)
  return new Map([...sorted.slice(0, MAX_TASKS - 1), ['other', rest]])
}

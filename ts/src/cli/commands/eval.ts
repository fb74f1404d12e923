/** Loss and accuracy of a model on a data file, beside the blind control. */

import type { Command } from 'commander'
import type { Dataset } from '../../data/dataset.js'
import type { BadRecord } from '../../data/record-check.js'
import type { Answer, EvaluateOptions } from '../../evaluation/evaluate.js'
import type { DatasetLoss, LeftOut, TooLong } from '../../evaluation/likelihood.js'
import type { Asked, Asking, Kind, Question } from '../../evaluation/questions.js'
import type { ImageFiles } from '../../processing/image/source.js'
import type { LineFile } from '../line-file.js'
import { FOLLOW_LINKS, integer, loadModel, type ModelOptions, modelOptions, positive } from '../options.js'

interface Options extends ModelOptions {
  images?: string
  followLinks?: boolean
  limit?: number
  batch: number
  maxNewTokens: number
  seed: number
  loss: boolean
  blind: boolean
  answers?: string
  json?: boolean
}

/** How one kind of question was answered. */
interface Score {
  count: number
  accuracy: number
  blind: number | null
  chance: number | null
}
type Scores = Partial<Record<'yesno' | 'choice' | 'exact' | 'contains', Score>>

/** A line of --answers; turn: which question of its record it is, from 0; record: what else that says. */
type Judged = Question & Answer & { kind: Kind; turn: number; record?: Record<string, unknown> }

/** The question, its answer, and what else its record says. */
const lineOf = ({ q, turn, record }: Asking, a: Answer, kind: Kind): Judged => ({
  ...{ ...q, ...a, kind, turn },
  ...(Object.keys(record).length > 0 && { record }),
})

/** Asks all questions, kind by kind. */
async function ask(
  model: Parameters<typeof import('../../evaluation/evaluate.js').evaluate>[0],
  asked: Asked,
  o: EvaluateOptions,
  onAnswers: (answers: readonly Judged[]) => void,
): Promise<Scores> {
  const [{ accuracyOf, evaluate }, { matches }] = await Promise.all([
    import('../../evaluation/evaluate.js'),
    import('../../evaluation/judge.js'),
  ])
  const scores: Scores = {}
  for (const [kind, list] of Object.entries(asked.questions) as [Kind, Asking[]][]) {
    if (!list.length) continue
    const questions = list.map(({ q }) => q)
    const judge = kind === 'open' ? 'exact' : kind
    let n = 0
    const tell = (some: readonly Answer[]): void => onAnswers(some.map((a) => lineOf(list[n++], a, kind)))
    const e = await evaluate(model, questions, { ...o, judge, onAnswers: tell })
    const { count, accuracy, chance, blindAnswers } = e
    if (count === 0) continue // stopped, or all of them left out
    scores[kind === 'open' ? 'exact' : kind] = { count, accuracy, blind: e.blind, chance }
    const contains = (a: Answer): boolean => matches(a.given, a.answer, 'contains')
    if (kind === 'open')
      scores.contains = {
        count,
        accuracy: accuracyOf(e.answers, contains),
        blind: blindAnswers && accuracyOf(blindAnswers, contains),
        chance,
      }
  }
  return scores
}

const NAMES = { yesno: 'yes/no', choice: 'multiple choice', exact: 'exact match', contains: 'contains the answer' }

/** The scores as lines for people. */
function table(scores: Scores): string[] {
  const percent = (x: number | null): string => (x === null ? '-' : `${(100 * x).toFixed(1)} %`).padStart(9)
  const rows = Object.entries(scores) as [keyof Scores, Score][]
  return [
    `${''.padEnd(20)}questions accuracy    blind   chance`,
    ...rows.map(
      ([name, s]) =>
        `${NAMES[name].padEnd(20)}${String(s.count).padStart(9)}${[s.accuracy, s.blind, s.chance].map(percent).join('')}`,
    ),
  ]
}

/** The first records of a data set. */
const head = (data: Dataset, length: number): Pick<Dataset, 'length' | 'record' | 'picture'> => ({
  length: Math.min(length, data.length),
  record: (i) => data.record(i),
  picture: (name) => data.picture(name),
})

/** What becomes of the answers on their way. */
class Collected {
  done = 0
  readonly tooLong: TooLong = { cut: [], leftOut: [] }
  /** mistakes in the data: records, pictures */
  readonly bad: LeftOut[]
  readonly #lines: LineFile | null
  #writing: Promise<void> = Promise.resolve()
  /** why --answers could not be written */
  failure: unknown

  constructor(bad: readonly BadRecord[], lines: LineFile | null) {
    this.bad = bad.map(({ id, index, reason }) => ({
      id: id ?? `record ${index}`,
      reason: `record ${index}: ${reason}`,
    }))
    this.#lines = lines
    this.#write(bad.map(({ id, index, reason }) => ({ id, place: index, problem: reason })))
  }
  add(some: readonly Judged[]): void {
    this.done += some.length
    this.#write(some)
    for (const { id, problem, code, cut } of some) {
      if (cut) this.tooLong.cut.push(id)
      if (problem !== undefined) (code ? this.bad : this.tooLong.leftOut).push({ id, reason: problem })
    }
  }
  #write(some: readonly object[]): void {
    const text = some.map((a) => `${JSON.stringify(a)}\n`).join('')
    if (!this.#lines || text === '') return
    const write = (): Promise<void> | undefined => this.#lines?.write(text)
    this.#writing = this.#writing.then(write).catch((e) => {
      this.failure ??= e
    })
  }
  /** @param whole all questions are answered. @throws what --answers failed with */
  async end(whole: boolean): Promise<void> {
    await this.#writing
    if (whole && this.failure === undefined) this.#lines?.finish()
    else this.#lines?.leave()
    if (this.failure !== undefined) throw this.failure
  }
}

/** The figures of a file, and what they are of. */
interface Figures {
  loss: DatasetLoss | null
  scores: Scores
}

async function figures(
  o: Options,
  asked: Asked,
  data: Dataset | null,
  pictures: ImageFiles | null,
  c: Collected,
): Promise<Figures> {
  const [{ evaluateLoss }, { hearing }] = await Promise.all([
    import('../../evaluation/likelihood.js'),
    import('../signals.js'),
  ])
  const { model, mix } = await loadModel(o)
  const { batch, style, maxNewTokens, seed, blind } = o
  const found = await hearing('finishing this batch', async (signals) => {
    const stop = (): boolean => signals.heard !== null || c.failure !== undefined
    const loss = data && (await evaluateLoss(model, head(data, o.limit ?? data.length), { batch, style, mix, stop }))
    const options = { images: pictures ?? undefined, batch, style, mix, maxNewTokens, seed, blind, stop }
    return { loss, scores: await ask(model, asked, options, (some) => c.add(some)) }
  })
  model.dispose()
  return found
}

async function run(file: string, o: Options): Promise<void> {
  const [{ Dataset, openSources }, { readQuestions }, { mismatch }, { openLines }] = await Promise.all([
    import('../../data/dataset.js'),
    import('../../evaluation/questions.js'),
    import('../../util/errors.js'),
    import('../line-file.js'),
  ])
  const { records, pictures } = await openSources(file, { images: o.images, followLinks: o.followLinks })
  const asked = await readQuestions(records, o.limit ?? Number.POSITIVE_INFINITY)
  const questions = Object.values(asked.questions).reduce((n, list) => n + list.length, 0)
  const [first] = asked.bad
  if (!questions)
    throw mismatch(
      ...(['ERR_DATA', 'eval', file, 'at least one question with its answer'] as const),
      first ? `none; record ${first.index}: ${first.reason}` : 'none',
    )
  const lines = o.answers === undefined ? null : openLines('eval', '--answers', o.answers)
  const c = new Collected(asked.bad, lines)
  let found: Figures
  try {
    const data = o.loss ? await new Dataset(records, pictures).open() : null
    found = await figures(o, asked, data, pictures, c)
    data?.close()
  } catch (e) {
    await c.end(false).catch(() => {}) // the error says more
    throw e
  }
  await c.end(c.done === questions)
  const { done, tooLong, bad } = c
  if (bad.length) process.exitCode ??= 1
  if (done < questions) {
    const where = lines?.temporary && done ? `: in ${lines.temporary}` : ''
    console.error(`stopped: ${done} of ${questions} questions answered${where}`)
  }
  const { records: total, later, leftOut } = asked
  if (bad.length) console.error([`left out, with a mistake in them: ${bad.length}`, ...named(bad)].join('\n'))
  if (o.json) {
    const unanswered = tooLong.leftOut.length + bad.length - asked.bad.length
    const counts = { data: file, records: total, questions, answered: done - unanswered }
    console.log(JSON.stringify({ ...counts, ...found, later, leftOut, tooLong, bad }))
    return
  }
  if (found.loss) {
    const { loss, tokens, records } = found.loss
    console.log(`loss ${loss.toFixed(4)} of ${tokens} tokens in ${records} records`)
    tell('loss', found.loss)
  }
  console.log(table(found.scores).join('\n'))
  if (later) console.error(`${later} of the questions were asked after the true turns before them`)
  tell('questions', tooLong)
  for (const id of leftOut) console.error(`left out: ${id}: no question with its answer`)
}

const named = (list: readonly LeftOut[]): string[] => list.map(({ id, reason }) => `  ${id}: ${reason}`)

/** Says what was too long. */
function tell(what: string, { cut, leftOut }: TooLong): void {
  if (cut.length) console.error(`${what}: ${cut.length} too long and cut: ${cut.join(', ')}`)
  if (leftOut.length) console.error([`${what}: ${leftOut.length} too long and left out:`, ...named(leftOut)].join('\n'))
}

export function evaluation(program: Command): void {
  const command = program
    .command('eval')
    .description('loss and accuracy on a data file, and accuracy with another picture each (blind)')
    .argument('<data>', 'LLaVA JSON, JSON lines or Parquet, of {image, question, answer, options} too')
    .option('--images <dir>', 'folder of the pictures, or shards/{00000..00009}.tar')
    .option(...FOLLOW_LINKS)
    .option('--limit <n>', 'only the first n records', positive)
    .option('--batch <n>', 'questions asked at once', positive, 16)
    .option('--max-new-tokens <n>', 'longest generated answer', positive, 32)
    .option('--seed <n>', 'of the shuffle', integer, 0)
    .option('--no-loss', 'no loss')
    .option('--no-blind', 'no blind control')
    .option('--answers <file>', 'every answer, as JSON lines; replaced when all are there')
    .option('--json', 'the figures as JSON')
    .addHelpText(
      'after',
      `
Every question of a conversation is asked, after the true turns before it. Answers of yes or no, and options (a list "options" of the
record, or lines "A. ...", "B. ..." in the question with a letter as answer), are judged by likelihood: which of
the possible answers is the most likely. All others are generated and compared, ignoring case and punctuation.
The loss is of all turns. What is longer than the model takes is treated as in training: its end is cut, and where picture or answer do not
fit it is left out; both are named. So are bad records and pictures that cannot be read: the exit status is 1 then.`,
    )
  modelOptions(command).action(run)
}

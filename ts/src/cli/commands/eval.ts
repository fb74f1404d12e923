/** Loss and accuracy of a model on a data file, beside the blind control. */

import fs from 'node:fs'
import type { Command } from 'commander'
import type { Dataset } from '../../data/dataset.js'
import type { Answer, EvaluateOptions } from '../../evaluation/evaluate.js'
import type { LeftOut, TooLong } from '../../evaluation/likelihood.js'
import type { Asked, Asking, Kind, Question } from '../../evaluation/questions.js'
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

/** A line of --answers; turn: which question of its record it is, from 0. */
type Judged = Question & Answer & { kind: Kind; turn: number }

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
    const tell = (some: readonly Answer[]): void =>
      onAnswers(some.map((a) => ({ ...questions[n], ...a, kind, turn: list[n++].turn })))
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

async function run(file: string, o: Options): Promise<void> {
  const [{ Dataset, openSources }, { readQuestions }, { mismatch }] = await Promise.all([
    import('../../data/dataset.js'),
    import('../../evaluation/questions.js'),
    import('../../util/errors.js'),
  ])
  const { records, pictures } = await openSources(file, { images: o.images, followLinks: o.followLinks })
  const limit = o.limit ?? Number.POSITIVE_INFINITY
  const asked = await readQuestions(records, limit)
  if (!Object.values(asked.questions).some((q) => q.length))
    throw mismatch('ERR_DATA', 'eval', file, 'at least one question with its answer', 'none')
  const data = o.loss ? await new Dataset(records, pictures).open() : null
  const [{ evaluateLoss }, { hearing }] = await Promise.all([
    import('../../evaluation/likelihood.js'),
    import('../signals.js'),
  ])
  const { model, mix } = await loadModel(o)
  const { batch, style, maxNewTokens, seed, blind } = o
  const images = pictures ?? undefined
  let done = 0
  const tooLong: TooLong = { cut: [], leftOut: [] }
  if (o.answers) fs.writeFileSync(o.answers, '')
  const onAnswers = (some: readonly Judged[]): void => {
    done += some.length
    if (o.answers) fs.appendFileSync(o.answers, some.map((a) => `${JSON.stringify(a)}\n`).join(''))
    for (const { id, problem, cut } of some) {
      if (cut) tooLong.cut.push(id)
      if (problem) tooLong.leftOut.push({ id, reason: problem })
    }
  }
  const { loss, scores } = await hearing('finishing this batch', async (signals) => {
    const stop = (): boolean => signals.heard !== null
    const loss = data && (await evaluateLoss(model, head(data, limit), { batch, style, mix, stop }))
    const options = { images, batch, style, mix, maxNewTokens, seed, blind, stop }
    return { loss, scores: await ask(model, asked, options, onAnswers) }
  })
  data?.close()
  model.dispose()
  const { records: total, later, leftOut } = asked
  const questions = Object.values(asked.questions).reduce((n, list) => n + list.length, 0)
  const answered = done - tooLong.leftOut.length
  if (done < questions) console.error(`stopped: ${done} of ${questions} questions answered`)
  if (o.json) {
    const counts = { data: file, records: total, questions, answered }
    console.log(JSON.stringify({ ...counts, loss, scores, later, leftOut, tooLong }))
    return
  }
  if (loss) {
    console.log(`loss ${loss.loss.toFixed(4)} of ${loss.tokens} tokens in ${loss.records} records`)
    tell('loss', loss)
  }
  console.log(table(scores).join('\n'))
  if (later) console.error(`${later} of the questions were asked after the true turns before them`)
  tell('questions', tooLong)
  for (const id of leftOut) console.error(`left out: ${id}: no question with its answer`)
}

/** Says what was too long. */
function tell(what: string, { cut, leftOut }: TooLong): void {
  const named = (list: readonly LeftOut[]): string[] => list.map(({ id, reason }) => `  ${id}: ${reason}`)
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
    .option('--answers <file>', 'every answer, as JSON lines')
    .option('--json', 'the figures as JSON')
    .addHelpText(
      'after',
      `
Every question of a conversation is asked, after the true turns before it. Answers of yes or no, and options (a list "options" of the
record, or lines "A. ...", "B. ..." in the question with a letter as answer), are judged by likelihood: which of
the possible answers is the most likely. All others are generated and compared, ignoring case and punctuation.
The loss is of all turns. What is longer than the model takes is treated as in training: its end is cut, and where picture or answer do not
fit it is left out; both are named.`,
    )
  modelOptions(command).action(run)
}

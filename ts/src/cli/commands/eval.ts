/** Loss and accuracy of a model on a data file, beside the blind control. */
import fs from 'node:fs'
import type { Command } from 'commander'
import type { Dataset } from '../../data/dataset.js'
import type { Answer, EvaluateOptions, Question } from '../../evaluation/evaluate.js'
import type { DataRecord } from '../../formats/record-file.js'
import { integer, loadModel, type ModelOptions, modelOptions, positive } from '../options.js'

interface Options extends ModelOptions {
  images?: string
  limit?: number
  batch: number
  maxNewTokens: number
  seed: number
  loss: boolean
  blind: boolean
  answers?: string
  json?: boolean
}

/** How questions are judged: one figure each, two for open ones. */
type Kind = 'yesno' | 'choice' | 'open'
interface Score {
  count: number
  accuracy: number
  blind: number | null
  chance: number | null
}
type Scores = Partial<Record<'yesno' | 'choice' | 'exact' | 'contains', Score>>

/** A line of --answers; turn: which question of its record it is, from 0. */
type Judged = Question & Answer & { kind: Kind; turn: number }

/** A question and which one of its record it is, from 0. */
interface Asking {
  q: Question
  turn: number
}

/** What a data file asks. */
interface Asked {
  records: number
  questions: Record<Kind, Asking[]>
  /** how many of them are later questions of a conversation */
  later: number
  /** ids of records without a question and its answer */
  leftOut: string[]
}

/** A, B, C, ... where the question lists its options so and one of them is the answer (LLaVA's multiple choice). */
function letters(question: string, answer: string): string[] | undefined {
  const listed = Array.from(question.matchAll(/^([A-Z])\. /gm), (m) => m[1])
  const inOrder = listed.every((letter, i) => letter.charCodeAt(0) === 65 + i)
  return listed.length > 1 && inOrder && listed.includes(answer) ? listed : undefined
}

const kindOf = (q: Question): Kind => (q.options ? 'choice' : /^(yes|no)[.!]?$/i.test(q.answer) ? 'yesno' : 'open')

/**
 * The questions of a conversation that have an answer, each with the true turns before it. A leading answer is dropped, as in training,
 * and what does not alternate ends it. `options` are those of the first.
 */
function questionsOf(r: DataRecord, options: readonly string[] | undefined): Question[] {
  const { conversations: turns } = r
  const begin = turns[0]?.from === 'system' ? 1 : 0
  const history = turns.slice(0, begin)
  const questions: Question[] = []
  for (let i = turns[begin]?.from === 'gpt' ? begin + 1 : begin; i + 1 < turns.length; i += 2) {
    const [human, gpt] = [turns[i], turns[i + 1]]
    if (human.from !== 'human' || gpt.from !== 'gpt') break
    const [question, answer] = [human.value.replaceAll('<image>', '').trim(), gpt.value.trim()]
    const asked = {
      id: r.id,
      image: r.image ?? undefined,
      question,
      ...(history.length > 0 && { history: [...history] }),
    }
    const letter = answer.replace(/\.$/, '')
    const listed = letters(question, letter)
    if (options && questions.length === 0) questions.push({ ...asked, answer, options })
    else questions.push(listed ? { ...asked, answer: letter, options: listed } : { ...asked, answer })
    history.push(human, gpt)
  }
  return questions
}

/**
 * Reads the questions of a data file; a record may have `options`.
 * @throws AlignGPTError ERR_DATA naming file, record and key
 */
async function readAsked(file: string, limit: number): Promise<Asked> {
  const [{ parseBytes, parseRecord, splitRecords }, { mismatch, show }] = await Promise.all([
    import('../../formats/record-file.js'),
    import('../../util/errors.js'),
  ])
  const asked: Asked = {
    records: 0,
    questions: { yesno: [], choice: [], open: [] },
    later: 0,
    leftOut: [],
  }
  const read = (raw: Record<string, unknown>, n: number): void => {
    const need = (fits: boolean, expected: string): void => {
      if (!fits) throw mismatch('ERR_DATA', 'eval', `${file}: record ${n} options`, expected, show(raw.options))
    }
    const { options } = raw as { options?: string[] }
    const isList = Array.isArray(options) && options.length > 1 && options.every((t) => typeof t === 'string')
    need(options === undefined || isList, 'an array of texts')
    const record = parseRecord(raw, file, n)
    const found = questionsOf(record, options)
    asked.later += Math.max(0, found.length - 1)
    if (!found.length) asked.leftOut.push(record.id)
    for (const [turn, q] of found.entries()) {
      need(!q.options || q.options.includes(q.answer), `some with the answer ${show(q.answer)}`)
      asked.questions[kindOf(q)].push({ q, turn })
    }
  }
  await splitRecords(file, (bytes, offset) => {
    if (asked.records < limit) read(parseBytes(bytes, file, offset) as Record<string, unknown>, asked.records++)
  })
  return asked
}

const share = (list: readonly Answer[], right: (a: Answer) => boolean): number =>
  list.filter(right).length / list.length

/** Asks all questions, kind by kind. */
async function ask(
  model: Parameters<typeof import('../../evaluation/evaluate.js').evaluate>[0],
  asked: Asked,
  o: EvaluateOptions,
  onAnswers: (answers: readonly Judged[]) => void,
): Promise<Scores> {
  const { evaluate, matches } = await import('../../evaluation/evaluate.js')
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
    if (count === 0) continue // stopped
    scores[kind === 'open' ? 'exact' : kind] = { count, accuracy, blind: e.blind, chance }
    const contains = (a: Answer): boolean => matches(a.given, a.answer, 'contains')
    if (kind === 'open')
      scores.contains = {
        count,
        accuracy: share(e.answers, contains),
        blind: blindAnswers && share(blindAnswers, contains),
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
  const [{ Dataset, openSources }, { mismatch }] = await Promise.all([
    import('../../data/dataset.js'),
    import('../../util/errors.js'),
  ])
  const { records, pictures } = await openSources(file, { images: o.images })
  const limit = o.limit ?? Number.POSITIVE_INFINITY
  const asked = await readAsked(records, limit)
  if (!Object.values(asked.questions).some((q) => q.length))
    throw mismatch('ERR_DATA', 'eval', file, 'at least one question with its answer', 'none')
  const data = o.loss ? await new Dataset(records, pictures).open() : null
  const [{ evaluateLoss }, { hearing }] = await Promise.all([
    import('../../evaluation/evaluate.js'),
    import('../signals.js'),
  ])
  const { model, mix } = await loadModel(o)
  const { batch, style, maxNewTokens, seed, blind } = o
  const images = pictures ?? undefined
  let answered = 0
  if (o.answers) fs.writeFileSync(o.answers, '')
  const onAnswers = (some: readonly Judged[]): void => {
    answered += some.length
    if (o.answers) fs.appendFileSync(o.answers, some.map((a) => `${JSON.stringify(a)}\n`).join(''))
    for (const { id, problem } of some) if (problem) console.error(`not asked, counted as wrong: ${id}: ${problem}`)
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
  if (answered < questions) console.error(`stopped: ${answered} of ${questions} questions answered`)
  if (o.json) {
    console.log(JSON.stringify({ data: file, records: total, questions, answered, loss, scores, later, leftOut }))
    return
  }
  if (loss) console.log(`loss ${loss.loss.toFixed(4)} of ${loss.tokens} tokens in ${loss.records} records`)
  console.log(table(scores).join('\n'))
  if (later) console.error(`${later} of the questions were asked after the true turns before them`)
  for (const id of leftOut) console.error(`left out: ${id}: no question with its answer`)
}

export function evaluation(program: Command): void {
  const command = program
    .command('eval')
    .description('loss and accuracy on a data file, and accuracy with another picture each (blind)')
    .argument('<data>', 'LLaVA JSON, JSON lines or Parquet, of {image, question, answer, options} too')
    .option('--images <dir>', 'folder of the pictures, or shards/{00000..00009}.tar')
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
The loss is of all turns.`,
    )
  modelOptions(command).action(run)
}

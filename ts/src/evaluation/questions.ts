/** Questions with their answers, and data files as lists of them. */
import { type BadRecord, diagnose } from '../data/record-check.js'
import type { RecordProblem } from '../formats/image-key.js'
import { type DataRecord, IMAGE_TEXT, sayProblem, splitRecords, type Turn } from '../formats/record-file.js'
import { type ImageFiles, resolveImage } from '../processing/image/source.js'
import { show } from '../util/errors.js'

export interface Question {
  id: string
  /** path of the picture, below `images` where that is given */
  image?: string
  question: string
  /** the conversation before it, with the true answers; a system turn first if there is one */
  history?: readonly Turn[]
  /** which of [...history, question] the picture belongs to; default as GenerateRequest's */
  imageTurn?: number
  answer: string
  /** choices in words; the answer is one of them */
  options?: readonly string[]
}

/** Folder of the images, or what openImages gives; without one, names are paths. */
export type ImagePlace = string | ImageFiles | undefined

export const imageFile = (image: string, folder: string | undefined): string =>
  folder ? resolveImage(folder, image) : image

/** How the questions of a file are judged: one figure each, two for open ones. */
export type Kind = 'yesno' | 'choice' | 'open'

/** A question and which one of its record it is, from 0. */
export interface Asking {
  q: Question
  turn: number
  /** what else the record says, such as question_id and category */
  record: Record<string, unknown>
}

/** What a data file asks. */
export interface Asked {
  records: number
  questions: Record<Kind, Asking[]>
  /** how many of them are later questions of a conversation */
  later: number
  /** ids of records without a question and its answer */
  leftOut: string[]
  /** records that are none, or whose options are not as they should be */
  bad: BadRecord[]
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
export function questionsOf(r: DataRecord, options: readonly string[] | undefined): Question[] {
  const { conversations: turns } = r
  const begin = turns[0]?.from === 'system' ? 1 : 0
  const history = turns.slice(0, begin)
  const questions: Question[] = []
  let imageTurn: number | undefined
  for (let i = turns[begin]?.from === 'gpt' ? begin + 1 : begin; i + 1 < turns.length; i += 2) {
    const [human, gpt] = [turns[i], turns[i + 1]]
    if (human.from !== 'human' || gpt.from !== 'gpt') break
    // beside a picture `<image>` is its place, in a text-only record it is text
    const holds = r.image !== null && human.value.includes(IMAGE_TEXT)
    const value = holds ? human.value.replaceAll(IMAGE_TEXT, '').trim() : human.value
    if (holds) imageTurn ??= history.length
    const [question, answer] = [value.trim(), gpt.value.trim()]
    const asked = {
      id: r.id,
      image: r.image ?? undefined,
      question,
      ...(history.length > 0 && { history: [...history], ...(imageTurn !== undefined && { imageTurn }) }),
    }
    const letter = answer.replace(/\.$/, '')
    const listed = letters(question, letter)
    if (options && questions.length === 0) questions.push({ ...asked, answer, options })
    else questions.push(listed ? { ...asked, answer: letter, options: listed } : { ...asked, answer })
    history.push({ ...human, value }, gpt)
  }
  return questions
}

/** Keys of a record that its questions are made of. */
const READ: readonly string[] = [
  ...['id', 'image', 'images', 'question', 'answer', 'options', 'caption', 'conversations', 'messages', 'conversation'],
]

/** What is wrong with the `options` of a record and its questions; null where nothing is. */
function optionsProblem(options: unknown, found: readonly Question[]): RecordProblem | null {
  const wrong = (expected: string): RecordProblem => ({ key: 'options', expected, got: options })
  const isList = Array.isArray(options) && options.length > 1 && options.every((t) => typeof t === 'string')
  if (options !== undefined && !isList) return wrong('an array of texts')
  const none = found.find((q) => q.options && !q.options.includes(q.answer))
  return none ? wrong(`some with the answer ${show(none.answer)}`) : null
}

/**
 * Reads the questions of a data file; a record may have `options`. Bad records are left out: `bad` says which and why.
 * @param limit records that are read
 * @throws AlignGPTError ERR_DATA where the file is no data file
 */
export async function readQuestions(file: string, limit: number): Promise<Asked> {
  const asked: Asked = { records: 0, questions: { yesno: [], choice: [], open: [] }, later: 0, leftOut: [], bad: [] }
  const read = (bytes: Uint8Array, byte: number, index: number): void => {
    const place = { index, byte, bytes: bytes.length }
    const found = diagnose(bytes, file, byte, index)
    if (found.fault) {
      asked.bad.push({ ...place, id: found.id, ...found.fault })
      return
    }
    const { options } = found.raw as { options?: string[] }
    const { record } = found
    const questions = questionsOf(record, options)
    const problem = optionsProblem(options, questions)
    if (problem) {
      asked.bad.push({ ...place, id: record.id, kind: 'record', reason: sayProblem(problem) })
      return
    }
    asked.later += Math.max(0, questions.length - 1)
    if (!questions.length) asked.leftOut.push(record.id)
    const more = Object.fromEntries(Object.entries(found.raw as object).filter(([key]) => !READ.includes(key)))
    for (const [turn, q] of questions.entries()) asked.questions[kindOf(q)].push({ q, turn, record: more })
  }
  await splitRecords(file, (bytes, offset) => {
    if (asked.records < limit) read(bytes, offset, asked.records++)
  })
  return asked
}

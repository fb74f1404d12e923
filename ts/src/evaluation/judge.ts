/** How an answer to a question is judged. */
import { AlignGPTError } from '../util/errors.js'
import type { Question } from './questions.js'

/**
 * yesno and choice: the most likely of the possible answers (mean log-likelihood of its tokens); letter: the most likely of A, B,
 * C, ... after the lettered options; exact and contains: of the generated text, ignoring case and punctuation.
 */
export type Judge = 'yesno' | 'choice' | 'letter' | 'exact' | 'contains'
/** Of generated text. */
export type OpenJudge = 'exact' | 'contains'

export const isOpen = (judge: Judge): judge is OpenJudge => judge === 'exact' || judge === 'contains'

/** @param given what the caller wants, if anything */
export function judgeOf(q: Question, given?: Judge): Judge {
  if (given) return given
  if (q.options) return 'choice'
  return /^(yes|no)\b/i.test(q.answer) ? 'yesno' : 'exact'
}

const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'

/** What the model may say, and which of it is right. */
export interface Candidates {
  prompt: string
  texts: string[]
  /** index in texts */
  right: number
}

/** @throws AlignGPTError ERR_DATA where the answer is none of the options */
export function candidates(q: Question, judge: Judge): Candidates {
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
export function matches(given: string, answer: string, judge: OpenJudge): boolean {
  const [a, b] = [normal(given), normal(answer)]
  return judge === 'exact' || b === '' ? a === b : a.includes(b)
}

/** Mean share of right answers that guessing gives; null where there is an open question. */
export function chanceOf(questions: readonly Question[], given?: Judge): number | null {
  let sum = 0
  for (const q of questions) {
    const judge = judgeOf(q, given)
    if (isOpen(judge)) return null
    sum += judge === 'yesno' ? 1 / 2 : 1 / (q.options?.length ?? 1)
  }
  return sum / questions.length
}

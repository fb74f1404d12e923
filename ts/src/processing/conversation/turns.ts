/**
 * Turns of a conversation on their way to text, the same for all styles: where the image stands, what is system prompt. A style
 * (one file each, listed in styles.ts) renders them as pieces that say themselves whether they are learned.
 */
import { IMAGE_TEXT, type Turn } from '../../formats/record-file.js'
import { type AlignGPTError, mismatch, show } from '../../util/errors.js'

/** Rendered text, learned or not, or the place of the picture. */
export type Piece = { text: string; loss: boolean } | { image: true }

/** Common preparation of turns: system turn, leading answers, place of the picture. */
export interface Prepared {
  turns: { from: 'human' | 'gpt'; value: string }[]
  system: string
  /** index of the turn whose front holds the picture; -1: none */
  imageTurn: number
}

export const dataError = (id: string, what: string, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'prompt', `record ${show(id)}: ${what}`, expected, got)

/**
 * Moves the placeholder to the front of its turn and strips that turn; drops a leading answer.
 * Without a placeholder the picture goes to the front of the first question. In a text-only record a literal `<image>`
 * stays text.
 */
export function prepare(id: string, hasImage: boolean, conversations: Turn[], usualSystem: string): Prepared {
  let system = usualSystem
  const turns: Prepared['turns'] = []
  conversations.forEach(({ from, value }, i) => {
    if (from !== 'system') turns.push({ from, value })
    else if (i > 0) throw dataError(id, `turn ${i}`, 'a system turn only at the start', 'a system turn')
    else system = value
  })
  let imageTurn = -1
  if (hasImage) {
    const places = turns.reduce((n, t) => n + t.value.split(IMAGE_TEXT).length - 1, 0)
    if (places > 1) throw dataError(id, 'placeholder', `at most one ${IMAGE_TEXT}`, `${places}`)
    imageTurn = turns.findIndex((t) => t.value.includes(IMAGE_TEXT))
    if (imageTurn >= 0) turns[imageTurn].value = turns[imageTurn].value.replace(IMAGE_TEXT, '').trim()
  }
  if (turns.length && turns[0].from === 'gpt') {
    turns.shift()
    imageTurn = Math.max(imageTurn - 1, -1)
  }
  if (hasImage && imageTurn < 0) {
    if (!turns.length) throw dataError(id, 'conversations', 'a question', 'none')
    imageTurn = 0
    turns[0].value = turns[0].value.trim()
  }
  turns.forEach((t, i) => {
    const expected = i % 2 ? 'gpt' : 'human'
    if (t.from !== expected) throw dataError(id, `turn ${i}`, `from ${expected}`, `from ${t.from}`)
  })
  if (!turns.length) throw dataError(id, 'conversations', 'at least one question', 'none')
  return { turns, system, imageTurn }
}

/** Text of a question, the picture in front where it belongs. */
export function question(p: Prepared, i: number, before: string, after: string): Piece[] {
  const value = p.turns[i].value
  if (i !== p.imageTurn) return [{ text: before + value + after, loss: false }]
  const rest = value === '' ? '' : `\n${value}`
  return [{ text: before, loss: false }, { image: true }, { text: rest + after, loss: false }]
}

/** A style of conversations; names are LLaVA's (conversation.py). */
export interface Conversation {
  /** system prompt of a conversation that has none of its own */
  system: string
  /** text of turn `i`; `eos` is the text of the tokenizer's end token */
  render(p: Prepared, i: number, eos: string): Piece[]
  /** opening of an answer, where a prompt ends */
  open: string
  /** tokens that end an answer, besides the tokenizer's and the model's end tokens */
  ends: readonly string[]
}

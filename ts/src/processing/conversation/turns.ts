/**
 * Turns of a conversation on their way to text, the same for all styles: where the image stands, what is system prompt. A style
 * (one file each, listed in styles.ts) renders them as pieces that say themselves whether they are learned.
 */
import { type DataRecord, IMAGE_TEXT, type Turn } from '../../formats/record-file.js'
import { type AlignGPTError, mismatch, show } from '../../util/errors.js'

/**
 * Rendered text, learned or not, or the place of the picture. `content`: it comes from the conversation, not from the style; for
 * whom the conversation is data, special tokens in it are plain text (`literal` in sample.ts).
 */
export type Piece = { text: string; loss: boolean; content?: boolean } | { image: true }
/** Text of a style. */
export const markup = (text: string, loss = false): Piece => ({ text, loss })
/** Text of a conversation. */
export const content = (text: string, loss = false): Piece => ({ text, loss, content: true })

/** What is rendered: a record, or a request. */
export interface Rendered extends Pick<DataRecord, 'id' | 'image'> {
  conversations: readonly Turn[]
  /**
   * the human turn of `conversations` in whose front the picture stands; every `<image>` in the texts is text then. Absent: `<image>`
   * says the place, as in LLaVA's data
   */
  imageTurn?: number
}

/** Common preparation of turns: system turn, leading answers, place of the picture. */
export interface Prepared {
  turns: { from: 'human' | 'gpt'; value: string }[]
  system: string
  /** index of the turn whose front holds the picture; -1: none */
  imageTurn: number
}

export const dataError = (id: string, what: string, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'prompt', `record ${show(id)}: ${what}`, expected, got)

/** Takes the placeholder out of the turn that has it. @returns that turn, -1 without one */
function takePlaceholder(id: string, turns: Prepared['turns']): number {
  const places = turns.reduce((n, t) => n + t.value.split(IMAGE_TEXT).length - 1, 0)
  if (places > 1) throw dataError(id, 'placeholder', `at most one ${IMAGE_TEXT}`, `${places}`)
  const found = turns.findIndex((t) => t.value.includes(IMAGE_TEXT))
  if (found >= 0) turns[found].value = turns[found].value.replace(IMAGE_TEXT, '').trim()
  return found
}

/**
 * Moves the placeholder to the front of its turn and strips that turn; drops a leading answer.
 * Without a placeholder the picture goes to the front of the first question. In a text-only record a literal `<image>`
 * stays text.
 */
export function prepare({ id, image, conversations, imageTurn: given }: Rendered, usualSystem: string): Prepared {
  const hasImage = image !== null
  let system = usualSystem
  const turns: Prepared['turns'] = []
  conversations.forEach(({ from, value }, i) => {
    if (from !== 'system') turns.push({ from, value })
    else if (i > 0) throw dataError(id, `turn ${i}`, 'a system turn only at the start', 'a system turn')
    else system = value
  })
  let imageTurn = -1
  if (hasImage && given !== undefined) {
    imageTurn = given - (conversations.length - turns.length)
    if (turns[imageTurn]?.from !== 'human') throw dataError(id, 'imageTurn', 'the place of a question', `${given}`)
    turns[imageTurn].value = turns[imageTurn].value.trim()
  } else if (hasImage) imageTurn = takePlaceholder(id, turns)
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

/** A question with what the style has before and after it, the picture in front of it where it belongs. */
export function question(p: Prepared, i: number, before: Piece[], after: string): Piece[] {
  const value = content(p.turns[i].value)
  if (i !== p.imageTurn) return [...before, value, markup(after)]
  const rest = p.turns[i].value === '' ? [] : [markup('\n'), value]
  return [...before, { image: true }, ...rest, markup(after)]
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

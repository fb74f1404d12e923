/**
 * Conversations -> token ids and labels. A prompt is rendered as pieces that know whether they carry loss, so labels
 * come from the rendering itself and never from tokenizing twice.
 */
import { AlignGPTError } from './errors.js'
import type { Tokenizer } from './tokenizer.js'

export const IMAGE_PLACEHOLDER = -200
export const IGNORE = -100
export const IMAGE_TAG = '<image>'

export interface Turn {
  from: 'human' | 'gpt' | 'system'
  value: string
}
export type PromptStyle = 'plain' | 'vicuna_v1' | 'llama_2' | 'llama_3'
interface Piece {
  text: string
  loss: boolean
}

const VICUNA_SYSTEM =
  'A chat between a curious user and an artificial intelligence assistant. ' +
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
const LLAMA_2_SYSTEM =
  'You are a helpful language and vision assistant. You are able to understand the visual content that the user ' +
  'provides, and assist the user with a variety of tasks using natural language.'

/** The placeholder moves to the front of its turn; a leading gpt turn is dropped; system turns become the system prompt. */
function arrange(turns: readonly Turn[], hasImage: boolean, id: string): { system: string | undefined; turns: Turn[] } {
  const system = turns.find((t) => t.from === 'system')?.value
  let rest = turns.filter((t) => t.from !== 'system')
  if (rest[0]?.from === 'gpt') rest = rest.slice(1)
  let images = 0
  const arranged = rest.map((t, i) => {
    const expected = i % 2 === 0 ? 'human' : 'gpt'
    if (t.from !== expected)
      throw new AlignGPTError('ERR_DATA', `[prompt] ${id}: turn ${i}: expected from '${expected}', got '${t.from}'`)
    if (!hasImage || !t.value.includes(IMAGE_TAG)) return t
    images += t.value.split(IMAGE_TAG).length - 1
    return { ...t, value: `${IMAGE_TAG}\n${t.value.replaceAll(IMAGE_TAG, '').trim()}`.trim() }
  })
  if (images > 1) throw new AlignGPTError('ERR_DATA', `[prompt] ${id}: expected one <image>, got ${images}`)
  if (hasImage && images === 0)
    throw new AlignGPTError(
      'ERR_DATA',
      `[prompt] ${id}: expected <image> in a turn of a record with an image, got none`,
    )
  return { system, turns: arranged }
}

function vicuna(turns: Turn[], open: boolean, system = VICUNA_SYSTEM): Piece[] {
  const pieces: Piece[] = [{ text: `${system} `, loss: false }]
  for (const t of turns)
    if (t.from === 'human') pieces.push({ text: `USER: ${t.value} `, loss: false })
    else pieces.push({ text: 'ASSISTANT:', loss: false }, { text: ` ${t.value}</s>`, loss: true })
  if (open) pieces.push({ text: 'ASSISTANT:', loss: false })
  return pieces
}

function llama2(turns: Turn[], _open: boolean, system = LLAMA_2_SYSTEM): Piece[] {
  const pieces: Piece[] = []
  for (const [i, t] of turns.entries()) {
    const first = i === 0 ? `<<SYS>>\n${system}\n<</SYS>>\n\n` : ''
    if (t.from === 'human') pieces.push({ text: `${i ? '<s>' : ''}[INST] ${first}${t.value} [/INST]`, loss: false })
    else pieces.push({ text: ` ${t.value} </s>`, loss: true })
  }
  return pieces
}

function llama3(turns: Turn[], open: boolean, system = LLAMA_2_SYSTEM): Piece[] {
  const head = (role: string): Piece => ({ text: `<|start_header_id|>${role}<|end_header_id|>\n\n`, loss: false })
  const pieces: Piece[] = [head('system'), { text: `${system}<|eot_id|>`, loss: false }]
  for (const t of turns)
    pieces.push(head(t.from === 'human' ? 'user' : 'assistant'), {
      text: `${t.value}<|eot_id|>`,
      loss: t.from === 'gpt',
    })
  if (open) pieces.push(head('assistant'))
  return pieces
}

/** What ends an answer in each style. */
export const stopTokens: Record<PromptStyle, string[]> = {
  plain: ['</s>'],
  vicuna_v1: ['</s>'],
  llama_2: ['</s>'],
  llama_3: ['<|eot_id|>', '<|end_of_text|>'],
}

/** Text of a conversation in pieces. `open`: ends where the assistant is to answer. */
export function render(
  style: PromptStyle,
  turns: readonly Turn[],
  o: { image: boolean; open?: boolean; system?: string; id?: string },
): Piece[] {
  const id = o.id ?? 'prompt'
  if (style === 'plain') {
    const caption = turns.find((t) => t.from === 'gpt')
    if (!caption && !o.open)
      throw new AlignGPTError('ERR_DATA', `[prompt] ${id}: expected a caption (gpt turn), got none`)
    const text = { text: caption ? `${caption.value}\n` : '', loss: true }
    return o.image ? [{ text: IMAGE_TAG, loss: false }, text] : [text]
  }
  const arranged = arrange(turns, o.image, id)
  const system = o.system ?? arranged.system
  const format = style === 'vicuna_v1' ? vicuna : style === 'llama_2' ? llama2 : llama3
  return format(arranged.turns, o.open ?? false, system)
}

export interface Encoded {
  /** the rendered text, with the placeholder */
  text: string
  /** with -200 where the picture goes */
  ids: number[]
  /** aligned with ids, -100 where there is no loss */
  labels: number[]
}

/** The stretch of pieces between two placeholders, tokenized as one text. */
function encodeChunk(tokenizer: Tokenizer, pieces: readonly Piece[]): { ids: number[]; labels: number[] } {
  const text = pieces.map((p) => p.text).join('')
  const { ids, starts } = tokenizer.encodeWithOffsets(text)
  const ends: number[] = []
  for (const p of pieces) ends.push((ends.at(-1) ?? 0) + p.text.length)
  let k = 0
  const labels = starts.map((start, i) => {
    while (k < ends.length - 1 && start >= ends[k]) k++
    return pieces[k].loss ? ids[i] : IGNORE
  })
  return { ids, labels }
}

/**
 * Token ids of rendered pieces: BOS, then the stretches around the placeholder, each tokenized by itself (so each gets
 * its own word-start space, as the official code does).
 * @param image whether `<image>` is the placeholder; without one it stays text
 */
export function encodePieces(tokenizer: Tokenizer, pieces: readonly Piece[], image: boolean): Encoded {
  const ids: number[] = [tokenizer.bosId]
  const labels: number[] = [IGNORE]
  let chunk: Piece[] = []
  const close = (): void => {
    const encoded = encodeChunk(tokenizer, chunk.length ? chunk : [{ text: '', loss: false }])
    ids.push(...encoded.ids)
    labels.push(...encoded.labels)
    chunk = []
  }
  for (const p of pieces) {
    const parts = image ? p.text.split(IMAGE_TAG) : [p.text]
    for (const [i, text] of parts.entries()) {
      if (i > 0) {
        close()
        ids.push(IMAGE_PLACEHOLDER)
        labels.push(IGNORE)
      }
      if (text) chunk.push({ text, loss: p.loss })
    }
  }
  close()
  return { text: pieces.map((p) => p.text).join(''), ids, labels }
}

/** Rendering and tokenizing in one. */
export function encodeTurns(
  tokenizer: Tokenizer,
  style: PromptStyle,
  turns: readonly Turn[],
  o: { image: boolean; open?: boolean; system?: string; id?: string },
): Encoded {
  return encodePieces(tokenizer, render(style, turns, o), o.image)
}

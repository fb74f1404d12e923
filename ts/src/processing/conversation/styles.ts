/** The styles of conversations, and turns as pieces of text in one of them. */
import { IMAGE_TEXT } from '../../formats/record-file.js'
import { mismatch, show } from '../../util/errors.js'
import type { Tokenizer } from '../tokenizer.js'
import { llama2 } from './llama-2.js'
import { llama3 } from './llama-3.js'
import { renderPlain } from './plain.js'
import { type Conversation, dataError, markup, type Piece, prepare, type Rendered } from './turns.js'
import { vicunaV1 } from './vicuna-v1.js'

/** Styles of instruction tuning and of answers. */
export const CHAT_STYLES = ['vicuna_v1', 'llama_2', 'llama_3'] as const
export type ChatStyle = (typeof CHAT_STYLES)[number]
/** The style of pre-training, and those. */
export const STYLES = ['plain', ...CHAT_STYLES] as const
export type Style = (typeof STYLES)[number]

const CHAT: Record<ChatStyle, Conversation> = { vicuna_v1: vicunaV1, llama_2: llama2, llama_3: llama3 }

/**
 * The style of a checkpoint that says nothing of it: the one whose tokens the tokenizer has, else the official code's.
 * @param tokenizer the checkpoint's
 */
export function styleOf(tokenizer?: Pick<Tokenizer, 'tokenToId'>): ChatStyle {
  const own = ['<|start_header_id|>', '<|eot_id|>'] // of the Llama 3 template alone
  return tokenizer && own.every((token) => tokenizer.tokenToId(token) !== undefined) ? 'llama_3' : 'vicuna_v1'
}

/** Tokens that end an answer in a style, besides the tokenizer's and the model's end tokens. */
export const endTokens = (style: Style): readonly string[] => (style === 'plain' ? [] : CHAT[style].ends)

export interface PromptOptions {
  style: Style
  /** replaces the style's system prompt; a system turn of the record wins over it */
  system?: string
}

/**
 * Renders turns as pieces.
 * @param open ends with the opening of an answer (inference): the last turn must be a question then
 * @param eos text of the end token (vicuna_v1 and llama_2 end answers with it)
 * @throws AlignGPTError ERR_DATA: two placeholders, turns that do not alternate, nothing to render
 */
export function render(record: Rendered, options: PromptOptions & { open?: boolean; eos?: string }): Piece[] {
  const { style, open = false, eos = '</s>' } = options
  if (!STYLES.includes(style)) throw mismatch('ERR_ARGUMENT', 'prompt', 'style', STYLES.join(' or '), show(style))
  const system = options.system ?? (style === 'plain' ? '' : CHAT[style].system)
  const p = prepare(record, system)
  if (open && p.turns[p.turns.length - 1].from !== 'human')
    throw dataError(record.id, 'last turn', 'a question', 'an answer')
  if (style === 'plain') return renderPlain(record.id, p, open)
  const { render: one, open: opening } = CHAT[style]
  const pieces = p.turns.flatMap((_, i) => one(p, i, eos))
  if (open && opening) pieces.push(markup(opening))
  return pieces
}

/** Text of rendered pieces, the picture as `<image>`. */
export const textOf = (pieces: readonly Piece[]): string =>
  pieces.map((p) => ('image' in p ? IMAGE_TEXT : p.text)).join('')

/**
 * Conversations -> token ids, labels and the gate's text. The prompt styles are LLaVA's (conversation.py): plain,
 * vicuna_v1, llama_2, llama_3. A turn is rendered as pieces that say themselves whether they are learned; each stretch of
 * text between pictures is tokenised once, as a whole, and a token is learned when it starts inside a learned piece.
 */
import { type AlignGPTError, mismatch, show } from '../util/errors.js'
import type { Tokenizer } from './tokenizer.js'

export const IMAGE_TOKEN = -200
export const IGNORE = -100
export const IMAGE_TEXT = '<image>'

export const STYLES = ['plain', 'vicuna_v1', 'llama_2', 'llama_3'] as const
export type Style = (typeof STYLES)[number]

export interface Turn {
  from: 'human' | 'gpt' | 'system'
  value: string
}

/** A record of LLaVA data after validation. */
export interface DataRecord {
  id: string
  image: string | null
  conversations: Turn[]
  /** alignment level of phase 1, null when the pair has not been scored */
  similarity: number | null
  /** what kind of question it is, where the data says so (held-out loss is given for each) */
  task?: string
}

/** Rendered text, learned or not, or the place of the picture. */
export type Piece = { text: string; loss: boolean } | { image: true }

export const DEFAULT_SYSTEM: Record<Style, string> = {
  plain: '',
  vicuna_v1:
    'A chat between a curious user and an artificial intelligence assistant. ' +
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
  llama_2:
    'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  ' +
    'Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. ' +
    'Please ensure that your responses are socially unbiased and positive in nature.\n\n' +
    'If a question does not make any sense, or is not factually coherent, explain why instead of answering something ' +
    "not correct. If you don't know the answer to a question, please don't share false information.",
  llama_3:
    'You are a helpful language and vision assistant. ' +
    'You are able to understand the visual content that the user provides, ' +
    'and assist the user with a variety of tasks using natural language.',
}

export interface PromptOptions {
  style: Style
  /** replaces the style's system prompt; a system turn of the record wins over it */
  system?: string
}

export interface SampleOptions extends PromptOptions {
  /** rows a picture takes, P */
  patches: number
  /** longest sequence after splicing (BOS, ALIGN and picture rows count); default: no limit */
  maxLength?: number
  /** only the last answer is learned; those before it are part of the prompt */
  lastAnswer?: boolean
}

/** One sequence, ready to be packed. Lengths: L = kept ids, U = uncut ids. */
export interface Sample {
  id: string
  /** rendered text with `<image>` for the picture */
  text: string
  /** [L] token ids, the picture is -200; starts with BOS; cut to maxLength */
  ids: Int32Array
  /** [L] label of each id (not shifted), -100 where nothing is learned */
  labels: Int32Array
  /** text tokens of the uncut sequence without BOS and picture: what the gate's mean sees */
  gateIds: Int32Array
  /** as gateIds: 1 = part of an answer, which `gateText: 'instruction'` leaves out */
  gateAnswer: Uint8Array
  /** file name of the picture, null for a text-only sample */
  image: string | null
  level: number | null
  /** rows of the spliced sequence, after cutting */
  length: number
  /** rows of the spliced sequence, before cutting */
  fullLength: number
  /** why the sample cannot be used, null when it can */
  skip: string | null
}

/** Common preparation of turns: system turn, leading answers, place of the picture. */
interface Prepared {
  turns: { from: 'human' | 'gpt'; value: string }[]
  system: string
  /** index of the turn whose front holds the picture; -1: none */
  imageTurn: number
}

const dataError = (id: string, what: string, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'prompt', `record ${show(id)}: ${what}`, expected, got)

/**
 * Moves the placeholder to the front of its turn and strips that turn; drops a leading answer.
 * Without a placeholder the picture goes to the front of the first question. In a text-only record a literal `<image>`
 * stays text.
 */
function prepare(id: string, hasImage: boolean, conversations: Turn[], options: PromptOptions): Prepared {
  let system = options.system ?? DEFAULT_SYSTEM[options.style]
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
function question(p: Prepared, i: number, before: string, after: string): Piece[] {
  const value = p.turns[i].value
  if (i !== p.imageTurn) return [{ text: before + value + after, loss: false }]
  const rest = value === '' ? '' : `\n${value}`
  return [{ text: before, loss: false }, { image: true }, { text: rest + after, loss: false }]
}

type Renderer = (p: Prepared, i: number, eos: string) => Piece[]

// LLaVA's TWO style: 'SYSTEM USER: q ASSISTANT: a</s>USER: q2 ...'. The space before an answer belongs to it.
const vicuna: Renderer = (p, i, eos) =>
  p.turns[i].from === 'human'
    ? question(p, i, i === 0 ? `${p.system} USER: ` : 'USER: ', ' ')
    : [
        { text: 'ASSISTANT:', loss: false },
        { text: ` ${p.turns[i].value}${eos}`, loss: true },
      ]

// LLaVA's LLAMA_2 style: '[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nq [/INST] a </s><s>[INST] q2 [/INST] a2 </s>'.
const llama2: Renderer = (p, i, eos) => {
  if (p.turns[i].from === 'gpt') return [{ text: ` ${p.turns[i].value} ${eos}`, loss: true }]
  const system = i === 0 && p.system ? `<<SYS>>\n${p.system}\n<</SYS>>\n\n` : ''
  return question(p, i, `${i === 0 ? '' : '<s>'}[INST] ${system}`, ' [/INST]')
}

// The Llama 3 chat template (LLaVA-NeXT's LLAMA_3 style); BOS comes from the tokenizer. Contents are stripped.
const header = (role: string): string => `<|start_header_id|>${role}<|end_header_id|>\n\n`
const llama3: Renderer = (p, i) => {
  const value = p.turns[i].value.trim()
  const stripped: Prepared = { ...p, turns: p.turns.map((t, k) => (k === i ? { ...t, value } : t)) }
  const system = i === 0 && p.system ? `${header('system')}${p.system.trim()}<|eot_id|>` : ''
  return p.turns[i].from === 'human'
    ? question(stripped, i, system + header('user'), '<|eot_id|>')
    : [
        { text: header('assistant'), loss: false },
        { text: `${value}<|eot_id|>`, loss: true },
      ]
}

const RENDERERS: Record<Exclude<Style, 'plain'>, { render: Renderer; open: string }> = {
  vicuna_v1: { render: vicuna, open: 'ASSISTANT:' },
  llama_2: { render: llama2, open: '' },
  llama_3: { render: llama3, open: header('assistant') },
}

/** `plain`: the question is discarded; picture, caption, newline, and all text is learned. */
function renderPlain(id: string, p: Prepared, open: boolean): Piece[] {
  const image: Piece[] = p.imageTurn >= 0 ? [{ image: true }] : []
  if (open) return image
  if (p.turns.length !== 2)
    throw dataError(id, 'conversations', 'one question and one caption (plain)', `${p.turns.length} turns`)
  return [...image, { text: `${p.turns[1].value}\n`, loss: true }]
}

/**
 * Renders turns as pieces.
 * @param open ends with the opening of an answer (inference): the last turn must be a question then
 * @param eos text of the end token (vicuna_v1 and llama_2 end answers with it)
 * @throws AlignGPTError ERR_DATA: two placeholders, turns that do not alternate, nothing to render
 */
export function render(
  record: Pick<DataRecord, 'id' | 'image' | 'conversations'>,
  options: PromptOptions & { open?: boolean; eos?: string },
): Piece[] {
  const { style, open = false, eos = '</s>' } = options
  if (!STYLES.includes(style)) throw mismatch('ERR_ARGUMENT', 'prompt', 'style', STYLES.join(' or '), show(style))
  const p = prepare(record.id, record.image !== null, record.conversations, options)
  if (open && p.turns[p.turns.length - 1].from !== 'human')
    throw dataError(record.id, 'last turn', 'a question', 'an answer')
  if (style === 'plain') return renderPlain(record.id, p, open)
  const { render: one, open: opening } = RENDERERS[style]
  const pieces = p.turns.flatMap((_, i) => one(p, i, eos))
  if (open && opening) pieces.push({ text: opening, loss: false })
  return pieces
}

/** Text of rendered pieces, the picture as `<image>`. */
export const textOf = (pieces: readonly Piece[]): string =>
  pieces.map((p) => ('image' in p ? IMAGE_TEXT : p.text)).join('')

/** Tokenises one stretch of text pieces as a whole. */
function encodeStretch(
  pieces: { text: string; loss: boolean }[],
  tokenizer: Tokenizer,
  ids: number[],
  labels: number[],
): void {
  const ends: number[] = []
  let text = ''
  for (const p of pieces) {
    text += p.text
    ends.push(text.length)
  }
  if (!text) return
  const encoded = tokenizer.encodeWithOffsets(text)
  let k = 0
  encoded.ids.forEach((id, i) => {
    while (k < ends.length - 1 && encoded.starts[i] >= ends[k]) k++
    ids.push(id)
    labels.push(pieces[k].loss ? id : IGNORE)
  })
}

/**
 * Token ids [BOS, ...] and labels of rendered pieces; the picture is -200 with label -100.
 * Every stretch between pictures is tokenised separately, so each gets its own prefix space, as in LLaVA.
 */
export function encodePieces(pieces: readonly Piece[], tokenizer: Tokenizer): { ids: Int32Array; labels: Int32Array } {
  const ids = [tokenizer.bosId]
  const labels = [IGNORE]
  let stretch: { text: string; loss: boolean }[] = []
  for (const p of pieces) {
    if (!('image' in p)) {
      stretch.push(p)
      continue
    }
    encodeStretch(stretch, tokenizer, ids, labels)
    stretch = []
    ids.push(IMAGE_TOKEN)
    labels.push(IGNORE)
  }
  encodeStretch(stretch, tokenizer, ids, labels)
  return { ids: Int32Array.from(ids), labels: Int32Array.from(labels) }
}

/** What the gate's mean sees: every id but BOS and the picture, and whether it belongs to an answer. */
function gateText(ids: Int32Array, labels: Int32Array): { gateIds: Int32Array; gateAnswer: Uint8Array } {
  const rows = [...ids.keys()].filter((i) => i > 0 && ids[i] !== IMAGE_TOKEN)
  return {
    gateIds: Int32Array.from(rows, (i) => ids[i]),
    gateAnswer: Uint8Array.from(rows, (i) => (labels[i] === IGNORE ? 0 : 1)),
  }
}

/**
 * A training sample. Too long: the end of the text is cut; a picture that does not fit, or a sample of which nothing
 * learnable is left, is marked in `skip`.
 * @throws AlignGPTError ERR_DATA: see render; also a record without any answer
 */
export function buildSample(record: DataRecord, tokenizer: Tokenizer, options: SampleOptions): Sample {
  const { patches, maxLength = Number.POSITIVE_INFINITY } = options
  const pieces = render(record, { ...options, eos: tokenizer.eosToken })
  const { ids, labels } = encodePieces(pieces, tokenizer)
  // an answer is a stretch of labels up to the end of its turn, and the next turn has none
  if (options.lastAnswer) labels.fill(IGNORE, 0, labels.lastIndexOf(IGNORE))
  if (!labels.some((x) => x !== IGNORE)) throw dataError(record.id, 'conversations', 'an answer to learn', 'none')
  const sample = toSample(record, textOf(pieces), ids, labels, patches)
  if (sample.length <= maxLength) return sample
  // The picture's P rows and ALIGN take the place of one id.
  const keep = record.image === null ? maxLength : maxLength - patches
  const place = ids.indexOf(IMAGE_TOKEN)
  if (record.image !== null && place >= keep)
    return { ...sample, skip: `the picture ends at row ${place + 1 + patches}, the limit is ${maxLength}` }
  const cut = { ...sample, ids: ids.slice(0, keep), labels: labels.slice(0, keep), length: maxLength }
  const nothing = !cut.labels.some((x) => x !== IGNORE)
  return nothing ? { ...cut, skip: `no answer is left within ${maxLength} rows` } : cut
}

function toSample(record: DataRecord, text: string, ids: Int32Array, labels: Int32Array, patches: number): Sample {
  const length = record.image === null ? ids.length : ids.length + patches
  const { id, image, similarity: level } = record
  return { id, text, ids, labels, ...gateText(ids, labels), image, level, length, fullLength: length, skip: null }
}

/**
 * A prompt that ends where the answer begins (`ASSISTANT:` without a space in vicuna_v1).
 * @param turns the conversation so far, ending with a question
 * @param image name of the picture, null for a text-only prompt
 * @throws AlignGPTError ERR_DATA
 */
export function buildPrompt(
  turns: Turn[],
  image: string | null,
  tokenizer: Tokenizer,
  options: PromptOptions & { patches: number; id?: string },
): Sample {
  const record: DataRecord = { id: options.id ?? 'prompt', image, conversations: turns, similarity: null }
  const pieces = render(record, { ...options, open: true, eos: tokenizer.eosToken })
  const { ids, labels } = encodePieces(pieces, tokenizer)
  // Earlier answers are part of a prompt; nothing of it is learned.
  return toSample(record, textOf(pieces), ids, labels.fill(IGNORE), options.patches)
}

/**
 * Conversations -> token ids, labels and the gate's text. Each stretch of text between images is tokenised once, as a whole, and a
 * token is learned when it starts inside a learned piece.
 */
import type { DataRecord, Turn } from '../formats/record-file.js'
import { type PromptOptions, render, textOf } from './conversation/styles.js'
import { dataError, type Piece, type Rendered } from './conversation/turns.js'
import type { Tokenizer } from './tokenizer.js'

export const IMAGE_TOKEN = -200
export const IGNORE = -100

export interface SampleOptions extends PromptOptions {
  /** rows a picture takes, P */
  patches: number
  /** longest sequence after splicing (BOS, ALIGN and picture rows count); default: no limit */
  maxLength?: number
  /** only the last answer is learned; those before it are part of the prompt */
  lastAnswer?: boolean
  /**
   * special tokens that the conversation's own texts spell out (`</s>`) are plain text, as for a text that somebody typed. Default
   * false: they act as tokens, as in the official code's training
   */
  literal?: boolean
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

type TextPiece = Extract<Piece, { text: string }>

/** A record, which may say its picture's place itself. */
export type Recorded = Rendered & Pick<DataRecord, 'similarity'>

/** Tokenises one stretch of text pieces as a whole. */
function encodeStretch(
  pieces: TextPiece[],
  { tokenizer, literal }: { tokenizer: Tokenizer; literal: boolean },
  { ids, labels }: { ids: number[]; labels: number[] },
): void {
  const ends: number[] = []
  const contents: [number, number][] = []
  let text = ''
  for (const p of pieces) {
    if (p.content && p.text) contents.push([text.length, text.length + p.text.length])
    text += p.text
    ends.push(text.length)
  }
  if (!text) return
  const encoded = tokenizer.encodeWithOffsets(text, literal ? contents : [])
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
 * @param literal see SampleOptions
 */
export function encodePieces(
  pieces: readonly Piece[],
  tokenizer: Tokenizer,
  literal = false,
): { ids: Int32Array; labels: Int32Array } {
  const ids = [tokenizer.bosId]
  const labels = [IGNORE]
  let stretch: TextPiece[] = []
  for (const p of pieces) {
    if (!('image' in p)) {
      stretch.push(p)
      continue
    }
    encodeStretch(stretch, { tokenizer, literal }, { ids, labels })
    stretch = []
    ids.push(IMAGE_TOKEN)
    labels.push(IGNORE)
  }
  encodeStretch(stretch, { tokenizer, literal }, { ids, labels })
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
export function buildSample(record: Recorded, tokenizer: Tokenizer, options: SampleOptions): Sample {
  const { patches, maxLength = Number.POSITIVE_INFINITY } = options
  const pieces = render(record, { ...options, eos: tokenizer.eosToken })
  const { ids, labels } = encodePieces(pieces, tokenizer, options.literal)
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

function toSample(record: Recorded, text: string, ids: Int32Array, labels: Int32Array, patches: number): Sample {
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
  turns: readonly Turn[],
  image: string | null,
  tokenizer: Tokenizer,
  options: PromptOptions & Pick<SampleOptions, 'patches' | 'literal'> & Pick<Rendered, 'imageTurn'> & { id?: string },
): Sample {
  const { id = 'prompt', imageTurn } = options
  const record: Recorded = { id, image, conversations: turns, similarity: null, imageTurn }
  const pieces = render(record, { ...options, open: true, eos: tokenizer.eosToken })
  const { ids, labels } = encodePieces(pieces, tokenizer, options.literal)
  // Earlier answers are part of a prompt; nothing of it is learned.
  return toSample(record, textOf(pieces), ids, labels.fill(IGNORE), options.patches)
}

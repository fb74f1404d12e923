/** What somebody asks a model, as its prompt, its pixels, and the room that is left for the answer. */
import { IMAGE_TEXT, type Turn } from '../formats/record-file.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import { type PackedBatch, packBatch } from '../models/packed-batch.js'
import { endTokens, type Style } from '../processing/conversation/styles.js'
import { dataError } from '../processing/conversation/turns.js'
import { decodeImage } from '../processing/image/decode.js'
import { normalise, preprocessImage } from '../processing/image/preprocess.js'
import { buildPrompt, type Sample } from '../processing/sample.js'
import { mismatch, show } from '../util/errors.js'

/**
 * A question. Its texts are data: special tokens that they spell out (`</s>`) are plain text, and so is `<image>`, but for the place
 * of the picture (`imageTurn`).
 */
export interface GenerateRequest {
  prompt: string
  /** a file, or the bytes of one */
  image?: string | Uint8Array
  /** earlier turns, a system turn first if there is one */
  history?: readonly Turn[]
  /**
   * which of [...history, prompt] the picture belongs to, a human one. Default: the one with `<image>` on a line of its own at its
   * beginning or end, which is taken out (two are an error), else the first human one
   */
  imageTurn?: number
  /** which of the seed's random streams it is sampled with; default its place in the batch */
  stream?: number
  /** what messages call it; default its place in the batch */
  name?: string
}

export interface PromptSettings {
  /** prompt style; default the model's own (`conversation`) */
  style?: Style
  /** system prompt in place of the style's; a system turn of the history wins over it */
  system?: string
}

// `<image>` on a line of its own, where LLaVA's data has it.
const AT_FRONT = new RegExp(`^\\s*${IMAGE_TEXT}[^\\S\\n]*(?:\\n|$)`)
const AT_END = new RegExp(`(?:^|\\n)[^\\S\\n]*${IMAGE_TEXT}\\s*$`)

/**
 * The turns without the placeholder, and the turn that the picture belongs to.
 * @param id name for messages
 * @throws AlignGPTError ERR_DATA for two placeholders
 */
export function placeImage(id: string, turns: readonly Turn[]): { turns: Turn[]; imageTurn: number } {
  let imageTurn = -1
  const left = turns.map((t, i): Turn => {
    if (t.from !== 'human') return t
    let { value } = t
    for (const place of [AT_FRONT, AT_END]) {
      if (!place.test(value)) continue
      if (imageTurn >= 0) throw dataError(id, 'placeholder', `at most one ${IMAGE_TEXT}`, 'a second one')
      imageTurn = i
      value = value.replace(place, '')
    }
    return { ...t, value }
  })
  return { turns: left, imageTurn: imageTurn < 0 ? turns.findIndex((t) => t.from === 'human') : imageTurn }
}

/**
 * The prompt of a request.
 * @param id name for messages
 * @throws AlignGPTError ERR_DATA
 */
export function promptOf(model: AlignGPTNetwork, r: GenerateRequest, o: PromptSettings, id: string): Sample {
  const asked: Turn[] = [...(r.history ?? []), { from: 'human', value: r.prompt }]
  const options = { style: o.style ?? model.conversation, system: o.system, patches: model.patches, literal: true, id }
  if (r.image === undefined) return buildPrompt(asked, null, model.tokenizer, options)
  const { turns, imageTurn } =
    r.imageTurn === undefined ? placeImage(id, asked) : { turns: asked, imageTurn: r.imageTurn }
  return buildPrompt(turns, 'image', model.tokenizer, { ...options, imageTurn })
}

/**
 * Tokens that an answer may have: prompt and answer together fit into the model's context.
 * @throws AlignGPTError ERR_DATA where the prompt leaves no room for any
 */
export function roomFor(model: AlignGPTNetwork, prompt: Sample, maxNewTokens: number): number {
  const { context } = model
  if (prompt.length >= context) {
    const expected = `a prompt of at most ${context - 1} rows, for a context of ${context}`
    throw mismatch('ERR_DATA', 'generate', prompt.id, expected, `${prompt.length}`)
  }
  return Math.min(maxNewTokens, context - prompt.length)
}

/**
 * An image as the vision tower wants it: [3, S, S].
 * @param pad as `AlignGPTNetwork.preprocess` takes it
 * @param name for messages, where it is bytes
 * @throws ERR_IMAGE
 */
export async function loadPixels(
  model: AlignGPTNetwork,
  image: string | Uint8Array,
  pad = true,
  name?: string,
): Promise<Float32Array> {
  const preprocess = model.preprocess(pad)
  const { exifOrientation } = preprocess
  const decoded = await decodeImage(image, { exifOrientation, ...(typeof image !== 'string' && { name }) })
  return normalise(preprocessImage(decoded, preprocess), model.preprocessor)
}

/** A request that can be answered. */
export interface Ready {
  request: GenerateRequest
  sample: Sample
  /** tokens that its answer may have */
  room: number
  pixels: Float32Array | null
}

/**
 * Everything of a request that may be wrong is looked at here.
 * @param id what messages call it where it has no name
 * @throws AlignGPTError ERR_DATA, ERR_IMAGE
 */
export async function prepare(
  model: AlignGPTNetwork,
  request: GenerateRequest,
  o: PromptSettings & { pad?: boolean; maxNewTokens: number },
  id: string,
): Promise<Ready> {
  const { image, name = id } = request
  if (typeof request.prompt !== 'string')
    throw mismatch('ERR_DATA', 'generate', `${name}: prompt`, 'a string', show(request.prompt))
  const sample = promptOf(model, request, o, name)
  const room = roomFor(model, sample, o.maxNewTokens)
  const pixels = image === undefined ? null : await loadPixels(model, image, o.pad, request.name)
  return { request, sample, room, pixels }
}

/** Packs samples with the pixels of those that have a picture, for the way their vectors will be made. */
export function packWithPixels(
  model: AlignGPTNetwork,
  samples: readonly Sample[],
  pixels: readonly (Float32Array | null)[],
  mix: Mix,
  gateText: 'all' | 'instruction' = 'all',
): PackedBatch {
  return packBatch(samples, model.patches, {
    gateText,
    align: mix.mode !== 'none',
    size: model.imageSize,
    fill: (out, offset, b) => out.set(pixels[b] as Float32Array, offset),
  })
}

/** Ids that end an answer: the tokenizer's, those of config.json and generation_config.json, the prompt style's. */
export function endIds(model: AlignGPTNetwork, style: Style): Set<number> {
  const named = endTokens(style)
    .map((t) => model.tokenizer.tokenToId(t))
    .filter((id) => id !== undefined)
  const { generation, config } = model.parts
  return new Set([model.tokenizer.eosId, ...config.llm.eos_token_ids, ...(generation?.eos_token_ids ?? []), ...named])
}

/**
 * How the small models are trained that the quickstart starts from: a CLIP contrastively and a LLaMA on text, with the
 * tensors and layers of this same package. Both become ordinary Hugging Face folders with weights in bf16.
 */

import fs from 'node:fs'
import path from 'node:path'
import type { DataRecord } from 'aligngpt'
import { backward, ops, type Parameter, Rng, type Tensor, tensor } from 'aligngpt/core'
import {
  augment,
  decodeImage,
  encodePieces,
  IGNORE,
  normaliseInto,
  normaliseTable,
  preprocessImage,
  type RgbImage,
  render,
} from 'aligngpt/data'
import {
  type CLIPModel,
  createClip,
  createLanguageModel,
  hiddenStates,
  type LanguageModel,
  type PreprocessorConfig,
  saveWeights,
  Tokenizer,
} from 'aligngpt/models'
import { type LoopStep, shuffled, train } from 'aligngpt/train'
import { CATEGORIES, type Category, type Emoji } from './emoji.js'

/** A loss every now and then, for the report. */
export type Curve = number[]
export interface Budget {
  /** training stops after this many steps */
  steps: number
  onStep?: (step: number, loss: number) => void
}

const write = (file: string, value: unknown): void => fs.writeFileSync(file, `${JSON.stringify(value, null, 2)}\n`)

const parametersOf = (m: CLIPModel | LanguageModel): Parameter[] =>
  [...m.namedParameters()].map(([name, t]) => ({ name, tensor: t }))

/** Of both kinds; half a cosine to 0 follows. */
const WARMUP_RATIO = 0.05

/** The run of a tower's training. */
const runOptions = ({ steps, lr, seed, onStep }: Budget & { lr: number; seed: number }) => ({
  ...{ steps, lr, seed, warmupRatio: WARMUP_RATIO, clipGradNorm: 1 },
  onStep: (s: LoopStep) => onStep?.(s.step, s.loss),
})

// ---- CLIP -------------------------------------------------------------------------------------------------
export const CLIP_TEXT_LENGTH = 24
// Images of 24 x 24: small ones differ less between drawing styles, and this CLIP has to recognise a style it never
// saw.
const CLIP = { width: 128, heads: 4, side: 24, patch: 8, projection: 128 }
export interface ClipSize {
  vocab: number
  layers: number
  textLayers: number
}

/** Settings of a small CLIP; the tokenizer is already in the folder. */
export function writeClipConfig(folder: string, { vocab, layers, textLayers }: ClipSize): void {
  const tower = {
    hidden_size: CLIP.width,
    intermediate_size: 4 * CLIP.width,
    num_attention_heads: CLIP.heads,
    hidden_act: 'quick_gelu',
  }
  write(path.join(folder, 'config.json'), {
    architectures: ['CLIPModel'],
    model_type: 'clip',
    projection_dim: CLIP.projection,
    logit_scale_init_value: 2.6592,
    text_config: {
      ...tower,
      model_type: 'clip_text_model',
      vocab_size: vocab,
      num_hidden_layers: textLayers,
      max_position_embeddings: CLIP_TEXT_LENGTH,
      bos_token_id: vocab - 2,
      eos_token_id: vocab - 1,
      pad_token_id: vocab - 1,
    },
    vision_config: {
      ...tower,
      model_type: 'clip_vision_model',
      num_hidden_layers: layers,
      image_size: CLIP.side,
      patch_size: CLIP.patch,
    },
    torch_dtype: 'bfloat16',
  })
  write(path.join(folder, 'preprocessor_config.json'), {
    do_center_crop: true,
    do_normalize: true,
    do_resize: true,
    size: CLIP.side,
    crop_size: CLIP.side,
    resample: 3,
    image_mean: [0.48145466, 0.4578275, 0.40821073],
    image_std: [0.26862954, 0.26130258, 0.27577711],
  })
}

/** Training pictures in memory, each in several augmented versions made once. */
export class TrainingImages {
  /** uint8 [side, side, 3] by image and version; version 0 is the image as it is */
  readonly #bytes: Map<string, Uint8Array[]>
  readonly #table: Float32Array
  private constructor(bytes: Map<string, Uint8Array[]>, table: Float32Array) {
    this.#bytes = bytes
    this.#table = table
  }
  static async load(
    images: string,
    names: readonly string[],
    versions: number,
    p: PreprocessorConfig,
    seed: number,
  ): Promise<TrainingImages> {
    const bytes = new Map<string, Uint8Array[]>()
    const one = async (name: string, i: number): Promise<void> => {
      const image: RgbImage = await decodeImage(path.join(images, name), { alpha: true })
      const made = Array.from({ length: versions }, (_, v) =>
        preprocessImage(v === 0 ? image : augment(image, new Rng(seed, i * 64 + v)), { ...p, pad: false }),
      )
      bytes.set(name, made)
    }
    for (let i = 0; i < names.length; i += 32) await Promise.all(names.slice(i, i + 32).map((n, k) => one(n, i + k)))
    return new TrainingImages(bytes, normaliseTable(p))
  }
  fill(name: string, version: number, out: Float32Array, offset: number): void {
    const list = this.#bytes.get(name) as Uint8Array[]
    normaliseInto(list[version % list.length], this.#table, out, offset)
  }
}

export interface ClipPair {
  image: string
  /** one of these is the text of a step */
  captions: string[]
  category?: Category
}

/**
 * What is written below a picture when a CLIP is to learn what it shows. Always the name: in a batch, two pictures
 * with the same caption would be pushed apart.
 */
export function clipCaptions(e: Emoji): string[] {
  const keywords = e.keywords.slice(0, 4)
  return [
    e.name,
    `${e.name}, ${e.category}`,
    ...keywords.flatMap((k) => [`${e.name}, ${k}`, `${k}, ${e.name}`, `${e.name}, ${k}, ${e.category}`]),
  ]
}

/**
 * Cross-entropy of picking the right one of the categories: captions hardly ever ask for what things have in
 * common.
 */
function categoryLoss(model: CLIPModel, image: Tensor, categories: readonly Int32Array[], kinds: Int32Array): Tensor {
  const text = ops.l2Normalize(model.textEmbeds(categories))
  const rows = tensor(Int32Array.from(kinds.keys()))
  return ops.lmHeadLoss(ops.scale(ops.l2Normalize(image), 10), text, rows, tensor(kinds), kinds.length).loss
}

interface ClipBatch {
  /** [B, 3, side, side] */
  pixels: Float32Array
  captions: Int32Array[]
  /** [B] category of each, -1: none */
  kinds: Int32Array
}

/** Trains a CLIP on pairs and writes it to `folder`. */
export async function trainClip(
  folder: string,
  images: TrainingImages,
  pairs: readonly ClipPair[],
  o: Budget & { batch: number; lr: number; seed: number },
): Promise<Curve> {
  const tokenizer = Tokenizer.load(folder)
  const model = createClip(folder, { seed: o.seed })
  const texts = pairs.map((p) => p.captions.map((c) => tokenizer.encodeClip(c, CLIP_TEXT_LENGTH)))
  const categories = CATEGORIES.map((c) => tokenizer.encodeClip(c, CLIP_TEXT_LENGTH))
  const { side } = CLIP
  const plane = 3 * side * side
  const order = shuffled(pairs.length, o.batch, o.seed)
  const batches = (step: number): ClipBatch[] => {
    const chosen = order(step)
    const rng = new Rng(o.seed, 0x10000 + step)
    const pixels = new Float32Array(chosen.length * plane)
    for (const [i, k] of chosen.entries()) images.fill(pairs[k].image, 1 + rng.int(1000), pixels, i * plane)
    const captions = Array.from(chosen, (k) => rng.pick(texts[k]))
    const kinds = Int32Array.from(chosen, (k) => CATEGORIES.indexOf(pairs[k].category as Category))
    return [{ pixels, captions, kinds }]
  }
  const lossAndGradients = ({ pixels, captions, kinds }: ClipBatch): { loss: Tensor } => {
    const { logit_scale: scale } = model
    const image = model.imageEmbeds(tensor(pixels, [kinds.length, 3, side, side], 'f32', scale.device))
    const loss = ops.contrastiveLoss(image, model.textEmbeds(captions), scale)
    const named = !kinds.includes(-1)
    backward(named ? ops.add(loss, ops.scale(categoryLoss(model, image, categories, kinds), 0.3)) : loss)
    return { loss }
  }
  const options = { ...runOptions(o), weightDecay: 0.1, beta2: 0.98 }
  const { loss: curve } = await train({ parameters: parametersOf(model), lossAndGradients }, batches, options)
  saveWeights(folder, model, 'bf16')
  model.dispose()
  return curve
}

// ---- LLaMA ------------------------------------------------------------------------------------------------
// Two layers are enough to find a word of the question in what stands before it, and twice as fast as four.
const LLAMA = { width: 128, layers: 2, heads: 4, inter: 384, init: 0.07 }

/** Settings of the small LLaMA; the tokenizer is already in the folder. */
export function writeLlamaConfig(folder: string, vocab: number): void {
  write(path.join(folder, 'config.json'), {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    vocab_size: vocab,
    hidden_size: LLAMA.width,
    intermediate_size: LLAMA.inter,
    num_hidden_layers: LLAMA.layers,
    num_attention_heads: LLAMA.heads,
    num_key_value_heads: LLAMA.heads,
    hidden_act: 'silu',
    max_position_embeddings: 512,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    tie_word_embeddings: true,
    initializer_range: LLAMA.init,
    bos_token_id: 1,
    eos_token_id: 2,
    pad_token_id: 0,
    torch_dtype: 'bfloat16',
  })
}

type TextSample = ReturnType<typeof encodePieces>

/** Trains a LLaMA on plain texts and on conversations without pictures, and writes it to `folder`. */
export async function trainLlama(
  folder: string,
  texts: readonly string[],
  conversations: readonly DataRecord[],
  o: Budget & { batch: number; lr: number; seed: number },
): Promise<Curve> {
  const tokenizer = Tokenizer.load(folder)
  const model = createLanguageModel(folder, { seed: o.seed })
  // Of plain text everything is learned, of conversations the answers.
  const samples = [
    ...texts.map((text) => encodePieces([{ text, loss: true }], tokenizer)),
    ...conversations.map((r) => encodePieces(render(r, { style: 'vicuna_v1' }), tokenizer)),
  ]
  const order = shuffled(samples.length, o.batch, o.seed)
  const lossAndGradients = (batch: readonly TextSample[]): { loss: Tensor } => {
    const ids = Int32Array.from(batch.flatMap((s) => [...s.ids]))
    const labels = batch.flatMap((s) => [...s.labels])
    const positions = Int32Array.from(batch.flatMap((s) => Array.from(s.ids, (_, i) => i)))
    // BOS, the first of each sample, is never a target: no row predicts the next sample
    const rows = Int32Array.from([...labels.keys()].filter((i) => i + 1 < labels.length && labels[i + 1] !== IGNORE))
    const offsets = new Int32Array(batch.length + 1)
    for (const [i, s] of batch.entries()) offsets[i + 1] = offsets[i] + s.ids.length
    const rotary = model.rotary(Math.max(...batch.map((s) => s.ids.length)))
    const packing = { offsets: tensor(offsets), positions: tensor(positions), ...rotary }
    const h = hiddenStates(model, ops.embedding(tensor(ids), model.embeddings), packing)
    const targets = tensor(rows.map((r) => labels[r + 1]))
    const { loss } = ops.lmHeadLoss(h, model.headWeight, tensor(rows), targets, rows.length)
    backward(loss)
    return { loss }
  }
  const batches = (step: number): TextSample[][] => [Array.from(order(step), (i) => samples[i])]
  const options = { ...runOptions(o), weightDecay: 0.05, beta2: 0.95 }
  const { loss: curve } = await train({ parameters: parametersOf(model), lossAndGradients }, batches, options)
  saveWeights(folder, model, 'bf16')
  model.dispose()
  return curve
}

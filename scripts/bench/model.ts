/** The model of the step rows (39 M parameters by default) as a checkpoint both sides read, its batch and our step. */

import fs from 'node:fs'
import path from 'node:path'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { type Dtype, native } from '../../ts/src/core/native.js'
import { scope } from '../../ts/src/core/tensor.js'
import { writeSafetensors } from '../../ts/src/formats/safetensors.js'
import { CLIPModel } from '../../ts/src/models/clip.js'
import { readClipConfig } from '../../ts/src/models/config/clip.js'
import { readLlamaConfig } from '../../ts/src/models/config/llama.js'
import { LlamaModel } from '../../ts/src/models/llama.js'
import { type PackedBatch, packBatch } from '../../ts/src/models/packed-batch.js'
import { initSource, type Placement } from '../../ts/src/models/parameter-sources.js'
import { AdamW } from '../../ts/src/nn/adamw.js'
import { Linear } from '../../ts/src/nn/layers.js'
import type { Module } from '../../ts/src/nn/module.js'
import { saveTokenizer, trainBpe } from '../../ts/src/processing/bpe-trainer.js'
import { IGNORE, IMAGE_TOKEN, type Sample } from '../../ts/src/processing/sample.js'
import { FINETUNE, PRETRAIN, trainable } from '../../ts/src/train/phases.js'
import { floats, integers, running } from './data.js'

/** Sizes; the defaults are those of the step rows. */
export interface Size {
  hidden: number
  inter: number
  layers: number
  heads: number
  vocab: number
  image: number
  patch: number
  vision: { hidden: number; inter: number; layers: number; heads: number }
}
export const STEP_SIZE: Size = {
  hidden: 512,
  inter: 1376,
  layers: 8,
  heads: 8,
  vocab: 8192,
  image: 224,
  patch: 14,
  vision: { hidden: 256, inter: 1024, layers: 6, heads: 8 },
}
/** Text rows of each sample of the step rows: 8 sequences of 322 rows. */
export const EVEN: readonly number[] = new Array<number>(8).fill(64)
export const LEVELS = 8
/** PyTorch's default rate; large enough that bf16 weights move. */
export const RATE = 1e-3

const json = (file: string, value: unknown): void => fs.writeFileSync(file, JSON.stringify(value, null, 2))

const F32: Placement = { dtype: 'f32' }

function saveWeights(folder: string, modules: readonly [string, Module][], { dtype }: Placement): void {
  const named = modules.flatMap(([prefix, m]) => [...m.namedParameters(prefix)])
  writeSafetensors(
    path.join(folder, 'model.safetensors'),
    named.map(([name, t]) => ({
      name,
      dtype: dtype === 'bf16' ? 'BF16' : 'F32',
      shape: t.shape,
      write: (file: string, offset: number) => native.writeFile(t.h, file, offset),
    })),
  )
  for (const [, m] of modules) m.dispose()
}

function writeClip(folder: string, s: Size, place: Placement): void {
  const { hidden, inter, layers, heads } = s.vision
  const tower = { hidden_size: hidden, intermediate_size: inter, num_attention_heads: heads, hidden_act: 'quick_gelu' }
  const pictures = { num_hidden_layers: layers, image_size: s.image, patch_size: s.patch }
  const texts = { num_hidden_layers: 1, vocab_size: 16, max_position_embeddings: 8, bos_token_id: 14, eos_token_id: 15 }
  fs.mkdirSync(folder, { recursive: true })
  json(path.join(folder, 'config.json'), {
    model_type: 'clip',
    projection_dim: 32,
    vision_config: { ...tower, ...pictures },
    text_config: { ...tower, ...texts },
  })
  json(path.join(folder, 'preprocessor_config.json'), { size: s.image, crop_size: s.image })
  saveWeights(folder, [['', new CLIPModel(initSource(1, place), readClipConfig(folder))]], place)
}

function writeLlama(folder: string, s: Size, place: Placement): void {
  saveTokenizer(trainBpe(['a few words, for the tokenizer is not used here'], { vocabSize: 300 }), folder)
  json(path.join(folder, 'config.json'), {
    model_type: 'llama',
    vocab_size: s.vocab,
    hidden_size: s.hidden,
    intermediate_size: s.inter,
    num_hidden_layers: s.layers,
    num_attention_heads: s.heads,
    num_key_value_heads: s.heads,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    rope_theta: 10000,
    tie_word_embeddings: false,
    bos_token_id: 1,
    eos_token_id: 2,
  })
  const source = initSource(2, place)
  const init = { kind: 'normal', std: 0.02 } as const
  const modules: [string, Module][] = [
    ['model.', new LlamaModel(source.at('model'), readLlamaConfig(folder))],
    ['lm_head.', new Linear(source.at('lm_head'), s.hidden, s.vocab, { bias: false, init })],
  ]
  saveWeights(folder, modules, place)
}

/** Writes a language model and a CLIP with random weights, as AlignGPT.create wants them. @returns their folders */
export function writeParts(temp: string, name: string, s: Size, place = F32): { llm: string; clip: string } {
  const [llm, clip] = [path.join(temp, `${name}-llm`), path.join(temp, `${name}-clip`)]
  writeLlama(llm, s, place)
  writeClip(clip, s, place)
  return { llm, clip }
}

/** Writes an AlignGPT checkpoint with random weights; both sides load it. @returns its folder */
export async function writeModel(temp: string, s: Size = STEP_SIZE): Promise<string> {
  const name = `model-${s.layers}-${s.hidden}-${s.vocab}`
  const folder = path.join(temp, name)
  if (fs.existsSync(path.join(folder, 'model.safetensors'))) return folder
  const model = await AlignGPT.create({ ...writeParts(temp, name, s), levels: LEVELS }, { seed: 3 })
  await model.save(folder)
  model.dispose()
  return folder
}

/** One sample for each text length, each with a picture; `Step.batch` in peer_model.py makes the same. */
export function makeBatch(model: AlignGPT, lengths: readonly number[]): PackedBatch {
  const total = lengths.reduce((n, l) => n + l, 0)
  const ids = integers(total, 21, 3, model.config.llm.vocab_size)
  const levels = integers(lengths.length, 22, 0, model.levels)
  const offsets = running(lengths)
  const samples = lengths.map((length, i): Sample => {
    const text = ids.subarray(offsets[i], offsets[i + 1])
    const rows = 2 + model.patches + length
    return {
      id: `sample ${i}`,
      text: '',
      ids: Int32Array.from([1, IMAGE_TOKEN, ...text]),
      labels: Int32Array.from([IGNORE, IGNORE, ...text]),
      gateIds: text,
      gateAnswer: new Uint8Array(length),
      image: 'picture',
      level: levels[i],
      length: rows,
      fullLength: rows,
      skip: null,
    }
  })
  const batch = packBatch(samples, model.patches, { size: model.imageSize })
  batch.pixels.set(floats(batch.pixels.length, 20))
  return batch
}

/**
 * Our training step, as train.ts does it for one micro-batch: loss and gradients, then the update. Nothing is clipped, as
 * on the other side; the norm that guards against a NaN is computed all the same.
 */
export class TrainStep {
  readonly losses: number[] = []
  readonly batch: PackedBatch
  readonly #optimizer: AdamW

  /** @param recompute layers run again on the way back instead of keeping their activations */
  constructor(
    readonly model: AlignGPT,
    private readonly phase: 1 | 2,
    lengths: readonly number[],
    private readonly recompute = false,
  ) {
    this.batch = makeBatch(model, lengths)
    // the peer's bf16 variant keeps everything in bf16
    this.#optimizer = new AdamW(trainable(model, phase === 1 ? PRETRAIN : FINETUNE), { state: 'compact' })
  }
  static async load(folder: string, phase: 1 | 2, dtype: Dtype, lengths: readonly number[]): Promise<TrainStep> {
    return new TrainStep(await AlignGPT.load(folder, { dtype }), phase, lengths)
  }
  run(): void {
    const { mix } = this.phase === 1 ? PRETRAIN : FINETUNE
    const step = () => this.model.lossAndGradients(this.batch, mix, { recompute: this.recompute })
    this.losses.push(scope(() => step().loss.item()))
    this.#optimizer.update(RATE, null)
  }
  dispose(): void {
    this.#optimizer.dispose()
    this.model.dispose()
  }
}

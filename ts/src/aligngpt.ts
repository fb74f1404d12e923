/** The model: CLIP vision tower + projector + alignment vector + LLaMA (arXiv 2405.14129). */
import fs from 'node:fs'
import path from 'node:path'
import { AlignIndicators, GatedWeightLayer, Projector } from './align.js'
import type { PackedBatch } from './batch.js'
import { CLIPModel, CLIPVisionTransformer } from './clip.js'
import {
  type AlignGPTConfig,
  alignGPTConfigJson,
  type ClipConfig,
  type PreprocessorConfig,
  parseAlignGPTConfig,
  patchCount,
  readAlignGPTConfig,
  readClipConfig,
  readLlamaConfig,
  readPreprocessor,
  writeAlignGPTConfig,
} from './config.js'
import { AlignGPTError } from './errors.js'
import {
  type Generated,
  type GeneratedPiece,
  type GenerateOptions,
  type GenerateRequest,
  generate,
} from './generate.js'
import { LlamaModel, type Packing, RopeTable } from './llama.js'
import { type Device, native, resolveDevice } from './native.js'
import { initialize, Linear, Module, Source } from './nn.js'
import { type AlignMixArgs, type AlignMixResult, alignMix, cast, lmHeadLoss } from './ops.js'
import { openCheckpoint, type TensorEntry, type TensorToWrite, writeSafetensors } from './safetensors.js'
import { backward, type Dtype, noGrad, scope, Tensor, tensor } from './tensor.js'
import { Tokenizer } from './tokenizer.js'

/** How the alignment vector of a batch's pictures is made. */
export type Mix =
  /** one vector per level (pre-training): the batch's levels, or one level for all */
  | { mode: 'level'; level?: number }
  /** gate over the local vectors plus the global one (instruction tuning, inference); global: false is "local only" */
  | { mode: 'gate'; global?: boolean }
  /** given weights of all N rows, for every picture */
  | { mode: 'fixed'; coefficients: readonly number[] }

export interface LoadOptions {
  /** default auto: ALIGNGPT_DEVICE where it is set, else the GPU where there is one, else the CPU */
  device?: 'auto' | Device
  /** of the weights and activations; default f32 */
  dtype?: Dtype
  /** of new parts */
  seed?: number
}
export interface CreateOptions {
  /** folder of a LLaMA in Hugging Face layout */
  llm: string
  /** folder of a CLIP in Hugging Face layout */
  clip: string
  /** number of alignment levels N, the paper's 8 by default */
  levels?: number
  projector?: string
  /** index of the vision tower's hidden state, LLaVA's -2 by default */
  selectLayer?: number
  /** which rows of it: patch (LLaVA's, default) or cls_patch, the class row too */
  selectFeature?: 'patch' | 'cls_patch'
  /** file with the projector and the alignment table of an earlier pre-training (mm_projector_align.bin or .safetensors) */
  pretrained?: string
}

/** Of a model's weights and activations. */
export interface Placement {
  dtype: Dtype
  device?: Device
}

const torchNames: Record<string, string> = { f32: 'float32', bf16: 'bfloat16', f64: 'float64' }
const fileDtype = { F32: 'f32', F16: 'f16', BF16: 'bf16', F64: 'f64' } as const

function readTensor(e: TensorEntry, shape: number[], { dtype, device }: Placement): Tensor {
  if (e.shape.length !== shape.length || e.shape.some((d, i) => d !== shape[i]))
    throw new AlignGPTError(
      'ERR_SHAPE',
      `[checkpoint] ${e.path}: '${e.name}': expected shape [${shape}], got [${e.shape}]`,
    )
  if (!(e.dtype in fileDtype))
    throw new AlignGPTError(
      'ERR_DTYPE',
      `[checkpoint] ${e.path}: '${e.name}': expected F32, F16, BF16 or F64, got ${e.dtype}`,
    )
  const t = new Tensor(native.empty(shape, dtype, device)).persist()
  try {
    native.readFile(t.h, e.path, e.offset, fileDtype[e.dtype as keyof typeof fileDtype])
  } catch (error) {
    t.dispose()
    throw error
  }
  return t
}

/** Parameters from a checkpoint; `rename` maps a module's name to the file's. */
export function checkpointSource(where: string, place: Placement, rename = (name: string): string => name): Source {
  const entries = openCheckpoint(where)
  return new Source(
    (name, shape) => {
      const e = entries.get(rename(name))
      if (!e)
        throw new AlignGPTError(
          'ERR_WEIGHTS',
          `[checkpoint] ${where}: '${rename(name)}': expected a tensor [${shape}], got none`,
        )
      return readTensor(e, shape, place)
    },
    (name) => entries.has(rename(name)),
  )
}
/** Fresh parameters. */
export function initSource(seed: number, { dtype, device }: Placement): Source {
  return new Source((name, shape, init) => initialize(name, shape, init, seed, dtype, device))
}

/** What a pre-training left (names with or without `model.`), fresh parameters for the rest: the gate. */
function pretrainedSource(file: string, seed: number, place: Placement): Source {
  const entries = openCheckpoint(file)
  const found = (name: string) => entries.get(name) ?? entries.get(`model.${name}`)
  if (!found('align_indicators.indicator_embs') && ![...entries.keys()].some((n) => n.includes('mm_projector.')))
    throw new AlignGPTError(
      'ERR_WEIGHTS',
      `[checkpoint] ${file}: expected mm_projector.* and align_indicators.*, got neither`,
    )
  return new Source((name, shape, init) => {
    const e = found(name)
    return e ? readTensor(e, shape, place) : initialize(name, shape, init, seed, place.dtype, place.device)
  })
}

const VISION = 'vision_tower.vision_tower.vision_model.'

class VisionTowerShell extends Module {
  constructor(readonly vision_model: CLIPVisionTransformer) {
    super()
  }
}
class VisionTower extends Module {
  constructor(readonly vision_tower: VisionTowerShell) {
    super()
  }
}

/** Where each part of the model comes from. */
interface Sources {
  llm: Source
  vision: Source
  projector: Source
  /** alignment table and gate */
  align: Source
}

interface Parts {
  config: AlignGPTConfig
  clip: ClipConfig
  preprocessor: PreprocessorConfig
  tokenizer: Tokenizer
  /** folders that settings and tokenizer files are copied from */
  llmDir: string
  clipDir: string
  levels: number
}

function checkOptions(o: LoadOptions): Required<Placement> & { seed: number } {
  const dtype = o.dtype ?? 'f32'
  if (dtype !== 'f32' && dtype !== 'bf16' && dtype !== 'f64')
    throw new AlignGPTError('ERR_DTYPE', `[AlignGPT] dtype: expected f32, bf16 or f64, got ${dtype}`)
  return { dtype, device: resolveDevice(o.device, dtype), seed: o.seed ?? 0 }
}

/** Everything a forward pass produces on its way; the goldens look at all of it. */
export interface Embedded extends AlignMixResult {
  /** [M*P, D] what the projector is fed */
  visionFeatures: Tensor
}

export class AlignGPT extends Module {
  readonly model: LlamaModel
  readonly lm_head?: Linear
  readonly vision_tower: VisionTower
  readonly mm_projector: Module | null
  readonly align_indicators: AlignIndicators
  readonly gated_weight_layer: GatedWeightLayer
  readonly #projector: Projector
  readonly #parts: Parts
  readonly #rope: RopeTable
  readonly dtype: Dtype
  /** where the weights are and the work is done */
  readonly device: Device

  private constructor(from: Sources, parts: Parts, { dtype, device }: Required<Placement>) {
    const { llm, vision, projector, align } = from
    super()
    const { config, clip, levels } = parts
    this.dtype = dtype
    this.device = device
    this.#parts = parts
    this.#rope = new RopeTable(config.llm, dtype, device)
    this.model = new LlamaModel(llm.at('model'), config.llm)
    if (!config.llm.tie_word_embeddings || llm.holds('lm_head.weight'))
      this.lm_head = new Linear(llm.at('lm_head'), config.llm.hidden_size, config.llm.vocab_size, {
        bias: false,
        init: { kind: 'normal', std: config.llm.initializer_range },
      })
    this.vision_tower = new VisionTower(
      new VisionTowerShell(new CLIPVisionTransformer(vision.at('vision_tower.vision_tower.vision_model'), clip.vision)),
    )
    this.#projector = new Projector(
      projector.at('mm_projector'),
      config.mm_projector_type,
      clip.vision.hidden_size,
      config.llm.hidden_size,
    )
    this.mm_projector = this.#projector.module
    this.align_indicators = new AlignIndicators(align.at('align_indicators'), levels, config.llm.hidden_size)
    this.gated_weight_layer = new GatedWeightLayer(align.at('gated_weight_layer'), this.patches, levels)
  }

  /** A new AlignGPT from a LLaMA and a CLIP; projector, alignment vectors and gate are initialised from the seed. */
  static async create(o: CreateOptions, load: LoadOptions = {}): Promise<AlignGPT> {
    const { seed, ...place } = checkOptions(load)
    const clip = readClipConfig(o.clip)
    const levels = o.levels ?? 8
    if (!Number.isInteger(levels) || levels < 2)
      throw new AlignGPTError('ERR_ARGUMENT', `[AlignGPT] levels: expected an integer >= 2, got ${levels}`)
    const raw = alignGPTConfigJson(readLlamaConfig(o.llm).raw, {
      mm_hidden_size: clip.vision.hidden_size,
      mm_projector_type: o.projector ?? 'mlp2x_gelu',
      mm_vision_select_layer: o.selectLayer ?? -2,
      mm_vision_select_feature: o.selectFeature ?? 'patch',
      mm_vision_tower: path.resolve(o.clip),
      n_indicators: levels,
    })
    const parts: Parts = {
      config: parseAlignGPTConfig(raw, path.join(o.llm, 'config.json')),
      clip,
      preprocessor: readPreprocessor(o.clip, clip.vision.image_size),
      tokenizer: Tokenizer.load(o.llm),
      llmDir: o.llm,
      clipDir: o.clip,
      levels,
    }
    const toClip = (name: string): string => name.replace(VISION, 'vision_model.')
    const fresh = o.pretrained ? pretrainedSource(o.pretrained, seed, place) : initSource(seed, place)
    const vision = checkpointSource(o.clip, place, toClip)
    return new AlignGPT({ llm: checkpointSource(o.llm, place), vision, projector: fresh, align: fresh }, parts, place)
  }

  /**
   * Loads an AlignGPT folder in the official layout (as `save` writes it too).
   * @param o.clip folder of the vision tower's settings where the config's path does not lead there
   */
  static async load(dir: string, o: LoadOptions & { clip?: string } = {}): Promise<AlignGPT> {
    const { seed, ...place } = checkOptions(o)
    const config = readAlignGPTConfig(dir)
    const candidates = [o.clip, config.visionTowerPath, path.join(dir, 'vision_tower')]
    const clipDir = candidates.find((d): d is string => !!d && fs.existsSync(path.join(d, 'config.json')))
    if (!clipDir)
      throw new AlignGPTError(
        'ERR_CONFIG',
        `[config] ${dir}: mm_vision_tower: expected a folder with config.json, got ${config.mm_vision_tower}; give it as { clip }`,
      )
    const clip = readClipConfig(clipDir)
    const entries = openCheckpoint(dir)
    const table = entries.get('align_indicators.indicator_embs')
    const levels = table?.shape[0] ?? config.n_indicators ?? 8
    const source = checkpointSource(dir, place)
    const parts: Parts = {
      config,
      clip,
      preprocessor: readPreprocessor(clipDir, clip.vision.image_size),
      tokenizer: Tokenizer.load(dir),
      llmDir: dir,
      clipDir,
      levels,
    }
    const ownVision = [...entries.keys()].some((name) => name.startsWith(VISION))
    const toClip = (name: string): string => name.replace(VISION, 'vision_model.')
    const vision = ownVision ? source : checkpointSource(clipDir, place, toClip)
    // a LLaVA has a projector but no table: alignment starts fresh there
    const align = table ? source : initSource(seed, place)
    return new AlignGPT({ llm: source, vision, projector: source, align }, parts, place)
  }

  get config(): AlignGPTConfig {
    return this.#parts.config
  }
  get tokenizer(): Tokenizer {
    return this.#parts.tokenizer
  }
  get preprocessor(): PreprocessorConfig {
    return this.#parts.preprocessor
  }
  /** Number of alignment levels N. */
  get levels(): number {
    return this.#parts.levels
  }
  /** Image rows P of a picture. */
  get patches(): number {
    const n = patchCount(this.#parts.clip.vision)
    return this.#parts.config.mm_vision_select_feature === 'cls_patch' ? n + 1 : n
  }
  get imageSize(): number {
    return this.#parts.clip.vision.image_size
  }
  /** Projection from hidden states to the vocabulary [V, H]; the token embeddings when they are tied. */
  get headWeight(): Tensor {
    return this.lm_head?.weight ?? this.model.embed_tokens.weight
  }

  /** The whole CLIP this model's vision tower came from, for scoring pairs. The caller disposes it. */
  loadClip(): CLIPModel {
    return loadClip(this.#parts.clipDir, { dtype: this.dtype, device: this.device })
  }
  get clipDir(): string {
    return this.#parts.clipDir
  }

  // ---- forward --------------------------------------------------------------------------------------------
  /** Pictures and text -> the packed input of the language model [T, H]. */
  embed(b: PackedBatch, mix: Mix): Embedded {
    const { config } = this.#parts
    const images = b.imageRows.length
    const seen = (): Tensor => {
      const pixels = tensor(b.pixels, [images, 3, b.imageSize, b.imageSize], 'f32', this.device)
      const vision = this.vision_tower.vision_tower.vision_model
      const input = this.dtype === 'f32' ? pixels : cast(pixels, this.dtype)
      const withClass = config.mm_vision_select_feature === 'cls_patch'
      return vision.features(input, config.mm_vision_select_layer, withClass)
    }
    const visionFeatures = scope(() => noGrad(seen))
    const result = alignMix({
      ...this.#projector.beforeLast(visionFeatures),
      embed: this.model.embed_tokens.weight,
      table: this.align_indicators.indicator_embs,
      tokens: tensor(b.tokens),
      imageRows: tensor(b.imageRows),
      alignRows: tensor(b.alignRows),
      patches: this.patches,
      mix: this.#mixArgs(b, mix),
    })
    return { ...result, visionFeatures }
  }

  #mixArgs(b: PackedBatch, mix: Mix): AlignMixArgs['mix'] {
    const images = b.imageRows.length
    if (mix.mode === 'level') {
      const levels = mix.level === undefined ? b.levels : Int32Array.from({ length: images }, () => mix.level as number)
      const missing = levels.findIndex((l) => l < 0)
      if (missing >= 0)
        throw new AlignGPTError(
          'ERR_DATA',
          `[AlignGPT] record '${b.ids[b.imageSamples[missing]]}': expected a level in 'similarity', got none; run levels first`,
        )
      return { mode: 'level', levels: tensor(levels) }
    }
    if (mix.mode === 'fixed') {
      if (mix.coefficients.length !== this.levels)
        throw new AlignGPTError(
          'ERR_ARGUMENT',
          `[AlignGPT] coefficients: expected ${this.levels}, got ${mix.coefficients.length}`,
        )
      const rows = Array.from({ length: images }, () => mix.coefficients).flat()
      const acc = this.dtype === 'f64' ? 'f64' : 'f32'
      return { mode: 'fixed', coefficients: tensor(Float64Array.from(rows), [images, this.levels], acc, this.device) }
    }
    return {
      mode: 'gate',
      ids: tensor(b.gateIds),
      offsets: tensor(b.gateOffsets),
      gate: this.gated_weight_layer.tensors,
      global: mix.global ?? true,
    }
  }

  /** Rotary tables that cover positions 0..length-1. */
  rotary(length: number): { cos: Tensor; sin: Tensor } {
    return this.#rope.get(length)
  }
  /** Offsets, positions and rotary tables of a packed batch. */
  packing(b: { offsets: Int32Array; positions: Int32Array }): Packing {
    const longest = b.positions.reduce((n, p) => Math.max(n, p + 1), 1)
    return { offsets: tensor(b.offsets), positions: tensor(b.positions), ...this.rotary(longest) }
  }

  /** inputs_embeds [T, H] -> last hidden state after the final norm [T, H]. */
  hidden(embeds: Tensor, p: Packing): Tensor {
    // What a layer made besides its result lives on only where backward needs it, and until it has used it.
    const last = this.model.layers.reduce((h, layer, i) => {
      const next = scope(() => layer.forward(h, p, i))
      if (i > 0) h.dispose()
      return next
    }, embeds)
    return this.model.norm.forward(last)
  }

  /** Next-token loss of a batch: the sum over its labelled rows divided by `denominator` (default: their number). */
  loss(
    b: PackedBatch,
    mix: Mix,
    denominator?: number,
  ): { loss: Tensor; nll: Tensor; hidden: Tensor; embedded: Embedded } {
    const embedded = this.embed(b, mix)
    const hidden = this.hidden(embedded.inputsEmbeds, this.packing(b))
    return { ...this.#head(hidden, b, denominator), hidden, embedded }
  }

  #head(hidden: Tensor, b: PackedBatch, denominator?: number): { loss: Tensor; nll: Tensor } {
    const count = denominator ?? Math.max(b.lossRows.length, 1)
    return lmHeadLoss(hidden, this.headWeight, tensor(b.lossRows), tensor(b.lossTargets), count)
  }

  /**
   * Loss and its gradients, collected in the parameters that require one.
   * @param o.recompute layers are run again on the way back instead of keeping their activations
   * @returns the loss, and the gate's mean weights over the batch's pictures (N rows of the table)
   */
  lossAndGradients(
    b: PackedBatch,
    mix: Mix,
    o: { denominator?: number; recompute?: boolean } = {},
  ): { loss: number; coefficients: number[] } {
    return scope(() => {
      if (!o.recompute) {
        const { loss, embedded } = this.loss(b, mix, o.denominator)
        backward(loss)
        return { loss: loss.item(), coefficients: this.#meanCoefficients(embedded) }
      }
      const embedded = this.embed(b, mix)
      const p = this.packing(b)
      const inputs = [embedded.inputsEmbeds.detach()]
      noGrad(() => {
        for (const [i, layer] of this.model.layers.entries()) inputs.push(scope(() => layer.forward(inputs[i], p, i)))
      })
      const top = (inputs.pop() as Tensor).detach().requiresGrad()
      const { loss } = this.#head(this.model.norm.forward(top), b, o.denominator)
      backward(loss)
      let gradient = top.grad() as Tensor
      for (let i = this.model.layers.length - 1; i >= 0; i--) {
        const above = gradient
        gradient = scope(() => {
          const x = inputs[i].detach().requiresGrad()
          const y = scope(() => this.model.layers[i].forward(x, p, i)) // the rest lives where the tape saved it
          backward(y, above)
          return x.grad() as Tensor
        })
        above.dispose()
        inputs[i].dispose()
      }
      backward(embedded.inputsEmbeds, gradient)
      return { loss: loss.item(), coefficients: this.#meanCoefficients(embedded) }
    })
  }

  #meanCoefficients(e: Embedded): number[] {
    const c = e.coefficients.toFloats()
    const images = c.length / this.levels
    return Array.from({ length: this.levels }, (_, l) => {
      let s = 0
      for (let m = 0; m < images; m++) s += c[m * this.levels + l]
      return images ? s / images : 0
    })
  }

  // ---- inference ------------------------------------------------------------------------------------------
  /**
   * Streams the answer to a question about a picture; `alpha` of a piece are the weights of the alignment levels.
   * @throws ERR_IMAGE, ERR_DATA
   */
  generate(o: GenerateRequest & GenerateOptions): AsyncGenerator<GeneratedPiece, Generated> {
    return generate(this, o)
  }

  // ---- saving ---------------------------------------------------------------------------------------------
  /** Writes the model in the official AlignGPT layout: config, tokenizer, weights, the vision tower's settings. */
  async save(dir: string): Promise<void> {
    fs.mkdirSync(path.join(dir, 'vision_tower'), { recursive: true })
    const written: TensorToWrite[] = []
    for (const [name, t] of this.namedParameters()) {
      const dtype = t.dtype === 'bf16' ? 'BF16' : t.dtype === 'f64' ? 'F64' : 'F32'
      written.push({ name, dtype, shape: t.shape, write: (file, offset) => native.writeFile(t.h, file, offset) })
    }
    writeSafetensors(path.join(dir, 'model.safetensors'), written)
    const { config } = this.#parts
    writeAlignGPTConfig(
      dir,
      config.llm.raw,
      {
        mm_hidden_size: config.mm_hidden_size,
        mm_projector_type: config.mm_projector_type,
        mm_vision_select_layer: config.mm_vision_select_layer,
        mm_vision_select_feature: config.mm_vision_select_feature,
        mm_vision_tower: 'vision_tower',
        n_indicators: this.levels,
      },
      torchNames[this.dtype],
    )
    copyFiles(this.#parts.llmDir, dir, [
      'tokenizer.json',
      'tokenizer.model',
      'tokenizer_config.json',
      'special_tokens_map.json',
      'generation_config.json',
    ])
    copyFiles(this.#parts.clipDir, path.join(dir, 'vision_tower'), ['config.json', 'preprocessor_config.json'])
  }

  /** Frees all weights. The object cannot be used afterwards. */
  override dispose(): void {
    super.dispose()
    this.#rope.dispose()
  }
}

function copyFiles(from: string, to: string, names: string[]): void {
  if (path.resolve(from) === path.resolve(to)) return
  for (const name of names) {
    const file = path.join(from, name)
    if (fs.existsSync(file)) fs.copyFileSync(file, path.join(to, name))
  }
}

/** Loads both towers of a CLIP folder. */
export function loadClip(dir: string, o: LoadOptions = {}): CLIPModel {
  const place = checkOptions(o)
  return new CLIPModel(checkpointSource(dir, place), readClipConfig(dir), place.dtype)
}

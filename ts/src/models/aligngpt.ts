/** The model: CLIP vision tower + projector + alignment vector + LLaMA (arXiv 2405.14129). */
import fs from 'node:fs'
import path from 'node:path'
import { type Device, resolveDevice } from '../core/native.js'
import { type AlignMixResult, alignMix, cast, lmHeadLoss } from '../core/ops.js'
import { backward, type Dtype, noGrad, scope, type Tensor, tensor, zeros } from '../core/tensor.js'
import { openCheckpoint, writeSafetensors } from '../formats/safetensors.js'
import {
  type Generated,
  type GeneratedPiece,
  type GenerateOptions,
  type GenerateRequest,
  generate,
} from '../inference/generate.js'
import { mergedWeights } from '../nn/lora.js'
import { type Init, Linear, Module, Source } from '../nn/module.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError } from '../util/errors.js'
import {
  AlignIndicators,
  type BatchTensors,
  GatedWeightLayer,
  type Mix,
  mixArgs,
  mixOf,
  Projector,
  splice,
  tensorsOf,
} from './align.js'
import { CLIPModel, CLIPVisionTransformer } from './clip.js'
import {
  type AlignGPTConfig,
  type AlignGPTFields,
  type Alignment,
  alignGPTConfigJson,
  type ClipConfig,
  type ClipVisionConfig,
  type Gate,
  type GateText,
  type PreprocessorConfig,
  parseAlignGPTConfig,
  patchCount,
  readAlignGPTConfig,
  readClipConfig,
  readLlamaConfig,
  readPreprocessor,
  visionTowerFolder,
  writeAlignGPTConfig,
} from './config.js'
import { LlamaModel, type Packing, RopeTable } from './llama.js'
import { VISION } from './names.js'
import type { PackedBatch } from './packed-batch.js'
import { checkpointSource, initSource, type Placement, pretrainedSource } from './parameter-sources.js'

export type { Mix } from './align.js'

export interface LoadOptions {
  /** default auto: ALIGNGPT_DEVICE where it is set, else the GPU where there is one, else the CPU */
  device?: 'auto' | Device
  /** of the weights and activations; default f32 */
  dtype?: Dtype
  /** of new parts */
  seed?: number
}
/** Which variant of the alignment vector; what a checkpoint's config says, else the official code's (adaptive, mlp, all). */
export interface AlignmentOptions {
  alignment?: Alignment
  /** linear: the paper's single matrix in place of the official code's two layers */
  gate?: Gate
  /** instruction: the gate does not see answers in training, as it will not at inference */
  gateText?: GateText
}
export interface CreateOptions extends AlignmentOptions {
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

const torchNames: Record<string, string> = { f32: 'float32', bf16: 'bfloat16', f64: 'float64' }

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
  table: Source
  gate: Source
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

/** Fields of config.json for what was asked for. */
function alignmentFields({ alignment, gate, gateText }: AlignmentOptions): Partial<AlignGPTFields> {
  return {
    ...(alignment !== undefined && { mm_alignment: alignment }),
    ...(gate !== undefined && { mm_gate_type: gate }),
    ...(gateText !== undefined && { mm_gate_text: gateText }),
  }
}

/** Everything a forward pass produces on its way; the goldens look at all of it. */
export interface Embedded extends AlignMixResult {
  /** [M*P, D] what the projector is fed */
  visionFeatures: Tensor
}

export interface LossOptions {
  /** the sum over the labelled rows is divided by it; default: their number */
  denominator?: number
  /** and multiplied by this number on the model's device, which may change from one launch of a graph to the next */
  scale?: Tensor
  /** the tensors of the batch's lists, where they are there already */
  tensors?: BatchTensors
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
    const { llm, vision, projector, table, gate } = from
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
    this.align_indicators = new AlignIndicators(table.at('align_indicators'), levels, config.llm.hidden_size)
    const { mm_gate_type } = config
    this.gated_weight_layer = new GatedWeightLayer(gate.at('gated_weight_layer'), mm_gate_type, this.patches, levels)
  }

  /**
   * What parameters a model of these settings has, without making any.
   * @param holds whether there are weights of a name; a tied LM head is a parameter only where there are
   */
  static parameters(
    settings: Pick<Parts, 'config' | 'clip' | 'levels'>,
    holds: (name: string) => boolean,
  ): Map<string, { shape: number[]; init: Init }> {
    const found = new Map<string, { shape: number[]; init: Init }>()
    const s = new Source((name, shape, init) => {
      found.set(name, { shape, init })
      return zeros([0]).persist()
    }, holds)
    const from = { llm: s, vision: s, projector: s, table: s, gate: s }
    new AlignGPT(from, settings as Parts, { dtype: 'f32', device: 'cpu' }).dispose()
    return found
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
      ...alignmentFields(o),
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
    const llm = checkpointSource(o.llm, place)
    return new AlignGPT({ llm, vision, projector: fresh, table: fresh, gate: fresh }, parts, place)
  }

  /**
   * Loads an AlignGPT folder in the official layout (as `save` writes it too). Another `alignment` or `gate` than the folder's
   * takes the model up in that variant: a gate of another form and a random table are drawn from the seed.
   * @param o.clip folder of the vision tower's settings where the config's path does not lead there
   */
  static async load(dir: string, o: LoadOptions & AlignmentOptions & { clip?: string } = {}): Promise<AlignGPT> {
    const { seed, ...place } = checkOptions(o)
    const stored = readAlignGPTConfig(dir)
    const config = parseAlignGPTConfig({ ...stored.llm.raw, ...alignmentFields(o) }, path.join(dir, 'config.json'))
    const clipDir = visionTowerFolder(dir, config, o.clip)
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
    // a LLaVA has a projector but no table: alignment starts fresh there, as does what an option asks for in another form
    const fresh = initSource(seed, place)
    const redrawn = config.mm_alignment === 'random' && stored.mm_alignment !== 'random'
    const from = {
      table: table && !redrawn ? source : fresh,
      gate: table && config.mm_gate_type === stored.mm_gate_type ? source : fresh,
    }
    return new AlignGPT({ llm: source, vision, projector: source, ...from }, parts, place)
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
  /** How this model makes its alignment vector in instruction tuning and at inference. */
  get mix(): Mix {
    return mixOf(this.#parts.config.mm_alignment, this.levels)
  }
  /** Image rows P of a picture. */
  get patches(): number {
    const n = patchCount(this.#parts.clip.vision)
    return this.#parts.config.mm_vision_select_feature === 'cls_patch' ? n + 1 : n
  }
  get visionConfig(): ClipVisionConfig {
    return this.#parts.clip.vision
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
  embed(b: PackedBatch, mix: Mix, at: BatchTensors = tensorsOf(b, this.device)): Embedded {
    const { config } = this.#parts
    const images = b.imageRows.length
    const seen = (): Tensor => {
      const pixels = at('pixels')
      const vision = this.vision_tower.vision_tower.vision_model
      const input = this.dtype === 'f32' ? pixels : cast(pixels, this.dtype)
      const withClass = config.mm_vision_select_feature === 'cls_patch'
      return vision.features(input, config.mm_vision_select_layer, withClass)
    }
    const visionFeatures = scope(() => noGrad(seen))
    const last = this.#projector.beforeLast(visionFeatures)
    const embed = this.model.embed_tokens.weight
    const { levels, dtype, device, gated_weight_layer: gate } = this
    if (images && (mix.mode === 'none') !== (b.alignRows.length === 0))
      throw new AlignGPTError(
        'ERR_ARGUMENT',
        `[AlignGPT] batch: expected ${mix.mode === 'none' ? 'no place' : 'a place'} for alignment vectors, got ${b.alignRows.length}`,
      )
    if (mix.mode === 'none') return { ...splice(b, last, embed, levels), visionFeatures }
    const result = alignMix({
      ...last,
      embed,
      table: this.align_indicators.indicator_embs,
      tokens: at('tokens'),
      imageRows: at('imageRows'),
      alignRows: at('alignRows'),
      patches: this.patches,
      mix: mixArgs(b, mix, at, { levels, dtype, device, gate }),
    })
    return { ...result, visionFeatures }
  }

  /** Rotary tables that cover positions 0..length-1. */
  rotary(length: number): { cos: Tensor; sin: Tensor } {
    return this.#rope.get(length)
  }
  /** Offsets, positions and rotary tables of a packed batch. */
  packing(b: { offsets: Int32Array; positions: Int32Array }, at?: BatchTensors): Packing {
    const longest = b.positions.reduce((n, p) => Math.max(n, p + 1), 1)
    const [offsets, positions] = [at?.('offsets') ?? tensor(b.offsets), at?.('positions') ?? tensor(b.positions)]
    return { offsets, positions, ...this.rotary(longest) }
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
    o: LossOptions = {},
  ): { loss: Tensor; nll: Tensor; hidden: Tensor; embedded: Embedded } {
    const embedded = this.embed(b, mix, o.tensors)
    const hidden = this.hidden(embedded.inputsEmbeds, this.packing(b, o.tensors))
    return { ...this.#head(hidden, b, o), hidden, embedded }
  }

  #head(hidden: Tensor, b: PackedBatch, o: LossOptions): { loss: Tensor; nll: Tensor } {
    const count = o.denominator ?? Math.max(b.lossRows.length, 1)
    const at = o.tensors ?? tensorsOf(b, this.device)
    return lmHeadLoss(hidden, this.headWeight, at('lossRows'), at('lossTargets'), count, undefined, o.scale)
  }

  /**
   * Loss and its gradients, collected in the parameters that require one. Nothing is read here, so a GPU need not be waited for.
   * @param o.recompute layers are run again on the way back instead of keeping their activations
   * @returns the loss [], and the weights of the alignment vectors [M, N] of the batch's pictures
   */
  lossAndGradients(
    b: PackedBatch,
    mix: Mix,
    o: LossOptions & { recompute?: boolean } = {},
  ): { loss: Tensor; coefficients: Tensor } {
    return scope(() => {
      if (!o.recompute) {
        const { loss, embedded } = this.loss(b, mix, o)
        backward(loss)
        return { loss, coefficients: embedded.coefficients }
      }
      const embedded = this.embed(b, mix, o.tensors)
      const p = this.packing(b, o.tensors)
      const inputs = [embedded.inputsEmbeds.detach()]
      noGrad(() => {
        for (const [i, layer] of this.model.layers.entries()) inputs.push(scope(() => layer.forward(inputs[i], p, i)))
      })
      const top = (inputs.pop() as Tensor).detach().requiresGrad()
      const { loss } = this.#head(this.model.norm.forward(top), b, o)
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
      return { loss, coefficients: embedded.coefficients }
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
  /**
   * Writes the model in the official AlignGPT layout: config, tokenizer, weights, the vision tower's settings. Adapters (LoRA)
   * are merged into the weights that are written; the model itself stays as it is.
   */
  async save(dir: string): Promise<void> {
    fs.mkdirSync(path.join(dir, 'vision_tower'), { recursive: true })
    writeSafetensors(path.join(dir, 'model.safetensors'), mergedWeights(this))
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
        mm_alignment: config.mm_alignment,
        mm_gate_type: config.mm_gate_type,
        mm_gate_text: config.mm_gate_text,
      },
      torchNames[this.dtype],
    )
    copyFiles(this.#parts.llmDir, dir, LLM_FILES)
    copyFiles(this.#parts.clipDir, path.join(dir, 'vision_tower'), ['config.json', 'preprocessor_config.json'])
  }

  /** Frees all weights. The object cannot be used afterwards. */
  override dispose(): void {
    super.dispose()
    this.#rope.dispose()
  }
}

/** What lies beside a language model's weights and config.json. */
export const LLM_FILES = [
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
]

/** Copies those of the files that are there. */
export function copyFiles(from: string, to: string, names: readonly string[]): void {
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

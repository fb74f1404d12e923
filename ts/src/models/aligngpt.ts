/**
 * The network: vision tower + projector + alignment vector + language model (arXiv 2405.14129). Who wants one from files takes
 * load.ts; who writes one, save.ts.
 */
import { type AlignMixResult, alignMix, cast, lmHeadLoss } from '../core/ops.js'
import { backward, type Device, type Dtype, noGrad, scope, type Tensor, tensor, zeros } from '../core/tensor.js'
import type { Linear } from '../nn/layers.js'
import { isAdapter, matrices } from '../nn/lora.js'
import { type Init, Module, ParameterSource } from '../nn/module.js'
import { CHAT_STYLES, type ChatStyle } from '../processing/conversation/styles.js'
import type { Preprocess } from '../processing/image/preprocess.js'
import type { PreprocessorConfig } from '../processing/preprocessor-config.js'
import type { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import {
  AlignIndicators,
  type BatchTensors,
  GatedWeightLayer,
  type Mix,
  mixArgs,
  mixOf,
  splice,
  tensorsOf,
} from './align.js'
import type { AlignGPTConfig } from './config/aligngpt.js'
import type { GenerationConfig } from './config/generation.js'
import { hiddenStates, type LanguageModel, type Packing } from './language-model.js'
import type { PackedBatch } from './packed-batch.js'
import type { Placement } from './parameter-sources.js'
import { Projector } from './projector.js'
import { backwardByLayer } from './recompute.js'
import { familyInAlignGPT, visionFamily } from './registry.js'
import type { ModelSettings } from './settings.js'
import type { FeatureSelection, VisionTower } from './vision-tower.js'

/** Where each part of the model comes from. */
export interface Sources {
  language: ParameterSource
  vision: ParameterSource
  projector: ParameterSource
  table: ParameterSource
  gate: ParameterSource
}

/** What a model is made of besides its weights. */
export interface Parts extends ModelSettings {
  preprocessor: PreprocessorConfig
  tokenizer: Tokenizer
  /** the style of instruction tuning and of answers */
  conversation: ChatStyle
  /** defaults of generation (generation_config.json), null where the folder has none */
  generation: GenerationConfig | null
  /** folders that settings and tokenizer files are copied from */
  llmDir: string
  clipDir: string
}

/** Parts of a model by what they are for; adapters are those of the language model, which are not part of it. */
export type Part = 'language' | 'adapters' | 'vision' | 'projector' | 'table' | 'gate'
/** A parameter that need not be there. */
export interface ParameterShape {
  shape: number[]
  init: Init
  part: Part
  /** of a matrix that may get an adapter: the layer it is in */
  layer: number | null
}
export type NamedParameter = [name: string, tensor: Tensor]

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

/** The part a parameter belongs to, by its name in a checkpoint. */
export function partOf(name: string): Part {
  if (isAdapter(name)) return 'adapters'
  return PARTS[name.slice(0, name.indexOf('.'))]
}
const PARTS: Record<string, Part> = {
  model: 'language',
  lm_head: 'language',
  vision_tower: 'vision',
  mm_projector: 'projector',
  align_indicators: 'table',
  gated_weight_layer: 'gate',
}

const selection = (c: AlignGPTConfig): FeatureSelection => ({
  layer: c.mm_vision_select_layer,
  feature: c.mm_vision_select_feature,
})

export class AlignGPTNetwork extends Module {
  // The parameters, under the names of the official checkpoints.
  readonly model: Module
  readonly lm_head?: Linear
  readonly vision_tower: Module
  readonly mm_projector: Module | null
  readonly align_indicators: AlignIndicators
  readonly gated_weight_layer: GatedWeightLayer
  readonly #language: LanguageModel
  readonly #vision: VisionTower
  readonly #projector: Projector
  #parts: Parts
  readonly dtype: Dtype
  /** where the weights are and the work is done */
  readonly device: Device

  constructor(from: Sources, parts: Parts, place: Required<Placement>) {
    super()
    const { config, clip, levels } = parts
    const { hidden_size } = config.llm
    this.#parts = parts
    this.dtype = place.dtype
    this.device = place.device
    this.#language = familyInAlignGPT(config.llm.raw, 'config.json').build(from.language, config.llm, place)
    this.model = this.#language.model
    if (this.#language.lm_head) this.lm_head = this.#language.lm_head
    const family = visionFamily(clip.raw, 'config.json')
    this.#vision = family.build(from.vision.at('vision_tower'), clip, selection(config))
    this.vision_tower = this.#vision
    const features = family.tower(clip).hidden_size
    this.#projector = new Projector(from.projector.at('mm_projector'), config.mm_projector_type, features, hidden_size)
    this.mm_projector = this.#projector.module
    this.align_indicators = new AlignIndicators(from.table.at('align_indicators'), levels, hidden_size)
    const gate = from.gate.at('gated_weight_layer')
    this.gated_weight_layer = new GatedWeightLayer(gate, config.mm_gate_type, this.patches, levels)
  }

  /**
   * What parameters a model of these settings has, without making any.
   * @param holds whether there are weights of a name; a tied LM head is a parameter only where there are
   */
  static parameters(settings: ModelSettings, holds: (name: string) => boolean): Map<string, ParameterShape> {
    const made: [string, number[], Init][] = []
    const s = new ParameterSource((name, shape, init) => {
      made.push([name, shape, init])
      return zeros([0]).persist()
    }, holds)
    const from = { language: s, vision: s, projector: s, table: s, gate: s }
    const network = new AlignGPTNetwork(from, settings as Parts, { dtype: 'f32', device: 'cpu' })
    const adaptable = new Set(matrices(network.model, 'model').map(([name]) => `${name}.weight`))
    network.dispose()
    return new Map(
      made.map(([name, shape, init]) => {
        const layer = adaptable.has(name) ? Number(/\.(\d+)\./.exec(name)?.[1]) : null
        return [name, { shape, init, part: partOf(name), layer }]
      }),
    )
  }

  get language(): LanguageModel {
    return this.#language
  }
  get vision(): VisionTower {
    return this.#vision
  }
  get parts(): Readonly<Parts> {
    return this.#parts
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
  /** [name, tensor] of every parameter of some parts, in the order of `namedParameters`. */
  partParameters(...parts: readonly Part[]): NamedParameter[] {
    return [...this.namedParameters()].filter(([name]) => parts.includes(partOf(name)))
  }
  /** Number of alignment levels N. */
  get levels(): number {
    return this.#parts.levels
  }
  /** The style of instruction tuning and of answers (config.json's `conversation`). */
  get conversation(): ChatStyle {
    return this.#parts.conversation
  }
  /** A model that is tuned in another style answers in it from then on, and is saved so. */
  set conversation(style: ChatStyle) {
    if (!CHAT_STYLES.includes(style))
      throw mismatch('ERR_ARGUMENT', 'AlignGPT', 'conversation', CHAT_STYLES.join(' or '), show(style))
    this.#parts = { ...this.#parts, conversation: style }
  }
  /**
   * Rows that a prompt and its answer may have together: what the tokenizer's settings (`tokenizer_model_max_length`, the longest
   * sequence in training) and the language model (`max_position_embeddings`) allow, the smaller of both.
   */
  get context(): number {
    return Math.min(this.config.tokenizer_model_max_length, this.config.llm.max_position_embeddings)
  }
  /** How this model makes its alignment vector in instruction tuning and at inference. */
  get mix(): Mix {
    return mixOf(this.config.mm_alignment, this.levels)
  }
  /** Image rows P of an image. */
  get patches(): number {
    return this.#vision.rows
  }
  get imageSize(): number {
    return this.#vision.imageSize
  }
  /** Projection from hidden states to the vocabulary [V, H]; the token embeddings when they are tied. */
  get headWeight(): Tensor {
    return this.language.headWeight
  }

  /**
   * How images become the tower's input.
   * @param pad to a square first, where the model's config wants it: in instruction tuning and at inference, not in pre-training
   */
  preprocess(pad = true): Preprocess {
    const { image_aspect_ratio, image_exif_orientation: exifOrientation } = this.config
    return { ...this.preprocessor, pad: pad && image_aspect_ratio === 'pad', exifOrientation }
  }

  /** Pictures and text -> the packed input of the language model [T, H]. */
  embed(b: PackedBatch, mix: Mix, at: BatchTensors = tensorsOf(b, this.device)): Embedded {
    const images = b.imageRows.length
    const seen = (): Tensor => {
      const pixels = at('pixels')
      return this.#vision.features(this.dtype === 'f32' ? pixels : cast(pixels, this.dtype))
    }
    const visionFeatures = scope(() => noGrad(seen))
    const last = this.#projector.beforeLast(visionFeatures)
    const embed = this.language.embeddings
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

  /** Offsets, positions and rotary tables of a packed batch. */
  packing(b: { offsets: Int32Array; positions: Int32Array }, at?: BatchTensors): Packing {
    const longest = b.positions.reduce((n, p) => Math.max(n, p + 1), 1)
    const [offsets, positions] = [at?.('offsets') ?? tensor(b.offsets), at?.('positions') ?? tensor(b.positions)]
    return { offsets, positions, ...this.language.rotary(longest) }
  }

  /** inputs_embeds [T, H] -> last hidden state after the final norm [T, H]. */
  hidden(embeds: Tensor, p: Packing): Tensor {
    return hiddenStates(this.language, embeds, p)
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
      const head = (hidden: Tensor): Tensor => this.#head(hidden, b, o).loss
      const loss = backwardByLayer(this.language, embedded.inputsEmbeds, this.packing(b, o.tensors), head)
      return { loss, coefficients: embedded.coefficients }
    })
  }
  /** Frees all weights. The object cannot be used afterwards. */
  override dispose(): void {
    super.dispose()
    this.#language.dispose() // what it keeps besides its weights
  }
}

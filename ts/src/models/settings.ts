/** A model's settings without its weights, new or from a folder. load.ts adds weights to them, the planner of training none. */
import path from 'node:path'
import { loadConfig, type RawConfig } from '../formats/zod-check.js'
import type { ChatStyle } from '../processing/conversation/styles.js'
import { AlignGPTError } from '../util/errors.js'
import {
  type AlignGPTConfig,
  type AlignGPTFields,
  alignGPTConfigJson,
  parseAlignGPTConfig,
  readAlignGPTConfig,
  visionTowerFolder,
} from './config/aligngpt.js'
import { type ClipConfig, parseClipConfig } from './config/clip.js'
import { type Alignment, type Gate, type GateText, MODEL_DEFAULTS, type SelectFeature } from './config/variants.js'
import { languageFamily, readVisionConfig, visionFamily } from './registry.js'

/** Which variant of the alignment vector; what a checkpoint's config says, else the official code's (adaptive, mlp, all). */
export interface AlignmentOptions {
  alignment?: Alignment
  /** linear: the paper's single matrix in place of the official code's two layers */
  gate?: Gate
  /** instruction: the gate does not see answers in training, as it will not at inference */
  gateText?: GateText
}
/** What a model's config.json may say and an argument may say otherwise. */
export interface ModelOptions extends AlignmentOptions {
  /** style of instruction tuning and of answers; what config.json says, else recognised by architecture and tokenizer */
  conversation?: ChatStyle
  /** whether images are turned as their EXIF says; what config.json says, else false, as LLaVA has them */
  exifOrientation?: boolean
}
/** What is chosen of a new model besides its towers. */
export interface NewModelOptions extends ModelOptions {
  /** number of alignment levels N, the paper's 8 by default */
  levels?: number
  projector?: string
  /** index of the vision tower's hidden state, LLaVA's -2 by default */
  selectLayer?: number
  /** which rows of it: patch (LLaVA's, default) or cls_patch, the class row too */
  selectFeature?: SelectFeature
}

export interface ModelSettings {
  config: AlignGPTConfig
  /** config of the whole model that the vision tower is a part of */
  clip: ClipConfig
  /** number of alignment levels N */
  levels: number
}

/** Fields of config.json for what was asked for. */
export function fieldsOf(o: ModelOptions): Partial<AlignGPTFields> {
  const { alignment, gate, gateText, conversation, exifOrientation } = o
  return {
    ...(alignment !== undefined && { mm_alignment: alignment }),
    ...(gate !== undefined && { mm_gate_type: gate }),
    ...(gateText !== undefined && { mm_gate_text: gateText }),
    ...(conversation !== undefined && { conversation }),
    ...(exifOrientation !== undefined && { image_exif_orientation: exifOrientation }),
  }
}

/** Those of a new model with towers of these configs. @param tower what its config.json says of the vision tower */
function combined(llm: { raw: RawConfig; file: string }, clip: ClipConfig, tower: string, o: NewModelOptions) {
  const levels = o.levels ?? MODEL_DEFAULTS.levels
  if (!Number.isInteger(levels) || levels < 2)
    throw new AlignGPTError('ERR_ARGUMENT', `[AlignGPT] levels: expected an integer >= 2, got ${levels}`)
  languageFamily(llm.raw, llm.file).parse(llm.raw, llm.file) // what is wrong in it is said of the file itself
  const raw = alignGPTConfigJson(llm.raw, {
    mm_hidden_size: visionFamily(clip.raw, tower).tower(clip).hidden_size,
    mm_projector_type: o.projector ?? MODEL_DEFAULTS.projector,
    mm_vision_select_layer: o.selectLayer ?? MODEL_DEFAULTS.selectLayer,
    mm_vision_select_feature: o.selectFeature ?? MODEL_DEFAULTS.selectFeature,
    mm_vision_tower: tower,
    n_indicators: levels,
    ...fieldsOf(o),
  })
  return { config: parseAlignGPTConfig(raw, llm.file), clip, levels }
}

/** The settings of a new model whose towers are in folders. @throws AlignGPTError ERR_CONFIG, ERR_ARGUMENT */
export function newSettings(o: NewModelOptions & { llm: string; clip: string }): ModelSettings {
  return combined(loadConfig(o.llm, 'config.json'), readVisionConfig(o.clip), path.resolve(o.clip), o)
}

/** config.json of a folder, in the variant that is asked for. @throws AlignGPTError ERR_CONFIG */
export function storedConfig(dir: string, o: ModelOptions = {}): { config: AlignGPTConfig; stored: AlignGPTConfig } {
  const stored = readAlignGPTConfig(dir)
  return { stored, config: parseAlignGPTConfig({ ...stored.llm.raw, ...fieldsOf(o) }, path.join(dir, 'config.json')) }
}

/** The settings of a folder; its weights need not be there. @throws AlignGPTError ERR_CONFIG */
export function folderSettings(dir: string, o: ModelOptions & { clip?: string; levels?: number } = {}): ModelSettings {
  const { config } = storedConfig(dir, o)
  const clip = readVisionConfig(visionTowerFolder(dir, config, o.clip))
  return { config, clip, levels: o.levels ?? config.n_indicators ?? MODEL_DEFAULTS.levels }
}

/** Vicuna, the paper's language model. */
const VICUNA = {
  '7b': { hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32 },
  '13b': { hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40, num_attention_heads: 40 },
} as const
const VIT_L_14_336 = {
  ...{ hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16 },
  ...{ image_size: 336, patch_size: 14 },
} as const
export type PaperSize = keyof typeof VICUNA
export const PAPER_SIZES = Object.keys(VICUNA) as PaperSize[]

/** The settings of the paper's two models. */
export function paperSettings(size: PaperSize, o: NewModelOptions = {}): ModelSettings {
  const clip = parseClipConfig({ vision_config: VIT_L_14_336 })
  return combined({ raw: VICUNA[size], file: size }, clip, 'ViT-L/14-336', o)
}

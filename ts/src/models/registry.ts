/** The families of language models and vision towers this package knows, by `model_type`. A new one is a row here. */
import { loadConfig, type RawConfig, refuse } from '../formats/zod-check.js'
import type { ParameterSource } from '../nn/module.js'
import { type ChatStyle, styleOf } from '../processing/conversation/styles.js'
import { type PreprocessorConfig, readPreprocessor } from '../processing/preprocessor-config.js'
import type { Tokenizer } from '../processing/tokenizer.js'
import { CLIPVisionTower, clipActivations, clipRows } from './clip.js'
import { type ClipConfig, parseClipConfig } from './config/clip.js'
import type { LanguageModelConfig } from './config/language-model.js'
import { type LlamaConfig, parseLlamaConfig } from './config/llama.js'
import type { LanguageModel, LayerActivations } from './language-model.js'
import { LlamaForCausalLM, llamaActivations } from './llama.js'
import type { Placement } from './parameter-sources.js'
import type { FeatureSelection, TowerActivations, VisionTower, VisionTowerConfig } from './vision-tower.js'

/** A family of language models. C is the config that its reader gives and its builder takes. */
interface LanguageFamily<C extends LanguageModelConfig> {
  /** of an AlignGPT checkpoint with such a language model: `model_type` and the class in `architectures` */
  alignGPT: { model_type: string; architecture: string }
  parse(raw: RawConfig, file: string): C
  build(s: ParameterSource, config: C, place: Required<Placement>): LanguageModel
  /** what a training step keeps of a layer */
  activations(config: C): LayerActivations
  /** the style a checkpoint of the family was tuned with, where its config.json has no `conversation` */
  conversation(tokenizer: Tokenizer): ChatStyle
}

/** A family of vision towers, each in the folder of a whole model that scores pairs. */
interface VisionFamily<C> {
  parse(raw: RawConfig, file: string): C
  /** the tower's part of the config */
  tower(config: C): VisionTowerConfig
  /** image rows P */
  rows(config: C, select: FeatureSelection): number
  activations(config: C): TowerActivations
  build(s: ParameterSource, config: C, select: FeatureSelection): VisionTower
  processor(folder: string, config: C): PreprocessorConfig
}

const llama: LanguageFamily<LlamaConfig> = {
  alignGPT: { model_type: 'aligngpt', architecture: 'AlignGPTForCausalLM' },
  parse: parseLlamaConfig,
  build: (s, config, place) => new LlamaForCausalLM(s, config, place),
  activations: llamaActivations,
  conversation: styleOf,
}

const clip: VisionFamily<ClipConfig> = {
  parse: parseClipConfig,
  tower: (config) => config.vision,
  rows: (config, select) => clipRows(config.vision, select),
  activations: (config) => clipActivations(config.vision),
  build: (s, config, select) => new CLIPVisionTower(s, config.vision, select),
  processor: (folder, config) => readPreprocessor(folder, config.vision.image_size),
}

const LANGUAGE: Record<string, LanguageFamily<LanguageModelConfig>> = {
  llama: llama as unknown as LanguageFamily<LanguageModelConfig>,
}
const VISION: Record<string, VisionFamily<ClipConfig>> = { clip }

/** @throws AlignGPTError ERR_CONFIG naming the families there are */
function familyOf<F>(table: Record<string, F>, raw: RawConfig, file: string, usual: string): F {
  const type = raw.model_type ?? usual
  const found = typeof type === 'string' && Object.hasOwn(table, type) ? table[type] : null
  return found ?? refuse(file, 'model_type', Object.keys(table).join(' or '), type)
}

/** The family of a language model's own config.json. @throws AlignGPTError ERR_CONFIG */
export const languageFamily = (raw: RawConfig, file: string): LanguageFamily<LanguageModelConfig> =>
  familyOf(LANGUAGE, raw, file, 'llama')
/** The family of a vision tower's config.json. @throws AlignGPTError ERR_CONFIG */
export const visionFamily = (raw: RawConfig, file: string): VisionFamily<ClipConfig> =>
  familyOf(VISION, raw, file, 'clip')

/** The family of the language model in an AlignGPT's config.json. @throws AlignGPTError ERR_CONFIG */
export function familyInAlignGPT(raw: RawConfig, file: string): LanguageFamily<LanguageModelConfig> {
  const found = Object.values(LANGUAGE).find((f) => f.alignGPT.model_type === raw.model_type)
  const known = Object.values(LANGUAGE).map((f) => `'${f.alignGPT.model_type}'`)
  return found ?? refuse(file, 'model_type', known.join(' or '), raw.model_type)
}

/** Reads the config.json (file or folder) of the model that a vision tower is part of. @throws AlignGPTError ERR_CONFIG */
export function readVisionConfig(fileOrFolder: string): ClipConfig {
  const { raw, file } = loadConfig(fileOrFolder, 'config.json')
  return visionFamily(raw, file).parse(raw, file)
}

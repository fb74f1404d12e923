/** config.json of an AlignGPT: the language model's own, with the `mm_*` fields of the official code. */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import {
  checkConfig,
  loadConfig,
  maybe,
  or,
  type RawConfig,
  refuse,
  size,
  writeConfigFile,
} from '../../formats/zod-check.js'
import { CHAT_STYLES, type ChatStyle } from '../../processing/conversation/styles.js'
import { mismatch } from '../../util/errors.js'
import { familyInAlignGPT, languageFamily } from '../registry.js'
import type { LanguageModelConfig } from './language-model.js'
import {
  ALIGNMENTS,
  type Alignment,
  GATE_TEXTS,
  GATES,
  type Gate,
  type GateText,
  MODEL_DEFAULTS,
  SELECT_FEATURES,
  type SelectFeature,
} from './variants.js'

/** An AlignGPT model: a LLaMA config with the `mm_*` fields of the official code. */
export interface AlignGPTConfig {
  /** the language model; its `raw` is the whole file */
  llm: LanguageModelConfig
  mm_hidden_size: number
  mm_projector_type: string
  mm_vision_select_layer: number
  mm_vision_select_feature: SelectFeature
  /** as written in the file */
  mm_vision_tower: string | null
  /** the folder it names, when that exists: relative to the config's folder, or absolute */
  visionTowerPath: string | null
  /** null (official files): the first dimension of align_indicators.indicator_embs */
  n_indicators: number | null
  /** not in official files, which are adaptive, mlp, all */
  mm_alignment: Alignment
  mm_gate_type: Gate
  mm_gate_text: GateText
  /** 'pad': pad to square with the mean colour; other values: plain CLIP preprocessing */
  image_aspect_ratio: string
  /** whether images are turned as their EXIF says; not in official files, which do not turn them */
  image_exif_orientation: boolean
  tokenizer_model_max_length: number
  /** style of instruction tuning and of answers; not in official files: recognised by architecture and tokenizer */
  conversation: ChatStyle | null
}

const alignSchema = z.object({
  mm_hidden_size: size,
  mm_projector_type: or(z.string(), 'linear'),
  mm_vision_select_layer: or(z.int(), MODEL_DEFAULTS.selectLayer),
  mm_vision_select_feature: or(z.enum(SELECT_FEATURES), MODEL_DEFAULTS.selectFeature),
  mm_vision_tower: maybe(z.string().min(1)),
  n_indicators: maybe(z.int().min(2)),
  mm_alignment: or(z.enum(ALIGNMENTS), MODEL_DEFAULTS.alignment),
  mm_gate_type: or(z.enum(GATES), MODEL_DEFAULTS.gate),
  mm_gate_text: or(z.enum(GATE_TEXTS), MODEL_DEFAULTS.gateText),
  image_aspect_ratio: or(z.string(), 'pad'),
  image_exif_orientation: or(z.boolean(), false),
  tokenizer_model_max_length: or(size, MODEL_DEFAULTS.maxLength),
  conversation: maybe(z.enum(CHAT_STYLES)),
})

/**
 * Validates the content of an AlignGPT config.json.
 * @param file its path: `mm_vision_tower` is looked up relative to its folder
 * @throws AlignGPTError ERR_CONFIG
 */
export function parseAlignGPTConfig(raw: RawConfig, file = 'config.json'): AlignGPTConfig {
  const family = familyInAlignGPT(raw, file)
  if (raw.use_s2) refuse(file, 'use_s2', 'false (multi-scale towers are not supported)', raw.use_s2)
  const c = checkConfig(alignSchema, raw, file)
  const folder = c.mm_vision_tower === null ? null : path.resolve(path.dirname(file), c.mm_vision_tower)
  const visionTowerPath = folder !== null && fs.existsSync(path.join(folder, 'config.json')) ? folder : null
  return { llm: family.parse(raw, file), ...c, visionTowerPath }
}

/** Reads an AlignGPT config.json (file or folder). @throws AlignGPTError ERR_CONFIG */
export function readAlignGPTConfig(fileOrFolder: string): AlignGPTConfig {
  const { raw, file } = loadConfig(fileOrFolder, 'config.json')
  return parseAlignGPTConfig(raw, file)
}

/**
 * The folder with the vision tower's settings: `given`, the one the config names, or the model's own `vision_tower`.
 * @throws AlignGPTError ERR_CONFIG when none of them has a config.json
 */
export function visionTowerFolder(dir: string, c: AlignGPTConfig, given?: string): string {
  const candidates = [given, c.visionTowerPath, path.join(dir, 'vision_tower')]
  const found = candidates.find((d): d is string => !!d && fs.existsSync(path.join(d, 'config.json')))
  if (found) return found
  const got = `${c.mm_vision_tower}; give it as { clip }`
  throw mismatch('ERR_CONFIG', 'config', `${dir}: mm_vision_tower`, 'a folder with config.json', got)
}

/** `model_type` of a config.json, to tell the folders apart. */
export function modelTypeOf(fileOrFolder: string): string {
  const { raw, file } = loadConfig(fileOrFolder, 'config.json')
  if (typeof raw.model_type !== 'string') refuse(file, 'model_type', 'a string', raw.model_type)
  return raw.model_type as string
}

/** What AlignGPT adds to the language model's own config. */
export type AlignGPTFields = Pick<AlignGPTConfig, 'mm_hidden_size' | 'mm_projector_type' | 'mm_vision_select_layer'> & {
  mm_vision_tower: string
  n_indicators?: number
} & Partial<
    Pick<
      AlignGPTConfig,
      | 'mm_vision_select_feature'
      | 'image_aspect_ratio'
      | 'image_exif_orientation'
      | 'tokenizer_model_max_length'
      | 'mm_alignment'
      | 'mm_gate_type'
      | 'mm_gate_text'
      | 'conversation'
    >
  >

/** Content of an official AlignGPT config.json: the LLaMA config as it was, plus the `mm_*` fields. */
export function alignGPTConfigJson(llama: RawConfig, fields: AlignGPTFields, torchDtype?: string): RawConfig {
  const dtype = torchDtype === undefined ? {} : 'dtype' in llama ? { dtype: torchDtype } : { torch_dtype: torchDtype }
  const isOurs = typeof llama.model_type === 'string' && llama.model_type.startsWith('aligngpt')
  const family = isOurs ? familyInAlignGPT(llama, 'config.json') : languageFamily(llama, 'config.json')
  const { model_type, architecture } = family.alignGPT
  return {
    mm_vision_select_feature: MODEL_DEFAULTS.selectFeature,
    image_aspect_ratio: 'pad',
    tokenizer_model_max_length: MODEL_DEFAULTS.maxLength,
    ...llama,
    ...dtype,
    architectures: [architecture],
    model_type,
    ...fields,
    tokenizer_padding_side: 'right',
    use_mm_proj: true,
  }
}

/** Writes an official AlignGPT config.json into a folder, atomically. */
export function writeAlignGPTConfig(
  folder: string,
  llama: RawConfig,
  fields: AlignGPTFields,
  torchDtype?: string,
): void {
  writeConfigFile(path.join(folder, 'config.json'), alignGPTConfigJson(llama, fields, torchDtype))
}

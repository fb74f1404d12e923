/** config.json of a CLIP, with both towers. */
import { z } from 'zod'
import { checkConfig, id, loadConfig, or, positive, type RawConfig, refuse, size } from '../../formats/zod-check.js'
import { refuseQuantized, refuseUnknown } from './refused.js'

export interface ClipVisionConfig {
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  num_channels: number
  image_size: number
  patch_size: number
  hidden_act: string
  layer_norm_eps: number
  initializer_range: number
  initializer_factor: number
}

export interface ClipTextConfig {
  vocab_size: number
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  max_position_embeddings: number
  hidden_act: string
  layer_norm_eps: number
  initializer_range: number
  initializer_factor: number
  bos_token_id: number | null
  /** 2 is OpenAI's legacy value and no real id: pool at argmax(input_ids) then, else at the first eos */
  eos_token_id: number
  pad_token_id: number | null
}

/** A CLIP model; names and defaults are transformers' CLIPConfig. */
export interface ClipConfig {
  vision: ClipVisionConfig
  text: ClipTextConfig
  projection_dim: number
  logit_scale_init_value: number
  raw: RawConfig
}

const tower = {
  num_hidden_layers: or(size, 12),
  hidden_act: or(z.string(), 'quick_gelu'),
  layer_norm_eps: or(positive, 1e-5),
  initializer_range: or(z.number().nonnegative(), 0.02),
  initializer_factor: or(z.number().nonnegative(), 1),
}
const visionSchema = z.object({
  hidden_size: or(size, 768),
  intermediate_size: or(size, 3072),
  num_attention_heads: or(size, 12),
  num_channels: or(size, 3),
  image_size: or(size, 224),
  patch_size: or(size, 32),
  ...tower,
})
const textSchema = z.object({
  vocab_size: or(size, 49408),
  hidden_size: or(size, 512),
  intermediate_size: or(size, 2048),
  num_attention_heads: or(size, 8),
  max_position_embeddings: or(size, 77),
  bos_token_id: id.nullable().default(49406),
  eos_token_id: or(id, 49407),
  pad_token_id: id.nullable().default(1),
  ...tower,
})
const clipSchema = z.object({ projection_dim: or(size, 512), logit_scale_init_value: or(z.number(), 2.6592) })

/** Keys of a tower that look as if they computed something and are its own. */
const KNOWN = ['layer_norm_eps', 'hidden_act']

/** A tower's section; the old `*_config_dict` sections win over it, with their defaults, as in transformers. */
function section<T extends { hidden_size: number; num_attention_heads: number; hidden_act: string }>(
  raw: RawConfig,
  name: string,
  schema: z.ZodType<T>,
  file: string,
): T {
  const key = raw[`${name}_dict`] ? `${name}_dict` : name
  const value = raw[key] ?? {}
  if (typeof value !== 'object' || Array.isArray(value)) refuse(file, key, 'an object', value)
  const c = checkConfig(schema, value, file, key)
  refuseUnknown(value as RawConfig, file, KNOWN, `${key}.`)
  if (c.hidden_size % c.num_attention_heads)
    refuse(file, `${key}.hidden_size`, `a multiple of num_attention_heads ${c.num_attention_heads}`, c.hidden_size)
  return c
}

/** Validates the content of a CLIP config.json. @throws AlignGPTError ERR_CONFIG */
export function parseClipConfig(raw: RawConfig, file = 'config.json'): ClipConfig {
  if (raw.model_type !== undefined && raw.model_type !== 'clip') refuse(file, 'model_type', "'clip'", raw.model_type)
  refuseQuantized(raw, file)
  for (const name of ['vision_config', 'text_config']) refuseQuantized((raw[name] ?? {}) as RawConfig, file, `${name}.`)
  const vision = section(raw, 'vision_config', visionSchema, file)
  const text = section(raw, 'text_config', textSchema, file)
  if (vision.num_channels !== 3) refuse(file, 'vision_config.num_channels', '3', vision.num_channels)
  if (vision.image_size < vision.patch_size)
    refuse(file, 'vision_config.image_size', `at least patch_size ${vision.patch_size}`, vision.image_size)
  return { vision, text, ...checkConfig(clipSchema, raw, file), raw }
}

/** Reads a CLIP config.json (file or folder). @throws AlignGPTError ERR_CONFIG */
export function readClipConfig(fileOrFolder: string): ClipConfig {
  const { raw, file } = loadConfig(fileOrFolder, 'config.json')
  return parseClipConfig(raw, file)
}

/** Patches per picture, P. */
export const patchCount = (c: ClipVisionConfig): number => Math.floor(c.image_size / c.patch_size) ** 2

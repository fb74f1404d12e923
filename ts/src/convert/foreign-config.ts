/** Settings in the checkpoint layouts of others (layouts.ts): their config.json to ours, and ours to theirs. */
import { z } from 'zod'
import { checkConfig, maybe, or, type RawConfig } from '../formats/zod-check.js'
import { type AlignGPTConfig, alignGPTConfigJson } from '../models/config/aligngpt.js'
import { type ClipConfig, parseClipConfig, patchCount } from '../models/config/clip.js'
import { refuseQuantized } from '../models/config/refused.js'
import type { Format } from '../models/names.js'
import { mismatch, show } from '../util/errors.js'

const no = z.union([z.literal(false), z.null()], 'false').optional()

/** What a LLaVA may say besides LLaMA's settings and AlignGPT's `mm_*`: versions before 1.5 and after it work otherwise. */
const llavaSchema = z.object({
  mm_use_im_start_end: no,
  mm_patch_merge_type: z.union([z.literal('flat'), z.null()], "'flat'").optional(),
  image_aspect_ratio: z
    .string()
    .refine((s) => !s.startsWith('anyres'), "'pad' or 'square', one picture of one size (LLaVA 1.5)")
    .nullish(),
})
const hfSchema = z.object({
  text_config: z.object({ model_type: z.literal('llama', "'llama'").optional() }).loose(),
  vision_config: z
    .object({ model_type: z.literal(['clip_vision_model', 'clip'], "'clip_vision_model'").optional() })
    .loose(),
  projector_hidden_act: z.literal('gelu', "'gelu'").optional(),
  multimodal_projector_bias: z.literal(true, 'true').nullish(),
  vision_feature_layer: maybe(z.union([z.int(), z.tuple([z.int()]).transform(([layer]) => layer)], 'one layer')),
  vision_feature_select_strategy: maybe(z.literal(['default', 'full'], "'default' or 'full'")),
  tie_word_embeddings: or(z.boolean(), false),
})

/** A model's settings in this package's form; `clip` where the file has the vision tower's as well. */
export interface Settings {
  format: Format
  /** content of an AlignGPT config.json */
  raw: RawConfig
  /** content of a CLIP config.json */
  clip: RawConfig | null
}

/**
 * The settings of a folder in any of the layouts.
 * @param raw content of its config.json
 * @param file name for messages
 * @throws AlignGPTError ERR_CONFIG naming what is neither, or what this package cannot do
 */
export function settingsOf(raw: RawConfig, file: string): Settings {
  const { model_type, text_config } = raw
  refuseQuantized(raw, file)
  if (model_type === 'aligngpt') return { format: 'aligngpt', raw, clip: null }
  if (model_type === 'llava' && text_config !== undefined) return fromHf(raw, file)
  if (model_type === 'llava' || model_type === 'llava_llama') {
    checkConfig(llavaSchema, raw, file)
    return { format: 'llava', raw: { ...raw, ...OURS, mm_alignment: 'none' }, clip: null }
  }
  throw mismatch(
    'ERR_CONFIG',
    'convert',
    `${file}: model_type`,
    "'aligngpt', 'llava' or 'llava_llama'",
    show(model_type),
  )
}
const OURS = { model_type: 'aligngpt', architectures: ['AlignGPTForCausalLM'] }

function fromHf(raw: RawConfig, file: string): Settings {
  const c = checkConfig(hfSchema, raw, file)
  const clip = { model_type: 'clip', vision_config: { ...c.vision_config, model_type: 'clip_vision_model' } }
  const fields = {
    mm_hidden_size: parseClipConfig(clip, file).vision.hidden_size,
    mm_projector_type: 'mlp2x_gelu',
    mm_vision_select_layer: c.vision_feature_layer ?? -2,
    mm_vision_select_feature: c.vision_feature_select_strategy === 'full' ? ('cls_patch' as const) : ('patch' as const),
    mm_vision_tower: 'vision_tower',
    mm_alignment: 'none' as const,
  }
  // versions of transformers say it here or there; a head that the file has is read all the same
  const tie_word_embeddings = c.tie_word_embeddings || c.text_config.tie_word_embeddings === true
  return { format: 'llava-hf', raw: alignGPTConfigJson({ ...c.text_config, tie_word_embeddings }, fields), clip }
}

/** Fields of config.json that are AlignGPT's or LLaVA's and not the language model's. */
const FIELDS = /^(mm_.*|(tune|freeze|unfreeze)_mm_.*|n_indicators|image_.*|tokenizer_.*|use_mm_proj|use_s2)$/
const VARIANT = /^(mm_alignment|mm_gate_.*|n_indicators)$/
const without = (raw: RawConfig, fields: RegExp): RawConfig =>
  Object.fromEntries(Object.entries(raw).filter(([key]) => !fields.test(key)))

/** config.json of the official LLaVA, whose code takes the vision tower from the folder or Hub name `tower`. */
export function llavaConfigJson(raw: RawConfig, tower: string): RawConfig {
  const own = { architectures: ['LlavaLlamaForCausalLM'], model_type: 'llava_llama', mm_vision_tower: tower }
  return { ...without(raw, VARIANT), ...own, mm_use_im_start_end: false, mm_use_im_patch_token: false }
}

/** config.json of llava-hf; the token `imageToken` stands for a picture's rows, and there are `vocab` tokens. */
export function hfConfigJson(c: AlignGPTConfig, clip: ClipConfig, imageToken: number, vocab: number): RawConfig {
  if (c.mm_projector_type !== 'mlp2x_gelu')
    throw mismatch('ERR_CONFIG', 'export', 'mm_projector_type', "'mlp2x_gelu' for llava-hf", show(c.mm_projector_type))
  const { torch_dtype, dtype, transformers_version: _, ...text } = without(c.llm.raw, FIELDS)
  const whole = c.mm_vision_select_feature === 'cls_patch'
  return {
    architectures: ['LlavaForConditionalGeneration'],
    model_type: 'llava',
    ...(dtype !== undefined ? { dtype } : torch_dtype !== undefined ? { torch_dtype } : {}),
    text_config: { ...text, architectures: ['LlamaForCausalLM'], model_type: 'llama', vocab_size: vocab },
    vision_config: { ...clip.vision, model_type: 'clip_vision_model', projection_dim: clip.projection_dim },
    image_token_index: imageToken,
    image_seq_length: patchCount(clip.vision) + (whole ? 1 : 0),
    projector_hidden_act: 'gelu',
    multimodal_projector_bias: true,
    vision_feature_layer: c.mm_vision_select_layer,
    vision_feature_select_strategy: whole ? 'full' : 'default',
    tie_word_embeddings: c.llm.tie_word_embeddings,
  }
}

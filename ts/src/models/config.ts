/**
 * Hugging Face configuration files as they are on disk: LLaMA (transformers 4.x and 5.x), CLIP, AlignGPT, image
 * preprocessing, generation. Absent and null keys mean the defaults of transformers; what this package cannot do is
 * refused by name. Every error names the file, the key, what was expected and what is there.
 */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { mismatch, show } from '../util/errors.js'
import { readJsonFile, writeAtomicText } from '../util/json.js'

export type RawConfig = Record<string, unknown>

/** Rotary embedding scaling of Llama 3.1. */
export interface Llama3RopeScaling {
  rope_type: 'llama3'
  factor: number
  low_freq_factor: number
  high_freq_factor: number
  original_max_position_embeddings: number
}

/** A LLaMA language model; names and defaults are transformers' LlamaConfig. */
export interface LlamaConfig {
  model_type: string
  vocab_size: number
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  /** at most num_attention_heads, which it divides */
  num_key_value_heads: number
  /** heads * head_dim need not be hidden_size */
  head_dim: number
  hidden_act: string
  max_position_embeddings: number
  initializer_range: number
  rms_norm_eps: number
  rope_theta: number
  /** null: plain rotary embedding */
  rope_scaling: Llama3RopeScaling | null
  attention_bias: boolean
  mlp_bias: boolean
  tie_word_embeddings: boolean
  bos_token_id: number | null
  /** every id that ends a sequence (Llama 3.1 has several) */
  eos_token_ids: number[]
  pad_token_id: number | null
  /** the file's own content, for writing back */
  raw: RawConfig
}

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

/**
 * Variants of the alignment vector (the paper's ablations): adaptive = gate over the local vectors plus the global one; local =
 * without the global one; global = that one alone; average = mean of the local ones plus the global one; random = adaptive over
 * a table that is never trained; none = no vector in the sequence.
 */
export const ALIGNMENTS = ['adaptive', 'local', 'global', 'average', 'random', 'none'] as const
export type Alignment = (typeof ALIGNMENTS)[number]
/** mlp: the official code's two layers; linear: the paper's one */
export const GATES = ['mlp', 'linear'] as const
export type Gate = (typeof GATES)[number]
/** which text the gate sees in training */
export const GATE_TEXTS = ['all', 'instruction'] as const
export type GateText = (typeof GATE_TEXTS)[number]

/** An AlignGPT model: a LLaMA config with the `mm_*` fields of the official code. */
export interface AlignGPTConfig {
  /** the language model; its `raw` is the whole file */
  llm: LlamaConfig
  mm_hidden_size: number
  mm_projector_type: string
  mm_vision_select_layer: number
  mm_vision_select_feature: 'patch' | 'cls_patch'
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
  tokenizer_model_max_length: number
}

/** CLIP image preprocessing. */
export interface PreprocessorConfig {
  /** length of the shortest edge after resizing, pixels */
  size: number
  /** side of the centre crop, pixels; at most `size` */
  crop: number
  /** per channel, of values scaled to 0..1 */
  mean: [number, number, number]
  std: [number, number, number]
  raw: RawConfig
}

export interface GenerationConfig {
  bos_token_id: number | null
  eos_token_ids: number[]
  pad_token_id: number | null
  max_new_tokens: number | null
  do_sample: boolean
  temperature: number
  top_k: number
  top_p: number
}

// ---- building blocks ------------------------------------------------------------------------------------------------

/** Absent and null both mean the default, as in transformers. */
const or = <T extends z.ZodType>(schema: T, value: z.output<T>) =>
  schema.nullish().transform((x) => (x === null || x === undefined ? value : x)) as z.ZodType<z.output<T>>
const size = z.int().positive()
const count = z.int().nonnegative()
const positive = z.number().positive()
const id = z.int().nonnegative()
const ids = z.union([id.transform((x) => [x]), z.array(id)], 'a token id or a list of them')
const maybe = <T extends z.ZodType>(schema: T) => schema.nullish().transform((x) => x ?? null)

/** Validates what a file holds. @throws AlignGPTError ERR_CONFIG naming the key, what was expected and what is there */
export function check<T>(schema: z.ZodType<T>, raw: unknown, file: string, prefix = ''): T {
  const result = schema.safeParse(raw)
  if (result.success) return result.data
  const issue = result.error.issues[0]
  let got: unknown = raw
  for (const key of issue.path) got = (got as Record<PropertyKey, unknown> | undefined)?.[key]
  const key = [prefix, ...issue.path.map(String)].filter(Boolean).join('.') || '(the whole file)'
  const expected = issue.message
    .replace(/^(Invalid input|Invalid option|Too small|Too big): expected /, '')
    .replace(/, received .*$/, '')
  throw mismatch('ERR_CONFIG', 'config', `${file}: ${key}`, expected, got === undefined ? 'nothing' : show(got))
}

function refuse(file: string, key: string, expected: string, got: unknown): never {
  throw mismatch('ERR_CONFIG', 'config', `${file}: ${key}`, expected, show(got))
}

/** Reads a JSON file that holds an object. @throws AlignGPTError ERR_CONFIG */
export function readJsonObject(file: string): RawConfig {
  const raw = readJsonFile(file, 'ERR_CONFIG')
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) refuse(file, '(the whole file)', 'an object', raw)
  return raw as RawConfig
}

/** A config file or the one in a folder. @throws AlignGPTError ERR_CONFIG */
function load(fileOrFolder: string, name: string): { raw: RawConfig; file: string } {
  const isFolder = fs.statSync(fileOrFolder, { throwIfNoEntry: false })?.isDirectory()
  const file = isFolder ? path.join(fileOrFolder, name) : fileOrFolder
  return { raw: readJsonObject(file), file }
}

// ---- LLaMA ----------------------------------------------------------------------------------------------------------

const llamaSchema = z.object({
  vocab_size: or(size, 32000),
  hidden_size: or(size, 4096),
  intermediate_size: or(size, 11008),
  num_hidden_layers: or(size, 32),
  num_attention_heads: or(size, 32),
  num_key_value_heads: maybe(size),
  head_dim: maybe(size),
  hidden_act: or(z.string(), 'silu'),
  max_position_embeddings: or(size, 2048),
  initializer_range: or(z.number().nonnegative(), 0.02),
  rms_norm_eps: or(positive, 1e-6),
  attention_bias: or(z.boolean(), false),
  mlp_bias: or(z.boolean(), false),
  tie_word_embeddings: or(z.boolean(), false),
})
// Token ids: null is a value of its own (no such token), so only an absent key means the default.
const llamaIds = z.object({
  bos_token_id: id.nullable().default(1),
  eos_token_id: ids.nullable().default([2]),
  pad_token_id: maybe(z.int()),
})
const llama3Schema = z.object({
  factor: positive,
  low_freq_factor: positive,
  high_freq_factor: positive,
  original_max_position_embeddings: positive,
})

/** rope_theta and scaling from either style: 4.x `rope_theta` + `rope_scaling`, 5.x `rope_parameters`. */
function ropeOf(raw: RawConfig, file: string): Pick<LlamaConfig, 'rope_theta' | 'rope_scaling'> {
  const key = raw.rope_parameters ? 'rope_parameters' : 'rope_scaling'
  const shape = z.object({ rope_theta: maybe(positive), rope_type: maybe(z.string()), type: maybe(z.string()) }).loose()
  const given = raw[key] === null || raw[key] === undefined ? null : check(shape, raw[key], file, key)
  const top = check(z.object({ rope_theta: or(positive, 10000) }), raw, file)
  const rope_theta = (key === 'rope_parameters' ? given?.rope_theta : null) ?? top.rope_theta
  const partial = given?.partial_rotary_factor ?? raw.partial_rotary_factor ?? 1
  if (partial !== 1) refuse(file, `${key}.partial_rotary_factor`, '1', partial)
  const type = given?.rope_type ?? given?.type ?? 'default'
  if (type === 'default') return { rope_theta, rope_scaling: null }
  if (type !== 'llama3') refuse(file, `${key}.rope_type`, "'default' or 'llama3'", type)
  const scaling = check(llama3Schema, given, file, key)
  if (scaling.low_freq_factor >= scaling.high_freq_factor)
    refuse(
      file,
      `${key}.high_freq_factor`,
      `more than low_freq_factor ${scaling.low_freq_factor}`,
      scaling.high_freq_factor,
    )
  return { rope_theta, rope_scaling: { rope_type: 'llama3', ...scaling } }
}

/**
 * Validates the content of a LLaMA config.json.
 * @param file name for messages
 * @throws AlignGPTError ERR_CONFIG
 */
export function parseLlamaConfig(raw: RawConfig, file = 'config.json'): LlamaConfig {
  const model_type = raw.model_type ?? 'llama'
  if (model_type !== 'llama' && model_type !== 'aligngpt')
    refuse(file, 'model_type', "'llama' or 'aligngpt'", model_type)
  const c = check(llamaSchema, raw, file)
  const t = check(llamaIds, raw, file)
  const heads = c.num_attention_heads
  if (c.head_dim === null && c.hidden_size % heads)
    refuse(file, 'hidden_size', `a multiple of num_attention_heads ${heads}`, c.hidden_size)
  const head_dim = c.head_dim ?? c.hidden_size / heads
  if (head_dim % 2) refuse(file, 'head_dim', 'an even number', head_dim)
  const num_key_value_heads = c.num_key_value_heads ?? heads
  if (heads % num_key_value_heads)
    refuse(file, 'num_key_value_heads', `a divisor of num_attention_heads ${heads}`, num_key_value_heads)
  if (c.hidden_act !== 'silu') refuse(file, 'hidden_act', "'silu'", c.hidden_act)
  for (const key of ['bos_token_id', 'pad_token_id'] as const) {
    const v = t[key]
    if (v !== null && v >= c.vocab_size) refuse(file, key, `an id below vocab_size ${c.vocab_size}`, v)
  }
  return {
    ...c,
    model_type,
    head_dim,
    num_key_value_heads,
    ...ropeOf(raw, file),
    bos_token_id: t.bos_token_id,
    eos_token_ids: t.eos_token_id ?? [],
    // -1 is how old LLaMA files say "none".
    pad_token_id: t.pad_token_id !== null && t.pad_token_id < 0 ? null : t.pad_token_id,
    raw,
  }
}

/** Reads a LLaMA config.json (file or folder). @throws AlignGPTError ERR_CONFIG */
export function readLlamaConfig(fileOrFolder: string): LlamaConfig {
  const { raw, file } = load(fileOrFolder, 'config.json')
  return parseLlamaConfig(raw, file)
}

// ---- CLIP -----------------------------------------------------------------------------------------------------------

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

/** A tower's section; the old `*_config_dict` sections win over it, with their defaults, as in transformers. */
function section<T extends { hidden_size: number; num_attention_heads: number }>(
  raw: RawConfig,
  name: string,
  schema: z.ZodType<T>,
  file: string,
): T {
  const key = raw[`${name}_dict`] ? `${name}_dict` : name
  const value = raw[key] ?? {}
  if (typeof value !== 'object' || Array.isArray(value)) refuse(file, key, 'an object', value)
  const c = check(schema, value, file, key)
  if (c.hidden_size % c.num_attention_heads)
    refuse(file, `${key}.hidden_size`, `a multiple of num_attention_heads ${c.num_attention_heads}`, c.hidden_size)
  return c
}

/** Validates the content of a CLIP config.json. @throws AlignGPTError ERR_CONFIG */
export function parseClipConfig(raw: RawConfig, file = 'config.json'): ClipConfig {
  if (raw.model_type !== undefined && raw.model_type !== 'clip') refuse(file, 'model_type', "'clip'", raw.model_type)
  const vision = section(raw, 'vision_config', visionSchema, file)
  const text = section(raw, 'text_config', textSchema, file)
  if (vision.num_channels !== 3) refuse(file, 'vision_config.num_channels', '3', vision.num_channels)
  if (vision.image_size < vision.patch_size)
    refuse(file, 'vision_config.image_size', `at least patch_size ${vision.patch_size}`, vision.image_size)
  return { vision, text, ...check(clipSchema, raw, file), raw }
}

/** Reads a CLIP config.json (file or folder). @throws AlignGPTError ERR_CONFIG */
export function readClipConfig(fileOrFolder: string): ClipConfig {
  const { raw, file } = load(fileOrFolder, 'config.json')
  return parseClipConfig(raw, file)
}

/** Patches per picture, P. */
export const patchCount = (c: ClipVisionConfig): number => Math.floor(c.image_size / c.patch_size) ** 2

// ---- AlignGPT -------------------------------------------------------------------------------------------------------

const alignSchema = z.object({
  mm_hidden_size: size,
  mm_projector_type: or(z.string(), 'linear'),
  mm_vision_select_layer: or(z.int(), -2),
  mm_vision_select_feature: or(z.enum(['patch', 'cls_patch']), 'patch'),
  mm_vision_tower: maybe(z.string().min(1)),
  n_indicators: maybe(z.int().min(2)),
  mm_alignment: or(z.enum(ALIGNMENTS), 'adaptive'),
  mm_gate_type: or(z.enum(GATES), 'mlp'),
  mm_gate_text: or(z.enum(GATE_TEXTS), 'all'),
  image_aspect_ratio: or(z.string(), 'pad'),
  tokenizer_model_max_length: or(size, 2048),
})

/**
 * Validates the content of an AlignGPT config.json.
 * @param file its path: `mm_vision_tower` is looked up relative to its folder
 * @throws AlignGPTError ERR_CONFIG
 */
export function parseAlignGPTConfig(raw: RawConfig, file = 'config.json'): AlignGPTConfig {
  if (raw.model_type !== 'aligngpt') refuse(file, 'model_type', "'aligngpt'", raw.model_type)
  if (raw.use_s2) refuse(file, 'use_s2', 'false (multi-scale towers are not supported)', raw.use_s2)
  const c = check(alignSchema, raw, file)
  const folder = c.mm_vision_tower === null ? null : path.resolve(path.dirname(file), c.mm_vision_tower)
  const visionTowerPath = folder !== null && fs.existsSync(path.join(folder, 'config.json')) ? folder : null
  return { llm: parseLlamaConfig(raw, file), ...c, visionTowerPath }
}

/** Reads an AlignGPT config.json (file or folder). @throws AlignGPTError ERR_CONFIG */
export function readAlignGPTConfig(fileOrFolder: string): AlignGPTConfig {
  const { raw, file } = load(fileOrFolder, 'config.json')
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
  const { raw, file } = load(fileOrFolder, 'config.json')
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
      | 'tokenizer_model_max_length'
      | 'mm_alignment'
      | 'mm_gate_type'
      | 'mm_gate_text'
    >
  >

/** Content of an official AlignGPT config.json: the LLaMA config as it was, plus the `mm_*` fields. */
export function alignGPTConfigJson(llama: RawConfig, fields: AlignGPTFields, torchDtype?: string): RawConfig {
  const dtype = torchDtype === undefined ? {} : 'dtype' in llama ? { dtype: torchDtype } : { torch_dtype: torchDtype }
  return {
    mm_vision_select_feature: 'patch',
    image_aspect_ratio: 'pad',
    tokenizer_model_max_length: 2048,
    ...llama,
    ...dtype,
    architectures: ['AlignGPTForCausalLM'],
    model_type: 'aligngpt',
    ...fields,
    tokenizer_padding_side: 'right',
    use_mm_proj: true,
  }
}

// Python tells 8 from 8.0, JavaScript does not, and versions of transformers refuse an integer for some of these.
const FLOAT_KEYS = [
  ...['initializer_range', 'initializer_factor', 'rms_norm_eps', 'layer_norm_eps', 'attention_dropout', 'dropout'],
  ...['rope_theta', '(?:\\w+_)?factor', 'logit_scale_init_value'],
]
const FLOATS = new RegExp(`"(${FLOAT_KEYS.join('|')})": (-?\\d+)(?=,?\\n)`, 'g')

/** Writes a config file atomically, with whole numbers as floats where Python expects floats. */
export function writeConfigFile(file: string, raw: RawConfig): void {
  writeAtomicText(file, `${JSON.stringify(raw, null, 2)}\n`.replace(FLOATS, '"$1": $2.0'))
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

// ---- preprocessing and generation -------------------------------------------------------------------------------------

const CLIP_MEAN: [number, number, number] = [0.48145466, 0.4578275, 0.40821073]
const CLIP_STD: [number, number, number] = [0.26862954, 0.26130258, 0.27577711]
const triple = z.tuple([z.number(), z.number(), z.number()])
const preprocessorSchema = z.object({
  size: or(
    z.union([size, z.object({ shortest_edge: size }).transform((s) => s.shortest_edge)], 'N or {"shortest_edge": N}'),
    224,
  ),
  crop_size: or(
    z.union(
      [
        size,
        z
          .object({ height: size, width: size })
          .refine((s) => s.height === s.width)
          .transform((s) => s.height),
      ],
      'N or {"height": N, "width": N}',
    ),
    224,
  ),
  image_mean: or(triple, CLIP_MEAN),
  image_std: or(z.tuple([positive, positive, positive]), CLIP_STD),
  resample: or(z.literal(3, 'bicubic (3)'), 3),
  rescale_factor: or(
    z.number().refine((x) => Math.abs(x * 255 - 1) < 1e-6, '1/255'),
    1 / 255,
  ),
  ...Object.fromEntries(
    ['do_resize', 'do_center_crop', 'do_normalize', 'do_rescale', 'do_convert_rgb'].map((k) => [
      k,
      or(z.literal(true), true),
    ]),
  ),
})

/** Validates the content of a preprocessor_config.json (CLIP's). @throws AlignGPTError ERR_CONFIG */
export function parsePreprocessorConfig(raw: RawConfig, file = 'preprocessor_config.json'): PreprocessorConfig {
  const c = check(preprocessorSchema, raw, file)
  if (c.crop_size > c.size) refuse(file, 'crop_size', `at most size ${c.size}`, c.crop_size)
  return { size: c.size, crop: c.crop_size, mean: c.image_mean, std: c.image_std, raw }
}

/**
 * Reads preprocessor_config.json of a folder; without one, CLIP's defaults.
 * @param imageSize the vision tower's picture side; when given, the crop must have it
 * @throws AlignGPTError ERR_CONFIG
 */
export function readPreprocessor(folder: string, imageSize?: number): PreprocessorConfig {
  const file = path.join(folder, 'preprocessor_config.json')
  const missing = imageSize !== undefined && !fs.existsSync(file)
  const raw = missing ? { size: imageSize, crop_size: imageSize } : readJsonObject(file)
  const c = parsePreprocessorConfig(raw, file)
  if (imageSize !== undefined && c.crop !== imageSize)
    refuse(file, 'crop_size', `the vision tower's image_size ${imageSize}`, c.crop)
  return c
}

const generationSchema = z.object({
  bos_token_id: maybe(id),
  eos_token_id: maybe(ids).transform((x) => x ?? []),
  pad_token_id: maybe(z.int()),
  max_new_tokens: maybe(size),
  do_sample: or(z.boolean(), false),
  temperature: or(z.number().nonnegative(), 1),
  top_k: or(count, 50),
  top_p: or(z.number().min(0).max(1), 1),
})

/** Reads generation_config.json of a folder; null when there is none. @throws AlignGPTError ERR_CONFIG */
export function readGenerationConfig(folder: string): GenerationConfig | null {
  if (!fs.existsSync(path.join(folder, 'generation_config.json'))) return null
  const { raw, file } = load(folder, 'generation_config.json')
  const { eos_token_id, ...rest } = check(generationSchema, raw, file)
  return { ...rest, eos_token_ids: eos_token_id }
}

/** config.json of a LLaMA, as transformers 4.x and 5.x write it. Absent and null keys mean the defaults of transformers. */
import { z } from 'zod'
import {
  checkConfig,
  id,
  ids,
  loadConfig,
  maybe,
  or,
  positive,
  type RawConfig,
  refuse,
  size,
} from '../../formats/zod-check.js'
import type { RopeConfig } from '../../nn/rope.js'
import type { LanguageModelConfig } from './language-model.js'
import { refuseQuantized, refuseUnknown } from './refused.js'

/** A LLaMA language model; names and defaults are transformers' LlamaConfig. */
export interface LlamaConfig extends LanguageModelConfig, RopeConfig {
  hidden_act: string
  rms_norm_eps: number
  attention_bias: boolean
  mlp_bias: boolean
}

const MAX_POSITIONS = 2048
const llamaSchema = z.object({
  vocab_size: or(size, 32000),
  hidden_size: or(size, 4096),
  intermediate_size: or(size, 11008),
  num_hidden_layers: or(size, 32),
  num_attention_heads: or(size, 32),
  num_key_value_heads: maybe(size),
  head_dim: maybe(size),
  hidden_act: or(z.string(), 'silu'),
  max_position_embeddings: or(size, MAX_POSITIONS),
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
/** Keys besides the schema's that the reader takes or that change nothing in a LLaMA. */
const KNOWN = [
  ...['rope_theta', 'rope_scaling', 'rope_parameters', 'partial_rotary_factor', 'sliding_window', 'use_sliding_window'],
  ...['max_window_layers', 'attention_dropout'],
]

/**
 * Base and scaling from either style, as transformers 5 takes them: `rope_scaling` (4.x) before `rope_parameters` (5.x), and a
 * base inside of it before the one beside it.
 */
function ropeOf(raw: RawConfig, file: string): Pick<LlamaConfig, 'rope_theta' | 'rope_scaling'> {
  const isGiven = (v: unknown): boolean => !!v && !(typeof v === 'object' && Object.keys(v).length === 0)
  const key = isGiven(raw.rope_scaling) || !isGiven(raw.rope_parameters) ? 'rope_scaling' : 'rope_parameters'
  const shape = z.object({ rope_theta: maybe(positive), rope_type: maybe(z.string()), type: maybe(z.string()) }).loose()
  const given = isGiven(raw[key]) ? checkConfig(shape, raw[key], file, key) : null
  const top = checkConfig(z.object({ rope_theta: or(positive, 10000) }), raw, file)
  const rope_theta = given?.rope_theta ?? top.rope_theta
  const partial = given?.partial_rotary_factor ?? raw.partial_rotary_factor ?? 1
  if (partial !== 1) refuse(file, `${key}.partial_rotary_factor`, '1', partial)
  const type = given?.rope_type ?? given?.type ?? 'default'
  if (type === 'default') return { rope_theta, rope_scaling: null }
  if (type !== 'llama3') refuse(file, `${key}.rope_type`, "'default' or 'llama3'", type)
  const length =
    raw.original_max_position_embeddings ??
    given?.original_max_position_embeddings ??
    raw.max_position_embeddings ??
    MAX_POSITIONS
  const scaling = checkConfig(llama3Schema, { ...given, original_max_position_embeddings: length }, file, key)
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
  refuseQuantized(raw, file)
  const c = checkConfig(llamaSchema, raw, file)
  refuseUnknown(raw, file, [...Object.keys(llamaSchema.shape), ...KNOWN])
  const { sliding_window: window } = raw
  if (window && raw.use_sliding_window !== false && !(Number(window) >= c.max_position_embeddings))
    refuse(file, 'sliding_window', `null, or at least max_position_embeddings ${c.max_position_embeddings}`, window)
  if (raw.attention_dropout) refuse(file, 'attention_dropout', '0', raw.attention_dropout)
  const t = checkConfig(llamaIds, raw, file)
  const heads = c.num_attention_heads
  if (c.head_dim === null && c.hidden_size % heads)
    refuse(file, 'hidden_size', `a multiple of num_attention_heads ${heads}`, c.hidden_size)
  const head_dim = c.head_dim ?? c.hidden_size / heads
  if (head_dim % 2) refuse(file, 'head_dim', 'an even number', head_dim)
  const num_key_value_heads = c.num_key_value_heads ?? heads
  if (heads % num_key_value_heads)
    refuse(file, 'num_key_value_heads', `a divisor of num_attention_heads ${heads}`, num_key_value_heads)
  if (c.hidden_act !== 'silu' && c.hidden_act !== 'swish') refuse(file, 'hidden_act', "'silu'", c.hidden_act)
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
  const { raw, file } = loadConfig(fileOrFolder, 'config.json')
  return parseLlamaConfig(raw, file)
}

/** generation_config.json: defaults of generation, as transformers reads them, and the ids that end an answer. */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { checkConfig, count, id, ids, loadConfig, maybe, or, refuse, size } from '../../formats/zod-check.js'

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

/** Settings of transformers that generation here has not, and the values with which they do nothing. */
const NONE = [null, false, 0]
const OTHERS: Record<string, readonly unknown[]> = {
  ...{
    repetition_penalty: [1, null],
    encoder_repetition_penalty: [1, null],
    typical_p: [1, null],
    num_beams: [1, null],
  },
  ...{ no_repeat_ngram_size: NONE, min_p: NONE, epsilon_cutoff: NONE, eta_cutoff: NONE, penalty_alpha: NONE },
  ...{ bad_words_ids: NONE, suppress_tokens: NONE, begin_suppress_tokens: NONE, sequence_bias: NONE },
  ...{ forced_bos_token_id: NONE, forced_eos_token_id: NONE, min_length: NONE, min_new_tokens: NONE },
  ...{
    guidance_scale: [1, null],
    exponential_decay_length_penalty: NONE,
    dola_layers: NONE,
    watermarking_config: NONE,
  },
}

/** Reads generation_config.json of a folder; null when there is none. @throws AlignGPTError ERR_CONFIG */
export function readGenerationConfig(folder: string): GenerationConfig | null {
  if (!fs.existsSync(path.join(folder, 'generation_config.json'))) return null
  const { raw, file } = loadConfig(folder, 'generation_config.json')
  for (const [key, idle] of Object.entries(OTHERS))
    if (raw[key] !== undefined && !idle.includes(raw[key]))
      refuse(file, key, 'nothing (generation here has no such setting; remove it)', raw[key])
  const { eos_token_id, ...rest } = checkConfig(generationSchema, raw, file)
  return { ...rest, eos_token_ids: eos_token_id }
}

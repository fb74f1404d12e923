/** generation_config.json: defaults of generation, as transformers reads them, and the ids that end an answer. */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { checkConfig, count, id, ids, loadConfig, maybe, or, size } from '../../formats/zod-check.js'

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

/** Reads generation_config.json of a folder; null when there is none. @throws AlignGPTError ERR_CONFIG */
export function readGenerationConfig(folder: string): GenerationConfig | null {
  if (!fs.existsSync(path.join(folder, 'generation_config.json'))) return null
  const { raw, file } = loadConfig(folder, 'generation_config.json')
  const { eos_token_id, ...rest } = checkConfig(generationSchema, raw, file)
  return { ...rest, eos_token_ids: eos_token_id }
}

/** How tokens are drawn: what the caller asks for, else what the model's folder says, else always the most likely one. */
import type { GenerationConfig } from '../models/config/generation.js'
import { mismatch, show } from '../util/errors.js'

export interface Sampling {
  /** 0: always the most likely token. Default generation_config.json's where that has `do_sample`, else 0 */
  temperature?: number
  /** 0: all. Default generation_config.json's where that has `do_sample`, else 0 */
  topK?: number
  /** 1: all. Default generation_config.json's where that has `do_sample`, else 1 */
  topP?: number
  /** default 0 */
  seed?: number
}

export interface GenerationSettings extends Required<Sampling> {
  /** longest answer */
  maxNewTokens: number
}

/** What each setting may be; also of the command line. */
export const SAMPLING_RANGES = {
  temperature: ['a number from 0 to 100', (x: number) => x >= 0 && x <= 100],
  topK: ['an integer >= 0', (x: number) => Number.isSafeInteger(x) && x >= 0],
  topP: ['a number above 0, at most 1', (x: number) => x > 0 && x <= 1],
  seed: ['an integer >= 0', (x: number) => Number.isSafeInteger(x) && x >= 0],
  maxNewTokens: ['an integer > 0', (x: number) => Number.isSafeInteger(x) && x > 0],
} as const satisfies Record<keyof GenerationSettings, readonly [string, (x: number) => boolean]>

/** Tokens of an answer where nobody says how many. */
const MAX_NEW_TOKENS = 256

/**
 * What an answer is made with. As in transformers, a folder's temperature, top_k and top_p count only beside its `do_sample`.
 * @param config generation_config.json of the model's folder
 * @param asked what the caller gives; each counts more than the folder's
 * @throws AlignGPTError ERR_ARGUMENT naming the setting and its range
 */
export function generationSettings(
  config: GenerationConfig | null,
  asked: Partial<GenerationSettings>,
): GenerationSettings {
  for (const [key, [expected, fits]] of Object.entries(SAMPLING_RANGES)) {
    const value: unknown = asked[key as keyof GenerationSettings]
    if (value !== undefined && !(typeof value === 'number' && fits(value)))
      throw mismatch('ERR_ARGUMENT', 'generate', key, expected, show(value))
  }
  const own = config?.do_sample ? config : { temperature: 0, top_k: 0, top_p: 1 }
  return {
    temperature: asked.temperature ?? own.temperature,
    topK: asked.topK ?? own.top_k,
    topP: asked.topP ?? own.top_p,
    seed: asked.seed ?? 0,
    maxNewTokens: asked.maxNewTokens ?? config?.max_new_tokens ?? MAX_NEW_TOKENS,
  }
}

/**
 * Names of tensors in the checkpoint layouts of others: LLaVA 1.5 as the official code writes it, llava-hf (transformers'
 * LlavaForConditionalGeneration) and the official AlignGPT, which is this package's own. All that differ are in NAMES; settings are
 * in settings.ts.
 */
import { isConstant } from './unread.js'

export const FORMATS = ['aligngpt', 'llava', 'llava-hf'] as const
export type Format = (typeof FORMATS)[number]

/** The vision tower in an AlignGPT; a CLIP has `vision_model.` in its place. */
export const VISION = 'vision_tower.vision_tower.vision_model.'

/** The token embeddings [V, H]. */
export const EMBED_TOKENS = 'model.embed_tokens.weight'
/** The table of alignment vectors [N, H]. */
export const TABLE = 'align_indicators.indicator_embs'

/** A beginning of our names, how LLaVA's and llava-hf's files write it, and what other versions of them wrote. */
interface Row {
  ours: string
  llava?: string
  hf?: string
  also?: string[]
}
const NAMES: readonly Row[] = [
  { ours: 'model.', llava: 'model.', hf: 'language_model.model.', also: ['model.language_model.'] },
  { ours: 'lm_head.', llava: 'lm_head.', hf: 'language_model.lm_head.' },
  { ours: 'mm_projector.', llava: 'model.mm_projector.' },
  {
    ours: 'mm_projector.0.',
    hf: 'multi_modal_projector.linear_1.',
    also: ['model.multi_modal_projector.linear_1.'],
  },
  {
    ours: 'mm_projector.2.',
    hf: 'multi_modal_projector.linear_2.',
    also: ['model.multi_modal_projector.linear_2.'],
  },
  {
    ours: VISION,
    llava: `model.${VISION}`,
    hf: 'vision_tower.vision_model.',
    also: ['vision_tower.', 'model.vision_tower.', 'model.vision_tower.vision_model.'],
  },
  { ours: 'align_indicators.', also: ['model.align_indicators.'] },
  { ours: 'gated_weight_layer.', also: ['model.gated_weight_layer.'] },
]
/** What trainers put in front of names: PEFT, DataParallel, torch.compile. */
const WRAPPERS = /^((base_model\.model|module|_orig_mod)\.)+/

/** A name without what trainers put in front of it. */
export const withoutWrappers = (name: string): string => name.replace(WRAPPERS, '')

const longest = (rows: [from: string, to: string][]): [string, string][] => rows.sort(([a], [b]) => b.length - a.length)
const renamed = (name: string, rows: readonly [string, string][]): string | null => {
  const row = rows.find(([from]) => name.startsWith(from))
  return row ? row[1] + name.slice(row[0].length) : null
}

const READ = longest(
  NAMES.flatMap(({ ours, llava, hf, also = [] }) =>
    [ours, llava, hf, ...also].filter((n) => n !== undefined).map((n): [string, string] => [n, ours]),
  ),
)
const WRITE: Record<Format, [string, string][]> = {
  aligngpt: longest(NAMES.map(({ ours }) => [ours, ours])),
  llava: longest(NAMES.flatMap(({ ours, llava }) => (llava ? [[ours, llava]] : []))),
  'llava-hf': longest(NAMES.flatMap(({ ours, hf }) => (hf ? [[ours, hf]] : []))),
}

/**
 * This package's name of a tensor of any of the layouts, whichever it is: their beginnings exclude each other.
 * @returns null for a constant, which is no weight, and undefined for a name that no layout has
 */
export const ourName = (name: string): string | null | undefined =>
  isConstant(name) ? null : (renamed(withoutWrappers(name), READ) ?? undefined)
/** A layout's name of one of our tensors; null where it has no such tensor. */
export const nameIn = (format: Format, name: string): string | null => renamed(name, WRITE[format])

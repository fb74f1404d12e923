/** adapter_config.json as PEFT writes it: what of it changes an adapter is read, or refused by name. */
import { z } from 'zod'
import { checkConfig, count, maybe, or, positive, readJsonObject, refuse, size } from '../../formats/zod-check.js'

/** What an adapter's file says of the matrices it is for; a module's name is that of the file, without PEFT's own prefix. */
export interface AdapterConfig {
  /** r, and what the update counts */
  scale(module: string): { rank: number; scaling: number }
  /** whether PEFT would give the module an adapter */
  takes(module: string): boolean
  /** modules whose weights are in the file as a whole */
  saved: readonly string[]
}

/** Initialisations that leave the base model as it is. */
const INITS = ['gaussian', 'eva', 'orthogonal']
const names = z.union([z.string(), z.array(z.string())], 'a pattern or a list of names')
const adapterSchema = z.object({
  peft_type: z.literal('LORA', "'LORA'"),
  r: size,
  lora_alpha: positive,
  use_rslora: or(z.boolean(), false),
  rank_pattern: or(z.record(z.string(), size), {}),
  alpha_pattern: or(z.record(z.string(), positive), {}),
  bias: or(z.literal('none', "'none'"), 'none'),
  init_lora_weights: or(
    z.union(
      [z.boolean(), z.string().refine((s) => INITS.includes(s.toLowerCase()))],
      `true, false, ${INITS.join(', ')} (others change the base model: PEFT's save_pretrained converts them)`,
    ),
    true,
  ),
  target_modules: maybe(names),
  exclude_modules: maybe(names),
  layers_to_transform: maybe(z.union([count.transform((x) => [x]), z.array(count)], 'layers')),
  modules_to_save: or(z.array(z.string()), []),
})
/**
 * Keys that change nothing here: what the file is and who wrote it, training, settings of what other keys turn on, and
 * fan_in_fan_out, which PEFT itself takes back for the matrices that a language model has.
 */
const IDLE = [
  ...[
    'task_type',
    'inference_mode',
    'base_model_name_or_path',
    'auto_mapping',
    'peft_version',
    'revision',
    'lora_dropout',
  ],
  ...['layers_pattern', 'fan_in_fan_out', 'runtime_config', 'megatron_core', 'qalora_group_size'],
  ...['loftq_config', 'eva_config', 'corda_config', 'lora_ga_config'],
]
const isNothing = (v: unknown): boolean =>
  v === null || v === false || v === '' || (typeof v === 'object' && Object.keys(v as object).length === 0)

/** A pattern of Python as a test of a whole name; null where it is none that this language has too. */
function pattern(source: string): RegExp | null {
  try {
    return new RegExp(`^(?:${source})$`, 's')
  } catch {
    return null
  }
}
/** Whether a module is one of the names, or matches the pattern, as PEFT has it. */
function isNamed(module: string, by: string | readonly string[]): boolean {
  if (typeof by === 'string') return by === 'all-linear' || (pattern(by)?.test(module) ?? true)
  return by.some((t) => module === t || module.endsWith(`.${t}`))
}

/** Reads an adapter_config.json. @throws AlignGPTError ERR_CONFIG naming the key */
export function readAdapterConfig(file: string): AdapterConfig {
  const raw = readJsonObject(file)
  const c = checkConfig(adapterSchema, raw, file)
  for (const [key, value] of Object.entries(raw))
    if (!Object.hasOwn(adapterSchema.shape, key) && !IDLE.includes(key) && !isNothing(value))
      refuse(file, key, 'nothing (this package has no such adapters)', value)
  /** a value of its own for a module whose name ends so */
  const own = (patterns: Record<string, number>, module: string, usual: number): number =>
    Object.entries(patterns).find(([key]) => pattern(`(.*\\.)?(${key})`)?.test(module))?.[1] ?? usual
  return {
    scale: (module) => {
      const rank = own(c.rank_pattern, module, c.r)
      const alpha = own(c.alpha_pattern, module, c.lora_alpha)
      return { rank, scaling: alpha / (c.use_rslora ? Math.sqrt(rank) : rank) }
    },
    takes: (module) => {
      const layer = Number(/\.layers\.(\d+)\./.exec(module)?.[1])
      const inLayers = c.layers_to_transform === null || c.layers_to_transform.includes(layer)
      const excluded = c.exclude_modules !== null && isNamed(module, c.exclude_modules)
      return inLayers && !excluded && (c.target_modules === null || isNamed(module, c.target_modules))
    },
    saved: c.modules_to_save,
  }
}

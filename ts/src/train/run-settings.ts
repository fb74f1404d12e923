/**
 * The settings of a training run. One table makes the flags of `pretrain` and `finetune`, the keys of a config file, its schema and docs/config.md;
 * what is given in several places counts in this order: flag, --set, config file, preset, default.
 */
import fs from 'node:fs'
import { type Command, InvalidArgumentError, Option } from 'commander'
import { mismatch, show } from '../util/errors.js'

type PhaseName = 'pretrain' | 'finetune'
/** What a setting may be; each has its flag's parser and its schema. */
type Kind =
  | 'text'
  | 'count'
  | 'whole'
  | 'integer'
  | 'number'
  | 'switch'
  | 'list'
  | 'interval'
  | 'folder'
  | readonly string[]

export interface Setting {
  /** lora.rank is the key rank in the section lora, and the flag --lora-rank */
  key: string
  kind: Kind
  help: string
  /** stands for the value in --help */
  value?: string
  /** of this phase alone */
  phase?: PhaseName
  /** what the library takes when it is not given */
  default?: unknown
}

/** In the order of --help. */
export const SETTINGS: readonly Setting[] = [
  { key: 'data', kind: 'text', value: 'file', help: 'LLaVA JSON, JSON lines or Parquet' },
  {
    ...{ key: 'images', kind: 'text', value: 'dir' },
    help: 'folder of the pictures, or shards/{00000..00009}.tar (default: those in the Parquet file)',
  },
  { key: 'out', kind: 'text', value: 'dir', help: 'where the model, its log and checkpoints go' },
  { key: 'model', kind: 'text', value: 'dir', help: 'AlignGPT folder to start from' },
  { key: 'llm', kind: 'text', value: 'dir', phase: 'pretrain', help: 'or LLaMA in Hugging Face layout, with clip' },
  {
    key: 'clip',
    kind: 'text',
    value: 'dir',
    help: "CLIP in Hugging Face layout; beside model: the vision tower's settings",
  },
  { key: 'levels', kind: 'count', phase: 'pretrain', default: 8, help: 'number of alignment levels' },
  {
    ...{ key: 'projector', kind: 'text', value: 'type', phase: 'pretrain', default: 'mlp2x_gelu' },
    help: 'linear, mlpNx_gelu or identity',
  },
  {
    ...{ key: 'selectLayer', kind: 'integer', phase: 'pretrain', default: -2 },
    help: 'hidden state of the CLIP that the projector sees (-1: the last)',
  },
  {
    ...{ key: 'selectFeature', kind: ['patch', 'cls_patch'], phase: 'pretrain', default: 'patch' },
    help: 'which rows of it: the patches, or the class row too',
  },
  {
    ...{ key: 'alignment', kind: ['adaptive', 'local', 'global', 'average', 'random', 'none'] },
    help: "how the alignment vector is made (default: the model's, adaptive for a new one)",
  },
  { key: 'gate', kind: ['mlp', 'linear'], help: "form of the gate (default: the model's, mlp for a new one)" },
  {
    key: 'gateText',
    kind: ['all', 'instruction'],
    help: "what the gate sees in training (default: the model's, or all)",
  },
  {
    key: 'lora.rank',
    kind: 'count',
    phase: 'finetune',
    help: 'train low-rank adapters in place of the language model',
  },
  { key: 'lora.alpha', kind: 'number', phase: 'finetune', help: 'they count alpha / rank (default: 2 rank)' },
  {
    ...{ key: 'lora.targets', kind: 'list', value: 'names', phase: 'finetune' },
    help: 'modules such as q_proj (default: all matrices of the layers)',
  },
  { key: 'batch', kind: 'count', help: 'samples of a step (default: 256 in pre-training, 128 in instruction tuning)' },
  { key: 'microBatch', kind: 'count', help: 'samples run at once (default: 16 at most)' },
  { key: 'lr', kind: 'number', help: 'peak learning rate (default: 1e-3 and 2e-5; adapters 2e-4)' },
  { key: 'projectorLr', kind: 'number', help: 'of the projector (default: lr; beside adapters 2e-5)' },
  { key: 'epochs', kind: 'count', help: 'passes over the data (default: 1)' },
  { key: 'steps', kind: 'count', help: 'instead of epochs' },
  { key: 'warmupRatio', kind: 'number', default: 0.03, help: 'share of the steps in which the rate rises' },
  { key: 'weightDecay', kind: 'number', default: 0, help: 'decoupled weight decay' },
  { key: 'clipGradNorm', kind: 'number', default: 1, help: 'largest gradient norm' },
  {
    key: 'lossNorm',
    kind: ['batch', 'micro'],
    default: 'batch',
    help: 'mean over the step, or of the means of its micro-batches',
  },
  { key: 'dtype', kind: ['f32', 'bf16'], default: 'f32', help: 'of the weights' },
  { key: 'device', kind: ['auto', 'cpu', 'cuda'], default: 'auto', help: 'where the model is' },
  { key: 'recompute', kind: 'switch', help: 'less memory, one more forward pass' },
  {
    ...{ key: 'optimizerState', kind: ['full', 'compact'], default: 'full' },
    help: 'of bf16 weights: 18 bytes each, or 10',
  },
  { key: 'offloadOptimizer', kind: 'switch', help: "the optimizer's state of a model on a GPU stays in main memory" },
  { key: 'seed', kind: 'whole', default: 0, help: 'of order and new weights' },
  { key: 'groupByLength', kind: 'switch', help: 'batches of similar lengths' },
  { key: 'augment', kind: 'switch', help: 'mild augmentation of the pictures' },
  { key: 'workers', kind: 'whole', help: 'threads that decode pictures (default: by the machine)' },
  { key: 'maxBad', kind: 'number', default: 0.01, help: 'share of records that may be unusable' },
  { key: 'saveEvery', kind: 'interval', help: 'steps, or a time such as 10m, between checkpoints (default: 30m)' },
  { key: 'keep', kind: 'count', default: 2, help: 'newest checkpoints that stay' },
  { key: 'allowLongInterval', kind: 'switch', help: 'an interval longer than the run is no mistake' },
  { key: 'evalShare', kind: 'number', help: 'share of the records that is held out and evaluated' },
  { key: 'evalData', kind: 'text', value: 'file', help: 'or a data file to evaluate' },
  { key: 'evalImages', kind: 'text', value: 'dir', help: 'its pictures (default: images)' },
  { key: 'evalEvery', kind: 'count', help: 'steps between evaluations (default: a tenth of the run)' },
  { key: 'skipOutliers', kind: 'switch', help: 'leave out steps whose loss or gradient is far above those before' },
  { key: 'tensorboard', kind: 'switch', help: 'TensorBoard event files in out, beside log.jsonl' },
  { key: 'resume', kind: 'folder', help: 'go on from the last checkpoint, of out or of another run' },
]

/** Settings by key, sections as objects. */
export type Values = Record<string, unknown>

/** The paper's batch and rate are the phases' own; these are the ways to fit them into one 80 GB card. */
const CARD: Values = { dtype: 'bf16', optimizerState: 'compact', recompute: true, evalShare: 0.001 }

/** Ready settings: small towers as the quickstart's, and the paper's two models (section 4.1; LLaVA-1.5's scripts) on one 80 GB card. */
export const PRESETS = {
  tiny: {
    pretrain: { batch: 64, lr: 4e-3, augment: true },
    finetune: { batch: 32, microBatch: 32, lr: 1.5e-3, augment: true },
  },
  '7b': {
    pretrain: { ...CARD, batch: 256, microBatch: 16, lr: 1e-3 },
    finetune: { ...CARD, batch: 128, microBatch: 4, lr: 2e-5, groupByLength: true },
  },
  '13b': {
    pretrain: { ...CARD, batch: 256, microBatch: 8, lr: 1e-3 },
    finetune: { ...CARD, batch: 128, microBatch: 2, lr: 2e-5, groupByLength: true, offloadOptimizer: true },
  },
} as const satisfies Record<string, Record<PhaseName, Values>>
export type Preset = keyof typeof PRESETS

export const settingsOf = (phase: PhaseName): Setting[] => SETTINGS.filter((s) => (s.phase ?? phase) === phase)

/** saveEvery -> --save-every, lora.rank -> --lora-rank */
export const flagOf = ({ key }: Setting): string =>
  `--${key.replace('.', '-').replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`)}`
/** As commander names it. */
const attributeOf = ({ key }: Setting): string => key.replace(/\.(.)/, (_, c) => c.toUpperCase())

const EXPECTED: Record<Exclude<Kind, readonly string[]>, string> = {
  text: 'text',
  count: 'an integer > 0',
  whole: 'an integer >= 0',
  integer: 'an integer',
  number: 'a number >= 0',
  switch: 'true or false',
  list: 'a list of names',
  interval: "steps, or a time such as '10m'",
  folder: 'true, false or a folder',
}
export const expectedOf = ({ kind }: Setting): string =>
  typeof kind === 'string' ? EXPECTED[kind] : kind.join(', ').replace(/, ([^,]*)$/, ' or $1')

const isText = (v: unknown): boolean => typeof v === 'string' && v !== ''
const ACCEPTS: Record<Exclude<Kind, readonly string[]>, (v: unknown) => boolean> = {
  text: isText,
  count: (v) => Number.isInteger(v) && (v as number) > 0,
  whole: (v) => Number.isInteger(v) && (v as number) >= 0,
  integer: Number.isInteger,
  number: (v) => Number.isFinite(v) && (v as number) >= 0,
  switch: (v) => typeof v === 'boolean',
  list: (v) => Array.isArray(v) && v.length > 0 && v.every(isText),
  interval: (v) => ACCEPTS.count(v) || (typeof v === 'string' && /^\d+(\.\d+)?(s|m|h)$/.test(v)),
  folder: (v) => typeof v === 'boolean' || isText(v),
}
const accepts = ({ kind }: Setting, v: unknown): boolean =>
  typeof kind === 'string' ? ACCEPTS[kind](v) : kind.includes(v as string)

/** The value of a flag's text. */
function parsed(s: Setting, text: string): unknown {
  const numeric = typeof s.kind === 'string' && ['count', 'whole', 'integer', 'number', 'interval'].includes(s.kind)
  const value = numeric && text.trim() !== '' && Number.isFinite(Number(text)) ? Number(text) : text
  if (!accepts(s, value)) throw new InvalidArgumentError(`expected ${expectedOf(s)}`)
  return value
}

function optionOf(s: Setting): Option {
  const help = s.default === undefined ? s.help : `${s.help} (default: ${s.default})`
  const option = (value: string): Option => new Option(`${flagOf(s)}${value}`, help)
  if (s.kind === 'switch') return option('')
  if (s.kind === 'folder') return option(' [dir]')
  if (s.kind === 'list') return option(` <${s.value}...>`)
  const choice = typeof s.kind !== 'string'
  const made = option(` <${s.value ?? (choice ? 'name' : s.kind === 'interval' ? 'interval' : 'n')}>`)
  return choice ? made.choices([...s.kind]) : made.argParser((text) => parsed(s, text))
}

/** Flags of a training command. */
export function settingsOptions(command: Command, phase: PhaseName): Command {
  for (const s of settingsOf(phase)) {
    command.addOption(optionOf(s))
    if (s.kind === 'switch') command.addOption(new Option(flagOf(s).replace('--', '--no-')).hideHelp())
  }
  return configOptions(command)
}

/** Where settings come from besides their flags. */
export function configOptions(command: Command): Command {
  const collect = (text: string, before: string[] = []): string[] => [...before, text]
  return command
    .option('--config <file>', 'settings as YAML or JSON; flags count more')
    .addOption(
      new Option('--preset <name>', 'ready settings; config and flags count more').choices(Object.keys(PRESETS)),
    )
    .option('--set <key=value>', 'a setting as the config file has it, such as lora.rank=64; repeatable', collect)
}

/** Where given settings are; `flags` as commander parsed them. */
export interface Given {
  config?: string
  preset?: string
  set?: string[]
  flags?: Values
}

/** A setting takes the place of its alternative from a place that counts less: a preset holds records out, a flag names a file. */
const ALTERNATIVES: Record<string, string> = {
  ...{ evalData: 'evalShare', evalShare: 'evalData' },
  ...{ steps: 'epochs', epochs: 'steps' },
}

const sections = new Set(SETTINGS.filter((s) => s.key.includes('.')).map((s) => s.key.split('.')[0]))
const isSection = (v: unknown): v is Values => typeof v === 'object' && v !== null && !Array.isArray(v)

/** { lora: { rank: 8 } } -> [['lora.rank', 8]] */
function* flat(values: Values): Generator<[string, unknown]> {
  for (const [key, v] of Object.entries(values))
    if (sections.has(key) && isSection(v)) for (const [k, inner] of Object.entries(v)) yield [`${key}.${k}`, inner]
    else yield [key, v]
}

function put(values: Values, key: string, v: unknown): void {
  const [section, ...names] = key.split('.')
  if (names.length) values[section] = { ...(values[section] as Values), [names.join('.')]: v }
  else values[key] = v
}

/** @throws ERR_CONFIG naming the place, the key, and the nearest one there is, or what its value should be */
async function checked(where: string, values: Values, phase: PhaseName): Promise<[string, unknown][]> {
  const known = new Map(settingsOf(phase).map((s) => [s.key, s]))
  const out: [string, unknown][] = []
  for (const [key, v] of flat(values)) {
    const setting = known.get(key)
    if (!setting) throw await unknownKey(where, key, phase, [...known.keys()])
    if (!accepts(setting, v)) throw mismatch('ERR_CONFIG', 'config', `${where}: ${key}`, expectedOf(setting), show(v))
    out.push([key, v])
  }
  return out
}

async function unknownKey(where: string, key: string, phase: PhaseName, known: string[]): Promise<Error> {
  const fail = (expected: string): Error => mismatch('ERR_CONFIG', 'config', where, expected, show(key))
  const inside = known.filter((k) => k.startsWith(`${key}.`))
  if (inside.length) return fail(`values for ${inside.join(', ')}`)
  const { default: distance } = await import('leven')
  const other = SETTINGS.some((s) => s.key === key) ? `a key of ${phase}` : 'a known key'
  const far = (k: string): number => distance(key.toLowerCase(), k.toLowerCase())
  const near = [...known, 'preset', 'phase'].reduce((a, b) => (far(b) < far(a) ? b : a))
  return fail(`${other} (the nearest: ${near})`)
}

/** What a file or --set says: settings, a preset, the phase it is for. */
interface Said {
  phase?: PhaseName
  preset?: Preset
  values: Values
}

function said(where: string, content: Values, phase?: PhaseName): Said {
  const { preset, phase: own, ...values } = content
  if (own !== undefined && !(phase ? own === phase : own === 'pretrain' || own === 'finetune'))
    throw mismatch('ERR_CONFIG', 'config', `${where}: phase`, phase ?? 'pretrain or finetune', show(own))
  if (preset !== undefined && !Object.hasOwn(PRESETS, preset as string))
    throw mismatch('ERR_CONFIG', 'config', `${where}: preset`, Object.keys(PRESETS).join(', '), show(preset))
  return { phase: own as PhaseName | undefined, preset: preset as Preset | undefined, values }
}

/** What a file says; of this phase, if it names one. */
export async function readConfig(file: string, phase?: PhaseName): Promise<Said> {
  const { parse } = await import('yaml')
  let content: unknown
  try {
    content = parse(fs.readFileSync(file, 'utf8')) ?? {}
  } catch (e) {
    throw mismatch('ERR_CONFIG', 'config', file, 'readable YAML or JSON', (e as Error).message.split('\n')[0])
  }
  if (!isSection(content)) throw mismatch('ERR_CONFIG', 'config', file, 'keys and values', show(content))
  return said(file, content, phase)
}

async function readSet(list: readonly string[], phase: PhaseName): Promise<Said> {
  const { parse } = await import('yaml')
  const content: Values = {}
  for (const text of list) {
    const at = text.indexOf('=')
    if (at <= 0) throw mismatch('ERR_CONFIG', 'config', '--set', 'key=value', show(text))
    put(content, text.slice(0, at).trim(), parse(text.slice(at + 1)))
  }
  return said('--set', content, phase)
}

/**
 * The settings of a run from all places; the library knows the defaults of the rest.
 * @throws AlignGPTError ERR_CONFIG
 */
export async function resolveSettings(phase: PhaseName, g: Given): Promise<Values> {
  const file: Said = g.config === undefined ? { values: {} } : await readConfig(g.config, phase)
  const set = await readSet(g.set ?? [], phase)
  const preset = g.preset ?? set.preset ?? file.preset
  const flags: Values = {}
  for (const s of settingsOf(phase)) {
    const v = g.flags?.[attributeOf(s)]
    if (v !== undefined) put(flags, s.key, v)
  }
  const layers: [string, Values][] = [
    [`preset ${preset}`, preset === undefined ? {} : PRESETS[preset as Preset][phase]],
    [g.config ?? '', file.values],
    ['--set', set.values],
    ['flags', flags],
  ]
  const values: Values = {}
  for (const [where, layer] of layers) {
    const given = await checked(where, layer, phase)
    for (const [key] of given) if (ALTERNATIVES[key]) delete values[ALTERNATIVES[key]]
    for (const [key, v] of given) put(values, key, v)
  }
  return values
}

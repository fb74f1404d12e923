/**
 * The settings of a training run, in one table. From its rows come the types and checks of the library's options, the defaults of
 * each phase, and in cli/settings.ts the flags of `pretrain` and `finetune`, the keys of a config file and docs/config.md.
 * Nothing is imported here that takes time: `--help` shows the table.
 */
import {
  ALIGNMENTS,
  GATE_TEXTS,
  GATES,
  MODEL_DEFAULTS,
  PROJECTORS,
  projectorDepth,
  SELECT_FEATURES,
} from '../models/config/variants.js'
import { isAllLinear, type LoraTargets } from '../nn/lora-targets.js'
import { CHAT_STYLES } from '../processing/conversation/styles.js'
import { show } from '../util/errors.js'
import { OUTLIER_RANGES, type OutlierOptions } from './outliers.js'

export type PhaseName = 'pretrain' | 'finetune'

/** What a setting may be. */
interface Kind<T> {
  /** completes "expected ..." */
  expected: string
  accepts(v: unknown): v is T
  /** the only values there are */
  choices?: readonly T[]
  /** how a flag takes it: one value (default), none, some, or one that may be left out */
  flag?: 'switch' | 'list' | 'optional'
  /** stands for the value in --help */
  value?: string
}
const kind = <T>(expected: string, accepts: (v: unknown) => boolean, more: Partial<Kind<T>> = {}): Kind<T> => ({
  ...more,
  expected,
  accepts: accepts as Kind<T>['accepts'],
})
const isText = (v: unknown): boolean => typeof v === 'string' && v !== ''
const isNumber = (v: unknown): v is number => typeof v === 'number' && Number.isFinite(v)
const isTable = (v: unknown): v is Record<string, unknown> => typeof v === 'object' && v !== null && !Array.isArray(v)

const text = (value: string): Kind<string> => kind('text', isText, { value })
const integer = kind<number>('an integer', Number.isSafeInteger)
const from = (least: number, expected: string): Kind<number> =>
  kind(expected, (v) => integer.accepts(v) && v >= least, { value: 'n' })
const count = from(1, 'an integer > 0')
const upTo = (most: number): Kind<number> =>
  kind(`an integer from 0 to ${most}`, (v) => integer.accepts(v) && v >= 0 && v <= most, { value: 'n' })
const positive = kind<number>('a number > 0', (v) => isNumber(v) && v > 0)
const share = kind<number>('a number between 0 and 1', (v) => isNumber(v) && v > 0 && v < 1)
const wholeShare = kind<number>('a number from 0 to 1', (v) => isNumber(v) && v >= 0 && v <= 1)
const switches: Kind<boolean> = kind('true or false', (v) => typeof v === 'boolean', { flag: 'switch' })
const oneOf = <const T extends string>(choices: readonly T[]): Kind<T> =>
  kind(choices.join(', ').replace(/, ([^,]*)$/, ' or $1'), (v) => choices.includes(v as T), { choices, value: 'name' })
/** null, where it means never */
const orNever = <T>(of: Kind<T>): Kind<T | null> =>
  kind(of.expected, (v) => v === null || of.accepts(v), { value: of.value })

const UNITS: Record<string, number> = { s: 1000, m: 60_000, h: 3_600_000 }
/** Steps, or milliseconds of a time such as '10m'; null for what is neither. */
export function intervalOf(value: unknown): { steps: number } | { ms: number } | null {
  const said = typeof value === 'string' || typeof value === 'number' ? String(value) : ''
  const [, digits, unit] = /^(\d+(?:\.\d+)?)([smh]?)$/.exec(said) ?? []
  const n = Number(digits)
  if (n > 0 && unit) return { ms: n * UNITS[unit] }
  return n > 0 && Number.isInteger(n) ? { steps: n } : null
}
const interval = kind<number | string>("steps, or a time such as '10m'", (v) => intervalOf(v) !== null, {
  value: 'interval',
})
const folder = kind<boolean | string>('true, false or a folder', (v) => typeof v === 'boolean' || isText(v), {
  ...{ flag: 'optional', value: 'dir' },
})
const targets = kind<LoraTargets>(
  "a list of names, or 'all-linear'",
  (v) => isAllLinear(v) || (Array.isArray(v) && v.length > 0 && v.every(isText)),
  { flag: 'list', value: 'names' },
)
const isOutlierOption = ([key, x]: [string, unknown]): boolean =>
  Object.hasOwn(OUTLIER_RANGES, key) && isNumber(x) && OUTLIER_RANGES[key as keyof OutlierOptions][1](x)
const ranges = Object.entries(OUTLIER_RANGES).map(([key, [expected]]) => `${key} (${expected})`)
const outliers = kind<boolean | OutlierOptions>(
  `true, false, or some of ${ranges.join(', ')}`,
  (v) => typeof v === 'boolean' || (isTable(v) && Object.entries(v).every(isOutlierOption)),
  { flag: 'switch' },
)
const projector = kind<string>(PROJECTORS, (v) => typeof v === 'string' && projectorDepth(v) !== null, {
  value: 'type',
})

/** Adapters beside the language model learn faster than it would (LLaVA's rate); the projector beside them does not. */
export const ADAPTER_LR = 2e-4

interface Row {
  kind: Kind<unknown>
  help: string
  /** what it belongs to besides the run itself: the data, the model that is made or loaded, or the place where it is */
  of?: 'data' | 'model' | 'place'
  /** of this phase alone */
  phase?: PhaseName
  /** what holds when it is not given, for each phase where they differ */
  default?: string | number | boolean | Record<PhaseName, string | number>
  /** of two settings that say the same in different words, the other one */
  instead?: string
}

/** Keys with a dot are those of a section; the rows are in the order of --help. */
export const RUN_SETTINGS = {
  data: { kind: text('file'), of: 'data', help: 'LLaVA JSON, JSON lines or Parquet' },
  images: {
    ...{ kind: text('dir'), of: 'data' },
    help: 'folder of the images, or shards/{00000..00009}.tar (default: those in the Parquet file)',
  },
  followLinks: {
    ...{ kind: switches, of: 'data', default: false },
    help: 'links in the folder of the images may lead out of it',
  },
  out: { kind: text('dir'), help: 'where the model, its log and checkpoints go' },
  model: { kind: text('dir'), of: 'model', help: 'AlignGPT folder to start from' },
  llm: {
    ...{ kind: text('dir'), of: 'model', phase: 'pretrain' },
    help: 'or LLaMA in Hugging Face layout, with clip',
  },
  clip: {
    ...{ kind: text('dir'), of: 'model' },
    help: "CLIP in Hugging Face layout; beside model: the vision tower's settings",
  },
  levels: {
    ...{ kind: from(2, 'an integer >= 2'), of: 'model', phase: 'pretrain', default: MODEL_DEFAULTS.levels },
    help: 'number of alignment levels',
  },
  projector: {
    ...{ kind: projector, of: 'model', phase: 'pretrain', default: MODEL_DEFAULTS.projector },
    help: 'from vision features to the width of the language model',
  },
  selectLayer: {
    ...{ kind: integer, of: 'model', phase: 'pretrain', default: MODEL_DEFAULTS.selectLayer },
    help: 'hidden state of the CLIP that the projector sees (-1: the last)',
  },
  selectFeature: {
    ...{ kind: oneOf(SELECT_FEATURES), of: 'model', phase: 'pretrain', default: MODEL_DEFAULTS.selectFeature },
    help: 'which rows of it: the patches, or the class row too',
  },
  alignment: {
    ...{ kind: oneOf(ALIGNMENTS), of: 'model' },
    help: `how the alignment vector is made (default: the model's, ${MODEL_DEFAULTS.alignment} for a new one)`,
  },
  gate: {
    ...{ kind: oneOf(GATES), of: 'model' },
    help: `form of the gate (default: the model's, ${MODEL_DEFAULTS.gate} for a new one)`,
  },
  gateText: {
    kind: oneOf(GATE_TEXTS),
    help: `text that the gate sees in training (default: the model's, or ${MODEL_DEFAULTS.gateText})`,
  },
  conversation: {
    kind: oneOf(CHAT_STYLES),
    help: "style of instruction tuning and of answers; the model keeps it (default: the model's)",
  },
  exifOrientation: {
    ...{ kind: switches, of: 'model' },
    help: "turn images as their EXIF says; the model keeps it (default: the model's, false for a new one)",
  },
  'lora.rank': {
    ...{ kind: count, phase: 'finetune' },
    help: 'train low-rank adapters in place of the language model',
  },
  'lora.alpha': { kind: positive, phase: 'finetune', help: 'they count alpha / rank (default: 2 rank)' },
  'lora.targets': {
    ...{ kind: targets, phase: 'finetune' },
    help: 'modules such as q_proj (default: all-linear, every matrix of the layers)',
  },
  batch: { kind: count, default: { pretrain: 256, finetune: 128 }, help: 'samples of a step' },
  microBatch: { kind: count, default: 16, help: 'samples run at once, at most those of a step' },
  lr: {
    ...{ kind: wholeShare, default: { pretrain: 1e-3, finetune: 2e-5 } },
    help: `peak learning rate (of adapters: ${ADAPTER_LR})`,
  },
  projectorLr: { kind: wholeShare, help: 'of the projector (default: lr; beside adapters the rate without them)' },
  epochs: { kind: count, default: 1, instead: 'steps', help: 'passes over the data' },
  steps: { kind: count, instead: 'epochs', help: 'instead of epochs' },
  warmupRatio: { kind: wholeShare, default: 0.03, help: 'share of the steps in which the rate rises' },
  weightDecay: { kind: wholeShare, default: 0, help: 'decoupled weight decay' },
  clipGradNorm: { kind: orNever(positive), default: 1, help: 'largest gradient norm; null: any' },
  lossNorm: {
    ...{ kind: oneOf(['batch', 'micro']), default: 'batch' },
    help: 'mean over the step, or of the means of its micro-batches, as in the official code',
  },
  dtype: { kind: oneOf(['f32', 'bf16']), of: 'place', default: 'f32', help: 'of the weights' },
  device: { kind: oneOf(['auto', 'cpu', 'cuda']), of: 'place', default: 'auto', help: 'where the model is' },
  recompute: { kind: switches, default: false, help: 'less memory, one more forward pass' },
  optimizerState: {
    ...{ kind: oneOf(['full', 'compact']), default: 'full' },
    help: 'of bf16 weights: 18 bytes each, or 10',
  },
  offloadOptimizer: {
    ...{ kind: switches, default: false },
    help: "the optimizer's state of a model on a GPU stays in main memory",
  },
  seed: { kind: from(0, 'an integer >= 0'), default: 0, help: 'of order and new weights' },
  groupByLength: { kind: switches, default: false, help: 'batches of similar lengths' },
  augment: { kind: switches, default: false, help: 'mild augmentation of the images' },
  workers: { kind: upTo(256), help: 'threads that decode images (default: by the machine)' },
  maxBad: { kind: wholeShare, default: 0.01, help: 'share of records that may be unusable' },
  saveEvery: {
    kind: orNever(interval),
    default: '30m',
    help: 'between checkpoints; null: only one when the run is stopped',
  },
  keep: { kind: from(2, 'an integer >= 2'), default: 2, help: 'newest checkpoints that stay' },
  allowLongInterval: { kind: switches, default: false, help: 'an interval longer than the run is no mistake' },
  evalShare: { kind: share, instead: 'evalData', help: 'share of the records that is held out and evaluated' },
  evalData: { kind: text('file'), instead: 'evalShare', help: 'or a data file to evaluate' },
  evalImages: { kind: text('dir'), help: 'its images (default: images)' },
  evalEvery: { kind: count, help: 'steps between evaluations (default: a tenth of the run)' },
  skipOutliers: {
    ...{ kind: outliers, default: false },
    help: 'leave out steps whose loss or gradient is far above those before',
  },
  tensorboard: { kind: switches, default: false, help: 'TensorBoard event files in out, beside log.jsonl' },
  resume: { kind: folder, help: 'go on from the last checkpoint, of out or of another run' },
} as const satisfies Record<string, Row>

export interface Setting extends Row {
  key: string
}
/** The table as a list. */
export const SETTINGS: readonly Setting[] = Object.entries(RUN_SETTINGS as Record<string, Row>).map(([key, row]) => ({
  key,
  ...row,
}))
export const settingsOf = (phase: PhaseName): Setting[] => SETTINGS.filter((s) => (s.phase ?? phase) === phase)

type Table = typeof RUN_SETTINGS
type ValueOf<R> = R extends { kind: Kind<infer T> } ? T : never
/** Keys of the library's options: what is of the run itself. */
type RunKey = { [K in keyof Table]: Table[K] extends { of: string } ? never : K }[keyof Table]
type RunRows = Pick<Table, Exclude<RunKey, `${string}.${string}`>>
type Section<S extends string> = {
  -readonly [K in RunKey as K extends `${S}.${infer N}` ? N : never]?: ValueOf<Table[K]>
}
/** Options of a run, as the table has them. */
export type RunSettings = { -readonly [K in keyof RunRows]?: ValueOf<RunRows[K]> } & { lora?: Section<'lora'> }
type DefaultKey = { [K in keyof RunRows]: RunRows[K] extends { default: unknown } ? K : never }[keyof RunRows]
/** With what holds for what is not given. */
export type Defaulted = RunSettings & { -readonly [K in DefaultKey]: ValueOf<RunRows[K]> }

/** What holds in a phase when a setting is not given; undefined where that depends on more. */
export function defaultOf({ default: value }: Row, phase: PhaseName): unknown {
  return typeof value === 'object' ? value[phase] : value
}

/** The options with the defaults of the phase. */
export function withDefaults<T extends RunSettings>(phase: PhaseName, o: T): T & Defaulted {
  const rows = settingsOf(phase).filter((s) => s.of === undefined && s.default !== undefined)
  const missing = rows.filter((s) => o[s.key as keyof T] === undefined)
  return { ...o, ...Object.fromEntries(missing.map((s) => [s.key, defaultOf(s, phase)])) } as T & Defaulted
}

/** Settings by key, sections as objects. */
export type Values = Record<string, unknown>

const sections = new Set(SETTINGS.filter((s) => s.key.includes('.')).map((s) => s.key.split('.')[0]))
/** { lora: { rank: 8 } } -> [['lora.rank', 8]] */
export function* flat(values: Values): Generator<[string, unknown]> {
  for (const [key, v] of Object.entries(values))
    if (sections.has(key) && isTable(v)) for (const [k, inner] of Object.entries(v)) yield [`${key}.${k}`, inner]
    else yield [key, v]
}

/** What should be there in place of a value. */
export interface Problem {
  key: string
  expected: string
  got: string
}

/** Two settings that are given and do not go together; `expected` is of the first. */
function between(o: RunSettings): Problem | null {
  const { evalShare, evalData, evalEvery, evalImages } = o
  const wrong = (key: keyof RunSettings, expected: string): Problem => ({ key, expected, got: show(o[key]) })
  if (evalShare !== undefined && evalData !== undefined) return wrong('evalData', 'none beside evalShare')
  if (evalEvery !== undefined && evalShare === undefined && evalData === undefined)
    return wrong('evalEvery', 'evalShare or evalData beside it')
  if (evalImages !== undefined && evalData === undefined) return wrong('evalImages', 'evalData beside it')
  if (o.lr === 0 && !o.projectorLr) return wrong('lr', 'a number above 0, or projectorLr beside it')
  if (o.tensorboard && !o.out)
    return { key: 'tensorboard: true', expected: 'out, a folder for the event files', got: 'none' }
  return null
}

/** The first of the given settings that is not as it should be in this phase. What the table does not know is left alone. */
export function problemIn(phase: PhaseName, given: object): Problem | null {
  for (const [key, v] of flat(given as Values)) {
    const row = SETTINGS.find((s) => s.key === key)
    if (!row || v === undefined) continue
    if (row.phase && row.phase !== phase) return { key, expected: `none in ${phase}`, got: show(v) }
    if (!row.kind.accepts(v)) return { key, expected: row.kind.expected, got: show(v) }
  }
  return null
}
/** The same of a run's options, and whether they go together. */
export const problemOf = (phase: PhaseName, o: RunSettings): Problem | null => problemIn(phase, o) ?? between(o)

/** The paper's batch and rate are the phases' own; these are the ways to fit them into one 80 GB card. */
const CARD: Values = { dtype: 'bf16', optimizerState: 'compact', recompute: true, evalShare: 0.001 }

const { batch, lr } = RUN_SETTINGS
/** Ready settings: small towers as the quickstart's, and the paper's two models (section 4.1; LLaVA-1.5's scripts) on one 80 GB card. */
export const PRESETS = {
  tiny: {
    pretrain: { batch: 64, lr: 4e-3, augment: true },
    finetune: { batch: 32, microBatch: 32, lr: 1.5e-3, augment: true },
  },
  '7b': {
    pretrain: { ...CARD, batch: batch.default.pretrain, microBatch: 16, lr: lr.default.pretrain },
    finetune: { ...CARD, batch: batch.default.finetune, microBatch: 4, lr: lr.default.finetune, groupByLength: true },
  },
  '13b': {
    pretrain: { ...CARD, batch: batch.default.pretrain, microBatch: 8, lr: lr.default.pretrain },
    finetune: {
      ...{ ...CARD, batch: batch.default.finetune, microBatch: 2, lr: lr.default.finetune, groupByLength: true },
      offloadOptimizer: true,
    },
  },
} as const satisfies Record<string, Record<PhaseName, Values>>
export type Preset = keyof typeof PRESETS

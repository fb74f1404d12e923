/** What a run will take of memory and time: memory from the settings alone, time from a few measured steps where that is asked for. */
import { type Command, Option } from 'commander'
import { PROJECTORS } from '../../models/config/variants.js'
import type { NewModelOptions, PaperSize } from '../../models/settings.js'
import type { MemoryPlan, Planned, PlanOptions } from '../../train/memory-plan.js'
import { RUN_SETTINGS, type Values, withDefaults } from '../../train/run-settings.js'
import { atLeast, bytes, jobOf, positive } from '../options.js'
import { readConfig, resolveSettings } from '../settings.js'
import type { TrainJob } from '../train-worker.js'

interface Options extends Omit<PlanOptions, 'lora' | 'batch'> {
  preset?: PaperSize
  model?: string
  llm?: string
  clip?: string
  projector?: string
  levels?: number
  loraRank?: number
  loraTargets?: string[]
  memory?: number
  config?: string
  set?: string[]
  measure?: boolean
  json?: boolean
}

/** Which model is meant, of a run's settings those of a model too. */
function planned(o: Options, settings: Values | null): Planned {
  const { projector, levels } = o
  const chosen = Object.fromEntries(
    ['selectLayer', 'selectFeature', 'alignment', 'gate'].map((key) => [key, settings?.[key]]),
  ) as NewModelOptions
  if (o.model !== undefined) return { ...chosen, model: o.model, clip: o.clip, levels }
  if (o.preset) return { ...chosen, size: o.preset, projector, levels }
  return { ...chosen, llm: o.llm as string, clip: o.clip as string, projector, levels }
}

/** Presets that name a model too. */
const SIZES: readonly string[] = ['7b', '13b'] satisfies PaperSize[]

const size = (n: number): string =>
  n < 2 ** 30 / 10 ? `${(n / 2 ** 20).toFixed(2).padStart(9)} MiB` : `${(n / 2 ** 30).toFixed(2).padStart(9)} GiB`
const count = (n: number): string => (n < 1e6 ? `${(n / 1e3).toFixed(1)} K` : `${(n / 1e6).toFixed(1)} M`)

/** The plan as lines for people. */
function lines(p: MemoryPlan, o: PlanOptions): string[] {
  const offloaded = o.offloadOptimizer ? 0 : 1
  const rows: [string, number][] = [
    ['weights', p.weights],
    ['gradients', p.gradients],
    ['moments of the optimizer', p.moments * offloaded],
    ['f32 rest of bf16 weights', p.masters * offloaded],
    ['activations kept for backward', p.activations],
    ['widest moment besides', p.transient],
    ['on the device at once', p.peak],
    ...(o.offloadOptimizer ? [['optimizer, in main memory', p.host] as [string, number]] : []),
    ['while a checkpoint is written, in main memory', p.snapshot],
    ['decoded pictures, in main memory', p.pictures],
    ['with a GPU: page-locked, in main memory', p.pinned],
  ]
  return [
    `${o.phase}, ${o.dtype}, ${o.microBatch} x ${o.textTokens} text tokens and a picture${o.recompute ? ', recompute' : ''}`,
    `${count(p.parameters)} parameters, ${count(p.trainable)} of them trained`,
    ...rows.filter(([, n]) => n > 0).map(([what, n]) => `  ${what.padEnd(46)}${size(n)}`),
  ]
}

/** Mistakes between options, which no single option shows. */
function complaint(o: Options): string | undefined {
  const ways = [o.preset, o.model, o.llm].filter((x) => x !== undefined).length
  if (ways !== 1 || (o.llm !== undefined && o.clip === undefined) || (o.preset && o.clip !== undefined))
    return 'expected one of --preset NAME, --model DIR, or --llm DIR with --clip DIR'
  if (o.loraTargets && o.loraRank === undefined) return '--lora-rank is missing beside --lora-targets'
  if (o.loraRank !== undefined && o.phase === 'pretrain') return '--lora-rank goes with --phase finetune'
  return undefined
}

/** Takes from the config what no flag says. @returns the settings of the run */
async function configured(command: Command, o: Options): Promise<Values | null> {
  if (o.config === undefined) return o.set ? command.error('error: --set goes with --config') : null
  const flagged = (name: string): boolean => command.getOptionValueSource(name) === 'cli'
  const { phase, preset } = await readConfig(o.config)
  if (phase && !flagged('phase')) o.phase = phase
  const chosen = flagged('preset') ? o.preset : undefined
  const settings = await resolveSettings(o.phase, { config: o.config, preset: chosen, set: o.set })
  const lora = (settings.lora ?? {}) as { rank?: number; targets?: string[] }
  const found: Values = { ...settings, loraRank: lora.rank, loraTargets: lora.targets }
  const paper = preset !== undefined && SIZES.includes(preset)
  if (found.model === undefined && found.llm === undefined && paper) found.preset = preset
  const model = ['preset', 'model', 'llm'].some(flagged) ? [] : ['preset', 'model', 'llm', 'clip']
  const training = ['projector', 'levels', 'dtype', 'microBatch', 'recompute', 'optimizerState', 'offloadOptimizer']
  for (const name of [...model, ...training, 'loraRank', 'loraTargets'])
    if (!flagged(name) && found[name] !== undefined) (o as unknown as Values)[name] = found[name]
  return settings
}

/** How long a run is, when its data is there. */
interface RunLength {
  records: number
  batch: number
  steps: number
  secondsPerStep: number | null
}

const MEASURED = 3

/** Steps of the run, and with `measure` the time of one: the mean of a few real ones without the first. */
async function runLength(job: TrainJob, measure: boolean): Promise<RunLength> {
  const { loadDataset } = await import('../../data/dataset.js')
  const { phase } = job
  const options = withDefaults(phase, job.options)
  const data = await loadDataset(job.data.file, job.data)
  const records = Math.round(data.length * (1 - (options.evalShare ?? 0)))
  const batch = Math.min(options.batch, records)
  const steps = options.steps ?? Math.ceil(records / batch) * options.epochs
  if (!measure) return { records, batch, steps, secondsPerStep: null }
  const [{ openModel }, training] = await Promise.all([import('../train-worker.js'), import('../../train/trainer.js')])
  const model = await openModel(job)
  const seconds: number[] = []
  const run = { ...job.options, steps: MEASURED, epochs: undefined, saveEvery: null, progress: false }
  for (const key of ['out', 'resume', 'tensorboard', 'evalShare', 'evalData', 'evalImages', 'evalEvery'] as const)
    delete run[key]
  try {
    await training[phase](model, data, { ...run, onStep: (s) => seconds.push(s.tokens / s.tokensPerSecond) })
  } finally {
    model.dispose()
  }
  const later = seconds.slice(1)
  return { records, batch, steps, secondsPerStep: later.reduce((a, b) => a + b, 0) / later.length }
}

const duration = (s: number): string =>
  s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`

/** The run's length as lines, and whether its checkpoints come too late. */
async function lengthLines(r: RunLength, saveEvery: number | string): Promise<string[]> {
  const { parseInterval } = await import('../../train/resume.js')
  const whole = r.secondsPerStep === null ? null : r.secondsPerStep * r.steps
  const every = parseInterval(saveEvery)
  const late = 'steps' in every ? every.steps > r.steps : whole !== null && every.ms > 1000 * whole
  const time =
    whole === null
      ? 'time not measured (--measure runs a few steps)'
      : `about ${duration(whole)}: ${MEASURED} steps measured, ${duration(r.secondsPerStep as number)} each`
  return [
    `${r.steps} steps of ${r.batch} samples, ${r.records} records; ${time}`,
    ...(late
      ? [`warning: a checkpoint every ${saveEvery}${'steps' in every ? ' steps' : ''}: none before the end`]
      : []),
  ]
}

async function run(this: Command, o: Options): Promise<void> {
  const settings = await configured(this, o)
  const wrong = complaint(o)
  if (wrong) this.error(`error: ${wrong}`)
  const { Planner } = await import('../../train/memory-plan.js')
  const planner = new Planner(planned(o, settings))
  const { phase, dtype, recompute, optimizerState, offloadOptimizer, labelledTokens, memory, loraRank: rank } = o
  const textTokens = o.textTokens ?? planner.room
  if (labelledTokens !== undefined && labelledTokens > textTokens)
    this.error(`error: --labelled-tokens: expected at most the ${textTokens} text tokens, got ${labelledTokens}`)
  const lora = rank === undefined ? undefined : { rank, targets: o.loraTargets }
  const batch = settings?.batch as number | undefined
  const step = { phase, dtype, recompute, optimizerState, offloadOptimizer, textTokens, labelledTokens, lora, batch }
  const largest = memory === undefined ? null : planner.largestMicroBatch(step, memory)
  const options = { ...step, microBatch: o.microBatch ?? Math.max(largest ?? 1, 1) }
  const bytesOf = planner.plan(options)
  const described = settings?.data !== undefined && !o.preset
  if (o.measure && !described) this.error('error: --measure: expected a --config that names the model and the data')
  const length = described ? await runLength(jobOf(this, phase, settings), o.measure === true) : null
  if (o.json)
    console.log(
      JSON.stringify({ options, plan: bytesOf, memory: memory ?? null, largestMicroBatch: largest, run: length }),
    )
  else console.log(lines(bytesOf, options).join('\n'))
  if (!length && !o.json) console.log('steps and time: with a --config that names the model and the data')
  if (length && !o.json)
    console.log(
      (await lengthLines(length, (settings?.saveEvery ?? RUN_SETTINGS.saveEvery.default) as string)).join('\n'),
    )
  if (memory === undefined) return
  if (!o.json) console.log(`largest micro-batch in ${size(memory).trim()}: ${largest}`)
  if (bytesOf.peak <= memory) return
  console.error(`ERR_MEMORY [plan] step: expected at most ${size(memory).trim()}, got ${size(bytesOf.peak).trim()}`)
  process.exitCode = 1
}

export function plan(program: Command): void {
  program
    .command('plan')
    .description(
      'memory of a training step, before anything is allocated, and the steps of a run; exit status 1 when --memory is too little',
    )
    .addOption(new Option('--preset <size>', 'Vicuna 7B or 13B with ViT-L/14-336').choices(SIZES))
    .option('--model <dir>', 'AlignGPT folder; only its settings are read')
    .option('--llm <dir>', 'LLaMA in Hugging Face layout, with --clip')
    .option('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--projector <type>', `of a new model: ${PROJECTORS} (default: ${RUN_SETTINGS.projector.default})`)
    .option(
      '--levels <n>',
      `alignment levels (default: those of --model, or ${RUN_SETTINGS.levels.default})`,
      atLeast(2),
    )
    .addOption(new Option('--phase <name>', 'which phase').choices(['pretrain', 'finetune']).default('finetune'))
    .addOption(new Option('--dtype <type>', 'of the weights').choices(['f32', 'bf16']).default('f32'))
    .option('--micro-batch <n>', 'samples run at once (default: the most that --memory takes, or 1)', positive)
    .option('--text-tokens <n>', 'of a sample (default: as many as the longest sequence has room for)', positive)
    .option('--labelled-tokens <n>', 'of them with loss (default: all)', positive)
    .option('--recompute', 'less memory, one more forward pass')
    .addOption(
      new Option('--optimizer-state <kind>', 'of bf16 weights: full (18 bytes each) or compact (10)')
        .choices(['full', 'compact'])
        .default('full'),
    )
    .option('--offload-optimizer', "the optimizer's state in main memory, for a model on a GPU")
    .option('--lora-rank <r>', 'low-rank adapters instead of the whole language model', positive)
    .option('--lora-targets <names...>', 'modules such as q_proj (default: all matrices of the layers)')
    .option('--memory <bytes>', 'of the device, such as 80G (GiB) or 512M: which micro-batch fits', bytes)
    .option('--config <file>', 'settings of a training run: its steps too, and flags of this command count more')
    .option('--set <key=value>', 'as in training', (text: string, before: string[] = []) => [...before, text])
    .option('--measure', 'with --config: run a few steps and estimate the time')
    .option('--json', 'options, bytes and the largest micro-batch as JSON')
    .action(run)
}

/** What the commands share: parsers of options, those of both training commands, the last line. */
import path from 'node:path'
import { type Command, InvalidArgumentError, Option } from 'commander'
import type { AlignGPT, AlignmentOptions, LoadOptions, Mix } from '../aligngpt.js'
import type { Sampling } from '../generate.js'
import { STYLES, type Style } from '../prompt.js'
import type { TrainOptions, TrainResult } from '../train.js'
import type { TrainJob } from '../train-worker.js'

export function integer(text: string): number {
  const n = Number(text)
  if (!Number.isInteger(n) || n < 0) throw new InvalidArgumentError('expected an integer >= 0')
  return n
}
export function number(text: string): number {
  const n = Number(text)
  if (!Number.isFinite(n) || n < 0) throw new InvalidArgumentError('expected a number >= 0')
  return n
}
export function positive(text: string): number {
  const n = integer(text)
  if (n === 0) throw new InvalidArgumentError('expected an integer > 0')
  return n
}
function numbers(text: string): number[] {
  const list = text.split(',').map((t) => (t.trim() === '' ? Number.NaN : Number(t)))
  if (!list.every(Number.isFinite)) throw new InvalidArgumentError('expected numbers with commas between them')
  return list
}
/** 1024, 512M, 80G, 1.5TiB: units are powers of 1024. */
export function bytes(text: string): number {
  const [, digits, unit] = /^(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?$/i.exec(text) ?? []
  const n = Math.floor(Number(digits) * 1024 ** ['', 'K', 'M', 'G', 'T'].indexOf((unit ?? '').toUpperCase()))
  if (!(n > 0 && Number.isSafeInteger(n))) throw new InvalidArgumentError('expected bytes such as 512M or 80G')
  return n
}

/** Expected errors (ours, the file system's) have a code and are one line; one without is a bug and shows its stack. */
export function complain(e: unknown): void {
  const { code, message } = e as { code?: unknown; message?: unknown }
  const known = e instanceof Error && typeof code === 'string'
  console.error(known ? `${code} ${String(message).replaceAll('\n', ' ')}` : e)
}

/** The parsed options of both training commands: the library's, and what says which data and machine. */
export interface TrainingOptions extends TrainOptions, AlignmentOptions {
  data: string
  images?: string
  out: string
  seed: number
  dtype: LoadOptions['dtype']
  device: LoadOptions['device']
}

export function trainingOptions(command: Command): Command {
  return command
    .requiredOption('--data <file>', 'LLaVA JSON, JSON lines or Parquet')
    .option(
      '--images <dir>',
      'folder of the pictures, or shards/{00000..00009}.tar (default: those in the Parquet file)',
    )
    .requiredOption('--out <dir>', 'where the model and its log go')
    .option('--batch <n>', 'samples of a step', integer)
    .option('--micro-batch <n>', 'samples run at once', integer)
    .option('--lr <rate>', 'peak learning rate', number)
    .option('--epochs <n>', 'passes over the data', integer)
    .option('--steps <n>', 'instead of epochs', integer)
    .option('--weight-decay <x>', 'decoupled weight decay', number)
    .option('--clip-grad-norm <x>', 'largest gradient norm', number)
    .option('--optimizer-state <kind>', 'of bf16 weights: full (18 bytes each) or compact (10)')
    .option('--max-bad <share>', 'share of records that may be unusable', number)
    .option('--seed <n>', 'of order and new weights', integer, 0)
    .option('--dtype <type>', 'f32 or bf16', 'f32')
    .option('--device <device>', 'auto, cpu or cuda', 'auto')
    .option('--recompute', 'less memory, one more forward pass')
    .option('--group-by-length', 'batches of similar lengths')
    .option('--augment', 'mild augmentation of the pictures')
    .option('--save-every <interval>', 'steps, or a time such as 10m, between checkpoints (default: 30m)')
    .option('--keep <n>', 'newest checkpoints that stay (default: 2)', integer)
    .option('--allow-long-interval', 'an interval longer than the run is no mistake')
    .option('--resume [dir]', 'go on from the last checkpoint, of --out or of another run')
    .option('--eval-share <share>', 'share of the records that is held out and evaluated', number)
    .option('--eval-data <file>', 'or a data file to evaluate')
    .option('--eval-images <dir>', 'its pictures (default: --images)')
    .option('--eval-every <n>', 'steps between evaluations (default: a tenth of the run)', integer)
    .option('--tensorboard', 'TensorBoard event files in --out, beside log.jsonl')
    .option('--alignment <variant>', 'adaptive (default), local, global, average, random or none')
    .option('--gate <form>', 'mlp (default), or linear as in the paper')
    .option('--gate-text <text>', 'what the gate sees in training: all (default) or instruction')
    .option('--projector-lr <rate>', 'peak learning rate of the projector', number)
    .option('--skip-outliers', 'leave out steps whose loss or gradient is far above those before')
}

/** Trains in a thread of its own and says what came out. */
export async function train(
  phase: TrainJob['phase'],
  model: TrainJob['model'],
  { data, images, dtype, device, ...options }: TrainingOptions,
): Promise<void> {
  const { runTraining } = await import('../run.js')
  const place = { dtype, device, seed: options.seed }
  const { result, status } = await runTraining({ phase, model, place, data: { file: data, images }, options })
  summary(result, options.out)
  process.exitCode = status
}

function summary(result: TrainResult, out: string): void {
  const { bad, skipped, resumed, outliers, best } = result
  console.log(
    `${result.steps} steps in ${result.seconds.toFixed(1)} s, loss ${result.loss[0]?.toFixed(4)} -> ${result.loss.at(-1)?.toFixed(4)}; saved to ${out}`,
  )
  if (resumed) console.log(`${resumed} of the steps were done before`)
  if (best)
    console.log(`lowest held-out loss ${best.loss.toFixed(4)} after step ${best.step + 1}: ${path.join(out, 'best')}`)
  if (outliers) console.log(`${outliers} steps were outliers and not used`)
  for (const b of bad) console.error(`unusable: ${b.id}: ${b.reason}`)
  for (const s of skipped) console.error(`too long: ${s.id}: ${s.reason}`)
}

/** The parsed options of the commands that ask a model. */
export interface ModelOptions {
  model: string
  clip?: string
  level?: number
  alpha?: number[]
  style: Style
  dtype: LoadOptions['dtype']
  device: LoadOptions['device']
}

export function modelOptions(command: Command): Command {
  return command
    .requiredOption('--model <dir>', 'AlignGPT folder')
    .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
    .option('--level <k>', 'use the vector of one level instead of the gate', integer)
    .addOption(
      new Option(
        '--alpha <weights>',
        'of all N vectors instead of the gate: a,b,...,global (--alpha=-1,... for a minus)',
      )
        .argParser(numbers)
        .conflicts('level'),
    )
    .addOption(
      new Option('--style <name>', 'prompt style').choices(STYLES.filter((s) => s !== 'plain')).default('vicuna_v1'),
    )
    .option('--dtype <type>', 'f32 or bf16', 'f32')
    .option('--device <device>', 'auto, cpu or cuda', 'auto')
}

/** The parsed options of sampling. */
export interface SamplingOptions extends Required<Sampling> {
  maxNewTokens: number
}

export function samplingOptions(command: Command): Command {
  return command
    .option('--max-new-tokens <n>', 'longest answer', integer, 256)
    .option('--temperature <x>', '0: the most likely answer', number, 0)
    .option('--top-p <x>', 'nucleus', number, 1)
    .option('--top-k <n>', '0: all', integer, 0)
    .option('--seed <n>', 'of sampling', integer, 0)
}

/** Loads the model, and how its alignment vectors are to be made. */
export async function loadModel(o: ModelOptions): Promise<{ model: AlignGPT; mix: Mix }> {
  const { AlignGPT } = await import('../aligngpt.js')
  const model = await AlignGPT.load(o.model, { dtype: o.dtype, device: o.device, clip: o.clip })
  if (o.level !== undefined) return { model, mix: { mode: 'level', level: o.level } }
  return { model, mix: o.alpha ? { mode: 'fixed', coefficients: o.alpha } : model.mix }
}

/** The weights of the alignment vectors, on one line. */
export const alphaLine = (alpha: readonly number[]): string =>
  `alignment: ${alpha.map((a, i) => `${i === alpha.length - 1 ? 'global' : i} ${a.toFixed(3)}`).join('  ')}`

/** What the commands share: parsers of options, a training run, the last line. */
import fs from 'node:fs'
import path from 'node:path'
import { type Command, InvalidArgumentError, Option } from 'commander'
import type { AlignGPT } from '../aligngpt.js'
import { SAMPLING_RANGES, type Sampling } from '../inference/sampling.js'
import type { Mix } from '../models/align.js'
import type { CreateOptions, LoadOptions } from '../models/load.js'
import { CHAT_STYLES, type Style } from '../processing/conversation/styles.js'
import type { TrainOptions } from '../train/options.js'
import { problemOf, SETTINGS, type Values } from '../train/run-settings.js'
import type { TrainResult } from '../train/trainer.js'
import { mismatch } from '../util/errors.js'
import { folderToWrite } from '../util/paths.js'
import { flagOf, type Given, resolveSettings } from './settings.js'
import type { TrainJob } from './train-worker.js'

export function integer(text: string): number {
  const n = text.trim() === '' ? Number.NaN : Number(text)
  if (!Number.isSafeInteger(n) || n < 0) throw new InvalidArgumentError('expected an integer >= 0')
  return n
}
export const atLeast =
  (least: number) =>
  (text: string): number => {
    const n = integer(text)
    if (n < least) throw new InvalidArgumentError(`expected an integer >= ${least}`)
    return n
  }
export const positive = atLeast(1)
/** Parser of a setting of sampling. */
const drawn =
  (key: keyof typeof SAMPLING_RANGES) =>
  (text: string): number => {
    const [expected, fits] = SAMPLING_RANGES[key]
    const n = text.trim() === '' ? Number.NaN : Number(text)
    if (!fits(n)) throw new InvalidArgumentError(`expected ${expected}`)
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

/** The given settings of the data, of the model, of its place, or of the run itself. */
function part(settings: Values, of?: 'data' | 'model' | 'place'): Values {
  const keys = new Set(SETTINGS.filter((s) => s.of === of).map((s) => s.key.split('.')[0]))
  return Object.fromEntries(Object.entries(settings).filter(([key]) => keys.has(key)))
}

/** The run that settings describe. Ends the command when something is missing. */
export function jobOf(command: Command, phase: TrainJob['phase'], settings: Values): TrainJob {
  const missing = (what: string): never => command.error(`error: ${what} missing: give it here or in --config`)
  const { data: file, ...pictures } = part(settings, 'data') as { data?: string } & Omit<TrainJob['data'], 'file'>
  const { model, ...made } = part(settings, 'model') as { model?: string } & Partial<CreateOptions>
  const options: TrainOptions = part(settings)
  if (file === undefined) return missing('--data is')
  if (options.lora !== undefined && options.lora.rank === undefined)
    command.error('error: --lora-rank is missing beside --lora-alpha, --lora-targets')
  const { gateText, seed } = options
  const job = { phase, place: { ...part(settings, 'place'), seed }, data: { file, ...pictures }, options }
  if (model !== undefined) {
    const twice = SETTINGS.find((s) => s.of === 'model' && s.phase === 'pretrain' && settings[s.key] !== undefined)
    if (twice) command.error(`error: ${flagOf(twice)} does not go with --model, which has one`)
    return { ...job, model: { load: model, ...made, gateText } }
  }
  const { llm, clip } = made
  if (phase === 'finetune') missing('--model is')
  if (llm === undefined || clip === undefined) return missing('--llm and --clip, or --model, are')
  return { ...job, model: { create: { ...made, llm, clip, gateText } } }
}

/** Trains with the settings of all places, in a thread of its own, and says what came out. */
export async function train(
  command: Command,
  phase: TrainJob['phase'],
  { config, preset, set, ...flags }: Given & Values,
): Promise<void> {
  const settings = await resolveSettings(phase, { config, preset, set, flags })
  const job = jobOf(command, phase, settings)
  const { out } = job.options
  const problem = problemOf(phase, job.options)
  if (problem) throw mismatch('ERR_CONFIG', 'config', `settings: ${problem.key}`, problem.expected, problem.got)
  if (out === undefined) return command.error('error: --out is missing: give it here or in --config')
  const { runTraining } = await import('./train-thread.js')
  const { writeJsonFile } = await import('../util/json.js')
  folderToWrite(phase, '--out', out)
  fs.mkdirSync(out, { recursive: true })
  writeJsonFile(path.join(out, 'run.json'), { phase, ...settings, resume: undefined })
  const { result, status } = await runTraining(job)
  summary(result, out)
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

/** The option beside --images. */
export const FOLLOW_LINKS = ['--follow-links', 'links in the folder of the pictures may lead out of it'] as const

/** The parsed options of the commands that ask a model. */
export interface ModelOptions {
  model: string
  clip?: string
  level?: number
  alpha?: number[]
  style: Style
  exifOrientation?: boolean
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
    .addOption(new Option('--style <name>', "prompt style; default the model's own").choices(CHAT_STYLES))
    .option('--exif-orientation', "turn pictures as their EXIF says; default the model's own")
    .option('--dtype <type>', 'f32 or bf16', 'f32')
    .option('--device <device>', 'auto, cpu or cuda', 'auto')
}

/** The parsed options of sampling. */
export interface SamplingOptions extends Sampling {
  maxNewTokens?: number
}

export function samplingOptions(command: Command): Command {
  return command
    .option(
      '--max-new-tokens <n>',
      "longest answer; default the model's (generation_config.json), else 256",
      drawn('maxNewTokens'),
    )
    .option('--temperature <x>', "0: the most likely answer; default the model's, else 0", drawn('temperature'))
    .option('--top-p <x>', "nucleus; default the model's, else 1", drawn('topP'))
    .option('--top-k <n>', "0: all; default the model's, else 0", drawn('topK'))
    .option('--seed <n>', 'of sampling', drawn('seed'), 0)
}

/** Loads the model, and how its alignment vectors are to be made. */
export async function loadModel(o: ModelOptions): Promise<{ model: AlignGPT; mix: Mix }> {
  const { AlignGPT } = await import('../aligngpt.js')
  const { dtype, device, clip, exifOrientation } = o
  const model = await AlignGPT.load(o.model, { dtype, device, clip, exifOrientation })
  if (o.level !== undefined) return { model, mix: { mode: 'level', level: o.level } }
  return { model, mix: o.alpha ? { mode: 'fixed', coefficients: o.alpha } : model.mix }
}

/** The weights of the alignment vectors, on one line. */
export const alphaLine = (alpha: readonly number[]): string =>
  `alignment: ${alpha.map((a, i) => `${i === alpha.length - 1 ? 'global' : i} ${a.toFixed(3)}`).join('  ')}`

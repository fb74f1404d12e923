/** What the commands share: parsers of options, those of both training commands, Ctrl-C, the last line. */
import { type Command, InvalidArgumentError } from 'commander'
import type { LoadOptions } from '../aligngpt.js'
import type { StepInfo, TrainOptions, TrainResult } from '../train.js'

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

/** Expected errors (ours, the file system's) have a code and are one line; one without is a bug and shows its stack. */
export function complain(e: unknown): void {
  const { code, message } = e as { code?: unknown; message?: unknown }
  const known = e instanceof Error && typeof code === 'string'
  console.error(known ? `${code} ${String(message).replaceAll('\n', ' ')}` : e)
}

/** The parsed options of both training commands: the library's, and what says which data and machine. */
export interface TrainingOptions extends TrainOptions {
  data: string
  images: string
  out: string
  seed: number
  dtype: LoadOptions['dtype']
  device: LoadOptions['device']
}

export function trainingOptions(command: Command): Command {
  return command
    .requiredOption('--data <file>', 'LLaVA JSON')
    .requiredOption('--images <dir>', 'folder of the pictures')
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
}

/** The library's options of a parsed command line; plain lines instead of a bar where there is no terminal. */
export function training(o: Omit<TrainingOptions, 'dtype' | 'device'>, signal: AbortSignal): TrainOptions {
  const { data, images, ...options } = o
  const line = (s: StepInfo): void =>
    console.log(
      `step ${s.step + 1}/${s.steps} loss ${s.loss.toFixed(4)} lr ${s.lr.toExponential(2)} ${s.tokensPerSecond.toFixed(0)} tokens/s`,
    )
  return { ...options, signal, onStep: process.stderr.isTTY ? undefined : line }
}

/** An abort signal that Ctrl-C sets once; the run saves what it has. */
export function interruptible(): AbortSignal {
  const controller = new AbortController()
  process.once('SIGINT', () => {
    console.error('\ninterrupted: finishing the step and saving (once more to stop at once)')
    controller.abort()
    process.once('SIGINT', () => process.exit(130))
  })
  return controller.signal
}

export function summary(result: TrainResult, out: string): void {
  const { bad, skipped } = result
  console.log(
    `${result.steps} steps in ${result.seconds.toFixed(1)} s, loss ${result.loss[0]?.toFixed(4)} -> ${result.loss.at(-1)?.toFixed(4)}; saved to ${out}`,
  )
  for (const b of bad) console.error(`unusable: ${b.id}: ${b.reason}`)
  for (const s of skipped) console.error(`too long: ${s.id}: ${s.reason}`)
  if (result.aborted) process.exitCode = 130
}

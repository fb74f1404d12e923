/** What the command scripts share. */
import { type Command, InvalidArgumentError, Option } from 'commander'
import { ALIGNMENTS, GATE_TEXTS, GATES } from '../ts/src/config.js'
import { AlignGPTError } from '../ts/src/errors.js'
import type { StepInfo, TrainOptions, TrainResult } from '../ts/src/train.js'

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

/** Prints an expected error in one line, any other with its stack, and ends with status 1. */
export function fail(e: unknown): never {
  console.error(e instanceof AlignGPTError ? `${e.code} ${e.message}` : e)
  process.exit(1)
}

/** The options both training commands have. */
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
    .option('--device <device>', 'auto or cpu', 'auto')
    .option('--recompute', 'less memory, one more forward pass')
    .option('--group-by-length', 'batches of similar lengths')
    .option('--augment', 'mild augmentation of the pictures')
}

/** Which variant of the alignment vector is trained; what is not said is as the model's folder says. */
export function alignmentOptions(command: Command): Command {
  return command
    .addOption(new Option('--alignment <variant>', 'how the alignment vector is made').choices(ALIGNMENTS))
    .addOption(new Option('--gate <form>', 'two layers or the single one of the paper').choices(GATES))
    .addOption(new Option('--gate-text <text>', 'which text the gate sees in training').choices(GATE_TEXTS))
}

/** The training options of a parsed command line; plain lines instead of a bar where there is no terminal. */
export function training(o: Record<string, unknown>, signal: AbortSignal): TrainOptions {
  const plain = !process.stderr.isTTY
  // What says which data, models and folders is for the script; all other options have the library's names.
  const { data, images, llm, clip, model, dtype, device, alignment, gate, gateText, ...options } = o
  return {
    ...(options as TrainOptions),
    signal,
    onStep: (s: StepInfo) => {
      if (plain)
        console.log(
          `step ${s.step + 1}/${s.steps} loss ${s.loss.toFixed(4)} lr ${s.lr.toExponential(2)} ${s.tokensPerSecond.toFixed(0)} tokens/s`,
        )
    },
  }
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

/** Phase 2: language model, projector and gate learn from instructions. */
import type { Command } from 'commander'
import { integer, number, type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  model: string
  clip?: string
  loraRank?: number
  loraAlpha?: number
  loraTargets?: string[]
}

function run(this: Command, o: Options): Promise<void> {
  const {
    model,
    clip,
    alignment,
    gate,
    gateText,
    loraRank: rank,
    loraAlpha: alpha,
    loraTargets: targets,
    ...options
  } = o
  if (rank === undefined && (alpha !== undefined || targets))
    this.error('--lora-rank is missing beside --lora-alpha, --lora-targets')
  const lora = rank === undefined ? undefined : { rank, alpha, targets }
  return train('finetune', { load: model, clip, alignment, gate, gateText }, { ...options, lora })
}

export function finetune(program: Command): void {
  trainingOptions(program.command('finetune').description('phase 2: instruction tuning'))
    .requiredOption('--model <dir>', 'AlignGPT folder, as pretrain leaves it')
    .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
    .option('--lora-rank <r>', 'train low-rank adapters beside the language model', integer)
    .option('--lora-alpha <x>', 'they count alpha / rank (default: 2 rank)', number)
    .option('--lora-targets <names...>', 'modules such as q_proj (default: all matrices of the layers)')
    .action(run)
}

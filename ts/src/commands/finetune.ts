/** Phase 2: language model, projector and gate learn from instructions. */
import type { Command } from 'commander'
import { type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  model: string
  clip?: string
}

const run = ({ model, clip, ...options }: Options): Promise<void> => train('finetune', { load: model, clip }, options)

export function finetune(program: Command): void {
  trainingOptions(program.command('finetune').description('phase 2: instruction tuning'))
    .requiredOption('--model <dir>', 'AlignGPT folder, as pretrain leaves it')
    .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
    .action(run)
}

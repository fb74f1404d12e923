/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import type { Command } from 'commander'
import { integer, type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  llm: string
  clip: string
  levels: number
  projector: string
}

const run = ({ llm, clip, levels, projector, ...options }: Options): Promise<void> =>
  train('pretrain', { create: { llm, clip, levels, projector } }, options)

export function pretrain(program: Command): void {
  trainingOptions(program.command('pretrain').description('phase 1: pre-training on image-text pairs with levels'))
    .requiredOption('--llm <dir>', 'LLaMA in Hugging Face layout')
    .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--levels <n>', 'number of alignment levels', integer, 8)
    .option('--projector <type>', 'linear, mlpNx_gelu or identity', 'mlp2x_gelu')
    .action(run)
}

/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import type { Command } from 'commander'
import { integer, type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  model?: string
  llm?: string
  clip?: string
  levels: number
  projector: string
}

function run(this: Command, o: Options): Promise<void> {
  const { model, llm, clip, levels, projector, alignment, gate, gateText, ...options } = o
  if (model !== undefined) {
    for (const name of ['llm', 'levels', 'projector'])
      if (this.getOptionValueSource(name) === 'cli')
        this.error(`error: --${name} does not go with --model, which has one`)
    return train('pretrain', { load: model, clip, alignment, gate, gateText }, options)
  }
  if (llm === undefined || clip === undefined) this.error('error: expected --llm and --clip, or --model')
  return train('pretrain', { create: { llm, clip, levels, projector, alignment, gate, gateText } }, options)
}

export function pretrain(program: Command): void {
  trainingOptions(program.command('pretrain').description('phase 1: pre-training on image-text pairs with levels'))
    .option('--llm <dir>', 'LLaMA in Hugging Face layout')
    .option('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--model <dir>', 'in place of both: AlignGPT folder to start from, such as an imported LLaVA')
    .option('--levels <n>', 'number of alignment levels', integer, 8)
    .option('--projector <type>', 'linear, mlpNx_gelu or identity', 'mlp2x_gelu')
    .action(run)
}

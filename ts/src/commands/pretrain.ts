/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import { type Command, InvalidArgumentError, Option } from 'commander'
import { integer, type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  llm: string
  clip: string
  levels: number
  projector: string
  selectLayer: number
  selectFeature: 'patch' | 'cls_patch'
}

function run(o: Options): Promise<void> {
  const { llm, clip, levels, projector, selectLayer, selectFeature, alignment, gate, gateText, ...options } = o
  const create = { llm, clip, levels, projector, selectLayer, selectFeature, alignment, gate, gateText }
  return train('pretrain', { create }, options)
}

function layer(text: string): number {
  const n = Number(text)
  if (text.trim() === '' || !Number.isInteger(n)) throw new InvalidArgumentError('expected an integer')
  return n
}

export function pretrain(program: Command): void {
  trainingOptions(program.command('pretrain').description('phase 1: pre-training on image-text pairs with levels'))
    .requiredOption('--llm <dir>', 'LLaMA in Hugging Face layout')
    .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--levels <n>', 'number of alignment levels', integer, 8)
    .option('--projector <type>', 'linear, mlpNx_gelu or identity', 'mlp2x_gelu')
    .option('--select-layer <n>', 'hidden state of the CLIP that the projector sees (-1: the last)', layer, -2)
    .addOption(
      new Option('--select-feature <rows>', 'which rows of it: the patches, or the class row too')
        .choices(['patch', 'cls_patch'])
        .default('patch'),
    )
    .action(run)
}

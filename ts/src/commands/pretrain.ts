/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import { type Command, InvalidArgumentError, Option } from 'commander'
import { integer, type TrainingOptions, train, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  model?: string
  llm?: string
  clip?: string
  levels: number
  projector: string
  selectLayer: number
  selectFeature: 'patch' | 'cls_patch'
}

function run(this: Command, o: Options): Promise<void> {
  const { model, llm, clip, levels, projector, selectLayer, selectFeature, ...rest } = o
  const { alignment, gate, gateText, ...options } = rest
  if (model !== undefined) {
    for (const name of ['llm', 'levels', 'projector', 'selectLayer', 'selectFeature'])
      if (this.getOptionValueSource(name) === 'cli')
        this.error(`error: --${name} does not go with --model, which has one`)
    return train('pretrain', { load: model, clip, alignment, gate, gateText }, options)
  }
  if (llm === undefined || clip === undefined) this.error('error: expected --llm and --clip, or --model')
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
    .option('--llm <dir>', 'LLaMA in Hugging Face layout')
    .option('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--model <dir>', 'in place of both: AlignGPT folder to start from, such as an imported LLaVA')
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

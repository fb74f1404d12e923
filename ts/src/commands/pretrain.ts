/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import type { Command } from 'commander'
import { integer, interruptible, summary, type TrainingOptions, training, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  llm: string
  clip: string
  levels: number
  projector: string
}

async function run(o: Options): Promise<void> {
  const [{ AlignGPT }, { loadDataset }, train] = await Promise.all([
    import('../aligngpt.js'),
    import('../data.js'),
    import('../train.js'),
  ])
  const { llm, clip, levels, projector, device, dtype, seed, ...rest } = o
  const model = await AlignGPT.create({ llm, clip, levels, projector }, { device, dtype, seed })
  const data = await loadDataset(o.data, { images: o.images })
  summary(await train.pretrain(model, data, training({ ...rest, seed }, interruptible())), o.out)
  model.dispose()
}

export function pretrain(program: Command): void {
  trainingOptions(program.command('pretrain').description('phase 1: pre-training on image-text pairs with levels'))
    .requiredOption('--llm <dir>', 'LLaMA in Hugging Face layout')
    .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--levels <n>', 'number of alignment levels', integer, 8)
    .option('--projector <type>', 'linear, mlpNx_gelu or identity', 'mlp2x_gelu')
    .action(run)
}

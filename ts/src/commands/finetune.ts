/** Phase 2: language model, projector and gate learn from instructions. */
import type { Command } from 'commander'
import { interruptible, summary, type TrainingOptions, training, trainingOptions } from './options.js'

interface Options extends TrainingOptions {
  model: string
  clip?: string
}

async function run(o: Options): Promise<void> {
  const [{ AlignGPT }, { loadDataset }, train] = await Promise.all([
    import('../aligngpt.js'),
    import('../data.js'),
    import('../train.js'),
  ])
  const { model: folder, clip, device, dtype, seed, ...rest } = o
  const model = await AlignGPT.load(folder, { device, dtype, seed, clip })
  const data = await loadDataset(o.data, { images: o.images })
  summary(await train.finetune(model, data, training({ ...rest, seed }, interruptible())), o.out)
  model.dispose()
}

export function finetune(program: Command): void {
  trainingOptions(program.command('finetune').description('phase 2: instruction tuning'))
    .requiredOption('--model <dir>', 'AlignGPT folder, as pretrain leaves it')
    .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
    .action(run)
}

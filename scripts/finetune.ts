/** Phase 2: language model, projector and gate learn from instructions. */
import { Command } from 'commander'
import { AlignGPT } from '../ts/src/aligngpt.js'
import { loadDataset } from '../ts/src/data.js'
import { finetune } from '../ts/src/train.js'
import { fail, interruptible, summary, training, trainingOptions } from './cli.js'

const o = trainingOptions(new Command('finetune').description('phase 2: instruction tuning'))
  .requiredOption('--model <dir>', 'AlignGPT folder, as pretrain leaves it')
  .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
  .parse()
  .opts()

try {
  const { device, dtype, seed, clip } = o
  const model = await AlignGPT.load(o.model, { device, dtype, seed, clip })
  const data = await loadDataset(o.data, { images: o.images })
  summary(await finetune(model, data, training(o, interruptible())), o.out)
  model.dispose()
} catch (e) {
  fail(e)
}

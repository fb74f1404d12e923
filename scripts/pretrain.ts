/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import { Command } from 'commander'
import { AlignGPT } from '../ts/src/aligngpt.js'
import { loadDataset } from '../ts/src/data.js'
import { pretrain } from '../ts/src/train.js'
import { alignmentOptions, fail, integer, interruptible, summary, training, trainingOptions } from './cli.js'

const command = new Command('pretrain').description('phase 1: pre-training on image-text pairs with levels')
const o = alignmentOptions(trainingOptions(command))
  .requiredOption('--llm <dir>', 'LLaMA in Hugging Face layout')
  .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
  .option('--levels <n>', 'number of alignment levels', integer, 8)
  .option('--projector <type>', 'linear, mlpNx_gelu or identity', 'mlp2x_gelu')
  .parse()
  .opts()

try {
  const { llm, clip, levels, projector, alignment, gate, gateText, device, dtype, seed } = o
  const parts = { llm, clip, levels, projector, alignment, gate, gateText }
  const model = await AlignGPT.create(parts, { device, dtype, seed })
  const data = await loadDataset(o.data, { images: o.images })
  summary(await pretrain(model, data, training(o, interruptible())), o.out)
  model.dispose()
} catch (e) {
  fail(e)
}

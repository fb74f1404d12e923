/** Phase 2: language model, projector and gate learn from instructions. */
import { Command } from 'commander'
import { AlignGPT } from '../ts/src/aligngpt.js'
import { loadDataset } from '../ts/src/data.js'
import { AlignGPTError } from '../ts/src/errors.js'
import { finetune } from '../ts/src/train.js'
import { alignmentOptions, fail, integer, interruptible, number, summary, training, trainingOptions } from './cli.js'

const o = alignmentOptions(trainingOptions(new Command('finetune').description('phase 2: instruction tuning')))
  .requiredOption('--model <dir>', 'AlignGPT folder, as pretrain leaves it')
  .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
  .option('--lora-rank <r>', 'train low-rank adapters beside the language model', integer)
  .option('--lora-alpha <x>', 'they count alpha / rank; default 2 rank', number)
  .option('--lora-targets <names...>', 'modules such as q_proj; default all matrices of the layers')
  .option('--projector-lr <rate>', 'peak learning rate of the projector', number)
  .parse()
  .opts()

try {
  const { device, dtype, seed, clip, alignment, gate, gateText, loraRank, loraAlpha, loraTargets, ...rest } = o
  const model = await AlignGPT.load(o.model, { device, dtype, seed, clip, alignment, gate, gateText })
  const data = await loadDataset(o.data, { images: o.images })
  if (loraRank === undefined && (loraAlpha !== undefined || loraTargets))
    throw new AlignGPTError('ERR_ARGUMENT', '[finetune] --lora-rank: expected it beside the other options of LoRA')
  const lora = loraRank === undefined ? undefined : { rank: loraRank, alpha: loraAlpha, targets: loraTargets }
  summary(await finetune(model, data, { ...training({ ...rest, seed }, interruptible()), lora }), o.out)
  model.dispose()
} catch (e) {
  fail(e)
}

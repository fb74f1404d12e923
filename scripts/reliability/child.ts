/** A small training run that can kill itself inside a save; campaign.ts starts it and kills it at other times. */

import { AlignGPT } from '../../ts/src/aligngpt.js'
import { native } from '../../ts/src/core/native.js'
import { loadDataset } from '../../ts/src/data/dataset.js'
import { finetune, pretrain, type TrainOptions } from '../../ts/src/train/trainer.js'

export interface ChildJob {
  phase: 'pretrain' | 'finetune'
  dtype: 'f32' | 'bf16'
  model: string
  data: string
  images: string
  options: TrainOptions
  /** kill -9 of itself at the `call`-th file call of the first save after `steps` steps of this process */
  die?: { steps: number; call: number }
}

const job: ChildJob = JSON.parse(process.argv[2])
const model = await AlignGPT.load(job.model, { dtype: job.dtype, device: 'cpu' })
const data = await loadDataset(job.data, { images: job.images })
const every = Number(job.options.saveEvery)
let steps = 0
let armed = false
await (job.phase === 'pretrain' ? pretrain : finetune)(model, data, {
  ...job.options,
  progress: false,
  onMessage: (text) => process.stdout.write(`message ${text}\n`),
  onStep: ({ step, steps: all }) => {
    steps++
    if (job.die && !armed && steps > job.die.steps && (step + 1) % every === 0 && step + 1 < all) {
      armed = true
      native.failFiles(job.die.call, 1, true)
    }
    process.stdout.write(`step ${step} calls ${native.fileCalls()}\n`)
  },
})
model.dispose()

/**
 * How long training waits for pictures: both phases on the data and the model of a quickstart run.
 *   npx tsx scripts/bench/waited.ts runs/quickstart [workers]
 */
import path from 'node:path'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { loadDataset } from '../../ts/src/data/dataset.js'
import { finetune, pretrain, type StepInfo, type TrainOptions } from '../../ts/src/train/trainer.js'

const [folder = 'runs/quickstart', workers] = process.argv.slice(2)

/** Share of the time of some steps that was waited. */
function share(steps: readonly StepInfo[]): string {
  const seconds = (s: StepInfo): number => s.tokens / s.tokensPerSecond
  const all = steps.reduce((t, s) => t + seconds(s), 0)
  const waited = steps.reduce((t, s) => t + s.waited * seconds(s), 0)
  return `${((100 * waited) / all).toFixed(1)} % of ${all.toFixed(2)} s`
}

const model = await AlignGPT.load(path.join(folder, 'model'))
const run = async (phase: typeof pretrain, file: string, options: TrainOptions): Promise<void> => {
  const data = await loadDataset(path.join(folder, 'data', file), { images: path.join(folder, 'data', 'images') })
  const steps: StepInfo[] = []
  const more = { augment: true, workers: workers === undefined ? undefined : Number(workers), progress: false }
  await phase(model, data, { ...options, ...more, onStep: (s) => steps.push(s) })
  const quarter = steps.length >> 2
  const quarters = [0, 1, 2, 3].map((k) => share(steps.slice(k * quarter, (k + 1) * quarter)))
  console.log(`${phase.name}, batch ${options.batch}: waited ${share(steps)}; by quarters ${quarters.join(', ')}`)
}
await run(pretrain, 'pairs.json', { batch: 64, steps: 60, lr: 1e-3 })
await run(finetune, 'instructions.json', { batch: 32, microBatch: 32, steps: 200, lr: 1e-4 })
model.dispose()

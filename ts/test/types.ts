/** The types as a user's program sees them: this file has to compile, and each line marked so must not. It is never run. */
import {
  AlignGPT,
  type Dataset,
  type Evaluation,
  evaluate,
  finetune,
  type GeneratedPiece,
  levels,
  loadDataset,
  type PlanOptions,
  plan,
  pretrain,
  type TrainOptions,
  type TrainResult,
} from 'aligngpt'
import { type Converted, downloadRepo, importModel } from 'aligngpt/convert'

export async function program(signal: AbortSignal): Promise<Evaluation> {
  const model: AlignGPT = await AlignGPT.create(
    { llm: 'llm', clip: 'clip', levels: 8 },
    { device: 'auto', dtype: 'bf16' },
  )
  const { commit }: { commit: string } = await downloadRepo('owner/name', 'there', { revision: 'main', signal })
  const { alignment }: Converted = await importModel('there', commit, { dtype: 'bf16' })
  alignment satisfies string
  const data: Dataset = await loadDataset('pairs.json', { images: 'images' })
  await levels(data, model, { buckets: 'width' })
  const options: TrainOptions = { out: 'out', batch: 4, lr: 1e-3, signal, onStep: (s) => s.loss.toFixed(2) }
  const result: TrainResult = await pretrain(model, data, options)
  result.loss.map((x: number) => x)
  for await (const piece of model.generate({ prompt: 'What?', image: new Uint8Array() })) {
    const { text, alpha }: GeneratedPiece = piece
    console.log(text.length, alpha?.[0].toFixed(2))
  }
  // @ts-expect-error there is no such bucketing
  await levels(data, model, { buckets: 'narrow' })
  // @ts-expect-error a model trains on a dataset, not on its path
  await finetune(model, 'instructions.json')
  // @ts-expect-error no such type of numbers
  await AlignGPT.load('model', { dtype: 'f16' })
  // @ts-expect-error a request needs a prompt
  model.generate({ image: 'cat.png' })
  // @ts-expect-error a batch is a number
  await finetune(model, data, { batch: '4' })
  // @ts-expect-error a plan needs to know the phase
  const wanted: PlanOptions = { batch: 1 }
  console.log(plan(model, wanted).peak.toFixed(), plan('7b', { phase: 'pretrain' }).peak)
  console.log(plan({ llm: 'llm', clip: 'clip', selectFeature: 'cls_patch' }, { phase: 'finetune' }).parameters)
  // @ts-expect-error a new model needs a vision tower
  plan({ llm: 'llm' }, { phase: 'finetune' })
  const evaluation = await evaluate(model, [{ id: '1', question: 'What?', answer: 'A cat' }])
  // @ts-expect-error accuracy is a number
  evaluation.accuracy.split('')
  return evaluation
}

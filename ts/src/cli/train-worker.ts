/** Worker thread of run.ts: one training run. */

import type { MessagePort } from 'node:worker_threads'
import { AlignGPT } from '../aligngpt.js'
import { type DatasetOptions, loadDataset } from '../data/dataset.js'
import type { EvaluationInfo } from '../evaluation/held-out.js'
import type { CreateOptions, LoadOptions } from '../models/load.js'
import type { AlignmentOptions } from '../models/settings.js'
import { finetune, pretrain, type StepInfo, type TrainOptions, type TrainResult } from '../train/trainer.js'

/** What to train; nothing in it is a function. */
export interface TrainJob {
  phase: 'pretrain' | 'finetune'
  /** a new model, or a folder */
  model: { create: CreateOptions } | ({ load: string; clip?: string } & AlignmentOptions)
  place: LoadOptions
  data: { file: string } & Pick<DatasetOptions, 'images' | 'followLinks'>
  options: Omit<TrainOptions, 'signal' | 'onStep' | 'onEvaluation' | 'onMessage'>
}

/** What the thread tells while it runs, and at its end. */
export type TrainNews =
  | { step: StepInfo }
  | { evaluation: EvaluationInfo }
  | { text: string }
  | { figures: string }
  | { result: TrainResult }
  | { error: { code?: string; message: string; stack?: string } }

/** Sent to the thread: finish the step, save, end. */
export type StopRequest = 'stop'

/** The model of a job, as it begins. */
export function openModel({ model, place }: Pick<TrainJob, 'model' | 'place'>): Promise<AlignGPT> {
  if ('create' in model) return AlignGPT.create(model.create, place)
  const { load, ...rest } = model
  return AlignGPT.load(load, { ...place, ...rest })
}

async function run(job: TrainJob, signal: AbortSignal, tell: (news: TrainNews) => void): Promise<TrainResult> {
  const { phase, data, options } = job
  const model = await openModel(job)
  try {
    const { file, ...pictures } = data
    const dataset = await loadDataset(file, pictures)
    tell({ figures: `${dataset.file}: ${dataset.length} records, ${dataset.withImage} with a picture` })
    const key = dataset.imageKey()
    if (key !== null && key !== 'image') tell({ text: `${dataset.file}: the images are those under ${key}` })
    return await (phase === 'pretrain' ? pretrain : finetune)(model, dataset, {
      ...options,
      signal,
      progress: false, // this thread has no terminal
      onStep: (step) => tell({ step }),
      onEvaluation: (evaluation) => tell({ evaluation }),
      onMessage: (text) => tell({ text }),
    })
  } finally {
    model.dispose()
  }
}

export async function work({ trainJob }: { trainJob: TrainJob }, port: MessagePort): Promise<void> {
  const tell = (news: TrainNews): void => port.postMessage(news)
  const controller = new AbortController()
  port.on('message', (m: StopRequest) => m === 'stop' && controller.abort())
  try {
    tell({ result: await run(trainJob, controller.signal, tell) })
  } catch (e) {
    const { code, message, stack } = e as Error & { code?: string }
    tell({ error: { code, message, stack } })
  }
  port.close()
}

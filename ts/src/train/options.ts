/** What a training run can be told, and what holds when it is not. */

import type { Dataset } from '../data/dataset.js'
import type { EvaluationInfo, EvaluationOptions, HeldOut } from '../evaluation/held-out.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { GateText } from '../models/config/aligngpt.js'
import type { OptimizerState } from '../nn/adamw.js'
import type { LoraOptions } from '../nn/lora.js'
import { AlignGPTError } from '../util/errors.js'
import { digestFile } from '../util/files.js'
import type { OutlierOptions } from './outliers.js'
import type { Phase } from './phases.js'
import type { StepInfo } from './types.js'

export interface TrainOptions extends EvaluationOptions {
  /** folder for the model, log.jsonl, state.json and checkpoints; without one nothing is written */
  out?: string
  /** samples of a step (the phase's: 256 in pre-training, 128 in instruction tuning) */
  batch?: number
  /** samples run at once, default 16 at most; the step's gradient is the same whatever it is */
  microBatch?: number
  /** peak learning rate (the phase's: 1e-3, 2e-5; with adapters 2e-4, and 2e-5 for the projector) */
  lr?: number
  /** of the projector, where it is to have its own */
  projectorLr?: number
  /** instruction tuning gives the language model adapters and trains those in its place; without it a model keeps those it has */
  lora?: LoraOptions
  epochs?: number
  /** instead of epochs */
  steps?: number
  /** default 0.03 */
  warmupRatio?: number
  weightDecay?: number
  /** gradients are scaled down to this norm; default 1, null: never */
  clipGradNorm?: number | null
  /** full: 18 bytes for each trained bf16 parameter (default); compact: 10 */
  optimizerState?: OptimizerState
  /** the optimizer's state of a model on a GPU stays in main memory, and the CPU updates it (AdamWOptions.offload) */
  offloadOptimizer?: boolean
  seed?: number
  /** run layers again on the way back instead of keeping their activations */
  recompute?: boolean
  /** batch: token mean over the whole step (default); micro: mean of the micro-batches' means, as the official code */
  lossNorm?: 'batch' | 'micro'
  /** what the gate's text mean sees; all: answers too, as the official code. Default: what the model's config says, else all */
  gateText?: 'all' | 'instruction'
  /** batches of similar lengths */
  groupByLength?: boolean
  /** mild augmentation of the pictures (background, affine, colour) */
  augment?: boolean
  /** threads that decode pictures, 0: this one */
  workers?: number
  /** share of the records that may be unusable before the run stops, default 0.01 */
  maxBad?: number
  /** how the alignment vector is made, instead of the phase's way (the paper's ablations) */
  mix?: Mix
  /** a checkpoint after so many steps, or a time ('90s', '10m', '2h'); default '30m'. null: only when the run is stopped */
  saveEvery?: number | string | null
  /** newest checkpoints that stay, at least 2 (default) */
  keep?: number
  /** an interval longer than the run is no mistake */
  allowLongInterval?: boolean
  /** goes on, bit for bit, from the newest checkpoint of `out` (true; from the beginning when it has none) or of another folder */
  resume?: boolean | string
  /** leaves out the update of steps whose loss or gradient norm is far above those before (default: never) */
  skipOutliers?: boolean | OutlierOptions
  onStep?: (step: StepInfo) => void
  /** told of each evaluation on held-out records (evalShare, evalData) */
  onEvaluation?: (evaluation: EvaluationInfo) => void
  /** what a person should know, such as a checkpoint that could not be saved; default: a line on standard error */
  onMessage?: (text: string) => void
  /** TensorBoard event files in `out`, beside log.jsonl */
  tensorboard?: boolean
  /** a bar on the terminal; default: when standard error is one */
  progress?: boolean
  signal?: AbortSignal
}

/** @throws AlignGPTError ERR_ARGUMENT naming the option, ERR_DATA without records */
export function checkOptions(o: TrainOptions, data: Dataset): void {
  const positive = ['batch', 'microBatch', 'epochs', 'steps'] as const
  for (const key of positive)
    if (o[key] !== undefined && !(Number.isInteger(o[key]) && o[key] > 0))
      throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected an integer > 0, got ${o[key]}`)
  for (const key of ['lr', 'projectorLr', 'warmupRatio', 'weightDecay', 'maxBad'] as const)
    if (o[key] !== undefined && !(Number.isFinite(o[key]) && o[key] >= 0))
      throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected a number >= 0, got ${o[key]}`)
  if (o.keep !== undefined && !(Number.isInteger(o.keep) && o.keep >= 2))
    throw new AlignGPTError('ERR_ARGUMENT', `[train] keep: expected an integer >= 2, got ${o.keep}`)
  if (o.tensorboard && !o.out)
    throw new AlignGPTError(
      'ERR_ARGUMENT',
      '[train] tensorboard: true: expected out, a folder for the event files, got none',
    )
  if (data.length === 0) throw new AlignGPTError('ERR_DATA', `[train] ${data.file}: expected records, got none`)
}

/** Options with what they are when not given. */
export type Resolved = TrainOptions & {
  batch: number
  microBatch: number
  lr: number
  steps: number
  warmupRatio: number
  clipGradNorm: number | null
  seed: number
  mix: Mix
  gateText: GateText
  onMessage: (text: string) => void
}

/** Options of a run on so much data. */
export function resolve(model: AlignGPTNetwork, data: Dataset, phase: Phase, o: TrainOptions): Resolved {
  const batch = Math.min(o.batch ?? phase.batch, data.length)
  return {
    ...o,
    batch,
    microBatch: Math.min(o.microBatch ?? 16, batch),
    lr: o.lr ?? phase.lr,
    steps: o.steps ?? Math.ceil(data.length / batch) * (o.epochs ?? 1),
    warmupRatio: o.warmupRatio ?? 0.03,
    clipGradNorm: o.clipGradNorm === undefined ? 1 : o.clipGradNorm,
    seed: o.seed ?? 0,
    mix: o.mix ?? phase.mix,
    gateText: o.gateText ?? model.config.mm_gate_text,
    onMessage: o.onMessage ?? ((text) => console.error(text)),
  }
}

/** What the numbers of a phase depend on, besides its start and what the loop knows (LoopOptions). */
export function settings(model: AlignGPTNetwork, data: Dataset, phase: Phase, o: Resolved, held: HeldOut | null) {
  const { batch, microBatch, mix } = o
  return {
    phase: phase.name,
    dtype: model.dtype,
    ...{ batch, microBatch, mix },
    gateText: o.gateText,
    alignment: model.config.mm_alignment,
    gate: model.config.mm_gate_type,
    lora: o.lora ?? null,
    projectorLr: phase.projectorLr ?? null,
    groupByLength: o.groupByLength ?? false,
    augment: o.augment ?? false,
    data: { records: data.length, ...digestFile(data.file) },
    evaluation: held?.settings,
  }
}

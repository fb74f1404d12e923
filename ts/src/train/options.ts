/** The options of a training run on a certain model and data: checked, and with what holds for those not given. */
import type { Dataset } from '../data/dataset.js'
import type { EvaluationInfo, HeldOut } from '../evaluation/held-out.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { GateText } from '../models/config/variants.js'
import { AlignGPTError } from '../util/errors.js'
import { digestFile } from '../util/files.js'
import type { Phase } from './phases.js'
import { type Defaulted, type PhaseName, problemOf, type RunSettings, withDefaults } from './run-settings.js'
import type { StepInfo } from './types.js'

/**
 * What a run can be told: the settings of the table (run-settings.ts, docs/config.md), and what only a program can say. Without
 * `out` nothing is written.
 */
export interface TrainOptions extends RunSettings {
  /** how the alignment vector is made, instead of the phase's way (the paper's ablations) */
  mix?: Mix
  onStep?: (step: StepInfo) => void
  /** called after each evaluation on held-out records (evalShare, evalData) */
  onEvaluation?: (evaluation: EvaluationInfo) => void
  /** takes what a person should know, such as a checkpoint that could not be saved; default: a line on standard error */
  onMessage?: (text: string) => void
  /** a bar on the terminal; default: when standard error is one */
  progress?: boolean
  signal?: AbortSignal
}

/** @throws AlignGPTError ERR_ARGUMENT naming the option, ERR_DATA without records */
export function checkOptions(phase: PhaseName, o: TrainOptions, data: Dataset): void {
  const problem = problemOf(phase, o)
  if (problem) {
    const { key, expected, got } = problem
    throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected ${expected}, got ${got}`)
  }
  if (data.length === 0) throw new AlignGPTError('ERR_DATA', `[train] ${data.file}: expected records, got none`)
}

/** Options with what they are when not given. */
export type Resolved = TrainOptions &
  Defaulted & {
    steps: number
    mix: Mix
    gateText: GateText
    onMessage: (text: string) => void
  }

/** Options of a run on so much data. */
export function resolve(model: AlignGPTNetwork, data: Dataset, phase: Phase, options: TrainOptions): Resolved {
  const o = withDefaults(phase.name, options)
  const batch = Math.min(o.batch, data.length)
  return {
    ...o,
    batch,
    microBatch: Math.min(o.microBatch, batch),
    lr: phase.lr,
    steps: o.steps ?? Math.ceil(data.length / batch) * o.epochs,
    mix: o.mix ?? phase.mix,
    // the usual interval may be longer than the run, one that was asked for may not
    allowLongInterval: o.allowLongInterval || options.saveEvery === undefined,
    gateText: o.gateText ?? model.config.mm_gate_text,
    onMessage: o.onMessage ?? ((text) => console.error(text)),
  }
}

/** The style of checkpoints from before it could be chosen, which say nothing of it. */
const USUAL_STYLE = 'vicuna_v1'

/** What the numbers of a phase depend on, besides its start and what the loop knows (LoopOptions). */
export function settings(model: AlignGPTNetwork, data: Dataset, phase: Phase, o: Resolved, held: HeldOut | null) {
  const { batch, microBatch, mix } = o
  return {
    phase: phase.name,
    dtype: model.dtype,
    ...{ batch, microBatch, mix },
    gateText: o.gateText,
    conversation: phase.name === 'pretrain' || phase.style === USUAL_STYLE ? undefined : phase.style,
    alignment: model.config.mm_alignment,
    gate: model.config.mm_gate_type,
    lora: o.lora ?? null,
    projectorLr: phase.projectorLr ?? null,
    groupByLength: o.groupByLength ?? false,
    augment: o.augment ?? false,
    // checkpoints from before it could be chosen say nothing of it
    exifOrientation: model.config.image_exif_orientation || undefined,
    data: { records: data.length, ...digestFile(data.file) },
    evaluation: held?.settings,
  }
}

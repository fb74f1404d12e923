/** What the two phases of the paper train, and their hyper-parameters (arXiv 2405.14129, section 4.1). */
import type { Tensor } from '../core/tensor.js'
import { hasLora } from '../models/adapters.js'
import type { Mix } from '../models/align.js'
import { type AlignGPTNetwork, type Part, partOf } from '../models/aligngpt.js'
import type { Alignment } from '../models/config/variants.js'
import type { Parameter } from '../nn/adamw.js'
import type { Style } from '../processing/conversation/styles.js'
import { AlignGPTError } from '../util/errors.js'
import { ADAPTER_LR, RUN_SETTINGS, type RunSettings } from './run-settings.js'

/** A phase as every model may go through it. */
export interface PhaseDefinition {
  name: 'pretrain' | 'finetune'
  /** parts of the model that learn */
  trainable: readonly Part[]
  mix: Mix
  /** prompt style; null: the model's own (`conversation`) */
  style: Style | null
  /** images padded to a square first */
  pad: boolean
  lr: number
  /** of the projector alone, where it is not lr */
  projectorLr?: number
}

/** A phase as one model goes through it. */
export interface Phase extends PhaseDefinition {
  style: Style
}

/** Phase 1, pre-training: projector and alignment vectors learn; each pair uses the vector of its level. */
export const PRETRAIN: PhaseDefinition = {
  name: 'pretrain',
  trainable: ['projector', 'table'],
  mix: { mode: 'level' },
  style: 'plain',
  pad: false,
  lr: RUN_SETTINGS.lr.default.pretrain,
}

/** Phase 2, instruction tuning: language model, projector and gate learn; the alignment vectors stay. */
export const FINETUNE: PhaseDefinition = {
  name: 'finetune',
  trainable: ['language', 'projector', 'gate'],
  mix: { mode: 'gate' },
  style: null,
  pad: true,
  lr: RUN_SETTINGS.lr.default.finetune,
}

/** Parts that a variant of the model does not use or leaves as they are. */
const FROZEN: Record<Alignment, readonly Part[]> = {
  adaptive: [],
  local: [],
  random: ['table'],
  global: ['gate'],
  average: ['gate'],
  none: ['table', 'gate'],
}

/** A phase as this model goes through it. */
export function phaseOf(
  model: AlignGPTNetwork,
  phase: PhaseDefinition,
  o: Pick<RunSettings, 'lr' | 'projectorLr' | 'conversation'> = {},
): Phase {
  const lora = phase.name === 'finetune' && hasLora(model)
  const lr = o.lr ?? (lora ? ADAPTER_LR : phase.lr)
  if (o.projectorLr !== undefined && lr === 0)
    throw new AlignGPTError('ERR_ARGUMENT', '[train] projectorLr: expected an lr > 0 beside it, got 0')
  const { mm_alignment: alignment } = model.config
  // LLaVA's recipe: the adapters learn in place of the language model
  const parts = phase.trainable.map((part) => (lora && part === 'language' ? 'adapters' : part))
  return {
    ...phase,
    style: phase.style ?? o.conversation ?? model.conversation,
    // all variants learn their vectors level by level first; they part in instruction tuning
    mix: phase.name === 'finetune' || alignment === 'none' ? model.mix : phase.mix,
    trainable: parts.filter((part) => !FROZEN[alignment].includes(part)),
    lr,
    projectorLr: o.projectorLr ?? (lora && o.lr === undefined ? phase.lr : undefined),
  }
}

/** The parameters a phase trains. */
export function trainable(model: AlignGPTNetwork, phase: PhaseDefinition): Parameter[] {
  const projector = phase.projectorLr === undefined ? 1 : phase.projectorLr / phase.lr
  return model
    .partParameters(...phase.trainable)
    .map(([name, tensor]) => ({ name, tensor, lrScale: partOf(name) === 'projector' ? projector : 1 }))
}

/** Saved whatever a phase trains: what AlignGPT adds to its two towers. */
const ALWAYS_SAVED = ['projector', 'table', 'gate'] as const

/** The weights that a run changes or that must not get lost. */
export function savedWeights(
  model: AlignGPTNetwork,
  { trainable }: Pick<PhaseDefinition, 'trainable'>,
): { name: string; tensor: Tensor }[] {
  return model.partParameters(...trainable, ...ALWAYS_SAVED).map(([name, tensor]) => ({ name, tensor }))
}

/** What the two phases of the paper train, and their hyper-parameters (arXiv 2405.14129, section 4.1). */
import type { AlignGPT, Mix } from '../models/aligngpt.js'
import type { Alignment } from '../models/config.js'
import type { Parameter } from '../nn/adamw.js'
import { hasLora, LORA_TRAINABLE } from '../nn/lora.js'
import type { Style } from '../processing/conversation.js'
import { AlignGPTError } from '../util/errors.js'

export interface Phase {
  name: 'pretrain' | 'finetune'
  trainable: RegExp
  /** of those, what a variant of the model does not use or leaves as it is */
  frozen?: RegExp
  mix: Mix
  style: Style
  /** pictures padded to a square first */
  pad: boolean
  lr: number
  batch: number
  /** of the projector alone, where it is not lr */
  projectorLr?: number
}

/** Phase 1, pre-training: projector and alignment vectors learn; each pair uses the vector of its level. */
export const PRETRAIN: Phase = {
  name: 'pretrain',
  trainable: /^mm_projector\.|^align_indicators\./,
  mix: { mode: 'level' },
  style: 'plain',
  pad: false,
  lr: 1e-3,
  batch: 256,
}

/** Phase 2, instruction tuning: language model, projector and gate learn; the alignment vectors stay. */
export const FINETUNE: Phase = {
  name: 'finetune',
  trainable: /^model\.|^lm_head\.|^mm_projector\.|^gated_weight_layer\./,
  mix: { mode: 'gate' },
  style: 'vicuna_v1',
  pad: true,
  lr: 2e-5,
  batch: 128,
}

const FROZEN: Partial<Record<Alignment, RegExp>> = {
  random: /^align_indicators\./,
  global: /^gated_weight_layer\./,
  average: /^gated_weight_layer\./,
  none: /^align_indicators\.|^gated_weight_layer\./,
}

/** LLaVA's rate for adapters; the projector beside them keeps the rate of instruction tuning. */
const LORA_LR = 2e-4

/** A phase as this model goes through it. */
export function phaseOf(model: AlignGPT, phase: Phase, o: { lr?: number; projectorLr?: number } = {}): Phase {
  const lora = phase.name === 'finetune' && hasLora(model)
  const lr = o.lr ?? (lora ? LORA_LR : phase.lr)
  if (o.projectorLr !== undefined && lr === 0)
    throw new AlignGPTError('ERR_ARGUMENT', '[train] projectorLr: expected an lr > 0 beside it, got 0')
  const { mm_alignment: alignment } = model.config
  return {
    ...phase,
    // all variants learn their vectors level by level first; they part in instruction tuning
    mix: phase.name === 'finetune' || alignment === 'none' ? model.mix : phase.mix,
    frozen: FROZEN[alignment],
    trainable: lora ? LORA_TRAINABLE : phase.trainable,
    lr,
    projectorLr: o.projectorLr ?? (lora && o.lr === undefined ? phase.lr : undefined),
  }
}

/** The parameters a phase trains. */
export function trainable(model: AlignGPT, phase: Phase): Parameter[] {
  const projector = phase.projectorLr === undefined ? 1 : phase.projectorLr / phase.lr
  return [...model.namedParameters()]
    .filter(([name]) => phase.trainable.test(name) && !phase.frozen?.test(name))
    .map(([name, tensor]) => ({ name, tensor, lrScale: name.startsWith('mm_projector.') ? projector : 1 }))
}

/** What the two phases of the paper train, and their hyper-parameters (arXiv 2405.14129, section 4.1). */
import type { AlignGPT, Mix } from './aligngpt.js'
import type { Parameter } from './optim.js'
import type { Style } from './prompt.js'

export interface Phase {
  name: 'pretrain' | 'finetune'
  trainable: RegExp
  mix: Mix
  style: Style
  /** pictures padded to a square first */
  pad: boolean
  lr: number
  batch: number
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

/** The parameters a phase trains. */
export function trainable(model: AlignGPT, phase: Phase): Parameter[] {
  return [...model.namedParameters()]
    .filter(([name]) => phase.trainable.test(name))
    .map(([name, tensor]) => ({ name, tensor }))
}

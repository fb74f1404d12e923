/** What the quickstart and the ablations train with. */
import type { CreateOptions, TrainOptions } from 'aligngpt'
import { PRESETS } from 'aligngpt/train'

/**
 * Not LLaVA's -2 without the class row: this CLIP has 4 layers, and what it knows is gathered in that row at the
 * end.
 */
export const VISION: Pick<CreateOptions, 'selectLayer' | 'selectFeature'> = {
  selectLayer: -1,
  selectFeature: 'cls_patch',
}
export const PHASE_1: TrainOptions = { ...PRESETS.tiny.pretrain, progress: false }
export const PHASE_2: TrainOptions = { ...PRESETS.tiny.finetune, progress: false }
/** Of all data and new weights. */
export const SEED = 1
/** Where the quickstart keeps the scores of its pairs, by record. */
export const SCORES = 'scores.json'

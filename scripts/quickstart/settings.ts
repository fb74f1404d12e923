/** What the quickstart and the ablations train with. */
import type { CreateOptions } from '../../ts/src/models/load.js'
import { PRESETS } from '../../ts/src/train/run-settings.js'
import type { TrainOptions } from '../../ts/src/train/trainer.js'

/** Not LLaVA's -2 without the class row: this CLIP has 4 layers, and what it knows is gathered in that row at the end. */
export const VISION: Pick<CreateOptions, 'selectLayer' | 'selectFeature'> = {
  selectLayer: -1,
  selectFeature: 'cls_patch',
}
export const PHASE_1: TrainOptions = { ...PRESETS.tiny.pretrain, progress: false }
export const PHASE_2: TrainOptions = { ...PRESETS.tiny.finetune, progress: false }
/** Where the quickstart keeps the scores of its pairs, by record. */
export const SCORES = 'scores.json'

/** AlignGPT for Node: train, evaluate and run a multimodal large language model (arXiv 2405.14129). */

export { AlignGPT } from './aligngpt.js'
export { type Dataset, type DatasetOptions, type Dropped, loadDataset } from './data/dataset.js'
export {
  type Answer,
  type EvaluateOptions,
  type Evaluation,
  evaluate,
  type Judge,
  type Question,
} from './evaluation/evaluate.js'
export type { Best, EvaluationInfo, EvaluationOptions, HeldOutGroup } from './evaluation/held-out.js'
export type { DataRecord, Turn } from './formats/record-file.js'
export type {
  Generated,
  GeneratedPiece,
  GenerateOptions,
  GenerateRequest,
  Sampling,
} from './inference/generate.js'
export { type LevelsOptions, levels } from './levels/clip-scores.js'
export type { Mix } from './models/align.js'
export type { Alignment, Gate, GateText } from './models/config/variants.js'
export type { CreateOptions, LoadOptions } from './models/load.js'
export type { AlignmentOptions, ModelOptions, NewModelOptions } from './models/settings.js'
export type { LoraOptions } from './nn/lora.js'
export type { ChatStyle, Style } from './processing/conversation/styles.js'
export { type MemoryPlan, type Planned, type PlanOptions, plan } from './train/memory-plan.js'
export type { OutlierOptions } from './train/outliers.js'
export { finetune, pretrain, type StepInfo, type TrainOptions, type TrainResult } from './train/trainer.js'
export { AlignGPTError } from './util/errors.js'

/** AlignGPT for Node: train, evaluate and run a multimodal large language model (arXiv 2405.14129). */

export { type Dropped } from './data/drop-log.js'
export { AlignGPT } from './aligngpt.js'
export { memory } from './core/tensor.js'
export { type Dataset, type DatasetOptions, loadDataset } from './data/dataset.js'
export {
  type CheckOptions,
  type CheckReport,
  checkDataset,
  type Finding,
  PROBLEMS,
  type ProblemKind,
} from './data/lint.js'
export {
  type Answer,
  type EvaluateOptions,
  type Evaluation,
  evaluate,
  evaluateLoss,
  type Judge,
  type Question,
} from './evaluation/evaluate.js'
export type { Best, EvaluationInfo, EvaluationOptions, HeldOutGroup } from './evaluation/held-out.js'
export type { DataRecord, Turn } from './formats/record-file.js'
export {
  type Generated,
  type GeneratedPiece,
  type GenerateOptions,
  type GenerateRequest,
  generateBatch,
  type Sampling,
} from './inference/generate.js'
export { type Buckets, bucketLevels, type Levels, writeLevels } from './levels/bucket.js'
export { clipScores, type LevelsOptions, levels, type Pair } from './levels/clip-scores.js'
export { addLora, mergeLora } from './models/adapters.js'
export type { Mix } from './models/align.js'
export type { Alignment, Gate, GateText } from './models/config/aligngpt.js'
export { type AlignmentOptions, type CreateOptions, type LoadOptions, loadClip } from './models/load.js'
export { loadAdapter, saveAdapter } from './models/peft.js'
export type { LoraOptions } from './nn/lora.js'
export { saveTokenizer, trainBpe, trainClipBpe } from './processing/bpe-trainer.js'
export type { Style } from './processing/conversation/styles.js'
export { findCheckpoint, listCheckpoints, type Manifest, verifyCheckpoint } from './train/checkpoint.js'
export { largestMicroBatch, type MemoryPlan, type PlanModel, type PlanOptions, plan } from './train/memory-plan.js'
export type { OutlierOptions } from './train/outliers.js'
export { finetune, pretrain, type StepInfo, type TrainOptions, type TrainResult } from './train/trainer.js'
export { AlignGPTError } from './util/errors.js'

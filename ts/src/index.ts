/** AlignGPT for Node: train, evaluate and run a multimodal large language model (arXiv 2405.14129). */

export { memory } from './core/tensor.js'
export { type Dataset, type DatasetOptions, type Dropped, loadDataset } from './data/dataset.js'
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
export {
  AlignGPT,
  type AlignmentOptions,
  type CreateOptions,
  type LoadOptions,
  loadClip,
  type Mix,
} from './models/aligngpt.js'
export type { Alignment, Gate, GateText } from './models/config.js'
export { addLora, type LoraOptions, loadAdapter, mergeLora, saveAdapter } from './nn/lora.js'
export { saveTokenizer, trainBpe, trainClipBpe } from './processing/bpe-trainer.js'
export type { DataRecord, Style, Turn } from './processing/conversation.js'
export { findCheckpoint, listCheckpoints, type Manifest, verifyCheckpoint } from './train/checkpoint.js'
export { largestMicroBatch, type MemoryPlan, type PlanModel, type PlanOptions, plan } from './train/memory-plan.js'
export type { OutlierOptions } from './train/outliers.js'
export { finetune, pretrain, type StepInfo, type TrainOptions, type TrainResult } from './train/trainer.js'
export { AlignGPTError } from './util/errors.js'

/** AlignGPT for Node: train, evaluate and run a multimodal large language model (arXiv 2405.14129). */
export {
  AlignGPT,
  type AlignmentOptions,
  type CreateOptions,
  type LoadOptions,
  loadClip,
  type Mix,
} from './aligngpt.js'
export { saveTokenizer, trainBpe, trainClipBpe } from './bpe.js'
export { type CheckOptions, type CheckReport, checkDataset, type Finding, PROBLEMS, type ProblemKind } from './check.js'
export { findCheckpoint, listCheckpoints, type Manifest, verifyCheckpoint } from './checkpoint.js'
export type { Alignment, Gate, GateText } from './config.js'
export { type Dataset, type DatasetOptions, type Dropped, loadDataset } from './data.js'
export { AlignGPTError } from './errors.js'
export {
  type Answer,
  type EvaluateOptions,
  type Evaluation,
  evaluate,
  evaluateLoss,
  type Judge,
  type Question,
} from './evaluate.js'
export {
  type Generated,
  type GeneratedPiece,
  type GenerateOptions,
  type GenerateRequest,
  generateBatch,
  type Sampling,
} from './generate.js'
export type { OutlierOptions } from './guard.js'
export type { Best, EvaluationInfo, EvaluationOptions, HeldOutGroup } from './heldout.js'
export { type Buckets, bucketLevels, type Levels, writeLevels } from './levels.js'
export { addLora, type LoraOptions, loadAdapter, mergeLora, saveAdapter } from './lora.js'
export { largestMicroBatch, type MemoryPlan, type PlanModel, type PlanOptions, plan } from './plan.js'
export type { DataRecord, Style, Turn } from './prompt.js'
export { clipScores, type LevelsOptions, levels, type Pair } from './score.js'
export { memory } from './tensor.js'
export { finetune, pretrain, type StepInfo, type TrainOptions, type TrainResult } from './train.js'

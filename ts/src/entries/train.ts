/**
 * aligngpt/train: the training loop for any model; adapters, checkpoints, the memory of a step and the loss on a
 * data set.
 */
export { evaluateLoss } from '../evaluation/likelihood.js'
export { addLora, mergeLora } from '../models/adapters.js'
export { loadAdapter, saveAdapter } from '../models/peft.js'
export { findCheckpoint, listCheckpoints, type Manifest, verifyCheckpoint } from '../train/checkpoint.js'
export { shuffled, train } from '../train/loop.js'
export { largestMicroBatch } from '../train/memory-plan.js'
export { PRESETS } from '../train/run-settings.js'
export type {
  BatchSource,
  Evaluator,
  LoopHooks,
  LoopOptions,
  LoopResult,
  LoopStep,
  MicroOptions,
  MicroResult,
  RunSink,
  TrainableModel,
} from '../train/types.js'

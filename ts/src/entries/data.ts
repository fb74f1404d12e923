/** aligngpt/data: data sets of image-text pairs and conversations, their checks and their alignment levels. */

export { Dataset } from '../data/dataset.js'
export {
  type CheckOptions,
  type CheckReport,
  checkDataset,
  type Finding,
  PROBLEMS,
  type ProblemKind,
} from '../data/lint.js'
export { type Buckets, bucketLevels, type Levels } from '../levels/bucket.js'
export { writeLevels } from '../levels/write-levels.js'

/**
 * aligngpt/data: data sets of image-text pairs and conversations, their checks, their alignment levels, and their
 * way to numbers: conversations to tokens with labels, image files to normalised pixels.
 */
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
export { render } from '../processing/conversation/styles.js'
export type { Piece } from '../processing/conversation/turns.js'
export { augment } from '../processing/image/augment.js'
export { decodeImage, type RgbImage } from '../processing/image/decode.js'
export { normaliseInto, normaliseTable, preprocessImage } from '../processing/image/preprocess.js'
export { encodePieces, IGNORE } from '../processing/sample.js'

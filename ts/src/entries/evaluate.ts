/** aligngpt/evaluate, as it was called until 0.1: `evaluate` is in aligngpt, `evaluateLoss` in aligngpt/train. */
import { deprecated } from '../util/deprecation.js'

export { otherImages as otherPictures } from '../evaluation/blind.js'
export * from '../evaluation/evaluate.js'
export { type Judge, matches } from '../evaluation/judge.js'
export { evaluateLoss } from '../evaluation/likelihood.js'
export type { Question } from '../evaluation/questions.js'

deprecated('aligngpt/evaluate', 'aligngpt and aligngpt/train')

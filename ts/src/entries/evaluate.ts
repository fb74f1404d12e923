/** aligngpt/evaluate, as it was called until 0.1: `evaluate` is in aligngpt, `evaluateLoss` in aligngpt/train. */
import { deprecated } from '../util/deprecation.js'

export * from '../evaluation/evaluate.js'

deprecated('aligngpt/evaluate', 'aligngpt and aligngpt/train')

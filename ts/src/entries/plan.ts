/** aligngpt/plan, as it was called until 0.1: `plan` is in aligngpt, `largestMicroBatch` in aligngpt/train. */
import { deprecated } from '../util/deprecation.js'

export * from '../train/memory-plan.js'

deprecated('aligngpt/plan', 'aligngpt and aligngpt/train')

/**
 * One row per op: how to call it, a plain f64 reference, and the shapes to try. `op-checks.ts` makes from each row:
 * forward against the reference (f32, bf16, f64), gradient check in f64, run twice, one thread against two, no leak.
 */

import { alignSpec } from './align.js'
import { attentions } from './attention.js'
import { elementwise } from './elementwise.js'
import { matrix } from './linear.js'
import { losses } from './loss.js'
import { norms } from './norm.js'
import type { Spec } from './reference.js'

export * from './reference.js'

export const specs: Spec[] = [...elementwise, ...matrix, ...norms, ...attentions, alignSpec, ...losses]

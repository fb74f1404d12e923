/** Queries, keys and values as one product. */
import { concat, linear, type QkvArgs, qkvLinear, slice } from '../core/ops.js'
import { scope, type Tensor, zeros } from '../core/tensor.js'
import type { Linear } from './layers.js'

type Three = readonly [Linear, Linear, Linear]

/** Puts the values of layers with one input behind each other in memory, so that their products can be one (`qkvLinear`). */
export function fuseQkv(layers: readonly Linear[]): void {
  for (const key of ['weight', 'bias'] as const) {
    const parts = layers.flatMap((l) => l[key] ?? [])
    if (parts.length < layers.length) continue
    const whole = scope(() => concat(parts, 0).persist())
    let at = 0
    for (const [i, l] of layers.entries()) {
      const end = at + parts[i].shape[0]
      Object.assign(l, { [key]: scope(() => slice(whole, 0, at, end).persist()) })
      parts[i].dispose()
      at = end
    }
    whole.dispose() // the views keep its memory
  }
}

/** `qkvLinear` with the layers of queries, keys and values, their adapters included. */
export function projectQkv(x: Tensor, layers: Three, o: Omit<QkvArgs, 'weights' | 'biases' | 'plus'>): Tensor {
  return scope(() => {
    const updates = layers.map((l) => l.update((a) => linear(x, a)))
    const part = (u: Tensor | null, i: number): Tensor =>
      u ?? zeros([x.shape[0], layers[i].weight.shape[0]], x.dtype, x.device)
    return qkvLinear(x, {
      ...o,
      weights: [layers[0].weight, layers[1].weight, layers[2].weight],
      biases: layers.flatMap((l) => l.bias ?? []),
      plus: updates.some(Boolean) ? concat(updates.map(part), 1) : null,
    })
  })
}

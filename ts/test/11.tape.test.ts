/** Scopes, handles and the tape. */
import { expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import * as ops from '../src/core/ops.js'
import { backward, memory, noGrad, scope, type Tensor, tensor, zeros } from '../src/core/tensor.js'

test('a scope frees what was made in it, except its result', () => {
  const before = memory()
  let inner: Tensor | undefined
  const kept = scope(() => {
    inner = tensor([1, 2])
    return { sum: ops.add(inner, inner), list: [ops.scale(inner, 3)] }
  })
  expect(inner?.live).toBe(false)
  expect(Array.from(kept.sum.toFloats())).toEqual([2, 4])
  expect(Array.from(kept.list[0].toFloats())).toEqual([3, 6])
  kept.sum.dispose()
  kept.list[0].dispose()
  expect(memory().handles).toBe(before.handles)
  expect(memory().inUse).toBe(before.inUse)
})

test('a tensor handed through several scopes survives exactly as far as it is handed', () => {
  let middle: Tensor | undefined
  scope(() => {
    middle = scope(() => scope(() => tensor([7])))
    expect(middle.item()).toBe(7)
  })
  expect(middle?.live).toBe(false)
})

test('what lives outside is not moved by being returned', () => {
  const outside = tensor([1]).persist()
  scope(() => scope(() => outside))
  expect(outside.live).toBe(true)
  outside.dispose()
})

test('scopes end in order, also when the function throws or is asynchronous', () => {
  const before = memory().handles
  expect(() =>
    scope(() => {
      tensor([1])
      throw new Error('inside')
    }),
  ).toThrow('inside')
  expect(() => scope(async () => tensor([1]))).toThrow(/expected a synchronous one/)
  expect(() => native.scopeEnd(5)).toThrow(/depth/)
  expect(memory().handles).toBe(before)
})

test('gradients accumulate until they are zeroed; unreached parameters read zero', () => {
  scope(() => {
    const w = tensor([2]).requiresGrad()
    const unused = tensor([5]).requiresGrad()
    const buffer = tensor([9])
    native.setGrad(unused.h, buffer.h)
    for (const expected of [3, 6]) {
      backward(ops.scale(w, 3))
      expect(w.grad()?.item()).toBe(expected)
    }
    native.zeroGrad([w.h])
    backward(ops.scale(w, 3))
    expect(w.grad()?.item()).toBe(3)
    expect(unused.grad()?.item()).toBe(0)
  })
})

test('a value used twice gets both gradients, and sharing does not corrupt either', () => {
  scope(() => {
    const x = tensor([1, 2, 3]).requiresGrad()
    const y = ops.add(x, x) // both gradients are the same storage
    const z = ops.add(ops.mul(y, y), y)
    backward(ops.sum(z))
    // z = 4x^2 + 2x
    expect(Array.from(x.grad()?.toFloats() ?? [])).toEqual([10, 18, 26])
  })
})

test('a graph can be used once; without recording there is none', () => {
  scope(() => {
    const x = tensor([3]).requiresGrad()
    const y = ops.mul(x, x)
    backward(y)
    expect(() => backward(y)).toThrow(/already used/)
    const z = noGrad(() => ops.mul(x, x))
    expect(() => backward(z)).toThrow(/does not/)
    expect(() => backward(ops.concat([x, x], 0))).toThrow(/single element/)
    expect(() => y.requiresGrad()).toThrow(/expected a leaf/)
    expect(() => tensor(Int32Array.of(1)).requiresGrad()).toThrow(/float/)
  })
})

test("a norm's output is not kept for backward but computed again, with the same gradients", () => {
  scope(() => {
    const values = (n: number, s: number): Float32Array => Float32Array.from({ length: n }, (_, i) => Math.sin(s + i))
    const run = (through: (y: Tensor) => Tensor): { kept: number; grads: unknown[] } =>
      scope(() => {
        const [x, a, b] = [1, 2, 3].map((s) => tensor(values(64 * 64, s), [64, 64]).requiresGrad())
        const w = tensor(values(64, 4)).requiresGrad()
        const before = memory().inUse
        const y = scope(() => {
          const n = through(ops.rmsNorm(x, w, 1e-5))
          return ops.add(ops.linear(n, a), ops.linear(n, b))
        })
        const kept = memory().inUse - before
        backward(ops.mean(y))
        return { kept, grads: [x, w, a, b].map((t) => Array.from(t.grad()?.toFloats() ?? [])) }
      })
    const again = run((n) => n)
    const stored = run((n) => ops.reshape(n, [64, 64])) // a view has to be kept
    expect(stored.kept - again.kept).toBe(64 * 64 * 4)
    expect(again.grads).toEqual(stored.grads)
  })
})

test('saved tensors die with their node, also in a chain of 20,000 ops', () => {
  const before = memory()
  scope(() => {
    let y: Tensor = tensor(new Float32Array(64)).requiresGrad()
    for (let i = 0; i < 20_000; i++) y = ops.scale(y, 1)
    backward(ops.sum(y))
  })
  scope(() => {
    let y: Tensor = tensor(new Float32Array(64)).requiresGrad()
    for (let i = 0; i < 20_000; i++) y = ops.scale(y, 1) // and never differentiated
  })
  expect(memory().inUse).toBe(before.inUse)
})

test('2,000 steps leave bytes and handles flat', () => {
  const w = tensor(new Float32Array(32 * 16).fill(0.01), [32, 16])
    .persist()
    .requiresGrad()
  const step = (): void =>
    scope(() => {
      const x = tensor(new Float32Array(8 * 16).fill(1), [8, 16])
      backward(ops.mean(ops.linear(x, w, null, 'gelu')))
      native.zeroGrad([w.h])
    })
  step()
  const before = memory()
  for (let i = 0; i < 2000; i++) step()
  const after = memory()
  expect(after.inUse).toBe(before.inUse)
  expect(after.handles).toBe(before.handles)
  expect(after.reserved).toBe(before.reserved)
  w.dispose()
})

test('what the tape keeps and somebody writes into is refused, not differentiated', () => {
  const before = memory().inUse
  const refused = (write: (t: Record<'x' | 'w' | 'ids', Tensor>) => void): void =>
    scope(() => {
      const [x, w] = [tensor([1, 2, 3, 4], [2, 2]).requiresGrad(), tensor([1, 2, 3, 4], [2, 2]).requiresGrad()]
      const ids = tensor(Int32Array.of(1, 0))
      const y = ops.sum(ops.gather(ops.linear(ops.rmsNorm(x, tensor([1, 1]), 1e-6), w), ids))
      write({ x, w, ids })
      backward(y)
    })
  refused(({ x }) => expect(x.toArray()).toHaveLength(4)) // reading is none
  const changed = (op: string): RegExp =>
    new RegExp(`^\\[backward\\] ${op}: a tensor .* expected as in the forward pass`)
  expect(() => refused(({ ids }) => ids.write(Int32Array.of(0, 1)))).toThrow(changed('gather'))
  expect(() => refused(({ w }) => native.fill(w.h, 2))).toThrow(changed('linear'))
  expect(() => refused(({ x }) => native.copy(x.h, ops.scale(x, 2).h))).toThrow(changed('linear')) // its input is computed again
  expect(() => refused(({ x, w }) => native.copy(ops.scale(w, 1).h, x.h))).not.toThrow() // x was read
  // a view shares the storage, and with it the mark
  expect(() => refused(({ w }) => native.fill(ops.reshape(w.detach(), [4]).h, 0))).toThrow(changed('linear'))
  expect(() => refused(({ w }) => native.adamw(update(w)))).toThrow(changed('linear'))
  expect(memory().inUse).toBe(before)
})

const update = (w: Tensor): Parameters<typeof native.adamw>[0] => ({
  ...{
    params: [w.h],
    grads: [ops.scale(w.detach(), 1).h],
    masters: [null],
    m: [zeros([2, 2]).h],
    v: [zeros([2, 2]).h],
  },
  ...{
    lrScale: [1],
    weightDecay: [0],
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    lr: 1e-3,
    step: 1,
    normSquared: null,
    maxNorm: 0,
  },
  seed: 0,
})

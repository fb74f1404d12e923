/** Optimizer, sampling, random numbers, casts. */

import { expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { scope, tensor } from '../src/core/tensor.js'
import { AdamW } from '../src/nn/adamw.js'
import { cosineRate } from '../src/nn/schedule.js'

/** PyTorch's AdamW, spelled out in f64. */
function reference(p: number[], grads: number[][], lr: number, wd: number): number[] {
  const [b1, b2, eps] = [0.9, 0.999, 1e-8]
  return p.map((start, i) => {
    let [x, m, v] = [start, 0, 0]
    for (const [t, g] of grads.entries()) {
      m = b1 * m + (1 - b1) * g[i]
      v = b2 * v + (1 - b2) * g[i] ** 2
      x = x * (1 - lr * wd) - (lr * m) / (1 - b1 ** (t + 1)) / (Math.sqrt(v) / Math.sqrt(1 - b2 ** (t + 1)) + eps)
    }
    return x
  })
}

const CASES = [
  ['f32', 'full', 5e-7],
  // five steps of f32 rounding; bf16 keeps 8 bits, the rest of the value all of them
  ['bf16', 'full', 2 ** -8],
  // and the moments are rounded to 8 bits in each step
  ['bf16', 'compact', 2 ** -8],
] as const
for (const [dtype, state, limit] of CASES)
  test(`AdamW on ${dtype} parameters with the ${state} state follows PyTorch's formula`, () => {
    const n = 1003 // not a multiple of any vector width
    const start = Float32Array.from({ length: n }, (_, i) => Math.fround(((i % 17) - 8) / 8))
    // exact in bf16, so that the norm is the same for every dtype of the gradient
    const grads = Array.from({ length: 5 }, (_, t) =>
      Array.from({ length: n }, (_, i) => ((i + 3 * t) % 15) / 8 - 0.75),
    )
    const p = tensor(start, [n], dtype).persist()
    const optimizer = new AdamW([{ name: 'w.weight', tensor: p }], { weightDecay: 0.1, state })
    for (const g of grads) {
      scope(() => native.write(native.grad(p.h) as number, Float32Array.from(g)))
      expect(optimizer.update(1e-2)).toBeCloseTo(Math.hypot(...g), 4)
    }
    const want = reference(Array.from(start), grads, 1e-2, 0.1)
    const got = p.toFloats()
    for (let i = 0; i < n; i++)
      expect(Math.abs(got[i] - want[i])).toBeLessThanOrEqual(limit * Math.max(1, Math.abs(want[i])))
    optimizer.dispose()
    p.dispose()
  })

/** 300 steps towards the minimum of sum (w - target)^2 / 2 with a small rate. */
function descend(state: 'full' | 'compact', seed = 0): { w: Float32Array; bytes: number } {
  const n = 4096
  const before = native.memory().inUse
  const p = tensor(new Float32Array(n).fill(1), [n], 'bf16').persist()
  const optimizer = new AdamW([{ name: 'w', tensor: p }], { state, seed })
  const bytes = (native.memory().inUse - before) / n
  for (let step = 0; step < 300; step++) {
    const w = p.toFloats()
    scope(() =>
      native.write(
        native.grad(p.h) as number,
        Float32Array.from(w, (x, i) => x - i / n),
      ),
    )
    optimizer.update(1e-4)
  }
  const w = p.toFloats() as Float32Array
  optimizer.dispose()
  p.dispose()
  return { w, bytes }
}

test('the compact state takes 10 bytes a parameter, loses no small update and is the same every time', () => {
  const full = descend('full')
  const compact = descend('compact')
  expect([full.bytes, compact.bytes]).toEqual([18, 10])
  // 300 updates of 1e-4 are a quarter of a unit of bf16 at most each: without the low bits nothing would have moved
  for (const [i, w] of compact.w.entries()) expect(Math.abs(w - full.w[i])).toBeLessThanOrEqual(2 ** -7)
  expect(compact.w[0]).toBeLessThan(0.975)
  expect(descend('compact').w).toEqual(compact.w)
  expect(descend('compact', 1).w).not.toEqual(compact.w)
  expect(() => new AdamW([], { state: 'compact' })).toThrow(/at least one/)
  const p = tensor([1]).persist()
  expect(() => new AdamW([{ name: 'p', tensor: p }], { state: 'small' as 'full' })).toThrow(
    /expected full or compact, got small/,
  )
  p.dispose()
})

test('a gradient that is not finite stops before anything changes', () => {
  const p = tensor([1, 2, 3]).persist()
  const optimizer = new AdamW([{ name: 'p', tensor: p }])
  for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
    scope(() => native.write(native.grad(p.h) as number, Float32Array.of(1, bad, 1)))
    expect(() => optimizer.update(0.1)).toThrow(/gradient norm: expected a finite number/)
    expect(Array.from(p.toFloats())).toEqual([1, 2, 3])
    expect(optimizer.step).toBe(0)
  }
  optimizer.dispose()
  p.dispose()
})

test('the schedule warms up from zero and ends at zero', () => {
  const o = { lr: 1, totalSteps: 100, warmupRatio: 0.03 }
  expect([0, 1, 2, 3].map((s) => cosineRate(s, o))).toEqual([0, 1 / 3, 2 / 3, 1])
  expect(cosineRate(100, o)).toBeCloseTo(0, 12)
  expect(cosineRate(0, { ...o, warmupRatio: 0 })).toBe(1)
})

test('sampling: greedy, top-k, top-p and the shares of the draws', () => {
  scope(() => {
    const logits = tensor([0, 2, 1, 2, -5], [1, 5]).h
    expect(native.sample(logits, 0, 0, 1, [0.99])).toEqual([1]) // the lower id on ties
    const draws = (k: number, p: number): Map<number, number> => {
      const seen = new Map<number, number>()
      for (let i = 0; i < 1000; i++) {
        const [id] = native.sample(logits, 1, k, p, [(i + 0.5) / 1000])
        seen.set(id, (seen.get(id) ?? 0) + 1)
      }
      return seen
    }
    const e = [0, 2, 1, 2, -5].map(Math.exp)
    const total = e.reduce((a, b) => a + b)
    for (const [id, n] of draws(0, 1)) expect(Math.abs(n / 1000 - e[id] / total)).toBeLessThan(2e-3)
    expect([...draws(2, 1).keys()].sort()).toEqual([1, 3])
    expect([...draws(0, 0.5).keys()].sort()).toEqual([1, 3]) // 1 alone has 0.38, with 3 it is 0.76
    expect([...draws(0, 0.9).keys()].sort()).toEqual([1, 2, 3])
    expect(() => native.sample(tensor([Number.NaN, 1], [1, 2]).h, 1, 0, 1, [0.5])).toThrow(/NaN/)
  })
})

test('random numbers depend on seed and place only, and have the right moments', () => {
  scope(() => {
    const make = (n: number, kind: 'uniform' | 'normal', seed: number): number[] => {
      const t = native.zeros([n], 'f64')
      native.random(t, kind, kind === 'uniform' ? -1 : 2, kind === 'uniform' ? 3 : 0.5, seed, 0)
      return Array.from(native.read(t) as Float64Array)
    }
    const long = make(40001, 'normal', 7)
    expect(make(1001, 'normal', 7)).toEqual(long.slice(0, 1001))
    expect(make(10, 'normal', 8)).not.toEqual(long.slice(0, 10))
    const mean = long.reduce((a, b) => a + b) / long.length
    const variance = long.reduce((a, b) => a + (b - mean) ** 2, 0) / long.length
    expect(mean).toBeCloseTo(2, 1)
    expect(Math.sqrt(variance)).toBeCloseTo(0.5, 1)
    const uniform = make(40001, 'uniform', 7)
    expect(Math.min(...uniform)).toBeGreaterThanOrEqual(-1)
    expect(Math.max(...uniform)).toBeLessThan(3)
  })
})

test('bf16 rounds to nearest even and keeps NaN and infinities', () => {
  scope(() => {
    const x = [
      1,
      1 + 2 ** -8,
      1 + 3 * 2 ** -8,
      3.4e38,
      Number.NaN,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
      -0,
    ]
    expect(Array.from(tensor(x, [8], 'bf16').toFloats())).toEqual([
      1,
      1,
      1 + 2 ** -6,
      Number.POSITIVE_INFINITY,
      Number.NaN,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
      -0,
    ])
  })
})

/** Packed weights: when they are dropped, what they cost, what cannot be packed. Their results: op-checks.ts. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import * as ops from '../src/core/ops.js'
import { backward, memory, scope, type Tensor, tensor, zeros } from '../src/core/tensor.js'
import { AdamW } from '../src/nn/adamw.js'

const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-packed-'))
afterAll(() => fs.rmSync(temp, { recursive: true, force: true }))

const ROWS = 40
const COLS = 24
const numbers = (n: number, seed: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => Math.sin(i + seed))
const matrix = (seed: number): Tensor => tensor(numbers(ROWS * COLS, seed), [ROWS, COLS])
const inUse = (): number => memory().inUse
/** x w^T and y w, what a packed w is used for. */
const products = (w: Tensor): number[][] =>
  scope(() => {
    const x = tensor(numbers(20 * COLS, 1), [20, COLS])
    const y = tensor(numbers(20 * ROWS, 2), [20, ROWS])
    return [ops.linear(x, w), ops.matmul(y, w)].map((t) => Array.from(t.toFloats()))
  })
const packBoth = (w: Tensor): number => ops.pack(w, true) + ops.pack(w, false)

describe('a packed weight is dropped by whatever changes it:', () => {
  const other = matrix(9).persist()
  const file = path.join(temp, 'weight')
  native.writeFile(other.h, file, 0)
  const state = (): number[] => [zeros([ROWS, COLS]).h]
  const adamw = (p: number, g: number, m: number, v: number): void =>
    native.adamw({
      ...{ params: [p], grads: [g], masters: [null], m: [m], v: [v], lrScale: [1], weightDecay: [0], lr: 0.1, step: 1 },
      ...{ beta1: 0.9, beta2: 0.99, eps: 1e-8, normSquared: null, maxNorm: 0, seed: 0 },
    })
  const writers: Record<string, (w: Tensor) => void> = {
    write: (w) => w.write(numbers(ROWS * COLS, 5)),
    fill: (w) => native.fill(w.h, 3),
    copy: (w) => native.copy(w.h, other.h),
    random: (w) => native.random(w.h, 'normal', 0, 1, 1, 0),
    readFile: (w) => native.readFile(w.h, file, 0, 'f32'),
    'keys that go into it': (w) => {
      const x = tensor(numbers(5, 6), [1, 5])
      const weight = tensor(numbers(5 * COLS, 7), [COLS, 5])
      const [k, v] = [ops.reshape(w, [2, ROWS / 2, COLS]), zeros([2, ROWS / 2, COLS])]
      const rope = { positions: zeros([1], 'i32'), cos: zeros([1, COLS / 2]), sin: zeros([1, COLS / 2]) }
      const cache = { k, v, slots: tensor(Int32Array.of(3)) }
      ops.qkvLinear(x, { heads: 1, kvHeads: 1, weights: [weight, weight, weight], rope, cache })
    },
    'adamw as parameter': (w) => adamw(w.h, other.h, state()[0], state()[0]),
    'adamw as moment': (w) => adamw(state()[0], other.h, w.h, state()[0]),
    'a write to a view': (w) => native.fill(ops.slice(w, 0, 1, 2).h, 7),
    'a gradient that goes into it': (w) => {
      const leaf = tensor(numbers(ROWS * COLS, 7), [ROWS, COLS]).requiresGrad()
      native.setGrad(leaf.h, w.h)
      native.zeroGrad([leaf.h])
      packBoth(w)
      backward(ops.sum(ops.mul(leaf, other)))
    },
    'a product that accumulates into it': (w) => {
      const leaf = tensor(numbers(ROWS * COLS, 8), [ROWS, COLS]).requiresGrad()
      native.setGrad(leaf.h, w.h)
      packBoth(w)
      backward(ops.sum(ops.linear(tensor(numbers(3 * COLS, 3), [3, COLS]), leaf)))
    },
  }
  for (const [name, change] of Object.entries(writers))
    test(name, () =>
      scope(() => {
        const w = matrix(4)
        const before = products(w)
        packBoth(w)
        change(w)
        const after = products(w)
        expect(after).not.toEqual(before)
        expect(after).toEqual(products(tensor(w.toFloats(), [ROWS, COLS])))
      }),
    )
  afterAll(() => other.dispose())
})

test('what becomes a parameter is no longer packed, and an optimizer step is seen', () => {
  const w = matrix(4).persist()
  const plain = inUse()
  packBoth(w)
  const optimizer = new AdamW([{ name: 'w', tensor: w }])
  const trained = inUse()
  expect(() => ops.pack(w)).toThrow(/\[pack\] weight: expected one that wants no gradient/)
  const before = products(w)
  scope(() => backward(ops.sum(ops.linear(tensor(numbers(COLS, 3), [1, COLS]), w))))
  optimizer.update(0.1, 1)
  expect(products(w)).not.toEqual(before)
  optimizer.dispose()
  w.requiresGrad(false)
  expect(trained).toBeGreaterThan(plain)
  expect(inUse()).toBe(plain)
  w.dispose()
})

test('its bytes are counted, once, and freed with the tensor, its scope or unpack', () => {
  const start = inUse()
  scope(() => {
    const w = matrix(1)
    const plain = inUse()
    const bytes = packBoth(w)
    expect(bytes).toBeGreaterThanOrEqual(2 * 4 * ROWS * COLS)
    const packed = inUse()
    expect(packed).toBeGreaterThanOrEqual(plain + bytes)
    packBoth(w)
    expect(inUse()).toBe(packed)
    ops.unpack(w)
    expect(inUse()).toBe(plain)
    packBoth(w)
  })
  expect(inUse()).toBe(start)
  const w = matrix(1).persist()
  packBoth(w)
  w.dispose()
  expect(inUse()).toBe(start)
})

test('a view of other shape or place does not take it', () =>
  scope(() => {
    const w = tensor(numbers(48 * 24, 1), [48, 24])
    packBoth(w)
    for (const view of [ops.reshape(w, [24, 48]), ops.slice(w, 0, 24, 48)]) {
      const copy = tensor(view.toFloats(), view.shape)
      const x = tensor(numbers(20 * view.shape[1], 2), [20, view.shape[1]])
      expect(ops.linear(x, view).toFloats()).toEqual(ops.linear(x, copy).toFloats())
    }
  }))

test('what cannot be packed', () =>
  scope(() => {
    const w = matrix(1)
    const refused = (t: Tensor, message: RegExp): void => expect(() => ops.pack(t)).toThrow(message)
    refused(tensor(Int32Array.of(1, 2), [1, 2]), /\[pack\] weight: expected/)
    refused(tensor([1, 2, 3]), /\[pack\] weight: expected rank 2/)
    const gone = matrix(2)
    gone.dispose()
    refused(gone, /\[pack\] tensor: expected a live handle/)
    expect(ops.pack(zeros([0, 5]))).toBe(0)
    const before = inUse()
    native.failAfter(0)
    refused(w, /\[memory\]/)
    native.failAfter(-1)
    expect(inUse()).toBe(before)
  }))

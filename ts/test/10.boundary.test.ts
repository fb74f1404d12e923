/** Hostile arguments on every export: always a JavaScript error, never a crash, and nothing is lost. */
import { afterAll, describe, expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { memory, tensor } from '../src/core/tensor.js'

type Any = (...args: unknown[]) => unknown
const all = native as unknown as Record<string, Any>
/** Exports without arguments, and those that change the process for the tests after them. */
const harmless = new Set([
  'scopeBegin',
  'memory',
  'resetPeak',
  'trim',
  'capabilities',
  'probeCuda',
  'threads',
  'fileCalls',
])
const settings = new Set(['setThreads', 'failAfter', 'failFiles', 'setGradEnabled'])

const live = tensor([1, 2, 3, 4, 5, 6], [2, 3]).persist()
const dead = tensor([1])
dead.dispose()
const detached = new Float32Array(8)
structuredClone(detached.buffer, { transfer: [detached.buffer] })
const hostile: unknown[] = [
  undefined,
  null,
  Number.NaN,
  -1,
  0.5,
  2 ** 53,
  -(2 ** 53),
  Number.POSITIVE_INFINITY,
  '',
  'f32',
  true,
  10n,
  Symbol('s'),
  [],
  [Number.NaN],
  [2 ** 53],
  [-1],
  [1, 2, 3, 4, 5, 6, 7, 8, 9],
  [2 ** 40, 2 ** 40],
  {},
  () => 1,
  new Float32Array(3),
  new Uint8Array(3),
  detached,
  live.h,
  dead.h,
  live.h + 2 ** 24,
  live.h + 2 ** 45,
  new Proxy([], {
    get: () => {
      throw new RangeError('trap')
    },
  }),
]

afterAll(() => live.dispose())

/** Calls and accepts success or an Error; anything else fails the test (a crash ends it). */
function provoke(name: string, args: unknown[]): boolean {
  try {
    const result = all[name](...args)
    if (typeof result === 'number' && native.isLive(result) && name !== 'isLive') native.dispose(result)
    return false
  } catch (e) {
    expect(e).toBeInstanceOf(Error)
    return true
  }
}

describe('hostile arguments', () => {
  for (const name of Object.keys(all).sort())
    test(name, () => {
      if (harmless.has(name)) return expect(() => all[name]()).not.toThrow()
      const depth = native.scopeBegin()
      let refused = 0
      let tried = 0
      for (let arity = 0; arity <= 12; arity++)
        for (const [i, value] of hostile.entries()) {
          if (settings.has(name) && (value === true || (typeof value === 'number' && value > 0))) continue
          // the same value everywhere, and a live tensor first with the value behind it
          for (const args of [
            Array(arity).fill(value),
            Array.from({ length: arity }, (_, k) => (k === 0 ? live.h : hostile[(i + k) % hostile.length])),
          ]) {
            if (name === 'dispose' && args[0] === live.h) continue
            if (name === 'failAfter' && typeof args[0] === 'number' && args[0] >= 0) continue
            if (name === 'setThreads' && typeof args[0] === 'number' && args[0] >= 1) continue
            tried++
            if (provoke(name, args)) refused++
          }
        }
      expect(refused).toBeGreaterThan(tried / 2)
      native.setGradEnabled(true)
      native.failAfter(-1)
      native.failFiles(-1, 1, false)
      native.requiresGrad(live.h, false)
      try {
        native.scopeEnd(depth)
      } catch {
        // scopeBegin and scopeEnd may have been part of the provocation
      }
      expect(native.isLive(live.h)).toBe(true)
      expect(Array.from(native.shape(live.h))).toEqual([2, 3])
    })
})

test('errors carry a code and say what: expected and got', () => {
  const cases: [() => unknown, string, RegExp][] = [
    [
      () => native.matmul(live.h, live.h, false, false),
      'ERR_SHAPE',
      /^\[matmul\] inner dimension: expected 3, got \[2, 3\]/,
    ],
    [() => native.shape(dead.h), 'ERR_HANDLE', /expected a live handle of this thread, got \d+/],
    [() => native.zeros([2, -1], 'f32'), 'ERR_SHAPE', /dimension 1: expected >= 0, got -1/],
    [() => native.zeros([2 ** 40, 2 ** 40], 'f32'), 'ERR_SHAPE', /too many elements/],
    [() => native.zeros([Number.NaN], 'f32'), 'ERR_ARGUMENT', /expected a safe integer, got nan/],
    [() => native.zeros([1], 'f16' as 'f32'), 'ERR_DTYPE', /expected f32, bf16, f64, i32 or i64, got 'f16'/],
    [() => native.tensor(detached, [8], 'f32'), 'ERR_SHAPE', /expected 8 elements/],
    [() => native.gather(live.h, tensor(Int32Array.of(5)).h), 'ERR_RANGE', /index\[0\]: expected 0\.\.1, got 5/],
    [() => native.embedding(live.h, live.h), 'ERR_SHAPE', /index: expected rank 1/],
    [() => (native as unknown as Record<string, Any>).add(live.h), 'ERR_ARGUMENT', /arguments: expected 2, got 1/],
  ]
  for (const [call, code, message] of cases) {
    const error = (() => {
      try {
        call()
      } catch (e) {
        return e as Error & { code: string }
      }
    })()
    expect(error?.code).toBe(code)
    expect(error?.message).toMatch(message)
  }
})

test('running out of memory is an error that leaves everything usable', () => {
  const six = tensor([1, 2, 3, 4, 5, 6])
  const before = memory()
  native.failAfter(0)
  expect(() => native.zeros([3], 'f32')).toThrow(/ERR_MEMORY|allocation of 12 bytes failed/)
  native.failAfter(-1)
  const t = native.add(six.h, six.h)
  expect(Array.from(native.read(t) as Float32Array)).toEqual([2, 4, 6, 8, 10, 12])
  native.dispose(t)
  expect(memory().inUse).toBe(before.inUse)
  six.dispose()
  expect(() => native.zeros([2 ** 46], 'f32')).toThrow(/out of memory|ERR_MEMORY/)
})

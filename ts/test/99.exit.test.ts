/** Worker threads, several at once, and clean exits. */
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { Worker } from 'node:worker_threads'
import { expect, test } from 'vitest'
import { native, nativeFile } from '../src/core/native.js'
import { tensor } from '../src/core/tensor.js'

const addon = nativeFile
const BODY = `
const { parentPort, workerData } = require('node:worker_threads')
const native = require(workerData.addon)
const n = 96
const a = native.tensor(Float32Array.from({ length: n * n }, (_, i) => (i % 13) - 6), [n, n], 'f32')
let sum = 0
for (let i = 0; i < 40; i++) {
  const depth = native.scopeBegin()
  native.requiresGrad(a, true)
  const y = native.sum(native.mul(native.matmul(a, a, false, true), a))
  native.backward(y, null)
  sum = native.read(native.grad(a))[7]
  native.zeroGrad([a])
  native.scopeEnd(depth)
}
let foreign = ''
try { native.shape(workerData.handle) } catch (e) { foreign = e.code }
parentPort.postMessage({ sum, foreign, handle: a })
`

test('several workers compute the same, at once, and share no handles', async () => {
  createRequire(import.meta.url)(addon)
  const mine = tensor([1, 2, 3]).persist()
  const results = await Promise.all(
    Array.from(
      { length: 4 },
      () =>
        new Promise<{ sum: number; foreign: string; handle: number }>((resolve, reject) => {
          const worker = new Worker(BODY, { eval: true, workerData: { addon, handle: mine.h } })
          worker.on('message', resolve)
          worker.on('error', reject)
        }),
    ),
  )
  for (const r of results) {
    expect(r.sum).toBe(results[0].sum)
    expect(r.foreign).toBe('ERR_HANDLE')
    expect(() => native.shape(r.handle)).toThrow(/live handle of this thread/)
  }
  expect(Array.from(mine.toFloats())).toEqual([1, 2, 3])
  mine.dispose()
})

const start = `const native = require(${JSON.stringify(addon)}); const a = native.tensor(new Float32Array(90000), [300, 300], 'f32'); native.matmul(a, a, false, false);`
const endings: Record<string, [string, number]> = {
  'at the end': [start, 0],
  'process.exit with live tensors': [`${start} process.exit(3)`, 3],
  'an exception': [`${start} throw new Error('x')`, 1],
  'a worker ended in the middle of its work': [
    `${start} const { Worker } = require('node:worker_threads');
     const w = new Worker(${JSON.stringify(`const native = require(${JSON.stringify(addon)}); const a = native.tensor(new Float32Array(90000), [300, 300], 'f32'); for (;;) { native.dispose(native.matmul(a, a, false, false)) }`)}, { eval: true });
     setTimeout(() => w.terminate(), 300)`,
    0,
  ],
}
for (const [name, [code, status]] of Object.entries(endings))
  test(`exit: ${name}`, () => {
    const run = spawnSync(process.execPath, ['-e', code], { encoding: 'utf8', timeout: 30_000 })
    expect(run.signal).toBeNull()
    expect(run.status, run.stderr).toBe(status)
  })

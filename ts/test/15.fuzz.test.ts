/** What fuzzing found in the native core's boundary (npm run fuzz, npm run long). */
import { spawnSync } from 'node:child_process'
import { expect, test } from 'vitest'
import { nativeFile } from '../src/core/native.js'

// The calls that make arrays and objects, or throw, are those that notice that their environment ends.
const THREADS = `
const { Worker } = require('node:worker_threads')
const busy = \`
const { turns, file } = require('node:worker_threads').workerData
const core = require(file)
const t = core.tensor(new Float32Array(64).fill(1), [8, 8], 'f32')
for (;;) {
  for (const call of [() => core.shape(t), () => core.memory(), () => core.read(t), () => core.matmul(t, t, false, false), () => core.dtype(0)])
    try { const h = call(); if (typeof h === 'number') core.dispose(h) } catch {}
  Atomics.add(turns, 0, 1)
}
\`
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
;(async () => {
  for (let n = 0; n < 30; n++) {
    const turns = new Int32Array(new SharedArrayBuffer(4))
    const worker = new Worker(busy, { eval: true, workerData: { turns, file: process.argv[1] } })
    while (turns[0] === 0) await pause(1)
    await worker.terminate()
  }
  const { inUse, handles } = require(process.argv[1]).memory()
  console.log(JSON.stringify({ inUse, handles }))
})()
`

test('threads are ended in the middle of native calls', () => {
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, ['-e', THREADS, nativeFile], {
    encoding: 'utf8',
  })
  expect({ status, signal, stderr }).toEqual({ status: 0, signal: null, stderr: '' })
  expect(JSON.parse(stdout)).toEqual({ inUse: 0, handles: 0 })
}, 60_000)

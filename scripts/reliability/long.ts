/**
 * Long runs: training steps, answers, and threads that are ended in the middle of native calls. What is held may not grow:
 * `npm run long -- --steps 20000`. Ends with status 1 when it does (docs/reliability.md).
 */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { Command } from 'commander'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { integer } from '../../ts/src/cli/options.js'
import { native, nativeFile } from '../../ts/src/core/native.js'
import { loadDataset } from '../../ts/src/data/dataset.js'
import { finetune } from '../../ts/src/train/trainer.js'
import { Rng } from '../../ts/src/util/rng.js'

const base = fileURLToPath(new URL('../../ts/test/golden/base/', import.meta.url))
const MIB = 2 ** 20

/** What the process holds. */
interface Held {
  at: number
  rss: number
  heap: number
  external: number
  /** bytes of tensors, and handles of this thread */
  native: number
  tensors: number
  files: number
  resources: number
}
/** Growth from the first sample behind the warm-up to the last that is no growth. */
const NOISE = { rss: 24 * MIB, heap: 3 * MIB, external: 3 * MIB, native: 0, tensors: 0, files: 0, resources: 0 }

function held(at: number): Held {
  globalThis.gc?.()
  const { rss, heapUsed, external } = process.memoryUsage()
  const m = native.memory()
  return {
    ...{ at, rss, heap: heapUsed, external, native: m.inUse, tensors: m.handles },
    files: fs.readdirSync('/proc/self/fd').length,
    resources: process.getActiveResourcesInfo().length,
  }
}

/** The medians of the second and the last fifth are compared: one sample may fall in the middle of something. */
function grown(what: string, samples: readonly Held[]): string[] {
  const fifth = Math.max(1, Math.floor(samples.length / 5))
  const middle = (part: readonly Held[], key: keyof typeof NOISE): number =>
    part.map((s) => s[key]).sort((a, b) => a - b)[part.length >> 1]
  return (Object.keys(NOISE) as (keyof typeof NOISE)[]).flatMap((key) => {
    const from = middle(samples.slice(fifth, 2 * fifth + 1), key)
    const to = middle(samples.slice(-fifth), key)
    return to > from + NOISE[key] ? [`${what}: ${key} ${from} -> ${to}`] : []
  })
}

const o = new Command('long')
  .description('long runs: nothing that is held may grow')
  .option('--steps <n>', 'training steps', integer, 20_000)
  .option('--answers <n>', 'generated answers', integer, 20_000)
  .option('--threads <n>', 'threads that are started and ended', integer, 1000)
  .option('--samples <n>', 'of each', integer, 20)
  .option('--seed <n>', 'of the moments', integer, 1)
  .parse()
  .opts()

const wrong: string[] = []
function judge(what: string, count: number, seconds: number, samples: Held[]): void {
  const mib = (key: 'rss' | 'heap' | 'external'): string =>
    [samples[Math.floor(samples.length / 4)], samples.at(-1)]
      .map((s) => ((s?.[key] ?? 0) / MIB).toFixed(1))
      .join(' -> ')
  const last = samples.at(-1) as Held
  console.log(
    `${what}: ${count} in ${Math.round(seconds)} s; MiB: resident ${mib('rss')}, heap ${mib('heap')}, external ${mib('external')}; ` +
      `tensors ${last.tensors} of ${last.native} bytes, ${last.files} descriptors, ${last.resources} resources`,
  )
  wrong.push(...grown(what, samples))
}

async function training(out: string): Promise<void> {
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'), { device: 'cpu' })
  const data = await loadDataset(path.join(base, 'data_phase2.json'), { images: path.join(base, 'images') })
  const every = Math.max(1, Math.floor(o.steps / o.samples))
  const samples: Held[] = []
  const start = performance.now()
  await finetune(model, data, {
    ...{ out, steps: o.steps, batch: 2, lr: 1e-4, seed: o.seed, workers: 0, progress: false },
    saveEvery: every,
    onStep: ({ step }) => {
      if ((step + 1) % every === 0) samples.push(held(step + 1))
    },
  })
  judge('training steps', o.steps, (performance.now() - start) / 1000, samples)
  model.dispose()
}

async function answers(): Promise<void> {
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'), { device: 'cpu' })
  const every = Math.max(1, Math.floor(o.answers / o.samples))
  const samples: Held[] = []
  const start = performance.now()
  for (let done = 0; done < o.answers; ) {
    const requests = Array.from({ length: 8 }, (_, i) => ({
      prompt: `What is this, ${(done + i) % 400}?`,
      ...(i % 2 && { image: path.join(base, `images/a0${i}.png`) }),
    }))
    // images of this name are there for some numbers only
    const kept = requests.map((r) => ('image' in r && !fs.existsSync(r.image as string) ? { prompt: r.prompt } : r))
    await model.generateBatch(kept, { maxNewTokens: 4 })
    done += kept.length
    if (done % every < kept.length) samples.push(held(done))
  }
  judge('answers', o.answers, (performance.now() - start) / 1000, samples)
  model.dispose()
}

/** Never idle: kernels of the pool, tensors that come and go, a tape. The native core alone, so that it starts at once. */
const BUSY = `
const { turns, file } = require('node:worker_threads').workerData
const core = require(file)
const w = core.tensor(new Float32Array(128 * 128).fill(0.01), [128, 128], 'f32')
core.persist(w)
core.requiresGrad(w, true)
for (;;) {
  const depth = core.scopeBegin()
  const x = core.tensor(new Float32Array(64 * 128).fill(0.5), [64, 128], 'f32')
  const y = core.matmul(core.matmul(x, w, false, false), w, false, false)
  core.backward(core.sum(core.mul(core.add(y, y), y)), null)
  core.scopeEnd(depth)
  Atomics.add(turns, 0, 1)
}
`

/** Threads that multiply, and are ended whenever. */
async function threads(): Promise<void> {
  const rng = new Rng(o.seed)
  const every = Math.max(1, Math.floor(o.threads / o.samples))
  const samples: Held[] = []
  const start = performance.now()
  let midway = 0
  for (let n = 0; n < o.threads; n++) {
    const turns = new Int32Array(new SharedArrayBuffer(4))
    const worker = new Worker(BUSY, { eval: true, execArgv: [], workerData: { turns, file: nativeFile } })
    worker.on('error', (e) => wrong.push(`thread ${n}: ${e.message}`))
    for (let waited = 0; turns[0] === 0 && waited < 10_000; waited++)
      await new Promise((resolve) => setTimeout(resolve, 1))
    await new Promise((resolve) => setTimeout(resolve, rng.int(4)))
    const before = turns[0]
    await worker.terminate()
    if (before > 0) midway++
    if ((n + 1) % every === 0) samples.push(held(n + 1))
  }
  if (midway < o.threads) wrong.push(`only ${midway} of ${o.threads} threads were ended at work`)
  judge('threads', o.threads, (performance.now() - start) / 1000, samples)
}

const out = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt long '))
try {
  if (o.threads) await threads()
  if (o.answers) await answers()
  if (o.steps) await training(out)
} finally {
  fs.rmSync(out, { recursive: true })
}
console.log(wrong.length ? `WRONG: ${wrong.join('; ')}` : 'as it must be')
process.exitCode = wrong.length ? 1 : 0

/** Tensors and models on a device of their own. What needs a GPU runs where there is one, or on its emulation. */

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test, vi } from 'vitest'
import { makeBatch } from '../../scripts/bench/model.js'
import { AlignGPT } from '../src/aligngpt.js'
import { resolveDevice } from '../src/core/device.js'
import { type Device, native } from '../src/core/native.js'
import { add, embedding, gather, matmul, scale, sum, to } from '../src/core/ops.js'
import { backward, Graph, memory, scope, type Tensor, tensor, zeros } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { generateBatch } from '../src/inference/generate.js'
import type { LlamaModel } from '../src/models/llama.js'
import type { PackedBatch } from '../src/models/packed-batch.js'
import { AdamW } from '../src/nn/adamw.js'
import { PhaseModel } from '../src/train/phase-model.js'
import { finetune, pretrain, type StepInfo, type TrainOptions } from '../src/train/trainer.js'

const found = native.probeCuda()
afterEach(() => void vi.unstubAllEnvs())

test('the CPU has no graphs', () => {
  expect(() => new Graph('cpu', () => 0)).toThrow(expect.objectContaining({ code: 'ERR_UNSUPPORTED' }))
})

describe('choosing', () => {
  test('names that are none', () => {
    expect(() => resolveDevice('gpu' as Device)).toThrow('[device] expected auto, cpu or cuda, got gpu')
    expect(() => zeros([1], 'f32', 'cuda:1' as Device)).toThrow("[device] expected cpu or cuda, got 'cuda:1'")
    vi.stubEnv('ALIGNGPT_DEVICE', 'gpu')
    expect(() => resolveDevice()).toThrow('got gpu')
  })
  test('the environment decides what was left open, and nothing else', () => {
    vi.stubEnv('ALIGNGPT_DEVICE', 'cpu')
    expect(resolveDevice()).toBe('cpu')
    expect(resolveDevice('auto')).toBe('cpu')
    vi.stubEnv('ALIGNGPT_DEVICE', 'cuda')
    expect(resolveDevice('cpu')).toBe('cpu')
  })
  test.runIf(typeof found === 'string')('without a GPU: auto is the CPU, cuda an error that says why', () => {
    vi.stubEnv('ALIGNGPT_DEVICE', undefined)
    expect(resolveDevice()).toBe('cpu')
    expect(() => resolveDevice('cuda')).toThrow(found as string)
    expect(() => zeros([1], 'f32', 'cuda')).toThrow(expect.objectContaining({ code: 'ERR_DEVICE', message: found }))
  })
  test.runIf(typeof found !== 'string')('with a GPU: auto takes it, but not for f64', () => {
    vi.stubEnv('ALIGNGPT_DEVICE', undefined)
    expect(resolveDevice()).toBe('cuda')
    expect(resolveDevice('auto', 'f64')).toBe('cpu')
    expect(() => resolveDevice('cuda', 'f64')).toThrow('expected dtype f32 or bf16, got f64')
  })
})

test.runIf(typeof found !== 'string' && found.level === 'emulated')(
  'a GPU that fails is named as such by whatever asks it next; the CPU goes on',
  () => {
    const source = (name: string): string => JSON.stringify(new URL(`../src/${name}`, import.meta.url).href)
    const code = `
      import { add, scale } from ${source('core/ops.ts')}
      import { scope, tensor, zeros } from ${source('core/tensor.ts')}
      const told = (f) => { try { f(); return 'nothing' } catch (e) { return e.code + ' ' + e.message } }
      const [x, late] = [[1, 2], [3, 4]].map((values) => tensor(values, [2], 'f32', 'cuda').persist())
      scope(() => add(x, x)) // nobody looks at it
      console.log(told(() => x.toArray()))
      console.log(told(() => late.write(Float32Array.of(1, 2))))
      console.log(told(() => zeros([1 << 20], 'f32', 'cuda')))
      console.log(scope(() => scale(tensor([3], [1]), 2).item()))`
    const { stdout, stderr, status } = spawnSync(
      process.execPath,
      ['--import', 'tsx', '--input-type=module', '-e', code],
      { encoding: 'utf8', env: { ...process.env, ALIGNGPT_EMULATED_FAULT: '1' } },
    )
    const failed = /^ERR_DEVICE \[(copy|memory)\] .*an illegal memory access was encountered/
    const lines = stdout.trim().split('\n')
    expect({ lines, stderr, status }).toEqual({
      lines: [...new Array(3).fill(expect.stringMatching(failed)), '6'],
      stderr: '',
      status: 0,
    })
  },
)

describe.runIf(typeof found !== 'string')('tensors on the GPU', () => {
  test('go there and back, in every dtype', () => {
    scope(() => {
      for (const values of [
        Float32Array.of(1.5, -2),
        Float64Array.of(0.1, 3),
        Int32Array.of(7, -8),
        BigInt64Array.of(9n),
      ]) {
        const t = tensor(values, [values.length], undefined, 'cuda')
        expect(t.device).toBe('cuda')
        expect(t.toArray()).toEqual(values)
        expect(to(t, 'cpu').device).toBe('cpu')
        expect(to(t, 'cpu').toArray()).toEqual(values)
      }
      expect(tensor([1.00390625], [1], 'bf16', 'cuda').item()).toBe(1)
    })
  })
  test('a tensor elsewhere and indices on the GPU are errors', () => {
    scope(() => {
      const [a, b] = [zeros([2, 2], 'f32', 'cuda'), zeros([2, 2])]
      expect(() => add(a, b)).toThrow('[add] tensors: expected all on cuda, got one on cpu')
      const ids = tensor(Int32Array.of(0), [1], 'i32', 'cuda')
      expect(() => gather(a, ids)).toThrow('[gather] index: expected indices on the cpu, got them on cuda')
    })
  })
  test('indices that are written to are seen', () => {
    scope(() => {
      const x = tensor([10, 11, 12, 13], [4, 1], 'f32', 'cuda')
      const ids = tensor(Int32Array.of(3, 0))
      expect(Array.from(gather(x, ids).toFloats())).toEqual([13, 10])
      ids.write(Int32Array.of(1, 2))
      expect(Array.from(gather(x, ids).toFloats())).toEqual([11, 12])
    })
  })
  test('gradients cross devices', () => {
    scope(() => {
      const w = tensor([1, 2, 3, 4], [2, 2]).requiresGrad()
      const y = sum(scale(matmul(to(w, 'cuda'), to(w, 'cuda')), 2))
      backward(y)
      const here = tensor([1, 2, 3, 4], [2, 2]).requiresGrad()
      backward(sum(scale(matmul(here, here), 2)))
      expect(y.device).toBe('cuda')
      expect(w.grad()?.device).toBe('cpu')
      expect(w.grad()?.toArray()).toEqual(here.grad()?.toArray())
    })
  })
  test('out of memory leaves everything usable', () => {
    const before = memory('cuda')
    native.failAfter(0, 'cuda')
    expect(() => zeros([3], 'f32', 'cuda')).toThrow(/allocation of 12 bytes failed/)
    native.failAfter(-1, 'cuda')
    scope(() => expect(embedding(tensor(Int32Array.of(1)), zeros([2, 3], 'f32', 'cuda')).shape).toEqual([1, 3]))
    expect(memory('cuda').inUse).toBe(before.inUse)
    expect(memory('cpu').inUse).toBe(memory().inUse)
  })
  for (const [dtype, state] of [
    ['f32', 'full'],
    ['bf16', 'full'],
    ['bf16', 'compact'],
  ] as const)
    test(`AdamW with its state in main memory gives the bits of the CPU: ${dtype}, ${state}`, () => {
      const sizes = [(1 << 20) + 3, 5, 0, 7, 9] // more pieces than there are places for them
      const train = (device: Device, offload: boolean): Buffer[] => {
        const before = memory(device).inUse
        const parameters = sizes.map((n, k) => {
          const start = Float32Array.from({ length: n }, (_, i) => ((i * (k + 3)) % 31) / 16 - 1)
          return { name: `p${k}.weight`, tensor: tensor(start, [n], dtype, device).persist() }
        })
        const weights = memory(device).inUse - before
        const optimizer = new AdamW(parameters, { state, offload, seed: 5, weightDecay: 0.1 })
        const gradients = weights * (dtype === 'bf16' && state === 'full' ? 2 : 1)
        if (offload) expect(memory(device).inUse - before).toBeLessThan(weights + gradients + (1 << 18))
        for (let step = 0; step < 3; step++) {
          for (const { tensor: p } of parameters) {
            const g = Float32Array.from({ length: p.numel }, (_, i) => ((i + 7 * step) % 29) / 8 - 1.5)
            scope(() => native.write(native.grad(p.h) as number, g))
          }
          optimizer.update(1e-2)
        }
        const values = parameters.map((p) => Buffer.from(p.tensor.toArray().buffer))
        optimizer.dispose()
        for (const p of parameters) p.tensor.dispose()
        return values
      }
      const here = train('cpu', false)
      expect(train('cuda', true).map((b, i) => b.equals(here[i]))).toEqual(sizes.map(() => true))
    })
  test('a graph is launched on what its inputs hold then, and its memory is nobody else’s', () => {
    const before = memory('cuda')
    const x = tensor([1, 2, 3, 4], [4, 1], 'f32', 'cuda').persist()
    const ids = tensor(Int32Array.of(0, 1)).persist()
    const graph = new Graph('cuda', () => scope(() => scale(add(gather(x, ids), gather(x, ids)), 10)).persist())
    const values = (): number[] => {
      scope(() => void Array.from({ length: 8 }, () => zeros([2, 1], 'f32', 'cuda'))) // would land where the graph works
      graph.launch()
      return Array.from(graph.result.toFloats())
    }
    expect(values()).toEqual([20, 40])
    expect(values()).toEqual([20, 40])
    ids.write(Int32Array.of(3, 2))
    expect(values()).toEqual([80, 60])
    x.write(Float32Array.of(0, 0, 5, 6))
    expect(values()).toEqual([120, 100])
    expect(() => new Graph('cuda', () => new Graph('cuda', () => 0))).toThrow('expected no other graph being recorded')
    expect(() => new Graph('cuda', () => scope(() => gather(x, tensor(Int32Array.of(9)))))).toThrow('[gather] index[0]')
    expect(values()).toEqual([120, 100])
    graph.dispose()
    expect(() => graph.launch()).toThrow('[graphLaunch] graph: expected a live one of this thread')
    for (const t of [x, ids, graph.result]) t.dispose()
    expect(memory('cuda').inUse).toBe(before.inUse)
  })
  test('a model answers the same with a graph for each step, on its device', async () => {
    const base = fileURLToPath(new URL('golden/base/', import.meta.url))
    const model = await AlignGPT.load(path.join(base, 'model/aligngpt'), { device: 'cuda' })
    const before = memory('cuda').inUse
    const requests = [
      { prompt: 'What is this?', image: path.join(base, 'images/a00.png') },
      { prompt: 'What is a gradient?' },
    ]
    const ask = (graphs: string) => {
      vi.stubEnv('ALIGNGPT_CUDA_GRAPHS', graphs)
      return generateBatch(model, requests, { maxNewTokens: 10, temperature: 1, seed: 3 })
    }
    const plain = await ask('0')
    const launches = vi.spyOn(native, 'graphLaunch')
    expect(await ask('1')).toEqual(plain)
    expect(launches.mock.calls.length).toBeGreaterThan(5)
    launches.mockRestore()
    expect(plain[0].ids.length).toBeGreaterThan(3)
    expect([...model.namedParameters()].every(([, t]) => t.device === 'cuda')).toBe(true)
    expect(memory('cuda').inUse - before).toBeLessThan(1 << 16) // the rotary tables
    model.dispose()
  })
  test('two graphs in the same memory: each has its results, and what they work in is there once', () => {
    const x = tensor(new Float32Array(4096).fill(1), [64, 64], 'f32', 'cuda').persist()
    const work = () => scope(() => sum(matmul(matmul(x, x), matmul(x, x)))).persist()
    const before = memory('cuda').reserved
    const first = new Graph('cuda', work)
    const own = memory('cuda').reserved - before
    const second = new Graph('cuda', () => scope(() => scale(work(), 2)).persist(), first)
    expect(memory('cuda').reserved - before).toBeLessThan(own + 1024)
    first.launch()
    second.launch()
    expect([first.result.item(), second.result.item()]).toEqual([64 ** 5, 2 * 64 ** 5])
    first.dispose()
    second.launch()
    expect(second.result.item()).toBe(2 * 64 ** 5)
    second.dispose()
    for (const t of [x, first.result, second.result]) t.dispose()
  })
  describe('training with graphs', () => {
    const base = fileURLToPath(new URL('golden/base/', import.meta.url))
    const load = () => AlignGPT.load(path.join(base, 'model/aligngpt'), { device: 'cuda' })
    const data = (name: string) => loadDataset(path.join(base, name), { images: path.join(base, 'images') })
    const options = { batch: 6, microBatch: 2, steps: 5, seed: 1, lr: 1e-3, warmupRatio: 0, workers: 0 }
    /** Losses of a run, how often a shape was recorded and launched, and what the run left behind. */
    const run = async (train: typeof pretrain, file: string, graphs: string, o: TrainOptions = {}) => {
      vi.stubEnv('ALIGNGPT_CUDA_GRAPHS', graphs)
      const model = await load()
      model.language.rotary(model.config.tokenizer_model_max_length)
      const before = memory('cuda').inUse
      const recorded = vi.spyOn(native, 'graphBegin')
      const launched = vi.spyOn(native, 'graphLaunch')
      const coefficients: number[][] = []
      const onStep = (s: StepInfo): number => coefficients.push(s.coefficients)
      const { loss } = await train(model, await data(file), { ...options, ...o, onStep })
      const counts = { recorded: recorded.mock.calls.length, launched: launched.mock.calls.length }
      for (const spy of [recorded, launched]) spy.mockRestore()
      expect(memory('cuda').inUse).toBe(before)
      model.dispose()
      return { loss, coefficients, ...counts }
    }
    const near = (a: number[], b: number[]): void => {
      expect(a.length).toBe(b.length)
      for (const [i, x] of a.entries()) expect(Math.abs(x - b[i])).toBeLessThan(2e-5 * Math.max(1, Math.abs(b[i])))
    }
    for (const [name, train, file, o, microBatches] of [
      ['pre-training', pretrain, 'data_phase1.json', {}, 13], // an epoch's last step has two records
      ['instruction tuning', finetune, 'data_phase2.json', {}, 10],
      ['instruction tuning with recompute', finetune, 'data_phase2.json', { recompute: true, lossNorm: 'micro' }, 10],
    ] as const)
      test(`${name}: the losses and weights of a run without, batches of several shapes`, async () => {
        const plain = await run(train, file, '0', o)
        expect(plain.launched).toBe(0)
        const graphs = await run(train, file, '1', o)
        near(graphs.loss, plain.loss)
        near(graphs.coefficients.flat(), plain.coefficients.flat())
        expect(graphs.launched).toBe(microBatches - 1) // all but the first
        expect(graphs.recorded).toBeGreaterThan(1)
        expect(graphs.recorded).toBeLessThan(microBatches - 1)
      })
    test('what is not finite stops the run with the weights as they were', async () => {
      vi.stubEnv('ALIGNGPT_CUDA_GRAPHS', '1')
      const model = await load()
      const weight = (model.model as LlamaModel).norm.weight
      const learns = model.mm_projector?.namedParameters().next().value?.[1] as Tensor
      let before: unknown
      const broken = () => {
        weight.write(new Float32Array(weight.numel).fill(Number.NaN))
        before = learns.toArray()
        return 0
      }
      const onStep = ({ step }: StepInfo): number => (step === 2 ? broken() : 0)
      const records = await data('data_phase1.json')
      await expect(pretrain(model, records, { ...options, onStep })).rejects.toThrow(
        /\[train\] loss: expected a finite/,
      )
      expect(learns.toArray()).toEqual(before)
      model.dispose()
    })
    test('an id that the embedding table has not is named', async () => {
      vi.stubEnv('ALIGNGPT_CUDA_GRAPHS', '1')
      const model = await load()
      const batch = makeBatch(model, [7, 9])
      const parameters = [{ name: 'lm_head', tensor: model.headWeight.requiresGrad() }]
      const steps = new PhaseModel(model, { mode: 'gate' }, parameters)
      const run = (b: PackedBatch) => scope(() => void steps.lossAndGradients(b, { denominator: 1, micro: 0 }))
      for (const _ of [1, 2]) run(batch)
      const lossTargets = batch.lossTargets.with(0, 1e6)
      expect(() => run({ ...batch, lossTargets })).toThrow(/lossTargets: expected ids below \d+, got 1000000/)
      steps.dispose()
      model.dispose()
    })
    test('a level that the model has not is named', async () => {
      vi.stubEnv('ALIGNGPT_CUDA_GRAPHS', '1')
      const model = await load()
      const scores = vi.spyOn(native, 'graphLaunch')
      const records = await data('data_phase1.json')
      const record = records.record.bind(records)
      records.record = (i) => ({ ...record(i), similarity: scores.mock.calls.length ? 99 : 1 })
      const error = await pretrain(model, records, { ...options, steps: 40 }).catch((e) => e)
      expect(error.message).toMatch(/expected a level 0\.\.\d, got 99/)
      scores.mockRestore()
      model.dispose()
    })
  })
  test('files', () => {
    const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'device-'))
    try {
      const file = path.join(dir, 'values')
      const values = Float32Array.from({ length: (1 << 20) + 3 }, (_, i) => (i % 1000) - 500)
      scope(() => {
        const t = tensor(values, [values.length], 'f32', 'cuda')
        native.writeFile(t.h, file, 0)
        expect(
          new Float32Array(fs.readFileSync(file).buffer.slice(0, values.length * 4)).every((v, i) => v === values[i]),
        ).toBe(true)
        const back = zeros([values.length], 'bf16', 'cuda')
        native.readFile(back.h, file, 0, 'f32')
        expect(back.toFloats()[1 << 20]).toBe(((1 << 20) % 1000) - 500)
      })
    } finally {
      fs.rmSync(dir, { recursive: true })
    }
  })
})

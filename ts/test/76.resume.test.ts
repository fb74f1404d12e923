/** A run that is stopped and continued gives the bits of one that was not. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { type Device, native } from '../src/core/native.js'
import { memory } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { openSafetensors, readFloats } from '../src/formats/safetensors.js'
import { AdamW } from '../src/nn/adamw.js'
import {
  listCheckpoints,
  readCheckpoint,
  storedDtype,
  verifyCheckpoint,
  writeCheckpoint,
} from '../src/train/checkpoint.js'
import { PRETRAIN, savedWeights, trainable } from '../src/train/phases.js'
import { checkpointTensors, parseInterval, Schedule } from '../src/train/resume.js'
import { finetune, pretrain, type TrainOptions, type TrainResult } from '../src/train/trainer.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const folder = path.join(base, 'model/aligngpt')
const images = path.join(base, 'images')
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'resume test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))

interface Outcome {
  result: TrainResult
  weights: Buffer
  log: Record<string, unknown>[]
  said: string[]
}

/** One process's part of a run: a fresh model and data set, as a new process has. */
async function part(
  phase: 'pretrain' | 'finetune',
  out: string,
  { dtype = 'f32', device, stopAt, ...o }: TrainOptions & { dtype?: 'f32' | 'bf16'; device?: Device; stopAt?: number },
): Promise<Outcome> {
  const model = await AlignGPT.load(folder, { dtype, device })
  const data = await loadDataset(path.join(base, phase === 'pretrain' ? 'data_phase1.json' : 'data_phase2.json'), {
    images,
  })
  const controller = new AbortController()
  const said: string[] = []
  const run = phase === 'pretrain' ? pretrain : finetune
  try {
    const result = await run(model, data, {
      allowLongInterval: true,
      ...o,
      out,
      workers: 0,
      seed: 5,
      progress: false,
      signal: controller.signal,
      onMessage: (text) => said.push(text),
      onStep: (s) => s.step + 1 === stopAt && controller.abort(),
    })
    const lines = fs.readFileSync(path.join(out, 'log.jsonl'), 'utf8').trim().split('\n')
    const log = lines.map((l) => JSON.parse(l))
    for (const l of log) for (const k of ['time', 'tokensPerSecond', 'samplesPerSecond', 'waited']) delete l[k]
    return { result, weights: fs.readFileSync(path.join(out, 'model.safetensors')), log, said }
  } finally {
    model.dispose()
  }
}

const cases: Record<string, ['pretrain' | 'finetune', Parameters<typeof part>[2]]> = {
  'pre-training, f32, uneven last batches': ['pretrain', { batch: 4, epochs: 3 }],
  'pre-training, bf16, accumulation': ['pretrain', { batch: 5, microBatch: 2, epochs: 3, dtype: 'bf16' }],
  'instruction tuning, f32, recompute, weight decay': [
    'finetune',
    { batch: 2, steps: 9, recompute: true, weightDecay: 0.1, lr: 1e-3 },
  ],
  'instruction tuning, bf16, accumulation, groups by length, augmentation': [
    'finetune',
    { batch: 3, microBatch: 1, steps: 9, dtype: 'bf16', groupByLength: true, augment: true, lr: 1e-3 },
  ],
  'instruction tuning, bf16, compact state, outliers skipped': [
    'finetune',
    { batch: 2, steps: 9, dtype: 'bf16', optimizerState: 'compact', lr: 1e-3, skipOutliers: { warmup: 3, z: 0.5 } },
  ],
}
describe('bit for bit', () => {
  for (const [name, [phase, o]] of Object.entries(cases))
    test(name, async () => {
      const before = memory().inUse
      const whole = await part(phase, path.join(scratch, name, 'whole'), { ...o, saveEvery: null })
      expect(fs.existsSync(path.join(scratch, name, 'whole/checkpoints'))).toBe(false)
      const out = path.join(scratch, name, 'parts')
      // stopped by a signal, after steps beyond the last checkpoint, and once with nothing done at all
      for (const stopAt of [2, 5, 7]) {
        const p = await part(phase, out, { ...o, resume: true, saveEvery: 2, stopAt })
        expect(p.result).toMatchObject({ steps: stopAt, aborted: true })
        expect(listCheckpoints(path.join(out, 'checkpoints'))[0]).toBe(stopAt)
        expect(p.log).toEqual(whole.log.slice(0, stopAt))
      }
      // killed: the newest checkpoint is not of the last step the log knows
      fs.rmSync(path.join(out, 'checkpoints/step-7'), { recursive: true })
      const last = await part(phase, out, { ...o, resume: true, saveEvery: 2 })
      expect(last.result.resumed).toBeGreaterThan(3)
      expect(last.result.resumed).toBeLessThan(7)
      expect(last.result.steps).toBe(whole.result.steps)
      expect(last.result.outliers).toBe(whole.result.outliers)
      if (o.skipOutliers) expect(whole.result.outliers).toBeGreaterThan(0)
      expect(last.log).toEqual(whole.log)
      expect(last.weights.equals(whole.weights)).toBe(true)
      // no tensor is left anywhere, not with the thread that saved either
      expect(memory().inUse).toBe(before)
    })
})

// The cases of a GPU run where there is one, or its emulation (scripts/cuda/check.mjs).
const onGpu: Record<string, ['pretrain' | 'finetune', Parameters<typeof part>[2]]> = {
  'f32, pre-training': ['pretrain', { batch: 2 }],
  'f32, instruction tuning, state in main memory': ['finetune', { batch: 2, microBatch: 1, offloadOptimizer: true }],
  'bf16, instruction tuning, recompute': ['finetune', { batch: 1, dtype: 'bf16', recompute: true }],
  'bf16, instruction tuning, compact state in main memory': [
    'finetune',
    { batch: 1, dtype: 'bf16', optimizerState: 'compact', offloadOptimizer: true },
  ],
}
describe.runIf(typeof native.probeCuda() !== 'string')('bit for bit on a GPU', () => {
  for (const [name, [phase, more]] of Object.entries(onGpu))
    test(name, async () => {
      const before = [memory('cpu').inUse, memory('cuda').inUse]
      const o = { ...more, device: 'cuda', steps: 4, lr: 1e-3 } as const
      const whole = await part(phase, path.join(scratch, name, 'whole'), { ...o, saveEvery: null })
      const out = path.join(scratch, name, 'parts')
      expect((await part(phase, out, { ...o, saveEvery: 1, stopAt: 2 })).log).toEqual(whole.log.slice(0, 2))
      const last = await part(phase, out, { ...o, saveEvery: 4, resume: true })
      expect(last.said).toEqual([expect.stringMatching(/continuing from .*step-2/)])
      expect(last.log).toEqual(whole.log)
      expect(last.weights.equals(whole.weights)).toBe(true)
      expect([memory('cpu').inUse, memory('cuda').inUse]).toEqual(before)
    })
  test('a checkpoint of a GPU is continued on the CPU with a warning, and the other way round', async () => {
    for (const [from, to] of [
      ['cuda', 'cpu'],
      ['cpu', 'cuda'],
    ] as const) {
      const out = path.join(scratch, `${from} to ${to}`)
      const o = { batch: 2, steps: 3, saveEvery: 1 }
      const first = await part('finetune', out, { ...o, device: from, stopAt: 2 })
      const rest = await part('finetune', out, { ...o, device: to, resume: true })
      expect(rest.said).toEqual([
        expect.stringMatching(
          new RegExp(`made elsewhere \\(level ${from} .* -> ${to} .*the numbers may not be those of one run`),
        ),
        expect.stringMatching(/continuing from .*step-2/),
      ])
      expect(rest.result).toMatchObject({ resumed: 2, steps: 3 })
      expect(rest.log.slice(0, 2)).toEqual(first.log)
    }
  })
})

test('a checkpoint has what was trained, and always projector, table and gate', async () => {
  const out = path.join(scratch, 'content')
  await part('pretrain', out, { batch: 7, steps: 4, saveEvery: 2, lr: 1e-3 })
  const at = path.join(out, 'checkpoints/step-2')
  const weights = openSafetensors(path.join(at, 'weights.safetensors')).entries
  const optimizer = openSafetensors(path.join(at, 'optimizer.safetensors')).entries
  const trained = [
    'align_indicators.indicator_embs',
    ...[0, 2].flatMap((i) => [`mm_projector.${i}.bias`, `mm_projector.${i}.weight`]),
  ]
  const gate = [0, 2].flatMap((i) => [`gated_weight_layer.mlp.${i}.bias`, `gated_weight_layer.mlp.${i}.weight`])
  expect([...weights.keys()].sort()).toEqual([...trained, ...gate].sort())
  expect([...optimizer.keys()].sort()).toEqual(trained.flatMap((n) => [`exp_avg.${n}`, `exp_avg_sq.${n}`]).sort())
  const m = optimizer.get('exp_avg.mm_projector.0.weight')
  expect(m && readFloats(m).some((x) => x !== 0)).toBe(true)
  expect(verifyCheckpoint(at)).toMatchObject({
    step: 2,
    config: { phase: 'pretrain', dtype: 'f32', batch: 7, seed: 5, steps: 4, data: { records: 14 } },
    state: { optimizerStep: 2, random: { seed: 5, step: 2 }, position: { epoch: 1, step: 0 } },
    maker: { level: expect.any(String), version: expect.any(String) },
  })
})

test('keep: the newest ones stay, one save never removes the only good one', async () => {
  const out = path.join(scratch, 'keep')
  await part('pretrain', out, { batch: 7, steps: 7, saveEvery: 1, keep: 3 })
  expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([6, 5, 4])
  await expect(part('pretrain', path.join(scratch, 'k1'), { keep: 1 })).rejects.toThrow(
    /keep: expected an integer >= 2/,
  )
})

test('a damaged checkpoint is said, set aside, and the one before it continued', async () => {
  const whole = await part('pretrain', path.join(scratch, 'd whole'), { batch: 4, steps: 8, saveEvery: null })
  const out = path.join(scratch, 'd parts')
  const checkpoints = path.join(out, 'checkpoints')
  await part('pretrain', out, { batch: 4, steps: 8, saveEvery: 2, stopAt: 6 })
  const file = path.join(checkpoints, 'step-6/optimizer.safetensors')
  const bytes = fs.readFileSync(file)
  bytes[bytes.length - 5] ^= 4
  fs.writeFileSync(file, bytes)
  const p = await part('pretrain', out, { batch: 4, steps: 8, saveEvery: 2, resume: true })
  expect(p.said).toEqual([
    expect.stringMatching(/step-6: optimizer\.safetensors: expected SHA-256 \w+, got \w+; trying the one before/),
    expect.stringMatching(/continuing from .*step-4/),
  ])
  expect(p.result).toMatchObject({ resumed: 4, steps: 8 })
  expect(p.weights.equals(whole.weights)).toBe(true)
  expect(fs.readdirSync(checkpoints).sort()).toEqual(['step-4', 'step-6', 'step-6.damaged'])
  for (const s of [4, 6]) {
    const manifest = path.join(checkpoints, `step-${s}/manifest.json`)
    fs.writeFileSync(manifest, fs.readFileSync(manifest, 'utf8').replace('"seed": 5', '"seed": 6'))
  }
  await expect(part('pretrain', out, { batch: 4, steps: 8, resume: true })).rejects.toThrow(
    /a whole checkpoint, got 2 damaged/,
  )
})

test('what cannot be continued is refused by name; a fresh run does not mix with an old one', async () => {
  const out = path.join(scratch, 'refused')
  await part('pretrain', out, { batch: 4, steps: 6, saveEvery: 2, stopAt: 3 })
  const again = (o: TrainOptions, phase: 'pretrain' | 'finetune' = 'pretrain') =>
    part(phase, out, { batch: 4, steps: 6, ...o })
  await expect(again({})).rejects.toThrow(/a folder without checkpoints, or resume, got those of a run/)
  await expect(again({ resume: true, lr: 0.5, steps: 9 })).rejects.toThrow(
    /settings of the run to continue: expected lr 0.001, steps 6, got lr 0.5, steps 9/,
  )
  await expect(again({ resume: true }, 'finetune')).rejects.toThrow(/expected phase "pretrain".*got phase "finetune"/)
  await expect(again({ resume: path.join(scratch, 'nowhere') })).rejects.toThrow(
    /expected checkpoints in .*nowhere, got none/,
  )
  // from another run's folder, which stays as it is
  const elsewhere = path.join(scratch, 'elsewhere')
  const p = await part('pretrain', elsewhere, { batch: 4, steps: 6, resume: out, saveEvery: 2 })
  expect(p.result.resumed).toBe(3)
  expect(listCheckpoints(path.join(elsewhere, 'checkpoints'))).toEqual([4])
  expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([3, 2])
  const fresh = await part('pretrain', path.join(scratch, 'new'), { batch: 4, steps: 2, resume: true })
  expect(fresh.said).toEqual([expect.stringMatching(/no checkpoint yet: starting from the beginning/)])
})

test('another CPU level or build is a warning', async () => {
  const out = path.join(scratch, 'made elsewhere')
  await part('pretrain', out, { batch: 4, steps: 6, saveEvery: 2, stopAt: 3 })
  const checkpoints = path.join(out, 'checkpoints')
  const m = verifyCheckpoint(path.join(checkpoints, 'step-3'))
  const text = fs.readFileSync(path.join(checkpoints, 'step-3/manifest.json'), 'utf8')
  expect(text).toContain(`"level": "${m.maker.level}"`)
  // the same state under another maker's name
  const model = await AlignGPT.load(folder)
  const optimizer = new AdamW(trainable(model, PRETRAIN))
  const tensors = checkpointTensors(savedWeights(model, PRETRAIN), optimizer)
  readCheckpoint(path.join(checkpoints, 'step-3'), tensors)
  const stored = tensors.map((t) => ({ ...t, dtype: storedDtype(t), shape: t.tensor.shape, handle: t.tensor.h }))
  writeCheckpoint(checkpoints, { ...m, maker: { ...m.maker, level: 'abacus' } }, stored, 2)
  optimizer.dispose()
  model.dispose()
  const p = await part('pretrain', out, { batch: 4, steps: 6, resume: true })
  expect(p.said.join('\n')).toMatch(/made elsewhere \(level abacus -> /)
  expect(p.result).toMatchObject({ resumed: 3, steps: 6 })
})

test('intervals', async () => {
  expect(parseInterval(500)).toEqual({ steps: 500 })
  expect(parseInterval('500')).toEqual({ steps: 500 })
  expect(parseInterval('10m')).toEqual({ ms: 600_000 })
  expect(parseInterval('1.5h')).toEqual({ ms: 5_400_000 })
  for (const wrong of [0, -1, 1.5, Number.NaN, '', 'm', '10 m', '10d', '0s'])
    expect(() => parseInterval(wrong), String(wrong)).toThrow(/saveEvery: expected a number of steps or a time/)
  expect(() => new Schedule(11, 10, true)).toThrow(/an interval within the run, one of 10 steps, got 11/)
  expect(() => new Schedule('10m', 10, true).measured(59)).toThrow(/one of about 590 s, got 10m/)
  new Schedule('10m', 10, true).measured(60)
  const told = new Schedule(11, 10, false)
  expect([10, 11].map((s) => told.due(s))).toEqual([false, true])
  await expect(
    part('pretrain', path.join(scratch, 'i'), { batch: 4, steps: 3, saveEvery: '10m', allowLongInterval: false }),
  ).rejects.toThrow(/about 0 s, got 10m/)
})

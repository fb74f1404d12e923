/** Steps that are not finite or out of the ordinary. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, expect, test, vi } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { native } from '../src/core/native.js'
import type { Tensor } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { openSafetensors, readEntry } from '../src/formats/safetensors.js'
import { listCheckpoints, verifyCheckpoint } from '../src/train/checkpoint.js'
import { Outliers, zScore } from '../src/train/outliers.js'
import { finetune, pretrain, type StepInfo, type TrainOptions } from '../src/train/trainer.js'
import type { AlignGPTError } from '../src/util/errors.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'guard test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
afterEach(() => {
  vi.restoreAllMocks()
  native.failAfter(-1)
})
const load = (dtype: 'f32' | 'bf16' = 'f32') => AlignGPT.load(path.join(base, 'model/aligngpt'), { dtype })
const data = () => loadDataset(path.join(base, 'data_phase1.json'), { images: path.join(base, 'images') })
const parameter = (model: AlignGPT, name: string): Tensor =>
  [...model.namedParameters()].find(([n]) => n === name)?.[1] as Tensor
const values = (model: AlignGPT): Map<string, Float32Array> =>
  new Map([...model.namedParameters()].map(([n, t]) => [n, t.toFloats() as Float32Array]))
const oneInfinite = new Float32Array(48)
oneInfinite[7] = Number.POSITIVE_INFINITY
const options: TrainOptions = {
  workers: 0,
  progress: false,
  batch: 4,
  microBatch: 2,
  saveEvery: 1,
  allowLongInterval: true,
}

for (const dtype of ['f32', 'bf16'] as const)
  test(`not a number in the middle of a run, ${dtype}: weights unchanged, records and pictures named, a dump to look at`, async () => {
    const model = await load(dtype)
    const out = path.join(scratch, `nan ${dtype}`)
    // two elements of the embedding of a token that only one record has; the embeddings are frozen in this phase
    const captions = [...(await data())].map((r) => model.tokenizer.encode(r.conversations[1].value))
    const token = captions[13].find((id) => captions.every((ids, i) => i === 13 || !ids.includes(id))) as number
    let before = new Map<string, Float32Array>()
    const onStep = ({ step }: StepInfo): void => {
      if (step === 1) {
        const table = parameter(model, 'model.embed_tokens.weight')
        const v = table.toFloats()
        v[token * 48] = Number.NaN
        v[token * 48 + 1] = Number.POSITIVE_INFINITY
        table.write(v)
      }
      before = values(model)
    }
    const error = (await pretrain(model, await data(), { ...options, out, steps: 9, onStep }).catch(
      (e) => e,
    )) as AlignGPTError
    expect(error.code).toBe('ERR_NOT_FINITE')
    expect(error.message).toMatch(
      /\[train\] loss: expected a finite number, got NaN; weights unchanged, records of the step: /,
    )
    const step = Number(
      /dumps\/step-(\d+); the \d+ steps before it are saved in .*\(resume\)$/.exec(error.message)?.[1],
    )
    expect(step).toBeGreaterThanOrEqual(2)
    expect(values(model)).toEqual(before)
    expect(listCheckpoints(path.join(out, 'checkpoints'))[0]).toBe(step)

    const dump = path.join(out, 'dumps', `step-${step}`)
    const told = JSON.parse(fs.readFileSync(path.join(dump, 'step.json'), 'utf8'))
    expect(told).toMatchObject({ step, loss: 'NaN', lr: expect.any(Number) })
    for (const p of told.parameters) expect(p.weight).toEqual({ norm: expect.any(Number), notFinite: 0 })
    expect(
      told.parameters.some((p: { gradient: { notFinite: number } | null }) => (p.gradient?.notFinite ?? 0) > 0),
    ).toBe(true)
    expect(told.batches).toHaveLength(2)
    // one of the two batches has the token, and only it is named
    const bad = told.losses.flatMap((loss: string, i: number) => (loss === 'NaN' ? [i] : []))
    expect(bad).toHaveLength(1)
    const { ids, images } = told.batches[bad[0]]
    expect(ids).toContain('a-pre-13')
    const named = ids.map((id: string, k: number) => `${id} (${images[k]})`).join(', ')
    expect(error.message).toContain(`records of the step: ${named}; `)
    for (const i of [0, 1]) {
      const tokens = openSafetensors(path.join(dump, `batch-${i}.safetensors`)).entries.get('tokens')
      const bytes = readEntry(tokens as NonNullable<typeof tokens>)
      expect([...new Int32Array(new Uint8Array(bytes).buffer)].includes(token)).toBe(i === bad[0])
    }
    model.dispose()
  })

test('a gradient that is not finite stops as well, and the run continues from the last checkpoint', async () => {
  const out = path.join(scratch, 'gradient')
  const model = await load()
  const { lossAndGradients } = model
  let steps = 0
  // finite weights and a finite loss, but one element of one gradient
  model.lossAndGradients = (...args) => {
    const result = lossAndGradients.apply(model, args)
    if (steps === 4) native.write(native.grad(parameter(model, 'mm_projector.0.bias').h) as number, oneInfinite)
    return result
  }
  const onStep = (): number => ++steps
  const error = (await pretrain(model, await data(), { ...options, out, steps: 8, onStep }).catch(
    (e) => e,
  )) as AlignGPTError
  expect(error.code).toBe('ERR_NOT_FINITE')
  expect(error.message).toMatch(/\[AdamW\] gradient norm: expected a finite number, got .*weights unchanged/)
  const told = JSON.parse(fs.readFileSync(path.join(out, 'dumps/step-4/step.json'), 'utf8'))
  const bad = told.parameters.filter((p: { gradient: { notFinite: number } }) => p.gradient.notFinite > 0)
  expect(bad).toEqual([expect.objectContaining({ name: 'mm_projector.0.bias' })])
  model.dispose()
  const again = await load()
  const result = await pretrain(again, await data(), { ...options, out, steps: 8, resume: true, onMessage: () => {} })
  expect(result).toMatchObject({ resumed: 4, steps: 8 })
  again.dispose()
})

test('the robust z-score', () => {
  expect(zScore(5, [1, 2, 3, 4, 5])).toBeCloseTo(2 / 1.4826, 12)
  expect(zScore(3, [1, 2, 3, 4, 5])).toBe(0)
  expect(zScore(1, [1, 2, 3, 4, 5])).toBeLessThan(0)
  expect(zScore(1.1, [1, 1, 1, 1])).toBeCloseTo(100, 6) // a spread of nothing is taken for a thousandth
  expect(zScore(0, [0, 0, 0])).toBe(0)
  // for normal numbers it is the ordinary one
  const normal = Array.from({ length: 2001 }, (_, i) => {
    const p = (i + 0.5) / 2001
    return Math.log(p / (1 - p)) / 1.702 // within 1 % of the normal quantiles
  })
  expect(zScore(4, normal)).toBeGreaterThan(3.7)
  expect(zScore(4, normal)).toBeLessThan(4.3)
})

test('outliers: judged after the warm-up, they do not hide the next, and a level that stays is accepted', () => {
  const o = new Outliers({ window: 10, warmup: 5, z: 6 })
  const feed = (...losses: number[]): boolean[] => losses.map((x) => o.isOutlier(x, 1))
  expect(feed(2, 100, 2.1, 1.9, 2.2)).toEqual([false, false, false, false, false])
  expect(feed(50, 2, 60, 2.1)).toEqual([true, false, true, false])
  expect(feed(...new Array(10).fill(9)).slice(-3)).toEqual([false, false, false])
  expect(o.skipped).toBeGreaterThan(2)
  const norms = new Outliers({ window: 10, warmup: 5, z: 6 })
  for (const x of [1, 1.1, 0.9, 1, 1.05]) expect(norms.isOutlier(3, x)).toBe(false)
  expect(norms.isOutlier(3, 8)).toBe(true)
  expect(norms.isOutlier(3, 0.2)).toBe(false) // only above
  const copy = new Outliers({ window: 10, warmup: 5, z: 6 })
  copy.restore(JSON.parse(JSON.stringify(norms.state)))
  expect(copy.state).toEqual(norms.state)
  expect(() => new Outliers({ z: 0 })).toThrow(/skipOutliers\.z: expected a number > 0, got 0/)
})

test('the update of an outlier is left out and counted; the others are made', async () => {
  const model = await load()
  const seen: StepInfo[] = []
  const weights: Float32Array[] = []
  const name = 'mm_projector.2.weight'
  const onStep = (s: StepInfo): void => {
    seen.push(s)
    weights.push(parameter(model, name).toFloats() as Float32Array)
  }
  const skipOutliers = { warmup: 3, z: 0.5 }
  const result = await pretrain(model, await data(), { ...options, steps: 12, lr: 1e-3, skipOutliers, onStep })
  const skipped = seen.filter((s) => s.skipped).map((s) => s.step)
  expect(skipped.length).toBeGreaterThan(0)
  expect(skipped.length).toBeLessThan(9)
  expect(result.outliers).toBe(skipped.length)
  for (let i = 1; i < seen.length; i++)
    expect(Buffer.from(weights[i].buffer).equals(Buffer.from(weights[i - 1].buffer)), `step ${i}`).toBe(seen[i].skipped)
  model.dispose()
})

const instructions = () => loadDataset(path.join(base, 'data_phase2.json'), { images: path.join(base, 'images') })
const finalWeights = (out: string): Buffer => fs.readFileSync(path.join(out, 'model.safetensors'))

test('no memory in the middle of a run: the plan, what would fit, and the checkpoint to go on from', async () => {
  const o = { ...options, steps: 6, batch: 4, microBatch: 4, lr: 1e-3, saveEvery: 2 }
  const run = async (out: string, more: Partial<TrainOptions>): Promise<AlignGPTError | null> => {
    const model = await load('bf16')
    const failed = await finetune(model, await instructions(), { ...o, out: path.join(scratch, out), ...more }).then(
      () => null,
      (e) => e,
    )
    model.dispose()
    return failed
  }
  const before = native.memory().blocks
  const onStep = ({ step }: StepInfo): void => {
    if (step !== 2) return // no checkpoint is made after it
    native.resetPeak()
    native.failAfter(150)
  }
  const error = await run('memory', { onStep })
  expect(error).toMatchObject({ name: 'AlignGPTError', code: 'ERR_MEMORY' })
  const message = error?.message ?? ''
  expect(message).toMatch(/^\[train\] out of memory in step 4 \(step-3 in .*memory\/checkpoints is whole: resume\): /)
  const bytes = /about [\d.]+ MiB at the peak .* micro-batches of \d x \d+ text tokens \((weights .*)\); in /.exec(
    message,
  )
  const planned = bytes?.[1].split(', ').map((part) => /^(.*) ([\d.]+) MiB$/.exec(part)?.slice(1)) ?? []
  expect(planned.map((part) => part?.[0])).toEqual([
    ...['weights', 'gradients', 'moments', 'f32 rest of bf16 weights', 'activations', 'the widest moment besides'],
    'copy while a checkpoint is written',
  ])
  const peak = planned.slice(0, -1).reduce((n, part) => n + Number(part?.[1]), 0)
  expect(Math.abs(peak - Number(/about ([\d.]+) MiB/.exec(message)?.[1]))).toBeLessThan(0.35) // rounded six times
  expect(message).toMatch(/what would fit, the cheapest first: microBatch [1-7]; recompute true with microBatch \d$/)
  expect(native.memory().blocks).toBe(before)
  const checkpoints = path.join(scratch, 'memory/checkpoints')
  expect(verifyCheckpoint(path.join(checkpoints, 'step-3')).step).toBe(3)

  // it goes on with what was proposed: recomputation gives the same bits, other micro-batches the same within rounding
  fs.cpSync(path.join(scratch, 'memory'), path.join(scratch, 'smaller'), { recursive: true })
  const told: string[] = []
  const onMessage = (text: string): unknown => told.push(text)
  expect(await run('memory', { resume: true, recompute: true, onMessage })).toBeNull()
  expect(told).toHaveLength(1)
  expect(await run('whole', {})).toBeNull()
  expect(finalWeights(path.join(scratch, 'memory')).equals(finalWeights(path.join(scratch, 'whole')))).toBe(true)
  expect(await run('smaller', { resume: true, microBatch: 2, onMessage })).toBeNull()
  expect(told[1]).toBe('microBatch 4 -> 2: the numbers agree within rounding, not bit for bit')
  const loss = (out: string) =>
    JSON.parse(
      fs
        .readFileSync(path.join(scratch, out, 'log.jsonl'), 'utf8')
        .trim()
        .split('\n')[5],
    )
  expect(loss('smaller').loss).toBeCloseTo(loss('whole').loss, 2)
  expect(await run('smaller', { resume: true, microBatch: 2, lossNorm: 'micro' })).toMatchObject({
    code: 'ERR_CHECKPOINT',
  })
})

test('no memory for the state of the optimizer: nothing is left, and something smaller can be tried', async () => {
  const model = await load('bf16')
  const before = native.memory()
  for (const after of [0, 1, 2, 3, 20]) {
    native.failAfter(after)
    const error = await finetune(model, await instructions(), { ...options, steps: 2 }).catch((e) => e)
    expect(error, `allocation ${after}`).toMatchObject({ code: 'ERR_MEMORY' })
    expect(error.message).toMatch(/out of memory before the first step: .*; planned: about /)
    expect(native.memory()).toMatchObject({ inUse: before.inUse, handles: before.handles })
  }
  native.failAfter(-1)
  expect((await finetune(model, await instructions(), { ...options, steps: 1 })).steps).toBe(1)
  model.dispose()
})

test('a run that is planned to need more than the machine has says so before it starts, and starts', async () => {
  const limit = vi.spyOn(process, 'constrainedMemory')
  const told: string[] = []
  const model = await load('bf16')
  const run = async (bytes: number, more: Partial<TrainOptions> = {}): Promise<string | undefined> => {
    limit.mockReturnValue(bytes)
    told.length = 0
    const o = { ...options, steps: 1, microBatch: 4, onMessage: (text: string) => told.push(text) }
    expect((await finetune(model, await instructions(), { ...o, ...more })).steps).toBe(1)
    expect(told.length).toBeLessThan(2)
    return told[0]
  }
  expect(await run(2 ** 40)).toBeUndefined()
  expect(await run(0)).toBeUndefined() // no limit
  const text = (await run(2.5 * 2 ** 20)) ?? ''
  const [, needed] = /^the run will hardly fit into memory: ([\d.]+) MiB of 2\.5 MiB; about /.exec(text) ?? []
  expect(Number(needed)).toBeGreaterThan(2.5)
  expect(text).toMatch(/\(weights .*activations .*\); what would fit, the cheapest first: microBatch [123]; /)
  expect(await run((Number(needed) + 0.1) * 2 ** 20)).toBeUndefined()
  // the state alone is too much: what is left is to train less
  expect(await run(1.2 * 2 ** 20)).toMatch(/the cheapest first: (.* with )?lora \{"rank":8\} with microBatch \d$/)
  expect(await run(1000)).toMatch(/; no other setting of this model would fit$/)
  model.dispose()
})

/** The memory plan against the allocator's counters, and against what is known of LLaVA's sizes. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { makeBatch, type Size, STEP_SIZE, writeModel, writeParts } from '../../scripts/bench/model.js'
import { AlignGPT } from '../src/aligngpt.js'
import { native } from '../src/core/native.js'
import { scope, type Tensor } from '../src/core/tensor.js'
import { addLora } from '../src/models/adapters.js'
import type { NewModelOptions } from '../src/models/settings.js'
import { AdamW } from '../src/nn/adamw.js'
import { largestMicroBatch, type Planned, type PlanOptions, plan } from '../src/train/memory-plan.js'
import { FINETUNE, PRETRAIN, phaseOf, savedWeights, trainable } from '../src/train/phases.js'
import { checkpointTensors } from '../src/train/resume.js'
import { Saver } from '../src/train/saver.js'

const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-plan-'))
afterAll(() => fs.rmSync(temp, { recursive: true, force: true }))

const PHASES = { pretrain: PRETRAIN, finetune: FINETUNE }
const SIZE: Size = {
  ...STEP_SIZE,
  hidden: 128,
  inter: 352,
  layers: 4,
  heads: 4,
  vocab: 2048,
  image: 112,
  vision: { hidden: 64, inter: 256, layers: 3, heads: 4 },
}

type Asked = PlanOptions & Required<Pick<PlanOptions, 'dtype' | 'microBatch' | 'textTokens'>>

/** The most the allocator had in use during a step, optimizer included. */
async function measured(folder: string, o: Asked): Promise<number> {
  const before = native.memory().inUse
  const model = await AlignGPT.load(folder, { dtype: o.dtype })
  if (o.lora) addLora(model, o.lora)
  const phase = phaseOf(model, o.phase === 'pretrain' ? PRETRAIN : FINETUNE)
  const optimizer = new AdamW(trainable(model, phase), { state: o.optimizerState })
  const batch = makeBatch(model, new Array<number>(o.microBatch).fill(o.textTokens))
  const step = (): void => {
    scope(() => void model.lossAndGradients(batch, phase.mix, { recompute: o.recompute }))
    optimizer.update(1e-3)
  }
  step() // rope tables are made
  native.resetPeak()
  step()
  const { peak } = native.memory()
  optimizer.dispose()
  model.dispose()
  return peak - before
}

describe('the plan agrees within 5 % with what the allocator counts', async () => {
  const folder = await writeModel(temp, SIZE)
  for (const phase of ['pretrain', 'finetune'] as const)
    for (const dtype of ['f32', 'bf16'] as const)
      for (const recompute of [false, true])
        for (const [microBatch, textTokens, optimizerState] of [
          [24, 64, 'full'],
          [9, 300, 'compact'],
        ] as const)
          test(`${phase} ${dtype} ${optimizerState}${recompute ? ' recompute' : ''}, ${microBatch} x ${textTokens}`, async () => {
            const o = { phase, dtype, recompute, microBatch, textTokens, optimizerState }
            const [planned, real] = [plan(folder, o).peak, await measured(folder, o)]
            expect(Math.abs(planned / real - 1), `planned ${planned}, counted ${real}`).toBeLessThan(0.05)
          })
  for (const dtype of ['f32', 'bf16'] as const)
    for (const recompute of [false, true])
      for (const lora of [
        { rank: 64 },
        { rank: 4, targets: ['q_proj', 'v_proj'] },
        { rank: 16, targets: ['up_proj', 'gate_proj'] },
        { rank: 16, targets: ['down_proj', 'o_proj'] },
      ])
        test(`adapters of rank ${lora.rank}, ${lora.targets}, ${dtype}${recompute ? ' recompute' : ''}`, async () => {
          const o = { phase: 'finetune', dtype, recompute, microBatch: 9, textTokens: 200, lora } as const
          const [planned, real] = [plan(folder, o), await measured(folder, o)]
          expect(Math.abs(planned.peak / real - 1), `planned ${planned.peak}, counted ${real}`).toBeLessThan(0.05)
        })
})

describe('what is chosen of a model is planned as it is made', () => {
  // few patches, so that a row more or less of each image shows
  const parts = writeParts(temp, 'few-patches', { ...SIZE, image: 42 })
  const VARIANTS: NewModelOptions[] = [
    { selectFeature: 'cls_patch' },
    { selectFeature: 'cls_patch', gate: 'linear', levels: 5 },
    { projector: 'linear', alignment: 'none' }, // whose sequences the batch below has not
    { projector: 'mlp3x_gelu', alignment: 'global', selectLayer: -1 },
    { alignment: 'random' },
  ]
  for (const [i, variant] of VARIANTS.entries())
    for (const phase of ['pretrain', 'finetune'] as const)
      test(`${phase}, ${JSON.stringify(variant)}`, async () => {
        const folder = path.join(temp, `variant-${i}-${phase}`)
        const model = await AlignGPT.create({ ...parts, ...variant }, { device: 'cpu' })
        await model.save(folder)
        const [all, learned] = [[...model.namedParameters()], trainable(model, phaseOf(model, PHASES[phase]))]
        const elements = (tensors: Tensor[]): number =>
          tensors.reduce((n, t) => n + t.shape.reduce((a, b) => a * b, 1), 0)
        const [total, trained] = [elements(all.map(([, t]) => t)), elements(learned.map((p) => p.tensor))]
        const o = { phase, dtype: 'f32', microBatch: 64, textTokens: 20 } as const
        const subjects: Planned[] = [{ ...parts, ...variant }, folder, { model: folder }, model]
        const [planned, ...others] = subjects.map((of) => plan(of, o))
        expect([planned.parameters, planned.trainable]).toEqual([total, trained])
        for (const other of others) expect(other).toEqual(planned)
        model.dispose()
        if (variant.alignment === 'none') return
        const real = await measured(folder, o)
        expect(Math.abs(planned.peak / real - 1), `planned ${planned.peak}, counted ${real}`).toBeLessThan(0.05)
      })
  test('the class row is one more row of each image, and one more input of the gate', () => {
    const o = { phase: 'finetune', microBatch: 8 } as const
    const [patches, withClass] = [
      plan(parts, { ...o, textTokens: 21 }),
      plan({ ...parts, selectFeature: 'cls_patch' }, { ...o, textTokens: 20 }),
    ]
    expect(withClass.parameters - patches.parameters).toBe(256)
    const row = 4 * 8 * (SIZE.vision.hidden + 2 * SIZE.hidden) // features, and what the projector keeps of its hidden layer
    expect(withClass.activations - patches.activations).toBeCloseTo(row, -4)
  })
  test('a model that has adapters, by itself and as it is asked for', async () => {
    const model = await AlignGPT.create(parts, { device: 'cpu' })
    const lora = { rank: 4, targets: ['q_proj', 'down_proj'] }
    const o = { phase: 'finetune', microBatch: 8, textTokens: 9 } as const
    const asked = plan(model, { ...o, lora })
    addLora(model, lora)
    expect(plan(model, o)).toEqual(asked)
    expect(asked.parameters).toBe(
      [...model.namedParameters()].reduce((n, [, t]) => n + t.shape.reduce((a, b) => a * b, 1), 0),
    )
    model.dispose()
  })
  test('what is not given is what training takes', () => {
    const all = { phase: 'pretrain', dtype: 'f32', batch: 4, microBatch: 4 } as const
    expect(plan(parts, { phase: 'pretrain', batch: 4 })).toEqual(plan(parts, { ...all, textTokens: 2048 - 9 - 1 }))
    expect(plan(parts, { phase: 'pretrain' })).toEqual(
      plan(parts, { ...all, batch: 16, microBatch: 16, textTokens: 2038 }),
    )
    expect(plan({ size: '7b' }, { phase: 'pretrain' })).toEqual(
      plan('7b', { phase: 'pretrain', textTokens: 2048 - 576 - 1 }),
    )
  })
})

test('the snapshot of a checkpoint is planned as it is taken', async () => {
  const folder = await writeModel(temp, SIZE)
  for (const phase of [PRETRAIN, FINETUNE])
    for (const dtype of ['f32', 'bf16'] as const)
      for (const optimizerState of ['full', 'compact'] as const) {
        const model = await AlignGPT.load(folder, { dtype, device: 'cpu' })
        const optimizer = new AdamW(trainable(model, phase), { state: optimizerState })
        const problems: string[] = []
        const saver = new Saver(path.join(temp, phase.name, dtype, optimizerState), 2, (text) => problems.push(text))
        native.trim('cpu') // idle blocks of earlier tests would be taken for smaller requests and counted whole
        native.resetPeak()
        const before = native.memory().inUse
        const content = { step: 1, config: {}, state: {}, maker: { version: '', build: '', level: '' } }
        await saver.save(content, checkpointTensors(savedWeights(model, phase), optimizer))
        const real = native.memory().peak - before
        await saver.close()
        expect(problems).toEqual([])
        const { snapshot } = plan(folder, { phase: phase.name, dtype, optimizerState, microBatch: 1, textTokens: 1 })
        expect(
          Math.abs(snapshot / real - 1),
          `${phase.name} ${dtype} ${optimizerState}: ${snapshot}, ${real}`,
        ).toBeLessThan(0.01)
        optimizer.dispose()
        model.dispose()
      }
})

test('7B: parameters, and the memory of both phases', () => {
  const o = { dtype: 'bf16', textTokens: 63, recompute: true, optimizerState: 'compact' } as const
  const first = plan('7b', { ...o, phase: 'pretrain', microBatch: 32 })
  // Vicuna 6,738,415,616, ViT-L/14-336 without its text half 303,507,456 and post_layernorm's 2,048 in it, projector 20,979,712
  expect(first.parameters).toBe(6_738_415_616 + 303_507_456 + 20_979_712 + 8 * 4096 + 256 * 577 + 7 * 257)
  expect(first.trainable).toBe(20_979_712 + 8 * 4096)
  expect(first.weights / 1e9).toBeCloseTo(14.1, 1)
  expect((first.activations + first.transient) / 1e9).toBeGreaterThan(7.5)
  expect((first.activations + first.transient) / 1e9).toBeLessThan(9.5)
  const second = plan('7b', { ...o, phase: 'finetune', microBatch: 1 })
  const perParameter = (second.gradients + second.moments + second.masters) / second.trainable
  expect(perParameter).toBeCloseTo(8, 3) // and 2 of weight
  const full = plan('7b', { ...o, phase: 'finetune', microBatch: 1, optimizerState: 'full' })
  expect((full.peak - second.peak) / second.trainable).toBeCloseTo(8, 1)
})

test('7B with adapters: what they add and what they save', () => {
  const o = { phase: 'finetune', dtype: 'bf16', microBatch: 1, textTokens: 63, recompute: true } as const
  const [whole, lora] = [plan('7b', o), plan('7b', { ...o, lora: { rank: 128 } })]
  // LLaVA's rank on all matrices: 319,815,680 parameters; trained besides: projector and gate
  expect(lora.parameters - whole.parameters).toBe(319_815_680)
  expect(lora.trainable).toBe(319_815_680 + 20_979_712 + 256 * 577 + 7 * 257)
  expect(lora.peak / 1e9).toBeLessThan(24)
})

test('the largest micro-batch fits and the next one does not', () => {
  const o = { phase: 'finetune', dtype: 'bf16', textTokens: 200, recompute: true, optimizerState: 'compact' } as const
  const n = largestMicroBatch('7b', o, 80e9)
  expect(n).toBeGreaterThan(0)
  expect(plan('7b', { ...o, microBatch: n }).peak).toBeLessThanOrEqual(80e9)
  expect(plan('7b', { ...o, microBatch: n + 1 }).peak).toBeGreaterThan(80e9)
  const full = { ...o, optimizerState: 'full' } as const
  expect(largestMicroBatch('7b', full, 80e9)).toBe(0)
  expect(largestMicroBatch('7b', { ...full, offloadOptimizer: true }, 80e9)).toBeGreaterThan(0)
  const away = plan('7b', { ...full, microBatch: 1, offloadOptimizer: true })
  expect(away.host / away.trainable).toBeCloseTo(12, 3) // two moments and the master, of 4 bytes each
  const here = plan('7b', { ...full, microBatch: 1 })
  expect(away.peak + away.host).toBe(here.peak)
  expect([here.pinned, away.pinned]).toEqual([20 * 2 ** 20, 44 * 2 ** 20])
})

test('bad sizes are named', () => {
  const o = { phase: 'pretrain', dtype: 'f32', microBatch: 1, textTokens: 1 } as const
  expect(() => plan('7b', { ...o, microBatch: 0 })).toThrow(/microBatch: expected an integer > 0, got 0/)
  expect(() => plan('7b', { ...o, textTokens: 1.5 })).toThrow(/textTokens: expected an integer > 0, got 1.5/)
  expect(() => plan('7b', { ...o, dtype: 'f16' as 'f32' })).toThrow('[plan] dtype: expected f32 or bf16, got "f16"')
  expect(() => plan('7b', { ...o, lora: { rank: 8 } })).toThrow('[plan] lora.rank: expected none in pretrain, got 8')
  expect(() => plan({ size: '7b', projector: 'resampler' }, o)).toThrow(
    /projector_type: expected linear.*got resampler/,
  )
  expect(() => plan(path.join(temp, 'none'), o)).toThrow(/none/)
})

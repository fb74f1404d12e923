/** The memory plan against the allocator's counters, and against what is known of LLaVA's sizes. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { makeBatch, type Size, STEP_SIZE, writeModel } from '../../scripts/bench/model.js'
import { AlignGPT } from '../src/aligngpt.js'
import { native } from '../src/core/native.js'
import { scope } from '../src/core/tensor.js'
import { addLora } from '../src/models/adapters.js'
import { readAlignGPTConfig } from '../src/models/config/aligngpt.js'
import { type ClipVisionConfig, readClipConfig } from '../src/models/config/clip.js'
import type { LlamaConfig } from '../src/models/config/llama.js'
import { AdamW } from '../src/nn/adamw.js'
import { largestMicroBatch, type PlanModel, type PlanOptions, plan } from '../src/train/memory-plan.js'
import { FINETUNE, PRETRAIN, phaseOf, savedWeights, trainable } from '../src/train/phases.js'
import { checkpointTensors } from '../src/train/resume.js'
import { Saver } from '../src/train/saver.js'

const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-plan-'))
afterAll(() => fs.rmSync(temp, { recursive: true, force: true }))

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

/** The most the allocator had in use during a step, optimizer included. */
async function measured(folder: string, o: PlanOptions): Promise<number> {
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
  const config = readAlignGPTConfig(folder)
  const { vision } = readClipConfig(path.join(folder, 'vision_tower'))
  const model: PlanModel = { llm: config.llm, vision, projector: config.mm_projector_type, levels: 8 }
  for (const phase of ['pretrain', 'finetune'] as const)
    for (const dtype of ['f32', 'bf16'] as const)
      for (const recompute of [false, true])
        for (const [microBatch, textTokens, optimizerState] of [
          [24, 64, 'full'],
          [9, 300, 'compact'],
        ] as const)
          test(`${phase} ${dtype} ${optimizerState}${recompute ? ' recompute' : ''}, ${microBatch} x ${textTokens}`, async () => {
            const o = { phase, dtype, recompute, microBatch, textTokens, optimizerState }
            const [planned, real] = [plan(model, o).peak, await measured(folder, o)]
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
          const [planned, real] = [plan(model, o), await measured(folder, o)]
          expect(Math.abs(planned.peak / real - 1), `planned ${planned.peak}, counted ${real}`).toBeLessThan(0.05)
        })
})

test('the snapshot of a checkpoint is planned as it is taken', async () => {
  const folder = await writeModel(temp, SIZE)
  const config = readAlignGPTConfig(folder)
  const { vision } = readClipConfig(path.join(folder, 'vision_tower'))
  const planned: PlanModel = { llm: config.llm, vision, projector: config.mm_projector_type, levels: 8 }
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
        const { snapshot } = plan(planned, { phase: phase.name, dtype, optimizerState, microBatch: 1, textTokens: 1 })
        expect(
          Math.abs(snapshot / real - 1),
          `${phase.name} ${dtype} ${optimizerState}: ${snapshot}, ${real}`,
        ).toBeLessThan(0.01)
        optimizer.dispose()
        model.dispose()
      }
})

const VICUNA_7B = {
  vocab_size: 32000,
  hidden_size: 4096,
  intermediate_size: 11008,
  num_hidden_layers: 32,
  num_attention_heads: 32,
  num_key_value_heads: 32,
  head_dim: 128,
} as LlamaConfig
const VIT_L_14_336 = {
  hidden_size: 1024,
  intermediate_size: 4096,
  num_hidden_layers: 24,
  num_attention_heads: 16,
  num_channels: 3,
  image_size: 336,
  patch_size: 14,
} as ClipVisionConfig
const SEVEN: PlanModel = { llm: VICUNA_7B, vision: VIT_L_14_336, projector: 'mlp2x_gelu', levels: 8 }

test('7B: parameters, and the memory of both phases', () => {
  const o = { dtype: 'bf16', textTokens: 63, recompute: true, optimizerState: 'compact' } as const
  const first = plan(SEVEN, { ...o, phase: 'pretrain', microBatch: 32 })
  // Vicuna 6,738,415,616, ViT-L/14-336 without its text half 303,507,456 and post_layernorm's 2,048 in it, projector 20,979,712
  expect(first.parameters).toBe(6_738_415_616 + 303_507_456 + 20_979_712 + 8 * 4096 + 256 * 577 + 7 * 257)
  expect(first.trainable).toBe(20_979_712 + 8 * 4096)
  expect(first.weights / 1e9).toBeCloseTo(14.1, 1)
  expect((first.activations + first.transient) / 1e9).toBeGreaterThan(7.5)
  expect((first.activations + first.transient) / 1e9).toBeLessThan(9.5)
  const second = plan(SEVEN, { ...o, phase: 'finetune', microBatch: 1 })
  const perParameter = (second.gradients + second.moments + second.masters) / second.trainable
  expect(perParameter).toBeCloseTo(8, 3) // and 2 of weight
  const full = plan(SEVEN, { ...o, phase: 'finetune', microBatch: 1, optimizerState: 'full' })
  expect((full.peak - second.peak) / second.trainable).toBeCloseTo(8, 1)
})

test('7B with adapters: what they add and what they save', () => {
  const o = { phase: 'finetune', dtype: 'bf16', microBatch: 1, textTokens: 63, recompute: true } as const
  const [whole, lora] = [plan(SEVEN, o), plan(SEVEN, { ...o, lora: { rank: 128 } })]
  // LLaVA's rank on all matrices: 319,815,680 parameters; trained besides: projector and gate
  expect(lora.parameters - whole.parameters).toBe(319_815_680)
  expect(lora.trainable).toBe(319_815_680 + 20_979_712 + 256 * 577 + 7 * 257)
  expect(lora.peak / 1e9).toBeLessThan(24)
})

test('the largest micro-batch fits and the next one does not', () => {
  const o = { phase: 'finetune', dtype: 'bf16', textTokens: 200, recompute: true, optimizerState: 'compact' } as const
  const n = largestMicroBatch(SEVEN, o, 80e9)
  expect(n).toBeGreaterThan(0)
  expect(plan(SEVEN, { ...o, microBatch: n }).peak).toBeLessThanOrEqual(80e9)
  expect(plan(SEVEN, { ...o, microBatch: n + 1 }).peak).toBeGreaterThan(80e9)
  const full = { ...o, optimizerState: 'full' } as const
  expect(largestMicroBatch(SEVEN, full, 80e9)).toBe(0)
  expect(largestMicroBatch(SEVEN, { ...full, offloadOptimizer: true }, 80e9)).toBeGreaterThan(0)
  const away = plan(SEVEN, { ...full, microBatch: 1, offloadOptimizer: true })
  expect(away.host / away.trainable).toBeCloseTo(12, 3) // two moments and the master, of 4 bytes each
  const here = plan(SEVEN, { ...full, microBatch: 1 })
  expect(away.peak + away.host).toBe(here.peak)
  expect([here.pinned, away.pinned]).toEqual([20 * 2 ** 20, 44 * 2 ** 20])
})

test('bad sizes are named', () => {
  const o = { phase: 'pretrain', dtype: 'f32', microBatch: 1, textTokens: 1 } as const
  expect(() => plan(SEVEN, { ...o, microBatch: 0 })).toThrow(/microBatch: expected an integer > 0, got 0/)
  expect(() => plan(SEVEN, { ...o, textTokens: 1.5 })).toThrow(/textTokens: expected an integer > 0, got 1.5/)
  expect(() => plan({ ...SEVEN, projector: 'resampler' }, o)).toThrow(/projector: expected linear.*got resampler/)
})

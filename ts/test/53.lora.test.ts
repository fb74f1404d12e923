/** Low-rank adapters: the arithmetic, its gradients, training with them, merging, PEFT's files. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { makeBatch } from '../../scripts/bench/model.js'
import { AlignGPT } from '../src/aligngpt.js'
import { type Dtype, memory, noGrad, scope, type Tensor } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { openSafetensors } from '../src/formats/safetensors.js'
import { addLora, hasLora, mergeLora } from '../src/models/adapters.js'
import type { PackedBatch } from '../src/models/packed-batch.js'
import { loadAdapter, saveAdapter } from '../src/models/peft.js'
import { AdamW } from '../src/nn/adamw.js'
import { FINETUNE, phaseOf, trainable } from '../src/train/phases.js'
import { finetune, pretrain } from '../src/train/trainer.js'
import { Rng } from '../src/util/rng.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const folder = path.join(base, 'model/aligngpt')
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'lora test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const open = (name: string) => loadDataset(path.join(base, name), { images: path.join(base, 'images') })
const load = (dtype: Dtype = 'f32') => AlignGPT.load(folder, { dtype, seed: 1 })

const parameters = (m: AlignGPT) => new Map(m.namedParameters())
const values = (m: AlignGPT) => new Map([...m.namedParameters()].map(([n, t]) => [n, t.toFloats()]))
const isAdapter = (name: string): boolean => /\.lora_[AB]\.weight$/.test(name)
const states = (m: AlignGPT, b: PackedBatch) => scope(() => noGrad(() => m.loss(b, { mode: 'gate' }).hidden.toFloats()))

/** Numbers in place of the zeros an adapter starts with. */
function fill(m: AlignGPT, size = 0.3): void {
  const rng = new Rng(5)
  for (const [name, t] of m.namedParameters())
    if (name.endsWith('lora_B.weight')) t.write(Float64Array.from({ length: t.numel }, () => size * (rng.next() - 0.5)))
}
const worst = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a).reduce((d, x, i) => Math.max(d, Math.abs(x - b[i])), 0)

test('fresh adapters change nothing; A starts as PEFT starts it', async () => {
  const model = await load()
  const batch = makeBatch(model, [9, 14])
  const before = states(model, batch)
  addLora(model, { rank: 4, targets: ['ALL_linear'] }, 3)
  expect(states(model, batch)).toEqual(before)
  const of = parameters(model)
  const names = [...of.keys()].filter(isAdapter)
  expect(names.length).toBe(2 * 2 * 7) // A and B of seven matrices in two layers
  const a = (of.get('model.layers.1.mlp.down_proj.lora_A.weight') as Tensor).toFloats()
  const top = Math.max(...Array.from(a, Math.abs))
  expect(top).toBeLessThanOrEqual(1 / Math.sqrt(72)) // kaiming uniform with a = sqrt 5
  expect(top).toBeGreaterThan(0.8 / Math.sqrt(72))
  fill(model)
  expect(worst(states(model, batch), before)).toBeGreaterThan(1e-2)
  model.dispose()
})

test('the gradient of every adapter agrees with finite differences', async () => {
  const model = await load('f64')
  const batch = makeBatch(model, [7, 12])
  addLora(model, { rank: 3, alpha: 5 })
  fill(model)
  const loss = (): number => scope(() => noGrad(() => model.loss(batch, { mode: 'gate' }).loss.item()))
  const of = [...model.namedParameters()].filter(([n]) => isAdapter(n))
  for (const [, t] of of) t.requiresGrad()
  scope(() => void model.lossAndGradients(batch, { mode: 'gate' }))
  const kept = of.map(([, t]) => scope(() => t.grad()?.toFloats()))
  for (const [i, [name, t]] of of.entries()) {
    const gradient = kept[i] as Float64Array
    const at = t.toFloats()
    for (const k of [0, Math.floor(t.numel / 2), t.numel - 1]) {
      const nudged = (by: number): number => {
        t.write(at.map((x, j) => (j === k ? x + by : x)))
        return loss()
      }
      const slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5
      t.write(at)
      expect(Math.abs(gradient[k] - slope), `${name}[${k}]: ${gradient[k]}, differences ${slope}`).toBeLessThan(
        1e-7 + 1e-4 * Math.abs(slope),
      )
    }
    expect(
      gradient.some((g) => g !== 0),
      name,
    ).toBe(true)
  }
  model.dispose()
})

test('recompute gives the same gradients, bit for bit', async () => {
  const model = await load()
  const batch = makeBatch(model, [7, 12])
  addLora(model, { rank: 3 })
  fill(model)
  const of = trainable(model, phaseOf(model, FINETUNE))
  const optimizer = new AdamW(of)
  const both = [false, true].map((recompute) => {
    optimizer.zeroGrad()
    scope(() => void model.lossAndGradients(batch, { mode: 'gate' }, { recompute }))
    return of.map(({ tensor: t }) => scope(() => t.grad()?.toFloats()))
  })
  optimizer.dispose()
  expect(both[1]).toEqual(both[0])
  model.dispose()
})

test('training moves adapters, projector and gate, nothing else; what is written is merged', async () => {
  const model = await load()
  const before = values(model)
  const out = path.join(scratch, 'run')
  const data = await open('data_phase2.json')
  const lora = { rank: 4, alpha: 16, targets: ['q_proj', 'v_proj', 'down_proj'] }
  const { loss } = await finetune(model, data, { out, lora, lr: 1e-2, steps: 12, workers: 0, progress: false })
  expect(loss.at(-1)).toBeLessThan(loss[0] - 0.2)
  const moved = [...values(model)].filter(([n, v]) => before.has(n) && worst(v, before.get(n) as Float32Array) > 0)
  expect(moved.map(([n]) => n.replace(/\..*/, '')).sort()).toEqual([
    ...new Array(4).fill('gated_weight_layer'),
    ...new Array(4).fill('mm_projector'),
  ])
  const merged = await AlignGPT.load(out)
  expect(hasLora(merged)).toBe(false)
  const batch = makeBatch(model, [9, 14])
  expect(worst(states(merged, batch), states(model, batch))).toBeLessThan(2e-5)
  mergeLora(model)
  expect(values(model)).toEqual(values(merged)) // the same rounding, in memory and in the file
  // the adapter belongs to what the model was before
  const again = await load()
  loadAdapter(again, path.join(out, 'adapter'))
  mergeLora(again)
  expect(values(again)).toEqual(values(merged))
  for (const m of [model, merged, again]) m.dispose()
})

test('merging a bf16 model rounds once', async () => {
  const model = await load('bf16')
  addLora(model, { rank: 4 })
  fill(model)
  const of = values(model)
  const [w, a, b] = ['weight', 'lora_A.weight', 'lora_B.weight'].map(
    (n) => of.get(`model.layers.0.self_attn.q_proj.${n}`) as Float32Array,
  )
  mergeLora(model)
  const merged = values(model).get('model.layers.0.self_attn.q_proj.weight') as Float32Array
  for (const [i, v] of merged.entries()) {
    const [row, column] = [Math.floor(i / 48), i % 48]
    let exact = w[i]
    for (let r = 0; r < 4; r++) exact += 2 * b[row * 4 + r] * a[r * 48 + column]
    expect(Math.abs(v - exact)).toBeLessThanOrEqual(Math.abs(exact) * 2 ** -8 * 1.001)
  }
  model.dispose()
})

test('adapters in files: PEFT names, back bit for bit, and bf16 from f32', async () => {
  const model = await load()
  addLora(model, { rank: 2, alpha: 3, targets: ['layers.1.self_attn.o_proj', 'up_proj'] }, 7)
  fill(model)
  const dir = path.join(scratch, 'adapter')
  saveAdapter(model, dir)
  const names = [...openSafetensors(path.join(dir, 'adapter_model.safetensors')).entries.keys()]
  expect(names).toContain('base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight')
  expect(names.length).toBe(6)
  const config = JSON.parse(fs.readFileSync(path.join(dir, 'adapter_config.json'), 'utf8'))
  expect(config).toMatchObject({ peft_type: 'LORA', r: 2, lora_alpha: 3, bias: 'none' })
  // o_proj is adapted in one layer only, so a short name would mean too much
  expect([...config.target_modules].sort()).toEqual([
    'model.layers.0.mlp.up_proj',
    'model.layers.1.mlp.up_proj',
    'model.layers.1.self_attn.o_proj',
  ])
  const again = await load()
  loadAdapter(again, dir)
  expect(values(again)).toEqual(values(model))
  const batch = makeBatch(model, [9, 14])
  expect(states(again, batch)).toEqual(states(model, batch))
  const small = await load('bf16')
  loadAdapter(small, dir)
  const name = 'model.layers.0.mlp.up_proj.lora_B.weight'
  expect(worst(values(small).get(name) as Float32Array, values(model).get(name) as Float32Array)).toBeLessThan(1e-3)
  for (const m of [model, again, small]) m.dispose()
})

test('what does not fit is named, and nothing is left behind', async () => {
  const model = await load()
  const held = memory().inUse
  expect(() => addLora(model, { targets: ['q_proj', 'lm_head'] })).toThrow(
    /targets: expected all-linear or some of q_proj, k_proj.*, got lm_head/,
  )
  expect(() => addLora(model, { targets: [] })).toThrow(/got nothing/)
  expect(() => addLora(model, { rank: 0 })).toThrow(/rank: expected an integer >= 1, got 0/)
  expect(() => addLora(model, { alpha: Number.NaN })).toThrow(/alpha: expected a number > 0/)
  expect(() => saveAdapter(model, scratch)).toThrow(/expected adapters/)
  const dir = path.join(scratch, 'wrong')
  const other = await AlignGPT.load(folder.replace('/base/', '/gqa/'))
  addLora(other, { rank: 2, targets: ['q_proj'] })
  saveAdapter(other, dir)
  other.dispose()
  fs.rmSync(path.join(dir, 'non_lora_trainables.safetensors'))
  expect(() => loadAdapter(model, dir)).toThrow(/lora_A\.weight': expected shape \[2,48\], got \[2,40\]/)
  const file = path.join(dir, 'adapter_config.json')
  const config = JSON.parse(fs.readFileSync(file, 'utf8'))
  for (const [key, value] of Object.entries({
    use_dora: true,
    layer_replication: [[0, 2]],
    bias: 'all',
    peft_type: 'IA3',
  })) {
    fs.writeFileSync(file, JSON.stringify({ ...config, [key]: value }))
    expect(() => loadAdapter(model, dir), key).toThrow(new RegExp(`adapter_config.json: ${key}`))
  }
  expect(memory().inUse).toBe(held)
  addLora(model)
  expect(() => addLora(model)).toThrow(/expected one without adapters/)
  await expect(
    finetune(model, await open('data_phase2.json'), { lr: 0, projectorLr: 1e-3, progress: false }),
  ).rejects.toThrow(/projectorLr: expected an lr > 0/)
  model.dispose()
})

test('pre-training leaves adapters alone; the projector can have a rate of its own', async () => {
  const model = await load()
  addLora(model, { rank: 2 })
  const before = values(model)
  await pretrain(model, await open('data_phase1.json'), { steps: 2, warmupRatio: 0, workers: 0, progress: false })
  const moved = new Set(
    [...values(model)].filter(([n, v]) => worst(v, before.get(n) as Float32Array) > 0).map(([n]) => n),
  )
  expect([...moved].every((n) => /^mm_projector|^align_indicators/.test(n))).toBe(true)
  const half = values(model)
  const options = { steps: 1, warmupRatio: 0, lr: 1e-3, projectorLr: 1e-5, workers: 0, progress: false }
  await finetune(model, await open('data_phase2.json'), options)
  const distance = (n: string) => worst(values(model).get(n) as Float32Array, half.get(n) as Float32Array)
  // the first step of AdamW moves by the rate
  expect(distance('mm_projector.2.bias')).toBeCloseTo(1e-5, 7)
  expect(distance('gated_weight_layer.mlp.2.bias')).toBeCloseTo(1e-3, 5)
  model.dispose()
})

test('a run with adapters goes on from its checkpoint bit for bit, not with other adapters', async () => {
  const usual = { lora: { rank: 2 }, lr: 1e-3, steps: 4, batch: 4, workers: 0, progress: false, saveEvery: 2 }
  const run = async (out: string, o: object = {}) => {
    const model = await load()
    try {
      const data = await open('data_phase2.json')
      const result = await finetune(model, data, { ...usual, out: path.join(scratch, out), onMessage: () => {}, ...o })
      return { result, weights: values(model) }
    } finally {
      model.dispose()
    }
  }
  const whole = await run('whole')
  const stop = new AbortController()
  await run('stopped', { signal: stop.signal, onStep: (s: { step: number }) => s.step === 1 && stop.abort() })
  await expect(run('stopped', { resume: true, lora: { rank: 3 } })).rejects.toThrow(/settings of the run to continue/)
  const rest = await run('stopped', { resume: true })
  expect(rest.result.resumed).toBe(2)
  expect(rest.weights).toEqual(whole.weights)
})

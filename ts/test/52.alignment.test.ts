/** The variants of the alignment vector: what each computes, trains and keeps in its files. */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { makeBatch } from '../../scripts/bench/model.js'
import { AlignGPT } from '../src/aligngpt.js'
import { noGrad, scope, type Tensor } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { evaluate } from '../src/evaluation/evaluate.js'
import { evaluateLoss } from '../src/evaluation/likelihood.js'
import { packWithPixels } from '../src/inference/request.js'
import type { Mix } from '../src/models/align.js'
import { ALIGNMENTS } from '../src/models/config/variants.js'
import { ALIGN_ROW, IMAGE_ROW } from '../src/models/packed-batch.js'
import type { AlignmentOptions } from '../src/models/settings.js'
import { buildSample } from '../src/processing/sample.js'
import { finetune, pretrain } from '../src/train/trainer.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const folder = path.join(base, 'model/aligngpt')
const images = path.join(base, 'images')
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'alignment test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const open = (name: string) => loadDataset(path.join(base, name), { images })
const load = (o: AlignmentOptions & { dtype?: 'f32' | 'f64' } = {}) => AlignGPT.load(folder, { seed: 2, ...o })

/** Two pictures and a text, packed for the way their vectors are made. */
function batchFor(model: AlignGPT, mix: Mix) {
  const record = (id: string, image: string | null, q: string) => ({
    id,
    image,
    conversations: [
      { from: 'human' as const, value: q },
      { from: 'gpt' as const, value: `an answer to ${id}` },
    ],
    similarity: 3,
  })
  const options = { style: 'vicuna_v1', patches: model.patches } as const
  const samples = [
    record('one', 'a.png', 'What is this?'),
    record('two', null, 'How are you?'),
    record('three', 'b.png', 'Is it red or blue?'),
  ].map((r) => buildSample(r, model.tokenizer, options))
  const size = 3 * model.imageSize ** 2
  const pixels = samples.map((s, i) =>
    s.image === null ? null : Float32Array.from({ length: size }, (_, k) => Math.sin(k * (i + 1))),
  )
  return packWithPixels(model, samples, pixels, mix)
}
const run = (model: AlignGPT, mix = model.mix) =>
  scope(() =>
    noGrad(() => {
      const { loss, embedded } = model.loss(batchFor(model, mix), mix)
      const list = (t: Tensor) => Array.from(t.toFloats())
      return { loss: loss.item(), coefficients: list(embedded.coefficients), embeds: list(embedded.inputsEmbeds) }
    }),
  )
const values = (m: AlignGPT) => new Map([...m.namedParameters()].map(([n, t]) => [n, t.toFloats()]))

/** Gradients of parameters against central differences of the loss, at a few places each. */
function checkGradients(model: AlignGPT, names: readonly string[]): void {
  const batch = batchFor(model, model.mix)
  const all = new Map(model.namedParameters())
  const chosen = names.map((n) => [n, all.get(n) as Tensor] as const)
  for (const [, t] of chosen) t.requiresGrad()
  scope(() => void model.lossAndGradients(batch, model.mix))
  const loss = () => scope(() => noGrad(() => model.loss(batch, model.mix).loss.item()))
  for (const [name, t] of chosen) {
    const gradient = scope(() => t.grad()?.toFloats()) as Float64Array
    const at = t.toFloats()
    const top = gradient.reduce((m, g, i) => (Math.abs(g) > Math.abs(gradient[m]) ? i : m), 0)
    for (const k of [top, 0, t.numel - 1]) {
      const nudged = (by: number): number => {
        t.write(at.map((x, j) => (j === k ? x + by : x)))
        return loss()
      }
      const slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5
      t.write(at)
      const far = Math.abs(gradient[k] - slope)
      expect(far, `${name}[${k}]: ${gradient[k]}, differences ${slope}`).toBeLessThan(1e-8 + 1e-4 * Math.abs(slope))
    }
    expect(gradient[top], name).not.toBe(0)
  }
}

test('an official folder is adaptive with the two-layer gate', async () => {
  const model = await load()
  expect(model.config).toMatchObject({ mm_alignment: 'adaptive', mm_gate_type: 'mlp', mm_gate_text: 'all' })
  expect(model.mix).toEqual({ mode: 'gate' })
  model.dispose()
  await expect(load({ alignment: 'global only' as 'global' })).rejects.toThrow(
    /mm_alignment: expected one of "adaptive"/,
  )
  await expect(load({ gate: 'conv' as 'mlp' })).rejects.toThrow(/mm_gate_type: expected one of "mlp"/)
})

test('the weights of each variant', async () => {
  const of: Record<string, number[]> = {}
  for (const alignment of ALIGNMENTS) {
    const model = await load({ alignment })
    of[alignment] = run(model).coefficients
    model.dispose()
  }
  const [global, mean] = [
    [0, 0, 0, 0, 0, 0, 0, 1],
    [...new Array(7).fill(Math.fround(1 / 7)), 1],
  ]
  expect(of.global).toEqual([...global, ...global])
  expect(of.average).toEqual([...mean, ...mean])
  expect(of.none).toEqual([])
  expect(of.local.map((c, i) => c + Number(i % 8 === 7))).toEqual(of.adaptive)
  expect(of.random).toEqual(of.adaptive) // the gate is the same, the table is not
  expect(of.adaptive.slice(0, 7).reduce((a, b) => a + b)).toBeCloseTo(1, 6)
})

describe('the linear gate', () => {
  test('is one matrix of the dot products', async () => {
    const model = await load({ gate: 'linear', dtype: 'f64' })
    const { weight, bias } = model.gated_weight_layer.linear as { weight: Tensor; bias: Tensor }
    expect([...model.namedParameters()].map(([n]) => n).filter((n) => n.startsWith('gated'))).toEqual([
      'gated_weight_layer.linear.weight',
      'gated_weight_layer.linear.bias',
    ])
    expect(weight.shape).toEqual([7, 16])
    scope(() =>
      noGrad(() => {
        const e = model.embed(batchFor(model, model.mix), model.mix)
        const [w, b, dots, logits] = [weight, bias, e.dots, e.gateLogits].map((t) => t.toFloats())
        expect(logits.length).toBe(14)
        for (const [i, logit] of logits.entries()) {
          const [m, n] = [Math.floor(i / 7), i % 7]
          let sum = b[n]
          for (let p = 0; p < 16; p++) sum += w[n * 16 + p] * dots[m * 16 + p]
          expect(logit).toBeCloseTo(sum, 12)
        }
      }),
    )
    model.dispose()
  })
  test('has the right gradients', async () => {
    const model = await load({ gate: 'linear', dtype: 'f64' })
    checkGradients(model, [
      'gated_weight_layer.linear.weight',
      'gated_weight_layer.linear.bias',
      'mm_projector.2.weight',
    ])
    model.dispose()
  })
})

describe('no vector at all', () => {
  test('the sequence is the usual one without its row', async () => {
    const [model, usual] = [await load({ alignment: 'none' }), await load()]
    const [without, withRow] = [batchFor(model, model.mix), batchFor(usual, usual.mix)]
    expect(without.tokens.includes(ALIGN_ROW)).toBe(false)
    expect(Array.from(withRow.tokens).filter((t) => t !== ALIGN_ROW)).toEqual(Array.from(without.tokens))
    expect(without.tokens[without.offsets[0] + 1]).toBe(withRow.tokens[withRow.offsets[0] + 2])
    const H = model.config.llm.hidden_size
    const rows = run(usual).embeds
    const kept = Array.from(withRow.tokens.keys()).filter((t) => withRow.tokens[t] !== ALIGN_ROW)
    expect(run(model).embeds).toEqual(kept.flatMap((t) => rows.slice(t * H, (t + 1) * H)))
    expect(without.tokens.filter((t) => t === IMAGE_ROW).length).toBe(2 * model.patches)
    // the label of the first row after the picture moves with it
    expect(without.lossRows.length).toBe(withRow.lossRows.length)
    expect(Array.from(without.lossTargets)).toEqual(Array.from(withRow.lossTargets))
    expect(() => scope(() => model.loss(withRow, model.mix))).toThrow(/expected no place for alignment vectors, got 2/)
    expect(() => scope(() => usual.loss(without, usual.mix))).toThrow(/expected a place for alignment vectors, got 0/)
    model.dispose()
    usual.dispose()
  })
  test('has the right gradients', async () => {
    const model = await load({ alignment: 'none', dtype: 'f64' })
    checkGradients(model, ['mm_projector.0.weight', 'mm_projector.2.bias', 'model.embed_tokens.weight'])
    model.dispose()
  })
})

test('what each variant trains', async () => {
  const parts = (alignment: (typeof ALIGNMENTS)[number], phase: 1 | 2) => {
    const gate = ['adaptive', 'local', 'random'].includes(alignment)
    const table = !['random', 'none'].includes(alignment)
    return phase === 1
      ? [...(table ? ['align_indicators'] : []), 'mm_projector']
      : [...(gate ? ['gated_weight_layer'] : []), 'lm_head', 'mm_projector', 'model']
  }
  const options = { steps: 2, batch: 7, lr: 1e-3, warmupRatio: 0, workers: 0, progress: false }
  for (const alignment of ALIGNMENTS)
    for (const phase of [1, 2] as const) {
      const model = await load({ alignment })
      const before = values(model)
      const data = await open(`data_phase${phase}.json`)
      await (phase === 1 ? pretrain : finetune)(model, data, options)
      const same = (n: string, v: ArrayLike<number>) => Array.from(v).every((x, i) => x === before.get(n)?.[i])
      const moved = [...values(model)].filter(([n, v]) => !same(n, v)).map(([n]) => n.replace(/\..*/, ''))
      expect([...new Set(moved)].sort(), `${alignment}, phase ${phase}`).toEqual(parts(alignment, phase))
      data.close()
      model.dispose()
    }
})

test('a saved variant runs the same way when it is loaded, and answers', async () => {
  for (const o of [
    ...ALIGNMENTS.map((alignment) => ({ alignment })),
    { gate: 'linear', gateText: 'instruction' } as const,
  ] as AlignmentOptions[]) {
    const model = await load(o)
    const dir = path.join(scratch, JSON.stringify(o).replace(/\W+/g, '-'))
    await model.save(dir)
    const again = await AlignGPT.load(dir)
    expect(again.config.mm_alignment).toBe(o.alignment ?? 'adaptive')
    expect([again.config.mm_gate_type, again.config.mm_gate_text]).toEqual([o.gate ?? 'mlp', o.gateText ?? 'all'])
    expect(run(again)).toEqual(run(model))
    const question = { id: '1', image: 'a00.png', question: 'What?', answer: 'circle', options: ['circle', 'square'] }
    const { answers } = await evaluate(again, [question], { images, blind: false })
    expect(answers[0].given).toMatch(/circle|square/)
    let alpha: number[] | null = null
    for await (const piece of again.generate({ image: path.join(images, 'a00.png'), prompt: 'What?', maxNewTokens: 2 }))
      alpha = piece.alpha
    expect(alpha === null).toBe(o.alignment === 'none')
    const data = await open('data_phase2.json')
    expect((await evaluateLoss(again, data)).tokens).toBe(94)
    for (const x of [model, again, data]) 'dispose' in x ? x.dispose() : x.close()
  }
})

test('the level can be fixed at inference, and the variants differ', async () => {
  const model = await load()
  const table = model.align_indicators.indicator_embs.toFloats()
  const H = model.config.llm.hidden_size
  const { embeds, coefficients } = run(model, { mode: 'level', level: 5 })
  expect(coefficients.slice(0, 8)).toEqual([0, 0, 0, 0, 0, 1, 0, 0])
  expect(embeds.slice(H, 2 * H)).toEqual(Array.from(table.slice(5 * H, 6 * H)))
  model.dispose()
  const random = await load({ alignment: 'random' })
  expect(random.align_indicators.indicator_embs.toFloats()).not.toEqual(table)
  random.dispose()
})

test('gateText of the config is what training shows the gate', async () => {
  const loss = async (o: AlignmentOptions, gateText?: 'all' | 'instruction') => {
    const model = await load(o)
    const data = await open('data_phase2.json')
    const result = await finetune(model, data, { steps: 1, batch: 8, gateText, workers: 0, progress: false })
    model.dispose()
    return result.loss[0]
  }
  const [all, instruction] = [await loss({}), await loss({ gateText: 'instruction' })]
  expect(instruction).not.toBe(all)
  expect(await loss({}, 'instruction')).toBe(instruction)
  expect(await loss({ gateText: 'instruction' }, 'all')).toBe(all)
})

test('without any word the linear gate gives its bias', async () => {
  const model = await load({ gate: 'linear' })
  const { bias } = model.gated_weight_layer.linear as { bias: Tensor }
  const batch = makeBatch(model, [5])
  const empty = { ...batch, gateIds: new Int32Array(0), gateOffsets: Int32Array.from([0, 0]) }
  scope(() =>
    noGrad(() => {
      const e = model.embed(empty, model.mix)
      expect(e.gateLogits.toFloats()).toEqual(bias.toFloats()) // a mean of nothing is zero
    }),
  )
  model.dispose()
})

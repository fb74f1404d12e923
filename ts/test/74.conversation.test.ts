/** The conversation style: chosen in training, kept by the model, and what everything asks it in afterwards. */

import fs from 'node:fs'
import path from 'node:path'
import { afterAll, expect, test, vi } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { loadDataset } from '../src/data/dataset.js'
import { evaluate } from '../src/evaluation/evaluate.js'
import type { EvaluationInfo } from '../src/evaluation/held-out.js'
import { evaluateLoss } from '../src/evaluation/likelihood.js'
import { generateBatch } from '../src/inference/generate.js'
import type { ChatStyle } from '../src/processing/conversation/styles.js'
import { IMAGE_TOKEN } from '../src/processing/sample.js'
import type { TrainOptions } from '../src/train/options.js'
import { finetune, pretrain, type TrainResult } from '../src/train/trainer.js'
import { caseDir, tempDir } from './data-cases.js'

const images = caseDir('base', 'images')
const folder = caseDir('base', 'model/aligngpt')
const scratch = tempDir()
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const files = { pretrain: caseDir('base', 'data_phase1.json'), finetune: caseDir('base', 'data_phase2.json') }
const usual = { batch: 4, steps: 2, workers: 0, progress: false } as const

/** A run, and the text of every sample that it computed. */
async function run(
  phase: 'pretrain' | 'finetune',
  model: AlignGPT,
  o: TrainOptions,
): Promise<{ result: TrainResult; texts: string[] }> {
  const data = await loadDataset(files[phase], { images })
  const steps = vi.spyOn(model, 'lossAndGradients')
  try {
    const result = await (phase === 'pretrain' ? pretrain : finetune)(model, data, { ...usual, ...o })
    const texts = steps.mock.calls.flatMap(([{ tokens, offsets }]) =>
      Array.from({ length: offsets.length - 1 }, (_, i) => {
        const ids = tokens.subarray(offsets[i], offsets[i + 1]).filter((t) => t >= 0 && t !== IMAGE_TOKEN)
        return model.tokenizer.decode([...ids])
      }),
    )
    return { result, texts }
  } finally {
    steps.mockRestore()
    data.close()
  }
}
const configOf = (dir: string): Record<string, unknown> =>
  JSON.parse(fs.readFileSync(path.join(dir, 'config.json'), 'utf8'))
const lossIn = async (model: AlignGPT, style?: ChatStyle): Promise<number> => {
  const data = await loadDataset(files.finetune, { images })
  const { loss } = await evaluateLoss(model, data, { style })
  data.close()
  return loss
}

test('instruction tuning renders the style that is asked for, and the model keeps it', async () => {
  const out = path.join(scratch, 'tuned')
  const model = await AlignGPT.load(folder)
  expect(model.conversation).toBe('vicuna_v1')
  const { texts } = await run('finetune', model, { conversation: 'llama_2', out, saveEvery: 1 })
  expect(texts.length).toBeGreaterThan(4)
  for (const text of texts) expect(text).toMatch(/\[INST\].*\[\/INST\]/s)
  expect(model.conversation).toBe('llama_2')
  expect(configOf(out).conversation).toBe('llama_2')
  const answers = async (m: AlignGPT, style?: ChatStyle): Promise<unknown> =>
    generateBatch(m, [{ prompt: 'What is this?', image: path.join(images, 'a00.png') }], { maxNewTokens: 8, style })
  const asked = { id: '1', image: 'a00.png', question: 'Is it red?', answer: 'Yes' }
  const judged = (m: AlignGPT, style?: ChatStyle): Promise<unknown> =>
    evaluate(m, [asked, { ...asked, id: '2', answer: 'A red cat' }], { images, blind: false, style })
  const again = await AlignGPT.load(out)
  for (const m of [model, again]) {
    expect(await lossIn(m)).toBe(await lossIn(m, 'llama_2'))
    expect(await lossIn(m)).not.toBe(await lossIn(m, 'vicuna_v1'))
    expect(await answers(m)).toEqual(await answers(m, 'llama_2'))
    expect(await judged(m)).toEqual(await judged(m, 'llama_2'))
  }
  model.dispose()
  again.dispose()
  // it is one of the settings that the numbers of a run depend on
  const other = await AlignGPT.load(folder)
  await expect(run('finetune', other, { out, resume: true, steps: 3 })).rejects.toThrow(/conversation.*llama_2/)
  other.dispose()
})

test('held-out records are rendered and asked in it', async () => {
  const out = path.join(scratch, 'held')
  const model = await AlignGPT.load(folder)
  const evaluations: EvaluationInfo[] = []
  const evalData = path.join(scratch, 'held.json')
  const records = JSON.parse(fs.readFileSync(files.finetune, 'utf8')).slice(0, 3)
  fs.writeFileSync(evalData, JSON.stringify(records))
  const told = { evalData, evalEvery: 2, onEvaluation: (e: EvaluationInfo) => void evaluations.push(e) }
  await run('finetune', model, { conversation: 'llama_2', out, ...told })
  model.dispose()
  const best = await AlignGPT.load(path.join(out, 'best'))
  expect(best.conversation).toBe('llama_2')
  const held = await loadDataset(evalData, { images })
  const { loss } = await evaluateLoss(best, held)
  expect(evaluations.at(-1)?.loss).toBeCloseTo(loss, 5)
  for (const { id, text } of evaluations.at(-1)?.answers ?? []) {
    const record = [...held].find((r) => r.id === id)
    const prompt = record?.conversations[0].value.replace('<image>', '').trim() ?? ''
    const image = record?.image ? path.join(images, record.image) : undefined
    const [answer] = await generateBatch(best, [{ prompt, image }], { maxNewTokens: 32, style: 'llama_2' })
    expect(text).toBe(answer.text)
  }
  expect(evaluations.at(-1)?.answers.length).toBe(3)
  held.close()
  best.dispose()
})

test('pre-training stores it and changes nothing; instruction tuning goes on in it', async () => {
  const weights: Buffer[] = []
  for (const conversation of [undefined, 'llama_2'] as const) {
    const out = path.join(scratch, `pretrained ${conversation}`)
    const model = await AlignGPT.load(folder)
    const { texts } = await run('pretrain', model, { conversation, out })
    expect(texts.join()).not.toMatch(/USER|INST/)
    weights.push(fs.readFileSync(path.join(out, 'model.safetensors')))
    expect(configOf(out).conversation).toBe(conversation ?? 'vicuna_v1')
    model.dispose()
    const next = await AlignGPT.load(out)
    const { texts: tuned } = await run('finetune', next, {})
    for (const text of tuned) expect(text).toMatch(conversation ? /\[INST\]/ : /USER:/)
    next.dispose()
  }
  expect(weights[1].equals(weights[0])).toBe(true)
})

test('a style that there is not is refused, and the model stays as it was', async () => {
  const model = await AlignGPT.load(folder)
  for (const conversation of ['plain', 'chatml'])
    await expect(run('finetune', model, { conversation: conversation as ChatStyle })).rejects.toThrow(
      `[train] conversation: expected vicuna_v1, llama_2 or llama_3, got "${conversation}"`,
    )
  expect(() => {
    model.conversation = 'chatml' as ChatStyle
  }).toThrow('[AlignGPT] conversation: expected vicuna_v1 or llama_2 or llama_3, got "chatml"')
  expect(model.conversation).toBe('vicuna_v1')
  model.dispose()
})

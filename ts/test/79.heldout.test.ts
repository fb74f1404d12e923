/** Evaluation during training on records that are not trained on. */
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { memory } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import { DropLog } from '../src/data/drop-log.js'
import { type EvaluationInfo, taskOf } from '../src/evaluation/held-out.js'
import { evaluateLoss } from '../src/evaluation/likelihood.js'
import type { DataRecord, Turn } from '../src/formats/record-file.js'
import { generateBatch } from '../src/inference/generate.js'
import { verifyCheckpoint } from '../src/train/checkpoint.js'
import { FINETUNE, type PhaseDefinition, PRETRAIN } from '../src/train/phases.js'
import { finetune, pretrain, type TrainOptions, type TrainResult } from '../src/train/trainer.js'
import { tempDir } from './data-cases.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const folder = path.join(base, 'model/aligngpt')
const images = path.join(base, 'images')
const scratch = tempDir()
afterAll(() => fs.rmSync(scratch, { recursive: true }))

const files = { pretrain: path.join(base, 'data_phase1.json'), finetune: path.join(base, 'data_phase2.json') }
const rawRecords = (file: string): { id: string; similarity?: number }[] => JSON.parse(fs.readFileSync(file, 'utf8'))
const write = (name: string, value: unknown): string => {
  const file = path.join(scratch, name)
  fs.writeFileSync(file, JSON.stringify(value))
  return file
}

interface Outcome {
  result: TrainResult
  evaluations: EvaluationInfo[]
  weights: Buffer
  log: Record<string, unknown>[]
  said: string[]
}

/** A run in a folder of its own; `abort` may stop it when a step is done. */
async function run(
  phase: 'pretrain' | 'finetune',
  name: string,
  {
    file = files[phase],
    abort,
    ...o
  }: TrainOptions & { file?: string; abort?: (step: number, stop: () => void) => void },
): Promise<Outcome> {
  const out = path.join(scratch, name)
  const model = await AlignGPT.load(folder)
  const data = await loadDataset(file, { images })
  const controller = new AbortController()
  const [evaluations, said]: [EvaluationInfo[], string[]] = [[], []]
  try {
    const result = await (phase === 'pretrain' ? pretrain : finetune)(model, data, {
      ...{ batch: 3, steps: 8, seed: 5, workers: 0, progress: false, saveEvery: null, signal: controller.signal },
      onMessage: (text) => said.push(text),
      onStep: ({ step }) => abort?.(step, () => controller.abort()),
      onEvaluation: (e) => evaluations.push(e),
      ...o,
      out,
    })
    const lines = fs.readFileSync(path.join(out, 'log.jsonl'), 'utf8').trim().split('\n')
    const log = lines.map((l) => JSON.parse(l))
    for (const l of log) {
      for (const k of ['time', 'tokensPerSecond', 'samplesPerSecond', 'waited']) delete l[k]
      delete l.evaluation?.seconds
    }
    return { result, evaluations, weights: fs.readFileSync(path.join(out, 'model.safetensors')), log, said }
  } finally {
    model.dispose()
    data.close()
  }
}

/** The loss of a saved model on a file, by the function that has nothing to do with training. */
async function lossOf(where: string, file: string, phase: PhaseDefinition): Promise<{ loss: number; tokens: number }> {
  const config = path.join(where, 'config.json')
  const fields = JSON.parse(fs.readFileSync(config, 'utf8'))
  fs.writeFileSync(config, JSON.stringify({ ...fields, image_aspect_ratio: phase.pad ? 'pad' : 'square' }))
  const model = await AlignGPT.load(where)
  const data = await loadDataset(file, { images })
  const found = await evaluateLoss(model, data, { style: phase.style ?? undefined, mix: phase.mix, batch: 1 })
  model.dispose()
  data.close()
  return found
}

const best = (name: string): string => path.join(scratch, name, 'best')
const evaluationLines = (log: Outcome['log']): EvaluationInfo[] =>
  log.flatMap((l) => (l.evaluation ? [l.evaluation as EvaluationInfo] : []))

describe('a share that is held out', () => {
  test('is a function of the seed, is not trained on, and nothing of the rest changes', async () => {
    const data = await loadDataset(files.pretrain, { images })
    const ids = (d: Iterable<DataRecord>): string[] => [...d].map((r) => r.id)
    const { rest, held } = data.holdOut(0.3, 5)
    expect(held.length).toBe(4)
    expect(ids(data.holdOut(0.3, 5).held)).toEqual(ids(held))
    expect(ids(data.holdOut(0.3, 6).held)).not.toEqual(ids(held))
    expect([...ids(held), ...ids(rest)].sort()).toEqual(ids(data))
    expect(data.holdOut(0.001, 5).held.length).toBe(1)
    expect(() => data.holdOut(0.98, 5)).toThrow(/more than the 14 held out, got 14/)
    const chosen = new Set(ids(held))
    const raw = rawRecords(files.pretrain)
    const only = write('rest.json', raw.filter((r) => !chosen.has(r.id))) // biome-ignore format: one line
    const before = memory().inUse
    const evaluated = await run('pretrain', 'share', { evalShare: 0.3, evalEvery: 3 })
    expect(memory().inUse).toBe(before)
    const plain = await run('pretrain', 'plain', { file: only })
    expect(evaluated.result.loss).toEqual(plain.result.loss)
    expect(evaluated.weights.equals(plain.weights)).toBe(true)
    expect(evaluated.evaluations.map((e) => e.step)).toEqual([2, 5, 7])
    expect(evaluated.evaluations[0].samples).toBe(4)
    for (const d of [data, rest, held]) d.close()
  })

  test('a record without an id keeps the one of its place in the file', async () => {
    const data = await loadDataset(write('no ids.json', rawRecords(files.pretrain).map(({ id, ...r }) => r)), { images }) // biome-ignore format: one line
    expect([...data.subset([3, 11]).subset([1])].map((r) => r.id)).toEqual(['11'])
    const part = data.subset([3, 11])
    const dropped = new DropLog(part)
    dropped.noteBad({ index: 1, id: '11', image: 'x', reason: 'why' })
    dropped.noteTruncated(0)
    expect(dropped.state).toMatchObject({ bad: [{ index: 11 }], truncated: [3] })
    const again = new DropLog(data.subset([3, 11]))
    again.restore(dropped.state)
    expect(again.state).toEqual(dropped.state)
    for (const d of [data, part]) d.close()
  })
})

describe('a file of its own', () => {
  for (const [phase, settings] of [
    ['pretrain', PRETRAIN],
    ['finetune', FINETUNE],
  ] as const)
    test(`${phase}: training has the same bits, the loss is that of an independent evaluation`, async () => {
      const o = { lr: 1e-3, evalEvery: 4, batch: 2, microBatch: 2 }
      const evaluated = await run(phase, `own ${phase}`, { ...o, evalData: files[phase] })
      const plain = await run(phase, `without ${phase}`, { ...o, evalEvery: undefined })
      expect(evaluated.result.loss).toEqual(plain.result.loss)
      expect(evaluated.weights.equals(plain.weights)).toBe(true)
      expect(evaluated.log.filter((l) => !l.evaluation)).toEqual(plain.log)
      expect(evaluated.evaluations.map((e) => e.step)).toEqual([3, 7])
      const end = await lossOf(path.join(scratch, `own ${phase}`), files[phase], settings)
      const { loss, tokens, samples } = evaluated.evaluations[1]
      expect({ tokens, samples }).toEqual({ tokens: end.tokens, samples: rawRecords(files[phase]).length })
      expect(Math.abs(loss - end.loss)).toBeLessThan(2e-6 * end.loss)
    })
})

test('the best model stays, however the loss goes on; log and result name it', async () => {
  const file = write('three.json', rawRecords(files.finetune).slice(0, 3))
  const evalData = write('one.json', rawRecords(files.finetune).slice(3))
  const { result, evaluations, log } = await run('finetune', 'best', { file, evalData, lr: 3e-2, evalEvery: 1 })
  const losses = evaluations.map((e) => e.loss)
  const lowest = Math.min(...losses)
  expect(losses.at(-1)).toBeGreaterThan(1.05 * lowest) // else it would show nothing
  expect(result.best).toEqual({ step: losses.indexOf(lowest), loss: lowest })
  expect(evaluations.map((e) => e.best)).toEqual(losses.map((l, i) => l < Math.min(Infinity, ...losses.slice(0, i))))
  const kept = await lossOf(best('best'), evalData, FINETUNE)
  expect(Math.abs(kept.loss - lowest)).toBeLessThan(2e-6 * lowest)
  expect(evaluationLines(log).map((e) => e.loss)).toEqual(losses)
  const state = JSON.parse(fs.readFileSync(path.join(scratch, 'best/state.json'), 'utf8'))
  expect(state.best).toEqual(result.best)
  expect(state.options.evaluation).toMatchObject({
    share: null,
    every: 1,
    records: 1,
    data: { bytes: expect.any(Number) },
  })
})

test('with adapters the best model has them merged, and beside it as they are', async () => {
  const o = { evalData: files.finetune, steps: 4, lr: 1e-2, evalEvery: 2, lora: { rank: 4 } }
  const { result } = await run('finetune', 'lora', o)
  const { loss } = await lossOf(best('lora'), files.finetune, FINETUNE)
  const lowest = result.best?.loss ?? 0
  expect(Math.abs(loss - lowest)).toBeLessThan(2e-6 * lowest)
  const adapter = path.join('adapter', 'adapter_model.safetensors')
  expect(result.best?.step).toBe(3) // the end: the same as in `out`
  expect(fs.readFileSync(path.join(best('lora'), adapter))).toEqual(
    fs.readFileSync(path.join(scratch, 'lora', adapter)),
  )
})

describe('parts of the loss', () => {
  test('of each level it is that of its records alone', async () => {
    const { evaluations } = await run('pretrain', 'levels', { evalData: files.pretrain, steps: 3, lr: 1e-2 })
    const { levels = [], loss, tokens } = evaluations[evaluations.length - 1]
    expect(levels).toHaveLength(8)
    const raw = rawRecords(files.pretrain)
    for (const [level, group] of levels.entries()) {
      const mine = raw.filter((r) => r.similarity === level)
      expect(group.samples).toBe(mine.length)
      const alone = await lossOf(path.join(scratch, 'levels'), write(`level ${level}.json`, mine), PRETRAIN)
      expect(group.tokens).toBe(alone.tokens)
      expect(Math.abs((group.loss ?? 0) - alone.loss)).toBeLessThan(2e-6 * alone.loss)
    }
    const whole = levels.reduce((sum, g) => sum + (g.loss ?? 0) * g.tokens, 0) / tokens
    expect(whole).toBeCloseTo(loss, 10)
    expect(new Set(levels.map((g) => g.loss)).size).toBe(8)
  })

  test('of each task, with the weights of the gate', async () => {
    const raw = rawRecords(files.finetune).map((r, i) => (i === 0 ? { ...r, task: 'colours' } : r))
    const evalData = write('tasks.json', raw)
    const { evaluations } = await run('finetune', 'tasks', { evalData, steps: 4, lr: 1e-3 })
    const { tasks = {} } = evaluations[evaluations.length - 1]
    expect(Object.keys(tasks)).toEqual(['colours', 'description', 'text', 'yes/no'])
    const [model, data] = [await AlignGPT.load(path.join(scratch, 'tasks')), await loadDataset(evalData, { images })]
    for (const [i, [task, group]] of Object.entries(tasks).entries()) {
      const place = ['colours', 'description', 'text', 'yes/no'].indexOf(task)
      const alone = await evaluateLoss(model, data.subset([place]), { mix: FINETUNE.mix })
      expect(group).toMatchObject({ samples: 1, tokens: alone.tokens })
      expect(Math.abs((group.loss ?? 0) - alone.loss)).toBeLessThan(2e-6 * alone.loss)
      if (task === 'text') expect(group.coefficients).toBeNull()
      else {
        expect(group.coefficients).toHaveLength(8)
        expect(group.coefficients?.slice(0, -1).reduce((a, b) => a + b)).toBeCloseTo(1, 5)
        expect(group.coefficients?.at(-1)).toBe(1)
      }
      expect(i).toBe(place)
    }
    // each picture's weights are its own: three of the records were in one batch
    const single = await run('finetune', 'tasks alone', { evalData, steps: 4, lr: 1e-3, evalEvery: 1, batch: 1 })
    const batched = await run('finetune', 'tasks again', { evalData, steps: 4, lr: 1e-3, evalEvery: 1, batch: 3 })
    const weights = ({ evaluations: [first] }: Outcome, task: string): number[] =>
      first.tasks?.[task].coefficients ?? []
    for (const task of ['colours', 'description', 'yes/no'])
      for (const [l, c] of weights(single, task).entries()) expect(weights(batched, task)[l]).toBeCloseTo(c, 5)
    expect(weights(single, 'colours')).not.toEqual(weights(single, 'description'))
    model.dispose()
    data.close()
  })

  test('many tasks: the rarest are counted together', async () => {
    const [record] = rawRecords(files.finetune)
    const names = [...Array.from({ length: 20 }, (_, i) => `t${i}`), 't19', 't19', 't7']
    const evalData = write('twenty.json', names.map((task) => ({ ...record, task }))) // biome-ignore format: one line
    const { evaluations } = await run('finetune', 'twenty', { evalData, steps: 1 })
    const tasks = Object.entries(evaluations[0].tasks ?? {})
    expect(tasks.map(([name, g]) => [name, g.samples]).slice(0, 3)).toEqual([['t19', 3], ['t7', 2], ['t0', 1]]) // biome-ignore format: one line
    expect(tasks).toHaveLength(16)
    expect(tasks[15]).toMatchObject(['other', { samples: 5, coefficients: expect.any(Array) }])
    expect(tasks[15][1].loss).toBeCloseTo(evaluations[0].loss, 5) // all are the same record
    expect(tasks[15][1].coefficients?.at(-1)).toBe(1)
  })

  test('tasks are told by their answers where the record names none', () => {
    const record = (question: string, answer: string, image: string | null = 'a.png'): DataRecord => ({
      id: '1',
      image,
      similarity: null,
      conversations: [['human', `<image>\n${question}`], ['gpt', answer]].map(([from, value]) => ({ from, value }) as Turn), // biome-ignore format: one line
    })
    for (const [task, question, answer] of [
      ['choice', 'Which?\nA. red\nB. blue', 'B'],
      ['choice', 'Which?', '(C).'],
      ['yes/no', 'Is it red?', 'No.'],
      ['yes/no', 'Is it red?', 'Yes, it is red.'],
      ['long', 'What is it?', 'No people are to be seen in this picture, which shows a long red bus.'],
      ['description', 'Describe the picture.', 'A bus.'],
      ['short', 'What is it?', 'a red bus'],
      ['long', 'Where is it?', 'It stands in front of the large station.'],
    ])
      expect(taskOf(record(question, answer)), answer).toBe(task)
    expect(taskOf(record('Is it?', 'Yes', null))).toBe('text')
    expect(taskOf({ ...record('Is it?', 'Yes'), task: 'vqa' })).toBe('vqa')
  })
})

describe('a run that is stopped and continued', () => {
  const raw = rawRecords(files.finetune)
  const file = write('three again.json', raw.slice(0, 3))
  const five = Array.from({ length: 5 }, (_, n) => ({ ...raw[3], id: `${n}` })) // five batches
  const evalData = write('five.json', five)
  const o = { file, evalData, evalEvery: 2, microBatch: 1, lr: 3e-2, steps: 9 }
  const sameAs = (whole: Outcome, part: Outcome, name: string): void => {
    expect(part.log).toEqual(whole.log)
    expect(part.weights.equals(whole.weights)).toBe(true)
    expect(part.result.best).toEqual(whole.result.best)
    const kept = (n: string): Buffer => fs.readFileSync(path.join(best(n), 'model.safetensors'))
    expect(kept(name).equals(kept('whole'))).toBe(true)
  }

  test('has the same evaluations and the same best model, also when it is stopped in the middle of one', async () => {
    const before = memory().inUse
    const whole = await run('finetune', 'whole', o)
    expect(evaluationLines(whole.log).map((e) => e.best)).toContain(false)
    const again = { ...o, resume: true }
    // after step 2 of 9 an evaluation is due: once stopped before it, once when it has seen one of its batches
    const first = await run('finetune', 'parts', { ...again, abort: (step, stop) => step === 1 && stop() })
    expect(first.log).toEqual(whole.log.slice(0, 2))
    expect(first.result).toMatchObject({ aborted: true, steps: 2, best: null })
    const second = await run('finetune', 'parts', { ...again, abort: (step, stop) => step === 3 && setImmediate(stop) })
    expect(second.result).toMatchObject({ aborted: true, resumed: 2, steps: 4 })
    expect(evaluationLines(second.log)).toHaveLength(1)
    // killed before the next checkpoint: what the evaluation after step 4 has written is written again
    const checkpoints = path.join(scratch, 'parts/checkpoints')
    fs.cpSync(checkpoints, path.join(scratch, 'copy'), { recursive: true })
    await run('finetune', 'parts', { ...again, abort: (step, stop) => step === 5 && stop() })
    fs.rmSync(checkpoints, { recursive: true })
    fs.renameSync(path.join(scratch, 'copy'), checkpoints)
    const last = await run('finetune', 'parts', { ...again, abort: (step, stop) => step === 8 && setImmediate(stop) })
    // all steps are done, the last evaluation is not
    expect(last.result).toMatchObject({ aborted: true, steps: 9 })
    const end = await run('finetune', 'parts', again)
    expect(end.result).toMatchObject({ aborted: false, resumed: 9, steps: 9 })
    sameAs(whole, end, 'parts')
    expect(memory().inUse).toBe(before)
  })

  test('in another folder takes the best model along, and other records or intervals are refused', async () => {
    const stopped = await run('finetune', 'from', { ...o, abort: (step, stop) => step === 6 && stop() })
    const from = path.join(scratch, 'from')
    const refused = (more: TrainOptions): Promise<Outcome> => run('finetune', 'to', { ...o, ...more, resume: from })
    await expect(refused({ evalEvery: 3 })).rejects.toThrow(/settings of the run.*evaluation.*"every":2.*"every":3/)
    await expect(refused({ evalData: file })).rejects.toThrow(/"records":5.*"records":3/)
    await expect(refused({ evalData: undefined, evalShare: 0.4 })).rejects.toThrow(/"share":null.*"share":0.4/)
    await expect(refused({ evalData: undefined, evalEvery: undefined })).rejects.toThrow(/got .*evaluation undefined/)
    const to = await run('finetune', 'to', { ...o, resume: from })
    expect(to.result).toMatchObject({ resumed: 7, steps: 9 })
    expect(to.result.best).toEqual(stopped.result.best) // an earlier one, so it was copied
    expect(fs.readdirSync(best('to')).sort()).toEqual(fs.readdirSync(best('from')).sort())
    const { loss } = stopped.result.best as { loss: number }
    const independent = await lossOf(best('to'), evalData, FINETUNE)
    expect(Math.abs(independent.loss - loss)).toBeLessThan(2e-6 * loss)
  })
})

test('a picture that cannot be used is named and does not end the run', async () => {
  const raw = rawRecords(files.pretrain).map((r, i) => (i === 2 ? { ...r, image: 'missing.png' } : r))
  const { result, evaluations } = await run('pretrain', 'bad', { evalData: write('bad.json', raw), steps: 2 })
  expect(result.bad).toMatchObject([{ index: 2, image: 'missing.png' }])
  expect(evaluations[0].samples).toBe(13)
  const none = write('none.json', [raw[2]])
  const told: string[] = []
  const onMessage = (text: string): unknown => told.push(text)
  const without = await run('pretrain', 'none', { evalData: none, steps: 2, onMessage })
  expect([without.result.steps, without.result.best, without.evaluations]).toEqual([2, null, []])
  expect(told.join()).toMatch(
    /none of the held-out records can be used, the first because of .*missing\.png.* training goes on/,
  )
})

test('a best model that cannot be saved is said, and the next better one is tried again', async () => {
  fs.mkdirSync(path.join(scratch, 'unsaved'))
  fs.writeFileSync(best('unsaved'), 'in the way')
  const abort = (step: number): void => void (step === 3 && fs.rmSync(best('unsaved')))
  const o = { evalData: files.pretrain, evalEvery: 2, steps: 4, lr: 1e-3, abort }
  const { said, evaluations, result } = await run('pretrain', 'unsaved', o)
  expect(said).toEqual([expect.stringMatching(/best: the model of step 1 was not saved: .*; training goes on/)])
  expect(evaluations.map((e) => e.best)).toEqual([false, true])
  expect(result.best?.step).toBe(3)
})

test('what it shows: samples with their pictures, and what the model says to them', async () => {
  const { evaluations } = await run('finetune', 'shown', { evalData: files.finetune, steps: 2 })
  const samples = JSON.parse(fs.readFileSync(path.join(scratch, 'shown/samples.json'), 'utf8'))
  expect(samples.map((s: { id: string }) => s.id)).toEqual(['a-ft-0', 'a-ft-1', 'a-ft-2', 'a-ft-3'])
  expect(samples[3]).toMatchObject({ task: 'yes/no', question: 'Are there stripes?', expected: 'Yes.' })
  expect(samples[3].picture).toMatch(/^data:image\/webp;base64,/)
  expect(samples[2].picture).toBeNull()
  const model = await AlignGPT.load(path.join(scratch, 'shown'))
  const image = path.join(images, 'a05.png')
  const [alone] = await generateBatch(model, [{ prompt: 'Are there stripes?', image }], { maxNewTokens: 32 })
  expect(evaluations[evaluations.length - 1].answers[3]).toEqual({ id: 'a-ft-3', text: alone.text })
  model.dispose()
})

test('what it shows in pre-training sees pictures as that phase does, without padding', async () => {
  const { evaluations } = await run('pretrain', 'unpadded', { evalData: files.pretrain, steps: 2, lr: 1e-2 })
  const model = await AlignGPT.load(path.join(scratch, 'unpadded'))
  const shown = JSON.parse(fs.readFileSync(path.join(scratch, 'unpadded/samples.json'), 'utf8')) as { id: string }[]
  const records = JSON.parse(fs.readFileSync(files.pretrain, 'utf8')) as DataRecord[]
  const ask = async (pad: boolean): Promise<{ id: string; text: string }[]> => {
    const answers: { id: string; text: string }[] = []
    for (const { id } of shown) {
      const { image, similarity } = records.find((r) => r.id === id) as DataRecord
      const mix = { mode: 'level', level: similarity ?? 0 } as const
      const o = { style: 'plain', pad, mix, maxNewTokens: 32, stop: ['\n'] } as const
      const [{ text }] = await generateBatch(model, [{ prompt: '', image: path.join(images, image as string) }], o)
      answers.push({ id, text })
    }
    return answers
  }
  const [plain, padded] = [await ask(false), await ask(true)]
  model.dispose()
  expect(evaluations[evaluations.length - 1].answers).toEqual(plain)
  expect(padded).not.toEqual(plain)
})

/** `aligngpt pretrain` on the small model; `watch` sees what it prints. */
function command(out: string, args: string[], watch: (text: string, kill: () => void) => void = () => {}) {
  const from = ['--llm', `${base}/model/llm`, '--clip', `${base}/model/clip`, '--images', images, '--out', out]
  const cli = ['--import', 'tsx', 'ts/src/cli.ts', 'pretrain', '--data', files.pretrain, '--batch', '4']
  const cwd = fileURLToPath(new URL('../../', import.meta.url))
  return new Promise<{ status: number | null; text: string }>((resolve) => {
    const child = spawn(process.execPath, [...cli, ...from, ...args], { cwd })
    let text = ''
    for (const stream of [child.stdout, child.stderr])
      stream.on('data', (d) => {
        text += d
        watch(text, () => child.kill('SIGINT'))
      })
    child.on('close', (status) => resolve({ status, text }))
  })
}

test('the command says what came out, and hears a signal in the middle of an evaluation', async () => {
  const raw = rawRecords(files.pretrain)
  const many = write('very many.json', Array.from({ length: 1000 }, () => raw).flat()) // it would take a quarter of a minute
  let [sent, ended] = [0, 0]
  const [whole, stopped] = await Promise.all([
    command(path.join(scratch, 'command'), ['--steps', '4', '--eval-share', '0.3', '--eval-every', '2']),
    command(
      path.join(scratch, 'stopped'),
      ['--steps', '4', '--micro-batch', '1', '--eval-data', many, '--eval-images', images, '--eval-every', '2'],
      (text, kill) => {
        if (sent || !text.includes('step 2/4')) return
        sent = performance.now()
        kill()
      },
    ).finally(() => {
      ended = performance.now()
    }),
  ])
  expect(whole.status).toBe(0)
  expect(whole.text).toMatch(/step 2: held-out loss \d\.\d{4}, the best so far\n/)
  expect(whole.text).toMatch(/lowest held-out loss \d\.\d{4} after step [24]: .*command\/best\n/)
  expect(stopped.status).toBe(130)
  expect(stopped.text).not.toContain('held-out loss')
  expect(ended - sent).toBeLessThan(3000)
  const { state } = verifyCheckpoint(path.join(scratch, 'stopped/checkpoints/step-2'))
  expect(state.evaluation).toMatchObject({ evaluated: 0, best: null })
})

test('options that do not go together are refused', async () => {
  for (const [o, message] of [
    [{ evalShare: 1 }, /evalShare: expected a number between 0 and 1, got 1/],
    [{ evalShare: 0.1, evalData: 'x' }, /evalData: expected none beside evalShare/],
    [{ evalEvery: 2 }, /evalEvery: expected evalShare or evalData beside it, got 2/],
    [{ evalShare: 0.1, evalEvery: 0 }, /evalEvery: expected an integer > 0, got 0/],
    [{ evalShare: 0.1, evalImages: 'x' }, /evalImages: expected evalData beside it/],
  ] as const)
    await expect(run('pretrain', 'refused', o)).rejects.toThrow(message)
})

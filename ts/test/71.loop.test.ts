/** The training loop on a model that is none of ours: a plane is fitted. */
import fs from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { backward, memory, nn, ops, type Parameter, scope, tensor } from '../src/entries/core.js'
import {
  type LoopHooks,
  type LoopOptions,
  type LoopStep,
  listCheckpoints,
  shuffled,
  train,
} from '../src/entries/train.js'
import { AdamW } from '../src/nn/adamw.js'
import { cosineRate } from '../src/nn/schedule.js'
import { AlignGPTError } from '../src/util/errors.js'
import { tempDir } from './data-cases.js'

const scratch = tempDir()
afterAll(() => fs.rmSync(scratch, { recursive: true }))

interface Point {
  x: number[]
  y: number[]
}
const points: Point[] = Array.from({ length: 100 }, (_, i) => {
  const [a, b] = [Math.sin(i), Math.cos(3 * i)]
  return { x: [a, b], y: [b, a + 2 * b] }
})

/** y = W x; a batch without points has no term of the loss. */
class Plane {
  readonly weight = nn.initialize('weight', [2, 2], { kind: 'normal', std: 0.1 }, 1, 'f32')
  readonly parameters: Parameter[] = [{ name: 'weight', tensor: this.weight }]
  passes = 0

  terms(batch: readonly Point[]): number {
    return batch.length
  }
  lossAndGradients(batch: readonly Point[], { denominator }: { denominator: number }) {
    this.passes++
    const of = (key: 'x' | 'y') => tensor(Float32Array.from(batch.flatMap((p) => p[key])), [batch.length, 2])
    const miss = ops.sub(ops.linear(of('x'), this.weight), of('y'))
    const squares = ops.mul(miss, miss)
    const loss = ops.scale(ops.sum(squares), 1 / denominator)
    backward(loss)
    return { loss, squares }
  }
}

const BATCH = 8
const order = shuffled(points.length, BATCH, 1)
const chosen = (step: number): Point[] => Array.from(order(step), (i) => points[i])
const batches = (step: number): Point[][] => [chosen(step)]
const quiet = { steps: 20, lr: 0.05, onMessage: () => {} }

/** A run of a fresh model: its losses and weights. */
async function run(o: Partial<LoopOptions> & Parameters<typeof train<Point[]>>[2] = quiet, from = batches) {
  const model = new Plane()
  try {
    const result = await train(model, from, { ...quiet, ...o })
    return { ...result, weights: [...model.weight.toFloats()], passes: model.passes }
  } finally {
    model.weight.dispose()
  }
}

test('is AdamW on the gradients, bit for bit: clipped, decayed, at the schedule’s rate', async () => {
  const model = new Plane()
  const before = memory().inUse
  const optimizer = new AdamW(model.parameters, { weightDecay: 0.1, beta2: 0.95 })
  const loss: number[] = []
  for (let step = 0; step < quiet.steps; step++) {
    loss.push(scope(() => model.lossAndGradients(chosen(step), { denominator: BATCH }).loss.item()))
    optimizer.update(cosineRate(step, { lr: 0.05, totalSteps: quiet.steps, warmupRatio: 0.05 }), 0.5)
  }
  optimizer.dispose()
  const got = await run({ ...quiet, weightDecay: 0.1, beta2: 0.95, warmupRatio: 0.05, clipGradNorm: 0.5 })
  expect(got.loss).toEqual(loss)
  expect(got.weights).toEqual([...model.weight.toFloats()])
  expect(got).toMatchObject({ steps: 20, resumed: 0, outliers: 0, aborted: false, settings: null })
  expect(memory().inUse).toBe(before)
  model.weight.dispose()
})

test('the order: each record once in an epoch, what does not fill a batch left out', () => {
  const perEpoch = Math.floor(points.length / BATCH)
  const epoch = (n: number) => Array.from({ length: perEpoch }, (_, i) => [...order(n * perEpoch + i)]).flat()
  for (const n of [0, 1]) expect(new Set(epoch(n)).size).toBe(perEpoch * BATCH)
  expect(epoch(1)).not.toEqual(epoch(0))
  expect(shuffled(points.length, BATCH, 1)(17)).toEqual(order(17)) // whatever was asked before
  expect(shuffled(3, 8)(5)).toHaveLength(3)
})

describe('micro-batches', () => {
  const cut = (step: number): Point[][] => {
    const all = chosen(step)
    return [all.slice(0, 5), [], all.slice(5)]
  }
  test('add up to the step; those without a term are not run', async () => {
    const [whole, parts] = [await run(), await run(quiet, cut)]
    expect(parts.passes).toBe(2 * quiet.steps)
    for (const [i, w] of whole.weights.entries()) expect(parts.weights[i]).toBeCloseTo(w, 5)
  })
  test('lossNorm micro: the mean of their means', async () => {
    const got = await run({ ...quiet, lossNorm: 'micro', steps: 1 }, cut)
    const mean = async (part: number) => (await run({ ...quiet, steps: 1 }, (s) => [cut(s)[part]])).loss[0]
    expect(got.loss[0]).toBeCloseTo(((await mean(0)) + (await mean(2))) / 2, 6)
  })
})

describe('a run in a folder', () => {
  const lines = (out: string) =>
    fs
      .readFileSync(path.join(out, 'log.jsonl'), 'utf8')
      .trim()
      .split('\n')
      .map((l) => ({ ...JSON.parse(l), time: 0 }))

  /** Stops after so many steps; counts what it has seen, and remembers it. */
  async function part(out: string, stopAt?: number, more: Partial<LoopOptions> = {}) {
    const controller = new AbortController()
    let seen = 0
    const hooks: LoopHooks<Point[], ReturnType<Plane['lossAndGradients']>, { seen: number; most: number }, unknown> = {
      info: ({ batches, results }) => {
        seen += batches[0].length
        return { seen, most: Math.max(...results[0].squares.toFloats()) }
      },
      settings: () => ({ points: points.length }),
      state: () => ({ seen }),
      restore: (state) => {
        seen = state.seen as number
      },
    }
    const model = new Plane()
    const result = await train<Point[], ReturnType<Plane['lossAndGradients']>, { seen: number; most: number }>(
      model,
      batches,
      {
        ...{ ...quiet, ...hooks, out, name: 'plane', resume: true, saveEvery: 4, signal: controller.signal, ...more },
        onStep: (s) => void (s.step + 1 === stopAt && controller.abort()),
      },
    )
    const weights = [...model.weight.toFloats()]
    model.weight.dispose()
    return { result, weights, log: lines(out) }
  }

  test('stopped and continued it has the bits of one that was not', async () => {
    const before = memory().inUse
    const whole = await part(path.join(scratch, 'whole'))
    const out = path.join(scratch, 'parts')
    expect((await part(out, 6)).result).toMatchObject({ steps: 6, aborted: true })
    expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([6, 4])
    fs.rmSync(path.join(out, 'checkpoints/step-6'), { recursive: true }) // killed: the log knows more
    const last = await part(out)
    expect(last.result).toMatchObject({ steps: 20, resumed: 4, settings: { lr: 0.05, points: 100 } })
    expect(last.weights).toEqual(whole.weights)
    expect(last.log).toEqual(whole.log)
    expect(last.log[19]).toMatchObject({ phase: 'plane', step: 19, steps: 20, seen: 160, most: expect.any(Number) })
    expect(memory().inUse).toBe(before)
  })
  test('with other settings it is not continued', async () => {
    const out = path.join(scratch, 'other')
    await part(out, 5)
    await expect(part(out, 5, { lr: 0.1 })).rejects.toThrow(/expected lr 0.05, got lr 0.1/)
    await expect(part(out, 5, { resume: false })).rejects.toThrow(/a folder without checkpoints, or resume/)
  })
})

test('an evaluation between the steps, told to every sink and never twice', async () => {
  const heard: unknown[] = []
  let evaluated = 0
  const sink = (name: string) => ({
    step: (s: LoopStep) => void heard.push([name, s.step]),
    evaluation: (e: unknown) => void heard.push([name, e]),
    end: () => void heard.push([name, 'end']),
  })
  await run({
    ...quiet,
    steps: 3,
    sinks: (start) => [sink(`a${start}`), sink('b')],
    onEvaluation: (e) => void heard.push(e),
    evaluation: {
      get evaluated() {
        return evaluated
      },
      due: (done) => done > evaluated && done % 2 === 0,
      async evaluate(done) {
        if (!this.due(done)) return null
        evaluated = done
        return { done }
      },
    },
  })
  const both = (x: unknown): unknown[] => [['a0', x], ['b', x]] // biome-ignore format: one line
  const first = [...both(0), ...both(1), ...both({ done: 2 }), { done: 2 }]
  expect(heard).toEqual([...first, ...both(2), ...both('end')])
})

describe('what goes wrong', () => {
  test('a loss that is no number: weights as they were, the micro-batch named, the step left to look at', async () => {
    const out = path.join(scratch, 'nan')
    const broken = (step: number): Point[][] =>
      step < 3 ? batches(step) : [chosen(step), [{ x: [Number.NaN, 0], y: [0, 0] }]]
    const describe_ = (named: readonly Point[][]): string => `${named.length} of ${named.map((b) => b.length)}`
    const error = await run({ ...quiet, out, saveEvery: null, describe: describe_ }, broken).catch((e) => e)
    expect(error.code).toBe('ERR_NOT_FINITE')
    expect(error.message).toMatch(/weights unchanged, records of the step: 1 of 1; to look at: .*step-3/)
    const step = JSON.parse(fs.readFileSync(path.join(out, 'dumps/step-3/step.json'), 'utf8'))
    expect(step).toMatchObject({ step: 3, loss: 'NaN', parameters: [{ name: 'weight', gradient: { notFinite: 4 } }] })
  })
  // saveEvery null: the only checkpoint there can be is the one of the error.
  const ends: [string, Partial<Parameters<typeof train<Point[]>>[2]>, (step: number) => Point[][]][] = [
    ['the loader', {}, (step) => (step < 3 ? batches(step) : fail())],
    ['a callback', { onStep: ({ step }) => void (step === 2 && fail()) }, batches],
    ['a sink', { sinks: () => [{ step: ({ step }) => void (step === 2 && fail()), end: () => {} }] }, batches],
  ]
  const fail = (): never => {
    throw new AlignGPTError('ERR_DATA', '[user] it: expected no error, got one')
  }
  for (const [name, more, from] of ends)
    test(`an error of ${name} leaves a checkpoint that continues bit for bit`, async () => {
      const out = path.join(scratch, name)
      const error = await run({ ...quiet, ...more, out, saveEvery: null }, from).catch((e) => e)
      expect(error).toMatchObject({ code: 'ERR_DATA' })
      expect(error.message).toMatch(/got one; the 3 steps before it are saved in .*step-3 \(resume\)$/)
      expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([3])
      const last = await run({ ...quiet, out, saveEvery: null, resume: true })
      expect(last.resumed).toBe(3)
      expect(last.weights).toEqual((await run()).weights)
    })
  test('a final save that fails leaves a checkpoint; with resume it is all there is to do', async () => {
    const out = path.join(scratch, 'finish')
    const error = await run({ ...quiet, out, saveEvery: null, finish: fail }).catch((e) => e)
    expect(error.message).toMatch(/got one; the 20 steps before it are saved in .*step-20 \(resume\)$/)
    let finished = 0
    const last = await run({ ...quiet, out, saveEvery: null, resume: true, finish: () => void finished++ })
    expect({ finished, passes: last.passes, resumed: last.resumed }).toEqual({ finished: 1, passes: 0, resumed: 20 })
    expect(last.weights).toEqual((await run()).weights)
  })
  test('an error that is not of this package comes as it is; the checkpoint is told', async () => {
    const out = path.join(scratch, 'foreign')
    const said: string[] = []
    const cause = new TypeError('x is not a function')
    const onStep = (): never => {
      throw cause
    }
    const o = { ...quiet, out, saveEvery: null, onStep, onMessage: (text: string) => void said.push(text) }
    await expect(run(o)).rejects.toBe(cause)
    expect(said).toEqual([expect.stringMatching(/an error ends the run; the 1 steps before it are saved in .*step-1/)])
  })
  test('an error before the first step leaves no checkpoint', async () => {
    const out = path.join(scratch, 'first')
    const error = await run({ ...quiet, out, saveEvery: null }, () => fail()).catch((e) => e)
    expect(error.message).toMatch(/got one$/)
    expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([])
  })
  test('no memory: the caller says what could be done', async () => {
    const model = new Plane()
    const full = { ...model, parameters: model.parameters, lossAndGradients: () => refuse() }
    const refuse = (): never => {
      throw new AlignGPTError('ERR_MEMORY', 'none left')
    }
    const outOfMemory = (cause: Error, where: string, b: readonly Point[][]): AlignGPTError =>
      new AlignGPTError('ERR_MEMORY', `${cause.message} ${where}, ${b[0].length} points`)
    await expect(train(full, batches, { ...quiet, outOfMemory })).rejects.toThrow('none left in step 1, 8 points')
    await expect(train(full, batches, quiet)).rejects.toThrow('none left')
    model.weight.dispose()
  })
  test('options that cannot be', async () => {
    await expect(run({ ...quiet, steps: 0 })).rejects.toThrow('[train] steps: expected an integer > 0, got 0')
    await expect(run({ ...quiet, lr: -1 })).rejects.toThrow('[train] lr: expected a number from 0 to 1, got -1')
    await expect(run({ ...quiet, keep: 1 })).rejects.toThrow('[train] keep: expected an integer >= 2, got 1')
  })
})

test('the example of its documentation does what it says', async () => {
  const source = fs.readFileSync(new URL('../src/train/loop.ts', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?) \* ```/.exec(source)?.[1].replace(/^ \* ?/gm, '') ?? ''
  expect(code.trim().split('\n').length).toBeLessThanOrEqual(30)
  const url = (entry: string): string => new URL(`../src/entries/${entry}.ts`, import.meta.url).href
  const file = path.join(scratch, 'example.mjs')
  const local = code.replace(/'aligngpt\/(\w+)'/g, (_, entry) => `'${url(entry)}'`)
  const out = path.join(scratch, 'plane')
  fs.writeFileSync(file, `${local.replace("'runs/plane'", JSON.stringify(out))}\nexport { weight }\n`)
  const { weight } = await import(/* @vite-ignore */ pathToFileURL(file).href)
  const expected = [0, 1, 1, 2]
  for (const [i, w] of [...weight.toFloats()].entries()) expect(w).toBeCloseTo(expected[i], 2)
  expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([150, 100])
  weight.dispose()
})

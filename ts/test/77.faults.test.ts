/** A disk that fails while a checkpoint is saved: at every single call, for good, and for real. */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { native } from '../src/core/native.js'
import { memory, tensor } from '../src/core/tensor.js'
import { loadDataset } from '../src/data/dataset.js'
import type { StateTensor } from '../src/nn/adamw.js'
import { findCheckpoint, listCheckpoints, verifyCheckpoint, writeCheckpoint } from '../src/train/checkpoint.js'
import { Saver } from '../src/train/saver.js'
import { pretrain, type TrainOptions } from '../src/train/trainer.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'faults test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
afterEach(() => native.failFiles(-1, 1, false))

const weights = tensor([1, 2, 3, 4, 5]).persist()
afterAll(() => weights.dispose())
const save = (folder: string, step: number): void => {
  const t = { dtype: 'F32' as const, shape: [5], handle: weights.h }
  const tensors = [
    { ...t, file: 'weights' as const, name: 'w' },
    { ...t, file: 'optimizer' as const, name: 'm' },
  ]
  writeCheckpoint(folder, { step, config: {}, state: {}, maker: { version: '', build: '', level: '' } }, tensors, 2)
}
/** Calls to the file system of a save that replaces and removes older ones. */
function callsOfSave(): number {
  const folder = path.join(scratch, 'count')
  for (const step of [1, 2]) save(folder, step)
  const before = native.fileCalls()
  save(folder, 3)
  return native.fileCalls() - before
}

for (const [name, count] of [
  ['once', 1],
  ['from then on', 1e9],
] as const)
  test(`every call of a save fails ${name}: the checkpoints that were there stay whole`, () => {
    const calls = callsOfSave()
    expect(calls).toBeGreaterThan(40)
    const open = fs.readdirSync('/proc/self/fd').length
    for (let k = 0; k < calls; k++) {
      const folder = path.join(scratch, `${name} ${k}`)
      for (const step of [1, 2]) save(folder, step)
      native.failFiles(k, count, false)
      expect(() => save(folder, 3), `call ${k}`).toThrow(/test hook/)
      native.failFiles(-1, 1, false)
      const left = listCheckpoints(folder)
      expect(left.length).toBeGreaterThanOrEqual(2)
      for (const step of left) expect(verifyCheckpoint(path.join(folder, `step-${step}`)).step).toBe(step)
      expect(fs.readdirSync(folder)).not.toContain('step-3.tmp')
      for (const step of [3, 4]) save(folder, step) // the disk is well again
      expect(findCheckpoint(folder, (text) => expect(text).toBeNull())?.manifest.step).toBe(4)
      fs.rmSync(folder, { recursive: true })
    }
    expect(fs.readdirSync('/proc/self/fd').length).toBe(open)
  })

async function train(out: string, o: TrainOptions, said: string[] = []) {
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'))
  const data = await loadDataset(path.join(base, 'data_phase1.json'), { images: path.join(base, 'images') })
  try {
    return await pretrain(model, data, {
      batch: 2,
      workers: 0,
      progress: false,
      allowLongInterval: true,
      onMessage: (text) => said.push(text),
      ...o,
      out,
    })
  } finally {
    model.dispose()
  }
}
const weightsOf = (out: string): Buffer => fs.readFileSync(path.join(out, 'model.safetensors'))

test('every call of a save from a snapshot fails in turn: it is told, the next one succeeds, nothing is left in memory', async () => {
  const before = memory().inUse
  const said: string[] = []
  const saver = new Saver(path.join(scratch, 'saver'), 2, (text) => said.push(text))
  const one = async (step: number): Promise<number> => {
    const from = native.fileCalls()
    const tensors: StateTensor[] = [{ file: 'weights', name: 'w', tensor: weights }]
    const maker = { version: '', build: '', level: '' }
    await saver.save({ step, config: {}, state: {}, maker }, tensors)
    await saver.settled()
    return native.fileCalls() - from
  }
  for (const step of [1, 2]) await one(step)
  const calls = await one(3)
  expect(calls).toBeGreaterThan(35)
  for (let k = 0; k < calls; k++) {
    native.failFiles(k, 1, false)
    await one(4 + 2 * k)
    expect(said).toHaveLength(k + 1)
    expect(said[k]).toMatch(/step-\d+ was not saved \(1 in a row\): .*test hook.*training goes on/)
    await one(5 + 2 * k)
    expect(saver.last).toBe(5 + 2 * k)
    expect(said).toHaveLength(k + 1)
  }
  await saver.close()
  expect(memory().inUse).toBe(before)
})

test('training goes on while calls of its saves fail, and its numbers do not change', async () => {
  const before = memory().inUse
  const out = path.join(scratch, 'training')
  const steps = 300
  await train(path.join(scratch, 'undisturbed'), { steps, saveEvery: null })
  const said: string[] = []
  const onStep = ({ step }: { step: number }): void => {
    if (step % 6 === 0) native.failFiles(step / 2, 1, false) // far apart: three in a row would end the run
  }
  const result = await train(out, { steps, saveEvery: 1, onStep }, said)
  expect(result.steps).toBe(steps)
  expect(said.length).toBeGreaterThan(30)
  for (const text of said) expect(text).toMatch(/was not saved \(\d in a row\): .*test hook.*training goes on/)
  expect(weightsOf(out).equals(weightsOf(path.join(scratch, 'undisturbed')))).toBe(true)
  const folder = path.join(out, 'checkpoints')
  const left = listCheckpoints(folder)
  expect(left.length).toBeGreaterThanOrEqual(2)
  for (const step of left) verifyCheckpoint(path.join(folder, `step-${step}`))
  expect(memory().inUse).toBe(before)
})

test('three failed saves in a row end the run and name the last good checkpoint', async () => {
  /** Calls of a run of three steps, from its first one on. */
  const calls = async (saveEvery: number | null): Promise<number> => {
    let from = 0
    const onStep = ({ step }: { step: number }): void => {
      if (step === 0) from = native.fileCalls()
    }
    await train(path.join(scratch, `calls ${saveEvery}`), { steps: 3, saveEvery, onStep })
    return native.fileCalls() - from
  }
  const oneSave = (await calls(2)) - (await calls(null))
  const out = path.join(scratch, 'three')
  const said: string[] = []
  let steps = 0
  const onStep = ({ step }: { step: number }): void => {
    steps = step + 1
    if (step === 0) native.failFiles(oneSave, 1e9, false)
  }
  const error = await train(out, { steps: 12, saveEvery: 2, onStep }, said).catch((e) => e)
  native.failFiles(-1, 1, false)
  expect(error).toMatchObject({ code: 'ERR_SAVE' })
  expect(error.message).toMatch(/got 3 failures in a row: .*test hook.*; the last good one is .*step-2/)
  expect(said.map((t) => /step-\d+ was not saved \(\d/.exec(t)?.[0])).toEqual([
    'step-4 was not saved (1',
    'step-6 was not saved (2',
    'step-8 was not saved (3',
  ])
  expect(steps).toBeLessThanOrEqual(10)
  const whole = path.join(scratch, 'three whole')
  await train(whole, { steps: 12, saveEvery: null })
  expect((await train(out, { steps: 12, resume: true })).resumed).toBe(2)
  expect(weightsOf(out).equals(weightsOf(whole))).toBe(true)
})

test('a folder that takes no files, and no memory for the snapshot', async () => {
  const out = path.join(scratch, 'no folder')
  fs.mkdirSync(out)
  fs.symlinkSync('/proc/nowhere', path.join(out, 'checkpoints'))
  const said: string[] = []
  await expect(train(out, { steps: 9, saveEvery: 2 }, said)).rejects.toThrow(
    /3 failures in a row: .*; nothing was saved/,
  )
  expect(said).toHaveLength(3)
  const room = path.join(scratch, 'no memory')
  const told: string[] = []
  // the first allocations after the fourth step are those of the snapshot
  const onStep = ({ step }: { step: number }): void => {
    if (step === 3) native.failAfter(1)
  }
  const result = await train(room, { steps: 6, saveEvery: 2, onStep }, told)
  expect(result.steps).toBe(6)
  expect(told).toEqual([expect.stringMatching(/step-4 was not saved .*allocation of .* failed/)])
})

test('a log that cannot be written does not stop the run, and is readable afterwards', async () => {
  const out = path.join(scratch, 'log')
  const log = path.join(out, 'log.jsonl')
  const said: string[] = []
  const onStep = ({ step }: { step: number }): void => {
    if (step === 1) {
      fs.renameSync(log, `${log}.away`)
      fs.mkdirSync(log)
    }
    if (step === 3) {
      fs.rmdirSync(log)
      fs.renameSync(`${log}.away`, log)
    }
  }
  expect((await train(out, { steps: 6, saveEvery: null, onStep }, said)).steps).toBe(6)
  expect(said).toEqual([expect.stringMatching(/log\.jsonl: EISDIR.*training goes on/)])
  const lines = fs.readFileSync(log, 'utf8').split('\n').filter(Boolean)
  expect(lines.map((l) => JSON.parse(l).step)).toEqual([0, 1, 4, 5])
})

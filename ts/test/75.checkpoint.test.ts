/** Checkpoints on disk: what is written is read back, damage is found, and another program can read the files. */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { memory, type Tensor, tensor, zeros } from '../src/core/tensor.js'
import { openSafetensors, readFloats } from '../src/formats/safetensors.js'
import type { StateTensor } from '../src/nn/adamw.js'
import {
  findCheckpoint,
  listCheckpoints,
  readCheckpoint,
  removeLeftovers,
  type StoredTensor,
  storedDtype,
  verifyCheckpoint,
  writeCheckpoint,
} from '../src/train/checkpoint.js'
import { Rng } from '../src/util/rng.js'

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'checkpoint test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const maker = { version: '0', build: 'b', level: 'c' }

const values = (n: number, from: number): Float32Array => Float32Array.from({ length: n }, (_, i) => Math.sin(i + from))
/** A state of every kind of tensor there is. */
function makeState(from: number): StateTensor[] {
  const low = zeros([7], 'bf16').persist()
  low.write(values(7, from))
  const entry = (file: StateTensor['file'], name: string, t: Tensor): StateTensor => ({
    file,
    name,
    tensor: t.persist(),
  })
  return [
    entry('weights', 'mm_projector.0.weight', tensor(values(24, from), [4, 6])),
    entry('weights', 'model.w', tensor(values(7, from), [7], 'bf16')),
    entry('optimizer', 'exp_avg.model.w', tensor(values(7, from + 1), [7])),
    entry('optimizer', 'exp_avg_sq.empty', zeros([0, 3])),
    { file: 'optimizer', name: 'master_low.model.w', tensor: low, stored: 'U16' },
  ]
}
const stored = (state: StateTensor[]): StoredTensor[] =>
  state.map((t) => ({ file: t.file, name: t.name, dtype: storedDtype(t), shape: t.tensor.shape, handle: t.tensor.h }))
const write = (folder: string, step: number, state: StateTensor[], keep = 2): void =>
  writeCheckpoint(folder, { step, config: { seed: 1 }, state: { x: 0.1 + step }, maker }, stored(state), keep)
const contents = (state: StateTensor[]): Float32Array[] => state.map((t) => t.tensor.toFloats() as Float32Array)
const dispose = (state: StateTensor[]): void => {
  for (const t of state) t.tensor.dispose()
}

test('what was written comes back, and the newest of several is taken', () => {
  const before = memory().inUse
  const folder = path.join(scratch, 'back')
  const states = [1, 2, 3].map(makeState)
  for (const [i, s] of states.entries()) write(folder, 10 * i, s)
  expect(listCheckpoints(folder)).toEqual([20, 10])
  const found = findCheckpoint(folder)
  expect(found?.manifest).toMatchObject({ format: 1, step: 20, config: { seed: 1 }, state: { x: 20.1 }, maker })
  const fresh = makeState(9)
  readCheckpoint(found?.folder as string, fresh)
  expect(contents(fresh)).toEqual(contents(states[2]))
  expect(contents(fresh)).not.toEqual(contents(states[1]))
  for (const s of [...states, fresh]) dispose(s)
  expect(memory().inUse).toBe(before)
})

test('the files are ordinary safetensors', () => {
  const folder = path.join(scratch, 'plain')
  const state = makeState(1)
  write(folder, 5, state)
  const { entries, metadata } = openSafetensors(path.join(folder, 'step-5/weights.safetensors'))
  expect(metadata).toEqual({ format: 'pt' })
  expect([...entries.values()].map((e) => [e.name, e.dtype, e.shape])).toEqual([
    ['mm_projector.0.weight', 'F32', [4, 6]],
    ['model.w', 'BF16', [7]],
  ])
  const w = entries.get('mm_projector.0.weight')
  expect(w && readFloats(w)).toEqual(values(24, 1))
  const low = openSafetensors(path.join(folder, 'step-5/optimizer.safetensors')).entries.get('master_low.model.w')
  expect(low).toMatchObject({ dtype: 'U16', shape: [7] })
  dispose(state)
})

test('tensors that do not fit are named', () => {
  const folder = path.join(scratch, 'fit')
  const state = makeState(1)
  write(folder, 1, state)
  const at = path.join(folder, 'step-1')
  const other: StateTensor[] = [{ file: 'weights', name: 'model.w', tensor: zeros([8], 'bf16').persist() }]
  expect(() => readCheckpoint(at, other)).toThrow(/model\.w: expected BF16 \[8\], got BF16 \[7\]/)
  expect(() => readCheckpoint(at, [{ ...other[0], name: 'model.x' }])).toThrow(
    /model\.x: expected BF16 \[8\], got none/,
  )
  dispose([...state, ...other])
})

test('what a killed save left is no checkpoint and is removed', () => {
  const folder = path.join(scratch, 'left')
  const state = makeState(1)
  write(folder, 3, state)
  for (const name of ['step-4.tmp', 'step-2.old.tmp'])
    fs.cpSync(path.join(folder, 'step-3'), path.join(folder, name), { recursive: true })
  expect(listCheckpoints(folder)).toEqual([3])
  removeLeftovers(folder)
  expect(fs.readdirSync(folder)).toEqual(['step-3'])
  write(folder, 3, state) // the same once more
  expect(verifyCheckpoint(path.join(folder, 'step-3')).step).toBe(3)
  dispose(state)
})

describe('damage', () => {
  const folder = path.join(scratch, 'damage')
  const newest = path.join(folder, 'step-20')
  let state: StateTensor[]
  beforeAll(() => {
    state = makeState(4)
    for (const step of [10, 20]) write(folder, step, state)
  })
  afterAll(() => dispose(state))

  /** Damages one file, expects the one before to be taken with a message, and mends it. */
  function caught(file: string, damage: (bytes: Buffer) => Buffer): void {
    const good = fs.readFileSync(file)
    fs.writeFileSync(file, damage(Buffer.from(good)))
    const said: string[] = []
    expect(findCheckpoint(folder, (text) => said.push(text))?.manifest.step).toBe(10)
    expect(said).toHaveLength(1)
    expect(said[0]).toMatch(/step-20.*trying the one before/)
    fs.writeFileSync(file, good)
  }

  // the full numbers: npm run crash
  test('160 flipped bits and 20 cuts, in every file, are found each time; 100 loads of whole ones raise no alarm', () => {
    const rng = new Rng(1)
    const files = fs.readdirSync(newest).map((f) => path.join(newest, f))
    expect(files).toHaveLength(3)
    for (let i = 0; i < 160; i++)
      caught(files[i % 3], (b) => {
        b[rng.int(b.length)] ^= 1 << rng.int(8)
        return b
      })
    for (let i = 0; i < 20; i++) caught(files[i % 3], (b) => b.subarray(0, rng.int(b.length)))
    for (let i = 0; i < 100; i++)
      expect(findCheckpoint(folder, (text) => expect(text).toBeNull())?.manifest.step).toBe(20)
  })

  test('missing files, foreign manifests, and nothing whole left', () => {
    for (const name of fs.readdirSync(newest)) {
      const file = path.join(newest, name)
      const good = fs.readFileSync(file)
      fs.rmSync(file)
      expect(() => verifyCheckpoint(newest)).toThrow(/step-20/)
      fs.writeFileSync(file, good)
    }
    const all = [10, 20].map((s) => path.join(folder, `step-${s}/manifest.json`))
    const texts = all.map((f) => fs.readFileSync(f))
    for (const wrong of ['null', '[]', '{}', '{"manifest":null}', '{"manifest":{"files":{}}}', '']) {
      for (const f of all) fs.writeFileSync(f, wrong)
      expect(() => findCheckpoint(folder)).toThrow(/expected a whole checkpoint, got 2 damaged ones/)
    }
    for (const [i, f] of all.entries()) fs.writeFileSync(f, texts[i])
    expect(findCheckpoint(folder)?.manifest.step).toBe(20)
    expect(findCheckpoint(path.join(scratch, 'nothing'))).toBeNull()
  })
})

test('tickets take a tensor to another owner once', () => {
  const t = tensor([1, 2, 3])
  const ticket = native.send(t.h)
  t.dispose()
  const h = native.receive(ticket)
  expect([...native.read(h)].map(Number)).toEqual([1, 2, 3])
  native.dispose(h)
  expect(() => native.receive(ticket)).toThrow(/ticket: expected one that was not used yet/)
})

/** The towers of the quickstart: the shipped ones are whole and small, and towers are made the same way twice. */
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { afterAll, expect, test } from 'vitest'
import { prepareData } from '../../scripts/quickstart/data.js'
import {
  different,
  SHIPPED,
  shippedMaking,
  TOWERS,
  type Tower,
  TowerMaker,
  takeShipped,
} from '../../scripts/quickstart/made.js'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import { createLanguageModel, loadClip } from '../src/models/load.js'
import { saveWeights } from '../src/models/save.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
const bytes = (file: string): Buffer => fs.readFileSync(file)

test('the shipped towers are those that made.json describes, and less than 8 MB', () => {
  const { files, isa, device } = shippedMaking()
  expect(device).toBe('cpu')
  expect(['avx512', 'avx512bf16', 'amx']).toContain(isa)
  let size = 0
  for (const [name, hash] of Object.entries(files)) {
    const content = bytes(path.join(SHIPPED, name))
    size += content.length
    expect(createHash('sha256').update(content).digest('hex'), name).toBe(hash)
  }
  expect(size).toBeLessThan(8e6)
  for (const t of TOWERS) {
    expect(fs.readdirSync(path.join(SHIPPED, t)).every((f) => `${t}/${f}` in files)).toBe(true)
    for (const e of openCheckpoint(path.join(SHIPPED, t)).values()) expect(e.dtype, `${t} ${e.name}`).toBe('BF16')
  }
})

test('towers that differ from the shipped ones in one byte are told apart', () => {
  const folder = path.join(dir, 'copy')
  takeShipped(folder)
  expect(different(folder)).toEqual([])
  const file = path.join(folder, 'llm', 'model.safetensors')
  const content = bytes(file)
  content[content.length - 1] ^= 1
  fs.writeFileSync(file, content)
  expect(different(folder)).toEqual(['llm/model.safetensors'])
  expect(different(folder, ['clip'])).toEqual([])
})

test('towers are made, learn, and are the same the second time', async () => {
  const data = await prepareData(path.join(dir, 'data'), { fast: true })
  const steps = { clip: 6, half: 3, llama: 8, batch: 16, versions: 2 }
  const curves: Record<string, number[]>[] = []
  for (const folder of ['a', 'b']) {
    const maker = new TowerMaker(data, path.join(dir, folder), steps, (n) => ({ steps: n }))
    const made: Record<string, number[]> = {}
    for (const t of ['clip', 'clip-half-1', 'llm'] as Tower[]) made[t] = await maker.make(t)
    curves.push(made)
  }
  expect(curves[1]).toEqual(curves[0])
  for (const t of ['clip', 'clip-half-1', 'llm']) {
    const [a, b] = ['a', 'b'].map((f) => path.join(dir, f, t, 'model.safetensors'))
    expect(bytes(a).equals(bytes(b)), t).toBe(true)
  }
  expect(curves[0].llm.at(-1)).toBeLessThan(curves[0].llm[0] - 0.5)
  expect([...openCheckpoint(path.join(dir, 'a', 'llm')).keys()]).not.toContain('lm_head.weight')
  loadClip(path.join(dir, 'a', 'clip-half-1')).dispose()
  expect(Tokenizer.load(path.join(dir, 'a', 'llm')).encode('is this a kite').length).toBeGreaterThan(0)
})

test('new weights come from the seed, and are saved in the dtype asked for', () => {
  const folder = path.join(dir, 'a', 'llm')
  const save = (name: string, seed: number, dtype?: 'bf16'): Map<string, { dtype: string }> => {
    const model = createLanguageModel(folder, { seed })
    fs.mkdirSync(path.join(dir, name))
    saveWeights(path.join(dir, name), model, dtype)
    model.dispose()
    return openCheckpoint(path.join(dir, name))
  }
  expect(new Set([...save('s1', 1).values()].map((e) => e.dtype))).toEqual(new Set(['F32']))
  expect(new Set([...save('s1-bf16', 1, 'bf16').values()].map((e) => e.dtype))).toEqual(new Set(['BF16']))
  save('s1-again', 1)
  save('s2', 2)
  const [one, again, two] = ['s1', 's1-again', 's2'].map((n) => bytes(path.join(dir, n, 'model.safetensors')))
  expect(one.equals(again)).toBe(true)
  expect(one.equals(two)).toBe(false)
})

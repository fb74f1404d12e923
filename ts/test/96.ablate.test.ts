/** The ablations: every variant runs, finished cells are kept and skipped, and the table says what the cells say. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { type Base, type Cell, describe, runCell, runCells, table, VARIANTS } from '../../scripts/ablate/cells.js'

const golden = fileURLToPath(new URL('golden/base/', import.meta.url))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'ablate test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const at = (...names: string[]): string => path.join(golden, ...names)
const records = JSON.parse(fs.readFileSync(at('data_phase1.json'), 'utf8')) as { similarity: number }[]
const question = {
  id: '1',
  image: 'a00.png',
  question: 'What is this?',
  answer: 'circle',
  options: ['circle', 'square'],
}
const base: Base = {
  model: { llm: at('model/llm'), clip: at('model/clip') },
  images: at('images'),
  pairs: at('data_phase1.json'),
  scores: records.map((_, i) => ((i * 7) % 14) ** 2),
  instructions: at('data_phase2.json'),
  questions: { choice: [question, { ...question, id: '2', image: 'a02.jpg', answer: 'square' }] },
}
const steps = { pretrain: 3, finetune: 3 } // the first one of each has a rate of 0

test('every variant runs, and twice gives the same', async () => {
  const variants = Object.fromEntries(VARIANTS.map((v) => [v.name, v]))
  expect(Object.keys(variants).length).toBe(VARIANTS.length)
  const cells: Cell[] = []
  for (const v of VARIANTS) {
    const cell = await runCell(base, v, 1, steps, scratch)
    expect(Object.keys(cell.accuracy)).toEqual([v.name, ...Object.keys(v.also ?? {})])
    for (const a of Object.values(cell.accuracy)) expect([0, 0.5, 1]).toContain(a.choice)
    expect(Number.isFinite(cell.loss.pretrain + cell.loss.finetune)).toBe(true)
    cells.push(cell)
  }
  const again = await runCell(base, variants['gate-linear'], 1, steps, scratch)
  expect({ ...again, seconds: 0 }).toEqual({ ...cells.find((c) => c.variant === 'gate-linear'), seconds: 0 })
  // each variant is another model: only what instruction tuning alone tells apart may agree in phase 1
  const loss = (name: string) => cells.find((c) => c.variant === name)?.loss as Cell['loss']
  expect(loss('local').pretrain).toBe(loss('adaptive').pretrain)
  const losses = VARIANTS.map((v) => loss(v.name).finetune)
  expect(new Set(losses).size).toBe(losses.length)
  const levels = (name: string): number[] =>
    JSON.parse(fs.readFileSync(path.join(scratch, name), 'utf8')).map((r: { similarity: number }) => r.similarity)
  const [usual, shuffled] = [levels('pairs-8-width.json'), levels('pairs-8-width-shuffled-1.json')]
  expect(shuffled).not.toEqual(usual)
  expect([...shuffled].sort()).toEqual([...usual].sort())
  expect(Math.max(...levels('pairs-10-width.json'))).toBe(9)
})

const made = (variant: string, seed: number, value: number): Cell => ({
  variant,
  seed,
  steps,
  accuracy: { [variant]: { a: value, b: value / 2 } },
  loss: { pretrain: 2, finetune: 1 },
  seconds: 1,
})

test('finished cells are skipped, a line cut short is run again, other settings do not count', async () => {
  const file = path.join(scratch, 'cells.jsonl')
  const variants = VARIANTS.slice(0, 2)
  const asked: string[] = []
  const run = async (v: { name: string }, seed: number): Promise<Cell> => {
    asked.push(`${v.name} ${seed}`)
    if (asked.length === 4) throw new Error('killed')
    return made(v.name, seed, seed / 10)
  }
  await expect(runCells(variants, [1, 2], steps, file, run)).rejects.toThrow('killed')
  expect(asked).toEqual(['adaptive 1', 'local 1', 'adaptive 2', 'local 2'])
  fs.writeFileSync(file, fs.readFileSync(file, 'utf8').trimEnd().slice(0, -20)) // the last line is cut
  asked.length = 0
  const cells = await runCells(variants, [1, 2], steps, file, run)
  expect(asked).toEqual(['adaptive 2', 'local 2'])
  expect(cells.map((c) => `${c.variant} ${c.seed}`)).toEqual(['adaptive 1', 'local 1', 'adaptive 2', 'local 2'])
  asked.length = 0
  expect(await runCells(variants, [1, 2], steps, file, run)).toEqual(cells)
  expect(asked).toEqual([])
  const longer = { ...steps, finetune: 4 }
  await runCells(variants, [1], longer, file, run)
  expect(asked).toEqual(['adaptive 1', 'local 1'])
})

test('mean and standard deviation', () => {
  expect(describe([0.5])).toBe('50.0')
  expect(describe([0.1, 0.2, 0.6])).toBe('30.0 ± 26.5')
  const cells = [made('adaptive', 1, 0.4), made('adaptive', 2, 0.6), made('none', 1, 0.2)]
  expect(table(cells)).toBe(`| variant | a, % | b, % | mean of the tests | loss | seeds |
| --- | --- | --- | --- | --- | --- |
| adaptive | 50.0 ± 14.1 | 25.0 ± 7.1 | 37.5 ± 10.6 | 1.000 | 2 |
| none | 20.0 | 10.0 | 15.0 | 1.000 | 1 |`)
})

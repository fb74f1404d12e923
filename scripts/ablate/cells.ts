/** The paper's ablations as cells, variant by seed: how one is run, where results are kept, their table. */
import fs from 'node:fs'
import path from 'node:path'
import {
  AlignGPT,
  type AlignmentOptions,
  type CreateOptions,
  evaluate,
  finetune,
  loadDataset,
  type Mix,
  pretrain,
  type Question,
} from 'aligngpt'
import { permutation } from 'aligngpt/core'
import { type Buckets, bucketLevels, writeLevels } from 'aligngpt/data'
import { PHASE_1, PHASE_2 } from '../quickstart/settings.js'

/** What stays the same in all cells: the two towers, the data, the test. */
export interface Base {
  model: Pick<CreateOptions, 'llm' | 'clip' | 'selectLayer' | 'selectFeature'>
  images: string
  /** image-text pairs, and the score of each */
  pairs: string
  scores: readonly number[]
  instructions: string
  questions: Record<string, readonly Question[]>
}

export interface Variant extends AlignmentOptions {
  name: string
  /** N, the paper's 8 by default */
  levels?: number
  buckets?: Buckets
  /** each pair has the level of another one */
  shuffled?: boolean
  /** the trained model is also tested in these ways, each a row of its own */
  also?: Record<string, Mix>
}

const level = (k: number): Mix => ({ mode: 'level', level: k })

/** One thing at a time is changed in the first; the last two are the controls. */
export const VARIANTS: readonly Variant[] = [
  {
    name: 'adaptive',
    also: { 'level 0 at inference': level(0), 'level 3 at inference': level(3), 'level 7 at inference': level(7) },
  },
  { name: 'local', alignment: 'local' },
  { name: 'global', alignment: 'global' },
  { name: 'average', alignment: 'average' },
  { name: 'random', alignment: 'random' },
  { name: 'levels-4', levels: 4 },
  { name: 'levels-6', levels: 6 },
  { name: 'levels-10', levels: 10 },
  { name: 'quantile', buckets: 'quantile' },
  { name: 'gate-instruction', gateText: 'instruction' },
  { name: 'gate-linear', gate: 'linear' },
  { name: 'none', alignment: 'none' },
  { name: 'shuffled', shuffled: true },
]

/** Steps of the two phases. */
export interface Steps {
  pretrain: number
  finetune: number
}

/** A finished cell, one line of the results file. */
export interface Cell {
  variant: string
  seed: number
  steps: Steps
  /** row of the table -> test -> accuracy */
  accuracy: Record<string, Record<string, number>>
  /** mean loss of the last tenth of each phase */
  loss: Record<keyof Steps, number>
  seconds: number
}

const mean = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0) / xs.length
const tail = (xs: readonly number[]): number => mean(xs.slice(-Math.ceil(xs.length / 10)))

/** The pairs with this variant's levels, in a file below `dir`. */
async function pairsOf(base: Base, v: Variant, seed: number, dir: string): Promise<string> {
  const { levels = 8, buckets = 'width' } = v
  const file = path.join(dir, `pairs-${levels}-${buckets}${v.shuffled ? `-shuffled-${seed}` : ''}.json`)
  const cut = bucketLevels([...base.scores], levels, buckets).levels
  const order = permutation(cut.length, seed, 0)
  const data = await loadDataset(base.pairs, { images: base.images })
  fs.mkdirSync(dir, { recursive: true })
  await writeLevels(data, v.shuffled ? Array.from(order, (i) => cut[i]) : cut, file)
  data.close()
  return file
}

/**
 * Both phases and the test of one variant. The seed is that of new weights and of the order of the data.
 * @throws the signal's reason when aborted
 */
export async function runCell(
  base: Base,
  v: Variant,
  seed: number,
  steps: Steps,
  dir: string,
  signal?: AbortSignal,
): Promise<Cell> {
  const began = performance.now()
  const { alignment, gate, gateText, levels = 8 } = v
  const model = await AlignGPT.create({ ...base.model, alignment, gate, gateText, levels }, { seed })
  const pairs = await loadDataset(await pairsOf(base, v, seed, dir), { images: base.images })
  const instructions = await loadDataset(base.instructions, { images: base.images })
  try {
    const first = await pretrain(model, pairs, { ...PHASE_1, steps: steps.pretrain, seed, signal })
    signal?.throwIfAborted()
    const second = await finetune(model, instructions, { ...PHASE_2, steps: steps.finetune, seed, signal })
    signal?.throwIfAborted()
    const accuracy: Cell['accuracy'] = {}
    for (const [row, mix] of Object.entries({ [v.name]: model.mix, ...v.also })) {
      accuracy[row] = {}
      for (const [test, questions] of Object.entries(base.questions)) {
        const options = { images: base.images, batch: 32, blind: false, mix, signal }
        accuracy[row][test] = (await evaluate(model, questions, options)).accuracy
      }
    }
    const loss = { pretrain: tail(first.loss), finetune: tail(second.loss) }
    return { variant: v.name, seed, steps, accuracy, loss, seconds: (performance.now() - began) / 1000 }
  } finally {
    model.dispose()
    pairs.close()
    instructions.close()
  }
}

// ---- results ------------------------------------------------------------------------------------------------

/** Finished cells of a file with JSON lines; a line that a kill cut short is not one. */
export function readCells(file: string, steps: Steps): Cell[] {
  const lines = fs.existsSync(file) ? fs.readFileSync(file, 'utf8').split('\n') : []
  const cells = lines.flatMap((line): Cell[] => {
    try {
      return [JSON.parse(line)]
    } catch {
      return []
    }
  })
  return cells.filter((c) => c.steps.pretrain === steps.pretrain && c.steps.finetune === steps.finetune)
}

/** Runs the cells that are not in the file yet, seed by seed, and appends each as it is done. @returns all of them */
export async function runCells(
  variants: readonly Variant[],
  seeds: readonly number[],
  steps: Steps,
  file: string,
  run: (v: Variant, seed: number) => Promise<Cell>,
): Promise<Cell[]> {
  const wanted = seeds.flatMap((seed) => variants.map((v) => ({ v, seed })))
  const is = (c: Cell, v: Variant, seed: number): boolean => c.variant === v.name && c.seed === seed
  const done = readCells(file, steps)
  for (const { v, seed } of wanted) {
    if (done.some((c) => is(c, v, seed))) continue
    const cell = await run(v, seed)
    // on a line of its own even after one that was cut short
    fs.appendFileSync(file, `\n${JSON.stringify(cell)}\n`)
    done.push(cell)
  }
  return wanted.map(({ v, seed }) => done.find((c) => is(c, v, seed)) as Cell)
}

/** Mean and standard deviation (of a sample; none of a single value) in percent. */
export function describe(xs: readonly number[]): string {
  const m = mean(xs)
  const sd = Math.sqrt(xs.reduce((s, x) => s + (x - m) ** 2, 0) / (xs.length - 1))
  return `${(100 * m).toFixed(1)}${xs.length > 1 ? ` ± ${(100 * sd).toFixed(1)}` : ''}`
}

/** A markdown table: one row for each variant, and for each other way one was tested. */
export function table(cells: readonly Cell[]): string {
  const rows = [...new Set(cells.flatMap((c) => Object.keys(c.accuracy)))]
  const tests = Object.keys(Object.values(cells[0].accuracy)[0])
  const line = (columns: readonly string[]): string => `| ${columns.join(' | ')} |`
  const body = rows.map((row) => {
    const of = cells.filter((c) => c.accuracy[row])
    const accuracies = tests.map((t) => describe(of.map((c) => c.accuracy[row][t])))
    const all = describe(of.map((c) => mean(tests.map((t) => c.accuracy[row][t]))))
    const loss = mean(of.map((c) => c.loss.finetune)).toFixed(3)
    return line([row, ...accuracies, all, loss, String(of.length)])
  })
  const head = ['variant', ...tests.map((t) => `${t}, %`), 'mean of the tests', 'loss', 'seeds']
  return [line(head), line(head.map(() => '---')), ...body].join('\n')
}

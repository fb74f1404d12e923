/**
 * Pre-training steps (phase 1) of a model with the shapes of LLaVA-1.5-7B and random bf16 weights: Vicuna-7B, ViT-L/14-336.
 *
 *   tsx scripts/cuda/step.ts [--layers 32] [--batch 16] [--text 64] [--steps 5] [--keep-activations] [--small]
 *
 * --small: the same on a model of 4 MB, to see that it runs. Prints a JSON line: milliseconds of the fastest step, rows and
 * floating point operations a second, the loss of each step and the most memory that was in use. Operations are those of the weights of the
 * language model, 2 on the way there and 2 on the way back (they are frozen), and 2 of CLIP; what runs again does not count.
 */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { Command } from 'commander'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { integer } from '../../ts/src/cli/options.js'
import { complain } from '../../ts/src/cli/output.js'
import { resolveDevice } from '../../ts/src/core/device.js'
import { native } from '../../ts/src/core/native.js'
import { memory } from '../../ts/src/core/tensor.js'
import { LEVELS, type Size, TrainStep, writeParts } from '../bench/model.js'

const SIZE: Size = {
  hidden: 4096,
  inter: 11008,
  layers: 32,
  heads: 32,
  vocab: 32000,
  image: 336,
  patch: 14,
  vision: { hidden: 1024, inter: 4096, layers: 24, heads: 16 },
}
const SMALL: Size = {
  ...{ hidden: 128, inter: 344, layers: 2, heads: 2, vocab: 1000, image: 56, patch: 14 },
  vision: { hidden: 64, inter: 256, layers: 2, heads: 2 },
}

interface Options {
  layers?: number
  batch: number
  text: number
  steps: number
  keepActivations?: boolean
  small?: boolean
}

/** Operations of a step, of the weights alone. */
function operations(s: Size, rows: number, images: number): number {
  const layer = 4 * s.hidden ** 2 + 3 * s.hidden * s.inter
  const { hidden, inter, layers } = s.vision
  const patches = (s.image / s.patch) ** 2 + 1
  return 4 * rows * s.layers * layer + 2 * images * patches * layers * (4 * hidden ** 2 + 2 * hidden * inter)
}

async function main(o: Options): Promise<void> {
  const size = { ...(o.small ? SMALL : SIZE) }
  if (o.layers) size.layers = o.layers
  const device = resolveDevice('auto', 'bf16')
  const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-step-'))
  try {
    const parts = writeParts(temp, 'model', size, { dtype: 'bf16', device })
    const model = await AlignGPT.create({ ...parts, levels: LEVELS }, { dtype: 'bf16', device, seed: 3 })
    const step = new TrainStep(model, 1, new Array<number>(o.batch).fill(o.text), !o.keepActivations)
    let best = Number.POSITIVE_INFINITY
    for (let i = 0; i < o.steps; i++) {
      const start = performance.now()
      step.run() // reads the loss, so the device has done everything before it; the update is in the next step's time
      best = Math.min(best, performance.now() - start)
    }
    const rows = step.batch.tokens.length
    const result = {
      row: `phase 1 step bf16, ${size.layers} layers of ${size.hidden}, batch ${o.batch}`,
      ms: best,
      rowsPerSecond: (rows / best) * 1e3,
      'TFLOP/s': operations(size, rows, o.batch) / best / 1e9,
      losses: step.losses,
      peakBytes: memory(device).peak,
      device: device === 'cuda' ? native.probeCuda() : native.capabilities(),
    }
    console.log(JSON.stringify(result))
    step.dispose()
    if (!step.losses.every(Number.isFinite)) throw new Error(`[step] losses: expected numbers, got ${step.losses}`)
  } finally {
    fs.rmSync(temp, { recursive: true, force: true })
  }
}

const command = new Command('cuda-step')
  .description('a pre-training step with the shapes of a 7B model and random weights')
  .option('--layers <n>', 'layers of the language model', integer)
  .option('--batch <n>', 'pictures with text', integer, 16)
  .option('--text <n>', 'words of each', integer, 64)
  .option('--steps <n>', 'steps', integer, 5)
  .option('--keep-activations', 'do not compute layers again on the way back')
  .option('--small', 'a tiny model, to see that it runs')
try {
  await main(command.parse().opts())
} catch (e) {
  complain(e)
  process.exitCode = 1
}

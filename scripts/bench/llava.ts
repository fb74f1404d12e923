/**
 * Checkpoints here and in transformers: a LLaVA made there is imported from every layout it is saved in, ours are exported and
 * loaded there, and the logits of the same picture and tokens are compared.
 *
 *   npm run check:llava -- --python PATH
 *
 * PATH is a Python with torch, transformers, safetensors and Pillow. Ends with status 1 when the two do not agree.
 */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command } from 'commander'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { complain } from '../../ts/src/cli/output.js'
import { exportModel } from '../../ts/src/convert/export.js'
import { importModel } from '../../ts/src/convert/import.js'
import { matmul } from '../../ts/src/core/ops.js'
import { noGrad, scope } from '../../ts/src/core/tensor.js'
import { openSafetensors, readFloats, writeSafetensors } from '../../ts/src/formats/safetensors.js'
import { packBatch } from '../../ts/src/models/packed-batch.js'
import { Rng } from '../../ts/src/util/rng.js'

/** Largest error of a logit, of the largest logit: some roundings of f32. */
const TOLERANCE = 4e-6
/** -200 is the picture */
const IDS = [1, 17, 402, -200, 33, 260, 5, 118, 349, 7]

const golden = fileURLToPath(new URL('../../ts/test/golden/', import.meta.url))
const script = fileURLToPath(new URL('llava_check.py', import.meta.url))

/** Pixels of a picture of side S, written for the other side too. */
function makePixels(dir: string, side: number): Float32Array {
  const rng = new Rng(side)
  const pixels = Float32Array.from({ length: 3 * side * side }, () => 4 * rng.next() - 2)
  const data = new Uint8Array(pixels.buffer)
  writeSafetensors(path.join(dir, 'pixels.safetensors'), [
    { name: 'pixels', dtype: 'F32', shape: [1, 3, side, side], data },
  ])
  return pixels
}

/** Logits [T, V] of the picture and the tokens, without an alignment vector. */
function logits(model: AlignGPT, pixels: Float32Array): Float32Array {
  const ids = Int32Array.from(IDS)
  const none = new Int32Array(0)
  const sample = {
    ...{ id: 'check', text: '', ids, labels: ids.map(() => -100), gateIds: none, gateAnswer: new Uint8Array(0) },
    ...{ image: 'x', level: null, length: 0, fullLength: 0, skip: null },
  }
  const options = { align: false, size: model.imageSize, fill: (out: Float32Array) => out.set(pixels) }
  const batch = packBatch([sample], model.patches, options)
  return scope(() =>
    noGrad(() => {
      const { inputsEmbeds } = model.embed(batch, { mode: 'none' })
      const hidden = model.hidden(inputsEmbeds, model.packing(batch))
      return Float32Array.from(matmul(hidden, model.headWeight, false, true).toFloats())
    }),
  )
}

/** The other side's logits [T, V'], cut to our V tokens: it may have rows for tokens we have not. */
function theirs(dir: string, tokens: number): Float32Array {
  const e = openSafetensors(path.join(dir, 'logits.safetensors')).entries.get('logits')
  if (!e) throw new Error(`${dir}: expected logits, got none`)
  const [, columns] = e.shape
  return readFloats(e).filter((_, i) => i % columns < tokens)
}

/** Says how far two sides are from each other. @returns whether they agree */
function compare(what: string, ours: Float32Array, other: Float32Array): boolean {
  const top = other.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
  const error = ours.reduce((m, v, i) => Math.max(m, Math.abs(v - other[i])), 0) / top
  const agrees = ours.length === other.length && error <= TOLERANCE
  console.log(`${what}: largest error ${error.toExponential(1)} of the largest logit, ${agrees ? 'agrees' : 'MISSED'}`)
  return agrees
}

async function main(python: string): Promise<boolean> {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'llava check '))
  const peer = (command: string, folder: string): void => {
    const args = [script, command, folder, path.join(golden, 'base/model/llm'), JSON.stringify(IDS)]
    const { status } = spawnSync(python, args, { stdio: ['ignore', 'inherit', 'inherit'] })
    if (status !== 0) throw new Error(`${python} ${script} ${command}: expected status 0, got ${status}`)
  }
  const ours = async (folder: string, pixels: Float32Array) => {
    const model = await AlignGPT.load(folder)
    const result = { values: logits(model, pixels), tokens: model.config.llm.vocab_size, side: model.imageSize }
    model.dispose()
    return result
  }
  const results: boolean[] = []
  try {
    const pixels = makePixels(dir, 32)
    peer('make', dir)
    for (const layout of ['saved', 'sharded', 'memory', 'official']) {
      const to = path.join(dir, `our ${layout}`)
      await importModel(path.join(dir, layout), to, {
        clip: layout === 'official' ? path.join(dir, 'clip') : undefined,
      })
      const { values, tokens } = await ours(to, pixels)
      results.push(compare(`transformers' LLaVA (${layout}), imported`, values, theirs(dir, tokens)))
    }
    const back = { 'an imported LLaVA': path.join(dir, 'our saved') }
    const own = { 'an AlignGPT (base)': 'base', 'an AlignGPT (wide)': 'wide' }
    const folders = Object.entries(own).map(([what, c]) => [what, path.join(golden, c, 'model/aligngpt')])
    for (const [i, [what, from]] of [...Object.entries(back), ...folders].entries()) {
      const at = path.join(dir, `export ${i}`)
      await exportModel(from, path.join(at, 'hf'), { format: 'llava-hf', dropAlignment: true })
      const model = await AlignGPT.load(from)
      const seen = makePixels(at, model.imageSize)
      const values = logits(model, seen)
      const tokens = model.config.llm.vocab_size
      model.dispose()
      peer('load', at)
      results.push(compare(`${what}, exported and loaded by transformers`, values, theirs(at, tokens)))
    }
    return results.every(Boolean)
  } finally {
    fs.rmSync(dir, { recursive: true })
  }
}

try {
  const command = new Command('check:llava')
    .requiredOption('--python <path>', 'with torch, transformers, safetensors and Pillow')
    .parse()
  process.exitCode = (await main(command.opts().python)) ? 0 : 1
} catch (e) {
  complain(e)
  process.exitCode = 1
}

/**
 * Adapters here and in PEFT: ours are loaded by PEFT and PEFT's by us, and the logits of the same tokens are compared.
 *
 *   npm run check:peft -- --python PATH
 *
 * PATH is a Python with torch, transformers, peft and safetensors. Ends with status 1 when the two do not agree.
 */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command } from 'commander'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { complain } from '../../ts/src/cli/output.js'
import { embedding, matmul } from '../../ts/src/core/ops.js'
import { noGrad, scope, tensor } from '../../ts/src/core/tensor.js'
import { openSafetensors, readFloats } from '../../ts/src/formats/safetensors.js'
import { addLora, mergeLora } from '../../ts/src/models/adapters.js'
import { loadAdapter, saveAdapter } from '../../ts/src/models/peft.js'
import { Rng } from '../../ts/src/util/rng.js'

/** Largest error of a logit, of the largest logit: some roundings of f32. */
const TOLERANCE = 2e-6
const IDS = [1, 17, 402, 33, 260, 5, 118, 349, 7, 90, 511, 44]

/** Logits [T, V] of the tokens as a text of their own. */
function logits(model: AlignGPT): Float32Array {
  return scope(() =>
    noGrad(() => {
      const ids = Int32Array.from(IDS)
      const packing = model.packing({ offsets: Int32Array.from([0, ids.length]), positions: ids.map((_, i) => i) })
      const hidden = model.hidden(embedding(tensor(ids), model.language.embeddings), packing)
      return Float32Array.from(matmul(hidden, model.headWeight, false, true).toFloats())
    }),
  )
}

/** Says how far two sides are from each other. @returns whether they agree */
function compare(what: string, ours: Float32Array, theirs: Float32Array): boolean {
  const top = theirs.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
  const error = ours.reduce((m, v, i) => Math.max(m, Math.abs(v - theirs[i])), 0) / top
  const agrees = ours.length === theirs.length && error <= TOLERANCE
  console.log(`${what}: largest error ${error.toExponential(1)} of the largest logit, ${agrees ? 'agrees' : 'MISSED'}`)
  return agrees
}

async function main(python: string): Promise<boolean> {
  const golden = fileURLToPath(new URL('../../ts/test/golden/base/model/', import.meta.url))
  const [llm, clip] = ['llm', 'clip'].map((n) => path.join(golden, n))
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'peft check '))
  try {
    const load = (): Promise<AlignGPT> => AlignGPT.create({ llm, clip })
    const model = await load()
    const plain = logits(model)
    addLora(model, { rank: 4, alpha: 6 }, 1)
    const rng = new Rng(2)
    for (const [name, t] of model.namedParameters())
      if (name.includes('.lora_B.')) t.write(Float32Array.from({ length: t.numel }, () => rng.next() - 0.5))
    saveAdapter(model, path.join(dir, 'ours'))
    const ours = logits(model)
    mergeLora(model)
    const merged = logits(model)
    model.dispose()

    const script = fileURLToPath(new URL('peft_check.py', import.meta.url))
    const { status } = spawnSync(python, [script, llm, dir, JSON.stringify(IDS)], { stdio: 'inherit' })
    if (status !== 0) throw new Error(`${python} ${script}: expected status 0, got ${status}`)
    const { entries } = openSafetensors(path.join(dir, 'logits.safetensors'))
    const theirs = (name: string) => readFloats(entries.get(name) as NonNullable<ReturnType<typeof entries.get>>)
    const again = await load()
    loadAdapter(again, path.join(dir, 'theirs'))
    const results = [
      compare('without adapter', plain, theirs('plain')),
      compare('our adapter, loaded by PEFT', ours, theirs('ours')),
      compare('the same, merged here', merged, theirs('ours')),
      compare("PEFT's adapter, loaded here", logits(again), theirs('theirs')),
    ]
    again.dispose()
    return results.every(Boolean)
  } finally {
    fs.rmSync(dir, { recursive: true })
  }
}

try {
  const command = new Command('check:peft')
    .requiredOption('--python <path>', 'with torch, transformers and peft')
    .parse()
  process.exitCode = (await main(command.opts().python)) ? 0 : 1
} catch (e) {
  complain(e)
  process.exitCode = 1
}

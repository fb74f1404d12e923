/**
 * Numeric parity with PyTorch: runs every case folder of --cases as a user would (load, render, preprocess, train both
 * phases, answer, score) and compares all tensors and lists with what PyTorch gave, at the case's own tolerances.
 *
 *   npm run goldens -- --cases DIR [--dump OUT] [--only NAME]
 *
 * From expected.json only the recipe is read before comparing: batch ids, schedule, number of new tokens.
 */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { AlignGPT } from '../../ts/src/aligngpt.js'
import { gather, matmul } from '../../ts/src/core/ops.js'
import { noGrad, scope, type Tensor, tensor } from '../../ts/src/core/tensor.js'
import { loadDataset } from '../../ts/src/data/dataset.js'
import { openLoader } from '../../ts/src/data/loader.js'
import type { DataRecord } from '../../ts/src/formats/record-file.js'
import { type StoredDtype, type TensorToWrite, writeSafetensors } from '../../ts/src/formats/safetensors.js'
import { Decoding } from '../../ts/src/inference/engine.js'
import { loadPixels, packWithPixels } from '../../ts/src/inference/request.js'
import { bucketLevels } from '../../ts/src/levels/bucket.js'
import { clipScores } from '../../ts/src/levels/clip-scores.js'
import { loadClip } from '../../ts/src/models/load.js'
import type { PackedBatch } from '../../ts/src/models/packed-batch.js'
import { AdamW } from '../../ts/src/nn/adamw.js'
import { cosineRate } from '../../ts/src/nn/schedule.js'
import { decodeImage } from '../../ts/src/processing/image/decode.js'
import { preprocessImage } from '../../ts/src/processing/image/preprocess.js'
import { readPreprocessor } from '../../ts/src/processing/preprocessor-config.js'
import { buildPrompt, buildSample } from '../../ts/src/processing/sample.js'
import { Tokenizer } from '../../ts/src/processing/tokenizer.js'
import { FINETUNE, type Phase, PRETRAIN, phaseOf, trainable } from '../../ts/src/train/phases.js'
import {
  compareLists,
  compareTensors,
  type Expected,
  type PhaseExpected,
  type Row,
  type Tolerances,
  type Values,
} from './compare.js'

class Dump {
  readonly tensors = new Map<string, { shape: number[]; data: Values }>()
  put(name: string, data: Values, shape: readonly number[]): void {
    this.tensors.set(name, { data, shape: [...shape] })
  }
  tensor(name: string, t: Tensor, shape: readonly number[] = t.shape): void {
    this.put(name, t.toFloats() as Float32Array, shape)
  }
  write(file: string): void {
    const kind = (d: Values): StoredDtype =>
      d instanceof Float32Array ? 'F32' : d instanceof Int32Array ? 'I32' : 'U8'
    writeSafetensors(
      file,
      [...this.tensors].map(
        ([name, { shape, data }]): TensorToWrite => ({
          name,
          dtype: kind(data),
          shape,
          data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
        }),
      ),
    )
  }
}

const STEPS = 10
const LOGIT_ROWS = 32

/** Packed rows [T, w] -> padded [B, W, w], `fill` elsewhere. */
function padded<T extends Float32Array | Int32Array>(
  rows: T,
  offsets: Int32Array,
  width: number,
  fill: number,
): { data: T; shape: number[] } {
  const n = offsets.length - 1
  const longest = Math.max(...Array.from({ length: n }, (_, s) => offsets[s + 1] - offsets[s]))
  const data = (
    rows instanceof Int32Array ? new Int32Array(n * longest * width) : new Float32Array(n * longest * width)
  ) as T
  data.fill(fill)
  for (let s = 0; s < n; s++) data.set(rows.subarray(offsets[s] * width, offsets[s + 1] * width), s * longest * width)
  return { data, shape: width === 1 ? [n, longest] : [n, longest, width] }
}

/** Row t of the packed batch -> [sequence, position]. */
function places(b: PackedBatch, rows: Int32Array): Int32Array {
  const out = new Int32Array(rows.length * 2)
  for (const [i, t] of rows.entries()) {
    const s = b.offsets.findIndex((o, k) => t >= o && t < b.offsets[k + 1])
    out.set([s, t - b.offsets[s]], i * 2)
  }
  return out
}

/** Everything of a forward pass up to the packed input. */
function dumpEmbedded(
  d: Dump,
  at: string,
  model: AlignGPT,
  b: PackedBatch,
  e: ReturnType<AlignGPT['embed']>,
  gate: boolean,
): void {
  const H = model.config.llm.hidden_size
  const images = b.imageRows.length
  if (images) {
    d.tensor(`${at}.vision_features`, e.visionFeatures, [images, model.patches, e.visionFeatures.shape[1]])
    const rows = Array.from(b.imageRows).flatMap((r) => Array.from({ length: model.patches }, (_, p) => r + p))
    d.tensor(`${at}.projected`, gather(e.inputsEmbeds, tensor(Int32Array.from(rows))), [images, model.patches, H])
    d.tensor(`${at}.align_vec`, gather(e.inputsEmbeds, tensor(b.alignRows)))
    if (gate) {
      d.tensor(`${at}.text_mean`, e.textMean)
      d.tensor(`${at}.dots`, e.dots)
      d.tensor(`${at}.gate_logits`, e.gateLogits)
      const all = e.coefficients.toFloats()
      const n = model.levels
      d.put(`${at}.gate_weights`, Float32Array.from(all.filter((_, i) => i % n < n - 1)), [images, n - 1])
    }
  }
  const embeds = padded(e.inputsEmbeds.toFloats() as Float32Array, b.offsets, H, 0)
  d.put(`${at}.inputs_embeds`, embeds.data, embeds.shape)
}

function dumpForward(d: Dump, at: string, model: AlignGPT, b: PackedBatch, phase: Phase): void {
  scope(() =>
    noGrad(() => {
      const out = model.loss(b, phase.mix)
      dumpEmbedded(d, at, model, b, out.embedded, phase.mix.mode === 'gate')
      const hidden = padded(out.hidden.toFloats() as Float32Array, b.offsets, model.config.llm.hidden_size, 0)
      d.put(`${at}.hidden_final`, hidden.data, hidden.shape)
      const labels = padded(b.labels, b.offsets, 1, -100)
      d.put(`${at}.spliced_labels`, labels.data, labels.shape)
      const mask = padded(
        b.labels.map(() => 1),
        b.offsets,
        1,
        0,
      )
      d.put(`${at}.spliced_attention_mask`, mask.data, mask.shape)
      d.put(`${at}.loss_index`, places(b, b.lossRows), [b.lossRows.length, 2])
      d.tensor(`${at}.token_nll`, out.nll)
      const step = Math.ceil(b.lossRows.length / LOGIT_ROWS)
      const rows = b.lossRows.filter((_, i) => i % step === 0)
      d.put(`${at}.logits_sel_index`, places(b, rows), [rows.length, 2])
      d.tensor(`${at}.logits_sel`, matmul(gather(out.hidden, tensor(rows)), model.headWeight, false, true))
    }),
  )
}

/** The records as one batch, through the loader a training run uses. */
async function loadBatch(dir: string, model: AlignGPT, records: DataRecord[], phase: Phase): Promise<PackedBatch> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'goldens-'))
  const file = path.join(folder, 'batch.json')
  const plain = records.map(({ image, similarity, ...r }) => ({
    ...r,
    ...(image && { image }),
    ...(similarity !== null && { similarity }),
  }))
  fs.writeFileSync(file, JSON.stringify(plain))
  const loader = await openLoader(await loadDataset(file, { images: path.join(dir, 'images') }), {
    tokenizer: model.tokenizer,
    preprocess: { ...model.preprocessor, pad: phase.pad },
    style: phase.style,
    patches: model.patches,
    maxLength: model.config.tokenizer_model_max_length,
    batch: records.length,
    shuffle: false,
    seed: 0,
    maxBad: 0,
  })
  const loaded = await loader.next()
  await loader.close()
  fs.rmSync(folder, { recursive: true })
  if (!loaded?.packed) throw new Error(`[goldens] ${dir}: expected a batch, got none`)
  return loaded.packed
}

async function runPhase(
  d: Dump,
  dir: string,
  at: 'phase1' | 'phase2',
  expected: PhaseExpected,
): Promise<PhaseExpected> {
  const model = await AlignGPT.load(path.join(dir, 'model/aligngpt'))
  const phase = phaseOf(model, at === 'phase1' ? PRETRAIN : FINETUNE)
  const data = await loadDataset(path.join(dir, `data_${at}.json`), { images: path.join(dir, 'images') })
  const records = expected.batch_ids.map((id) => [...data].find((r) => r.id === id) as DataRecord)
  const options = { style: phase.style, patches: model.patches, maxLength: model.config.tokenizer_model_max_length }
  const samples = records.map((r) => buildSample(r, model.tokenizer, options))
  const batch = await loadBatch(dir, model, records, phase)
  data.close()
  dumpForward(d, at, model, batch, phase)

  const { recipe } = expected
  const parameters = trainable(model, phase)
  const optimizer = new AdamW(parameters, { weightDecay: recipe.weight_decay })
  const rate = (step: number): number =>
    cosineRate(step, { lr: recipe.lr, totalSteps: recipe.total_steps, warmupRatio: recipe.warmup_ratio })
  const result: PhaseExpected = {
    batch_ids: expected.batch_ids,
    recipe,
    loss: [],
    loss_after: Number.NaN,
    lr: [],
    grad_norm_before_clipping: [],
    lr_schedule: Array.from({ length: recipe.total_steps }, (_, i) => rate(i)),
    samples: samples.map((s) => ({ id: s.id, text: s.text, input_ids: [...s.ids], labels: [...s.labels] })),
  }
  for (let step = 0; step < STEPS; step++) {
    result.loss.push(scope(() => model.lossAndGradients(batch, phase.mix).loss.item()))
    result.lr.push(rate(step))
    if (step === 0) {
      optimizer.gradientNorm() // zeroes what no gradient reached
      scope(() => {
        for (const p of parameters) d.tensor(`${at}.grad.${p.name}`, p.tensor.grad() as Tensor)
      })
    }
    result.grad_norm_before_clipping.push(optimizer.update(rate(step), recipe.clip_grad_norm))
  }
  result.loss_after = scope(() => noGrad(() => model.loss(batch, phase.mix).loss.item()))
  for (const p of parameters) d.tensor(`${at}.param_after.${p.name}`, p.tensor)
  optimizer.dispose()
  model.dispose()
  return result
}

async function runInference(d: Dump, dir: string, expected: Expected): Promise<Expected['infer']> {
  const model = await AlignGPT.load(path.join(dir, 'model/aligngpt'))
  const prompts = await loadDataset(path.join(dir, 'prompts.json'), { images: path.join(dir, 'images') })
  const out: Expected['infer'] = []
  for (const record of prompts) {
    const limit = (expected.infer.find((e) => e.id === record.id) as Expected['infer'][0]).max_new_tokens
    const options = { style: model.conversation, patches: model.patches }
    const sample = buildPrompt(record.conversations, record.image, model.tokenizer, options)
    const file = record.image === null ? null : path.join(dir, 'images', record.image)
    const batch = packWithPixels(model, [sample], [file === null ? null : await loadPixels(model, file)], FINETUNE.mix)
    scope(() =>
      noGrad(() => dumpEmbedded(d, `infer.${record.id}`, model, batch, model.embed(batch, FINETUNE.mix), true)),
    )
    const decoding = new Decoding(model, batch, FINETUNE.mix, limit)
    d.tensor(`infer.${record.id}.prefill_logits`, decoding.logits, [model.config.llm.vocab_size])
    const ids: number[] = []
    while (ids.length < limit) {
      const [id] = decoding.sample({}, [0])
      ids.push(id)
      if (id === model.tokenizer.eosId || ids.length === limit) break
      decoding.push([id])
    }
    decoding.dispose()
    out.push({
      id: record.id,
      text: sample.text,
      input_ids: [...sample.ids],
      max_new_tokens: limit,
      generated_ids: ids,
    })
  }
  prompts.close()
  model.dispose()
  return out
}

async function runClip(d: Dump, dir: string): Promise<Expected['clip']> {
  const folder = path.join(dir, 'model/clip')
  const model = loadClip(folder)
  const data = await loadDataset(path.join(dir, 'data_phase1.json'), { images: path.join(dir, 'images') })
  const records = [...data]
  data.close()
  const pairs = records.map((r) => ({
    id: r.id,
    image: path.join(dir, 'images', r.image as string),
    caption: r.conversations[1].value,
  }))
  const tokenizer = Tokenizer.load(folder)
  const preprocessor = readPreprocessor(folder)
  const plain = await clipScores(model, tokenizer, preprocessor, pairs)
  const square = await clipScores(model, tokenizer, preprocessor, pairs, { pad: true })
  const shape = [pairs.length, model.config.projection_dim]
  d.put('clip.image_embeds', plain.imageEmbeds, shape)
  d.put('clip.text_embeds', plain.textEmbeds, shape)
  model.dispose()
  const n = (await AlignGPT.load(path.join(dir, 'model/aligngpt')).then((m) => [m.levels, m.dispose()]))[0] as number
  return {
    ids: records.map((r) => r.id),
    cosine: plain.scores,
    clip_score: plain.scores.map((s) => 100 * Math.max(s, 0)),
    cosine_if_square_padded: square.scores,
    levels: [...bucketLevels(plain.scores, n, 'quantile').levels],
  }
}

async function runImages(d: Dump, dir: string): Promise<void> {
  const c = readPreprocessor(path.join(dir, 'model/clip'))
  const used: string[] = []
  for (const f of ['data_phase1.json', 'data_phase2.json', 'prompts.json']) {
    const data = await loadDataset(path.join(dir, f), { images: path.join(dir, 'images') })
    used.push(...[...data].flatMap((r) => r.image ?? []))
    data.close()
  }
  for (const name of new Set(used)) {
    const rgb = await decodeImage(path.join(dir, 'images', name))
    if (/\.jpe?g$/.test(name)) d.put(`image.${name}.decoded_u8`, rgb.data, [rgb.height, rgb.width, 3])
    for (const [kind, pad] of [
      ['padded', true],
      ['plain', false],
    ] as const)
      d.put(`image.${name}.${kind}_u8`, preprocessImage(rgb, { ...c, pad }), [c.crop, c.crop, 3])
  }
}

function runProbes(dir: string, texts: string[]): Expected['tokenizer_probes'] {
  const llm = Tokenizer.load(path.join(dir, 'model/llm'))
  const clip = Tokenizer.load(path.join(dir, 'model/clip'))
  return texts.map((text) => {
    const llm_ids = llm.encode(text)
    return {
      text,
      llm_ids,
      llm_ids_no_special: llm.encode(text, { addSpecialTokens: false }),
      llm_decoded: llm.decode(llm_ids, { skipSpecialTokens: true }),
      clip_ids: clip.encode(text),
    }
  })
}

/** Runs one case folder. @returns one row for each tensor and list that was compared */
export async function runCase(dir: string, dump?: string): Promise<Row[]> {
  const read = (name: string): unknown => JSON.parse(fs.readFileSync(path.join(dir, name), 'utf8'))
  const expected = read('expected.json') as Expected
  const tolerances = read('tolerances.json') as Tolerances
  const d = new Dump()
  const got: Expected = {
    phase1: await runPhase(d, dir, 'phase1', expected.phase1),
    phase2: await runPhase(d, dir, 'phase2', expected.phase2),
    infer: await runInference(d, dir, expected),
    clip: await runClip(d, dir),
    tokenizer_probes: runProbes(
      dir,
      expected.tokenizer_probes.map((p) => p.text),
    ),
  }
  await runImages(d, dir)
  if (dump) {
    fs.mkdirSync(dump, { recursive: true })
    d.write(path.join(dump, `${path.basename(dir)}.safetensors`))
    fs.writeFileSync(path.join(dump, `${path.basename(dir)}.json`), `${JSON.stringify(got, null, 1)}\n`)
  }
  return [...compareTensors(dir, d.tensors, tolerances.tensors), ...compareLists(expected, got, tolerances.scalars)]
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      cases: { type: 'string', default: 'ts/test/golden' },
      dump: { type: 'string' },
      only: { type: 'string' },
    },
  })
  const cases = fs
    .readdirSync(values.cases)
    .map((name) => path.join(values.cases, name))
    .filter(
      (dir) => fs.existsSync(path.join(dir, 'expected.json')) && (!values.only || path.basename(dir) === values.only),
    )
  if (cases.length === 0) throw new Error(`[goldens] ${values.cases}: expected folders with expected.json, got none`)
  let failed = 0
  for (const dir of cases) {
    const rows = await runCase(dir, values.dump)
    const misses = rows.filter((r) => !(r.used <= 1))
    failed += misses.length
    const groups = new Map<string, Row[]>()
    for (const r of rows) {
      const key = r.name
        .replace(/\.(grad|param_after)\..*/, '.$1.*')
        .replace(/^(image|infer)\..*\.(\w+)$/, '$1.*.$2')
        .replace(/^tokenizer_probes.*/, 'tokenizer_probes')
      groups.set(key, [...(groups.get(key) ?? []), r])
    }
    console.log(`\n${dir}: ${rows.length} compared, ${misses.length} outside tolerance`)
    console.log('  of tolerance  count  what')
    for (const [key, list] of groups) {
      const worst = Math.max(...list.map((r) => r.used))
      console.log(`  ${worst.toPrecision(3).padStart(12)}  ${String(list.length).padStart(5)}  ${key}`)
    }
    for (const r of misses) console.log(`  MISS ${r.name}: ${r.used.toPrecision(3)} of the tolerance ${r.note}`)
  }
  process.exitCode = failed ? 1 : 0
}

if (process.argv[1] && path.basename(process.argv[1]).startsWith('goldens')) await main()

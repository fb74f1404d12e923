/** Checkpoints of other layouts: imported and exported, values and answers compared, what does not fit named. */

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { type ExportOptions, exportModel } from '../src/convert/export.js'
import { importModel } from '../src/convert/import.js'
import type { ConvertOptions } from '../src/convert/tensors.js'
import { memory } from '../src/core/tensor.js'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import {
  floatToHalf,
  halfToFloat,
  readEntry,
  readFloats,
  type StoredDtype,
  type TensorEntry,
  type TensorToWrite,
  writeSafetensors,
} from '../src/formats/safetensors.js'
import { addLora, mergeLora } from '../src/models/adapters.js'
import { loadAdapter, saveAdapter } from '../src/models/peft.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { Rng } from '../src/util/rng.js'

const golden = fileURLToPath(new URL('golden/', import.meta.url))
const base = path.join(golden, 'base/model')
const [own, clip, llm] = ['aligngpt', 'clip', 'llm'].map((n) => path.join(base, n))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'convert test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
let count = 0
const fresh = (): string => path.join(scratch, `${count++}`)
const json = (...at: string[]) => JSON.parse(fs.readFileSync(path.join(...at), 'utf8'))
const isAlignment = (name: string): boolean => /^(align_indicators|gated_weight_layer)\./.test(name)

const into = async (from: string, o: ConvertOptions = {}) => {
  const to = fresh()
  return { to, result: await importModel(from, to, o) }
}
const out = async (from: string, o: ExportOptions) => {
  const to = fresh()
  return { to, result: await exportModel(from, to, { clip, ...o }) }
}

/** Values of a checkpoint by name. */
const values = (where: string) => new Map([...openCheckpoint(where)].map(([n, e]) => [n, readFloats(e)]))
const ownValues = values(own)

/** Writes a foreign checkpoint: our values under other names, in another dtype, with a config. */
function foreign(
  rename: (name: string) => string | null,
  config: object,
  o: { drop?: RegExp; half?: boolean } = {},
): string {
  const dir = fresh()
  fs.mkdirSync(dir)
  const tensors = [...openCheckpoint(own)].flatMap(([name, e]): TensorToWrite[] => {
    const to = rename(name)
    if (to === null || isAlignment(name) || o.drop?.test(name)) return []
    if (!o.half) return [{ name: to, dtype: e.dtype, shape: e.shape, data: readEntry(e) }]
    return [{ name: to, dtype: 'F16', shape: e.shape, data: new Uint8Array(floatToHalf(readFloats(e)).buffer) }]
  })
  const odd = {
    name: 'model.layers.0.self_attn.rotary_emb.inv_freq',
    dtype: 'F32' as StoredDtype,
    shape: [1],
    data: new Uint8Array(4),
  }
  writeSafetensors(path.join(dir, 'model.safetensors'), [...tensors, odd])
  fs.writeFileSync(path.join(dir, 'config.json'), JSON.stringify(config))
  for (const f of ['tokenizer.json', 'tokenizer_config.json']) fs.copyFileSync(path.join(llm, f), path.join(dir, f))
  return dir
}

const VISION = 'vision_tower.vision_tower.vision_model.'
const llamaConfig = json(llm, 'config.json')
const llavaConfig = {
  ...llamaConfig,
  ...{ model_type: 'llava', mm_hidden_size: 32, mm_projector_type: 'mlp2x_gelu', mm_vision_select_layer: -2 },
  ...{ mm_vision_tower: 'openai/clip-vit-large-patch14-336', mm_use_im_start_end: false, image_aspect_ratio: 'pad' },
}
const hfConfig = {
  model_type: 'llava',
  text_config: { ...llamaConfig, model_type: 'llama' },
  vision_config: { ...json(clip, 'config.json').vision_config, model_type: 'clip_vision_model' },
  image_token_index: 519,
  vision_feature_layer: -2,
  vision_feature_select_strategy: 'default',
}
const toLlava = (name: string): string => (/^(mm_projector|vision_tower)\./.test(name) ? `model.${name}` : name)
const hf =
  (model: string, head: string, projector: string, vision: string) =>
  (name: string): string => {
    if (name.startsWith('model.')) return name.replace('model.', model)
    if (name.startsWith('lm_head.')) return head + name
    if (name.startsWith(VISION)) return name.replace(VISION, vision)
    return name.replace(/^mm_projector\.(\d)\./, (_, i) => `${projector}linear_${Number(i) / 2 + 1}.`)
  }
const LAYOUTS = {
  'official LLaVA': () => foreign(toLlava, llavaConfig),
  'official LLaVA, newer model_type, without its vision tower': () =>
    foreign(toLlava, { ...llavaConfig, model_type: 'llava_llama' }, { drop: /^vision_tower/ }),
  'official LLaVA behind the name of a wrapper': () => foreign((name) => `module.${toLlava(name)}`, llavaConfig),
  'llava-hf as on the Hub': () =>
    foreign(
      hf('language_model.model.', 'language_model.', 'multi_modal_projector.', 'vision_tower.vision_model.'),
      hfConfig,
    ),
  'llava-hf as transformers 5 saves it': () =>
    foreign(hf('language_model.model.', 'language_model.', 'multi_modal_projector.', 'vision_tower.'), hfConfig),
  "llava-hf under the names in transformers' memory": () =>
    foreign(hf('model.language_model.', '', 'model.multi_modal_projector.', 'model.vision_tower.'), {
      ...hfConfig,
      vision_feature_layer: [-2],
    }),
}

for (const [what, make] of Object.entries(LAYOUTS))
  test(`imports ${what}: every value, and a model that answers`, async () => {
    const { to, result } = await into(make(), what.includes('official') ? { clip } : {})
    expect(result).toMatchObject({ alignment: 'none', fresh: [], dropped: [] })
    const mine = values(to)
    expect([...mine.keys()].sort()).toEqual([...ownValues.keys()].filter((n) => !isAlignment(n)).sort())
    for (const [name, v] of mine) expect(v, name).toEqual(ownValues.get(name))
    const config = json(to, 'config.json')
    expect(config).toMatchObject({
      model_type: 'aligngpt',
      mm_alignment: 'none',
      mm_vision_tower: 'vision_tower',
      mm_hidden_size: 32,
    })
    const model = await AlignGPT.load(to)
    expect(model.mix).toEqual({ mode: 'none' })
    const again = await AlignGPT.load(own, { alignment: 'none' })
    const ask = async (m: AlignGPT): Promise<string> => {
      let text = ''
      for await (const p of m.generate({
        prompt: 'What?',
        image: path.join(golden, 'base/images/a00.png'),
        maxNewTokens: 6,
      }))
        text += `${p.id} `
      return text
    }
    expect(await ask(model)).toBe(await ask(again))
    model.dispose()
    again.dispose()
  })

test('a LLaVA can get alignment vectors and a gate, drawn as a new model draws them', async () => {
  const { to, result } = await into(LAYOUTS['official LLaVA'](), { clip, levels: 6, seed: 5 })
  expect(result.alignment).toBe('adaptive')
  expect(result.fresh.sort()).toEqual([...ownValues.keys()].filter(isAlignment).sort())
  const model = await AlignGPT.load(to)
  expect(model.levels).toBe(6)
  const made = await AlignGPT.create({ llm, clip, levels: 6 }, { seed: 5 })
  const of = (m: AlignGPT) =>
    [...m.namedParameters()].filter(([n]) => isAlignment(n)).map(([n, t]) => [n, t.toFloats()])
  expect(of(model)).toEqual(of(made))
  model.dispose()
  made.dispose()
})

test("a pre-training's file onto language model and CLIP is what `create` makes of it", async () => {
  const pretrained = path.join(golden, 'base/mm_projector_align.bin')
  const { to, result } = await into(pretrained, { llm, clip, seed: 3 })
  expect(result).toMatchObject({ from: 'projector', alignment: 'adaptive' })
  expect(result.fresh.every((n) => n.startsWith('gated_weight_layer.'))).toBe(true)
  const [model, made] = [await AlignGPT.load(to), await AlignGPT.create({ llm, clip, pretrained }, { seed: 3 })]
  const all = (m: AlignGPT) => [...m.namedParameters()].map(([n, t]) => [n, t.toFloats()])
  expect(all(model)).toEqual(all(made))
  expect(model.config.mm_projector_type).toBe('mlp2x_gelu')
  model.dispose()
  made.dispose()
  await expect(into(pretrained)).rejects.toThrow(
    /holds a projector alone: expected the folders of its language model and CLIP/,
  )
  await expect(into(pretrained, { llm, clip, levels: 4 })).rejects.toThrow(/levels: expected the 8 that/)
})

test('a projector is exported and comes back, with the settings beside it; LLaVA names are read too', async () => {
  const whole = await out(own, { format: 'projector' })
  expect(fs.readdirSync(whole.to).sort()).toEqual(['config.json', 'mm_projector_align.safetensors'])
  const back = await into(whole.to, { llm, clip })
  expect(values(back.to)).toEqual(ownValues)
  const alone = await out(own, { format: 'projector', dropAlignment: true })
  const file = path.join(alone.to, 'mm_projector.safetensors')
  expect([...openCheckpoint(file).keys()].every((n) => n.startsWith('mm_projector.'))).toBe(true)
  const named = path.join(fresh(), 'mm_projector.safetensors')
  fs.mkdirSync(path.dirname(named))
  const tensors = [...openCheckpoint(file)].map(([n, e]) => ({
    name: `model.${n}`,
    dtype: e.dtype,
    shape: e.shape,
    data: readEntry(e),
  }))
  writeSafetensors(named, tensors)
  const { result } = await into(named, { llm, clip })
  expect(result).toMatchObject({ alignment: 'none', fresh: [] })
})

test('bytes stay as they are, F16 too; --dtype rounds once', async () => {
  const half = foreign(toLlava, llavaConfig, { half: true })
  const kept = openCheckpoint((await into(half, { clip })).to)
  const source = openCheckpoint(half)
  for (const [name, e] of kept) {
    expect(e.dtype, name).toBe('F16')
    expect(readEntry(e).equals(readEntry(source.get(toLlava(name)) as TensorEntry)), name).toBe(true)
  }
  const held = memory().inUse
  const { to } = await into(half, { clip, dtype: 'bf16' })
  expect(memory().inUse).toBe(held)
  expect(json(to, 'config.json').torch_dtype).toBe('bfloat16')
  for (const [name, v] of values(to)) {
    const exact = ownValues.get(name) as Float32Array
    const wrong = v.findIndex((x, i) => Math.abs(x - exact[i]) > Math.abs(exact[i]) * 2 ** -8)
    expect(wrong, name).toBe(-1)
  }
  expect(openCheckpoint(to).get('model.norm.weight')?.dtype).toBe('BF16')
})

test('a tensor of more bytes than are moved at once', async () => {
  const rows = 100_000 // of 48 floats: 19 MB
  const data = new Uint8Array(Float32Array.from({ length: rows * 48 }, (_, i) => i).buffer)
  const dir = foreign(toLlava, { ...llavaConfig, vocab_size: rows }, { drop: /^(lm_head|model\.embed_tokens)/ })
  const small = [...openCheckpoint(dir)].map(([name, e]) => ({ ...e, name, data: readEntry(e) }))
  const big = ['model.embed_tokens.weight', 'lm_head.weight'].map((name) => ({
    name,
    dtype: 'F32' as const,
    shape: [rows, 48],
    data,
  }))
  writeSafetensors(path.join(dir, 'model.safetensors'), [...small, ...big])
  const { to } = await into(dir, { clip })
  for (const { name } of big)
    expect(readEntry(openCheckpoint(to).get(name) as TensorEntry).equals(data), name).toBe(true)
})

test('halves: every one comes back, and what lies between is rounded to even', () => {
  const all = Uint16Array.from({ length: 65536 }, (_, h) => h).filter((h) => !Number.isNaN(halfToFloat(h)))
  expect(floatToHalf(Float32Array.from(all, halfToFloat))).toEqual(all)
  for (let h = 0; h < 0x7bff; h += 7) {
    const [a, b] = [halfToFloat(h), halfToFloat(h + 1)]
    const near = [a + (b - a) * 0.49, (a + b) / 2, a + (b - a) * 0.51]
    expect([...floatToHalf(Float32Array.from(near))]).toEqual([h, h + (h & 1), h + 1])
  }
  expect([...floatToHalf(Float32Array.of(65519, 65520, 1e9, -1e9, Number.NaN))]).toEqual([
    0x7bff, 0x7c00, 0x7c00, 0xfc00, 0x7e00,
  ])
})

test('a model with alignment vectors becomes a LLaVA only when told; what is left out is said', async () => {
  for (const format of ['llava', 'llava-hf'] as const)
    await expect(out(own, { format })).rejects.toMatchObject({
      code: 'ERR_ARGUMENT',
      message: expect.stringMatching(/--drop-alignment.*'adaptive'/),
    })
  await expect(out(own, { format: 'aligngpt', dropAlignment: true })).rejects.toThrow(/another format/)
  const { result } = await out(own, { format: 'llava-hf', dropAlignment: true })
  expect(result.dropped.sort()).toEqual([...ownValues.keys()].filter(isAlignment).sort())
})

test('exported as LLaVA: its names, and imported again the same', async () => {
  await expect(out(own, { format: 'llava', dropAlignment: true })).rejects.toThrow(
    /visionTower: expected a folder or Hub name/,
  )
  const { to } = await out(own, { format: 'llava', dropAlignment: true, visionTower: 'me/tower' })
  const names = [...openCheckpoint(to).keys()]
  for (const n of [
    'model.mm_projector.0.weight',
    `model.${VISION}post_layernorm.bias`,
    'lm_head.weight',
    'model.norm.weight',
  ])
    expect(names).toContain(n)
  const config = json(to, 'config.json')
  expect(config).toMatchObject({ model_type: 'llava_llama', mm_vision_tower: 'me/tower', mm_use_im_start_end: false })
  expect(Object.keys(config).filter((k) => /alignment|gate|indicators/.test(k))).toEqual([])
  const back = await into(to, { clip })
  for (const [name, v] of values(back.to)) expect(v, name).toEqual(ownValues.get(name))
})

test('exported as llava-hf: <image> is a token with rows of its own; imported again the same', async () => {
  const { to } = await out(own, { format: 'llava-hf', dropAlignment: true })
  const entries = openCheckpoint(to)
  const config = json(to, 'config.json')
  expect(config).toMatchObject({
    model_type: 'llava',
    image_token_index: 520,
    image_seq_length: 16,
    vision_feature_layer: -2,
  })
  expect(config.text_config).toMatchObject({ model_type: 'llama', vocab_size: 521 })
  expect(Object.keys(config.text_config).filter((k) => k.startsWith('mm_'))).toEqual([])
  expect(fs.readFileSync(path.join(to, 'config.json'), 'utf8')).toContain('"initializer_factor": 1.0') // for Python
  expect(Tokenizer.load(to).encode('<image>', { addSpecialTokens: false })).toEqual([520])
  for (const [name, ours] of [
    ['language_model.model.embed_tokens.weight', 'model.embed_tokens.weight'],
    ['language_model.lm_head.weight', 'lm_head.weight'],
  ]) {
    const e = entries.get(name) as TensorEntry
    expect(e.shape).toEqual([521, 48])
    const [v, exact] = [readFloats(e), ownValues.get(ours) as Float32Array]
    expect(v.subarray(0, exact.length)).toEqual(exact)
    for (let c = 0; c < 48; c++) {
      let mean = 0
      for (let r = 0; r < 520; r++) mean += exact[r * 48 + c] / 520
      expect(v[520 * 48 + c]).toBeCloseTo(mean, 6)
    }
  }
  const back = await into(to)
  expect(json(back.to, 'config.json')).toMatchObject({ vocab_size: 521, mm_hidden_size: 32, mm_alignment: 'none' })
  const again = await out(back.to, { format: 'llava-hf' }) // has the token now
  expect(values(again.to)).toEqual(values(to))
  expect(json(again.to, 'config.json')).toEqual(config)
})

test('an adapter is merged on the way, in any dtype, as the model itself merges it', async () => {
  const model = await AlignGPT.load(own)
  addLora(model, { rank: 3, targets: ['q_proj', 'layers.1.mlp.down_proj'] }, 2)
  const rng = new Rng(4)
  for (const [name, t] of model.namedParameters())
    if (/lora_B|^mm_projector/.test(name)) t.write(Float32Array.from({ length: t.numel }, () => rng.next() - 0.5))
  const adapter = fresh()
  saveAdapter(model, adapter)
  mergeLora(model)
  const { to, result } = await out(own, { format: 'aligngpt', adapter })
  expect(result.alignment).toBe('adaptive')
  const expected = new Map([...model.namedParameters()].map(([n, t]) => [n, t.toFloats()]))
  model.dispose()
  expect(values(to)).toEqual(expected)
  const name = 'model.layers.1.mlp.down_proj.weight'
  expect(expected.get(name)).not.toEqual(ownValues.get(name))

  const llava = foreign(toLlava, llavaConfig, { half: true })
  await expect(into(llava, { clip, adapter })).rejects.toThrow(/"gated_weight_layer.*: expected a tensor of the model/)
  const half = await into(llava, { clip, adapter, levels: 8 })
  expect(half.result.fresh).toEqual(['align_indicators.indicator_embs']) // the adapter's folder has a gate
  const e = openCheckpoint(half.to).get(name) as TensorEntry
  expect(e.dtype).toBe('F16')
  const rounded = Float32Array.from(floatToHalf(expected.get(name) as Float32Array), halfToFloat)
  expect(readFloats(e)).toEqual(rounded) // the weights are exact in F16

  const other = await AlignGPT.load(path.join(golden, 'gqa/model/aligngpt'))
  expect(() => loadAdapter(other, adapter)).toThrow(/expected a parameter, got none/)
  other.dispose()
})

test('everything that does not fit is named before anything is written, and nothing is held', async () => {
  const held = memory().inUse
  const llava = LAYOUTS['official LLaVA']
  const cases: [string, () => Promise<unknown>, RegExp][] = [
    ['no vision tower', () => into(llava()), /mm_vision_tower: expected a folder with config.json/],
    [
      'a missing tensor',
      () => into(foreign(toLlava, llavaConfig, { drop: /layers\.1\.mlp\.up_proj/ }), { clip }),
      /'model\.layers\.1\.mlp\.up_proj\.weight' \[72,48\]: expected a tensor, got none in the llava checkpoint/,
    ],
    [
      'another shape',
      () => into(foreign(toLlava, { ...llavaConfig, intermediate_size: 80 }), { clip }),
      /'model\.layers\.0\.mlp\.gate_proj\.weight': expected shape \[80,48\], got \[72,48\]/,
    ],
    [
      'a tensor too many',
      () => into(foreign(toLlava, { ...llavaConfig, num_hidden_layers: 1 }), { clip }),
      /'model\.layers\.1\.[\w.]+': expected a tensor of such a model/,
    ],
    [
      'an unknown name',
      () =>
        into(
          foreign((n) => `x.${n}`, llavaConfig),
          { clip },
        ),
      /'x\.[\w.]+': expected a tensor of such a model/,
    ],
    [
      'two names for one',
      () =>
        into(
          foreign(
            (n) =>
              n === 'model.norm.weight'
                ? 'language_model.model.norm.weight'
                : n === 'lm_head.weight'
                  ? 'model.norm.weight'
                  : n,
            llavaConfig,
          ),
          { clip },
        ),
      /expected one such tensor, got/,
    ],
    [
      'LLaVA 1',
      () => into(foreign(toLlava, { ...llavaConfig, mm_use_im_start_end: true }), { clip }),
      /mm_use_im_start_end: expected false/,
    ],
    [
      'LLaVA 1.6',
      () => into(foreign(toLlava, { ...llavaConfig, image_aspect_ratio: 'anyres' }), { clip }),
      /image_aspect_ratio/,
    ],
    [
      'another language model',
      () => into(foreign(toLlava, { ...hfConfig, text_config: { model_type: 'mistral' } })),
      /text_config\.model_type: expected 'llama', got "mistral"/,
    ],
    [
      'two layers',
      () => into(foreign(toLlava, { ...hfConfig, vision_feature_layer: [-2, -5] })),
      /vision_feature_layer/,
    ],
    ['a LLaMA', () => into(llm, { clip }), /model_type: expected 'aligngpt', 'llava' or 'llava_llama', got "llama"/],
    ['nothing', () => into(path.join(scratch, 'none')), /expected a checkpoint, got ENOENT: no such file/],
    ['a used folder', () => importModel(own, own, { clip }), /to: expected a folder without a model/],
    [
      'a linear projector',
      () => out(path.join(golden, 'gqa/model/aligngpt'), { format: 'llava-hf', dropAlignment: true, clip: undefined }),
      /mm_projector_type: expected 'mlp2x_gelu' for llava-hf, got "linear"/,
    ],
    ['another table', () => into(own, { clip, levels: 4 }), /levels: expected the 8 that align_indicators/],
  ]
  const before = fs.readFileSync(path.join(own, 'config.json'), 'utf8')
  for (const [what, make, message] of cases) await expect(make(), what).rejects.toThrow(message)
  const folders = fs.readdirSync(scratch).filter((f) => fs.existsSync(path.join(scratch, f, 'vision_tower')))
  expect(fs.readFileSync(path.join(own, 'config.json'), 'utf8')).toBe(before)
  expect(memory().inUse).toBe(held)
  expect(folders.every((f) => fs.existsSync(path.join(scratch, f, 'config.json')))).toBe(true)
})

test('an imported LLaVA with new alignment vectors goes into pre-training', async () => {
  const { to } = await into(LAYOUTS['official LLaVA'](), { clip, levels: 8 })
  const run = (...args: string[]) => {
    const all = [
      '--import',
      'tsx',
      'ts/src/cli.ts',
      'pretrain',
      '--out',
      trained,
      '--steps',
      '2',
      '--batch',
      '2',
      ...args,
    ]
    return spawnSync(process.execPath, all, { cwd: new URL('../..', import.meta.url), encoding: 'utf8' })
  }
  const trained = fresh()
  const data = ['--data', path.join(golden, 'base/data_phase1.json'), '--images', path.join(golden, 'base/images')]
  const { status, stderr } = run('--model', to, ...data)
  expect(status, stderr).toBe(0)
  const [before, after] = [values(to), values(trained)]
  const moved = [...after].filter(([n, v]) => before.get(n)?.some((x, i) => x !== v[i])).map(([n]) => n.split('.')[0])
  expect([...new Set(moved)].sort()).toEqual(['align_indicators', 'mm_projector'])
  expect(run('--model', to, '--levels', '4', ...data).stderr).toMatch(/--levels does not go with --model/)
  expect(run(...data)).toMatchObject({
    status: 2,
    stderr: expect.stringMatching(/--llm and --clip, or --model, are missing/),
  })
})

test('the commands say what they did; their help has examples', () => {
  const run = (...args: string[]) =>
    spawnSync(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], {
      cwd: new URL('../..', import.meta.url),
      encoding: 'utf8',
    })
  const [llava, hfFolder] = [fresh(), fresh()]
  const imported = run('import', LAYOUTS['llava-hf as on the Hub'](), '--to', llava, '--dtype', 'bf16')
  expect(imported.status, imported.stderr).toBe(0)
  expect(imported.stdout).toMatch(
    /80 tensors, 0\.3 MB, from llava-hf; mm_alignment: none\nthere are no alignment vectors in it/,
  )
  const exported = run('export', llava, '--to', hfFolder, '--format', 'llava-hf')
  expect(exported.status, exported.stderr).toBe(0)
  const lossy = run('export', own, '--to', fresh(), '--format', 'llava-hf', '--clip', clip, '--drop-alignment')
  expect(lossy.stdout).toMatch(/left out: align_indicators\.indicator_embs, gated_weight_layer.*\nit was trained with/)
  expect(run('export', own, '--to', fresh()).status).toBe(2)
  const again = run('import', llava, '--to', llava)
  expect(again.status).toBe(1)
  expect(again.stderr).toMatch(/^ERR_ARGUMENT \[convert\] to: expected a folder without a model/m)
  for (const command of ['import', 'export', 'download'])
    expect(run(command, '--help').stdout).toMatch(/Examples:\n {2}aligngpt /)
})

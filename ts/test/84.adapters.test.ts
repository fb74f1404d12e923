/** Adapters as PEFT, LLaVA and others leave them: read as PEFT reads them, or refused by name. */
import fs from 'node:fs'
import path from 'node:path'
import { afterAll, expect, it } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { importModel } from '../src/convert/import.js'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import { readEntry, readFloats, type TensorEntry, writeSafetensors } from '../src/formats/safetensors.js'
import type { RawConfig } from '../src/formats/zod-check.js'
import { addLora, hasLora, mergeLora } from '../src/models/adapters.js'
import { readAdapterConfig } from '../src/models/config/peft.js'
import { loadAdapter, openAdapter, saveAdapter } from '../src/models/peft.js'
import { plan } from '../src/train/memory-plan.js'
import { caseDir, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
const own = caseDir('base', 'model', 'aligngpt')
let count = 0
const json = (...at: string[]): RawConfig => JSON.parse(fs.readFileSync(path.join(...at), 'utf8'))
const write = (value: unknown, ...at: string[]): void => fs.writeFileSync(path.join(...at), JSON.stringify(value))
type Extra = Record<string, { shape: number[] }>

const adapter = path.join(dir, 'adapter')
/** An adapter of ours as another program writes it: other keys in its config, other names. */
async function written(
  o: { config?: RawConfig; rename?: (name: string) => string; rest?: (name: string) => string; extra?: Extra } = {},
) {
  if (!fs.existsSync(adapter)) {
    const model = await AlignGPT.load(own, { seed: 1 })
    addLora(model, { rank: 2, alpha: 3, targets: ['q_proj', 'v_proj'] }, 7)
    for (const [name, t] of model.namedParameters())
      if (/lora_B|mm_projector\.0\.bias/.test(name)) t.write(t.toFloats().map((_, i) => ((i % 7) - 3) / 20))
    saveAdapter(model, adapter)
    model.dispose()
  }
  const to = path.join(dir, String(count++))
  fs.cpSync(adapter, to, { recursive: true })
  write({ ...json(adapter, 'adapter_config.json'), ...o.config }, to, 'adapter_config.json')
  const files = { 'adapter_model.safetensors': o.rename, 'non_lora_trainables.safetensors': o.rest }
  for (const [file, rename = (n: string) => n] of Object.entries(files)) {
    const more = file.startsWith('adapter') ? Object.entries(o.extra ?? {}) : []
    writeSafetensors(path.join(to, file), [
      ...[...openCheckpoint(path.join(adapter, file))].map(([n, e]: [string, TensorEntry]) => ({
        name: rename(n),
        dtype: e.dtype,
        shape: e.shape,
        data: readEntry(e),
      })),
      ...more.map(([name, { shape }]) => ({
        name,
        dtype: 'F32' as const,
        shape,
        data: new Uint8Array(4 * shape.reduce((a, b) => a * b, 1)),
      })),
    ])
  }
  return to
}
const withAdapter = async (from: string) => {
  const model = await AlignGPT.load(own, { seed: 1 })
  try {
    loadAdapter(model, from)
    mergeLora(model)
    return new Map([...model.namedParameters()].map(([n, t]) => [n, t.toFloats()]))
  } finally {
    model.dispose()
  }
}
const put =
  (...pairs: [RegExp, string][]) =>
  (name: string): string =>
    pairs.reduce((n, [from, to]) => n.replace(from, to), name)

it('the names of LLaVA, of llava-hf and of wrappers are the same adapter, loaded and merged by import', async () => {
  const usual = await withAdapter(await written())
  const layouts = [
    { rest: put([/^/, 'base_model.model.model.']) },
    { rest: put([/^/, 'base_model.model.']), rename: put([/^/, 'module.']) },
    { rename: put([/model\.model\.layers/, 'model.language_model.model.layers']) },
    { rename: put([/model\.model\.layers/, 'model.model.language_model.layers']) },
    { rename: put([/\.weight$/, '.default.weight']) },
    {
      rest: put(
        [/^mm_projector\.0/, 'base_model.model.model.multi_modal_projector.linear_1'],
        [/^mm_projector\.2/, 'model.multi_modal_projector.linear_2'],
      ),
    },
  ]
  const config = { target_modules: '.*\\.(q|v)_proj' }
  for (const [i, o] of layouts.entries()) {
    const from = await written({ ...o, config })
    expect(await withAdapter(from)).toEqual(usual)
    if (i > 1) continue
    const to = path.join(dir, String(count++))
    await importModel(own, to, { adapter: from })
    for (const [name, e] of openCheckpoint(to)) expect(readFloats(e), name).toEqual(usual.get(name))
  }
  expect(usual.get('mm_projector.0.bias')?.[0]).toBeCloseTo(-0.15)
})

// ranks and scalings of PEFT 0.21
it.each<[RawConfig, Record<string, [number, number]>]>([
  [{ r: 4, lora_alpha: 6, use_rslora: true }, { '0.self_attn.q_proj': [4, 3] }],
  [
    {
      ...{ r: 4, lora_alpha: 6, rank_pattern: { q_proj: 2, 'layers.1.self_attn.v_proj': 8 } },
      alpha_pattern: { 'model\\.layers\\.1\\..*q_proj': 3 },
    },
    {
      '0.self_attn.q_proj': [2, 3],
      '0.self_attn.v_proj': [4, 1.5],
      '1.self_attn.q_proj': [2, 1.5],
      '1.self_attn.v_proj': [8, 0.75],
    },
  ],
  [
    {
      r: 4,
      lora_alpha: 6,
      use_rslora: true,
      rank_pattern: { '^model.layers.0.self_attn.q_proj': 3 },
      alpha_pattern: { v_proj: 1 },
    },
    { '0.self_attn.q_proj': [3, 3.464101615137755], '0.self_attn.v_proj': [4, 0.5], '1.self_attn.q_proj': [4, 3] },
  ],
])('what counts how much: %j', (raw, want) => {
  const file = path.join(dir, `${count++}.json`)
  write({ peft_type: 'LORA', fan_in_fan_out: true, init_lora_weights: 'gaussian', megatron_core: 'x', ...raw }, file)
  const { scale } = readAdapterConfig(file)
  const got = Object.keys(want).map((name) => scale(`model.layers.${name}`))
  expect(got.map(({ rank, scaling }) => [rank, scaling])).toEqual(Object.values(want))
})
it('ranks of their own are kept when an adapter is saved again', async () => {
  const from = await written({ config: { alpha_pattern: { v_proj: 5 }, use_rslora: true } })
  const model = await AlignGPT.load(own)
  loadAdapter(model, from)
  const to = path.join(dir, String(count++))
  saveAdapter(model, to)
  model.dispose()
  const [a, b] = [from, to].map((f) => [...openAdapter(f).modules].map(([n, m]) => [n, m.rank, m.scaling]))
  expect(b).toEqual(a)
  expect(new Set(a.map(([, , scaling]) => scaling)).size).toBe(2)
})
it.each<[RawConfig, RegExp]>([
  [{ use_dora: true }, /use_dora: expected nothing/],
  [{ lora_bias: true }, /lora_bias/],
  [{ bias: 'all' }, /bias: expected 'none'/],
  [{ bias: 'lora_only' }, /bias/],
  [{ peft_type: 'IA3' }, /peft_type: expected 'LORA', got "IA3"/],
  [{ peft_type: 'LOHA' }, /peft_type/],
  [{ peft_type: 'ADALORA' }, /peft_type/],
  [{ init_lora_weights: 'pissa' }, /init_lora_weights/],
  [{ init_lora_weights: 'pissa_niter_16' }, /init_lora_weights/],
  [{ init_lora_weights: 'olora' }, /init_lora_weights/],
  [{ init_lora_weights: 'corda' }, /init_lora_weights/],
  [{ init_lora_weights: 'loftq' }, /init_lora_weights/],
  [{ trainable_token_indices: [1, 2] }, /trainable_token_indices/],
  [{ alora_invocation_tokens: [5] }, /alora_invocation_tokens/],
  [{ arrow_config: { top_k: 3 } }, /arrow_config/],
  [{ use_qalora: true }, /use_qalora/],
  [{ target_parameters: ['x'] }, /target_parameters/],
  [{ megatron_config: { a: 1 } }, /megatron_config/],
  [{ layer_replication: [[0, 2]] }, /layer_replication/],
  [{ next_year: 3 }, /next_year: expected nothing/],
  [{ r: 0 }, /r: expected/],
  [{ modules_to_save: ['lm_head'] }, /modules_to_save: expected the weights of "lm_head", got none/],
  [{ target_modules: ['q_proj'] }, /v_proj.*expected an adapter that adapter_config\.json has/],
  [{ target_modules: '.*k_proj' }, /expected an adapter that adapter_config\.json has/],
  [{ layers_to_transform: [0] }, /layers\.1.*expected an adapter that adapter_config\.json has/],
  [{ exclude_modules: ['v_proj'] }, /v_proj.*expected an adapter that/],
])('refuses %j', async (config, message) => {
  const from = await written({ config })
  expect(() => openAdapter(from)).toThrow(message)
})
it('takes what changes nothing', async () => {
  const idle = {
    ...{ revision: null, task_type: 'CAUSAL_LM', lora_dropout: 0.05, target_modules: 'all-linear', loftq_config: {} },
    ...{
      init_lora_weights: 'eva',
      eva_config: { rho: 2 },
      qalora_group_size: 16,
      layers_pattern: null,
      next_year: null,
    },
    ...{
      runtime_config: { ephemeral_gpu_offload: false },
      peft_version: '0.21.0',
      auto_mapping: { base_model_class: 'x' },
    },
  }
  expect(openAdapter(await written({ config: idle })).modules.size).toBe(4)
  expect(openAdapter(await written({ config: { target_modules: '(?P<a>q_proj' } })).modules.size).toBe(4) // Python's own
})
it('whole modules are read (modules_to_save), what nobody takes is not', async () => {
  const head = { 'base_model.model.lm_head.weight': { shape: [520, 48] } }
  const values = await withAdapter(await written({ config: { modules_to_save: ['lm_head'] }, extra: head }))
  expect(values.get('lm_head.weight')?.every((x) => x === 0)).toBe(true)
  const levels = values.get('align_indicators.indicator_embs')?.length as number
  const table = { 'base_model.model.model.align_indicators.indicator_embs': { shape: [levels / 48, 48] } }
  const aligned = await withAdapter(await written({ extra: table }))
  expect(aligned.get('align_indicators.indicator_embs')?.every((x) => x === 0)).toBe(true)
  const cases: [Extra, RegExp][] = [
    [
      { 'base_model.model.model.embed_tokens.weight': { shape: [521, 48] } },
      /expected shape \[520,48\], got \[521,48\]/,
    ],
    [{ 'base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector': { shape: [72] } }, /another tensor/],
    [{ 'base_model.model.model.embed_tokens.lora_embedding_A': { shape: [2, 520] } }, /another tensor/],
    [{ 'base_model.model.score.weight': { shape: [2, 48] } }, /another tensor/],
    [{ 'base_model.model.model.layers.0.self_attn.q_proj.bias': { shape: [48] } }, /expected a parameter, got none/],
  ]
  for (const [extra, message] of cases) await expect(written({ extra }).then(withAdapter)).rejects.toThrow(message)
  const tower = put([/model\.layers\.0/, 'vision_tower.vision_tower.vision_model.encoder.layers.0'])
  const config = { target_modules: 'all-linear' }
  await expect(written({ rename: tower, config }).then(withAdapter)).rejects.toThrow(/one of the vision tower/)
  const half = put([/^(.*layers\.0.*)lora_A(.*)$/, '$1lora_B$2.x'])
  await expect(written({ rename: half }).then(withAdapter)).rejects.toThrow(/another tensor/)
})
it('targets by any of their names; the nearest of an unknown one', async () => {
  const model = await AlignGPT.load(own)
  for (const targets of [
    'all-linear',
    ['all-linear'],
    ['All_Linear'],
    ['q_proj'],
    ['model.layers.0.mlp.up_proj'],
    ['base_model.model.model.layers.0.mlp.up_proj'],
  ]) {
    addLora(model, { rank: 2, targets: targets as string[] })
    expect(hasLora(model)).toBe(true)
    mergeLora(model)
  }
  expect(() => addLora(model, { targets: ['qproj'] })).toThrow(/got qproj \(the nearest: q_proj\)/)
  expect(() => addLora(model, { targets: ['all_linears'] })).toThrow(/the nearest: all-linear/)
  const asked = { phase: 'finetune', lora: { rank: 2, targets: ['vproj'] }, textTokens: 8 } as const
  expect(() => plan({ model: own }, asked)).toThrow(/got vproj \(the nearest: v_proj\)/)
  await expect(AlignGPT.load(await written())).rejects.toThrow(/an adapter alone/)
  model.dispose()
})

/** What checkpoints of others hold besides what this package reads: read as transformers and PEFT do, or refused by name. */
import fs from 'node:fs'
import path from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { importModel } from '../src/convert/import.js'
import { memory } from '../src/core/tensor.js'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import { readEntry, type StoredDtype, type TensorToWrite, writeSafetensors } from '../src/formats/safetensors.js'
import type { RawConfig } from '../src/formats/zod-check.js'
import { parseClipConfig } from '../src/models/config/clip.js'
import { parseLlamaConfig } from '../src/models/config/llama.js'
import { loadClip } from '../src/models/load.js'
import { parsePreprocessorConfig, readPreprocessor } from '../src/processing/preprocessor-config.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { caseDir, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
const [llm, clip, own] = ['llm', 'clip', 'aligngpt'].map((name) => caseDir('base', 'model', name))
let count = 0
const json = (...at: string[]): RawConfig => JSON.parse(fs.readFileSync(path.join(...at), 'utf8'))
const write = (value: unknown, ...at: string[]): void => fs.writeFileSync(path.join(...at), JSON.stringify(value))

type Extra = Record<string, { shape: number[]; dtype?: StoredDtype }>
/** A copy of a folder with a change to its config.json and more tensors. */
function variant(
  from: string,
  o: { config?: RawConfig; extra?: Extra; rename?: (name: string) => string } = {},
): string {
  const to = path.join(dir, String(count++))
  fs.cpSync(from, to, { recursive: true })
  if (o.config) write({ ...json(from, 'config.json'), ...o.config }, to, 'config.json')
  if (!o.extra && !o.rename) return to
  const kept = [...openCheckpoint(from)].map(([name, e]): TensorToWrite => {
    const { dtype, shape } = e
    return { name: o.rename?.(name) ?? name, dtype, shape, data: readEntry(e) }
  })
  const sizes: Partial<Record<StoredDtype, number>> = { F32: 4, I32: 4, U8: 1, I8: 1, I64: 8 }
  const more = Object.entries(o.extra ?? {}).map(([name, { shape, dtype = 'F32' }]): TensorToWrite => {
    const bytes = shape.reduce((a, b) => a * b, 1) * (sizes[dtype] as number)
    return { name, dtype, shape, data: new Uint8Array(bytes) }
  })
  writeSafetensors(path.join(to, 'model.safetensors'), [...kept, ...more])
  return to
}
const create = async (o: { llm?: string; clip?: string; selectLayer?: number }): Promise<void> =>
  (await AlignGPT.create({ llm, clip, ...o })).dispose()
const load = async (from: string): Promise<void> => (await AlignGPT.load(from)).dispose()
const layer = 'model.layers.0.self_attn'

describe('tensors that nobody reads', () => {
  const words: [string, Extra, RegExp][] = [
    [
      'biases',
      { [`${layer}.q_proj.bias`]: { shape: [48] } },
      /q_proj\.bias': expected a tensor of such a model, got a bias/,
    ],
    ['a bias of the MLP', { 'model.layers.1.mlp.up_proj.bias': { shape: [72] } }, /up_proj\.bias'.*a bias/],
    [
      'a third layer',
      { 'model.layers.2.input_layernorm.weight': { shape: [48] } },
      /a layer more than config\.json has/,
    ],
    ['scales', { [`${layer}.q_proj.weight_scale`]: { shape: [1] } }, /weight_scale'.*quantized weights/],
    ['scales of inputs', { [`${layer}.q_proj.input_scale`]: { shape: [1] } }, /input_scale'.*quantized weights/],
    ['GPTQ', { [`${layer}.q_proj.qweight`]: { shape: [6, 48], dtype: 'I32' } }, /qweight'.*quantized weights/],
    ['AWQ', { [`${layer}.q_proj.scales`]: { shape: [6] } }, /scales'.*quantized weights/],
    ['bitsandbytes, 4 bits', { [`${layer}.q_proj.weight.absmax`]: { shape: [6] } }, /absmax'.*quantized weights/],
    ['bitsandbytes, 8 bits', { [`${layer}.q_proj.SCB`]: { shape: [48] } }, /SCB'.*quantized weights/],
    [
      'compressed-tensors',
      { [`${layer}.q_proj.weight_packed`]: { shape: [2], dtype: 'I32' } },
      /packed'.*quantized weights/,
    ],
    [
      'norms of queries',
      { [`${layer}.q_norm.weight`]: { shape: [12] } },
      /q_norm\.weight'.*a norm of queries and keys/,
    ],
    ['a classifier', { 'score.weight': { shape: [2, 48] } }, /'score\.weight'.*a head for another task/],
    ['a layer of LoRA', { [`${layer}.q_proj.lora_A.weight`]: { shape: [2, 48] } }, /lora_A\.weight'.*an adapter/],
    [
      'anything',
      { 'model.x': { shape: [2] }, 'model.y': { shape: [2] } },
      /'model\.x'.*nothing would read \(and 1 more\)/,
    ],
    ['packed numbers', { 'model.x': { shape: [2], dtype: 'U8' } }, /U8, which no weight is: quantized\?/],
  ]
  it.each(words)('%s in a language model, in an AlignGPT and in import', async (_, extra, message) => {
    const held = memory().inUse
    await refuses(() => create({ llm: variant(llm, { extra }) }), 'ERR_WEIGHTS', message)
    const whole = variant(own, { extra, config: { mm_vision_tower: clip } })
    await refuses(() => load(whole), 'ERR_WEIGHTS', message)
    await refuses(() => importModel(whole, path.join(dir, 'never')), 'ERR_WEIGHTS', message)
    expect(memory().inUse).toBe(held)
  })
  it('in a CLIP, for the tower alone and with its texts', async () => {
    const more = 'vision_model.encoder.layers.3.layer_norm1.weight'
    const deep = variant(clip, { extra: { [more]: { shape: [32] } } })
    await refuses(() => create({ clip: deep }), 'ERR_WEIGHTS', /layers\.3\.layer_norm1\.weight'.*a layer more/)
    await refuses(() => loadClip(deep), 'ERR_WEIGHTS', /a layer more/)
    const head = variant(clip, { extra: { 'classifier.weight': { shape: [2, 32] } } })
    await refuses(() => create({ clip: head }), 'ERR_WEIGHTS', /'classifier\.weight'.*a head for another task/)
    await refuses(() => loadClip(head), 'ERR_WEIGHTS', /classifier/)
    const fewer = variant(clip, {
      config: {
        ...json(clip, 'config.json'),
        vision_config: { ...(json(clip, 'config.json').vision_config as object), num_hidden_layers: 2 },
      },
    })
    await refuses(() => create({ clip: fewer }), 'ERR_WEIGHTS', /layers\.2\..*a layer more than config\.json has/)
  })
  it('constants are left out, and a weight of packed numbers says what it may be', async () => {
    const extra: Extra = {
      [`${layer}.rotary_emb.inv_freq`]: { shape: [6] },
      'model.rotary_emb.inv_freq': { shape: [6] },
    }
    await create({ llm: variant(llm, { extra }) })
    await create({
      clip: variant(clip, { extra: { 'vision_model.embeddings.position_ids': { shape: [1, 17], dtype: 'I64' } } }),
    })
    const name = `${layer}.q_proj.weight`
    const packed = variant(llm, {
      rename: (n) => (n === name ? `${name}_old` : n),
      extra: { [name]: { shape: [24, 48], dtype: 'U8' } },
    })
    await refuses(() => create({ llm: packed }), 'ERR_WEIGHTS', /q_proj\.weight_old'/)
  })
  it('names that a wrapper has lengthened are said to be that', async () => {
    for (const wrapper of ['module.', '_orig_mod.'])
      await refuses(
        () => create({ llm: variant(llm, { rename: (n) => wrapper + n }) }),
        'ERR_WEIGHTS',
        /a wrapper's name/,
      )
  })
})

describe('quantized weights', () => {
  const kinds: [RawConfig, RegExp][] = [
    [{ quant_method: 'gptq', bits: 4 }, /got "GPTQ, 4 bits"/],
    [{ quant_method: 'awq', bits: 4 }, /"AWQ, 4 bits"/],
    [
      { quant_method: 'bitsandbytes', load_in_4bit: true },
      /from_pretrained\(FOLDER\)\.dequantize\(\)\), got "bitsandbytes, 4 bits"/,
    ],
    [{ load_in_8bit: true }, /"bitsandbytes, 8 bits"/],
    [{ quant_method: 'compressed-tensors' }, /run_compressed=False.*"compressed-tensors"/],
    [{ quant_method: 'modelopt', quant_algo: 'FP8' }, /"NVIDIA ModelOpt"/],
    [{ quant_method: 'fp8' }, /FineGrainedFP8Config\(dequantize=True\).*"FP8 in blocks"/],
    [{ quant_method: 'hqq' }, /"HQQ"/],
    [{ quant_method: 'torchao' }, /"torchao"/],
    [{ quant_method: 'quanto' }, /"Quanto"/],
    [{ quant_method: 'eetq' }, /"EETQ, 8 bits"/],
    [{ quant_method: 'mxfp4' }, /"MXFP4"/],
    [{ quant_method: 'next year' }, /"next year"/],
    [{ group_size: 64 }, /"quantized weights"/],
  ]
  it.each(kinds)('%j', async (quantization_config, message) => {
    for (const parse of [parseLlamaConfig, parseClipConfig]) {
      await refuses(() => parse({ quantization_config }), 'ERR_CONFIG', message)
      await refuses(
        () => parse({ quantization_config }),
        'ERR_CONFIG',
        /config\.json: quantization_config: expected weights as/,
      )
    }
  })
  it('in other keys, in a llava-hf, and in files beside the weights', async () => {
    await refuses(
      () => parseLlamaConfig({ quantization: { group_size: 64, bits: 4 } }),
      'ERR_CONFIG',
      /quantization: .*4 bits/,
    )
    const quantization_config = { quant_method: 'gptq' }
    const text_config = json(llm, 'config.json')
    const vision_config = { ...(json(clip, 'config.json').vision_config as object) }
    const hf = variant(llm, { config: { model_type: 'llava', text_config, vision_config, quantization_config } })
    await refuses(() => importModel(hf, path.join(dir, 'never')), 'ERR_CONFIG', /quantization_config.*"GPTQ"/)
    expect(parseLlamaConfig({ quantization_config: null }).hidden_size).toBe(4096)
    for (const name of ['hf_quant_config.json', 'quantize_config.json', 'quant_config.json']) {
      const folder = variant(llm)
      write({ bits: 4 }, folder, name)
      await refuses(
        () => create({ llm: folder }),
        'ERR_FORMAT',
        new RegExp(`${name}: expected weights as they were trained`),
      )
    }
  })
  it('folders and files that are no weights of PyTorch are named', async () => {
    const files = [
      'model-q4.gguf',
      'consolidated.00.pth',
      'pytorch_model_fsdp.bin',
      'zero_to_fp32.py',
      'adapter_config.json',
      'tf_model.h5',
    ]
    const says = [/GGUF, quantized/, /-hf/, /FSDP/, /DeepSpeed/, /an adapter: give the model/, /another framework/]
    for (const [i, name] of files.entries()) {
      const folder = variant(llm)
      fs.renameSync(path.join(folder, 'model.safetensors'), path.join(folder, name))
      await refuses(() => create({ llm: folder }), 'ERR_FORMAT', says[i])
    }
    const index = variant(llm)
    fs.rmSync(path.join(index, 'model.safetensors'))
    write({ weight_map: { a: 'model-1.safetensors', b: 'model-2.safetensors' } }, index, 'model.safetensors.index.json')
    await refuses(
      () => create({ llm: index }),
      'ERR_FORMAT',
      /its 2 files, got none called model-1.safetensors, model-2/,
    )
  })
})

describe('settings', () => {
  const inside = { rope_type: 'default', rope_theta: 500000 }
  // what LlamaConfig(**raw).rope_parameters of transformers 5.18 is
  it.each<[RawConfig, number]>([
    [{ rope_theta: 500000 }, 500000],
    [{ rope_scaling: inside }, 500000],
    [{ rope_theta: 7, rope_scaling: inside }, 500000],
    [{ rope_theta: 7, rope_parameters: inside }, 500000],
    [{ rope_theta: 7, rope_parameters: { rope_type: 'default' } }, 7],
    [{ rope_scaling: { rope_type: 'default', rope_theta: 3 }, rope_parameters: inside }, 3],
    [{ rope_scaling: {}, rope_parameters: inside }, 500000],
    [{ rope_scaling: null, rope_theta: 9 }, 9],
    [{ rope_scaling: { type: 'llama3', rope_type: 'default' } }, 10000],
    [{}, 10000],
  ])('the base of %j', (raw, theta) => {
    expect(parseLlamaConfig(raw)).toMatchObject({ rope_theta: theta, rope_scaling: null })
  })
  it('llama3 without its length takes max_position_embeddings', () => {
    const scaling = { type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 }
    const c = parseLlamaConfig({ rope_scaling: scaling, max_position_embeddings: 4096 })
    expect(c.rope_scaling?.original_max_position_embeddings).toBe(4096)
  })
  it.each<[RawConfig, RegExp]>([
    [{ sliding_window: 1024 }, /sliding_window: expected null, or at least max_position_embeddings 2048, got 1024/],
    [{ attention_dropout: 0.1 }, /attention_dropout: expected 0/],
    [{ residual_multiplier: 0.22 }, /residual_multiplier: expected nothing/],
    [{ logits_scaling: 8 }, /logits_scaling/],
    [{ final_logit_softcapping: 30 }, /final_logit_softcapping/],
    [{ num_local_experts: 8 }, /num_local_experts/],
    [{ use_qk_norm: true }, /use_qk_norm/],
    [{ layer_types: ['sliding_attention', 'full_attention'] }, /layer_types/],
    [{ rotary_pct: 0.25 }, /rotary_pct|rotary/],
    [{ rope_interleaved: true }, /rope_interleaved/],
    [{ use_parallel_residual: true }, /use_parallel_residual/],
    [{ hidden_act: 'gelu' }, /hidden_act/],
  ])('refuses %j', (raw, message) => refuses(() => parseLlamaConfig(raw), 'ERR_CONFIG', message))
  it('generation_config.json with what generation has not', async () => {
    const folder = variant(llm)
    for (const more of [{ repetition_penalty: 1.2 }, { no_repeat_ngram_size: 3 }, { num_beams: 5 }, { min_p: 0.1 }]) {
      write(more, folder, 'generation_config.json')
      const message = new RegExp(`generation_config\\.json: ${Object.keys(more)[0]}: expected nothing`)
      await refuses(() => create({ llm: folder }), 'ERR_CONFIG', message)
    }
    write(
      { repetition_penalty: 1, num_beams: 1, min_p: null, max_length: 4096, temperature: 0.9 },
      folder,
      'generation_config.json',
    )
    await create({ llm: folder })
  })
  it('takes what changes nothing', () => {
    const idle = {
      ...{ sliding_window: null, use_sliding_window: false, attention_dropout: 0, pretraining_tp: 2, use_cache: true },
      ...{ layer_types: ['full_attention'], residual_multiplier: 1, num_experts: 0, hidden_act: 'swish', my_note: 'x' },
      ...{ mm_projector_lr: 2e-5, tune_mm_mlp_adapter: true, auto_map: { AutoModel: 'x' }, initializer_scale: 2 },
    }
    expect(parseLlamaConfig(idle).hidden_size).toBe(4096)
    expect(parseLlamaConfig({ sliding_window: 4096, max_position_embeddings: 4096 }).hidden_size).toBe(4096)
  })
  it('a layer of the tower that is not there', async () => {
    for (const selectLayer of [-5, 4])
      await refuses(() => create({ selectLayer }), 'ERR_CONFIG', /mm_vision_select_layer: expected -4\.\.3 of 3 layers/)
    await create({ selectLayer: -4 })
  })
  it('a tokenizer with more tokens than the embeddings have rows, wherever they are added', async () => {
    const message =
      /tokens: expected at most 520, the rows of the embeddings \(vocab_size\), got 521, the last of them "<x>"/
    const token = {
      id: 520,
      content: '<x>',
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    }
    const edits: Record<string, (j: RawConfig) => RawConfig> = {
      'tokenizer.json': (j) => ({ ...j, added_tokens: [...(j.added_tokens as object[]), token] }),
      'added_tokens.json': () => ({ '<x>': 520 }),
      'tokenizer_config.json': (j) => ({ ...j, added_tokens_decoder: { 520: { ...token, id: undefined } } }),
    }
    for (const [name, edit] of Object.entries(edits)) {
      const folder = variant(llm)
      const file = path.join(folder, name)
      write(edit(fs.existsSync(file) ? json(file) : {}), file)
      // as transformers 5.18 has it: [1, 259, 467, 520, 280, 520]
      expect(Tokenizer.load(folder).encode('a <x> b<x>'), name).toEqual([1, 259, 467, 520, 280, 520])
      await refuses(() => create({ llm: folder }), 'ERR_CONFIG', message)
    }
  })
})

describe('how a CLIP wants its images', () => {
  const said = (m: number): RawConfig => ({ image_mean: [m, m, m], size: { shortest_edge: 32 }, crop_size: 32 })
  const folder = (files: Record<string, unknown>): string => {
    const to = variant(clip)
    fs.rmSync(path.join(to, 'preprocessor_config.json'))
    for (const [name, content] of Object.entries(files)) write(content, to, name)
    return to
  }
  it('processor_config.json alone, and before the other, as in transformers 5; kept when the model is saved', async () => {
    const whole = { image_processor: said(0.3), processor_class: 'CLIPProcessor' }
    const both = folder({ 'processor_config.json': whole, 'preprocessor_config.json': said(0.6) })
    const alone = folder({ 'processor_config.json': whole })
    const idle = folder({ 'processor_config.json': { processor_class: 'x' }, 'preprocessor_config.json': said(0.6) })
    expect([both, alone, idle].map((f) => readPreprocessor(f, 32).mean[0])).toEqual([0.3, 0.3, 0.6])
    const model = await AlignGPT.create({ llm, clip: alone })
    const to = path.join(dir, String(count++))
    await model.save(to)
    model.dispose()
    const again = await AlignGPT.load(to)
    expect(again.preprocessor.mean).toEqual([0.3, 0.3, 0.3])
    again.dispose()
    await refuses(
      () => readPreprocessor(folder({ 'processor_config.json': { image_processor: { do_resize: false } } }), 32),
      'ERR_CONFIG',
      /processor_config\.json: do_resize: expected true, got false/,
    )
  })
  it.each<[RawConfig, RegExp]>([
    [{ image_processor_type: 'SiglipImageProcessor' }, /image_processor_type: expected 'CLIPImageProcessor'/],
    [{ size: { shortest_edge: 32, longest_edge: 64 } }, /size: .*longest_edge/],
    [{ size: { height: 32, width: 32 } }, /size: expected N or/],
    [{ do_pad: true }, /do_pad: expected nothing, CLIP has no such step/],
    [{ crop_pct: 0.9 }, /crop_pct/],
    [{ do_center_crop: false }, /do_center_crop/],
    [{ do_rescale: false }, /do_rescale/],
    [{ do_convert_rgb: false }, /do_convert_rgb/],
    [{ resample: 2 }, /resample/],
  ])('refuses %j', (raw, message) => refuses(() => parsePreprocessorConfig(raw), 'ERR_CONFIG', message))
})

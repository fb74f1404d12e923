import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import type { RawConfig } from '../src/formats/zod-check.js'
import {
  alignGPTConfigJson,
  modelTypeOf,
  parseAlignGPTConfig,
  readAlignGPTConfig,
  writeAlignGPTConfig,
} from '../src/models/config/aligngpt.js'
import { parseClipConfig, patchCount, readClipConfig } from '../src/models/config/clip.js'
import { readGenerationConfig } from '../src/models/config/generation.js'
import { parseLlamaConfig, readLlamaConfig } from '../src/models/config/llama.js'
import { parsePreprocessorConfig, readPreprocessor } from '../src/processing/preprocessor-config.js'
import { AlignGPTError } from '../src/util/errors.js'
import { caseDir, readJson, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))

describe('LLaMA', () => {
  it('reads the oldest style with the defaults of transformers', () => {
    const c = readLlamaConfig(caseDir('base', 'model', 'llm'))
    expect(c).toMatchObject({
      hidden_size: 48,
      num_key_value_heads: 4,
      head_dim: 12,
      rope_theta: 10000,
      rope_scaling: null,
    })
    expect(c).toMatchObject({
      bos_token_id: 1,
      eos_token_ids: [2],
      pad_token_id: 0,
      tie_word_embeddings: false,
      attention_bias: false,
    })
    expect(c.raw.transformers_version).toBe('4.31.0')
    expect(parseLlamaConfig({})).toMatchObject({
      vocab_size: 32000,
      hidden_size: 4096,
      intermediate_size: 11008,
      num_hidden_layers: 32,
      rms_norm_eps: 1e-6,
      head_dim: 128,
      max_position_embeddings: 2048,
    })
  })
  it('reads grouped heads with their own width (4.x) and rope_parameters (5.x)', () => {
    expect(readLlamaConfig(caseDir('gqa', 'model', 'llm'))).toMatchObject({
      head_dim: 32,
      num_key_value_heads: 2,
      rope_theta: 500000,
      rms_norm_eps: 1e-6,
    })
    expect(readLlamaConfig(caseDir('wide', 'model', 'llm', 'config.json'))).toMatchObject({
      rope_theta: 10000,
      rope_scaling: null,
      head_dim: 14,
    })
  })
  it('reads llama3 scaling in both styles', () => {
    const s = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 8192 }
    const want = { rope_theta: 500000, rope_scaling: { rope_type: 'llama3', ...s } }
    expect(parseLlamaConfig({ rope_theta: 500000, rope_scaling: { rope_type: 'llama3', ...s } })).toMatchObject(want)
    expect(parseLlamaConfig({ rope_theta: 500000, rope_scaling: { type: 'llama3', ...s } })).toMatchObject(want)
    expect(parseLlamaConfig({ rope_parameters: { rope_type: 'llama3', rope_theta: 500000, ...s } })).toMatchObject(want)
    expect(parseLlamaConfig({ eos_token_id: [128001, 128009], vocab_size: 128256, pad_token_id: -1 })).toMatchObject({
      eos_token_ids: [128001, 128009],
      pad_token_id: null,
    })
    expect(parseLlamaConfig({ eos_token_id: null, bos_token_id: null })).toMatchObject({
      eos_token_ids: [],
      bos_token_id: null,
    })
  })
  it.each<[RawConfig, RegExp]>([
    [
      { rope_scaling: { type: 'linear', factor: 2 } },
      /rope_scaling\.rope_type: expected 'default' or 'llama3', got "linear"/,
    ],
    [{ rope_parameters: { rope_type: 'yarn' } }, /rope_parameters\.rope_type.*"yarn"/],
    [
      { rope_scaling: { rope_type: 'llama3', factor: 8 } },
      /rope_scaling\.low_freq_factor: expected number, got nothing/,
    ],
    [
      {
        rope_scaling: {
          rope_type: 'llama3',
          factor: 8,
          low_freq_factor: 4,
          high_freq_factor: 4,
          original_max_position_embeddings: 9,
        },
      },
      /high_freq_factor/,
    ],
    [{ rope_scaling: 7 }, /rope_scaling/],
    [{ partial_rotary_factor: 0.5 }, /partial_rotary_factor: expected 1, got 0.5/],
    [{ hidden_size: '48' }, /hidden_size: expected number, got "48"/],
    [{ hidden_size: 0 }, /hidden_size: expected number to be >0, got 0/],
    [{ hidden_size: 1.5 }, /hidden_size: expected int, got 1.5/],
    [{ hidden_size: 50, num_attention_heads: 4 }, /hidden_size: expected a multiple of num_attention_heads 4/],
    [{ num_key_value_heads: 3, num_attention_heads: 4 }, /num_key_value_heads: expected a divisor/],
    [{ head_dim: 7 }, /head_dim: expected an even number/],
    [{ rms_norm_eps: 0 }, /rms_norm_eps/],
    [{ hidden_act: 'gelu' }, /hidden_act: expected 'silu', got "gelu"/],
    [{ model_type: 'mistral' }, /model_type: expected 'llama' or 'aligngpt', got "mistral"/],
    [{ eos_token_id: 'x' }, /eos_token_id: expected a token id or a list of them/],
    [{ vocab_size: 10, bos_token_id: 10 }, /bos_token_id: expected an id below vocab_size 10/],
    [{ tie_word_embeddings: 1 }, /tie_word_embeddings: expected boolean, got 1/],
  ])('refuses %j', async (raw, pattern) => {
    await refuses(() => parseLlamaConfig(raw, 'some/config.json'), 'ERR_CONFIG', pattern)
    await refuses(() => parseLlamaConfig(raw, 'some/config.json'), 'ERR_CONFIG', /some\/config\.json: /)
  })
  it('names broken files', async () => {
    const file = path.join(dir, 'config.json')
    await refuses(() => readLlamaConfig(file), 'ERR_CONFIG', /ENOENT/)
    fs.writeFileSync(file, '{"hidden_size": 4,\n "é": tru}')
    await refuses(() => readLlamaConfig(dir), 'ERR_CONFIG', /config\.json at byte 26: expected a value, got "tru}"/)
    fs.writeFileSync(file, '[]')
    await refuses(() => readLlamaConfig(dir), 'ERR_CONFIG', /an object, got \[\]/)
    await refuses(() => modelTypeOf(dir), 'ERR_CONFIG', /an object/)
  })
  it('answers any JSON with a config or its own error', () => {
    const keys = [
      'hidden_size',
      'num_attention_heads',
      'head_dim',
      'rope_scaling',
      'rope_parameters',
      'eos_token_id',
      'vision_config',
      'text_config',
      'size',
      'crop_size',
      'model_type',
      'mm_vision_tower',
      'n_indicators',
    ]
    fc.assert(
      fc.property(
        fc.dictionary(fc.constantFrom(...keys), fc.oneof(fc.jsonValue(), fc.integer({ min: 0, max: 64 }))),
        (raw) => {
          for (const parse of [parseLlamaConfig, parseClipConfig, parseAlignGPTConfig, parsePreprocessorConfig]) {
            try {
              parse(raw as RawConfig)
            } catch (e) {
              expect(e, String((e as Error).stack)).toBeInstanceOf(AlignGPTError)
            }
          }
        },
      ),
      { numRuns: 500, seed: 5 },
    )
  })
})

describe('CLIP', () => {
  it('reads both towers', () => {
    const c = readClipConfig(caseDir('wide', 'model', 'clip'))
    expect(c.vision).toMatchObject({
      hidden_size: 27,
      num_hidden_layers: 4,
      image_size: 42,
      patch_size: 7,
      hidden_act: 'quick_gelu',
      layer_norm_eps: 1e-5,
    })
    expect(c.text).toMatchObject({ vocab_size: 575, max_position_embeddings: 20, eos_token_id: 2 })
    expect(c.projection_dim).toBe(21)
    expect(patchCount(c.vision)).toBe(36)
    expect(readClipConfig(caseDir('gqa', 'model', 'clip')).text.eos_token_id).toBe(583)
  })
  it('knows the defaults, and that the old *_config_dict sections win', () => {
    const c = parseClipConfig({})
    expect(c.vision).toMatchObject({ hidden_size: 768, image_size: 224, patch_size: 32, num_attention_heads: 12 })
    expect(c.text).toMatchObject({
      hidden_size: 512,
      vocab_size: 49408,
      max_position_embeddings: 77,
      eos_token_id: 49407,
      bos_token_id: 49406,
      pad_token_id: 1,
    })
    expect(c).toMatchObject({ projection_dim: 512, logit_scale_init_value: 2.6592 })
    const d = parseClipConfig({
      vision_config: { hidden_size: 96 },
      vision_config_dict: { hidden_size: 48, patch_size: 14 },
    })
    expect(d.vision).toMatchObject({ hidden_size: 48, patch_size: 14, image_size: 224 })
  })
  it.each<[RawConfig, RegExp]>([
    [{ model_type: 'siglip' }, /model_type: expected 'clip', got "siglip"/],
    [{ vision_config: { hidden_size: 'x' } }, /vision_config\.hidden_size: expected number, got "x"/],
    [{ text_config: [] }, /text_config: expected an object/],
    [{ vision_config: { num_channels: 1 } }, /num_channels: expected 3/],
    [{ vision_config: { image_size: 8 } }, /image_size: expected at least patch_size 32/],
    [{ text_config: { hidden_size: 10, num_attention_heads: 4 } }, /text_config\.hidden_size: expected a multiple/],
  ])('refuses %j', (raw, pattern) => refuses(() => parseClipConfig(raw), 'ERR_CONFIG', pattern))
})

describe('AlignGPT', () => {
  it('reads the official fields; the tower is found beside the file', () => {
    const c = readAlignGPTConfig(caseDir('base', 'model', 'aligngpt'))
    expect(c).toMatchObject({
      mm_hidden_size: 32,
      mm_projector_type: 'mlp2x_gelu',
      mm_vision_select_layer: -2,
      mm_vision_select_feature: 'patch',
      n_indicators: null,
      image_aspect_ratio: 'pad',
      tokenizer_model_max_length: 2048,
    })
    expect(c.llm.hidden_size).toBe(48)
    expect(c.visionTowerPath).toBe(caseDir('base', 'model', 'clip'))
    expect(readAlignGPTConfig(caseDir('gqa', 'model', 'aligngpt'))).toMatchObject({
      n_indicators: 6,
      mm_projector_type: 'linear',
    })
    const hub = parseAlignGPTConfig({
      model_type: 'aligngpt',
      mm_hidden_size: 4,
      mm_vision_tower: 'openai/clip-vit-large-patch14-336',
    })
    expect(hub).toMatchObject({ visionTowerPath: null, mm_projector_type: 'linear' })
    expect(modelTypeOf(caseDir('base', 'model', 'aligngpt'))).toBe('aligngpt')
  })
  it.each<[RawConfig, RegExp]>([
    [{}, /model_type: expected 'aligngpt', got undefined/],
    [{ model_type: 'aligngpt' }, /mm_hidden_size: expected number, got nothing/],
    [{ model_type: 'aligngpt', mm_hidden_size: 4, mm_vision_select_feature: 'cls' }, /mm_vision_select_feature/],
    [{ model_type: 'aligngpt', mm_hidden_size: 4, n_indicators: 1 }, /n_indicators/],
    [{ model_type: 'aligngpt', mm_hidden_size: 4, use_s2: true }, /use_s2/],
  ])('refuses %j', (raw, pattern) => refuses(() => parseAlignGPTConfig(raw), 'ERR_CONFIG', pattern))

  it.each(['base', 'gqa', 'wide'])('%s: writes the official config.json from the language model alone', (name) => {
    const official = readJson<RawConfig>(caseDir(name, 'model', 'aligngpt', 'config.json'))
    const llm = readLlamaConfig(caseDir(name, 'model', 'llm'))
    const c = readAlignGPTConfig(caseDir(name, 'model', 'aligngpt'))
    const n_indicators = c.n_indicators ?? 8
    const fields = {
      mm_hidden_size: c.mm_hidden_size,
      mm_projector_type: c.mm_projector_type,
      mm_vision_select_layer: -2,
      mm_vision_tower: '../clip',
      n_indicators,
    }
    expect(alignGPTConfigJson(llm.raw, fields, 'float32')).toEqual({ ...official, n_indicators })
    writeAlignGPTConfig(dir, llm.raw, fields, 'float32')
    const back = readAlignGPTConfig(dir)
    expect({ ...back, llm: null, visionTowerPath: null }).toEqual({
      ...c,
      llm: null,
      visionTowerPath: null,
      n_indicators,
    })
  })
})

describe('preprocessing and generation', () => {
  it('reads sizes as numbers or dictionaries', () => {
    const a = readPreprocessor(caseDir('base', 'model', 'clip'), 32)
    expect(a).toMatchObject({
      size: 32,
      crop: 32,
      mean: [0.48145466, 0.4578275, 0.40821073],
      std: [0.26862954, 0.26130258, 0.27577711],
    })
    expect(readPreprocessor(caseDir('gqa', 'model', 'clip'))).toMatchObject({ size: 36, crop: 36 })
    expect(readPreprocessor(caseDir('base', 'model', 'llm'), 48)).toMatchObject({ size: 48, crop: 48 })
  })
  it.each<[RawConfig, RegExp]>([
    [{ size: { height: 2, width: 2 } }, /size: expected N or \{"shortest_edge": N\}/],
    [{ crop_size: { height: 2, width: 3 } }, /crop_size: expected N or/],
    [{ resample: 2 }, /resample: expected bicubic \(3\), got 2/],
    [{ do_resize: false }, /do_resize: expected true, got false/],
    [{ rescale_factor: 1 }, /rescale_factor: expected 1\/255/],
    [{ size: 10, crop_size: 20 }, /crop_size: expected at most size 10, got 20/],
    [{ image_mean: [0, 0] }, /image_mean/],
    [{ image_std: [0, 1, 1] }, /image_std\.0/],
  ])('refuses %j', (raw, pattern) => refuses(() => parsePreprocessorConfig(raw), 'ERR_CONFIG', pattern))
  it('refuses a crop that is not what the tower takes', async () => {
    await refuses(() => readPreprocessor(caseDir('base', 'model', 'clip'), 33), 'ERR_CONFIG', /image_size 33, got 32/)
  })
  it('reads generation_config.json', () => {
    expect(readGenerationConfig(caseDir('base', 'model', 'llm'))).toMatchObject({
      eos_token_ids: [2],
      bos_token_id: 1,
      do_sample: false,
      top_k: 50,
    })
    expect(readGenerationConfig(caseDir('base', 'model', 'clip'))).toBeNull()
  })
})

/** AlignGPT models as folders in the official layout. */
import fs from 'node:fs'
import path from 'node:path'
import { cast } from '../core/ops.js'
import { writeSafetensors } from '../formats/safetensors.js'
import { writeConfigFile } from '../formats/zod-check.js'
import type { Module } from '../nn/module.js'
import { mergedWeights } from './adapters.js'
import type { AlignGPTNetwork } from './aligngpt.js'
import { writeAlignGPTConfig } from './config/aligngpt.js'
import { tensorToWrite } from './parameter-sources.js'

const torchNames: Record<string, string> = { f32: 'float32', bf16: 'bfloat16', f64: 'float64' }

/** What lies beside a language model's weights and config.json. */
export const LLM_FILES = [
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
]

/** Copies those of the files that are there. */
export function copyFiles(from: string, to: string, names: readonly string[]): void {
  if (path.resolve(from) === path.resolve(to)) return
  for (const name of names) {
    const file = path.join(from, name)
    if (fs.existsSync(file)) fs.copyFileSync(file, path.join(to, name))
  }
}

/**
 * Writes the parameters of a module under their own names into `dir`/model.safetensors.
 * @param dtype of the file; by default that of each parameter
 */
export function saveWeights(dir: string, module: Module, dtype?: 'f32' | 'bf16'): void {
  const tensors = [...module.namedParameters()].map(([name, t]) =>
    tensorToWrite(name, t, () => (dtype ? cast(t, dtype) : t), dtype),
  )
  writeSafetensors(path.join(dir, 'model.safetensors'), tensors)
}

/**
 * Writes a model in the official AlignGPT layout: config, tokenizer, weights, the vision tower's settings. Adapters
 * (LoRA) are merged into the weights that are written; the model itself stays as it is.
 */
export function saveModel(model: AlignGPTNetwork, dir: string): void {
  fs.mkdirSync(path.join(dir, 'vision_tower'), { recursive: true })
  writeSafetensors(path.join(dir, 'model.safetensors'), mergedWeights(model))
  const { config, llmDir, clipDir, levels, conversation, preprocessor } = model.parts
  writeAlignGPTConfig(
    dir,
    config.llm.raw,
    {
      mm_hidden_size: config.mm_hidden_size,
      mm_projector_type: config.mm_projector_type,
      mm_vision_select_layer: config.mm_vision_select_layer,
      mm_vision_select_feature: config.mm_vision_select_feature,
      mm_vision_tower: 'vision_tower',
      n_indicators: levels,
      mm_alignment: config.mm_alignment,
      mm_gate_type: config.mm_gate_type,
      mm_gate_text: config.mm_gate_text,
      conversation,
    },
    torchNames[model.dtype],
  )
  copyFiles(llmDir, dir, LLM_FILES)
  copyFiles(clipDir, path.join(dir, 'vision_tower'), ['config.json'])
  writeConfigFile(path.join(dir, 'vision_tower', 'preprocessor_config.json'), preprocessor.raw)
}

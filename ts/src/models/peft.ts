/** Adapters as PEFT's files, and beside them what else is trained with them. */

import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import type { Tensor } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { openSafetensors, type TensorEntry, type TensorToWrite, writeSafetensors } from '../formats/safetensors.js'
import { checkConfig, readJsonObject } from '../formats/zod-check.js'
import type { Linear } from '../nn/layers.js'
import { adapted, attach, type NamedLinear } from '../nn/lora.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { writeJsonFile } from '../util/json.js'
import { hasLora, languageMatrices } from './adapters.js'
import type { AlignGPTNetwork, NamedParameter } from './aligngpt.js'
import { checkpointSource, readTensor, tensorToWrite } from './parameter-sources.js'

const PEFT_PREFIX = 'base_model.model.'
const FILES = {
  weights: 'adapter_model.safetensors',
  config: 'adapter_config.json',
  rest: 'non_lora_trainables.safetensors',
}

/** Module names for target_modules: short ones where they mean the same matrices. */
function targetModules(all: readonly string[], chosen: readonly string[]): string[] {
  const short = (name: string): string => name.split('.').at(-1) as string
  const kinds = [...new Set(chosen.map(short))]
  const count = (names: readonly string[]): number => names.filter((n) => kinds.includes(short(n))).length
  return count(all) === count(chosen) ? kinds : [...chosen]
}

/**
 * Writes the adapters as PEFT does (adapter_model.safetensors, adapter_config.json; the base model is the LLaMA), and beside them
 * what else such a training changes, projector and gate, under LLaVA's name for it (non_lora_trainables.safetensors).
 * They belong to the weights the model had before training, not to what `save` writes, which has them in it already.
 * @throws ERR_ARGUMENT for a model without adapters
 */
export function saveAdapter(model: AlignGPTNetwork, dir: string): void {
  const chosen = adapted(languageMatrices(model))
  if (!chosen.length) throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected adapters, got a model without')
  const [, first] = chosen[0]
  const rank = (first.lora_A as Linear).weight.shape[0]
  fs.mkdirSync(dir, { recursive: true })
  const written = (parameters: readonly NamedParameter[], prefix: string): TensorToWrite[] =>
    parameters.map(([name, t]) => tensorToWrite(prefix + name, t))
  const metadata = { format: 'pt' }
  const rest = model.partParameters('projector', 'gate')
  writeSafetensors(path.join(dir, FILES.rest), written(rest, ''), metadata)
  writeSafetensors(path.join(dir, FILES.weights), written(model.partParameters('adapters'), PEFT_PREFIX), metadata)
  writeJsonFile(path.join(dir, FILES.config), {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: null,
    r: rank,
    lora_alpha: first.scaling * rank,
    lora_dropout: 0,
    target_modules: targetModules(
      languageMatrices(model).map(([name]) => name),
      chosen.map(([name]) => name),
    ),
    bias: 'none',
    fan_in_fan_out: false,
    init_lora_weights: true,
    inference_mode: true,
    modules_to_save: null,
    use_dora: false,
    use_rslora: false,
  })
}

const absent = z.union([z.literal(false), z.null()], 'false').optional()
const empty = z.union([z.null(), z.object({}).strict(), z.array(z.never()).max(0)], 'nothing').optional()
const adapterSchema = z.object({
  peft_type: z.literal('LORA', "'LORA'"),
  r: z.int().positive(),
  lora_alpha: z.number().positive(),
  bias: z.literal('none', "'none'").optional(),
  fan_in_fan_out: absent,
  use_dora: absent,
  use_rslora: absent,
  lora_bias: absent,
  rank_pattern: empty,
  alpha_pattern: empty,
  modules_to_save: empty,
  layer_replication: empty,
})

/** An adapter's folder: which matrices it is for, and what lies beside it. */
export interface StoredAdapter {
  file: string
  rank: number
  alpha: number
  /** A [rank, inputs] and B [outputs, rank] by the name of the module they belong to */
  modules: Map<string, { A?: TensorEntry; B?: TensorEntry }>
  /** projector and gate */
  rest: Map<string, TensorEntry>
}

/** Opens what `saveAdapter` or PEFT wrote. @throws ERR_CONFIG, ERR_WEIGHTS as `loadAdapter` */
export function openAdapter(dir: string): StoredAdapter {
  const config = path.join(dir, FILES.config)
  const { r: rank, lora_alpha: alpha } = checkConfig(adapterSchema, readJsonObject(config), config)
  const file = path.join(dir, FILES.weights)
  const modules: StoredAdapter['modules'] = new Map()
  for (const [name, e] of openSafetensors(file).entries) {
    const [, module, side] = /^base_model\.model\.(.*)\.lora_([AB])\.weight$/.exec(name) ?? []
    if (!module)
      throw mismatch('ERR_WEIGHTS', 'lora', `${file}: ${show(name)}`, "an adapter of a layer's matrix", 'none')
    modules.set(module, { ...modules.get(module), [side]: e })
  }
  if (!modules.size) throw mismatch('ERR_WEIGHTS', 'lora', file, 'adapters', 'none')
  const rest = path.join(dir, FILES.rest)
  return { file, rank, alpha, modules, rest: fs.existsSync(rest) ? openCheckpoint(rest) : new Map() }
}

/**
 * Gives a model the adapters that `saveAdapter` or PEFT wrote, and, where they are beside them, projector and gate.
 * Which matrices have one is read off the weights. Float types are converted to the model's.
 * @throws ERR_CONFIG: a kind of adapter this package does not have (DoRA, rsLoRA, other ranks for some matrices, biases);
 *   ERR_WEIGHTS: names that are not the language model's; ERR_SHAPE
 */
export function loadAdapter(model: AlignGPTNetwork, dir: string): void {
  const { file, rank, alpha, modules, rest } = openAdapter(dir)
  if (hasLora(model))
    throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected one without adapters, got one that has them')
  const all = new Map(languageMatrices(model))
  const chosen = [...modules.keys()].map((module): NamedLinear => {
    const l = all.get(module)
    if (!l) throw mismatch('ERR_WEIGHTS', 'lora', `${file}: ${show(module)}`, "a matrix of the model's layers", 'none')
    return [module, l]
  })
  const others = readOthers(model, rest)
  try {
    const source = checkpointSource(file, model, (name) => PEFT_PREFIX + name)
    attach(chosen, { rank, alpha }, source)
    for (const { to, from } of others) to.write(from.toFloats())
  } finally {
    for (const { from } of others) from.dispose()
  }
}

/** Projector and gate, each with the parameter it is for. */
function readOthers(model: AlignGPTNetwork, entries: ReadonlyMap<string, TensorEntry>): { to: Tensor; from: Tensor }[] {
  const parameters = new Map(model.namedParameters())
  const read: { to: Tensor; from: Tensor }[] = []
  try {
    for (const [name, entry] of entries) {
      const to = parameters.get(name)
      if (!to) throw mismatch('ERR_WEIGHTS', 'lora', `${entry.path}: ${show(name)}`, 'a parameter', 'none')
      read.push({ to, from: readTensor(entry, to.shape, model) })
    }
  } catch (e) {
    for (const { from } of read) from.dispose()
    throw e
  }
  return read
}

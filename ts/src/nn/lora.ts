/**
 * LoRA (Hu et al. 2021, arXiv 2106.09685): the language model's matrices stay as they are and each chosen one gets a low-rank
 * update beside it, y = x W^T + (alpha / r) (x A^T) B^T. Names and files are PEFT's. There is no dropout on the way to A.
 */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { add, cast, matmul, scale } from '../core/ops.js'
import { scope, type Tensor } from '../core/tensor.js'
import {
  openCheckpoint,
  openSafetensors,
  type TensorEntry,
  type TensorToWrite,
  writeSafetensors,
} from '../formats/safetensors.js'
import type { AlignGPT } from '../models/aligngpt.js'
import { check, readJsonObject } from '../models/config.js'
import { checkpointSource, initSource, readTensor, tensorToWrite } from '../models/parameter-sources.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { writeJsonFile } from '../util/json.js'
import { Linear, type Source } from './module.js'

export interface LoraOptions {
  /** r, default 8 */
  rank?: number
  /** the update counts alpha / r; default 2 r, LLaVA's ratio */
  alpha?: number
  /** ends of module names such as q_proj or layers.0.mlp.up_proj; default all-linear: every matrix of the layers */
  targets?: 'all-linear' | readonly string[]
}

/** Parameters that a model with adapters trains in instruction tuning: those, projector and gate (LLaVA's recipe). */
export const LORA_TRAINABLE = /\.lora_[AB]\.weight$|^mm_projector\.|^gated_weight_layer\./
const ADAPTER = /\.lora_[AB]\.weight$/
const PEFT_PREFIX = 'base_model.model.'
const FILES = {
  weights: 'adapter_model.safetensors',
  config: 'adapter_config.json',
  rest: 'non_lora_trainables.safetensors',
}

/** Name and module of every matrix of the language model's layers. */
function linears(model: AlignGPT): [string, Linear][] {
  const named = [...model.model.namedModules('model')]
  return named.filter((m): m is [string, Linear] => m[1] instanceof Linear && !/\.lora_[AB]$/.test(m[0]))
}
const withAdapter = (model: AlignGPT): [string, Linear][] => linears(model).filter(([, l]) => l.lora_A)
export const hasLora = (model: AlignGPT): boolean => withAdapter(model).length > 0

/** Whether a matrix of this name is meant by the targets; a target is the end of a module's name. */
export const isTarget = (name: string, targets: LoraOptions['targets'] = 'all-linear'): boolean =>
  targets === 'all-linear' || targets.some((t) => name.endsWith(`.${t}`))

/** Gives the chosen matrices adapters whose values come from a source; all or none. */
function attach(model: AlignGPT, chosen: readonly [string, Linear][], rank: number, alpha: number, s: Source): void {
  if (hasLora(model))
    throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected one without adapters, got one that has them')
  const made: Linear[] = []
  try {
    for (const [name, { weight }] of chosen) {
      const [outputs, inputs] = weight.shape
      const at = s.at(name)
      // the usual initialisation is PEFT's kaiming_uniform_(a = sqrt 5): within 1 / sqrt(inputs)
      made.push(new Linear(at.at('lora_A'), inputs, rank, { bias: false }))
      made.push(new Linear(at.at('lora_B'), rank, outputs, { bias: false, init: { kind: 'constant', value: 0 } }))
    }
  } catch (e) {
    for (const l of made) l.dispose()
    throw e
  }
  for (const [i, [, l]] of chosen.entries())
    Object.assign(l, { lora_A: made[2 * i], lora_B: made[2 * i + 1], scaling: alpha / rank })
}

/**
 * Gives a model fresh adapters: A uniform within 1 / sqrt(inputs) from the seed, B zero, so nothing changes before training.
 * @throws ERR_ARGUMENT: a target that no matrix of the layers has, a rank that is not a positive integer, adapters already there
 */
export function addLora(model: AlignGPT, o: LoraOptions = {}, seed = 0): void {
  const { rank = 8, targets = 'all-linear' } = o
  const alpha = o.alpha ?? 2 * rank
  if (!Number.isInteger(rank) || rank < 1) throw mismatch('ERR_ARGUMENT', 'lora', 'rank', 'an integer >= 1', show(rank))
  if (!(Number.isFinite(alpha) && alpha > 0))
    throw mismatch('ERR_ARGUMENT', 'lora', 'alpha', 'a number > 0', show(alpha))
  const all = linears(model)
  const none = (t: string): boolean => !all.some(([name]) => isTarget(name, [t]))
  const unknown = targets === 'all-linear' ? [] : targets.length ? targets.filter(none) : ['nothing']
  if (unknown.length) {
    const known = [...new Set(all.map(([name]) => name.split('.').at(-1)))].join(', ')
    throw mismatch('ERR_ARGUMENT', 'lora', 'targets', `all-linear or some of ${known}`, unknown.join(', '))
  }
  const chosen = all.filter(([name]) => isTarget(name, targets))
  attach(model, chosen, rank, alpha, initSource(seed, model))
}

/** W + (alpha / r) B A, computed in f32 (f64 for f64 tensors) and rounded to W's dtype. */
export function merged(weight: Tensor, loraA: Tensor, loraB: Tensor, scaling: number): Tensor {
  const acc = weight.dtype === 'f64' ? 'f64' : 'f32'
  const [w, a, b] = [weight, loraA, loraB].map((t) => cast(t.detach(), acc))
  return cast(add(w, scale(matmul(b, a), scaling)), weight.dtype)
}
const mergedWeight = ({ weight, lora_A, lora_B, scaling }: Linear): Tensor =>
  merged(weight, (lora_A as Linear).weight, (lora_B as Linear).weight, scaling)

/** All weights as they are written: those with an adapter merged, one at a time, the adapters left out. */
export function mergedWeights(model: AlignGPT): TensorToWrite[] {
  const merged = new Map(withAdapter(model).map(([name, l]) => [`${name}.weight`, l]))
  const plain = [...model.namedParameters()].filter(([name]) => !ADAPTER.test(name))
  return plain.map(([name, t]): TensorToWrite => {
    const l = merged.get(name)
    return tensorToWrite(name, t, l && (() => mergedWeight(l)))
  })
}

/** Adds the adapters to the weights and removes them: the same answers within rounding, at the speed of a model without. */
export function mergeLora(model: AlignGPT): void {
  for (const [, l] of withAdapter(model)) {
    l.weight.write(scope(() => mergedWeight(l).toFloats()))
    l.lora_A?.dispose()
    l.lora_B?.dispose()
    l.lora_A = l.lora_B = undefined
  }
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
export function saveAdapter(model: AlignGPT, dir: string): void {
  const chosen = withAdapter(model)
  if (!chosen.length) throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected adapters, got a model without')
  const [, first] = chosen[0]
  const rank = (first.lora_A as Linear).weight.shape[0]
  fs.mkdirSync(dir, { recursive: true })
  const parameters = [...model.namedParameters()]
  const written = (pick: (name: string) => boolean, prefix: string): TensorToWrite[] =>
    parameters.filter(([name]) => pick(name)).map(([name, t]) => tensorToWrite(prefix + name, t))
  const metadata = { format: 'pt' }
  const rest = written((name) => LORA_TRAINABLE.test(name) && !ADAPTER.test(name), '')
  writeSafetensors(path.join(dir, FILES.rest), rest, metadata)
  writeSafetensors(
    path.join(dir, FILES.weights),
    written((name) => ADAPTER.test(name), PEFT_PREFIX),
    metadata,
  )
  writeJsonFile(path.join(dir, FILES.config), {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: null,
    r: rank,
    lora_alpha: first.scaling * rank,
    lora_dropout: 0,
    target_modules: targetModules(
      linears(model).map(([name]) => name),
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
  const { r: rank, lora_alpha: alpha } = check(adapterSchema, readJsonObject(config), config)
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
export function loadAdapter(model: AlignGPT, dir: string): void {
  const { file, rank, alpha, modules, rest } = openAdapter(dir)
  const all = new Map(linears(model))
  const chosen = [...modules.keys()].map((module): [string, Linear] => {
    const l = all.get(module)
    if (!l) throw mismatch('ERR_WEIGHTS', 'lora', `${file}: ${show(module)}`, "a matrix of the model's layers", 'none')
    return [module, l]
  })
  const others = readOthers(model, rest)
  try {
    const source = checkpointSource(file, model, (name) => PEFT_PREFIX + name)
    attach(model, chosen, rank, alpha, source)
    for (const { to, from } of others) to.write(from.toFloats())
  } finally {
    for (const { from } of others) from.dispose()
  }
}

/** Projector and gate, each with the parameter it is for. */
function readOthers(model: AlignGPT, entries: ReadonlyMap<string, TensorEntry>): { to: Tensor; from: Tensor }[] {
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

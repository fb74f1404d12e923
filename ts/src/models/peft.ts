/** Adapters as PEFT's files, and beside them what else is trained with them. */

import fs from 'node:fs'
import path from 'node:path'
import type { Tensor } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { type TensorEntry, type TensorToWrite, writeSafetensors } from '../formats/safetensors.js'
import type { Linear } from '../nn/layers.js'
import { adapted, attach, type NamedLinear } from '../nn/lora.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { writeJsonFile } from '../util/json.js'
import { hasLora, languageMatrices } from './adapters.js'
import type { AlignGPTNetwork, NamedParameter } from './aligngpt.js'
import { type AdapterConfig, readAdapterConfig } from './config/peft.js'
import { ourName, VISION, withoutWrappers } from './names.js'
import { checkpointSource, openNamed, readTensor, tensorToWrite } from './parameter-sources.js'

const PEFT_PREFIX = 'base_model.model.'
/** Where there are two, the first is what is written; the other is what torch.save makes, and what LLaVA writes. */
const FILES = {
  config: 'adapter_config.json',
  weights: ['adapter_model.safetensors', 'adapter_model.bin'],
  rest: ['non_lora_trainables.safetensors', 'non_lora_trainables.bin'],
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
  const scales = chosen.map(([name, l]) => {
    const rank = (l.lora_A as Linear).weight.shape[0]
    return { name, rank, alpha: l.scaling * rank }
  })
  const [{ rank, alpha }] = scales
  const others = (key: 'rank' | 'alpha'): Record<string, number> =>
    Object.fromEntries(scales.filter((s) => s[key] !== scales[0][key]).map((s) => [s.name, s[key]]))
  fs.mkdirSync(dir, { recursive: true })
  const written = (parameters: readonly NamedParameter[], prefix: string): TensorToWrite[] =>
    parameters.map(([name, t]) => tensorToWrite(prefix + name, t))
  const metadata = { format: 'pt' }
  const rest = model.partParameters('projector', 'gate')
  writeSafetensors(path.join(dir, FILES.rest[0]), written(rest, ''), metadata)
  writeSafetensors(path.join(dir, FILES.weights[0]), written(model.partParameters('adapters'), PEFT_PREFIX), metadata)
  writeJsonFile(path.join(dir, FILES.config), {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: null,
    r: rank,
    lora_alpha: alpha,
    rank_pattern: others('rank'),
    alpha_pattern: others('alpha'),
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

/** An adapter of one matrix: A [rank, inputs], B [outputs, rank], and what their product counts. */
export interface StoredPair {
  A: TensorEntry
  B: TensorEntry
  rank: number
  scaling: number
}
/** An adapter's folder: which matrices it is for, and what lies beside it. */
export interface StoredAdapter {
  file: string
  /** by the name of the module they belong to */
  modules: Map<string, StoredPair>
  /** parameters that were trained as a whole: projector and gate, PEFT's modules_to_save */
  rest: Map<string, TensorEntry>
}

/** The first of the files that is there. */
function fileOf(dir: string, names: readonly string[]): string | undefined {
  return names.map((name) => path.join(dir, name)).find((file) => fs.existsSync(file))
}
const wrong = (e: TensorEntry, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_WEIGHTS', 'lora', `${e.path}: ${show(e.name)}`, expected, got)

/** The matrix that half of an adapter is for, under our name. @throws ERR_WEIGHTS */
function adaptedModule(e: TensorEntry, module: string, config: AdapterConfig): string {
  const ours = ourName(`${module}.weight`)?.replace(/\.weight$/, '')
  if (!ours) throw wrong(e, "an adapter of one of the model's matrices", 'another')
  if (!config.takes(module))
    throw wrong(e, 'an adapter that adapter_config.json has (target_modules, layers_to_transform)', 'another')
  return ours
}

/** Opens what `saveAdapter`, PEFT or LLaVA wrote. @throws ERR_CONFIG, ERR_WEIGHTS as `loadAdapter` */
export function openAdapter(dir: string): StoredAdapter {
  const config = readAdapterConfig(path.join(dir, FILES.config))
  const file = fileOf(dir, FILES.weights)
  if (!file) throw mismatch('ERR_FORMAT', 'lora', dir, FILES.weights.join(' or '), 'neither')
  const halves = new Map<string, { module: string; A?: TensorEntry; B?: TensorEntry }>()
  const rest = new Map<string, TensorEntry>()
  const whole: string[] = []
  for (const [name, e] of openCheckpoint(file)) {
    const plain = withoutWrappers(name).replace(/\.modules_to_save(\.default)?\./, '.')
    const [, module, side] = /^(.*)\.lora_([AB])(?:\.default)?\.weight$/.exec(plain) ?? []
    const ours = module ? adaptedModule(e, module, config) : ourName(plain)
    if (ours === null) continue
    if (ours === undefined || (!module && /\.lora_/.test(plain)))
      throw wrong(e, "an adapter of a layer's matrix", 'another tensor')
    const twice = module ? halves.get(ours)?.[side as 'A' | 'B'] : rest.get(ours)
    if (twice) throw wrong(e, 'one such tensor', `${show(twice.name)} too`)
    if (module) halves.set(ours, { ...halves.get(ours), module, [side]: e })
    else rest.set(ours, e)
    if (!module) whole.push(plain)
  }
  for (const name of config.saved)
    if (!whole.some((n) => `.${n}`.includes(`.${name}.`)))
      throw mismatch('ERR_WEIGHTS', 'lora', `${file}: modules_to_save`, `the weights of ${show(name)}`, 'none')
  const modules = new Map<string, StoredPair>()
  for (const [ours, { module, A, B }] of halves) {
    if (!A || !B) throw wrong((A ?? B) as TensorEntry, 'lora_A and lora_B', 'one of them')
    modules.set(ours, { A, B, ...config.scale(module) })
  }
  if (!modules.size) throw mismatch('ERR_WEIGHTS', 'lora', file, 'adapters', 'none')
  for (const [ours, e] of besides(dir)) {
    if (rest.has(ours)) throw wrong(e, 'one such tensor', `${show(rest.get(ours)?.name)} too`)
    rest.set(ours, e)
  }
  return { file, modules, rest }
}

/** What was trained as a whole beside the adapter. */
function besides(dir: string): Map<string, TensorEntry> {
  const [ours, theirs] = FILES.rest.map((name) => fileOf(dir, [name]))
  if (ours && theirs) throw mismatch('ERR_FORMAT', 'lora', dir, `one of ${FILES.rest.join(' and ')}`, 'both')
  const file = ours ?? theirs
  return file ? openNamed(file) : new Map()
}

/**
 * Gives a model the adapters that `saveAdapter`, PEFT or LLaVA's training wrote, and what was trained as a whole with them:
 * projector, gate, alignment vectors, PEFT's modules_to_save. Which matrices have one is read off the weights. Float types are
 * converted to the model's.
 * @throws ERR_CONFIG: a key of adapter_config.json that this package does not have (DoRA, biases, other kinds of adapters);
 *   ERR_WEIGHTS: a tensor that is not the language model's layers' or a parameter; ERR_SHAPE
 */
export function loadAdapter(model: AlignGPTNetwork, dir: string): void {
  const { file, modules, rest } = openAdapter(dir)
  if (hasLora(model))
    throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected one without adapters, got one that has them')
  const all = new Map(languageMatrices(model))
  const halves = new Map<string, TensorEntry>()
  const chosen = [...modules].map(([module, { A, B }]): NamedLinear => {
    const l = all.get(module)
    if (!l) {
      const got = module.startsWith(VISION) ? 'one of the vision tower, which import --adapter can merge' : 'another'
      throw wrong(A, "an adapter of the language model's layers", got)
    }
    halves.set(`${module}.lora_A.weight`, A).set(`${module}.lora_B.weight`, B)
    return [module, l]
  })
  const others = readOthers(model, rest)
  try {
    attach(chosen, (module) => modules.get(module) as StoredPair, checkpointSource(halves, file, model))
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

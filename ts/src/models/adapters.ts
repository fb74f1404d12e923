/** Low-rank adapters (nn/lora.ts) on the language model of an AlignGPT. */
import type { TensorToWrite } from '../formats/safetensors.js'
import {
  adapted,
  attach,
  detach,
  isAdapter,
  LORA_RANK,
  type LoraOptions,
  matrices,
  mergedWeight,
  type NamedLinear,
} from '../nn/lora.js'
import { isTarget } from '../nn/lora-targets.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { nearest } from '../util/nearest.js'
import type { AlignGPTNetwork } from './aligngpt.js'
import { initSource, tensorToWrite } from './parameter-sources.js'

/** Name and module of every matrix of the language model's layers. */
export const languageMatrices = (model: AlignGPTNetwork): NamedLinear[] => matrices(model.language.model, 'model')
export const hasLora = (model: AlignGPTNetwork): boolean => adapted(languageMatrices(model)).length > 0

/**
 * Gives a model fresh adapters: A uniform within 1 / sqrt(inputs) from the seed, B zero, so nothing changes before training.
 * @throws ERR_ARGUMENT: a target that no matrix of the layers has, a rank that is not a positive integer, adapters already there
 */
export function addLora(model: AlignGPTNetwork, o: LoraOptions = {}, seed = 0): void {
  const { rank = LORA_RANK, targets = 'all-linear' } = o
  const alpha = o.alpha ?? 2 * rank
  if (!Number.isInteger(rank) || rank < 1) throw mismatch('ERR_ARGUMENT', 'lora', 'rank', 'an integer >= 1', show(rank))
  if (!(Number.isFinite(alpha) && alpha > 0))
    throw mismatch('ERR_ARGUMENT', 'lora', 'alpha', 'a number > 0', show(alpha))
  const all = languageMatrices(model)
  const none = (t: string): boolean => !all.some(([name]) => isTarget(name, [t]))
  const asked = typeof targets === 'string' ? [targets] : targets
  const unknown = asked.length ? asked.filter(none) : ['nothing']
  if (unknown.length) {
    const known = [...new Set(all.map(([name]) => name.split('.').at(-1) as string))]
    const near = asked.length ? ` (the nearest: ${nearest(unknown[0], ['all-linear', ...known])})` : ''
    const expected = `all-linear or some of ${known.join(', ')}`
    throw mismatch('ERR_ARGUMENT', 'lora', 'targets', expected, `${unknown.join(', ')}${near}`)
  }
  if (hasLora(model))
    throw new AlignGPTError('ERR_ARGUMENT', '[lora] model: expected one without adapters, got one that has them')
  const chosen = all.filter(([name]) => isTarget(name, targets))
  attach(chosen, () => ({ rank, scaling: alpha / rank }), initSource(seed, model))
}

/** All weights as they are written: those with an adapter merged, one at a time, the adapters left out. */
export function mergedWeights(model: AlignGPTNetwork): TensorToWrite[] {
  const merged = new Map(adapted(languageMatrices(model)).map(([name, l]) => [`${name}.weight`, l]))
  const plain = [...model.namedParameters()].filter(([name]) => !isAdapter(name))
  return plain.map(([name, t]): TensorToWrite => {
    const l = merged.get(name)
    return tensorToWrite(name, t, l && (() => mergedWeight(l)))
  })
}

/** Adds the adapters to the weights and removes them: the same answers within rounding, at the speed of a model without. */
export const mergeLora = (model: AlignGPTNetwork): void => detach(adapted(languageMatrices(model)))

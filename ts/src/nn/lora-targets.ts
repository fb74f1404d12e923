/** Which matrices get an adapter. This file imports nothing: the command line asks it before anything is loaded. */

export type LoraTargets = 'all-linear' | readonly string[]

/** Whether a target means every matrix, in the spellings there are. */
export const isAllLinear = (target: unknown): boolean => typeof target === 'string' && /^all[-_ ]?linear$/i.test(target)
/** Whether a matrix of this name is meant by the targets; a target is a module's name as PEFT has it, or the end of one. */
export const isTarget = (name: string, targets: LoraTargets = 'all-linear'): boolean =>
  [targets].flat().some((t) => isAllLinear(t) || `.${name}`.endsWith(`.${t.replace(/^base_model\.model\./, '')}`))

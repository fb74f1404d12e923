/** What may be chosen of an AlignGPT, and what holds where nothing is: the numbers of the paper and the official code. */

/**
 * Variants of the alignment vector (the paper's ablations): adaptive = gate over the local vectors plus the global one; local =
 * without the global one; global = that one alone; average = mean of the local ones plus the global one; random = adaptive over
 * a table that is never trained; none = no vector in the sequence.
 */
export const ALIGNMENTS = ['adaptive', 'local', 'global', 'average', 'random', 'none'] as const
export type Alignment = (typeof ALIGNMENTS)[number]
/** mlp: the official code's two layers; linear: the paper's one */
export const GATES = ['mlp', 'linear'] as const
export type Gate = (typeof GATES)[number]
/** which text the gate sees in training */
export const GATE_TEXTS = ['all', 'instruction'] as const
export type GateText = (typeof GATE_TEXTS)[number]
/** which rows of the vision tower's hidden state the projector sees; cls_patch: the class row too */
export const SELECT_FEATURES = ['patch', 'cls_patch'] as const
export type SelectFeature = (typeof SELECT_FEATURES)[number]

/** The number of linear layers of a projector, null for a type that is none: linear, mlpNx_gelu (N of them) or identity. */
export function projectorDepth(type: string): number | null {
  if (type === 'identity') return 0
  if (type === 'linear') return 1
  const depth = Number(/^mlp(\d+)x_gelu$/.exec(type)?.[1])
  return depth >= 1 ? depth : null
}
export const PROJECTORS = 'linear, mlpNx_gelu or identity'

/** A new model's, where nothing else is asked for. */
export const MODEL_DEFAULTS = {
  /** N, rows of the alignment table */
  levels: 8,
  projector: 'mlp2x_gelu',
  /** index of the vision tower's hidden state, LLaVA's */
  selectLayer: -2,
  selectFeature: 'patch',
  alignment: 'adaptive',
  gate: 'mlp',
  gateText: 'all',
  /** rows of the longest sequence */
  maxLength: 2048,
  /** image rows of ViT-L/14-336 */
  patches: 576,
} as const

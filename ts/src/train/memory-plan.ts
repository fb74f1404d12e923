/**
 * What a training step takes of a device's memory, computed before anything is allocated. The parameters are those that the model
 * itself would make, and what its towers keep of a row is said by their families: nothing of an architecture is written down here.
 */
import { headChunk } from '../core/ops.js'
import { languageMatrices } from '../models/adapters.js'
import { AlignGPTNetwork, type ParameterShape, type Part, partOf } from '../models/aligngpt.js'
import type { LayerActivations } from '../models/language-model.js'
import { familyInAlignGPT, visionFamily } from '../models/registry.js'
import {
  folderSettings,
  type ModelOptions,
  type ModelSettings,
  type NewModelOptions,
  newSettings,
  PAPER_SIZES,
  type PaperSize,
  paperSettings,
} from '../models/settings.js'
import type { TowerActivations } from '../models/vision-tower.js'
import { adapted, LORA_RANK, type LoraOptions } from '../nn/lora.js'
import { isTarget } from '../nn/lora-targets.js'
import { AlignGPTError, show } from '../util/errors.js'
import { FINETUNE, learning, PRETRAIN } from './phases.js'
import { type PhaseName, problemIn, RUN_SETTINGS, type RunSettings } from './run-settings.js'

/**
 * What a plan is made for: one of the paper's two models, the towers of a new one, an AlignGPT folder (its weights need not be there),
 * or a model.
 */
export type Planned =
  | PaperSize
  | (string & {})
  | AlignGPTNetwork
  | ({ size: PaperSize } & NewModelOptions)
  | ({ llm: string; clip: string } & NewModelOptions)
  | ({ model: string; clip?: string; levels?: number } & ModelOptions)

/** The settings of a run that decide about its memory (docs/config.md), and the text of its samples. */
export interface PlanOptions
  extends Pick<RunSettings, 'batch' | 'microBatch' | 'recompute' | 'optimizerState' | 'offloadOptimizer' | 'lora'> {
  phase: PhaseName
  /** of the weights, default f32 */
  dtype?: 'f32' | 'bf16'
  /** text tokens of a sample, without image and alignment vector; default: as many as the longest sequence has room for */
  textTokens?: number
  /** of them with loss, default all */
  labelledTokens?: number
}

/** Bytes. `peak` is the most that is in use at once on the model's device, `host` what the optimizer keeps in main memory besides. */
export interface MemoryPlan {
  parameters: number
  trainable: number
  weights: number
  gradients: number
  moments: number
  /** what bf16 weights do not hold of the f32 values they stand for */
  masters: number
  /** kept from forward for backward */
  activations: number
  /** what the most demanding moment needs besides all that: the loss, the last layer's backward, or the vision tower */
  transient: number
  peak: number
  host: number
  /** main memory a checkpoint takes while it is being written; for a model on the CPU it comes on top of `peak` */
  snapshot: number
  /** main memory of images that are decoded ahead of their step */
  pictures: number
  /** page-locked main memory that copies from and to a GPU go through; none of it for a model on the CPU */
  pinned: number
}

/** As the native allocator rounds (native/core/allocator.cc). */
function rounded(bytes: number): number {
  let step = 64
  if (bytes > 2 ** 20) step = 2 ** 16
  else if (bytes > 4096) step = 2 ** Math.floor(Math.log2(bytes)) / 8
  return Math.max(64, Math.ceil(bytes / step) * step)
}
/** Bytes of tensors with so many elements, of `size` bytes each. */
const tensors = (size: number, ...counts: number[]): number => counts.reduce((n, c) => n + rounded(c * size), 0)
/** Of so many rows with each of these widths. */
const rowsOf = (size: number, rows: number, widths: readonly number[]): number =>
  tensors(size, ...widths.map((w) => w * rows))
const sum = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0)
const elements = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1)

type Parameter = Pick<ParameterShape, 'shape' | 'part' | 'layer'> & { name: string }
/** Rank of adapters, and which matrices have one. */
interface Adapters {
  rank: number
  on: (name: string) => boolean
}

// Two pieces and 64 small places for all copies (native/cuda/device.cc); three places for a parameter and its gradient
// (native/ops/offload.cc).
const STAGING = 2 * 2 ** 23 + 64 * 2 ** 16
const OFFLOAD_PLACES = 3 * 2 * 2 ** 22

/** All micro-batches of a step are gathered before it is computed, so all of the next are decoded meanwhile. */
export const microBatchesAhead = (batch: number, microBatch: number): number =>
  Math.max(2, Math.ceil(batch / microBatch))

function settingsOf(of: Exclude<Planned, AlignGPTNetwork>): ModelSettings {
  if (typeof of === 'string')
    return PAPER_SIZES.includes(of as PaperSize) ? paperSettings(of as PaperSize) : folderSettings(of)
  if ('size' in of) return paperSettings(of.size, of)
  return 'model' in of ? folderSettings(of.model, of) : newSettings(of)
}

/** The parameters, without adapters. */
function parametersOf(of: Planned, settings: ModelSettings): Parameter[] {
  const described = AlignGPTNetwork.parameters(settings, () => false)
  if (!(of instanceof AlignGPTNetwork)) return [...described].map(([name, p]) => ({ name, ...p }))
  const own = [...of.namedParameters()].map(([name, { shape }]) => ({ name, shape: [...shape], part: partOf(name) }))
  return own.filter((p) => p.part !== 'adapters').map((p) => ({ ...p, layer: described.get(p.name)?.layer ?? null }))
}

/** Those that a model has already. */
function adaptersOf(model: AlignGPTNetwork): Adapters | null {
  const found = adapted(languageMatrices(model))
  const names = new Set(found.map(([name]) => name))
  const rank = found[0]?.[1].lora_A?.weight.shape[0]
  return rank === undefined ? null : { rank, on: (name) => names.has(name) }
}

/** Options with what holds for those not given. */
type Asked = PlanOptions & Required<Pick<PlanOptions, 'dtype' | 'microBatch' | 'textTokens'>>
type State = Omit<MemoryPlan, 'activations' | 'transient' | 'peak' | 'host' | 'pictures' | 'pinned'>

/** Plans of the steps of one model. */
export class Planner {
  readonly #settings: ModelSettings
  readonly #parameters: readonly Parameter[]
  readonly #adapters: Adapters | null
  readonly #layer: LayerActivations
  readonly #tower: TowerActivations & { width: number; patches: number }

  /** @throws AlignGPTError ERR_CONFIG: a folder without readable settings, an unknown projector; ERR_ARGUMENT */
  constructor(of: Planned) {
    const settings = of instanceof AlignGPTNetwork ? of.parts : settingsOf(of)
    const { config, clip } = settings
    this.#settings = settings
    this.#parameters = parametersOf(of, settings)
    this.#adapters = of instanceof AlignGPTNetwork ? adaptersOf(of) : null
    this.#layer = familyInAlignGPT(config.llm.raw, 'config.json').activations(config.llm)
    const family = visionFamily(clip.raw, 'config.json')
    const selection = { layer: config.mm_vision_select_layer, feature: config.mm_vision_select_feature }
    const width = family.tower(clip).hidden_size
    this.#tower = { ...family.activations(clip), width, patches: family.rows(clip, selection) }
  }

  /** Text tokens that the longest sequence has room for beside an image. */
  get room(): number {
    return this.#settings.config.tokenizer_model_max_length - this.#tower.patches - 1
  }

  /** Bytes a training step takes, by what they are for. @throws AlignGPTError ERR_ARGUMENT naming the option */
  plan(options: PlanOptions): MemoryPlan {
    const o = this.#checked(options)
    const { llm } = this.#settings.config
    const size = o.dtype === 'bf16' ? 2 : 4
    const lora = this.#lora(o)
    const state = this.#state(o, lora)
    const { kept: activations, transient } = this.#step(o, size, lora)
    const kept = state.moments + state.masters
    const host = o.offloadOptimizer ? kept : 0
    const trained = this.#learns(o, lora).includes('language')
    const labelled = o.microBatch * (o.labelledTokens ?? o.textTokens)
    const head = headTransient(llm, labelled, size, trained)
    const most = Math.max(head, transient)
    const peak = state.weights + state.gradients + (kept - host) + activations + most
    const ahead = microBatchesAhead(o.batch ?? o.microBatch, o.microBatch)
    const pictures = (ahead + 1) * o.microBatch * this.#tower.pixels // and those in use
    const pinned = STAGING + (o.offloadOptimizer ? OFFLOAD_PLACES : 0)
    return { ...state, activations, transient: most, peak, host, pictures, pinned }
  }

  /** The most samples at once whose step stays below `bytes`; 0 when not even one does. */
  largestMicroBatch(o: Omit<PlanOptions, 'microBatch'>, bytes: number): number {
    const fits = (microBatch: number): boolean => this.plan({ ...o, microBatch }).peak <= bytes
    if (!fits(1)) return 0
    let [low, high] = [1, 2]
    while (fits(high)) [low, high] = [high, 2 * high]
    while (high - low > 1) {
      const middle = Math.floor((low + high) / 2)
      if (fits(middle)) low = middle
      else high = middle
    }
    return low
  }

  #checked(o: PlanOptions): Asked {
    const fail = (key: string, expected: string, got: string): Error =>
      new AlignGPTError('ERR_ARGUMENT', `[plan] ${key}: expected ${expected}, got ${got}`)
    if (o.phase !== 'pretrain' && o.phase !== 'finetune') throw fail('phase', 'pretrain or finetune', show(o.phase))
    const problem = problemIn(o.phase, o)
    if (problem) throw fail(problem.key, problem.expected, problem.got)
    for (const key of ['textTokens', 'labelledTokens'] as const)
      if (o[key] !== undefined && !RUN_SETTINGS.steps.kind.accepts(o[key]))
        throw fail(key, RUN_SETTINGS.steps.kind.expected, show(o[key]))
    const { dtype, microBatch } = RUN_SETTINGS
    const usual = { dtype: dtype.default, microBatch: Math.min(microBatch.default, o.batch ?? microBatch.default) }
    const given = Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined)) as unknown as PlanOptions
    return { ...usual, textTokens: Math.max(1, this.room), ...given }
  }

  /** The adapters of a run, those that are asked for or those that the model has. */
  #lora({ lora }: PlanOptions): Adapters | null {
    if (!lora) return this.#adapters
    const { rank = LORA_RANK, targets }: LoraOptions = lora
    return { rank, on: (name) => isTarget(name, targets) }
  }

  #adapted(lora: Adapters | null): Parameter[] {
    return this.#parameters.filter((p) => p.layer !== null && lora?.on(matrix(p)))
  }

  #learns({ phase }: PlanOptions, lora: Adapters | null): Part[] {
    const definition = phase === 'pretrain' ? PRETRAIN : FINETUNE
    return learning(definition, this.#settings.config.mm_alignment, phase === 'finetune' && lora !== null)
  }

  /** Weights and what the optimizer keeps beside them. */
  #state(o: Asked, lora: Adapters | null): State {
    const rank = lora?.rank ?? 0
    const adapters = this.#adapted(lora).flatMap(({ shape: [outputs, inputs] }) => [rank * inputs, outputs * rank])
    const counts = (parts: readonly Part[]): number[] => [
      ...this.#parameters.filter((p) => parts.includes(p.part)).map((p) => elements(p.shape)),
      ...(parts.includes('adapters') ? adapters : []),
    ]
    const learns = this.#learns(o, lora)
    const trained = counts(learns)
    const all = counts(['language', 'vision', 'projector', 'table', 'gate', 'adapters'])
    const saved = counts([...learns, 'projector', 'table', 'gate'])
    const compact = o.dtype === 'bf16' && o.optimizerState === 'compact'
    const [size, kept] = [o.dtype === 'bf16' ? 2 : 4, compact ? 2 : 4]
    const flat = rounded(sum(trained) * kept)
    const masters = o.dtype === 'bf16' ? tensors(kept, ...trained) : 0
    return {
      parameters: sum(all),
      trainable: sum(trained),
      weights: tensors(size, ...all),
      gradients: flat,
      moments: 2 * flat,
      masters,
      snapshot: tensors(size, ...saved) + 2 * tensors(kept, ...trained) + masters,
    }
  }

  /** What is kept from forward for backward, and what the widest moment of a layer or of the vision tower needs besides. */
  #step(o: Asked, size: number, lora: Adapters | null): { kept: number; transient: number } {
    const { llm, mm_alignment } = this.#settings.config
    const [layer, tower, images, depth] = [this.#layer, this.#tower, o.microBatch, llm.num_hidden_layers]
    const rows = images * ((mm_alignment === 'none' ? 0 : 1) + tower.patches + o.textTokens)
    const width = rows * llm.hidden_size
    const between = this.#parameters.filter((p) => p.part === 'projector' && p.shape.length === 2).slice(0, -1)
    const base =
      tensors(size, images * tower.patches * tower.width) +
      sum(between.map(({ shape: [outputs] }) => 2 * tensors(size, images * tower.patches * outputs))) +
      tensors(size, ...new Array<number>(depth + 2).fill(width)) // the layers' inputs, the last state and the normed one
    const adapted = this.#adapted(lora)
    const inner = new Array<number>(depth).fill(0) // x A^T
    for (const p of adapted) inner[p.layer as number] += tensors(size, rows * (lora?.rank ?? 0))
    const one = rowsOf(size, rows, layer.keeps) + rowsOf(4, rows, layer.keepsF32)
    const brought = Object.entries(layer.adapterMoments).filter(([end]) =>
      adapted.some((p) => isTarget(matrix(p), [end])),
    )
    const moments = [...layer.moments, ...brought.map(([, moment]) => moment)]
    const again = o.recompute ? one + Math.max(0, ...inner) + tensors(size, width) : 0 // one layer at a time, and its result
    const kept = base + (o.recompute ? 0 : depth * one + sum(inner))
    const inTower = Math.max(...tower.moments.map((widths) => rowsOf(size, images * tower.rows, widths)))
    const pixels = tensors(4, images * tower.pixels) + (size === 2 ? tensors(2, images * tower.pixels) : 0)
    const inLayer = Math.max(...moments.map((widths) => rowsOf(size, rows, widths)))
    return { kept, transient: Math.max(inLayer + again, inTower + pixels - kept) } // the tower has nothing to keep
  }
}

const matrix = (p: Parameter): string => p.name.replace(/\.weight$/, '')

/** The loss: its rows and their gradient, a chunk of logits and its gradient, the head's own gradient. */
function headTransient(
  c: { vocab_size: number; hidden_size: number },
  labelled: number,
  size: number,
  trained: boolean,
): number {
  const chunk = Math.min(headChunk(c.vocab_size), labelled)
  const [h, logits] = [labelled * c.hidden_size, chunk * c.vocab_size]
  const own = trained ? tensors(4, c.vocab_size * c.hidden_size) : 0
  return tensors(size, h, h) + tensors(4, logits, labelled) + (size === 2 ? tensors(2, logits) : 0) + own
}

/**
 * Bytes a training step takes, by what they are for.
 * The native allocator's peak on the CPU agrees within 5 % for a small model (ts/test/70.plan.test.ts). Not in it: kernels'
 * scratch, and blocks that lie idle.
 * @param of '7b' or '13b', a folder, the folders of a new model's towers, or a model
 * @throws ERR_CONFIG for settings that cannot be read, ERR_ARGUMENT naming the option that is not as it should be
 */
export const plan = (of: Planned, o: PlanOptions): MemoryPlan => new Planner(of).plan(o)

/** The most samples at once whose step stays below `bytes`; 0 when not even one does. @throws as plan */
export const largestMicroBatch = (of: Planned, o: Omit<PlanOptions, 'microBatch'>, bytes: number): number =>
  new Planner(of).largestMicroBatch(o, bytes)

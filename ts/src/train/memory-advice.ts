/** A run and the memory there is: a warning before it starts, and what to change when memory ran out. */
import os from 'node:os'
import { native } from '../core/native.js'
import type { Dataset } from '../data/dataset.js'
import { hasLora } from '../models/adapters.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { PackedBatch } from '../models/packed-batch.js'
import type { OptimizerState } from '../nn/adamw.js'
import { LORA_RANK } from '../nn/lora.js'
import { AlignGPTError } from '../util/errors.js'
import { Planner, type PlanOptions } from './memory-plan.js'
import type { Phase } from './phases.js'

/** Tokens of an English word, about. */
const TOKENS_PER_WORD = 1.3

/** Options of a run that decide about its memory. */
interface RunOptions {
  out?: string
  microBatch: number
  recompute?: boolean
  optimizerState?: OptimizerState
  offloadOptimizer?: boolean
}

const size = (bytes: number): string =>
  bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`

/** What this process may have: the limit of its container (cgroup), else the machine's. */
function mainMemory(): number {
  const limit = process.constrainedMemory?.() || Number.POSITIVE_INFINITY
  return Math.min(limit, os.totalmem())
}
function deviceMemory(model: AlignGPTNetwork): number {
  if (model.device === 'cpu') return mainMemory()
  const gpu = native.probeCuda()
  return (typeof gpu === 'object' && gpu.memoryBytes) || Number.POSITIVE_INFINITY
}

/** Text of a run's samples: of the data on average, or of the micro-batch with the most rows of a step. */
export function averageText(model: AlignGPTNetwork, data: Dataset, microBatch: number): Text {
  const room = model.config.tokenizer_model_max_length - model.patches - 1
  const tokens = Math.round(data.meanWords * TOKENS_PER_WORD)
  return { microBatch, textTokens: Math.max(1, Math.min(room, tokens)) }
}
export function widestText(model: AlignGPTNetwork, batches: readonly PackedBatch[]): Text {
  const widest = batches.reduce((a, b) => (b.tokens.length > a.tokens.length ? b : a))
  const microBatch = widest.ids.length
  const own = Math.ceil(widest.tokens.length / microBatch) - model.patches - 1
  return { microBatch, textTokens: Math.max(1, own), labelledTokens: Math.ceil(widest.lossRows.length / microBatch) }
}
type Text = Pick<PlanOptions, 'labelledTokens'> & Required<Pick<PlanOptions, 'microBatch' | 'textTokens'>>

/** The plan of a run, as words and against the memory there is. */
export class RunMemory {
  readonly #planner: Planner
  readonly #options: PlanOptions & Text
  readonly #adapters: boolean
  readonly #saves: boolean
  readonly #onGpu: boolean
  readonly #had: () => number
  /** bytes of the model's device, and of the machine */
  readonly #device: number
  readonly #main = mainMemory()

  constructor(model: AlignGPTNetwork, phase: Phase, o: RunOptions, text: Text) {
    this.#planner = new Planner(model)
    const { recompute, optimizerState, offloadOptimizer } = o
    const dtype = model.dtype === 'bf16' ? 'bf16' : 'f32'
    this.#options = { phase: phase.name, dtype, ...text, recompute, optimizerState, offloadOptimizer }
    this.#adapters = hasLora(model)
    this.#saves = o.out !== undefined
    this.#onGpu = model.device !== 'cpu'
    this.#had = () => native.memory(model.device).peak
    this.#device = deviceMemory(model)
  }

  /** Of these settings: bytes on the device, and in main memory beside a GPU. A checkpoint is copied to main memory first. */
  #needs(o: PlanOptions): { device: number; host: number } {
    const { peak, host, snapshot } = this.#planner.plan(o)
    const copy = this.#saves ? snapshot : 0
    return this.#onGpu ? { device: peak, host: host + copy } : { device: peak + copy, host: 0 }
  }

  get #numbers(): string {
    const o = this.#options
    const p = this.#planner.plan(o)
    const offloaded = o.offloadOptimizer ? 0 : 1
    const parts = Object.entries({
      weights: p.weights,
      gradients: p.gradients,
      moments: p.moments * offloaded,
      'f32 rest of bf16 weights': p.masters * offloaded,
      activations: p.activations,
      'the widest moment besides': p.transient,
      'in main memory for the optimizer': p.host,
      'copy while a checkpoint is written': this.#saves ? p.snapshot : 0,
    })
    const said = parts.filter(([, bytes]) => bytes > 0).map(([what, bytes]) => `${what} ${size(bytes)}`)
    return `about ${size(p.peak)} at the peak of a step with micro-batches of ${o.microBatch} x ${o.textTokens} text tokens (${said.join(', ')})`
  }

  /**
   * What would fit into so many bytes of the device, the cheapest first: each allows a larger micro-batch than those before it.
   * Recomputation costs time, offloading more of it, compact moments some precision, adapters train something else.
   */
  #ways(bytes: number): string {
    const now = this.#options
    const bf16 = now.dtype === 'bf16' && now.optimizerState !== 'compact'
    const steps: [boolean, Partial<PlanOptions>][] = [
      [true, {}],
      [!now.recompute, { recompute: true }],
      [bf16, { optimizerState: 'compact' }],
      [this.#onGpu && !now.offloadOptimizer, { offloadOptimizer: true }],
      [now.phase === 'finetune' && !this.#adapters, { lora: { rank: LORA_RANK } }],
    ]
    const ways: string[] = []
    let [changes, best]: [Partial<PlanOptions>, number] = [{}, 0]
    for (const [possible, change] of steps) {
      if (!possible) continue
      changes = { ...changes, ...change }
      const o = { ...now, ...changes }
      const one = this.#needs({ ...o, microBatch: 1 })
      const beside = one.device - this.#planner.plan({ ...o, microBatch: 1 }).peak
      const wanted = Object.keys(changes).length ? now.microBatch : now.microBatch - 1 // the present settings are too much
      const fits = one.host > this.#main ? 0 : this.#planner.largestMicroBatch(o, bytes - beside)
      const most = Math.min(wanted, fits)
      if (most <= best) continue
      best = most
      const named = Object.entries({ ...changes, microBatch: most }).map(([k, v]) => `${k} ${value(v)}`)
      ways.push(named.join(' with '))
      if (most === now.microBatch) break
    }
    return ways.length
      ? `what would fit, the cheapest first: ${ways.join('; ')}`
      : 'no other setting of this model would fit'
  }

  /** A line when the run is planned to need more than there is, else null. */
  warning(): string | null {
    const { device, host } = this.#needs(this.#options)
    const there = [
      ...(device > this.#device ? [`${size(device)} of ${size(this.#device)}`] : []),
      ...(host > this.#main ? [`${size(host)} of ${size(this.#main)} main memory`] : []),
    ]
    if (there.length === 0) return null
    return `the run will hardly fit into memory: ${there.join(' and ')}; ${this.#numbers}; ${this.#ways(this.#device)}`
  }

  /**
   * The error of a run that found no memory. Settings are proposed for what is known to be had: the whole device where more was
   * planned, else what this process had at most so far, as others may use the rest.
   */
  error(cause: AlignGPTError, where: string): AlignGPTError {
    const short = this.#needs(this.#options).device > this.#device
    const bytes = short ? this.#device : Math.min(this.#device, this.#had())
    const message = `[train] out of memory ${where}: ${cause.message}; planned: ${this.#numbers}; in ${size(bytes)}, ${this.#ways(bytes)}`
    return new AlignGPTError('ERR_MEMORY', message, { cause })
  }
}

const value = (v: unknown): string => (typeof v === 'object' ? JSON.stringify(v) : String(v))

/** AdamW over flat buckets, and the learning-rate schedule. */

import { native } from '../core/native.js'
import { cast, reshape, slice, to } from '../core/ops.js'
import { type Device, type Dtype, noGrad, scope, type Tensor, zeros } from '../core/tensor.js'
import { AlignGPTError } from '../util/errors.js'

/** Parameters that are not decayed, by name, as the Hugging Face trainer decides it: biases and norms. */
const NO_DECAY = /bias|layernorm|layer_norm|layrnorm|(?:^|\.)norm(?:$|\.)/

export interface Parameter {
  name: string
  tensor: Tensor
  /** times the schedule's rate, default 1 */
  lrScale?: number
}

/** A tensor of a run and where it is kept. */
export interface StateTensor {
  file: 'weights' | 'optimizer'
  name: string
  tensor: Tensor
  /** U16: bits that are no number of their own */
  stored?: 'U16'
}

/**
 * What is kept of a bf16 parameter besides its 2 bytes.
 * full: f32 gradient, moments and master, 16 bytes. compact: bf16 gradient, bf16 moments rounded stochastically, and the 16
 * bits that its f32 value has more, 8 bytes: the update is still that of the f32 value.
 * f32 parameters have f32 gradients and moments, 12 bytes, in both.
 */
export type OptimizerState = 'full' | 'compact'

/** Pieces of a flat buffer for each dtype, in the shapes of the parameters. */
function bucket(
  parameters: readonly Parameter[],
  dtypes: readonly Dtype[],
  device: Device,
): { flats: Tensor[]; views: Tensor[] } {
  const views = new Array<Tensor>(parameters.length)
  const flats = [...new Set(dtypes)].map((dtype) => {
    const mine = parameters.map((_, i) => i).filter((i) => dtypes[i] === dtype)
    const flat = zeros([mine.reduce((n, i) => n + parameters[i].tensor.numel, 0)], dtype, device)
    let at = 0
    for (const i of mine) {
      const { numel, shape } = parameters[i].tensor
      views[i] = scope(() => reshape(slice(flat, 0, at, at + numel), shape))
      at += numel
    }
    return flat
  })
  return { flats, views }
}

export interface AdamWOptions {
  beta1?: number
  beta2?: number
  eps?: number
  weightDecay?: number
  /** default full */
  state?: OptimizerState
  /** of the stochastic rounding of the compact state */
  seed?: number
  /**
   * moments and masters of parameters on a GPU stay in main memory and the CPU updates them, while gradients and weights travel
   * (ZeRO-Offload, Ren et al. 2021); for models whose state does not fit
   */
  offload?: boolean
}

/** AdamW (Loshchilov & Hutter 2019) with PyTorch's arithmetic; bf16 parameters are updated in f32 (OptimizerState). */
export class AdamW {
  readonly #parameters: readonly Parameter[]
  readonly #gradients: { flats: Tensor[]; views: Tensor[] }
  readonly #moments: { flats: Tensor[]; views: Tensor[] }[]
  readonly #masters: (Tensor | null)[]
  #step = 0

  /** Marks the parameters as wanting gradients and gives them buffers. */
  constructor(
    parameters: readonly Parameter[],
    private readonly o: AdamWOptions = {},
  ) {
    if (parameters.length === 0)
      throw new AlignGPTError('ERR_ARGUMENT', '[AdamW] parameters: expected at least one, got none')
    if (o.state !== undefined && o.state !== 'full' && o.state !== 'compact')
      throw new AlignGPTError('ERR_ARGUMENT', `[AdamW] state: expected full or compact, got ${o.state}`)
    this.#parameters = parameters
    const compact = parameters.map((p) => o.state === 'compact' && p.tensor.dtype === 'bf16')
    const dtypes = compact.map((c) => (c ? 'bf16' : 'f32'))
    const { device } = parameters[0].tensor
    const home = o.offload ? 'cpu' : device
    const master = ({ tensor: p }: Parameter, i: number): Tensor | null => {
      if (p.dtype !== 'bf16') return null
      return scope(() => (compact[i] ? zeros(p.shape, 'bf16', home) : to(cast(p, 'f32'), home)))
    }
    // all of it lives until dispose, or, when memory runs out, none
    const make = () => {
      const gradients = bucket(parameters, dtypes, device)
      const moments = [bucket(parameters, dtypes, home), bucket(parameters, dtypes, home)]
      const masters = parameters.map(master)
      for (const { flats, views } of [gradients, ...moments]) for (const t of [...flats, ...views]) t.persist()
      for (const t of masters) t?.persist()
      return { gradients, moments, masters }
    }
    const { gradients, moments, masters } = scope(() => noGrad(make))
    this.#gradients = gradients
    this.#moments = moments
    this.#masters = masters
    for (const [i, { tensor: p }] of parameters.entries()) {
      p.requiresGrad()
      native.setGrad(p.h, this.#gradients.views[i].h)
    }
  }

  /** Updates made so far. */
  get step(): number {
    return this.#step
  }

  /** What a run must keep besides the weights to go on: moments, and what bf16 weights do not hold. */
  state(): StateTensor[] {
    return this.#parameters.flatMap(({ name, tensor }, i) => {
      const [m, v] = this.#moments.map((b) => b.views[i])
      const list: StateTensor[] = [
        { file: 'optimizer', name: `exp_avg.${name}`, tensor: m },
        { file: 'optimizer', name: `exp_avg_sq.${name}`, tensor: v },
      ]
      const master = this.#masters[i]
      if (master?.dtype === tensor.dtype)
        list.push({ file: 'optimizer', name: `master_low.${name}`, tensor: master, stored: 'U16' })
      else if (master) list.push({ file: 'optimizer', name: `master.${name}`, tensor: master })
      return list
    })
  }

  /** Goes on after `step` updates; the tensors of `state` are filled by the caller. */
  resume(step: number): void {
    this.#step = step
  }

  /** Norm over all gradients; not finite when any element is not. */
  gradientNorm(): number {
    return scope(() => this.#norm(this.#normSquared()))
  }

  #normSquared(): number {
    // a parameter no gradient reached holds zeros, not what was there before
    for (const { tensor: p } of this.#parameters) native.grad(p.h)
    return native.sumSquares(this.#gradients.flats.map((t) => t.h))
  }

  #norm(squared: number): number {
    return Math.sqrt((native.read(squared) as Float64Array)[0])
  }

  /**
   * One update, then the gradients count as zero.
   * @param lr learning rate of this step
   * @param maxNorm gradients are scaled down to this norm (PyTorch's clip_grad_norm_); null: never
   * @returns the norm before clipping
   * @throws ERR_NOT_FINITE before anything is changed
   */
  update(lr: number, maxNorm: number | null = null): number {
    const [m, v] = this.#moments.map((b) => b.views.map((t) => t.h))
    const norm = scope(() => {
      const normSquared = this.#normSquared()
      native.adamw({
        params: this.#parameters.map((p) => p.tensor.h),
        grads: this.#gradients.views.map((t) => t.h),
        masters: this.#masters.map((t) => t?.h ?? null),
        m,
        v,
        lrScale: this.#parameters.map((p) => p.lrScale ?? 1),
        weightDecay: this.#parameters.map((p) => (NO_DECAY.test(p.name) ? 0 : (this.o.weightDecay ?? 0))),
        beta1: this.o.beta1 ?? 0.9,
        beta2: this.o.beta2 ?? 0.999,
        eps: this.o.eps ?? 1e-8,
        lr,
        step: this.#step + 1,
        normSquared,
        maxNorm: maxNorm ?? 0,
        seed: this.o.seed ?? 0,
      })
      return this.#norm(normSquared)
    })
    if (!Number.isFinite(norm))
      throw new AlignGPTError('ERR_NOT_FINITE', `[AdamW] gradient norm: expected a finite number, got ${norm}`)
    this.#step++
    this.zeroGrad()
    return norm
  }

  zeroGrad(): void {
    native.zeroGrad(this.#parameters.map((p) => p.tensor.h))
  }

  /** Frees gradients and moments; the parameters become constants again. */
  dispose(): void {
    for (const { tensor: p } of this.#parameters) if (p.live) p.requiresGrad(false)
    for (const b of [this.#gradients, ...this.#moments]) for (const t of [...b.flats, ...b.views]) t.dispose()
    for (const t of this.#masters) t?.dispose()
  }
}

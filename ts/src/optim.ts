/** AdamW over flat buckets, and the learning-rate schedule. */
import { AlignGPTError } from './errors.js'
import { native } from './native.js'
import { reshape, slice } from './ops.js'
import { noGrad, scope, Tensor, zeros } from './tensor.js'

/** Parameters that are not decayed, by name, as the Hugging Face trainer decides it: biases and norms. */
const NO_DECAY = /bias|layernorm|layer_norm|layrnorm|(?:^|\.)norm(?:$|\.)/

export interface Parameter {
  name: string
  tensor: Tensor
  /** times the schedule's rate, default 1 */
  lrScale?: number
}

/** Pieces of one flat f32 buffer in the shapes of the parameters. */
function bucket(parameters: readonly Parameter[]): { flat: Tensor; views: Tensor[] } {
  const total = parameters.reduce((n, p) => n + p.tensor.numel, 0)
  const flat = zeros([total]).persist()
  let at = 0
  const views = parameters.map((p) => {
    const n = p.tensor.numel
    const view = scope(() => reshape(slice(flat, 0, at, at + n), p.tensor.shape)).persist()
    at += n
    return view
  })
  return { flat, views }
}

/** AdamW (Loshchilov & Hutter 2019) with PyTorch's arithmetic; f32 gradients and moments, an f32 master of bf16 weights. */
export class AdamW {
  readonly #parameters: readonly Parameter[]
  readonly #buckets: { flat: Tensor; views: Tensor[] }[]
  readonly #masters: (Tensor | null)[]
  #step = 0

  /** Marks the parameters as wanting gradients and gives them buffers. */
  constructor(
    parameters: readonly Parameter[],
    private readonly o: { beta1?: number; beta2?: number; eps?: number; weightDecay?: number } = {},
  ) {
    if (parameters.length === 0)
      throw new AlignGPTError('ERR_ARGUMENT', '[AdamW] parameters: expected at least one, got none')
    this.#parameters = parameters
    this.#buckets = noGrad(() => [bucket(parameters), bucket(parameters), bucket(parameters)])
    this.#masters = noGrad(() =>
      parameters.map(({ tensor: p }) => (p.dtype === 'bf16' ? new Tensor(native.cast(p.h, 'f32')).persist() : null)),
    )
    for (const [i, { tensor: p }] of parameters.entries()) {
      p.requiresGrad()
      native.setGrad(p.h, this.#buckets[0].views[i].h)
    }
  }

  get step(): number {
    return this.#step
  }

  /** Norm over all gradients; not finite when any element is not. */
  gradientNorm(): number {
    // a parameter no gradient reached holds zeros, not what was there before
    scope(() => {
      for (const { tensor: p } of this.#parameters) native.grad(p.h)
    })
    return Math.sqrt(native.sumSquares([this.#buckets[0].flat.h]))
  }

  /**
   * One update, then the gradients count as zero.
   * @param lr learning rate of this step
   * @param maxNorm gradients are scaled down to this norm (PyTorch's clip_grad_norm_); null: never
   * @returns the norm before clipping
   * @throws ERR_NOT_FINITE before anything is changed
   */
  update(lr: number, maxNorm: number | null = null): number {
    const norm = this.gradientNorm()
    if (!Number.isFinite(norm))
      throw new AlignGPTError('ERR_NOT_FINITE', `[AdamW] gradient norm: expected a finite number, got ${norm}`)
    const scale = maxNorm === null ? 1 : Math.min(1, maxNorm / (norm + 1e-6))
    const [g, m, v] = this.#buckets.map((b) => b.views.map((t) => t.h))
    native.adamw(
      this.#parameters.map((p) => p.tensor.h),
      g,
      this.#masters.map((t) => t?.h ?? null),
      m,
      v,
      this.#parameters.map((p) => lr * (p.lrScale ?? 1)),
      this.#parameters.map((p) => (NO_DECAY.test(p.name) ? 0 : (this.o.weightDecay ?? 0))),
      this.o.beta1 ?? 0.9,
      this.o.beta2 ?? 0.999,
      this.o.eps ?? 1e-8,
      ++this.#step,
      scale,
    )
    this.zeroGrad()
    return norm
  }

  zeroGrad(): void {
    native.zeroGrad(this.#parameters.map((p) => p.tensor.h))
  }

  /** Frees gradients and moments; the parameters become constants again. */
  dispose(): void {
    for (const { tensor: p } of this.#parameters) if (p.live) p.requiresGrad(false)
    for (const b of this.#buckets) for (const t of [b.flat, ...b.views]) t.dispose()
    for (const t of this.#masters) t?.dispose()
  }
}

/** Linear warm-up from 0, then half a cosine to 0 (transformers' get_cosine_schedule_with_warmup). `step` from 0. */
export function cosineRate(step: number, o: { lr: number; totalSteps: number; warmupRatio: number }): number {
  const warmup = Math.ceil(o.totalSteps * o.warmupRatio)
  if (step < warmup) return (o.lr * step) / Math.max(1, warmup)
  const x = (step - warmup) / Math.max(1, o.totalSteps - warmup)
  return o.lr * Math.max(0, 0.5 * (1 + Math.cos(Math.PI * x)))
}

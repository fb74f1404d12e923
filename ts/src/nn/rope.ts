/** Rotary position embedding (Su et al. 2021): frequencies and tables; the ops turn queries and keys with them. */
import { type Device, type Dtype, type Tensor, tensor } from '../core/tensor.js'

/** Scaling of Llama 3.1; names are those of `rope_scaling` in config.json. */
export interface Llama3RopeScaling {
  rope_type: 'llama3'
  factor: number
  low_freq_factor: number
  high_freq_factor: number
  original_max_position_embeddings: number
}

/** The keys of a language model's config that decide the rotation. */
export interface RopeConfig {
  head_dim: number
  rope_theta: number
  /** null: plain rotary embedding */
  rope_scaling: Llama3RopeScaling | null
}

/**
 * Frequencies of the rotary embedding (f64), default or llama3 scaling.
 * @returns inverse frequencies, dim/2
 */
export function ropeFrequencies(config: RopeConfig): Float64Array {
  const dim = config.head_dim
  const inv = Float64Array.from({ length: dim / 2 }, (_, i) => config.rope_theta ** (-(2 * i) / dim))
  const s = config.rope_scaling
  if (!s) return inv
  // Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
  const low = s.original_max_position_embeddings / s.low_freq_factor
  const high = s.original_max_position_embeddings / s.high_freq_factor
  return inv.map((f) => {
    const wavelength = (2 * Math.PI) / f
    if (wavelength > low) return f / s.factor
    if (wavelength < high) return f
    const smooth =
      (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return ((1 - smooth) * f) / s.factor + smooth * f
  })
}

/** cos and sin [length, dim/2], kept until `dispose`; grows in powers of two. */
export class RopeTable {
  readonly #frequencies: Float64Array
  readonly #dtype: Dtype
  readonly #device: Device
  #length = 0
  #cos: Tensor | undefined
  #sin: Tensor | undefined
  constructor(config: RopeConfig, dtype: Dtype, device: Device) {
    this.#frequencies = ropeFrequencies(config)
    this.#dtype = dtype
    this.#device = device
  }
  /** Tables that cover positions 0..length-1. */
  get(length: number): { cos: Tensor; sin: Tensor } {
    if (!this.#cos || !this.#sin || length > this.#length) {
      this.dispose()
      this.#length = 2 ** Math.ceil(Math.log2(Math.max(length, 64)))
      const half = this.#frequencies.length
      const cos = new Float64Array(this.#length * half)
      const sin = new Float64Array(this.#length * half)
      for (let p = 0; p < this.#length; p++)
        for (let i = 0; i < half; i++) {
          cos[p * half + i] = Math.cos(p * this.#frequencies[i])
          sin[p * half + i] = Math.sin(p * this.#frequencies[i])
        }
      const acc = this.#dtype === 'f64' ? 'f64' : 'f32'
      this.#cos = tensor(cos, [this.#length, half], acc, this.#device).persist()
      this.#sin = tensor(sin, [this.#length, half], acc, this.#device).persist()
    }
    return { cos: this.#cos, sin: this.#sin }
  }
  dispose(): void {
    this.#cos?.dispose()
    this.#sin?.dispose()
    this.#cos = this.#sin = undefined
  }
}

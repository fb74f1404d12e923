/** LLaMA decoder on packed sequences (Touvron et al. 2023; property names are Hugging Face's LlamaForCausalLM). */

import { add, selfAttention, siluMulLinear } from '../core/ops.js'
import { type Device, type Dtype, scope, type Tensor, tensor } from '../core/tensor.js'
import { adjoin, Embedding, Linear, Module, projectQkv, RMSNorm, type Source } from '../nn/module.js'
import type { LlamaConfig } from './config.js'
import type { Cache } from './kv-cache.js'

/** What the layers need to know about the packed batch. */
export interface Packing {
  /** i32 [B+1] */
  offsets: Tensor
  /** i32 [T] position of each row in its sequence */
  positions: Tensor
  cos: Tensor
  sin: Tensor
  /** given while generating: keys and values are appended to it, and attention reads from it */
  cache?: Cache
}

/**
 * Frequencies of the rotary embedding (f64), default or llama3 scaling.
 * @returns inverse frequencies, dim/2
 */
export function ropeFrequencies(config: LlamaConfig): Float64Array {
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
  #frequencies: Float64Array
  #length = 0
  #cos: Tensor | undefined
  #sin: Tensor | undefined
  constructor(
    config: LlamaConfig,
    private readonly dtype: Dtype,
    private readonly device: Device,
  ) {
    this.#frequencies = ropeFrequencies(config)
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
      const acc = this.dtype === 'f64' ? 'f64' : 'f32'
      this.#cos = tensor(cos, [this.#length, half], acc, this.device).persist()
      this.#sin = tensor(sin, [this.#length, half], acc, this.device).persist()
    }
    return { cos: this.#cos, sin: this.#sin }
  }
  dispose(): void {
    this.#cos?.dispose()
    this.#sin?.dispose()
    this.#cos = this.#sin = undefined
  }
}

class LlamaAttention extends Module {
  readonly q_proj: Linear
  readonly k_proj: Linear
  readonly v_proj: Linear
  readonly o_proj: Linear
  #heads: number
  #kvHeads: number
  constructor(s: Source, c: LlamaConfig) {
    super()
    const init = { kind: 'normal', std: c.initializer_range } as const
    const make = (name: string, inputs: number, outputs: number): Linear =>
      new Linear(s.at(name), inputs, outputs, {
        bias: c.attention_bias,
        init,
        biasInit: { kind: 'constant', value: 0 },
      })
    this.#heads = c.num_attention_heads
    this.#kvHeads = c.num_key_value_heads
    this.q_proj = make('q_proj', c.hidden_size, this.#heads * c.head_dim)
    this.k_proj = make('k_proj', c.hidden_size, this.#kvHeads * c.head_dim)
    this.v_proj = make('v_proj', c.hidden_size, this.#kvHeads * c.head_dim)
    this.o_proj = make('o_proj', this.#heads * c.head_dim, c.hidden_size)
    adjoin([this.q_proj, this.k_proj, this.v_proj])
  }
  forward(x: Tensor, p: Packing, layer: number): Tensor {
    const o = { heads: this.#heads, kvHeads: this.#kvHeads, causal: true }
    const layers = [this.q_proj, this.k_proj, this.v_proj] as const
    const qkv = projectQkv(x, layers, { ...o, rope: p, cache: p.cache?.place(layer) })
    return this.o_proj.forward(p.cache ? p.cache.attention(layer, qkv, p.offsets, o) : selfAttention(qkv, p.offsets, o))
  }
}

class LlamaMLP extends Module {
  readonly gate_proj: Linear
  readonly up_proj: Linear
  readonly down_proj: Linear
  constructor(s: Source, c: LlamaConfig) {
    super()
    const o = {
      bias: c.mlp_bias,
      init: { kind: 'normal', std: c.initializer_range },
      biasInit: { kind: 'constant', value: 0 },
    } as const
    this.gate_proj = new Linear(s.at('gate_proj'), c.hidden_size, c.intermediate_size, o)
    this.up_proj = new Linear(s.at('up_proj'), c.hidden_size, c.intermediate_size, o)
    this.down_proj = new Linear(s.at('down_proj'), c.intermediate_size, c.hidden_size, o)
  }
  forward(x: Tensor): Tensor {
    const { weight, bias } = this.down_proj
    const [gate, up] = [this.gate_proj.forward(x), this.up_proj.forward(x)]
    return this.down_proj.adapted(siluMulLinear(gate, up, weight, bias), (a) => siluMulLinear(gate, up, a))
  }
}

export class LlamaDecoderLayer extends Module {
  readonly self_attn: LlamaAttention
  readonly mlp: LlamaMLP
  readonly input_layernorm: RMSNorm
  readonly post_attention_layernorm: RMSNorm
  constructor(s: Source, c: LlamaConfig) {
    super()
    this.self_attn = new LlamaAttention(s.at('self_attn'), c)
    this.mlp = new LlamaMLP(s.at('mlp'), c)
    this.input_layernorm = new RMSNorm(s.at('input_layernorm'), c.hidden_size, c.rms_norm_eps)
    this.post_attention_layernorm = new RMSNorm(s.at('post_attention_layernorm'), c.hidden_size, c.rms_norm_eps)
  }
  /** x [T, H] -> [T, H]; what the halves made on the way lives on only where backward needs it */
  forward(x: Tensor, p: Packing, layer: number): Tensor {
    const h = scope(() => add(x, this.self_attn.forward(this.input_layernorm.forward(x), p, layer)))
    return scope(() => add(h, this.mlp.forward(this.post_attention_layernorm.forward(h))))
  }
}

export class LlamaModel extends Module {
  readonly embed_tokens: Embedding
  readonly layers: LlamaDecoderLayer[]
  readonly norm: RMSNorm
  constructor(s: Source, c: LlamaConfig) {
    super()
    this.embed_tokens = new Embedding(s.at('embed_tokens'), c.vocab_size, c.hidden_size, {
      kind: 'normal',
      std: c.initializer_range,
    })
    this.layers = Array.from(
      { length: c.num_hidden_layers },
      (_, i) => new LlamaDecoderLayer(s.at('layers').at(String(i)), c),
    )
    this.norm = new RMSNorm(s.at('norm'), c.hidden_size, c.rms_norm_eps)
  }
}

/** LLaMA decoder on packed sequences (Touvron et al. 2023; property names are Hugging Face's LlamaForCausalLM). */

import { add, selfAttention, siluMulLinear } from '../core/ops.js'
import { scope, type Tensor } from '../core/tensor.js'
import { fuseQkv, projectQkv } from '../nn/attention.js'
import { Embedding, Linear, RMSNorm } from '../nn/layers.js'
import { Module, type ParameterSource } from '../nn/module.js'
import { RopeTable } from '../nn/rope.js'
import type { LlamaConfig } from './config/llama.js'
import type { LanguageModel, LayerActivations, Packing } from './language-model.js'
import type { Placement } from './parameter-sources.js'

class LlamaAttention extends Module {
  readonly q_proj: Linear
  readonly k_proj: Linear
  readonly v_proj: Linear
  readonly o_proj: Linear
  #heads: number
  #kvHeads: number
  constructor(s: ParameterSource, c: LlamaConfig) {
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
    fuseQkv([this.q_proj, this.k_proj, this.v_proj])
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
  constructor(s: ParameterSource, c: LlamaConfig) {
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
  constructor(s: ParameterSource, c: LlamaConfig) {
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
  constructor(s: ParameterSource, c: LlamaConfig) {
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

/** A LLaMA with its head, as AlignGPT uses a language model. */
export class LlamaForCausalLM extends Module implements LanguageModel {
  readonly model: LlamaModel
  readonly lm_head?: Linear
  readonly #rope: RopeTable
  constructor(s: ParameterSource, c: LlamaConfig, { dtype, device }: Required<Placement>) {
    super()
    this.#rope = new RopeTable(c, dtype, device)
    this.model = new LlamaModel(s.at('model'), c)
    if (!c.tie_word_embeddings || s.holds('lm_head.weight'))
      this.lm_head = new Linear(s.at('lm_head'), c.hidden_size, c.vocab_size, {
        bias: false,
        init: { kind: 'normal', std: c.initializer_range },
      })
  }
  get embeddings(): Tensor {
    return this.model.embed_tokens.weight
  }
  get headWeight(): Tensor {
    return this.lm_head?.weight ?? this.embeddings
  }
  get depth(): number {
    return this.model.layers.length
  }
  layer(index: number, x: Tensor, p: Packing): Tensor {
    return this.model.layers[index].forward(x, p, index)
  }
  norm(x: Tensor): Tensor {
    return this.model.norm.forward(x)
  }
  rotary(length: number): { cos: Tensor; sin: Tensor } {
    return this.#rope.get(length)
  }
  override dispose(): void {
    super.dispose()
    this.#rope.dispose()
  }
}

/**
 * What a layer keeps: queries, keys, values and the attention's result, the row between the halves, gate and up (their product is
 * computed again), and the statistics of norms and attention. The widest moments are attention forward, MLP forward and MLP backward;
 * an adapter of down_proj has a gradient of its own for both inputs.
 */
export function llamaActivations(c: LlamaConfig): LayerActivations {
  const { hidden_size: h, intermediate_size: i, num_attention_heads: heads, head_dim } = c
  const [q, kv] = [heads * head_dim, c.num_key_value_heads * head_dim]
  const backward = [h, i, i]
  return {
    keeps: [q, kv, kv, q, h, i, i],
    keepsF32: [1, 1, heads],
    moments: [[h, q, kv, h], [h, i, h], backward],
    adapterMoments: { down_proj: [...backward, i, i] },
  }
}

/** CLIP's two towers (Radford et al. 2021; property names are Hugging Face's CLIPModel). */

import {
  type Activation,
  add,
  embedding,
  gather,
  l2Normalize,
  patchEmbedding,
  reshape,
  selfAttention,
} from '../core/ops.js'
import { type Device, type Dtype, scope, type Tensor, tensor } from '../core/tensor.js'
import { fuseQkv, projectQkv } from '../nn/attention.js'
import { activationOf, Embedding, LayerNorm, Linear } from '../nn/layers.js'
import { type Init, Module, type ParameterSource } from '../nn/module.js'
import { mismatch } from '../util/errors.js'
import { type ClipConfig, type ClipTextConfig, type ClipVisionConfig, patchCount } from './config/clip.js'
import type { FeatureSelection, TowerActivations, VisionTower } from './vision-tower.js'

interface TowerConfig {
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  hidden_act: string
  layer_norm_eps: number
}

const zero: Init = { kind: 'constant', value: 0 }
const normal = (std: number): Init => ({ kind: 'normal', std })

class CLIPAttention extends Module {
  readonly k_proj: Linear
  readonly v_proj: Linear
  readonly q_proj: Linear
  readonly out_proj: Linear
  #heads: number
  constructor(s: ParameterSource, c: TowerConfig) {
    super()
    const d = c.hidden_size
    const inner = normal(d ** -0.5 * (2 * c.num_hidden_layers) ** -0.5)
    const make = (name: string, init: Init): Linear =>
      new Linear(s.at(name), d, d, { bias: true, init, biasInit: zero })
    this.#heads = c.num_attention_heads
    this.k_proj = make('k_proj', inner)
    this.v_proj = make('v_proj', inner)
    this.q_proj = make('q_proj', inner)
    this.out_proj = make('out_proj', normal(d ** -0.5))
    fuseQkv([this.q_proj, this.k_proj, this.v_proj])
  }
  forward(x: Tensor, offsets: Tensor, causal: boolean): Tensor {
    const o = { heads: this.#heads, kvHeads: this.#heads, causal }
    const qkv = projectQkv(x, [this.q_proj, this.k_proj, this.v_proj], o)
    return this.out_proj.forward(selfAttention(qkv, offsets, o))
  }
}

class CLIPMLP extends Module {
  readonly fc1: Linear
  readonly fc2: Linear
  #activation: Activation
  constructor(s: ParameterSource, c: TowerConfig) {
    super()
    const d = c.hidden_size
    this.#activation = activationOf(c.hidden_act)
    this.fc1 = new Linear(s.at('fc1'), d, c.intermediate_size, {
      bias: true,
      init: normal((2 * d) ** -0.5),
      biasInit: zero,
    })
    this.fc2 = new Linear(s.at('fc2'), c.intermediate_size, d, {
      bias: true,
      init: normal(d ** -0.5 * (2 * c.num_hidden_layers) ** -0.5),
      biasInit: zero,
    })
  }
  forward(x: Tensor): Tensor {
    return this.fc2.forward(this.fc1.forward(x, this.#activation))
  }
}

class CLIPEncoderLayer extends Module {
  readonly self_attn: CLIPAttention
  readonly layer_norm1: LayerNorm
  readonly mlp: CLIPMLP
  readonly layer_norm2: LayerNorm
  constructor(s: ParameterSource, c: TowerConfig) {
    super()
    this.self_attn = new CLIPAttention(s.at('self_attn'), c)
    this.layer_norm1 = new LayerNorm(s.at('layer_norm1'), c.hidden_size, c.layer_norm_eps)
    this.mlp = new CLIPMLP(s.at('mlp'), c)
    this.layer_norm2 = new LayerNorm(s.at('layer_norm2'), c.hidden_size, c.layer_norm_eps)
  }
  forward(x: Tensor, offsets: Tensor, causal: boolean): Tensor {
    const h = add(x, this.self_attn.forward(this.layer_norm1.forward(x), offsets, causal))
    return add(h, this.mlp.forward(this.layer_norm2.forward(h)))
  }
}

class CLIPEncoder extends Module {
  readonly layers: CLIPEncoderLayer[]
  constructor(s: ParameterSource, c: TowerConfig) {
    super()
    const layers = s.at('layers')
    this.layers = Array.from({ length: c.num_hidden_layers }, (_, i) => new CLIPEncoderLayer(layers.at(String(i)), c))
  }
  /** The hidden state after `count` layers. */
  forward(x: Tensor, offsets: Tensor, causal: boolean, count = this.layers.length): Tensor {
    return this.layers.slice(0, count).reduce((h, layer) => scope(() => layer.forward(h, offsets, causal)), x)
  }
}

class CLIPVisionEmbeddings extends Module {
  readonly class_embedding: Tensor
  readonly patch_embedding: ConvWeight
  readonly position_embedding: Embedding
  constructor(s: ParameterSource, c: ClipVisionConfig) {
    super()
    const d = c.hidden_size
    const { patch_size: p, num_channels: channels } = c
    this.class_embedding = s.tensor('class_embedding', [d], normal(d ** -0.5))
    // a Conv2d weight; Module only needs its name
    this.patch_embedding = new ConvWeight(s.at('patch_embedding'), [d, channels, p, p], normal(0.02))
    this.position_embedding = new Embedding(s.at('position_embedding'), patchCount(c) + 1, d, normal(0.02))
  }
  forward(pixels: Tensor): Tensor {
    return patchEmbedding(pixels, this.patch_embedding.weight, this.class_embedding, this.position_embedding.weight)
  }
}

class ConvWeight extends Module {
  readonly weight: Tensor
  constructor(s: ParameterSource, shape: number[], init: Init) {
    super()
    this.weight = s.tensor('weight', shape, init)
  }
}

/** Offsets i32 [n+1] of n sequences of the given lengths. */
export function offsetsOf(lengths: readonly number[]): Tensor {
  const offsets = new Int32Array(lengths.length + 1)
  for (const [i, n] of lengths.entries()) offsets[i + 1] = offsets[i] + n
  return tensor(offsets)
}

export class CLIPVisionTransformer extends Module {
  readonly embeddings: CLIPVisionEmbeddings
  readonly pre_layrnorm: LayerNorm // sic, the published name
  readonly encoder: CLIPEncoder
  readonly post_layernorm: LayerNorm
  #config: ClipVisionConfig
  constructor(s: ParameterSource, c: ClipVisionConfig) {
    super()
    this.#config = c
    this.embeddings = new CLIPVisionEmbeddings(s.at('embeddings'), c)
    this.pre_layrnorm = new LayerNorm(s.at('pre_layrnorm'), c.hidden_size, c.layer_norm_eps)
    this.encoder = new CLIPEncoder(s.at('encoder'), c)
    this.post_layernorm = new LayerNorm(s.at('post_layernorm'), c.hidden_size, c.layer_norm_eps)
  }
  /** pixels [M, 3, S, S] -> hidden state after `layers` layers, packed [M*(P+1), D]; row m*(P+1) is CLS. */
  hidden(pixels: Tensor, layers = this.#config.num_hidden_layers): Tensor {
    const x = this.embeddings.forward(pixels)
    const [images, rows, width] = x.shape
    const offsets = offsetsOf(Array.from({ length: images }, () => rows))
    return this.encoder.forward(this.pre_layrnorm.forward(reshape(x, [images * rows, width])), offsets, false, layers)
  }
  /**
   * What LLaVA feeds the projector: `hidden_states[selectLayer]` without CLS. Layers above it are not computed.
   * @param selectLayer index into the hidden states (0 = embeddings), negative from the end: -2 is LLaVA's
   * @returns [M*P, D]
   */
  features(pixels: Tensor, selectLayer: number, withClass = false): Tensor {
    const n = this.#config.num_hidden_layers
    const h = this.hidden(pixels, selectLayer < 0 ? n + 1 + selectLayer : selectLayer)
    if (withClass) return h
    const images = pixels.shape[0]
    const rows = images ? h.shape[0] / images : 1
    const index = Int32Array.from({ length: images * (rows - 1) }, (_, i) => i + Math.floor(i / (rows - 1)) + 1)
    return gather(h, tensor(index))
  }
  /** pixels -> post-normed CLS rows [M, D] */
  pooled(pixels: Tensor): Tensor {
    const h = this.hidden(pixels)
    const images = pixels.shape[0]
    const rows = images ? h.shape[0] / images : 1
    return this.post_layernorm.forward(gather(h, tensor(Int32Array.from({ length: images }, (_, i) => i * rows))))
  }
}

/** Names of checkpoints have two shells around the tower. */
class Shell extends Module {
  constructor(readonly vision_model: CLIPVisionTransformer) {
    super()
  }
}

/** Image rows P that a selection of the tower's hidden state has. */
export const clipRows = (c: ClipVisionConfig, { feature }: FeatureSelection): number =>
  feature === 'cls_patch' ? patchCount(c) + 1 : patchCount(c)

/** The widest moments of a layer without gradients: attention, and the MLP. */
export function clipActivations(c: ClipVisionConfig): TowerActivations {
  const { hidden_size: d, intermediate_size: i } = c
  const moments = [new Array<number>(6).fill(d), [d, d, i, d]]
  return { rows: patchCount(c) + 1, moments, pixels: c.num_channels * c.image_size ** 2 }
}

/** CLIP's vision tower as LLaVA uses it: one of its hidden states, and only the layers up to it. */
export class CLIPVisionTower extends Module implements VisionTower {
  readonly vision_tower: Shell
  readonly #config: ClipVisionConfig
  readonly #select: FeatureSelection
  constructor(s: ParameterSource, c: ClipVisionConfig, select: FeatureSelection) {
    super()
    this.#config = c
    this.#select = select
    const { num_hidden_layers: n } = c
    if (select.layer > n || select.layer < -n - 1)
      throw mismatch(
        'ERR_CONFIG',
        'config',
        'mm_vision_select_layer',
        `${-n - 1}..${n} of ${n} layers`,
        `${select.layer}`,
      )
    this.vision_tower = new Shell(new CLIPVisionTransformer(s.at('vision_tower').at('vision_model'), c))
  }
  get imageSize(): number {
    return this.#config.image_size
  }
  get rows(): number {
    return clipRows(this.#config, this.#select)
  }
  features(pixels: Tensor): Tensor {
    const { layer, feature } = this.#select
    return this.vision_tower.vision_model.features(pixels, layer, feature === 'cls_patch')
  }
}

class CLIPTextEmbeddings extends Module {
  readonly token_embedding: Embedding
  readonly position_embedding: Embedding
  constructor(s: ParameterSource, c: ClipTextConfig) {
    super()
    this.token_embedding = new Embedding(s.at('token_embedding'), c.vocab_size, c.hidden_size, normal(0.02))
    this.position_embedding = new Embedding(
      s.at('position_embedding'),
      c.max_position_embeddings,
      c.hidden_size,
      normal(0.02),
    )
  }
}

export class CLIPTextTransformer extends Module {
  readonly embeddings: CLIPTextEmbeddings
  readonly encoder: CLIPEncoder
  readonly final_layer_norm: LayerNorm
  #config: ClipTextConfig
  constructor(s: ParameterSource, c: ClipTextConfig) {
    super()
    this.#config = c
    this.embeddings = new CLIPTextEmbeddings(s.at('embeddings'), c)
    this.encoder = new CLIPEncoder(s.at('encoder'), c)
    this.final_layer_norm = new LayerNorm(s.at('final_layer_norm'), c.hidden_size, c.layer_norm_eps)
  }
  /** Index of the row CLIP pools: the first end token; with OpenAI's legacy eos id 2, the highest id. */
  poolIndex(ids: ArrayLike<number>): number {
    const list = Array.from(ids)
    const eos = this.#config.eos_token_id
    if (eos !== 2) return Math.max(list.indexOf(eos), 0)
    return list.indexOf(Math.max(...list))
  }
  /** Texts as token ids (no padding) -> pooled rows [B, D]. */
  pooled(texts: readonly ArrayLike<number>[]): Tensor {
    const ids = Int32Array.from(texts.flatMap((t) => Array.from(t)))
    const positions = Int32Array.from(texts.flatMap((t) => Array.from(t, (_, i) => i)))
    const x = add(
      embedding(tensor(ids), this.embeddings.token_embedding.weight),
      embedding(tensor(positions), this.embeddings.position_embedding.weight),
    )
    const h = this.encoder.forward(x, offsetsOf(texts.map((t) => t.length)), true)
    let at = 0
    const pool = Int32Array.from(texts, (t) => {
      const row = at + this.poolIndex(t)
      at += t.length
      return row
    })
    return this.final_layer_norm.forward(gather(h, tensor(pool)))
  }
}

export class CLIPModel extends Module {
  readonly logit_scale: Tensor
  readonly text_model: CLIPTextTransformer
  readonly vision_model: CLIPVisionTransformer
  readonly visual_projection: Linear
  readonly text_projection: Linear
  constructor(
    s: ParameterSource,
    readonly config: ClipConfig,
    readonly dtype: Dtype = 'f32',
  ) {
    super()
    const { vision, text, projection_dim: d } = config
    this.logit_scale = s.tensor('logit_scale', [], { kind: 'constant', value: config.logit_scale_init_value })
    this.text_model = new CLIPTextTransformer(s.at('text_model'), text)
    this.vision_model = new CLIPVisionTransformer(s.at('vision_model'), vision)
    this.visual_projection = new Linear(s.at('visual_projection'), vision.hidden_size, d, {
      bias: false,
      init: normal(vision.hidden_size ** -0.5),
    })
    this.text_projection = new Linear(s.at('text_projection'), text.hidden_size, d, {
      bias: false,
      init: normal(text.hidden_size ** -0.5),
    })
  }
  get device(): Device {
    return this.logit_scale.device
  }
  /** pixels [M, 3, S, S] -> unit rows [M, projection] */
  imageEmbeds(pixels: Tensor): Tensor {
    return l2Normalize(this.visual_projection.forward(this.vision_model.pooled(pixels)))
  }
  /** token ids (start and end tokens included, not padded) -> unit rows [B, projection] */
  textEmbeds(texts: readonly ArrayLike<number>[]): Tensor {
    return l2Normalize(this.text_projection.forward(this.text_model.pooled(texts)))
  }
}

/** What AlignGPT asks of a language model; every family of the registry (registry.ts) is one. */
import { scope, type Tensor } from '../core/tensor.js'
import type { Linear } from '../nn/layers.js'
import type { Module } from '../nn/module.js'
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

/** What a training step keeps of a layer, for the plan of its memory; a width is the elements of a row [T, ...]. */
export interface LayerActivations {
  /** widths of what is kept for backward besides the layer's input, in the model's dtype */
  keeps: readonly number[]
  /** and in f32 */
  keepsF32: readonly number[]
  /** widths of what is there at once besides, at the moments that may be the widest */
  moments: readonly (readonly number[])[]
  /** such a moment that only an adapter brings, by the end of the name of its matrix */
  adapterMoments: Readonly<Record<string, readonly number[]>>
}

/** Its parameters have Hugging Face's names: `model.*`, `lm_head.*`. */
export interface LanguageModel extends Module {
  readonly model: Module
  /** absent where the token embeddings are the head too */
  readonly lm_head?: Linear
  /** token embeddings [V, H] */
  readonly embeddings: Tensor
  /** projection from hidden states to the vocabulary [V, H] */
  readonly headWeight: Tensor
  /** number of layers */
  readonly depth: number
  /** x [T, H] -> [T, H], by the layer at `index` alone */
  layer(index: number, x: Tensor, p: Packing): Tensor
  /** the norm behind the last layer, [T, H] -> [T, H] */
  norm(x: Tensor): Tensor
  /** rotary tables that cover positions 0..length-1; the model owns them */
  rotary(length: number): { cos: Tensor; sin: Tensor }
}

/** inputs_embeds [T, H] -> last hidden state after the final norm [T, H]. */
export function hiddenStates(language: LanguageModel, embeds: Tensor, p: Packing): Tensor {
  // What a layer made besides its result lives on only where backward needs it, and until it has used it.
  let h = embeds
  for (let i = 0; i < language.depth; i++) {
    const next = scope(() => language.layer(i, h, p))
    if (i > 0) h.dispose()
    h = next
  }
  return language.norm(h)
}

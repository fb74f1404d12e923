/** What AlignGPT asks of a vision tower; every family of the registry (registry.ts) is one. */
import type { Tensor } from '../core/tensor.js'
import type { Module } from '../nn/module.js'
import type { SelectFeature } from './config/variants.js'

/** Which of its hidden states a tower gives to the projector; names are LLaVA's `mm_vision_select_*`. */
export interface FeatureSelection {
  /** index into the hidden states (0 = embeddings), negative from the end: -2 is LLaVA's */
  layer: number
  /** cls_patch: the class row too */
  feature: SelectFeature
}

/** Its parameters have the names they have below `vision_tower.` in an AlignGPT checkpoint. */
export interface VisionTower extends Module {
  /** side of its square images, pixels */
  readonly imageSize: number
  /** image rows P of an image */
  readonly rows: number
  /** pixels [M, 3, S, S] -> [M*P, D] what the projector is fed */
  features(pixels: Tensor): Tensor
}

/** What the rest of the model has to know of a tower before it is built. */
export interface VisionTowerConfig {
  /** D, width of a feature */
  hidden_size: number
  image_size: number
}

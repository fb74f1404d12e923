/** The model as its users have it: the network, and how to get, keep and ask one. */

import {
  type BatchOptions,
  type Generated,
  type GeneratedPiece,
  type GenerateOptions,
  generate,
  generateBatch,
} from './inference/generate.js'
import type { GenerateRequest } from './inference/request.js'
import { AlignGPTNetwork } from './models/aligngpt.js'
import {
  type CreateOptions,
  type LoadedClip,
  type LoadOptions,
  loadClip,
  openFolder,
  openParts,
} from './models/load.js'
import { saveModel } from './models/save.js'
import type { ModelOptions } from './models/settings.js'

export class AlignGPT extends AlignGPTNetwork {
  /** A new AlignGPT from a language model and a CLIP; projector, alignment vectors and gate are initialised from the seed. */
  static async create(o: CreateOptions, load: LoadOptions = {}): Promise<AlignGPT> {
    return new AlignGPT(...openParts(o, load))
  }

  /**
   * Loads an AlignGPT folder in the official layout (as `save` writes it too). Another `alignment` or `gate` than the folder's
   * takes the model up in that variant: a gate of another form and a random table are drawn from the seed.
   * @param o.clip folder of the vision tower's settings where the config's path does not lead there
   */
  static async load(dir: string, o: LoadOptions & ModelOptions & { clip?: string } = {}): Promise<AlignGPT> {
    return new AlignGPT(...openFolder(dir, o))
  }

  /** The whole CLIP this model's vision tower came from, for scoring pairs. The caller disposes it. */
  loadClip(): LoadedClip {
    return loadClip(this.parts.clipDir, { dtype: this.dtype, device: this.device })
  }

  /**
   * Streams the answer to a question about an image; `alpha` of a piece are the weights of the alignment levels.
   * @throws ERR_IMAGE, ERR_DATA
   */
  generate(o: GenerateRequest & GenerateOptions): AsyncGenerator<GeneratedPiece, Generated> {
    return generate(this, o)
  }

  /**
   * Answers many requests at once; the i-th result belongs to the i-th request.
   * @throws ERR_IMAGE, ERR_DATA
   */
  generateBatch(requests: readonly GenerateRequest[], o: BatchOptions = {}): Promise<Generated[]> {
    return generateBatch(this, requests, o)
  }

  /**
   * Writes the model in the official AlignGPT layout: config, tokenizer, weights, the vision tower's settings. Adapters (LoRA)
   * are merged into the weights that are written; the model itself stays as it is.
   */
  async save(dir: string): Promise<void> {
    saveModel(this, dir)
  }
}

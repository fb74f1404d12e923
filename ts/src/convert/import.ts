/** Checkpoints of other layouts (models/names.ts) into AlignGPT folders. */

import { loadTokenizer } from '../models/load.js'
import { type Converted, prepareFolder, ready, summary, writeOwn } from './folder.js'
import type { ConvertOptions } from './tensors.js'

/**
 * Makes an AlignGPT folder of a checkpoint: official AlignGPT, official LLaVA 1.5 or llava-hf (folders, safetensors or `.bin`,
 * sharded or not), or a pre-training's file (`mm_projector_align.bin`, `mm_projector.bin`, .safetensors), which needs `llm` and
 * `clip`.
 * A LLaVA has no alignment vectors: the model is one of the variant `none`, or with `levels` gets new ones for a pre-training.
 * @throws ERR_WEIGHTS, ERR_SHAPE, ERR_DTYPE naming the tensor; ERR_CONFIG; ERR_FORMAT; ERR_ARGUMENT
 */
export async function importModel(from: string, to: string, o: ConvertOptions = {}): Promise<Converted> {
  const model = ready(from, o)
  loadTokenizer(model.llm, model.config.llm.vocab_size) // a folder that cannot be used is not worth gigabytes
  prepareFolder(to)
  writeOwn(model, to)
  return summary(model, to, [])
}

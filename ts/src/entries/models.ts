/** aligngpt/models: CLIP and its scores, tokenizers and their training. */
export { clipScores, type Pair } from '../levels/clip-scores.js'
export { CLIPModel } from '../models/clip.js'
export { loadClip } from '../models/load.js'
export {
  type BpeOptions,
  saveTokenizer,
  type TrainedTokenizer,
  trainBpe,
  trainClipBpe,
} from '../processing/bpe-trainer.js'
export { Tokenizer } from '../processing/tokenizer.js'

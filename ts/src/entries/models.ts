/** aligngpt/models: CLIPs and language models by themselves, CLIP's scores, tokenizers and their training. */
export { clipScores, type Pair } from '../levels/clip-scores.js'
export { CLIPModel } from '../models/clip.js'
export { hiddenStates, type LanguageModel, type Packing } from '../models/language-model.js'
export { createClip, createLanguageModel, loadClip } from '../models/load.js'
export { saveWeights } from '../models/save.js'
export {
  type BpeOptions,
  saveTokenizer,
  type TrainedTokenizer,
  trainBpe,
  trainClipBpe,
} from '../processing/bpe-trainer.js'
export { type PreprocessorConfig, readPreprocessor } from '../processing/preprocessor-config.js'
export { Tokenizer } from '../processing/tokenizer.js'

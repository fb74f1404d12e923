/** What every language model's config.json says, whichever its family; names are those of transformers. */
import type { RawConfig } from '../../formats/zod-check.js'

export interface LanguageModelConfig {
  model_type: string
  vocab_size: number
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  /** at most num_attention_heads, which it divides */
  num_key_value_heads: number
  /** heads * head_dim need not be hidden_size */
  head_dim: number
  max_position_embeddings: number
  initializer_range: number
  tie_word_embeddings: boolean
  bos_token_id: number | null
  /** every id that ends a sequence (Llama 3.1 has several) */
  eos_token_ids: number[]
  pad_token_id: number | null
  /** the file's own content, for writing back */
  raw: RawConfig
}

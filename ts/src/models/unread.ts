/** Tensors of a checkpoint that no parameter takes: a file is read whole or refused, but for the few that CONSTANTS names. */
import type { StoredDtype, TensorEntry } from '../formats/safetensors.js'
import { type AlignGPTError, mismatch } from '../util/errors.js'

/** Constants that old versions of transformers saved among the weights: what they hold, config.json says. */
const CONSTANTS = /(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$/
export const isConstant = (name: string): boolean => CONSTANTS.test(name)

/** What of a CLIP the vision tower does without. */
export const TEXT_TOWER = /^(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)$/

const LAYER = /\blayers\.\d+\./
/** Dtypes that no weight has and packed ones have. */
const PACKED: readonly StoredDtype[] = ['I32', 'U32', 'I16', 'U16', 'I8', 'U8', 'F8_E4M3', 'F8_E5M2', 'I64', 'U64']
const KINDS: readonly [RegExp, string][] = [
  [
    /[._](weight_scale(_2|_inv)?|input_scale|output_scale|[kv]_scale|scales?|qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state.*|SCB|weight_format|weight_packed|weight_shape|weight_g_idx|(weight_|input_)?zero_point|bitsandbytes__\w+|W_q|zero|_data|_scale|_shift|weight_blocks|weight_scales|(down|gate_up)_proj_(blocks|scales))$/,
    'a part of quantized weights: take the checkpoint that is not quantized',
  ],
  [
    /\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b/,
    'an adapter: give its base model, and its folder as adapter',
  ],
  [/^(module|_orig_mod|_fsdp_wrapped_module|_forward_module|base_model)\./, "a wrapper's name: save the module inside"],
  [/[qk]_(norm|layernorm)\./, 'a norm of queries and keys, which such a layer has not'],
  [/(^|\.)(score|classifier|qa_outputs|v_head|value_head|reward_head|regression_head)\b/, 'a head for another task'],
  [/\.bias$/, 'a bias that config.json does not speak of (attention_bias, mlp_bias)'],
]

/** What a tensor is that nobody reads. @param known whether a name is a parameter's */
function whatItIs(name: string, dtype: StoredDtype, known: (name: string) => boolean): string {
  if (LAYER.test(name) && known(name.replace(LAYER, 'layers.0.'))) return 'a layer more than config.json has'
  const found = KINDS.find(([pattern]) => pattern.test(name))
  if (found) return found[1]
  return PACKED.includes(dtype) ? `${dtype}, which no weight is: quantized?` : 'one that nothing would read'
}

/**
 * One of a checkpoint's tensors that cannot be taken.
 * @param name what the model would call it
 * @param others how many more there are
 */
export function unread(e: TensorEntry, known: (name: string) => boolean, name = e.name, others = 0): AlignGPTError {
  const got = `${whatItIs(name, e.dtype, known)}${others ? ` (and ${others} more)` : ''}`
  return mismatch('ERR_WEIGHTS', 'checkpoint', `${e.path}: '${e.name}'`, 'a tensor of such a model', got)
}

/**
 * Refuses a checkpoint with tensors that nothing would read.
 * @param known whether a parameter takes the tensor of this name
 * @param left names that may stay unread, beside the constants
 * @throws ERR_WEIGHTS naming the first, what it seems to be and how many more there are
 */
export function refuseUnread(
  entries: ReadonlyMap<string, TensorEntry>,
  known: (name: string) => boolean,
  left?: RegExp,
): void {
  const all = [...entries].filter(([name]) => !known(name) && !isConstant(name) && !left?.test(name))
  if (all.length) throw unread(all[0][1], known, all[0][0], all.length - 1)
}

/** The `got` of a tensor whose dtype is no weight's. */
export const packed = (dtype: StoredDtype): string =>
  PACKED.includes(dtype) ? `${dtype} (quantized? take the checkpoint that is not)` : dtype

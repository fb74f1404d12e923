/** What a config.json says that this package does not do, refused by name; the reader of every family calls these. */
import { type RawConfig, refuse } from '../../formats/zod-check.js'

/** Ways of quantizing by their name in `quant_method`: what they are called, and how transformers undoes them where it can. */
const UNDONE = 'from_pretrained(FOLDER, quantization_config=%(dequantize=True))'
const METHODS: Record<string, { name: string; undone?: string }> = {
  gptq: { name: 'GPTQ' },
  awq: { name: 'AWQ' },
  bitsandbytes: { name: 'bitsandbytes', undone: 'from_pretrained(FOLDER).dequantize()' },
  'compressed-tensors': {
    name: 'compressed-tensors',
    undone: 'from_pretrained(FOLDER, quantization_config=CompressedTensorsConfig(run_compressed=False))',
  },
  modelopt: { name: 'NVIDIA ModelOpt' },
  fp8: { name: 'FP8 in blocks', undone: UNDONE.replace('%', 'FineGrainedFP8Config') },
  fbgemm_fp8: { name: 'FBGEMM FP8' },
  mxfp4: { name: 'MXFP4', undone: UNDONE.replace('%', 'Mxfp4Config') },
  hqq: { name: 'HQQ', undone: 'from_pretrained(FOLDER).dequantize()' },
  torchao: { name: 'torchao' },
  quanto: { name: 'Quanto' },
  eetq: { name: 'EETQ, 8 bits' },
  aqlm: { name: 'AQLM' },
  bitnet: { name: 'BitNet' },
}
const KEYS = ['quantization_config', 'compression_config', 'quantization']

/** What a section of a config.json, or a file of its own beside it, says of the quantization of weights. */
export function quantizationNamed(section: RawConfig): { name: string; undone?: string } {
  const inner = typeof section.quantization === 'object' && section.quantization ? section.quantization : section
  const q = inner as RawConfig
  const eight = q.load_in_8bit === true || q._load_in_8bit === true
  const four = q.load_in_4bit === true || q._load_in_4bit === true
  const method = String(q.quant_method ?? (eight || four ? 'bitsandbytes' : (q.quant_algo ?? ''))).toLowerCase()
  const known = METHODS[method] ?? { name: method || 'quantized weights' }
  const bits = q.bits ?? q.w_bit ?? q.nbits ?? (four ? 4 : eight ? 8 : undefined)
  return { ...known, name: bits === undefined ? known.name : `${known.name}, ${bits} bits` }
}
/** The `expected` of such a refusal. */
export const unquantized = (undone?: string): string =>
  `weights as they were trained (take the checkpoint that this one was made of${undone ? `, or save what transformers makes of it: ${undone}` : ''})`

/** @throws AlignGPTError ERR_CONFIG when a config.json says that its weights are quantized */
export function refuseQuantized(raw: RawConfig, file: string, prefix = ''): void {
  for (const key of KEYS) {
    const section = raw[key]
    if (neutral(section)) continue
    const { name, undone } = quantizationNamed(typeof section === 'object' ? (section as RawConfig) : {})
    refuse(file, prefix + key, unquantized(undone), name)
  }
}

/** Keys of other models that change what is computed; a name like these with a value that does something is not passed over. */
const COMPUTES = new RegExp(
  [
    'multiplier|softcap|scal(e|ing)|window|experts?|moe|qk_|[qk]_norm|norm_(type|before|after)|layer_?norm|rotary|rope|alibi',
    'bias|residual|parallel|interleav|layer_types|lora_rank|nope|mup|temperature_tuning|clip_qkv|sinks?$|activation|dropout',
    'logit|attn_(type|mode)|position_embedding_type',
  ].join('|'),
)
/** Keys that only look like them. */
const HARMLESS =
  /^(mm_|s2_|image_|tune_|freeze_|unfreeze_|initializer_|logits?_processor|classifier_dropout$|.*_parallel_(size|style|plan)$)/

/** Whether a value does nothing under any usual key: the network without it. */
function neutral(v: unknown): boolean {
  if (v === undefined || v === null || v === false || v === 0 || v === 1 || v === '') return true
  if (Array.isArray(v)) return v.every((x) => x === 'full_attention')
  return typeof v === 'object' && Object.keys(v as object).length === 0
}

/**
 * Refuses keys that no reader takes and that change what is computed.
 * @param known keys that the family's reader takes, or leaves with reason
 * @throws AlignGPTError ERR_CONFIG naming the key
 */
export function refuseUnknown(raw: RawConfig, file: string, known: readonly string[], prefix = ''): void {
  for (const [key, value] of Object.entries(raw))
    if (COMPUTES.test(key) && !HARMLESS.test(key) && !known.includes(key) && !KEYS.includes(key) && !neutral(value))
      refuse(file, prefix + key, 'nothing (this package has no such computation)', value)
}

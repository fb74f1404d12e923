/** The tensors of a checkpoint, in whichever files Hugging Face folders have them. */
import fs from 'node:fs'
import path from 'node:path'
import { mismatch, show } from '../util/errors.js'
import { readJsonFile } from '../util/json.js'
import { openSafetensors, type TensorEntry } from './safetensors.js'
import { openTorchBin } from './torchbin.js'

/** Any weights file by its content: a safetensors file or a PyTorch zip checkpoint. */
function openWeightsFile(file: string): Map<string, TensorEntry> {
  if (/\.gguf$/i.test(file))
    throw mismatch('ERR_FORMAT', 'checkpoint', file, 'safetensors or PyTorch weights', 'GGUF, quantized for llama.cpp')
  return /\.(bin|pt|pth)$/i.test(file) ? openTorchBin(file) : openSafetensors(file).entries
}

function openShards(index: string): Map<string, TensorEntry> {
  const raw = readJsonFile(index, 'ERR_FORMAT') as { weight_map?: unknown } | null
  const map = raw?.weight_map
  if (typeof map !== 'object' || map === null || Array.isArray(map))
    throw mismatch('ERR_FORMAT', 'checkpoint', `${index} weight_map`, 'an object: tensor name -> file', show(map))
  const all = new Map<string, TensorEntry>()
  const shards = new Map<string, Map<string, TensorEntry>>()
  const wanted = [...new Set(Object.values(map))].filter((f): f is string => typeof f === 'string')
  const missing = wanted.filter((f) => f === path.basename(f) && !fs.existsSync(path.join(path.dirname(index), f)))
  if (missing.length)
    throw mismatch('ERR_FORMAT', 'checkpoint', index, `its ${wanted.length} files`, `none called ${missing.join(', ')}`)
  for (const [name, shard] of Object.entries(map)) {
    if (typeof shard !== 'string' || shard === '' || shard !== path.basename(shard) || shard === '..' || shard === '.')
      throw mismatch(
        'ERR_FORMAT',
        'checkpoint',
        `${index}: ${show(name)}`,
        'a file name in the same folder',
        show(shard),
      )
    if (!shards.has(shard)) shards.set(shard, openWeightsFile(path.join(path.dirname(index), shard)))
    if (!shards.get(shard)?.has(name))
      throw mismatch('ERR_FORMAT', 'checkpoint', `${index}: ${show(name)}`, `a tensor in ${shard}`, 'none')
  }
  for (const [shard, entries] of shards)
    for (const [name, e] of entries) {
      if (all.has(name)) throw mismatch('ERR_FORMAT', 'checkpoint', `${shard}: ${show(name)}`, 'one shard', 'two')
      all.set(name, e)
    }
  return all
}

const NAMES = ['model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json']
/** Files beside the weights that say how they are quantized. */
const QUANTIZED = ['hf_quant_config.json', 'quantize_config.json', 'quant_config.json', 'quantization_config.json']
/** What lies in a folder without weights that are read, and what to do about it. */
const OTHERS: readonly [RegExp, string][] = [
  [/^adapter_(config\.json|model\..*)$/, 'an adapter: give the model it belongs to, and this folder as its adapter'],
  [/\.gguf$/i, 'GGUF, quantized for llama.cpp: take the checkpoint that it was made of'],
  [
    /^consolidated.*\.(pth|safetensors)$/,
    "Meta's or Mistral's own files: take the folder that transformers reads (-hf)",
  ],
  [/^pytorch_model_fsdp.*\.bin$/, 'weights of FSDP: name the file pytorch_model.bin where it is a whole state dict'],
  [/^(pytorch_model_fsdp_\d+|.*\.distcp)$/, 'shards of FSDP: accelerate merge-weights makes safetensors of them'],
  [
    /^(global_step\d+|zero_to_fp32\.py|latest)$/,
    'a checkpoint of DeepSpeed: python zero_to_fp32.py . makes weights of it',
  ],
  [/^(tf_model.*\.h5|flax_model.*\.msgpack|.*\.onnx)$/, 'weights for another framework: save them from PyTorch'],
  [/\.(safetensors|bin|pt|pth)$/, 'weights under another name'],
]

/** A folder's weights file. @throws AlignGPTError ERR_FORMAT naming what is there in its place */
function weightsIn(folder: string): string {
  const files = fs.existsSync(folder) ? fs.readdirSync(folder) : null
  const quantized = files?.find((name) => QUANTIZED.includes(name))
  if (quantized)
    throw mismatch(
      'ERR_FORMAT',
      'checkpoint',
      path.join(folder, quantized),
      'weights as they were trained (take the checkpoint that this one was made of)',
      'quantized ones, as this file says',
    )
  const found = NAMES.find((name) => files?.includes(name))
  if (found) return path.join(folder, found)
  const other = OTHERS.flatMap(([pattern, what]) => {
    const name = files?.find((f) => pattern.test(f))
    return name === undefined ? [] : [`${name} (${what})`]
  })[0]
  throw mismatch(
    'ERR_FORMAT',
    'checkpoint',
    folder,
    NAMES.join(' or '),
    other ?? (files ? 'none of them' : 'no such folder'),
  )
}

/**
 * Tensors of a Hugging Face checkpoint: a folder with `model.safetensors`, `model.safetensors.index.json` and shards,
 * `pytorch_model.bin` or `pytorch_model.bin.index.json` and shards (looked for in this order), or one weights file.
 * @throws AlignGPTError ERR_FORMAT
 */
export function openCheckpoint(folder: string): Map<string, TensorEntry> {
  const isFile = fs.statSync(folder, { throwIfNoEntry: false })?.isFile()
  const file = isFile ? folder : weightsIn(folder)
  return file.endsWith('.index.json') ? openShards(file) : openWeightsFile(file)
}

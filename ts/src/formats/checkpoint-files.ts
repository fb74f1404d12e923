/** The tensors of a checkpoint, in whichever files Hugging Face folders have them. */
import fs from 'node:fs'
import path from 'node:path'
import { mismatch, show } from '../util/errors.js'
import { readJsonFile } from '../util/json.js'
import { openSafetensors, type TensorEntry } from './safetensors.js'
import { openTorchBin } from './torchbin.js'

/** Any weights file by its content: a safetensors file or a PyTorch zip checkpoint. */
function openWeightsFile(file: string): Map<string, TensorEntry> {
  return /\.(bin|pt|pth)$/i.test(file) ? openTorchBin(file) : openSafetensors(file).entries
}

function openShards(index: string): Map<string, TensorEntry> {
  const raw = readJsonFile(index, 'ERR_FORMAT') as { weight_map?: unknown } | null
  const map = raw?.weight_map
  if (typeof map !== 'object' || map === null || Array.isArray(map))
    throw mismatch('ERR_FORMAT', 'checkpoint', `${index} weight_map`, 'an object: tensor name -> file', show(map))
  const all = new Map<string, TensorEntry>()
  const shards = new Map<string, Map<string, TensorEntry>>()
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

/**
 * Tensors of a Hugging Face checkpoint: a folder with `model.safetensors`, `model.safetensors.index.json` and shards,
 * `pytorch_model.bin` or `pytorch_model.bin.index.json` and shards (looked for in this order), or one weights file.
 * @throws AlignGPTError ERR_FORMAT
 */
export function openCheckpoint(folder: string): Map<string, TensorEntry> {
  const info = fs.statSync(folder, { throwIfNoEntry: false })
  if (info?.isFile()) return folder.endsWith('.index.json') ? openShards(folder) : openWeightsFile(folder)
  const names = [
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
  ]
  const found = names.find((n) => fs.existsSync(path.join(folder, n)))
  if (!found)
    throw mismatch('ERR_FORMAT', 'checkpoint', folder, names.join(' or '), info ? 'none of them' : 'no such folder')
  const file = path.join(folder, found)
  return found.endsWith('.json') ? openShards(file) : openWeightsFile(file)
}

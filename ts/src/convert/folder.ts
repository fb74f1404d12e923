/** A model that is ready to be written, and AlignGPT's own layout of it. */

import fs from 'node:fs'
import path from 'node:path'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { type StoredDtype, type TensorEntry, writeSafetensors } from '../formats/safetensors.js'
import { type RawConfig, writeConfigFile } from '../formats/zod-check.js'
import { alignGPTConfigJson } from '../models/config/aligngpt.js'
import type { Alignment } from '../models/config/variants.js'
import { EMBED_TOKENS, type Format } from '../models/names.js'
import { copyFiles, LLM_FILES } from '../models/save.js'
import { fail, hasWeights, levelsOf, openModel, projectorFileIn, type Stored } from './open-foreign.js'
import { type ConvertOptions, type Item, items, toWrite } from './tensors.js'

/** What was read and written. */
export interface Converted {
  from: Format | 'projector'
  /** how many tensors, and their bytes */
  tensors: number
  bytes: number
  alignment: Alignment
  /** tensors drawn from the seed */
  fresh: string[]
  /** alignment vectors and gate that were left out */
  dropped: string[]
}

/** A model that is ready to be written. */
export interface Ready extends Stored {
  all: Item[]
  levels: number
  alignment: Alignment
}

/** A folder is written once: its config.json, which says that it is there, comes last. */
export function prepareFolder(to: string): void {
  fs.mkdirSync(to, { recursive: true })
  const there = hasWeights(to) || projectorFileIn(to) || fs.existsSync(path.join(to, 'config.json'))
  if (there) throw fail('ERR_ARGUMENT', 'to', 'a folder without a model', to)
}

const torchNames: Partial<Record<StoredDtype, string>> = {
  F32: 'float32',
  BF16: 'bfloat16',
  F16: 'float16',
  F64: 'float64',
}

/** AlignGPT's config.json of what is written. */
export function ownConfig({ config, all, levels, alignment }: Ready): RawConfig {
  const embeds = all.find(({ name }) => name === EMBED_TOKENS) as Item
  const fields = {
    mm_hidden_size: config.mm_hidden_size,
    mm_projector_type: config.mm_projector_type,
    mm_vision_select_layer: config.mm_vision_select_layer,
    mm_vision_tower: 'vision_tower',
    mm_alignment: alignment,
    ...(alignment !== 'none' && { n_indicators: levels }),
  }
  return alignGPTConfigJson(config.llm.raw, fields, torchNames[embeds.dtype])
}

export function writeOwn(m: Ready, to: string): void {
  writeSafetensors(
    path.join(to, 'model.safetensors'),
    m.all.map((item) => toWrite(item)),
    { format: 'pt' },
  )
  copyFiles(m.llm, to, LLM_FILES)
  const tower = path.join(to, 'vision_tower')
  fs.mkdirSync(tower, { recursive: true })
  writeConfigFile(path.join(tower, 'config.json'), m.clip.raw)
  if (m.preprocessor) writeConfigFile(path.join(tower, 'preprocessor_config.json'), m.preprocessor)
  writeConfigFile(path.join(to, 'config.json'), ownConfig(m))
}

export function ready(from: string, o: ConvertOptions): Ready {
  const stored = openModel(from, o)
  const { levels, alignment } = levelsOf(stored, o.levels)
  return { ...stored, levels, alignment, all: items(stored, o, levels, alignment) }
}

export function summary(m: Ready, to: string, dropped: string[]): Converted {
  const fresh = m.all.filter(({ drawn }) => drawn).map(({ name }) => name)
  const written = openWritten(to)
  const bytes = written.reduce((n, e) => n + e.bytes, 0)
  return { from: m.format, tensors: written.length, bytes, alignment: m.alignment, fresh, dropped }
}
const openWritten = (to: string): TensorEntry[] => [
  ...openCheckpoint(hasWeights(to) ? to : (projectorFileIn(to) as string)).values(),
]

/** Checkpoints of any layout (layouts.ts) as this package would have them: its names, its settings. No tensor is read yet. */

import fs from 'node:fs'
import path from 'node:path'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import type { TensorEntry } from '../formats/safetensors.js'
import { loadConfig, type RawConfig, readJsonObject } from '../formats/zod-check.js'
import { partOf } from '../models/aligngpt.js'
import {
  type AlignGPTConfig,
  alignGPTConfigJson,
  parseAlignGPTConfig,
  visionTowerFolder,
} from '../models/config/aligngpt.js'
import { type ClipConfig, parseClipConfig, readClipConfig } from '../models/config/clip.js'
import { readLlamaConfig } from '../models/config/llama.js'
import { type Alignment, MODEL_DEFAULTS } from '../models/config/variants.js'
import { type Format, TABLE, VISION } from '../models/names.js'
import { openNamed } from '../models/parameter-sources.js'
import { projectorTypeOf } from '../models/projector.js'
import { isConstant, refuseUnread, TEXT_TOWER } from '../models/unread.js'
import { preprocessorJson } from '../processing/preprocessor-config.js'
import { mismatch, show } from '../util/errors.js'
import { unreadable } from '../util/file-kind.js'
import { settingsOf } from './foreign-config.js'

/** A model on disk: settings, and where each weight lies, under our names. */
export interface Stored {
  format: Format | 'projector'
  config: AlignGPTConfig
  clip: ClipConfig
  /** content of preprocessor_config.json; null: CLIP's defaults */
  preprocessor: RawConfig | null
  /** the tokenizer's folder */
  llm: string
  weights: Map<string, TensorEntry>
}

/** Where the parts are that a checkpoint may lack. */
interface Towers {
  clip?: string
  llm?: string
}

/** Whether a tensor of this name is alignment vectors or gate: what a LLaVA has not. */
export const isAlignment = (name: string): boolean => ['table', 'gate'].includes(partOf(name))
/** What pre-trainings leave, the official codes' and this one's. */
export const PROJECTOR_FILES = ['mm_projector_align', 'mm_projector'].flatMap((n) => [`${n}.safetensors`, `${n}.bin`])
export const fail = (code: string, what: string, expected: string, got: string): Error =>
  mismatch(code, 'convert', what, expected, got)

const CLIP_TOWER = 'vision_model.'
/** Weights of a CLIP folder's vision tower under our names. @throws ERR_WEIGHTS: a tensor that no CLIP has */
function towerWeights(dir: string): [string, TensorEntry][] {
  const entries = openCheckpoint(dir)
  refuseUnread(entries, (name) => name.startsWith(CLIP_TOWER), TEXT_TOWER)
  const own = [...entries].filter(([name]) => name.startsWith(CLIP_TOWER) && !isConstant(name))
  return own.map(([name, e]) => [VISION + name.slice(CLIP_TOWER.length), e])
}

export const projectorFileIn = (dir: string): string | undefined =>
  PROJECTOR_FILES.map((f) => path.join(dir, f)).find((f) => fs.existsSync(f))
export const hasWeights = (dir: string): boolean =>
  fs.readdirSync(dir).some((f) => /^(model|pytorch_model)\.(safetensors|bin)(\.index\.json)?$/.test(f))

/**
 * Opens a folder in any layout, or what a pre-training left.
 * @param o.clip CLIP folder, for what the checkpoint has not of its vision tower
 * @param o.llm LLaMA folder, for a projector alone
 * @throws ERR_FORMAT, ERR_CONFIG, ERR_WEIGHTS, ERR_ARGUMENT
 */
export function openModel(from: string, o: Towers): Stored {
  const info = fs.statSync(from, { throwIfNoEntry: false })
  if (!info) throw fail('ERR_FORMAT', from, 'a checkpoint', unreadable(from))
  if (info.isFile()) return openProjector(from, o)
  const projector = hasWeights(from) ? undefined : projectorFileIn(from)
  if (projector) return openProjector(projector, o)
  if (o.llm !== undefined) throw fail('ERR_ARGUMENT', 'llm', `nothing, ${from} has a language model`, o.llm)
  const { raw: theirs, file } = loadConfig(from, 'config.json')
  const { format, raw, clip: own } = settingsOf(theirs, file)
  const config = parseAlignGPTConfig(raw, file)
  const weights = openNamed(from)
  const clipDir = own ? null : visionTowerFolder(from, config, o.clip)
  if (![...weights.keys()].some((name) => name.startsWith(VISION))) {
    if (!clipDir) throw fail('ERR_WEIGHTS', from, 'a vision tower', 'none')
    for (const [name, e] of towerWeights(clipDir)) weights.set(name, e)
  }
  const clip = own ? parseClipConfig(own, file) : readClipConfig(clipDir as string)
  return { format, config, clip, preprocessor: preprocessorJson(clipDir ?? from)?.raw ?? null, llm: from, weights }
}

/** A file of a pre-training, put onto the language model and the CLIP that it was trained between. */
function openProjector(file: string, { llm, clip: clipDir }: Towers): Stored {
  if (llm === undefined || clipDir === undefined)
    throw fail('ERR_ARGUMENT', `${file} holds a projector alone`, 'the folders of its language model and CLIP', 'none')
  const weights = openNamed(file)
  for (const name of weights.keys())
    if (partOf(name) !== 'projector' && !isAlignment(name))
      throw fail('ERR_WEIGHTS', `${file}: '${name}'`, 'tensors of projector, alignment vectors and gate', 'another')
  const clip = readClipConfig(clipDir)
  const settings = path.join(path.dirname(file), 'config.json')
  const beside = fs.existsSync(settings) ? settingsOf(readJsonObject(settings), settings).raw : {}
  const llama = readLlamaConfig(llm).raw
  const fields = {
    mm_vision_select_layer: -2,
    ...Object.fromEntries(Object.entries(beside).filter(([k]) => /^mm_(vision_select_.*|gate_.*|alignment)$/.test(k))),
    mm_hidden_size: clip.vision.hidden_size,
    mm_projector_type: projectorTypeOf(weights.keys()),
    mm_vision_tower: 'vision_tower',
    ...(weights.has(TABLE) ? {} : { mm_alignment: 'none' as const }),
  }
  for (const [name, e] of [...openNamed(llm), ...towerWeights(clipDir)]) if (!weights.has(name)) weights.set(name, e)
  const config = parseAlignGPTConfig(alignGPTConfigJson(llama, fields), settings)
  return { format: 'projector', config, clip, preprocessor: preprocessorJson(clipDir)?.raw ?? null, llm, weights }
}

/** How many levels there are or shall be, and what that makes of a model without alignment vectors. */
export function levelsOf(s: Stored, wanted?: number): { levels: number; alignment: Alignment } {
  const stored = s.weights.get(TABLE)?.shape[0]
  const { mm_alignment } = s.config
  if (wanted !== undefined && !(Number.isInteger(wanted) && wanted >= 2))
    throw fail('ERR_ARGUMENT', 'levels', 'an integer >= 2', show(wanted))
  if (stored !== undefined && wanted !== undefined && stored !== wanted)
    throw fail('ERR_ARGUMENT', 'levels', `the ${stored} that ${TABLE} has`, `${wanted}`)
  const alignment = wanted !== undefined && stored === undefined ? 'adaptive' : mm_alignment
  return { levels: stored ?? wanted ?? s.config.n_indicators ?? MODEL_DEFAULTS.levels, alignment }
}

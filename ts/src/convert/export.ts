/** AlignGPT folders into the layouts of others (models/names.ts). */

import fs from 'node:fs'
import path from 'node:path'
import { writeSafetensors } from '../formats/safetensors.js'
import { type RawConfig, readJsonObject, writeConfigFile } from '../formats/zod-check.js'
import { partOf } from '../models/aligngpt.js'
import { type Format, nameIn } from '../models/names.js'
import { copyFiles, LLM_FILES } from '../models/save.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { writeJsonFile } from '../util/json.js'
import { type Converted, ownConfig, prepareFolder, type Ready, ready, summary, writeOwn } from './folder.js'
import { hfConfigJson, llavaConfigJson } from './foreign-config.js'
import { fail, isAlignment, PROJECTOR_FILES } from './open-foreign.js'
import { type ConvertOptions, toWrite, withRows } from './tensors.js'

export interface ExportOptions extends ConvertOptions {
  /** official AlignGPT, official LLaVA 1.5, transformers' LlavaForConditionalGeneration, or the projector by itself */
  format: Format | 'projector'
  /** write a model with alignment vectors as one without: its answers change */
  dropAlignment?: boolean
  /** llava: folder or Hub name that the official code takes the vision tower from */
  visionTower?: string
}
/** The Hub name of the CLIP that the official code is to load: the vision tower has not been trained. */
function towerName({ config, clip: { vision: v } }: Ready, given?: string): string {
  if (given !== undefined) return given
  if (config.mm_vision_tower && !config.visionTowerPath && config.mm_vision_tower !== 'vision_tower')
    return config.mm_vision_tower
  if (v.hidden_size === 1024 && v.image_size === 336 && v.patch_size === 14 && v.num_hidden_layers === 24)
    return 'openai/clip-vit-large-patch14-336'
  throw fail('ERR_ARGUMENT', 'visionTower', 'a folder or Hub name for the official code to load CLIP from', 'none')
}

function writeLlava(m: Ready, to: string, visionTower?: string): void {
  const config = llavaConfigJson(ownConfig(m), towerName(m, visionTower))
  const tensors = m.all.map((item) => toWrite(item, nameIn('llava', item.name) as string))
  writeSafetensors(path.join(to, 'model.safetensors'), tensors, { format: 'pt' })
  copyFiles(m.llm, to, LLM_FILES)
  writeConfigFile(path.join(to, 'config.json'), config)
}

const IMAGE = '<image>'

/** The id that llava-hf's `<image>` has or shall have, and how many rows the tables of tokens need for it. */
function imageToken(m: Ready): { id: number; rows: number; add: boolean } {
  const tokenizer = Tokenizer.load(m.llm)
  const known = tokenizer.tokenToId(IMAGE)
  let id = known ?? tokenizer.vocabSize
  if (known === undefined) while (tokenizer.idToToken(id) !== undefined) id++
  return { id, rows: Math.max(m.config.llm.vocab_size, id + 1), add: known === undefined }
}

/** Makes `<image>` a token in a copy of the tokenizer's files. */
function addImageToken(dir: string, id: number): void {
  const token = { content: IMAGE, lstrip: false, normalized: false, rstrip: false, single_word: false, special: true }
  const edit = (name: string, change: (json: RawConfig) => RawConfig): void => {
    const file = path.join(dir, name)
    writeJsonFile(file, change(fs.existsSync(file) ? readJsonObject(file) : {}))
  }
  if (fs.existsSync(path.join(dir, 'tokenizer.json')))
    edit('tokenizer.json', (j) => ({ ...j, added_tokens: [...((j.added_tokens as object[]) ?? []), { id, ...token }] }))
  else edit('added_tokens.json', (j) => ({ ...j, [IMAGE]: id }))
  edit('tokenizer_config.json', (j) => {
    const decoder = j.added_tokens_decoder as object | undefined
    return decoder ? { ...j, added_tokens_decoder: { ...decoder, [id]: token } } : j
  })
}

function writeHf(m: Ready, to: string): void {
  const { id, rows, add } = imageToken(m)
  const config = hfConfigJson({ ...m.config, llm: { ...m.config.llm, raw: ownConfig(m) } }, m.clip, id, rows)
  const grown = rows > m.config.llm.vocab_size ? /^(model\.embed_tokens|lm_head)\.weight$/ : /^$/
  const tensors = m.all
    .map((item) => (grown.test(item.name) ? withRows(item, rows) : item))
    .map((item) => toWrite(item, nameIn('llava-hf', item.name) as string))
  writeSafetensors(path.join(to, 'model.safetensors'), tensors, { format: 'pt' })
  copyFiles(m.llm, to, LLM_FILES)
  if (add) addImageToken(to, id)
  const { image_size: side, patch_size } = m.clip.vision
  writeConfigFile(path.join(to, 'preprocessor_config.json'), {
    size: { shortest_edge: side },
    crop_size: { height: side, width: side },
    ...m.preprocessor,
    image_processor_type: 'CLIPImageProcessor',
    processor_class: 'LlavaProcessor',
  })
  writeJsonFile(path.join(to, 'processor_config.json'), {
    processor_class: 'LlavaProcessor',
    image_token: IMAGE,
    patch_size,
    num_additional_image_tokens: 1, // the class row, which the strategy then drops or keeps
    vision_feature_select_strategy: config.vision_feature_select_strategy,
  })
  writeConfigFile(path.join(to, 'config.json'), config)
}

function writeProjector(m: Ready, to: string): void {
  const parts = m.all.filter(({ name }) => partOf(name) === 'projector' || isAlignment(name))
  const name = parts.some((p) => isAlignment(p.name)) ? PROJECTOR_FILES[0] : PROJECTOR_FILES[2]
  writeSafetensors(
    path.join(to, name),
    parts.map((item) => toWrite(item)),
    { format: 'pt' },
  )
  writeConfigFile(path.join(to, 'config.json'), ownConfig(m))
}

/**
 * Writes a model in another layout, always as safetensors. The LLaVA formats have no alignment vectors.
 * @throws as `importModel`; ERR_ARGUMENT for a model with alignment vectors in a format without, unless `dropAlignment`
 */
export async function exportModel(from: string, to: string, o: ExportOptions): Promise<Converted> {
  const model = ready(from, o)
  const drops = o.dropAlignment || (o.format !== 'aligngpt' && model.alignment === 'none')
  if (drops && o.format === 'aligngpt')
    throw fail('ERR_ARGUMENT', 'dropAlignment', 'another format than aligngpt', 'it')
  if (!drops && (o.format === 'llava' || o.format === 'llava-hf'))
    throw fail(
      'ERR_ARGUMENT',
      `${o.format} has no alignment vectors: model`,
      "one of the variant 'none', or dropAlignment (--drop-alignment)",
      `'${model.alignment}'`,
    )
  const dropped = drops ? model.all.filter(({ name }) => isAlignment(name)).map(({ name }) => name) : []
  const kept = model.all.filter(({ name }) => !dropped.includes(name))
  const left: Ready = { ...model, all: kept, alignment: drops ? 'none' : model.alignment }
  prepareFolder(to)
  if (o.format === 'aligngpt') writeOwn(left, to)
  else if (o.format === 'llava') writeLlava(left, to, o.visionTower)
  else if (o.format === 'llava-hf') writeHf(left, to)
  else writeProjector(left, to)
  return summary(left, to, dropped)
}

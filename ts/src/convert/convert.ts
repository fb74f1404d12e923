/**
 * Checkpoints of other layouts (layouts.ts) into AlignGPT folders and back. Tensors go from file to file one at a time; where
 * only the name changes, their bytes are copied.
 */

import fs from 'node:fs'
import path from 'node:path'
import { cast, concat, fill, matmul } from '../core/ops.js'
import { type Dtype, scope, type Tensor, zeros } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import {
  floatToHalf,
  type StoredDtype,
  type TensorEntry,
  type TensorToWrite,
  writeSafetensors,
} from '../formats/safetensors.js'
import { type RawConfig, readJsonObject, writeConfigFile } from '../formats/zod-check.js'
import { AlignGPTNetwork } from '../models/aligngpt.js'
import { type Alignment, alignGPTConfigJson } from '../models/config/aligngpt.js'
import { type Format, nameIn } from '../models/names.js'
import { checkEntry, readTensor } from '../models/parameter-sources.js'
import { openAdapter } from '../models/peft.js'
import { copyFiles, LLM_FILES } from '../models/save.js'
import { merged } from '../nn/lora.js'
import { initialize } from '../nn/module.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { show } from '../util/errors.js'
import { readRange, withFile, writeAll } from '../util/files.js'
import { writeJsonFile } from '../util/json.js'
import { hfConfigJson, llavaConfigJson } from './foreign-config.js'
import {
  ALIGNMENT,
  fail,
  hasWeights,
  levelsOf,
  openModel,
  PROJECTOR,
  PROJECTOR_FILES,
  projectorFileIn,
  type Stored,
  TABLE,
} from './open-foreign.js'

export interface ConvertOptions {
  /** CLIP folder: settings of the vision tower where the checkpoint's do not lead to any, weights where it has none */
  clip?: string
  /** LLaMA folder, for a file that holds a projector and no language model */
  llm?: string
  /** of the weights written; default: each as it is stored */
  dtype?: 'f32' | 'bf16'
  /** N: draw alignment vectors and a gate where there are none, to be pre-trained */
  levels?: number
  /** of what is drawn */
  seed?: number
  /** folder of a LoRA adapter to merge (`saveAdapter`'s or PEFT's) */
  adapter?: string
}
export interface ExportOptions extends ConvertOptions {
  /** official AlignGPT, official LLaVA 1.5, transformers' LlavaForConditionalGeneration, or the projector by itself */
  format: Format | 'projector'
  /** write a model with alignment vectors as one without: its answers change */
  dropAlignment?: boolean
  /** llava: folder or Hub name that the official code takes the vision tower from */
  visionTower?: string
}
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

/** A tensor to be written under one of our names. */
interface Item {
  name: string
  shape: readonly number[]
  dtype: StoredDtype
  /** where its bytes lie as they are */
  copy?: TensorEntry
  /** made from the seed */
  drawn?: boolean
  /** its values, when the bytes are not there yet; in the scope of the call, or persistent and then the caller's */
  value: (dtype: Dtype) => Tensor
}

// ---- the tensors --------------------------------------------------------------------------------------------------------

const dtypes = { f32: 'F32', bf16: 'BF16' } as const
const computing = (dtype: StoredDtype): Dtype => (dtype === 'BF16' ? 'bf16' : dtype === 'F64' ? 'f64' : 'f32')

/** Every tensor of the model with where it comes from; all names and shapes are checked here, before anything is written. */
function items(s: Stored, o: ConvertOptions, levels: number, alignment: Alignment): Item[] {
  const expected = AlignGPTNetwork.parameters({ config: s.config, clip: s.clip, levels }, (name) => s.weights.has(name))
  for (const [name, e] of s.weights)
    if (!expected.has(name)) throw fail('ERR_WEIGHTS', `${e.path}: '${e.name}'`, 'a tensor of such a model', 'this')
  const usual = s.weights.get('model.embed_tokens.weight')?.dtype ?? 'F32'
  const all: Item[] = []
  for (const [name, { shape, init }] of expected) {
    const e = s.weights.get(name)
    const dtype = o.dtype ? dtypes[o.dtype] : (e?.dtype ?? usual)
    if (e) {
      checkEntry(e, shape)
      const value = (d: Dtype): Tensor => readTensor(e, shape, { dtype: d })
      all.push({ name, shape, dtype, value, ...(dtype === e.dtype && { copy: e }) })
    } else if (mayBeDrawn(s, name, o)) {
      if (alignment === 'none') continue
      all.push({ name, shape, dtype, drawn: true, value: (d) => initialize(name, shape, init, o.seed ?? 0, d) })
    } else throw fail('ERR_WEIGHTS', `'${name}' [${shape}]`, 'a tensor', `none in the ${s.format} checkpoint`)
  }
  return o.adapter === undefined ? all : withAdapter(all, o.adapter)
}

/** Whether a missing tensor may be missing: a gate, which pre-training does not make; a table that is asked for. */
const mayBeDrawn = (s: Stored, name: string, o: ConvertOptions): boolean =>
  name === TABLE ? s.config.mm_alignment === 'none' || o.levels !== undefined : ALIGNMENT.test(name)

/** The tensors with an adapter merged into those that it is for, and with the projector and gate that were trained with it. */
function withAdapter(all: readonly Item[], dir: string): Item[] {
  const { file, rank, alpha, modules, rest } = openAdapter(dir)
  const names = new Set(all.map(({ name }) => name))
  for (const [module] of modules)
    if (!names.has(`${module}.weight`))
      throw fail('ERR_WEIGHTS', `${file}: ${show(module)}`, "a matrix of the model's layers", 'none')
  for (const [name, e] of rest)
    if (!names.has(name)) throw fail('ERR_WEIGHTS', `${e.path}: ${show(name)}`, 'a tensor of the model', 'none')
  return all.map((item): Item => {
    const other = rest.get(item.name)
    if (other) {
      checkEntry(other, item.shape)
      const value = (d: Dtype): Tensor => readTensor(other, item.shape, { dtype: d })
      return { ...item, value, copy: other.dtype === item.dtype ? other : undefined, drawn: false }
    }
    const pair = modules.get(item.name.replace(/\.weight$/, ''))
    if (!pair) return item
    const { A, B } = pair
    if (!A || !B) throw fail('ERR_WEIGHTS', `${file}: adapter of ${item.name}`, 'lora_A and lora_B', 'one of them')
    checkEntry(A, [rank, item.shape[1]])
    checkEntry(B, [item.shape[0], rank])
    const value = (d: Dtype): Tensor =>
      using([item.value(d), readTensor(A, A.shape, { dtype: 'f32' }), readTensor(B, B.shape, { dtype: 'f32' })], (ts) =>
        merged(ts[0], ts[1], ts[2], alpha / rank),
      )
    return { ...item, value, copy: undefined }
  })
}

/** Frees persistent tensors after use. */
function using<T>(tensors: readonly Tensor[], use: (tensors: readonly Tensor[]) => T): T {
  try {
    return use(tensors)
  } finally {
    for (const t of tensors) t.dispose()
  }
}

/** A table [V, H] with more rows, each the mean of those it has: tokens that no text has. */
function withRows(item: Item, rows: number): Item {
  const [from, width] = item.shape
  const value = (d: Dtype): Tensor =>
    using([item.value(d)], ([t]) => {
      const table = cast(t, d === 'f64' ? d : 'f32')
      const weights = zeros([rows - from, from], table.dtype)
      fill(weights, 1 / from)
      return cast(concat([table, matmul(weights, table)], 0), d)
    })
  return { ...item, shape: [rows, width], copy: undefined, value }
}

const PIECE = 1 << 24

function copyBytes(e: TensorEntry, file: string, offset: number): void {
  const to = fs.openSync(file, 'r+')
  try {
    withFile(e.path, (from) => {
      for (let at = 0; at < e.bytes; at += PIECE)
        writeAll(to, readRange(from, e.offset + at, Math.min(PIECE, e.bytes - at), e.path), offset + at)
    })
  } finally {
    fs.closeSync(to)
  }
}

function toWrite({ name, dtype, shape, copy, value }: Item, as = name): TensorToWrite {
  if (copy) return { name: as, dtype, shape, write: (file, offset) => copyBytes(copy, file, offset) }
  const computed = <T>(use: (t: Tensor) => T): T => scope(() => using([value(computing(dtype))], ([t]) => use(t)))
  if (dtype === 'F16') {
    const data = (): Uint8Array => new Uint8Array(floatToHalf(computed((t) => t.toFloats() as Float32Array)).buffer)
    return { name: as, dtype, shape, data }
  }
  const write = (file: string, offset: number): void => computed((t) => t.writeFile(file, offset))
  return { name: as, dtype, shape, write }
}

// ---- writing ------------------------------------------------------------------------------------------------------------

/** A model that is ready to be written. */
interface Ready extends Stored {
  all: Item[]
  levels: number
  alignment: Alignment
}

/** A folder is written once: its config.json, which says that it is there, comes last. */
function prepareFolder(to: string): void {
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
function ownConfig({ config, all, levels, alignment }: Ready): RawConfig {
  const embeds = all.find(({ name }) => name === 'model.embed_tokens.weight') as Item
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

function writeOwn(m: Ready, to: string): void {
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
  const parts = m.all.filter(({ name }) => PROJECTOR.test(name) || ALIGNMENT.test(name))
  const name = parts.some((p) => ALIGNMENT.test(p.name)) ? PROJECTOR_FILES[0] : PROJECTOR_FILES[2]
  writeSafetensors(
    path.join(to, name),
    parts.map((item) => toWrite(item)),
    { format: 'pt' },
  )
  writeConfigFile(path.join(to, 'config.json'), ownConfig(m))
}

// ---- both ways ------------------------------------------------------------------------------------------------------------

function ready(from: string, o: ConvertOptions): Ready {
  const stored = openModel(from, o)
  const { levels, alignment } = levelsOf(stored, o.levels)
  return { ...stored, levels, alignment, all: items(stored, o, levels, alignment) }
}

function summary(m: Ready, to: string, dropped: string[]): Converted {
  const fresh = m.all.filter(({ drawn }) => drawn).map(({ name }) => name)
  const written = openWritten(to)
  const bytes = written.reduce((n, e) => n + e.bytes, 0)
  return { from: m.format, tensors: written.length, bytes, alignment: m.alignment, fresh, dropped }
}
const openWritten = (to: string): TensorEntry[] => [
  ...openCheckpoint(hasWeights(to) ? to : (projectorFileIn(to) as string)).values(),
]

/**
 * Makes an AlignGPT folder of a checkpoint: official AlignGPT, official LLaVA 1.5 or llava-hf (folders, safetensors or `.bin`,
 * sharded or not), or a pre-training's file (`mm_projector_align.bin`, `mm_projector.bin`, .safetensors), which needs `llm` and
 * `clip`.
 * A LLaVA has no alignment vectors: the model is one of the variant `none`, or with `levels` gets new ones for a pre-training.
 * @throws ERR_WEIGHTS, ERR_SHAPE, ERR_DTYPE naming the tensor; ERR_CONFIG; ERR_FORMAT; ERR_ARGUMENT
 */
export async function importModel(from: string, to: string, o: ConvertOptions = {}): Promise<Converted> {
  const model = ready(from, o)
  Tokenizer.load(model.llm) // a folder that cannot be used is not worth gigabytes
  prepareFolder(to)
  writeOwn(model, to)
  return summary(model, to, [])
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
  const dropped = drops ? model.all.filter(({ name }) => ALIGNMENT.test(name)).map(({ name }) => name) : []
  const kept = model.all.filter(({ name }) => !dropped.includes(name))
  const left: Ready = { ...model, all: kept, alignment: drops ? 'none' : model.alignment }
  prepareFolder(to)
  if (o.format === 'aligngpt') writeOwn(left, to)
  else if (o.format === 'llava') writeLlava(left, to, o.visionTower)
  else if (o.format === 'llava-hf') writeHf(left, to)
  else writeProjector(left, to)
  return summary(left, to, dropped)
}

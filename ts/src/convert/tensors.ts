/**
 * The tensors of a model on their way from one checkpoint to another, one at a time; where only the name changes, their bytes are
 * copied.
 */

import fs from 'node:fs'
import { cast, concat, fill, matmul } from '../core/ops.js'
import { type Dtype, scope, type Tensor, zeros } from '../core/tensor.js'
import { floatToHalf, type StoredDtype, type TensorEntry, type TensorToWrite } from '../formats/safetensors.js'
import { AlignGPTNetwork } from '../models/aligngpt.js'
import type { Alignment } from '../models/config/variants.js'
import { EMBED_TOKENS, TABLE } from '../models/names.js'
import { checkEntry, readTensor } from '../models/parameter-sources.js'
import { openAdapter } from '../models/peft.js'
import { refuseUnread } from '../models/unread.js'
import { merged } from '../nn/lora.js'
import { initialize } from '../nn/module.js'
import { show } from '../util/errors.js'
import { readRange, withFile, writeAll } from '../util/files.js'
import { fail, isAlignment, type Stored } from './open-foreign.js'

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
/** A tensor to be written under one of our names. */
export interface Item {
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

const dtypes = { f32: 'F32', bf16: 'BF16' } as const
const computing = (dtype: StoredDtype): Dtype => (dtype === 'BF16' ? 'bf16' : dtype === 'F64' ? 'f64' : 'f32')

/** Every tensor of the model with where it comes from; all names and shapes are checked here, before anything is written. */
export function items(s: Stored, o: ConvertOptions, levels: number, alignment: Alignment): Item[] {
  const expected = AlignGPTNetwork.parameters({ config: s.config, clip: s.clip, levels }, (name) => s.weights.has(name))
  refuseUnread(s.weights, (name) => expected.has(name))
  const usual = s.weights.get(EMBED_TOKENS)?.dtype ?? 'F32'
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
  name === TABLE ? s.config.mm_alignment === 'none' || o.levels !== undefined : isAlignment(name)

/** The tensors with an adapter merged into those that it is for, and with the projector and gate that were trained with it. */
function withAdapter(all: readonly Item[], dir: string): Item[] {
  const { file, modules, rest } = openAdapter(dir)
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
    const { A, B, rank, scaling } = pair
    checkEntry(A, [rank, item.shape[1]])
    checkEntry(B, [item.shape[0], rank])
    const value = (d: Dtype): Tensor =>
      using([item.value(d), readTensor(A, A.shape, { dtype: 'f32' }), readTensor(B, B.shape, { dtype: 'f32' })], (ts) =>
        merged(ts[0], ts[1], ts[2], scaling),
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
export function withRows(item: Item, rows: number): Item {
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

export function toWrite({ name, dtype, shape, copy, value }: Item, as = name): TensorToWrite {
  if (copy) return { name: as, dtype, shape, write: (file, offset) => copyBytes(copy, file, offset) }
  const computed = <T>(use: (t: Tensor) => T): T => scope(() => using([value(computing(dtype))], ([t]) => use(t)))
  if (dtype === 'F16') {
    const data = (): Uint8Array => new Uint8Array(floatToHalf(computed((t) => t.toFloats() as Float32Array)).buffer)
    return { name: as, dtype, shape, data }
  }
  const write = (file: string, offset: number): void => computed((t) => t.writeFile(file, offset))
  return { name: as, dtype, shape, write }
}

/** Where weights come from: checkpoint files, initialisation, or what a pre-training left. */

import { type Device, native } from '../core/native.js'
import { type Dtype, scope, Tensor } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import type { TensorEntry, TensorToWrite } from '../formats/safetensors.js'
import { initialize, ParameterSource } from '../nn/module.js'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { ourName } from './names.js'
import { packed, unread } from './unread.js'

/** Of a model's weights and activations. */
export interface Placement {
  dtype: Dtype
  device?: Device
}

const fileDtype = { F32: 'f32', F16: 'f16', BF16: 'bf16', F64: 'f64' } as const

/** Says which tensor of which file is not as it should be. @throws ERR_SHAPE, ERR_DTYPE */
export function checkEntry(e: TensorEntry, shape: readonly number[]): void {
  const [where, same] = [`${e.path}: '${e.name}'`, e.shape.length === shape.length]
  if (!(e.dtype in fileDtype))
    throw mismatch('ERR_DTYPE', 'checkpoint', where, 'F32, F16, BF16 or F64', packed(e.dtype))
  if (!same || e.shape.some((d, i) => d !== shape[i]))
    throw mismatch('ERR_SHAPE', 'checkpoint', where, `shape [${shape}]`, `[${e.shape}]`)
}

/** A tensor of a file as a persistent one, whatever float type the file has. @throws ERR_SHAPE, ERR_DTYPE */
export function readTensor(e: TensorEntry, shape: readonly number[], { dtype, device }: Placement): Tensor {
  checkEntry(e, shape)
  const t = new Tensor(native.empty([...shape], dtype, device)).persist()
  try {
    native.readFile(t.h, e.path, e.offset, fileDtype[e.dtype as keyof typeof fileDtype])
  } catch (error) {
    t.dispose()
    throw error
  }
  return t
}

/**
 * A tensor for a safetensors file, under a name; `value` makes what is written in its place when its turn has come.
 * @param as what `value` has, by default the dtype of `t`
 */
export function tensorToWrite(name: string, t: Tensor, value = (): Tensor => t, as = t.dtype): TensorToWrite {
  const dtype = as === 'bf16' ? 'BF16' : as === 'f64' ? 'F64' : 'F32'
  const write = (file: string, offset: number): void => scope(() => native.writeFile(value().h, file, offset))
  return { name, dtype, shape: t.shape, write }
}

/**
 * Parameters from the tensors of a checkpoint.
 * @param where its path, for messages
 * @param rename maps a module's name to the file's
 */
export function checkpointSource(
  entries: ReadonlyMap<string, TensorEntry>,
  where: string,
  place: Placement,
  rename = (name: string): string => name,
): ParameterSource {
  return new ParameterSource(
    (name, shape) => {
      const e = entries.get(rename(name))
      if (!e) throw mismatch('ERR_WEIGHTS', 'checkpoint', `${where}: '${rename(name)}'`, `a tensor [${shape}]`, 'none')
      return readTensor(e, shape, place)
    },
    (name) => entries.has(rename(name)),
  )
}
/**
 * Fresh parameters: whatever a module asks for, and nothing that it could do without, such as the head of tied
 * embeddings.
 */
export function initSource(seed: number, { dtype, device }: Placement): ParameterSource {
  return new ParameterSource(
    (name, shape, init) => initialize(name, shape, init, seed, dtype, device),
    () => false,
  )
}

/**
 * The tensors of a checkpoint in any layout under this package's names; constants among them are left out.
 * @throws ERR_WEIGHTS: a name that no layout has, or two that mean the same
 */
export function openNamed(where: string): Map<string, TensorEntry> {
  const named = new Map<string, TensorEntry>()
  for (const [name, e] of openCheckpoint(where)) {
    const ours = ourName(name)
    if (ours === null) continue
    if (ours === undefined) throw unread(e, () => false)
    const other = named.get(ours)
    if (other)
      throw mismatch('ERR_WEIGHTS', 'checkpoint', `${e.path}: '${name}'`, 'one such tensor', `'${other.name}' too`)
    named.set(ours, e)
  }
  return named
}

/** What a pre-training left (in any layout), fresh parameters for the rest: the gate. */
export function pretrainedSource(file: string, seed: number, place: Placement): ParameterSource {
  const entries = openNamed(file)
  if (
    !entries.has('align_indicators.indicator_embs') &&
    ![...entries.keys()].some((n) => n.startsWith('mm_projector.'))
  )
    throw new AlignGPTError(
      'ERR_WEIGHTS',
      `[checkpoint] ${file}: expected mm_projector.* and align_indicators.*, got neither`,
    )
  return new ParameterSource((name, shape, init) => {
    const e = entries.get(name)
    return e ? readTensor(e, shape, place) : initialize(name, shape, init, seed, place.dtype, place.device)
  })
}

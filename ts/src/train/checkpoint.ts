/**
 * Checkpoints on disk (docs/checkpoints.md): a folder `step-N` with safetensors files and manifest.json, which names size and
 * SHA-256 of each. It is made as `step-N.tmp`, everything is fsynced, the manifest comes last, and a rename makes it count: a process
 * killed at any moment leaves the checkpoints that were there, and no half one under a name that is looked for.
 */

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { native } from '../core/native.js'
import type { Dtype } from '../core/tensor.js'
import { layoutSafetensors, openSafetensors, type StoredDtype, type TensorToWrite } from '../formats/safetensors.js'
import type { StateTensor } from '../nn/adamw.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { digestFile, disk, syncFolder, withDescriptor, writeAll } from '../util/files.js'
import { readJsonFile } from '../util/json.js'

export const FORMAT = 1

/** What wrote a checkpoint; other numbers may come out elsewhere. */
export interface Maker {
  version: string
  /** SHA-256 of the native core */
  build: string
  /** backend and level: cpu avx2, cuda sm_90 ... */
  level: string
}

export interface Manifest {
  format: number
  /** steps done */
  step: number
  /** everything the numbers of the run depend on */
  config: Record<string, unknown>
  /** what is not a tensor */
  state: Record<string, unknown>
  maker: Maker
  files: Record<string, { bytes: number; sha256: string }>
}

/** A tensor on its way to the file: `handle` is of the thread that writes. */
export interface StoredTensor {
  file: StateTensor['file']
  name: string
  dtype: StoredDtype
  shape: readonly number[]
  handle: number
}

const STORED: Partial<Record<Dtype, StoredDtype>> = { f32: 'F32', bf16: 'BF16', f64: 'F64' }

/** @throws ERR_DTYPE for integers */
export function storedDtype(t: StateTensor): StoredDtype {
  const dtype = t.stored ?? STORED[t.tensor.dtype]
  if (!dtype) throw mismatch('ERR_DTYPE', 'checkpoint', t.name, 'a float tensor', t.tensor.dtype)
  return dtype
}

const sha256 = (text: string): string => createHash('sha256').update(text).digest('hex')

/** The manifest with its own hash: nothing in the file can change unseen, white space included. */
function manifestText(manifest: Manifest): string {
  return `${JSON.stringify({ manifest, sha256: sha256(JSON.stringify(manifest)) }, null, 2)}\n`
}

function writeTensors(file: string, tensors: readonly StoredTensor[]): void {
  const list: TensorToWrite[] = tensors.map(({ name, dtype, shape, handle }) => ({
    name,
    dtype,
    shape,
    write: (to, offset) => native.writeFile(handle, to, offset),
  }))
  const { header, order } = layoutSafetensors(list, { format: 'pt' })
  withDescriptor(file, 'wx', (fd) => {
    native.fileCall(file)
    writeAll(fd, header, 0)
    for (const { tensor, offset } of order) if ('write' in tensor) tensor.write(file, offset)
    disk.fsyncSync(fd)
  })
}

/** Moves a folder out of the way, then removes it: killed in between, nobody takes the rest for a checkpoint. */
function remove(folder: string): void {
  const doomed = `${folder}.old.tmp`
  disk.rmSync(doomed, { recursive: true, force: true })
  disk.renameSync(folder, doomed)
  disk.rmSync(doomed, { recursive: true, force: true })
}

/**
 * Writes `folder/step-N` and removes all but the newest `keep`. When it throws, the checkpoints that were there still are.
 * @throws an error of the file system, ERR_FILE
 */
export function writeCheckpoint(
  folder: string,
  content: Omit<Manifest, 'format' | 'files'>,
  tensors: readonly StoredTensor[],
  keep: number,
): void {
  const final = path.join(folder, `step-${content.step}`)
  const temporary = `${final}.tmp`
  disk.mkdirSync(folder, { recursive: true })
  disk.rmSync(temporary, { recursive: true, force: true })
  try {
    disk.mkdirSync(temporary)
    const files: Manifest['files'] = {}
    for (const part of ['weights', 'optimizer'] as const) {
      const name = `${part}.safetensors`
      const file = path.join(temporary, name)
      const mine = tensors.filter((t) => t.file === part)
      writeTensors(file, mine)
      files[name] = digestFile(file)
    }
    withDescriptor(path.join(temporary, 'manifest.json'), 'wx', (fd) => {
      native.fileCall('manifest.json')
      writeAll(fd, Buffer.from(manifestText({ format: FORMAT, ...content, files })), 0)
      disk.fsyncSync(fd)
    })
    syncFolder(temporary)
    if (disk.existsSync(final)) remove(final)
    disk.renameSync(temporary, final)
  } catch (e) {
    fs.rmSync(temporary, { recursive: true, force: true })
    throw e
  }
  syncFolder(folder)
  for (const step of listCheckpoints(folder).slice(keep)) remove(path.join(folder, `step-${step}`))
}

/** The steps of the checkpoints in a folder, the newest first; whether they are whole is not looked at. */
export function listCheckpoints(folder: string): number[] {
  const names = fs.existsSync(folder) ? fs.readdirSync(folder) : []
  return names
    .flatMap((n) => /^step-(\d+)$/.exec(n)?.[1] ?? [])
    .map(Number)
    .sort((a, b) => b - a)
}

/** Removes what a killed save left. */
export function removeLeftovers(folder: string): void {
  const names = fs.existsSync(folder) ? fs.readdirSync(folder) : []
  for (const n of names)
    if (/^step-\d+(\.old)?\.tmp$/.test(n)) fs.rmSync(path.join(folder, n), { recursive: true, force: true })
}

/**
 * Reads a checkpoint's manifest and compares every byte of every file with it.
 * @throws AlignGPTError ERR_CHECKPOINT naming the first thing that is wrong
 */
export function verifyCheckpoint(checkpoint: string): Manifest {
  const file = path.join(checkpoint, 'manifest.json')
  const bad = (what: string, expected: string, got: string): AlignGPTError =>
    mismatch('ERR_CHECKPOINT', 'checkpoint', `${checkpoint}: ${what}`, expected, got)
  const { manifest } = (readJsonFile(file, 'ERR_CHECKPOINT') ?? {}) as { manifest?: Manifest }
  if (typeof manifest !== 'object' || manifest === null) throw bad('manifest.json', 'a manifest', show(manifest))
  if (fs.readFileSync(file, 'utf8') !== manifestText(manifest)) throw bad('manifest.json', 'its own hash', 'another')
  if (manifest.format !== FORMAT) throw bad('format', `${FORMAT}`, show(manifest.format))
  if (typeof manifest.files !== 'object' || manifest.files === null)
    throw bad('files', 'an object of files', show(manifest.files))
  for (const [name, expected] of Object.entries(manifest.files)) {
    if (!/^\w+\.\w+$/.test(name) || typeof expected?.bytes !== 'number')
      throw bad('files', 'plain names with bytes and sha256', show({ [name]: expected }))
    const full = path.join(checkpoint, name)
    const stat = fs.statSync(full, { throwIfNoEntry: false })
    const size = stat?.isFile() ? stat.size : undefined
    if (size !== expected.bytes) throw bad(name, `${expected.bytes} bytes`, size === undefined ? 'no file' : `${size}`)
    const got = digestFile(full)
    if (got.sha256 !== expected.sha256) throw bad(name, `SHA-256 ${expected.sha256}`, got.sha256)
  }
  return manifest
}

/**
 * The newest checkpoint that is whole, or null when there is none at all.
 * @param tell is told of each that is not
 * @throws AlignGPTError ERR_CHECKPOINT when there are some and none is whole
 */
export function findCheckpoint(
  folder: string,
  tell: (text: string, checkpoint: string) => void = () => {},
): { folder: string; manifest: Manifest } | null {
  const steps = listCheckpoints(folder)
  for (const step of steps) {
    const checkpoint = path.join(folder, `step-${step}`)
    try {
      return { folder: checkpoint, manifest: verifyCheckpoint(checkpoint) }
    } catch (e) {
      // a file that the disk does not give is as good as damaged
      if (!(e instanceof AlignGPTError) && !(e instanceof Error && 'syscall' in e)) throw e
      tell(`${e.message}; trying the one before`, checkpoint)
    }
  }
  if (steps.length === 0) return null
  throw mismatch('ERR_CHECKPOINT', 'checkpoint', folder, 'a whole checkpoint', `${steps.length} damaged ones`)
}

/**
 * Fills the tensors from a checkpoint; each must be there with its dtype and shape.
 * @throws AlignGPTError ERR_CHECKPOINT
 */
export function readCheckpoint(checkpoint: string, tensors: readonly StateTensor[]): void {
  const open = (part: string) => openSafetensors(path.join(checkpoint, `${part}.safetensors`)).entries
  const files = { weights: open('weights'), optimizer: open('optimizer') }
  for (const t of tensors) {
    const e = files[t.file].get(t.name)
    const expected = `${storedDtype(t)} [${t.tensor.shape}]`
    const got = e ? `${e.dtype} [${e.shape}]` : 'none'
    if (!e || got !== expected)
      throw mismatch('ERR_CHECKPOINT', 'checkpoint', `${checkpoint}: ${t.name}`, expected, got)
    native.readFile(t.tensor.h, e.path, e.offset, t.tensor.dtype)
  }
}

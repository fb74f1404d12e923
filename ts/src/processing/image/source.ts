/**
 * Where the pictures of a data set lie: in a folder, or in tar files (webdataset shards), which are never unpacked. Their
 * members are found by name and read from their place in the tar.
 */

import fs from 'node:fs'
import path from 'node:path'
import { type SavedOptions, savedArrays } from '../../formats/index-cache.js'
import { tarMembers } from '../../formats/tar.js'
import { type AlignGPTError, mismatch } from '../../util/errors.js'
import { Numbers } from '../../util/growable-array.js'
import { hash53 } from '../../util/hash.js'
import { Fingerprints } from '../../util/hash-map.js'

/** Where the bytes of one picture lie, in plain values that can be sent to a worker; `problem`: why they lie nowhere. */
export type ImageSource =
  | { name: string; root: string }
  | { name: string; file: string; offset: number; bytes: number }
  | { name: string; problem: string }

/** Largest picture file, bytes. */
export const MAX_BYTES = 256 * 1024 * 1024

const bad = (what: string, expected: string, got: string, cause?: unknown): AlignGPTError =>
  mismatch('ERR_IMAGE', 'image', what, expected, got, cause)

/**
 * The real path of a picture of a data set. It must lie inside the image root also after symbolic links are followed.
 * @param name path relative to the root, as in the data
 * @throws AlignGPTError ERR_IMAGE: `..`, a link or an absolute path that leads outside, a missing file
 */
export function resolveImage(root: string, name: string): string {
  if (name.includes('\0') || name.split(/[\\/]/).includes('..'))
    throw bad(name, 'a path without ..', JSON.stringify(name))
  let base: string
  let real: string
  try {
    base = fs.realpathSync(root)
    real = fs.realpathSync(path.resolve(base, name))
  } catch (e) {
    throw bad(path.join(root, name), 'a file', (e as NodeJS.ErrnoException).code ?? String(e), e)
  }
  if (!real.startsWith(base.endsWith(path.sep) ? base : base + path.sep))
    throw bad(name, `a file inside the image folder ${root}`, 'one outside it')
  return real
}

/** How much of a file is wanted. */
export interface Part {
  /** first byte, default 0 */
  offset?: number
  /** default: to the end of the file */
  bytes?: number
  /** refuse more than this; default 256 MiB */
  maxBytes?: number
  /** stop after so many bytes */
  head?: number
}

/** Reads a regular file, or a part of it. @throws AlignGPTError ERR_IMAGE */
export function readFilePart(file: string, o: Part = {}): Buffer {
  const { offset = 0, maxBytes = MAX_BYTES, head = Number.POSITIVE_INFINITY } = o
  let fd: number
  try {
    // Without O_NONBLOCK a named pipe would block here for ever.
    fd = fs.openSync(file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK)
  } catch (e) {
    throw bad(file, 'a readable file', (e as NodeJS.ErrnoException).code ?? String(e), e)
  }
  try {
    const info = fs.fstatSync(fd)
    if (!info.isFile()) throw bad(file, 'a regular file', 'something else')
    const bytes = o.bytes ?? info.size - offset
    if (bytes > maxBytes) throw bad(file, `at most ${maxBytes} bytes`, `${bytes}`)
    const b = Buffer.allocUnsafeSlow(Math.min(bytes, head))
    for (let done = 0; done < b.length; ) {
      const n = fs.readSync(fd, b, done, b.length - done, offset + done)
      if (n === 0) throw bad(file, `${offset + b.length} bytes`, `${offset + done}`)
      done += n
    }
    return b
  } finally {
    fs.closeSync(fd)
  }
}

/** The bytes of a picture, or the first `head` of them. @throws AlignGPTError ERR_IMAGE */
export function readImage(source: ImageSource, o: Pick<Part, 'maxBytes' | 'head'> = {}): Buffer {
  if ('problem' in source) throw bad(source.name, 'the name of a picture', source.problem)
  if ('root' in source) return readFilePart(resolveImage(source.root, source.name), o)
  return readFilePart(source.file, { ...o, offset: source.offset, bytes: source.bytes })
}

/** The pictures of a data set, found by the name that records give. */
export interface ImageFiles {
  /** what was opened: a folder or a pattern of tar files */
  readonly where: string
  locate(name: string): ImageSource
}

/**
 * Files of a pattern: `shards/{00000..00009}.tar` is ten names, in order; without braces it is the name itself.
 * @throws AlignGPTError ERR_ARGUMENT for a range that runs backwards
 */
export function expandShards(pattern: string): string[] {
  const m = /\{(\d+)\.\.(\d+)\}/.exec(pattern)
  if (!m) return [pattern]
  const [first, last] = [Number(m[1]), Number(m[2])]
  if (last < first || last - first > 1e6)
    throw mismatch('ERR_ARGUMENT', 'data', pattern, 'a range {first..last} of at most a million', m[0])
  const names = Array.from({ length: last - first + 1 }, (_, i) => `${first + i}`.padStart(m[1].length, '0'))
  const [before, after] = [pattern.slice(0, m.index), pattern.slice(m.index + m[0].length)]
  return names.flatMap((n) => expandShards(after).map((rest) => before + n + rest))
}

/** Members of one tar: hash of the name, hash of `shard/name`, offset and size. */
async function readShard(file: string, o: SavedOptions): Promise<{ [key: string]: Float64Array }> {
  const compute = (): { [key: string]: Float64Array } => {
    const stem = path.basename(file).replace(/\.tar$/, '')
    const [names, full, offsets, sizes] = Array.from({ length: 4 }, () => new Numbers())
    for (const m of tarMembers(file)) {
      names.push(hash53(m.name))
      full.push(hash53(`${stem}/${m.name}`))
      offsets.push(m.offset)
      sizes.push(m.bytes)
    }
    // In their own memory, without the room to grow.
    return {
      names: names.values.slice(),
      full: full.values.slice(),
      offsets: offsets.values.slice(),
      sizes: sizes.values.slice(),
    }
  }
  return (await savedArrays(file, 'tar', { onNotice: o.onNotice }, compute)) as { [key: string]: Float64Array }
}

const AMBIGUOUS = -1

/**
 * Pictures in tar files. A record names a member (`cat.jpg`, `train/cat.jpg`) or, as files unpacked by img2dataset are
 * called, shard and member (`00003/000030012.jpg`). Of two members with one name in a tar the later counts, as in tar;
 * a name that several tars have must be given with its shard.
 */
class TarImages implements ImageFiles {
  private readonly byName = new Fingerprints()
  /** of all members of all shards */
  private readonly offsets: Float64Array
  private readonly sizes: Float64Array
  /** first member of each shard */
  private readonly first: number[] = [0]

  constructor(
    readonly where: string,
    private readonly files: string[],
    shards: { [key: string]: Float64Array }[],
  ) {
    for (const s of shards) this.first.push((this.first.at(-1) as number) + s.names.length)
    const total = this.first.at(-1) as number
    this.offsets = new Float64Array(total)
    this.sizes = new Float64Array(total)
    shards.forEach((s, k) => {
      this.offsets.set(s.offsets, this.first[k])
      this.sizes.set(s.sizes, this.first[k])
      for (let i = 0; i < s.names.length; i++) {
        const member = this.first[k] + i
        this.byName.set(s.full[i], member)
        const other = this.byName.set(s.names[i], member)
        if (other !== undefined && other < this.first[k]) this.byName.set(s.names[i], AMBIGUOUS)
      }
    })
  }

  locate(name: string): ImageSource {
    const member = this.byName.get(hash53(name))
    if (member === undefined) return { name, problem: `none of this name in ${this.where}` }
    if (member === AMBIGUOUS) return { name, problem: `several of this name in ${this.where}; write shard/name` }
    let [low, high] = [0, this.files.length]
    while (high - low > 1) {
      const middle = (low + high) >> 1
      if (this.first[middle] <= member) low = middle
      else high = middle
    }
    return { name, file: this.files[low], offset: this.offsets[member], bytes: this.sizes[member] }
  }
}

/**
 * Opens a folder of pictures, or tar files: one, or a pattern such as `shards/{00000..00009}.tar`. Where each member of a
 * large tar lies is kept beside it (`<tar>.index`).
 * @throws AlignGPTError ERR_DATA: no such folder or file, no tar
 */
export async function openImages(where: string, o: SavedOptions = {}): Promise<ImageFiles> {
  const full = path.resolve(where)
  if (!full.endsWith('.tar')) {
    if (!fs.statSync(full, { throwIfNoEntry: false })?.isDirectory())
      throw mismatch('ERR_DATA', 'data', 'images', 'a folder, or .tar files', where)
    return { where: full, locate: (name) => ({ name, root: full }) }
  }
  const files = expandShards(full)
  const shards: { [key: string]: Float64Array }[] = []
  for (const file of files) shards.push(await readShard(file, o))
  return new TarImages(full, files, shards)
}

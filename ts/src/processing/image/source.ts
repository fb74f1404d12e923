/**
 * Where the pictures of a data set lie: in a folder, or in tar files (webdataset shards), which are never unpacked. Their
 * members are found by name and read from their place in the tar.
 */

import fs from 'node:fs'
import path from 'node:path'
import { type SavedOptions, savedArrays } from '../../formats/index-cache.js'
import { memberName, type TarEntry, tarEntries } from '../../formats/tar.js'
import { type AlignGPTError, mismatch } from '../../util/errors.js'
import { foundIn, headOf, otherKind } from '../../util/file-kind.js'
import { Numbers } from '../../util/growable-array.js'
import { hash53 } from '../../util/hash.js'
import { Fingerprints } from '../../util/hash-map.js'

/** Where the bytes of one picture lie, in plain values that can be sent to a worker; `problem`: why they lie nowhere. */
export type ImageSource =
  | ({ name: string; root: string } & LinkOptions)
  | { name: string; file: string; offset: number; bytes: number }
  | { name: string; problem: string }

/** Largest picture file, bytes. */
export const MAX_BYTES = 256 * 1024 * 1024

const bad = (what: string, expected: string, got: string, cause?: unknown): AlignGPTError =>
  mismatch('ERR_IMAGE', 'image', what, expected, got, cause)

/** A name as given, and in the other forms in which a folder or a tar may have it: file systems and archivers compose letters or not. */
const formsOf = (name: string): string[] => [...new Set([name, name.normalize('NFC'), name.normalize('NFD')])]

/** Names that a missing file may have in truth: with Windows' separators, percent signs decoded, the ending in other letters. */
function nearNames(name: string): string[] {
  const end = path.extname(name)
  const withEnd = (e: string): string => name.slice(0, name.length - end.length) + e
  const near = [name.replaceAll('\\', '/'), withEnd(end.toLowerCase()), withEnd(end.toUpperCase())]
  try {
    near.push(decodeURIComponent(name))
  } catch {
    // A percent sign of its own.
  }
  return near.filter((n) => n !== name && !n.includes('\0'))
}

export interface LinkOptions {
  /** links in the folder may lead out of it; default false */
  followLinks?: boolean
}

const isIn = (folder: string, file: string): boolean =>
  file.startsWith(folder.endsWith(path.sep) ? folder : folder + path.sep)

/**
 * The real path of a picture of a data set. Its name must not lead out of the image root; neither may symbolic links, unless they are
 * followed. It is tried as given and in Unicode's composed and decomposed forms.
 * @param name path relative to the root, as in the data; an absolute one inside the root
 * @throws AlignGPTError ERR_IMAGE: `..`, a link or an absolute path that leads outside, a missing file
 */
export function resolveImage(root: string, name: string, { followLinks = false }: LinkOptions = {}): string {
  if (name.includes('\0')) throw bad(name, 'a path without NUL', JSON.stringify(name))
  const expected = `a file inside the image folder ${root}`
  const given = path.resolve(root)
  let failed: unknown
  let base: string
  try {
    base = fs.realpathSync(given)
  } catch (e) {
    throw bad(path.join(root, name), 'a file', (e as NodeJS.ErrnoException).code ?? String(e), e)
  }
  for (const form of formsOf(name)) {
    const file = path.resolve(given, form)
    if (!isIn(given, file) && !isIn(base, file)) throw bad(name, expected, 'a path that leads outside')
    try {
      const real = fs.realpathSync(file)
      if (followLinks || isIn(base, real)) return real
    } catch (e) {
      failed ??= e
      continue
    }
    throw bad(name, expected, 'a link that leads outside (--follow-links allows that)')
  }
  const { code } = failed as NodeJS.ErrnoException
  const near = nearNames(name).find((n) => isIn(given, path.resolve(given, n)) && fs.existsSync(path.resolve(given, n)))
  throw bad(path.join(root, name), 'a file', `${code ?? failed}${near ? ` (there is ${near})` : ''}`, failed)
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
  if ('root' in source) return readFilePart(resolveImage(source.root, source.name, source), o)
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

// Sizes of what is no regular file; the offset is then that of its headers.
const SPECIAL = -1
// A chain of more links than this goes round in circles.
const MAX_LINKS = 40

const stemOf = (file: string): string => path.basename(file).replace(/\.tar$/, '')

/** Members of one tar: hash of the name, hash of `shard/name`, offset and size. */
async function readShard(file: string, o: SavedOptions): Promise<{ [key: string]: Float64Array }> {
  const compute = (): { [key: string]: Float64Array } => {
    const [names, full, offsets, sizes] = Array.from({ length: 4 }, () => new Numbers())
    for (const m of tarEntries(file)) {
      const special = m.link !== undefined || m.other !== undefined
      names.push(hash53(m.name))
      full.push(hash53(`${stemOf(file)}/${m.name}`))
      offsets.push(special ? m.start : m.offset)
      sizes.push(special ? SPECIAL : m.bytes)
    }
    // In their own memory, without the room to grow.
    return {
      names: names.values.slice(),
      full: full.values.slice(),
      offsets: offsets.values.slice(),
      sizes: sizes.values.slice(),
    }
  }
  const read = (): Promise<unknown> => savedArrays(file, 'tar', { onNotice: o.onNotice }, compute)
  try {
    return (await read()) as { [key: string]: Float64Array }
  } catch (e) {
    throw otherKind('tar', file, 'a tar, not compressed', ['a tar archive'], e) ?? e
  }
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
        for (const key of [s.full[i], s.names[i]]) {
          const other = this.byName.set(key, member)
          if (other !== undefined && other < this.first[k]) this.byName.set(key, AMBIGUOUS)
        }
      }
    })
  }

  locate(name: string): ImageSource {
    const forms = formsOf(memberName(name))
    const member = forms.map((form) => this.byName.get(hash53(form))).find((m) => m !== undefined)
    if (member === AMBIGUOUS) return { name, problem: `several of this name in ${this.where}; write shard/name` }
    if (member === undefined) {
      const inside = forms.map((form) => this.throughLink(form)).find((m) => m !== null)
      return inside ? { ...inside, name } : { name, problem: `none of this name in ${this.where}` }
    }
    return { ...this.follow(member), name }
  }

  /** Which tar a member is in. */
  private shardOf(member: number): number {
    let [low, high] = [0, this.files.length]
    while (high - low > 1) {
      const middle = (low + high) >> 1
      if (this.first[middle] <= member) low = middle
      else high = middle
    }
    return low
  }

  /** What a member that is no regular file is. */
  private special(member: number): TarEntry {
    return tarEntries(this.files[this.shardOf(member)], this.offsets[member]).next().value as TarEntry
  }

  /** The bytes of a member, of a link those that it leads to, or why there are none. */
  private follow(member: number, left = MAX_LINKS): ImageSource {
    if (this.sizes[member] !== SPECIAL) {
      const file = this.files[this.shardOf(member)]
      return { name: '', file, offset: this.offsets[member], bytes: this.sizes[member] }
    }
    const { name, link, other } = this.special(member)
    if (link === undefined) return { name, problem: `${other}, not a file` }
    if (link === null) return { name, problem: 'a link that leads out of the tar' }
    if (left === 0) return { name, problem: 'a link that leads to itself' }
    const shard = stemOf(this.files[this.shardOf(member)])
    const target = this.byName.get(hash53(`${shard}/${link}`))
    if (target !== undefined && target !== AMBIGUOUS) return this.follow(target, left - 1)
    const inside = this.throughLink(`${shard}/${link}`, left - 1)
    return inside ?? { name, problem: `a link to ${link}, which is not in the tar` }
  }

  /** The member below a folder that is a link in the tar, null when no part of the name is one. */
  private throughLink(name: string, left = MAX_LINKS): ImageSource | null {
    for (let at = name.indexOf('/'); at > 0; at = name.indexOf('/', at + 1)) {
      const folder = this.byName.get(hash53(name.slice(0, at)))
      if (folder === undefined || folder === AMBIGUOUS || this.sizes[folder] !== SPECIAL) continue
      const { link } = this.special(folder)
      if (link === undefined) continue
      if (link === null) return { name, problem: 'in a folder that is a link out of the tar' }
      if (left === 0) return { name, problem: 'in a folder that is a link to itself' }
      const target = memberName(`${stemOf(this.files[this.shardOf(folder)])}/${link}/${name.slice(at + 1)}`)
      const member = this.byName.get(hash53(target))
      return member === undefined || member === AMBIGUOUS
        ? this.throughLink(target, left - 1)
        : this.follow(member, left - 1)
    }
    return null
  }
}

/**
 * Opens a folder of pictures, or tar files: one, or a pattern such as `shards/{00000..00009}.tar`. Where each member of a
 * large tar lies is kept beside it (`<tar>.index`). Links inside a tar are followed; links of a folder that lead out of it only with
 * followLinks.
 * @throws AlignGPTError ERR_DATA: no such folder or file, no tar
 */
export async function openImages(where: string, o: SavedOptions & LinkOptions = {}): Promise<ImageFiles> {
  const full = path.resolve(where)
  const isTar = full.endsWith('.tar') || (headOf(full) !== null && foundIn(full) === 'a tar archive')
  if (!isTar) {
    if (!fs.statSync(full, { throwIfNoEntry: false })?.isDirectory())
      throw mismatch('ERR_DATA', 'data', `images ${where}`, 'a folder, or .tar files', foundIn(full))
    return { where: full, locate: (name) => ({ name, root: full, ...(o.followLinks && { followLinks: true }) }) }
  }
  const files = expandShards(full)
  const shards: { [key: string]: Float64Array }[] = []
  for (const file of files) shards.push(await readShard(file, o))
  return new TarImages(full, files, shards)
}

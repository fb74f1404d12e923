/**
 * What a file is by its first bytes, and how to make of it what was wanted. Every reader of a file that a user names asks here when
 * it meets something else, so that a message names the kind of file and the way out and not one odd character.
 */
import { isUtf8 } from 'node:buffer'
import fs from 'node:fs'
import { AlignGPTError, mismatch } from './errors.js'

/** So many first bytes are enough for every kind. */
export const KIND_HEAD = 4096

/** A kind of file, and what a user can do about it. */
export interface FileKind {
  name: string
  way?: string
}

const kind = (name: string, way?: string): FileKind => (way === undefined ? { name } : { name, way })

const TABLE_WAY = 'write it as JSON lines or Parquet'
const PARQUET_WAY = 'write it as Parquet'

/** Bytes (as latin1) at a place of a file and what they say; the first that fits counts. */
const MARKS: [string, FileKind, at?: number][] = [
  ['\x1f\x8b', kind('gzip, compressed', 'gunzip it first')],
  ['BZh', kind('bzip2, compressed', 'bunzip2 it first')],
  ['\xfd7zXZ\0', kind('xz, compressed', 'unxz it first')],
  ['\x28\xb5\x2f\xfd', kind('zstd, compressed', 'unzstd it first')],
  ['\x04\x22\x4d\x18', kind('lz4, compressed', 'unlz4 it first')],
  ['7z\xbc\xaf\x27\x1c', kind('a 7z archive', 'unpack it with 7z x')],
  ['Rar!\x1a\x07', kind('a RAR archive', 'unpack it with unrar x')],
  ['PK\x03\x04', kind('a zip archive', 'unzip it first')],
  ['PK\x05\x06', kind('an empty zip archive')],
  ['version https://git-lfs', kind('a Git LFS pointer, not the file itself', 'run git lfs pull')],
  ['PAR1', kind('Parquet')],
  ['ARROW1', kind('Arrow or Feather', PARQUET_WAY)],
  ['FEA1', kind('Feather', PARQUET_WAY)],
  ['SQLite format 3\0', kind('an SQLite database', TABLE_WAY)],
  ['%PDF-', kind('a PDF document')],
  ['\x89HDF\r\n\x1a\n', kind('HDF5')],
  ['\x93NUMPY', kind('a NumPy array (npy)')],
  ['GGUF', kind('a GGUF model', 'convert the original checkpoint instead')],
  ['\x89PNG\r\n\x1a\n', kind('a PNG picture')],
  ['\xff\xd8\xff', kind('a JPEG picture')],
  ['GIF8', kind('a GIF picture')],
  ['WEBP', kind('a WebP picture'), 8],
  ['II*\0', kind('a TIFF picture')],
  ['MM\0*', kind('a TIFF picture')],
  ['ftypavi', kind('an AVIF picture'), 4],
  ['ftyphe', kind('a HEIC picture', 'convert it to JPEG or PNG'), 4],
  ['ftypmif1', kind('a HEIC picture', 'convert it to JPEG or PNG'), 4],
  ['ftyp', kind('an MP4 video'), 4],
  ['\x1aE\xdf\xa3', kind('a Matroska or WebM video')],
  ['ustar', kind('a tar archive'), 257],
  ['\0\0\0\0{', kind('safetensors'), 4],
  ...[2, 3, 4, 5].map((n): [string, FileKind] => [`\x80${String.fromCharCode(n)}`, kind('a Python pickle')]),
]

/** What a zip is by the name of its first member. */
const ZIPPED: [RegExp, FileKind][] = [
  [/^([^/]+\/)?data\.pkl/, kind('a PyTorch file')],
  [/^(\[Content_Types\]|_rels\/|xl\/)/, kind('an Office document', TABLE_WAY)],
  [/^[^/]*\.npy/, kind('a NumPy archive (npz)')],
]

/** What the first bytes (as latin1) look like, where it takes more than fixed bytes to tell. */
const LOOKS: [RegExp, FileKind][] = [
  // All ones, then the size of a message below 2^24: all ones alone are -1 in any binary file.
  [/^\xff{4}[\0-\xff]{3}\0/, kind('an Arrow stream', PARQUET_WAY)],
  [
    /^\s*<(!doctype html|html|head|body|!--)/i,
    kind('an HTML page, as of a failed download', 'download the file again'),
  ],
  [/^\s*<svg/i, kind('an SVG drawing')],
  [/^\s*<(\?xml|[A-Za-z])/, kind('XML')],
]

const UTF_32 = kind('UTF-32 text', 'make it UTF-8: iconv -f UTF-32 -t UTF-8')
const UTF_16 = (order = ''): FileKind => kind(`UTF-16${order} text`, `make it UTF-8: iconv -f UTF-16${order} -t UTF-8`)

/** UTF-16 or 32 by its mark, or by the zeros that most of its characters have. */
function wideText(b: Uint8Array): FileKind | null {
  const [first, second, third, fourth] = b
  if (first === 0xff && second === 0xfe) return third === 0 && fourth === 0 ? UTF_32 : UTF_16()
  if (first === 0xfe && second === 0xff) return UTF_16()
  if (first === 0 && second === 0 && third === 0xfe && fourth === 0xff) return UTF_32
  const pairs = Math.floor(b.length / 2)
  let [even, odd] = [0, 0]
  for (let i = 0; i < 2 * pairs; i += 2) {
    if (b[i] === 0) even++
    if (b[i + 1] === 0) odd++
  }
  if (pairs < 2) return null
  if (even === 0 && odd > pairs / 2) return UTF_16('LE')
  return odd === 0 && even > pairs / 2 ? UTF_16('BE') : null
}

/** Text by how it looks; null: just text. */
function plainText(b: Uint8Array, whole: boolean): FileKind | null {
  let end = b.length
  // The last character may be cut in two.
  for (let n = 0; !whole && n < 4 && !isUtf8(b.subarray(0, end)); n++) end--
  const head = Buffer.from(b.buffer, b.byteOffset, end)
  if (head.includes(0)) return kind('binary data')
  if (!isUtf8(head)) {
    const controls = head.filter((c) => c < 32 && c !== 9 && c !== 10 && c !== 13).length
    if (controls > 0) return kind('binary data')
    return kind('text that is not UTF-8', 'if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8')
  }
  const text = head.toString().replace(/^\ufeff/, '')
  if (text.trim() === '') return kind(b.length === 0 ? 'an empty file' : 'nothing but white space')
  if (/^\s*[[{]/.test(text)) return kind('JSON')
  const [line, next] = text.split(/\r?\n/)
  for (const [mark, name] of [
    [/\t/g, 'a table with tabs (TSV)'],
    [/,/g, 'a table with commas (CSV)'],
    [/;/g, 'a table with semicolons (CSV)'],
  ] as const) {
    const columns = line.match(mark)?.length ?? 0
    if (columns && !/[{}]/.test(line) && (next ?? '') !== '' && (next.match(mark)?.length ?? 0) >= columns)
      return kind(name, TABLE_WAY)
  }
  return null
}

/**
 * The kind of a file by its first bytes, at most KIND_HEAD of which are looked at. A guess
 * where there is no mark; null: text.
 * @param whole whether these are all bytes of the file
 */
export function kindOfBytes(bytes: Uint8Array, whole = bytes.length < KIND_HEAD): FileKind | null {
  return markedKind(bytes) ?? plainText(bytes.subarray(0, KIND_HEAD), whole && bytes.length <= KIND_HEAD)
}

/** Kinds whose bytes are there; a few may be by chance. */
function marksOf(head: Uint8Array): FileKind[] {
  const text = Buffer.from(head.buffer, head.byteOffset, head.length).toString('latin1')
  return MARKS.filter(([mark, , at = 0]) => text.startsWith(mark, at)).map(([, found]) => found)
}

/** The kind that a mark at the start of a file says for certain, null where there is none. */
export function markedKind(bytes: Uint8Array): FileKind | null {
  const head = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, KIND_HEAD))
  const text = head.toString('latin1')
  const [found] = marksOf(head)
  if (text.startsWith('PK\x03\x04')) return ZIPPED.find(([name]) => name.test(text.slice(30)))?.[1] ?? found ?? null
  return found ?? wideText(head) ?? LOOKS.find(([mark]) => mark.test(text.replace(/^\xef\xbb\xbf/, '')))?.[1] ?? null
}

const URL_PATH = /(?:^|[\\/])(https?|hf|s3|gs|gcs|ftp|az|abfss?|file|data):\/{1,3}/

/** `got` of a message: the kind, and the way out. */
export const kindText = ({ name, way }: FileKind): string => (way ? `${name} (${way})` : name)

/** What is at a path that cannot be read as a file, from the error of the file system: a folder, a URL, or the error's code. */
export function unreadable(file: string, e?: unknown): string {
  const { code } = (e ?? {}) as NodeJS.ErrnoException
  const stat = fs.statSync(file, { throwIfNoEntry: false })
  if (stat?.isDirectory()) return 'a folder'
  if (!stat && URL_PATH.test(file)) return `${code ?? 'no such file'}: a URL (download it first)`
  if (stat && !stat.isFile()) return 'something else'
  const link = fs.lstatSync(file, { throwIfNoEntry: false })
  if (!stat && link?.isSymbolicLink())
    return `${code ?? 'ENOENT'}: a link to ${fs.readlinkSync(file)}, which is not there`
  return !code || code === 'ENOENT' ? 'ENOENT: no such file' : code
}

/** The first bytes of a file, null where it cannot be read. */
export function headOf(file: string): Buffer | null {
  let fd: number
  try {
    // Without O_NONBLOCK a named pipe would block here for ever.
    fd = fs.openSync(file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK)
  } catch {
    return null
  }
  try {
    if (!fs.fstatSync(fd).isFile()) return null
    const b = Buffer.alloc(KIND_HEAD)
    return b.subarray(0, fs.readSync(fd, b, 0, b.length, 0))
  } finally {
    fs.closeSync(fd)
  }
}

/** `got` of a message about a file that is not what it should be: its kind and the way out. */
export function foundIn(file: string): string {
  const head = headOf(file)
  const found = head && kindOfBytes(head)
  return found ? kindText(found) : head ? 'other text' : unreadable(file)
}

/**
 * Runs a reader of a file. When it fails and a mark says for certain that the file is something else, the error names that in place
 * of what the reader stumbled over.
 * @param is kinds that the reader takes
 * @throws what the reader throws, or AlignGPTError of the same code
 */
export function namingOthers<T>(
  where: string,
  file: string,
  expected: string,
  is: readonly string[],
  read: () => T,
): T {
  try {
    return read()
  } catch (e) {
    throw otherKind(where, file, expected, is, e) ?? e
  }
}

/** The error of namingOthers; null: the file may well be what was expected, with a mistake inside. */
export function otherKind(
  where: string,
  file: string,
  expected: string,
  is: readonly string[],
  e: unknown,
): AlignGPTError | null {
  const { code } = e as { code?: string }
  const head = e instanceof AlignGPTError ? headOf(file) : null
  if (!head || !code || marksOf(head).some((k) => is.includes(k.name))) return null
  const found = head.length === 0 ? kind('an empty file') : markedKind(head)
  return found && mismatch(code, where, file, expected, kindText(found), e)
}

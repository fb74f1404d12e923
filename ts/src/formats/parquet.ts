/**
 * Parquet data files. A column file is made for scans, not for reading records in random order, so it is unpacked once,
 * beside itself, into what this package reads by byte offset: `records.jsonl`, and `pictures.tar` when the picture bytes are
 * embedded.
 */
import fs from 'node:fs'
import path from 'node:path'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { readJsonFile, writeJsonFile } from '../util/json.js'
import { type SavedOptions, type Stamp, stampOf } from './index-cache.js'
import { TarWriter } from './tar.js'

const VERSION = 1
const TURNS = ['conversations', 'caption', 'question']
const COLUMNS = ['id', 'image', ...TURNS, 'answer', 'similarity', 'task']

export interface Unpacked {
  /** JSON lines */
  records: string
  /** tar with the embedded pictures; null when the `image` column has names only */
  pictures: string | null
}

interface Manifest {
  version: number
  sources: { name: string; stamp: Stamp }[]
  rows: number
  pictures: number
}

type Row = Record<string, unknown>

/** Rows of a Parquet file in order, a row group in memory at a time. @throws AlignGPTError ERR_DATA */
async function* parquetRows(file: string): AsyncGenerator<Row> {
  const { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } = await import(
    'hyparquet/src/node.js'
  )
  const { compressors } = await import('hyparquet-compressors')
  try {
    const source = await asyncBufferFromFile(file)
    const metadata = await parquetMetadataAsync(source)
    const names = parquetSchema(metadata).children.map((c) => c.element.name)
    if (!TURNS.some((c) => names.includes(c)))
      throw mismatch('ERR_DATA', 'parquet', file, `a column ${TURNS.join(' or ')}`, names.join(', ') || 'none')
    const columns = COLUMNS.filter((c) => names.includes(c))
    let rowStart = 0
    for (const group of metadata.row_groups) {
      const rowEnd = rowStart + Number(group.num_rows)
      // utf8: false leaves columns of bytes bytes; text has its own type.
      const o = { file: source, metadata, compressors, columns, rowStart, rowEnd, utf8: false }
      yield* await parquetReadObjects(o)
      rowStart = rowEnd
    }
  } catch (e) {
    if (e instanceof AlignGPTError) throw e
    throw mismatch('ERR_DATA', 'parquet', file, 'a Parquet file that can be read', (e as Error).message, e)
  }
}

/** Bytes and file name of an `image` cell: a name, bytes, or Hugging Face's {bytes, path}. */
function imageOf(cell: unknown): { bytes: Uint8Array | null; name: string | null } {
  if (cell instanceof Uint8Array) return { bytes: cell, name: null }
  if (cell === null || typeof cell !== 'object') return { bytes: null, name: (cell ?? null) as string | null }
  const { bytes, path: name } = cell as { bytes?: unknown; path?: unknown }
  return { bytes: bytes instanceof Uint8Array ? bytes : null, name: typeof name === 'string' && name ? name : null }
}

/** 64-bit columns come as bigint. */
const plain = (_: string, v: unknown): unknown => (typeof v === 'bigint' ? Number(v) : v)

async function unpackInto(folder: string, files: string[]): Promise<{ rows: number; pictures: number }> {
  const [records, pictures] = ['records.jsonl', 'pictures.tar'].map((f) => fs.openSync(path.join(folder, f), 'w'))
  const tar = new TarWriter(pictures)
  let [rows, embedded, text] = [0, 0, '']
  try {
    for (const file of files)
      for await (const { image, ...row } of parquetRows(file)) {
        const { bytes, name } = imageOf(image)
        const record: Row = { ...row }
        if (record.similarity === null) delete record.similarity
        if (bytes) {
          const member = `${String(rows).padStart(9, '0')}${/\.\w{1,5}$/.exec(name ?? '')?.[0] ?? ''}`
          tar.add(member, bytes)
          record.image = member
          embedded++
        } else if (name !== null) record.image = name
        rows++
        text += `${JSON.stringify(record, plain)}\n`
        if (text.length < 1 << 20) continue
        fs.writeFileSync(records, text)
        text = ''
      }
    fs.writeFileSync(records, text)
    tar.end()
  } finally {
    fs.closeSync(records)
    fs.closeSync(pictures)
  }
  if (embedded === 0) fs.rmSync(path.join(folder, 'pictures.tar'))
  return { rows, pictures: embedded }
}

/** Whether a folder holds what these sources were unpacked into: yes, or why not (null: there is none). */
function isUnpacked(folder: string, sources: Manifest['sources']): true | string | null {
  const file = path.join(folder, 'manifest.json')
  if (!fs.existsSync(file)) return null
  try {
    const m = readJsonFile(file, 'ERR_DATA') as Manifest
    if (m.version !== VERSION) return 'it is of another version'
    return JSON.stringify(m.sources) === JSON.stringify(sources) || 'the Parquet files have changed since'
  } catch (e) {
    return (e as Error).message
  }
}

/**
 * Unpacks Parquet files, in order, into one data file; does nothing when that has been done and the files are the same.
 * Columns: conversations (list of {from, value}), or caption, or question and answer; id, similarity, task, and image: a name,
 * bytes, or {bytes, path}.
 * @param folder where to; default `<first file>.unpacked`
 * @throws AlignGPTError ERR_DATA: no Parquet, no such column, a folder that cannot be written
 */
export async function unpackParquet(
  files: string[],
  o: Pick<SavedOptions, 'onNotice'>,
  folder = `${files[0]}.unpacked`,
): Promise<Unpacked> {
  const sources = files.map((f) => ({ name: path.basename(f), stamp: stampOf(f) }))
  const ready = isUnpacked(folder, sources)
  if (ready !== true) {
    const notice = o.onNotice ?? ((text: string) => process.emitWarning(text, 'AlignGPTWarning'))
    notice(`[data] ${files[0]} is unpacked into ${folder}${ready === null ? '' : ` again: ${ready}`}`)
    const temporary = `${folder}.tmp-${process.pid}`
    try {
      fs.mkdirSync(temporary, { recursive: true })
    } catch (e) {
      const got = (e as NodeJS.ErrnoException).code ?? String(e)
      throw mismatch('ERR_DATA', 'parquet', temporary, 'a folder that can be written (option unpacked)', got, e)
    }
    try {
      const counts = await unpackInto(temporary, files)
      // Last, so that a folder with a manifest is complete.
      writeJsonFile(path.join(temporary, 'manifest.json'), { version: VERSION, sources, ...counts } satisfies Manifest)
      fs.rmSync(folder, { recursive: true, force: true })
      fs.renameSync(temporary, folder)
    } finally {
      fs.rmSync(temporary, { recursive: true, force: true })
    }
  }
  const pictures = path.join(folder, 'pictures.tar')
  return { records: path.join(folder, 'records.jsonl'), pictures: fs.existsSync(pictures) ? pictures : null }
}

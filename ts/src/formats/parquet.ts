/**
 * Parquet data files. A column file is made for scans, not for reading records in random order, so it is unpacked once,
 * beside itself, into what this package reads by byte offset: `records.jsonl`, and `pictures.tar` when the picture bytes are
 * embedded.
 */
import fs from 'node:fs'
import path from 'node:path'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { otherKind } from '../util/file-kind.js'
import { readJsonFile, writeJsonFile } from '../util/json.js'
import { IMAGE_KEYS } from './image-key.js'
import { type SavedOptions, type Stamp, stampOf } from './index-cache.js'
import { checkRowGroup } from './parquet-pages.js'
import { jsonValue, type Row, recordOfRow, TURN_COLUMNS } from './parquet-row.js'
import { TarWriter } from './tar.js'

const VERSION = 2

export interface Unpacked {
  /** JSON lines */
  records: string
  /** tar with the embedded pictures; null when there are names only */
  pictures: string | null
  /** rows whose picture is not embedded but named */
  named: number
}

interface Manifest {
  version: number
  sources: { name: string; stamp: Stamp }[]
  rows: number
  pictures: number
  named: number
}

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
    if (!TURN_COLUMNS.some((c) => names.includes(c)))
      throw mismatch('ERR_DATA', 'parquet', file, `a column ${TURN_COLUMNS.join(' or ')}`, names.join(', ') || 'none')
    let rowStart = 0
    for (const group of metadata.row_groups) {
      await checkRowGroup(file, source, group, metadata)
      const rowEnd = rowStart + Number(group.num_rows)
      // utf8: false leaves columns of bytes bytes; text has its own type.
      const o = { file: source, metadata, compressors, rowStart, rowEnd, utf8: false }
      yield* await parquetReadObjects(o)
      rowStart = rowEnd
    }
  } catch (e) {
    if (e instanceof AlignGPTError) throw e
    const expected = 'a Parquet file that can be read'
    const broken = mismatch('ERR_DATA', 'parquet', file, expected, (e as Error).message, e)
    throw otherKind('parquet', file, expected, ['Parquet'], broken) ?? broken
  }
}

const endOf = (name: string | null): string => /\.\w{1,5}$/.exec(name ?? '')?.[0] ?? ''

async function unpackInto(folder: string, files: string[]): Promise<Pick<Manifest, 'rows' | 'pictures' | 'named'>> {
  const [records, pictures] = ['records.jsonl', 'pictures.tar'].map((f) => fs.openSync(path.join(folder, f), 'w'))
  const tar = new TarWriter(pictures)
  const n = { rows: 0, pictures: 0, named: 0 }
  let text = ''
  try {
    for (const file of files) {
      const first = n.rows
      for await (const row of parquetRows(file)) {
        let own = 0
        const record = recordOfRow(
          row,
          ({ bytes, name }) => {
            const member = `${String(n.rows).padStart(9, '0')}${own++ ? `-${own}` : ''}${endOf(name)}`
            tar.add(member, bytes)
            return member
          },
          `${file}: row ${n.rows - first}`,
        )
        n.pictures += own
        if (own === 0 && IMAGE_KEYS.some((k) => record[k] !== undefined)) n.named++
        n.rows++
        text += `${JSON.stringify(record, jsonValue)}\n`
        if (text.length < 1 << 20) continue
        fs.writeFileSync(records, text)
        text = ''
      }
    }
    fs.writeFileSync(records, text)
    tar.end()
  } finally {
    fs.closeSync(records)
    fs.closeSync(pictures)
  }
  if (n.pictures === 0) fs.rmSync(path.join(folder, 'pictures.tar'))
  return n
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
 * Columns are the keys of records: conversations (list of {from, value}) or messages, or caption, or question and answer; id,
 * similarity, task, and image: a name, bytes, a structure with bytes, or a list of one. Pictures under another name are found by their
 * bytes.
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
  const { named } = readJsonFile(path.join(folder, 'manifest.json'), 'ERR_DATA') as Manifest
  return { records: path.join(folder, 'records.jsonl'), pictures: fs.existsSync(pictures) ? pictures : null, named }
}

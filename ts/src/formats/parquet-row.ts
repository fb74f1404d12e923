/** A row of a Parquet file as a record of JSON: pictures that lie in it become names, whatever their column and shape. */
import { isUtf8 } from 'node:buffer'
import { mismatch } from '../util/errors.js'
import { markedKind } from '../util/file-kind.js'
import { isObject } from '../util/json.js'
import { FILE_KEYS, IMAGE_KEYS } from './image-key.js'

export type Row = Record<string, unknown>

/** A picture that lies in a cell, and the name it had. */
interface Embedded {
  bytes: Uint8Array
  name: string | null
}

/** Columns with the turns of a record, one of which there must be. */
export const TURN_COLUMNS = ['conversations', 'messages', 'conversation', 'caption', 'question'] as const
/** Of a structure that stands for a picture: its bytes. */
const BYTES = ['bytes', 'data', 'image', 'content', 'buffer'] as const
const LONGEST_NAME = 1024

/** A structure of columns: bytes and dates are values. */
const isStructure = (v: unknown): v is Row => isObject(v) && !(v instanceof Uint8Array) && !(v instanceof Date)
const isByte = (v: unknown): boolean => Number.isInteger(Number(v)) && Number(v) >= -128 && Number(v) < 256

/** Text in a column of bytes that does not say that it is text. */
function textOf(b: Uint8Array): string | null {
  if (!isUtf8(b)) return null
  const text = Buffer.from(b.buffer, b.byteOffset, b.length).toString()
  return b.some((c) => c < 32 && (c < 9 || c > 13)) ? null : text
}

/** Bytes, also as a list of numbers; null for anything else. */
function bytesOf(v: unknown): Uint8Array | null {
  if (v instanceof Uint8Array) return v
  if (!Array.isArray(v) || v.length < 8 || !v.every((x) => x !== null && isByte(x))) return null
  return Uint8Array.from(v, (x) => Number(x) & 255)
}

const isPicture = (b: Uint8Array): boolean => / picture$/.test(markedKind(b)?.name ?? '')

/**
 * The picture that lies in a cell: bytes, or a structure with bytes and perhaps a name; null when there is none.
 * @param sure whether the column is one of pictures, so that bytes of a kind that is not known count too
 */
function embeddedIn(cell: unknown, sure: boolean): Embedded | null {
  if (isStructure(cell)) {
    const key = BYTES.find((k) => bytesOf(cell[k]))
    if (!key) return null
    const inner = embeddedIn(cell[key], sure)
    const name = [...FILE_KEYS, 'name'].map((k) => cell[k]).find((n) => typeof n === 'string' && n !== '')
    return inner && { ...inner, name: (name ?? null) as string | null }
  }
  const bytes = bytesOf(cell)
  if (!bytes?.length) return null
  const isName = cell instanceof Uint8Array && bytes.length <= LONGEST_NAME && textOf(bytes) !== null
  return isPicture(bytes) || (sure && !isName) ? { bytes, name: null } : null
}

/** The value with every picture in it replaced by what `keep` gives for it. */
function replaced(value: unknown, sure: boolean, keep: (e: Embedded) => string): unknown {
  const found = embeddedIn(value, sure)
  if (found) return keep(found)
  if (Array.isArray(value)) return value.map((v) => replaced(v, sure, keep))
  if (isStructure(value)) return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, replaced(v, sure, keep)]))
  return value
}

/** Hugging Face writes a sequence of structures as a structure of lists: {from: [..], value: [..]}. */
function untransposed(value: unknown): unknown {
  if (!isStructure(value)) return value
  const lists = Object.entries(value)
  const length = Array.isArray(lists[0]?.[1]) ? lists[0][1].length : 0
  if (!length || !lists.every(([, list]) => Array.isArray(list) && list.length === length)) return value
  return Array.from({ length }, (_, i) => Object.fromEntries(lists.map(([k, list]) => [k, (list as unknown[])[i]])))
}

const isEmpty = (v: unknown): boolean =>
  v === null || v === undefined || v === '' || (Array.isArray(v) && v.every(isEmpty)) || isNothing(v)
const isNothing = (v: unknown): boolean => isStructure(v) && Object.values(v).every(isEmpty)

/** The column with the picture where none has a usual name. @throws AlignGPTError ERR_DATA when there are several */
function otherColumn(row: Row, where: string): string | null {
  const found = Object.keys(row).filter((k) => {
    const cell = row[k]
    return embeddedIn(Array.isArray(cell) && !bytesOf(cell) ? cell[0] : cell, false) !== null
  })
  if (found.length > 1)
    throw mismatch('ERR_DATA', 'parquet', where, 'one column with a picture, image', found.join(' and '))
  return found[0] ?? null
}

/**
 * A record of JSON for a row.
 * @param keep takes a picture that lies in the row and gives its name
 * @param where file and row, for messages
 * @throws AlignGPTError ERR_DATA when several columns of no usual name have pictures
 */
export function recordOfRow(row: Row, keep: (e: Embedded) => string, where: string): Row {
  const usual = IMAGE_KEYS.filter((k) => !isEmpty(row[k]))
  const other = usual.length ? null : otherColumn(row, where)
  const record: Row = {}
  for (const [key, cell] of Object.entries(row)) {
    if (cell === null || cell === undefined) continue
    if (usual.includes(key as (typeof usual)[number])) record[key] = replaced(cell, true, keep)
    else if (key === other) record.image = replaced(cell, true, keep)
    else if ((TURN_COLUMNS as readonly string[]).includes(key)) record[key] = replaced(untransposed(cell), false, keep)
    else if (!embeddedIn(cell, false)) record[key] = cell
  }
  return record
}

/** For JSON.stringify: 64-bit integers keep their digits, bytes are text where they can be. */
export function jsonValue(_: string, v: unknown): unknown {
  if (typeof v === 'bigint') return Number.isSafeInteger(Number(v)) ? Number(v) : `${v}`
  return v instanceof Uint8Array ? textOf(v) : v
}

/**
 * What is wrong with a record under the settings of a run, known from the record alone: the data set, the linter and every run ask here,
 * before the first step. What takes a tokenizer (length) or the image is found later.
 */
import type { RecordProblem } from '../formats/image-key.js'
import { type DataRecord, levelProblem, parseBytes, readRecord, sayProblem } from '../formats/record-file.js'
import { render, type Style } from '../processing/conversation/styles.js'
import { AlignGPTError, mismatch } from '../util/errors.js'

/** Kinds of bad records, as the linter calls them. */
export type RecordFault = 'json' | 'record' | 'turns' | 'no-answer' | NonNullable<RecordProblem['kind']>

/** A record that is left out, and its place. */
export interface BadRecord {
  /** its place in the file, from 0 */
  index: number
  /** that it says; null where it says none */
  id: string | null
  /** first byte in the file, and how many */
  byte: number
  bytes: number
  kind: RecordFault
  reason: string
}

/** What a run makes of its records. */
export interface RecordNeeds {
  /** how they are rendered, `plain` for pre-training */
  style: Style
  /** number of alignment levels: that of a record is below it */
  levels?: number
  /** the level says the vector of the image: every image needs one */
  levelled?: boolean
}

type Fault = { kind: RecordFault; reason: string }
const faultOf = (p: RecordProblem): Fault => ({ kind: p.kind ?? 'record', reason: sayProblem(p) })
/** Without what stands before it: where it comes from, and the record, which are named beside it. */
const reasonOf = (e: unknown): string => (e as Error).message.replace(/^\[\w+\] (record "(?:[^"\\]|\\.)*": )?/, '')

/** What keeps a record from every run; and the record where nothing does. */
export type Diagnosis = { raw: unknown; record: DataRecord; fault?: undefined } | { id: string | null; fault: Fault }

/** The record in these bytes, or what is wrong with it. Its level is not looked at: `levels` writes it anew. */
export function diagnose(bytes: Uint8Array, file: string, byte: number, index: number): Diagnosis {
  let raw: unknown
  try {
    raw = parseBytes(bytes, file, byte)
  } catch (e) {
    return { id: null, fault: { kind: 'json', reason: reasonOf(e).replace(`${file} `, '') } }
  }
  const read = readRecord(raw, index)
  if (!read.problem) return { raw, record: read.record }
  const { id } = (raw ?? {}) as { id?: unknown }
  return { id: typeof id === 'string' || typeof id === 'number' ? String(id) : null, fault: faultOf(read.problem) }
}

/**
 * What keeps a record from runs with these needs, null when nothing does.
 * @param raw as it was parsed: its level may be none
 */
export function unmet(
  record: DataRecord,
  { style, levels, levelled }: RecordNeeds,
  raw: unknown = record,
): Fault | null {
  try {
    const learned = render(record, { style }).some((p) => 'loss' in p && p.loss && p.text !== '')
    if (!learned) return { kind: 'no-answer', reason: 'conversations: expected an answer to learn, got none' }
  } catch (e) {
    if (!(e instanceof AlignGPTError) || e.code !== 'ERR_DATA') throw e
    return { kind: 'turns', reason: reasonOf(e) }
  }
  const level = levelProblem(raw)
  if (level) return faultOf(level)
  const { similarity: got, image } = record
  const expected = levels === undefined ? 'a level' : `a level of 0..${levels - 1}`
  if (got === null)
    return levelled && image !== null
      ? faultOf({ key: 'similarity', expected, got: undefined, kind: 'no-level' })
      : null
  return levels === undefined || got < levels ? null : faultOf({ key: 'similarity', expected, got, kind: 'level' })
}

/** One line: the record, its place, and what is wrong. */
export const sayBad = ({ index, id, byte, reason }: BadRecord): string =>
  `record ${index}${id === null ? '' : ` (id ${JSON.stringify(id)})`} at byte ${byte}: ${reason}`

// Lines that a message shows.
const SHOWN = 20

/** The lines of a message, the first ones where they are many. */
export function listOf(lines: readonly string[], most = SHOWN): string {
  const more = lines.length > most ? [`... and ${lines.length - most} more`] : []
  return [...lines.slice(0, most), ...more].map((line) => `\n  ${line}`).join('')
}

/** @throws AlignGPTError ERR_DATA when nothing is left of a file because of its bad records */
export function needSome(file: string, left: number, bad: readonly BadRecord[]): void {
  if (left > 0 || bad.length === 0) return
  throw mismatch('ERR_DATA', 'data', file, 'a record that can be used', `none:${listOf(bad.map(sayBad))}`)
}

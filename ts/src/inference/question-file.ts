/**
 * A file of questions to a model, as JSON lines or an array. What is wrong with one of them is its own matter: the others are asked. Every
 * key of a question comes back beside its answer, as it stands in the file.
 */
import fs from 'node:fs'
import { imageOf, type RecordProblem } from '../formats/image-key.js'
import { IMAGE_TEXT, parseBytes, readRecord, splitRecords, type Turn } from '../formats/record-file.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { scanJson } from '../util/json.js'
import type { Generated } from './generate.js'
import type { GenerateRequest } from './request.js'

type Raw = Record<string, unknown>

/** One question of a file. */
export interface FileQuestion {
  /** for messages: its place in the file, from 0, and its id */
  name: string
  /** its keys as they stand in the file, key and JSON text; null where it is no JSON */
  kept: Map<string, string> | null
  /** the text of one that is no JSON */
  line?: string
  /** which key holds the question */
  key?: string
  request?: GenerateRequest & { image?: string }
  error?: AlignGPTError
}

/** Keys of ours in a line of answers. */
const OURS = ['text', 'finish', 'tokens', 'alpha', 'error'] as const
const TEXT_KEYS = ['prompt', 'question', 'text'] as const
const TURN_KEYS = ['conversations', 'messages', 'conversation'] as const

const isThere = (v: unknown): boolean => (v ?? null) !== null
const isId = (v: unknown): boolean => typeof v === 'string' || typeof v === 'number'

/** The turns without `<image>`, and which of them had it. */
function placed(turns: readonly Turn[]): { turns: Turn[]; imageTurn?: number } {
  const at = turns.findIndex((t) => t.value.includes(IMAGE_TEXT))
  const clean = turns.map((t) => ({ ...t, value: t.value.replaceAll(IMAGE_TEXT, '').trim() }))
  return at < 0 ? { turns: [...turns] } : { turns: clean, imageTurn: at }
}

type Found =
  | { key: string; request: GenerateRequest & { image?: string }; problem?: undefined }
  | { problem: RecordProblem }

/** The last question of a conversation, after the turns before it. */
function lastQuestion(raw: Raw, key: string, index: number): Found {
  const read = readRecord(raw, index)
  if (read.problem) return read
  const { image, conversations } = read.record
  const last = conversations.findLastIndex((t) => t.from === 'human')
  if (last < 0) return { problem: { key, expected: 'a question', got: raw[key] } }
  const { turns, imageTurn } = placed(conversations.slice(0, last + 1))
  const [history, prompt] = [turns.slice(0, -1), turns[last].value]
  return { key, request: { prompt, history, ...(image !== null && { image, imageTurn }) } }
}

/** What a record asks. */
function requestOf(raw: unknown, index: number): Found {
  const wrong = (key: string, expected: string, got: unknown): Found => ({ problem: { key, expected, got } })
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) return wrong('record', 'a JSON object', raw)
  const record = raw as Raw
  for (const id of ['id', 'question_id'])
    if (isThere(record[id]) && !isId(record[id])) return wrong(id, 'a string or number', record[id])
  const key = [...TEXT_KEYS, ...TURN_KEYS].find((k) => isThere(record[k]))
  if (key === undefined) return wrong('prompt', 'a string, or question, text, conversations or messages', undefined)
  if ((TURN_KEYS as readonly string[]).includes(key)) return lastQuestion({ ...record, id: index }, key, index)
  const asked = record[key]
  if (typeof asked !== 'string') return wrong(key, 'a string', asked)
  const found = imageOf(record)
  if (found.problem) return found
  const { image } = found
  const places = asked.split(IMAGE_TEXT).length - 1
  if (places > 0 && image === null) return wrong(key, `no ${IMAGE_TEXT} in a question without an image`, asked)
  if (places > 1) return wrong(key, `at most one ${IMAGE_TEXT}`, `${places}`)
  const { turns, imageTurn } = placed([{ from: 'human', value: asked }])
  return { key, request: { prompt: turns[0].value, ...(image !== null && { image, imageTurn }) } }
}

/** A record's bytes and their place. */
interface Piece {
  bytes: Uint8Array
  offset: number
}

function isRecord({ bytes, offset }: Piece, file: string): boolean {
  try {
    return typeof parseBytes(bytes, file, offset) === 'object'
  } catch {
    return false
  }
}

/** The lines of a file with something in them; null where the file is an array. */
function linesOf(file: string): Piece[] | null {
  const all = fs.readFileSync(file)
  const pieces: Piece[] = []
  for (let at = 0; at < all.length; ) {
    const end = all.indexOf(10, at)
    const bytes = all.subarray(at, end < 0 ? all.length : end)
    if (bytes.toString('latin1').trim() !== '') pieces.push({ bytes, offset: at })
    at += bytes.length + 1
  }
  return /^(\xef\xbb\xbf)?\s*\[/.test(all.toString('latin1', 0, 1000)) ? null : pieces
}

/** The records of a file; of JSON lines, one of which is none, its lines. */
async function piecesOf(file: string): Promise<Piece[]> {
  const pieces: Piece[] = []
  let failure: unknown
  try {
    await splitRecords(file, (b, offset) => void pieces.push({ bytes: Buffer.from(b), offset }))
    if (pieces.every((p) => isRecord(p, file))) return pieces
  } catch (e) {
    if (!(e instanceof AlignGPTError) || e.cause) throw e
    failure = e
  }
  const lines = linesOf(file)
  const records = (list: Piece[]): number => list.filter((p) => isRecord(p, file)).length
  if (lines && records(lines) > (failure ? 0 : records(pieces))) return lines
  if (failure) throw failure
  return pieces
}

function questionOf({ bytes, offset }: Piece, file: string, index: number): FileQuestion {
  const name = `${file}: record ${index}`
  let raw: unknown
  try {
    raw = parseBytes(bytes, file, offset)
  } catch (e) {
    return { name, kept: null, line: Buffer.from(bytes).toString('utf8'), error: e as AlignGPTError }
  }
  const text = Buffer.from(bytes)
    .toString('utf8')
    .replace(/^\ufeff/, '')
  // Between the values of valid JSON a line break is a space, within them there is none.
  const value = (start: number, end: number): string => text.slice(start, end).replaceAll(/[\r\n]+\s*/g, ' ')
  const members = scanJson(text).members ?? []
  const kept = new Map(members.map(({ key, valueStart, valueEnd }) => [key, value(valueStart, valueEnd)]))
  const { id, question_id } = (raw ?? {}) as Raw
  const shown = [id, question_id].find(isId)
  const called = shown === undefined ? name : `${name} (id ${show(shown)})`
  const found = requestOf(raw, index)
  if (!found.problem) return { name: called, kept, key: found.key, request: { ...found.request, name: called } }
  const { key, expected, got } = found.problem
  const said = got === undefined ? 'nothing' : show(got)
  return { name: called, kept, error: mismatch('ERR_DATA', 'generate', `${called} ${key}`, expected, said) }
}

/**
 * Reads every question of a file. One holds it under `prompt`, `question`, `text` (LLaVA) or as the last question of `conversations` or
 * `messages`.
 * @throws AlignGPTError ERR_DATA where the file is none of questions at all
 */
export async function readQuestionFile(file: string): Promise<FileQuestion[]> {
  return (await piecesOf(file)).map((piece, index) => questionOf(piece, file, index))
}

/**
 * The line of a question and what came of it. What is ours takes the place of a key of the question; that comes back under `input`.
 * @param answer `error` says why there is none
 */
export function answerLine(
  q: FileQuestion,
  answer: Pick<Generated, 'error'> & Partial<Generated>,
  showGate = false,
): string {
  const { error, text, finish, ids = [], alpha } = answer
  const ours: Raw = error ? { error: error.message } : { text, finish, tokens: ids.length, ...(showGate && { alpha }) }
  const lines = new Map<string, string>()
  const input = new Map<string, string>()
  for (const [key, value] of q.kept ?? []) {
    if (key === q.key && key === 'text') continue // it comes back as prompt
    const taken =
      (OURS as readonly string[]).includes(key) || (key === 'prompt' && q.key !== undefined && q.key !== key)
    ;(taken ? input : lines).set(key, value)
  }
  if (q.key !== undefined && q.key !== 'prompt') lines.set('prompt', JSON.stringify(q.request?.prompt))
  if (q.line !== undefined) lines.set('input', JSON.stringify(q.line))
  const theirs = lines.get('input')
  if (input.size && theirs !== undefined) input.set('input', theirs)
  if (input.size) lines.set('input', object(input))
  for (const [key, value] of Object.entries(ours)) if (value !== undefined) lines.set(key, JSON.stringify(value))
  return object(lines)
}

const object = (members: Map<string, string>): string =>
  `{${Array.from(members, ([key, value]) => `${JSON.stringify(key)}:${value}`).join(',')}}`

/**
 * LLaVA data files: a JSON array of records, or one record after the other (JSON lines). They are split on bytes, in
 * pieces, so that a file of any size takes the memory of its longest record.
 */
import fs from 'node:fs'
import { type AlignGPTError, mismatch, show } from '../util/errors.js'
import { kindOfBytes, kindText, markedKind, unreadable } from '../util/file-kind.js'
import { decodeUtf8, isDeep, isObject, parseJson, quoteLargeIntegers } from '../util/json.js'
import { imageOf, type RecordProblem } from './image-key.js'

/** Where the image stands in a turn. */
export const IMAGE_TEXT = '<image>'

export interface Turn {
  from: 'human' | 'gpt' | 'system'
  value: string
}

/** A record of LLaVA data after validation. */
export interface DataRecord {
  id: string
  image: string | null
  conversations: Turn[]
  /** alignment level of phase 1, null when the pair has not been scored */
  similarity: number | null
  /** what kind of question it is, where the data says so (held-out loss is given for each) */
  task?: string
}

const CHUNK = 1 << 20
const MAX_RECORD = 256 * 1024 * 1024
const ROLES: Record<string, Turn['from']> = {
  human: 'human',
  user: 'human',
  gpt: 'gpt',
  assistant: 'gpt',
  system: 'system',
}

/** Byte range of one record in its file. */
export interface RecordRange {
  offset: number
  bytes: number
}

const dataError = (file: string, at: number, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'data', `${file} at byte ${at}`, expected, got)

const isSpace = (c: number): boolean => c === 32 || c === 10 || c === 13 || c === 9
const charOf = (c: number): string => JSON.stringify(String.fromCharCode(c))

/** Splits a growing byte stream into records; only brackets and strings are looked at, JSON.parse checks the rest. */
class Splitter {
  private depth = 0
  private inString = false
  private escaped = false
  /** where the current record starts in the buffer; -1: between records */
  private start = -1
  private mode: 'unknown' | 'array' | 'lines' | 'done' = 'unknown'
  /** what may come between records of an array */
  private next: 'value or end' | 'value' | 'comma or end' = 'value or end'
  constructor(
    private readonly file: string,
    private readonly emit: (record: Buffer, offset: number) => void,
  ) {}

  /** Scans `b` from `from` on; `base` is the file offset of b[0]. Returns where the unfinished record starts. */
  scan(b: Buffer, from: number, base: number): number {
    for (let i = from; i < b.length; i++) {
      const c = b[i]
      if (this.start < 0) this.between(c, base + i, i)
      else if (this.inString) {
        if (this.escaped) this.escaped = false
        else if (c === 92) this.escaped = true
        else if (c === 34) this.inString = false
      } else if (c === 34) this.inString = true
      else if (c === 123 || c === 91) this.depth++
      else if (c === 125 || c === 93) {
        if (--this.depth > 0) continue
        this.emit(b.subarray(this.start, i + 1), base + this.start)
        this.start = -1
        this.next = 'comma or end'
      }
    }
    const keep = this.start < 0 ? b.length : this.start
    if (this.start >= 0) this.start = 0
    return keep
  }

  /** A byte outside records. */
  private between(c: number, at: number, i: number): void {
    if (isSpace(c)) return
    if (this.mode === 'unknown') {
      if (c === 91) {
        this.mode = 'array'
        return
      }
      if (c !== 123) throw dataError(this.file, at, "'[' of an array or '{' of a record", charOf(c))
      this.mode = 'lines'
    }
    if (this.mode === 'done') throw dataError(this.file, at, 'nothing after the array', charOf(c))
    if (this.mode === 'array') {
      if (c === 93 && this.next !== 'value') {
        this.mode = 'done'
        return
      }
      if (this.next === 'comma or end') {
        if (c !== 44) throw dataError(this.file, at, "',' or ']'", charOf(c))
        this.next = 'value'
        return
      }
    }
    if (c !== 123) throw dataError(this.file, at, "'{' of a record", charOf(c))
    this.start = i
    this.depth = 1
  }

  /** The file is over. */
  finish(base: number, size: number): void {
    if (this.start >= 0) {
      const expected = `'}' of the record that starts at byte ${base}`
      throw dataError(this.file, size, this.inString ? `'"' and ${expected}` : expected, 'the end of the file')
    }
    if (this.mode === 'array') {
      const expected = this.next === 'comma or end' ? "',' or ']'" : this.next === 'value' ? "'{' of a record" : "']'"
      throw dataError(this.file, size, expected, 'the end of the file')
    }
    if (this.mode === 'unknown') throw dataError(this.file, size, "'[' of an array or '{' of a record", 'an empty file')
  }
}

/** Refuses a file whose first bytes are no JSON, by its kind. @throws AlignGPTError ERR_DATA */
function refuseOther(head: Buffer, file: string): void {
  const kind =
    markedKind(head) ??
    (/^(\xef\xbb\xbf)?\s*([[{]|$)/.test(head.toString('latin1', 0, 1024)) ? null : kindOfBytes(head))
  if (kind) throw mismatch('ERR_DATA', 'data', `${file} at byte 0`, 'JSON, JSON lines or Parquet', kindText(kind))
}

/**
 * Reads a data file in pieces and calls `emit` with the bytes of every record in turn.
 * @throws AlignGPTError ERR_DATA with file, byte offset and what was expected
 */
export async function splitRecords(file: string, emit: (record: Buffer, offset: number) => void): Promise<void> {
  let handle: fs.promises.FileHandle
  try {
    handle = await fs.promises.open(file, 'r')
  } catch (e) {
    throw mismatch('ERR_DATA', 'data', file, 'a readable file', unreadable(file, e), e)
  }
  try {
    // Records are read again by their place later.
    if (!(await handle.stat()).isFile()) throw mismatch('ERR_DATA', 'data', file, 'a regular file', unreadable(file))
    const splitter = new Splitter(file, emit)
    // One buffer for the whole file; it grows to the longest record and half as much again.
    let buffer = Buffer.allocUnsafe(2 * CHUNK)
    let [base, rest] = [0, 0]
    for (let first = true; ; first = false) {
      const { bytesRead } = await handle.read(buffer, rest, buffer.length - rest, base + rest)
      if (bytesRead === 0) break
      if (first) refuseOther(buffer.subarray(0, bytesRead), file)
      if (first && bytesRead >= 3 && buffer.readUIntBE(0, 3) === 0xefbbbf) {
        buffer.copyWithin(0, 3, bytesRead)
        base = 3
      }
      const filled = rest + bytesRead - (first ? base : 0)
      const keep = splitter.scan(buffer.subarray(0, filled), rest, base)
      base += keep
      rest = filled - keep
      if (rest > MAX_RECORD) throw dataError(file, base, `a record of at most ${MAX_RECORD} bytes`, 'a longer one')
      buffer.copyWithin(0, keep, filled)
      if (rest > buffer.length / 2) buffer = Buffer.concat([buffer.subarray(0, rest)], 2 * buffer.length)
    }
    splitter.finish(base, base + rest)
  } finally {
    await handle.close()
  }
}

// What may be an integer that a number cannot hold.
const LONG_DIGITS = /\d{16}/

/**
 * Text of a record's bytes, parsed; integers beyond 2^53 come as strings of their digits. `offset` is its place in the file.
 * @throws AlignGPTError ERR_DATA
 */
export function parseBytes(bytes: Uint8Array, file: string, offset: number): unknown {
  const text = decodeUtf8(bytes, file, 'ERR_DATA', offset)
  const value = parseJson(text, file, 'ERR_DATA', offset)
  if (isDeep(value)) throw dataError(file, offset, 'a record that is not nested so deep', 'more than 500 levels')
  return LONG_DIGITS.test(text) ? JSON.parse(quoteLargeIntegers(text)) : value
}

type Raw = Record<string, unknown>
const isEmpty = (v: unknown): boolean => (v ?? null) === null
const isLevel = (v: unknown): boolean => Number.isInteger(v) && (v as number) >= 0 && (v as number) < 2 ** 31

const TURN_KEYS = ['conversations', 'messages', 'conversation'] as const
const SHORT_OR_TURNS = 'an array of turns, or caption, or question and answer'

/** The keys that say a record's one exchange where it has no turns; none in one that has. */
function shortKeys(raw: Raw): ('caption' | 'question' | 'answer')[] {
  if (TURN_KEYS.some((k) => !isEmpty(raw[k]))) return []
  if (!isEmpty(raw.caption)) return ['caption']
  return isEmpty(raw.question) ? [] : ['question', 'answer']
}

/** Turns, and images that stand in them: key and value. */
interface Talk {
  turns: Turn[]
  images: [string, unknown][]
}
type FoundTalk = (Talk & { problem?: undefined }) | { problem: RecordProblem }

/** The text of a message's parts: images are `<image>`, and their names are added to the talk. */
function textOfParts(parts: unknown[], key: string, images: Talk['images']): string | RecordProblem {
  let text = ''
  for (const [i, part] of parts.entries()) {
    const at = `${key}[${i}]`
    const { type, text: words } = isObject(part) ? part : ({} as Raw)
    if (isObject(part) && (type === 'text' || type === undefined) && typeof words === 'string') text += words
    else if (isObject(part) && (type === 'image' || type === 'image_url')) {
      const { type: _, ...rest } = part
      images.push([at, Object.keys(rest).length ? rest : null])
      text += IMAGE_TEXT
    } else return { key: at, expected: 'a part of type text or image', got: part }
  }
  return text
}

/** Turns of from and value (LLaVA, ShareGPT), or of role and content (OpenAI, ms-swift). */
function longTalk(key: string, given: unknown): FoundTalk {
  if (!Array.isArray(given) || !given.length) return { problem: { key, expected: SHORT_OR_TURNS, got: given } }
  const talk: Talk = { turns: [], images: [] }
  for (const [i, turn] of given.entries()) {
    const raw = isObject(turn) ? turn : {}
    const [who, what] = [isEmpty(raw.from) ? 'role' : 'from', isEmpty(raw.value) ? 'content' : 'value'] as const
    const named = (usual: string, k: string): string => `${key}[${i}].${isEmpty(raw[k]) ? usual : k}`
    const from = raw[who]
    if (typeof from !== 'string' || !Object.hasOwn(ROLES, from))
      return { problem: { key: named('from', who), expected: Object.keys(ROLES).join(' | '), got: from, kind: 'role' } }
    const at = named('value', what)
    const words = raw[what]
    const value = Array.isArray(words) ? textOfParts(words, at, talk.images) : words
    if (typeof value !== 'string') return Array.isArray(words) ? { problem: value as RecordProblem } : noText(at, value)
    talk.turns.push({ from: ROLES[from], value })
  }
  return talk
}

const noText = (key: string, got: unknown): FoundTalk => ({ problem: { key, expected: 'a string', got } })

/** What a record says; of a short one the turns that it stands for, still without `<image>`. */
function talkOf(raw: Raw): FoundTalk {
  const short = shortKeys(raw)
  const key = TURN_KEYS.find((k) => !isEmpty(raw[k])) ?? 'conversations'
  if (!short.length) return longTalk(key, raw[key])
  for (const k of short) if (typeof raw[k] !== 'string') return noText(k, raw[k])
  const [question, answer] = short.length === 2 ? [raw.question, raw.answer] : ['', raw.caption]
  const turns: Turn[] = [
    { from: 'human', value: question as string },
    { from: 'gpt', value: answer as string },
  ]
  return { turns, images: [] }
}

/** Qwen-VL's way of naming an image within the text. */
const IN_TEXT = /<img>[^<]+<\/img>/

/** What is wrong with the places of the image in the turns. */
function placeProblem({ turns }: Talk, image: string | null): RecordProblem | null {
  const wrong = (key: string, expected: string, got: unknown): RecordProblem => ({
    key,
    expected,
    got,
    kind: 'placeholders',
  })
  let places = 0
  for (const [i, { from, value }] of turns.entries()) {
    const key = `turn ${i}`
    const named = IN_TEXT.exec(value)
    if (named) return wrong(key, 'the image under image, not within the text', named[0])
    const here = value.split(IMAGE_TEXT).length - 1
    if (here === 0) continue
    if (image === null) return wrong(key, `no ${IMAGE_TEXT} in a record without an image`, value)
    if (from !== 'human') return wrong(key, `${IMAGE_TEXT} in a question only`, value)
    places += here
  }
  return places > 1 ? wrong('conversations', `at most one ${IMAGE_TEXT}`, places) : null
}

/** A record as it was understood, or the first thing that keeps a parsed value from being one; see parseRecord. */
export function readRecord(
  raw: unknown,
  index: number,
): { record: DataRecord; problem?: undefined } | { problem: RecordProblem } {
  if (!isObject(raw)) return { problem: { key: 'record', expected: 'a JSON object', got: raw } }
  const { id = index, similarity, task } = raw
  if (typeof id !== 'string' && typeof id !== 'number')
    return { problem: { key: 'id', expected: 'a string or number', got: id } }
  const talk = talkOf(raw)
  if (talk.problem) return talk
  const found = imageOf(raw, talk.images)
  if (found.problem) return { problem: { kind: 'image', ...found.problem } }
  const { image } = found
  const short = shortKeys(raw)
  if (short[0] === 'caption' && image === null)
    return { problem: { key: 'image', expected: 'the image of the caption', got: undefined, kind: 'image' } }
  const [first] = talk.turns
  if (short.length && image !== null && !first.value.includes(IMAGE_TEXT)) first.value = `${IMAGE_TEXT}\n${first.value}`
  const problem = placeProblem(talk, image)
  if (problem) return { problem }
  const level = isLevel(similarity) ? (similarity as number) : null
  const more = typeof task === 'string' && task !== '' ? { task } : {}
  return { record: { id: String(id), image, conversations: talk.turns, similarity: level, ...more } }
}

/** What is wrong with the level of a parsed record; it matters only where levels are used. */
export function levelProblem(raw: unknown): RecordProblem | null {
  const { similarity: got } = raw as Raw
  return isEmpty(got) || isLevel(got)
    ? null
    : { key: 'similarity', expected: 'an integer level >= 0', got, kind: 'level' }
}

/** `key: expected X, got Y`. */
export const sayProblem = ({ key, expected, got }: RecordProblem): string =>
  `${key}: expected ${expected}, got ${got === undefined ? 'nothing' : show(got)}`

/**
 * Checks one parsed record: id (string or number; absent: its index), an image or none (see imageOf), conversations
 * ([{from: human|user|gpt|assistant|system, value}]) or messages ([{role, content}]) or in short caption, or question and answer;
 * similarity (optional level, integer >= 0). `task` is taken where it is a text.
 * @throws AlignGPTError ERR_DATA naming file, record and key
 */
export function parseRecord(raw: unknown, file: string, index: number): DataRecord {
  const { record, problem = levelProblem(raw) } = readRecord(raw, index) as {
    record: DataRecord
    problem?: RecordProblem
  }
  if (!problem) return record
  const { key, expected, got } = problem
  const { id = index } = (isObject(raw) ? raw : {}) as Raw
  const what = `${file}: record ${index} (id ${show(id)}) ${key}`
  throw mismatch('ERR_DATA', 'data', what, expected, got === undefined ? 'nothing' : show(got))
}

// What \s of a regular expression matches beyond ASCII.
const WIDE_SPACE = /\s/

/** Number of white-space separated words of all turns: LLaVA's measure of length. */
export function wordCount(r: DataRecord): number {
  let words = 0
  for (const { value } of r.conversations) {
    let inside = false
    for (let i = 0; i < value.length; i++) {
      const c = value.charCodeAt(i)
      const space = c <= 32 ? c === 32 || (c >= 9 && c <= 13) : c >= 160 && WIDE_SPACE.test(value[i])
      if (!space && !inside) words++
      inside = !space
    }
  }
  return words
}

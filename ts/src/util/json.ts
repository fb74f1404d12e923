/**
 * JSON with positions: where a text stops being JSON and what was expected there, and where the members of an object lie
 * in it. JSON.parse gives neither, and it hides duplicate keys.
 */
import { isUtf8 } from 'node:buffer'
import fs from 'node:fs'
import { mismatch } from './errors.js'
import { foundIn, kindOfBytes, kindText, markedKind, unreadable } from './file-kind.js'
import { writeAtomicText } from './files.js'

/** A member of the outermost object; positions are UTF-16 offsets into the text, ends are exclusive. */
export interface JsonMember {
  key: string
  keyStart: number
  valueStart: number
  valueEnd: number
}

/** Where and why a text is not JSON. `position` is a UTF-16 offset. */
export interface JsonProblem {
  position: number
  expected: string
}

const MAX_DEPTH = 500
const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y
const SPACE = /[ \t\n\r]*/y

class Scanner {
  pos = 0
  members: JsonMember[] = []
  constructor(readonly text: string) {}

  private match(re: RegExp): string | null {
    re.lastIndex = this.pos
    const m = re.exec(this.text)
    if (m) this.pos = re.lastIndex
    return m ? m[0] : null
  }
  space(): void {
    this.match(SPACE)
  }
  fail(expected: string): never {
    throw { position: this.pos, expected } satisfies JsonProblem
  }
  private string(what: string): string {
    const start = this.pos
    if (this.text[start] !== '"') this.fail(what)
    const { end, ok } = scanString(this.text, start)
    this.pos = end
    if (!ok) this.fail('a string without control characters, with valid escapes, closed by "')
    return this.text.slice(start, end)
  }
  value(depth: number): void {
    if (depth > MAX_DEPTH) this.fail(`at most ${MAX_DEPTH} nested values`)
    const c = this.text[this.pos]
    if (c === '{') this.object(depth)
    else if (c === '[') this.array(depth)
    else if (c === '"') this.string('a string')
    else if (this.match(NUMBER) === null) {
      const word = ['true', 'false', 'null'].find((w) => this.text.startsWith(w, this.pos))
      if (!word) this.fail('a value')
      this.pos += word.length
    }
  }
  private object(depth: number): void {
    this.pos++
    this.space()
    if (this.text[this.pos] === '}') {
      this.pos++
      return
    }
    for (;;) {
      const keyStart = this.pos
      const key = this.string('a property name in double quotes')
      this.space()
      if (this.text[this.pos] !== ':') this.fail("':'")
      this.pos++
      this.space()
      const valueStart = this.pos
      this.value(depth + 1)
      if (depth === 0) this.members.push({ key: JSON.parse(key), keyStart, valueStart, valueEnd: this.pos })
      this.space()
      const c = this.text[this.pos]
      if (c !== ',' && c !== '}') this.fail("',' or '}'")
      this.pos++
      if (c === '}') return
      this.space()
    }
  }
  private array(depth: number): void {
    this.pos++
    this.space()
    if (this.text[this.pos] === ']') {
      this.pos++
      return
    }
    for (;;) {
      this.value(depth + 1)
      this.space()
      const c = this.text[this.pos]
      if (c !== ',' && c !== ']') this.fail("',' or ']'")
      this.pos++
      if (c === ']') return
      this.space()
    }
  }
}

const ESCAPE = /\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})/y

/** End of the string literal at `start`, or the position of the character that makes it invalid. */
function scanString(text: string, start: number): { end: number; ok: boolean } {
  let i = start + 1
  while (i < text.length) {
    const c = text.charCodeAt(i)
    if (c === 34) return { end: i + 1, ok: true }
    if (c < 32) return { end: i, ok: false }
    if (c === 92) {
      ESCAPE.lastIndex = i
      if (!ESCAPE.test(text)) return { end: i, ok: false }
      i = ESCAPE.lastIndex
    } else i++
  }
  return { end: text.length, ok: false }
}

/**
 * Scans one JSON value that must fill the text.
 * @returns the members of the outermost object in order, duplicates included (empty when it is no object), or the
 *   first problem. Never throws.
 */
export function scanJson(
  text: string,
): { members: JsonMember[]; problem: null } | { members: null; problem: JsonProblem } {
  const s = new Scanner(text)
  try {
    s.space()
    s.value(0)
    s.space()
    if (s.pos !== text.length) s.fail('the end of the text')
    return { members: s.members, problem: null }
  } catch (e) {
    if (e instanceof Error) throw e
    return { members: null, problem: e as JsonProblem }
  }
}

/**
 * JSON.parse whose failure names the file, the byte offset and what was expected there.
 * @param base byte offset of `text` in the file
 * @throws AlignGPTError with `code`
 */
export function parseJson(text: string, file: string, code: string, base = 0): unknown {
  try {
    return JSON.parse(text)
  } catch (e) {
    const { problem } = scanJson(text)
    // The scanner refuses only very deep nesting that JSON.parse takes, so a problem is there; be safe all the same.
    if (!problem) throw mismatch(code, 'json', file, 'JSON', String(e), e)
    const at = base + Buffer.byteLength(text.slice(0, problem.position))
    const rest = text.slice(problem.position, problem.position + 20)
    const got = rest ? JSON.stringify(rest) : 'the end'
    const expected = /^(\/[/*]|#)/.test(rest) ? `${problem.expected} (JSON takes no comments)` : problem.expected
    throw mismatch(code, 'json', `${file} at byte ${at}`, expected, got, e)
  }
}

/**
 * JSON with its integers beyond 2^53 as strings of their digits, so that ids stay what they are. The text must be JSON.
 */
export function quoteLargeIntegers(text: string): string {
  const next = /"|-?\d{16,}/g
  let [out, done] = ['', 0]
  for (let m = next.exec(text); m; m = next.exec(text)) {
    if (m[0] === '"') {
      next.lastIndex = scanString(text, m.index).end
      continue
    }
    // Of a fraction or a power neither part is an integer.
    const [before, after] = [text[m.index - 1] ?? '', text[next.lastIndex] ?? '']
    if (/[.eE+\d]/.test(before) || /[.eE]/.test(after) || Number.isSafeInteger(Number(m[0]))) continue
    out += `${text.slice(done, m.index)}"${m[0]}"`
    done = next.lastIndex
  }
  return out + text.slice(done)
}

/** Whether a value is an object that is no list. */
export const isObject = (v: unknown): v is Record<string, unknown> =>
  typeof v === 'object' && v !== null && !Array.isArray(v)

/** Whether arrays and objects lie in each other deeper than code that follows them can go. */
export function isDeep(value: unknown, left = MAX_DEPTH): boolean {
  if (typeof value !== 'object' || value === null) return false
  return left === 0 || Object.values(value).some((v) => isDeep(v, left - 1))
}

/** Decodes UTF-8 and refuses what is none. `base` is the byte offset of `bytes` in the file. */
export function decodeUtf8(bytes: Uint8Array, file: string, code: string, base = 0): string {
  if (!isUtf8(bytes)) throw mismatch(code, 'json', `${file}: text from byte ${base} on`, 'UTF-8', 'invalid bytes')
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('utf8')
}

/** Reads a file of text, without its byte order mark. @throws AlignGPTError with `code`; what is not UTF-8 is named */
export function readText(file: string, code: string, where: string, expected: string): string {
  let bytes: Buffer
  try {
    bytes = fs.readFileSync(file)
  } catch (e) {
    throw mismatch(code, where, file, 'a readable file', unreadable(file, e), e)
  }
  const other = bytes.length ? (markedKind(bytes) ?? (isUtf8(bytes) ? null : kindOfBytes(bytes, true))) : null
  if (other) throw mismatch(code, where, file, expected, kindText(other))
  const text = bytes.toString()
  return text.charCodeAt(0) === 0xfeff ? text.slice(1) : text
}

/** Reads and parses a JSON file. @throws AlignGPTError with `code` that names the file */
export function readJsonFile(file: string, code: string): unknown {
  const text = readText(file, code, 'json', 'a JSON file')
  if (text.trim() === '') throw mismatch(code, 'json', file, 'a JSON file', foundIn(file))
  return parseJson(text, file, code)
}

/** Writes a value as indented JSON, atomically. */
export function writeJsonFile(file: string, value: unknown): void {
  writeAtomicText(file, `${JSON.stringify(value, null, 2)}\n`)
}

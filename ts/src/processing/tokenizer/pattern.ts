/** Patterns of tokenizer.json: texts, or regular expressions of Oniguruma, which @huggingface/tokenizers rewrites for JavaScript. */
import { Tokenizer as Library } from '@huggingface/tokenizers'
import { show } from '../../util/errors.js'
import type { Json } from '../tokenizer-files.js'
import { rewritten } from './oniguruma.js'

/** What a part of tokenizer.json is refused with; `where` is its path in the file. */
export class Unsupported extends Error {
  constructor(
    readonly where: string,
    readonly expected: string,
    readonly got: string,
  ) {
    super(`${where}: expected ${expected}, got ${got}`)
  }
}

/** A list that a part has, or has not. @throws Unsupported */
export function listOf<T>(value: unknown, where: string): T[] {
  if (Array.isArray(value ?? [])) return (value ?? []) as T[]
  throw new Unsupported(where, 'a list', show(value))
}

/** A text that a part has. @throws Unsupported */
export function textOf(value: unknown, where: string, usual = ''): string {
  if (typeof (value ?? usual) === 'string') return (value ?? usual) as string
  throw new Unsupported(where, 'a text', show(value))
}

export const escaped = (s: string): string => s.replace(/[.*+?^${}()|[\]\\/]/g, '\\$&')

/** A pattern as a global regular expression over code points. @throws Unsupported */
export function patternOf(pattern: unknown, where: string): RegExp {
  const p = (typeof pattern === 'string' ? { String: pattern } : (pattern ?? {})) as {
    String?: unknown
    Regex?: unknown
  }
  if (typeof p.String === 'string') return new RegExp(escaped(p.String), 'gu')
  if (typeof p.Regex !== 'string')
    throw new Unsupported(where, '{ String } or { Regex }', JSON.stringify(pattern) ?? 'none')
  try {
    const split: Json = { type: 'Split', pattern: { Regex: rewritten(p.Regex) }, behavior: 'Isolated', invert: false }
    const model = { type: 'BPE', vocab: {}, merges: [] }
    const rest = { added_tokens: [], normalizer: null, post_processor: null, decoder: null }
    const library = new Library({ ...rest, pre_tokenizer: split, model }, {})
    const found = (library.pre_tokenizer as unknown as { pattern: RegExp | null }).pattern
    if (found) return found
  } catch (e) {
    throw new Unsupported(where, 'a regular expression that JavaScript has too', `${p.Regex} (${(e as Error).message})`)
  }
  throw new Unsupported(where, 'a regular expression', p.Regex)
}

/**
 * Where a pattern matches. As in Rust there is none in an empty text, no empty match follows another match at once, and none stands between the halves of a character,
 * where V8 finds the end of a text.
 */
export function* matchesOf(text: string, pattern: RegExp): Generator<{ from: number; to: number }> {
  let last = -1
  if (text === '') return
  for (const m of text.matchAll(pattern)) {
    const [from, to] = [m.index, m.index + m[0].length]
    const half = from > 0 && (text.charCodeAt(from) & 0xfc00) === 0xdc00 && (text.codePointAt(from - 1) ?? 0) > 0xffff
    if (from === to && (from === last || half)) continue
    yield { from, to }
    last = to
  }
}

// What Rust's regex crate and its `char` mean by these.
export const WHITE = /\p{White_Space}/u
export const WORD_CLASS = '\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\u200c\\u200d'

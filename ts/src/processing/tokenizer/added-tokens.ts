/** Added tokens of a tokenizer.json: texts that are one token wherever they stand, before anything else is done. */
import { escaped, WHITE, WORD_CLASS } from './pattern.js'

/** UTF-16 offsets: first, and the one behind the last. */
export type Range = readonly [from: number, to: number]

export interface AddedToken {
  id: number
  content: string
  /** takes the white space before it */
  lstrip?: boolean
  /** and behind it */
  rstrip?: boolean
  /** is looked for in the normalized text */
  normalized?: boolean
  special?: boolean
  /** only where no letter, digit or _ touches it */
  single_word?: boolean
}

/** A stretch of text, from one offset to another: an added token, or what lies between. */
export interface Section {
  from: number
  to: number
  token: AddedToken | null
}

const STARTS_WITH_WORD = new RegExp(`^[${WORD_CLASS}]`, 'u')
const ENDS_WITH_WORD = new RegExp(`[${WORD_CLASS}]$`, 'u')

/** Finds added tokens in text (leftmost, longest), as AddedVocabulary of the Rust library does. */
export class AddedTokens {
  readonly #pattern: RegExp | null
  readonly #tokens: Map<string, AddedToken>

  /** @param tokens by the text that each is looked for as */
  constructor(tokens: Iterable<readonly [text: string, token: AddedToken]>) {
    this.#tokens = new Map(tokens)
    this.#tokens.delete('')
    const texts = [...this.#tokens.keys()].sort((a, b) => b.length - a.length)
    this.#pattern = texts.length ? new RegExp(texts.map(escaped).join('|'), 'gu') : null
  }

  /** @param literal ranges of the text in which special tokens are plain text */
  split(text: string, literal: readonly Range[] = []): Section[] {
    const out: Section[] = []
    let at = 0
    for (const m of this.#pattern ? text.matchAll(this.#pattern) : []) {
      const token = this.#tokens.get(m[0]) as AddedToken
      let [from, to] = [m.index, m.index + m[0].length]
      if (token.special && literal.some(([first, end]) => from < end && to > first)) continue
      if (token.single_word && touchesWord(text, from, to)) continue
      if (token.lstrip) {
        while (from > at && WHITE.test(text[from - 1])) from--
        from = Math.max(from, at)
      }
      if (token.rstrip) while (to < text.length && WHITE.test(text[to])) to++
      // White space that the token before has taken.
      if (from >= to) continue
      if (at < from) out.push({ from: at, to: from, token: null })
      out.push({ from, to, token })
      at = to
    }
    if (at < text.length) out.push({ from: at, to: text.length, token: null })
    return out
  }
}

function touchesWord(text: string, from: number, to: number): boolean {
  const before = text.slice(Math.max(0, from - 2), from)
  return ENDS_WITH_WORD.test(before) || STARTS_WITH_WORD.test(text.slice(to, to + 2))
}

/** Added tokens of a tokenizer.json: texts that are one token wherever they stand, before anything else is done. */

/** UTF-16 offsets: first, and the one behind the last. */
export type Range = readonly [from: number, to: number]

export interface AddedToken {
  id: number
  content: string
  lstrip?: boolean
  rstrip?: boolean
  normalized?: boolean
  special?: boolean
}

/** A stretch of text between added tokens, or an added token; `start` is its UTF-16 offset. */
export interface Section {
  text: string
  start: number
  added: boolean
}

const quote = (s: string): string => s.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')

/** Finds added tokens in text (leftmost, longest); they swallow white space beside them when they say so. */
export class AddedTokens {
  readonly #pattern: RegExp | null
  readonly #tokens: Map<string, AddedToken>
  constructor(tokens: AddedToken[]) {
    this.#tokens = new Map(tokens.filter((t) => t.content).map((t) => [t.content, t]))
    const names = [...this.#tokens.keys()].sort((a, b) => b.length - a.length)
    this.#pattern = names.length ? new RegExp(names.map(quote).join('|'), 'g') : null
  }
  /** @param literal ranges of the text in which special tokens are plain text */
  split(text: string, literal: readonly Range[] = []): Section[] {
    if (!this.#pattern) return text ? [{ text, start: 0, added: false }] : []
    const out: Section[] = []
    let at = 0
    for (const m of text.matchAll(this.#pattern)) {
      const token = this.#tokens.get(m[0]) as AddedToken
      const end = m.index + m[0].length
      if (token.special && literal.some(([from, to]) => m.index < to && end > from)) continue
      let before = text.slice(Math.min(at, m.index), m.index)
      if (token.lstrip) before = before.trimEnd()
      if (before) out.push({ text: before, start: at, added: false })
      out.push({ text: m[0], start: m.index, added: true })
      at = end
      if (token.rstrip) at += text.length - at - text.slice(at).trimStart().length
    }
    if (at < text.length) out.push({ text: text.slice(at), start: at, added: false })
    return out
  }
}

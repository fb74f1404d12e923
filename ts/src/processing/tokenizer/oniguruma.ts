/**
 * Regular expressions of Oniguruma in words that JavaScript has, as far as @huggingface/tokenizers does not rewrite them itself: atomic
 * groups, possessive quantifiers, and the letters beyond ASCII that (?i:) takes for s and k.
 */

const TOKEN =
  /\\(?:[pPx]\{[^}]*\}|k<[^>]*>|x[\da-fA-F]{1,2}|u[\da-fA-F]{4}|[\s\S])|\(\?(?:<[=!]|[=!:>]|i:|<\w+>)|\(|\)|[*+?]\+|[*+?]\??|\{\d*,?\d*\}\??|[\s\S]/guy
// Letters whose other case has more letters than two: what Unicode folds to s and k.
const FOLDED: Record<string, string> = { s: 'ſ', k: '\u212a' }
// Pairs that Oniguruma takes for one letter, such as ß.
const LIGATURES = /ss|ff|fi|fl|st/i

interface Group {
  /** index of its first piece */
  at: number
  /** what the closing bracket becomes */
  close: string
  insensitive: boolean
  behind: boolean
}

/** End of the character class that begins at `at`. */
function classEnd(source: string, at: number): number {
  let depth = 0
  for (let i = at; i < source.length; i++) {
    if (source[i] === '\\') i++
    else if (source.startsWith('[:', i)) i = Math.max(i, source.indexOf(':]', i) + 1)
    else if (source[i] === '[') {
      depth++
      if (source[i + 1] === '^') i++
      if (source[i + 1] === ']') i++
    } else if (source[i] === ']' && --depth === 0) return i + 1
  }
  return source.length
}

/** A class with what (?i:) adds to its letters. */
function foldedClass(text: string): string {
  let added = ''
  const bare = text.replace(/\\(?:[pP]\{[^}]*\}|.)|\[:\^?\w+:\]/gu, '')
  for (const [letter, other] of Object.entries(FOLDED))
    for (const [, from, to, one] of bare.matchAll(/(.)-(.)|(.)/gu)) {
      const covers = (c: string): boolean => (one ? one === c : from <= c && c <= to)
      if (!added.includes(other) && (covers(letter) || covers(letter.toUpperCase()))) added += other
    }
  return text.replace(/^\[\^?/, (open) => open + added)
}

/** @throws Error where JavaScript has no words for it */
export function rewritten(source: string): string {
  const out: string[] = []
  const groups: Group[] = []
  let [last, names, letters] = [-1, 0, '']
  const inside = (): Group | undefined => groups.at(-1)
  const once = (text: string): string => {
    if (groups.some((g) => g.behind)) throw new Error('an atomic group that looks behind')
    names++
    return `(?=(?<once${names}>${text}))\\k<once${names}>`
  }
  const text = source.startsWith('(?i)') ? `(?i:${source.slice(4)})` : source
  TOKEN.lastIndex = 0
  for (let m = TOKEN.exec(text); m; m = TOKEN.exec(text)) {
    const [token] = m
    const folds = inside()?.insensitive === true
    if (token[0] === '(') {
      const atomic = token === '(?>'
      const behind = /^\(\?<[=!]/.test(token)
      groups.push({ at: out.length, close: atomic ? 'once' : ')', insensitive: folds || token === '(?i:', behind })
      out.push(atomic ? '' : token)
    } else if (token === ')') {
      const g = groups.pop()
      if (!g) throw new Error('a bracket that nothing opened')
      const body = out.splice(g.at).join('')
      last = out.push(g.close === 'once' ? once(body) : `${body})`) - 1
    } else if (/^[*+?]\+$/.test(token) && last >= 0) out[last] = once(out[last] + token[0])
    else if (/^(?:[*+?]|\{\d*,?\d*\})/.test(token) && last >= 0) out[last] += token
    else if (token === '[') {
      const end = classEnd(text, m.index)
      const set = text.slice(m.index, end)
      if (folds && /[^\0-\x7f]/.test(set)) throw new Error('letters beyond ASCII in (?i:)')
      last = out.push(folds ? foldedClass(set) : set) - 1
      TOKEN.lastIndex = end
    } else {
      const letter = token.toLowerCase()
      if (folds && (/[^\0-\x7f]/.test(token) || (token.length === 1 && LIGATURES.test(letters + token))))
        throw new Error('letters in (?i:) that have more than two forms')
      last = out.push(folds && FOLDED[letter] ? `[${letter}${letter.toUpperCase()}${FOLDED[letter]}]` : token) - 1
      letters = token
      continue
    }
    letters = ''
  }
  if (names && /\\[1-9]/.test(source)) throw new Error('numbered groups beside an atomic one')
  return out.join('')
}

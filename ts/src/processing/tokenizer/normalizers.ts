/** Normalizers of tokenizer.json (Hugging Face's Rust library, normalizers/), on texts that remember where they come from. */
import type { Json } from '../tokenizer-files.js'
import type { AlignedText } from './aligned-text.js'
import { listOf, patternOf, textOf, Unsupported, WHITE } from './pattern.js'

export type Normalizer = (text: AlignedText) => AlignedText

const ASCII = /^[\0-\x7f]*$/

/** Each character alone, as Rust does: no Σ knows that it ends a word. */
const lowercase: Normalizer = (a) => {
  if (ASCII.test(a.text)) return a.with(a.text.toLowerCase())
  const changes = Array.from(a.text, (c) => Array.from(c.toLowerCase(), (l, i) => [l, Math.min(i, 1)] as const))
  return a.transform(changes.flat())
}

/** Characters that a test keeps; what was in front of the first is skipped. */
function filter(a: AlignedText, keeps: (char: string) => boolean): AlignedText {
  const kept: [string, number][] = []
  let skipped = 0
  for (const c of a.text)
    if (keeps(c)) kept.push([c, 0])
    else if (kept.length) (kept.at(-1) as [string, number])[1]--
    else skipped += c.length
  return kept.length === a.text.length ? a : a.transform(kept, skipped)
}

const stripAccents: Normalizer = (a) => (ASCII.test(a.text) ? a : filter(a, (c) => !/\p{M}/u.test(c)))

function strip(left: boolean, right: boolean): Normalizer {
  return (a) => {
    const { text } = a
    let [from, to] = [0, text.length]
    while (left && from < to && WHITE.test(text[from])) from++
    while (right && to > from && WHITE.test(text[to - 1])) to--
    if (from === 0 && to === text.length) return a
    const chars = Array.from(text.slice(from, to), (c) => [c, 0] as const)
    return a.transform(chars, from)
  }
}

// A character, and what may be put together with it: marks, and the later parts of Hangul syllables, of which compatibility forms
// have several.
const GROUP =
  /[^\p{M}\u1160-\u11ff\u314f-\u3163\uff9e\uff9f\uffc2-\uffdc][\p{M}\u1160-\u11ff\u314f-\u3163\uff9e\uff9f\uffc2-\uffdc]*|^[\s\S][\p{M}\u1160-\u11ff\u314f-\u3163\uff9e\uff9f\uffc2-\uffdc]*/gu

/** The characters of a group in a normal form, each with its change (AlignedText.transform). */
function formOf(group: string, form: 'NFC' | 'NFD' | 'NFKC' | 'NFKD'): [string, number][] {
  const compatible = form.length === 4
  const apart = compatible ? 'NFKD' : 'NFD'
  const parts = Array.from(group).flatMap((c) =>
    Array.from(c.normalize(apart), (p, i) => ({ char: p, change: Math.min(i, 1), used: false })),
  )
  const take = (char: string): number | null => {
    const found = parts.find((p) => !p.used && p.char === char)
    if (found) found.used = true
    return found ? found.change : null
  }
  // Marks change places: each takes its change with it.
  if (form === apart) return Array.from(group.normalize(form), (c) => [c, take(c) ?? 0])
  return Array.from(group.normalize(form), (c) => {
    const used = Array.from(c.normalize('NFD'), take).filter((change) => change !== null)
    return [c, used.reduce((sum, change) => sum + change, 0) - Math.max(used.length - 1, 0)]
  })
}

const unicode =
  (form: 'NFC' | 'NFD' | 'NFKC' | 'NFKD'): Normalizer =>
  (a) => {
    if (ASCII.test(a.text) || a.text.normalize(form) === a.text) return a
    return a.transform((a.text.match(GROUP) ?? []).flatMap((group) => formOf(group, form)))
  }

/** @param where its path in the file. @throws Unsupported */
export function normalizerOf(config: Json | null | undefined, where = 'normalizer'): Normalizer {
  if (!config) return (a) => a
  switch (config.type) {
    case 'Sequence': {
      const all = listOf<Json>(config.normalizers, `${where}.normalizers`).map((c, i) =>
        normalizerOf(c, `${where}[${i}]`),
      )
      return (a) => all.reduce((text, normalize) => normalize(text), a)
    }
    case 'Lowercase':
      return lowercase
    case 'StripAccents':
      return stripAccents
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD':
      return unicode(config.type)
    case 'Strip':
      return strip(config.strip_left !== false, config.strip_right !== false)
    case 'Prepend': {
      const prefix = textOf(config.prepend, `${where}.prepend`)
      return (a) => a.prepend(prefix)
    }
    case 'Replace': {
      const pattern = patternOf(config.pattern, `${where}.pattern`)
      const content = textOf(config.content, `${where}.content`)
      return (a) => a.replace(pattern, content)
    }
  }
  const known = 'Sequence, Lowercase, StripAccents, NFC, NFD, NFKC, NFKD, Strip, Prepend or Replace'
  throw new Unsupported(`${where}.type`, known, String(config.type))
}

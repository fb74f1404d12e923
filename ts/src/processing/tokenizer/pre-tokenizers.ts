/** Pre-tokenizers of tokenizer.json (Hugging Face's Rust library, pre_tokenizers/): texts into words. */
import type { Json } from '../tokenizer-files.js'
import type { AlignedText } from './aligned-text.js'
import { escaped, listOf, matchesOf, patternOf, textOf, Unsupported, WORD_CLASS } from './pattern.js'

export type PreTokenizer = (words: AlignedText[]) => AlignedText[]

type Behavior = 'removed' | 'isolated' | 'mergedwithprevious' | 'mergedwithnext' | 'contiguous'

/** Stretches of a text: what a pattern matches, and what lies between. */
interface Stretch {
  from: number
  to: number
  match: boolean
}

function stretchesOf(text: string, pattern: RegExp, invert: boolean): Stretch[] {
  const out: Stretch[] = []
  let last = 0
  for (const { from, to } of matchesOf(text, pattern)) {
    if (from > last) out.push({ from: last, to: from, match: invert })
    out.push({ from, to, match: !invert })
    last = to
  }
  if (last < text.length) out.push({ from: last, to: text.length, match: invert })
  return out
}

/** What becomes of the stretches: the words they make. */
function joined(stretches: readonly Stretch[], behavior: Behavior): Stretch[] {
  if (behavior === 'isolated') return [...stretches]
  if (behavior === 'removed') return stretches.filter((s) => !s.match)
  const out: Stretch[] = []
  let before = false
  const ordered = behavior === 'mergedwithnext' ? [...stretches].reverse() : stretches
  for (const s of ordered) {
    const last = out.at(-1)
    const joins = behavior === 'contiguous' ? s.match === before : s.match && !before
    if (last && joins) {
      last.from = Math.min(last.from, s.from)
      last.to = Math.max(last.to, s.to)
    } else out.push({ ...s })
    before = s.match
  }
  return behavior === 'mergedwithnext' ? out.reverse() : out
}

const BEHAVIORS = ['removed', 'isolated', 'mergedwithprevious', 'mergedwithnext', 'contiguous']
function behaviorOf(value: unknown, where: string, usual: Behavior): Behavior {
  const name = value === undefined ? usual : String(value).toLowerCase()
  if (BEHAVIORS.includes(name)) return name as Behavior
  throw new Unsupported(`${where}.behavior`, BEHAVIORS.join(', '), String(value))
}

function splitter(pattern: RegExp, behavior: Behavior, invert = false): PreTokenizer {
  const split = (a: AlignedText): AlignedText[] =>
    joined(stretchesOf(a.text, pattern, invert), behavior).map(({ from, to }) => a.slice(from, to))
  return (words) => words.flatMap(split).filter((w) => w.text !== '')
}

/** GPT-2's printable stand-ins for bytes. */
export const BYTE_CHARS: readonly string[] = (() => {
  let extra = 256
  return Array.from({ length: 256 }, (_, b) => {
    const printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174
    return String.fromCharCode(printable ? b : extra++)
  })
})()

const PLAIN = /^[!-~]*$/
/** The bytes of each character, in stand-ins. */
function toBytes(a: AlignedText): AlignedText {
  if (PLAIN.test(a.text)) return a
  const changes = Array.from(a.text, (c) =>
    Array.from(Buffer.from(c), (byte, i) => [BYTE_CHARS[byte], Math.min(i, 1)] as const),
  )
  return a.transform(changes.flat())
}

const GPT2 =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu
const splitGpt2 = splitter(GPT2, 'isolated')

function byteLevel(c: Json): PreTokenizer {
  return (words) => {
    const spaced =
      c.add_prefix_space === false ? words : words.map((w) => (w.text.startsWith(' ') ? w : w.prepend(' ')))
    return (c.use_regex === false ? spaced : splitGpt2(spaced)).map(toBytes)
  }
}

function metaspace(c: Json, where: string): PreTokenizer {
  const mark = textOf(c.replacement, `${where}.replacement`, '▁')
  // Files from before there was a scheme say add_prefix_space.
  const scheme = String(c.prepend_scheme ?? (c.add_prefix_space === false ? 'never' : 'always')).toLowerCase()
  if (!['always', 'first', 'never'].includes(scheme))
    throw new Unsupported(`${where}.prepend_scheme`, 'always, first or never', scheme)
  const split = splitter(new RegExp(escaped(mark), 'gu'), 'mergedwithnext')
  const marked = (w: AlignedText): AlignedText => {
    const m = w.replace(/ /gu, mark)
    return !m.text.startsWith(mark) && (scheme === 'always' || (scheme === 'first' && w.base === 0))
      ? m.prepend(mark)
      : m
  }
  return (words) => {
    const all = words.map(marked)
    return c.split === false ? all : split(all)
  }
}

const whitespace = (): PreTokenizer => splitter(/\p{White_Space}/gu, 'removed')
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/gu

/** @param where its path in the file. @throws Unsupported */
export function preTokenizerOf(config: Json | null | undefined, where = 'pre_tokenizer'): PreTokenizer {
  if (!config) return (words) => words
  switch (config.type) {
    case 'Sequence': {
      const all = listOf<Json>(config.pretokenizers, `${where}.pretokenizers`).map((c, i) =>
        preTokenizerOf(c, `${where}[${i}]`),
      )
      return (words) => all.reduce((some, split) => split(some), words)
    }
    case 'ByteLevel':
      return byteLevel(config)
    case 'Metaspace':
      return metaspace(config, where)
    case 'Split':
      return splitter(
        patternOf(config.pattern, `${where}.pattern`),
        behaviorOf(config.behavior, where, 'isolated'),
        config.invert === true,
      )
    case 'Digits':
      return splitter(/\p{N}/gu, config.individual_digits === true ? 'isolated' : 'contiguous')
    case 'Punctuation':
      return splitter(PUNCTUATION, behaviorOf(config.behavior, where, 'isolated'))
    case 'Whitespace':
      return splitter(new RegExp(`[${WORD_CLASS}]+|[^${WORD_CLASS}\\p{White_Space}]+`, 'gu'), 'removed', true)
    case 'WhitespaceSplit':
      return whitespace()
    case 'BertPreTokenizer': {
      const [spaces, marks] = [whitespace(), splitter(PUNCTUATION, 'isolated')]
      return (words) => marks(spaces(words))
    }
    case 'CharDelimiterSplit':
      return splitter(patternOf(String(config.delimiter), `${where}.delimiter`), 'removed')
  }
  const known =
    'Sequence, ByteLevel, Metaspace, Split, Digits, Punctuation, Whitespace, WhitespaceSplit, BertPreTokenizer or CharDelimiterSplit'
  throw new Unsupported(`${where}.type`, known, String(config.type))
}

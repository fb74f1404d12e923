/**
 * Byte-pair encoding: trains small tokenizers and writes them as Hugging Face files. `trainBpe` makes LLaMA's layout
 * (pieces with ▁, byte fallback), `trainClipBpe` CLIP's (lower case, byte alphabet, `</w>`).
 */
import fs from 'node:fs'
import path from 'node:path'
import { mismatch, show } from '../util/errors.js'
import { BYTE_CHARS } from './tokenizer/pre-tokenizers.js'

type Json = Record<string, unknown>

/** What a tokenizer folder holds; write it with saveTokenizer. */
export interface TrainedTokenizer {
  /** structure of tokenizer.json */
  definition: Json
  /** structure of tokenizer_config.json */
  config: Json
  /** structure of special_tokens_map.json */
  specialTokens: Json
  /** tokens of the vocabulary: fewer than asked for when the text has no more pairs worth merging */
  vocabSize: number
}

/** metaspace: pre-tokenizer, LLaMA's `legacy: false`; prepend: normalizer, LLaMA's `legacy: true`. */
export type BpeStyle = 'metaspace' | 'prepend'

export interface BpeOptions {
  /** tokens altogether, special tokens and the 256 bytes included */
  vocabSize: number
  style?: BpeStyle
  /** a pair seen less often is not merged, default 2 */
  minCount?: number
}

// ---- learning merges ----------------------------------------------------------------------------------------------------

/** A word as symbol numbers, and how often it occurs. */
interface Word {
  symbols: number[]
  count: number
}
/** A pair is one number: both symbols are below 2^21. */
const PAIR = 2 ** 21
interface Entry {
  pair: number
  count: number
}

/** Largest count first, then the pair of the oldest symbols. */
const before = (a: Entry, b: Entry): boolean => a.count > b.count || (a.count === b.count && a.pair < b.pair)

/** Binary heap. Entries go stale when counts change: a changed pair is pushed again, an old entry is known by its count. */
class Heap {
  private readonly items: Entry[] = []
  push(entry: Entry): void {
    const { items } = this
    let i = items.push(entry) - 1
    for (let up = (i - 1) >> 1; i > 0 && before(entry, items[up]); i = up, up = (i - 1) >> 1) items[i] = items[up]
    items[i] = entry
  }
  pop(): Entry | undefined {
    const { items } = this
    const top = items[0]
    const last = items.pop()
    if (!last || !items.length) return top
    let i = 0
    for (let child = 1; child < items.length; child = 2 * i + 1) {
      if (child + 1 < items.length && before(items[child + 1], items[child])) child++
      if (!before(items[child], last)) break
      items[i] = items[child]
      i = child
    }
    items[i] = last
    return top
  }
}

/** Counts of neighbouring symbols over all words, kept up to date while pairs are merged. */
class PairCounts {
  private readonly counts = new Map<number, number>()
  private readonly places = new Map<number, Set<number>>()
  private readonly heap = new Heap()
  constructor(private readonly words: Word[]) {
    words.forEach((word, w) => {
      this.count(word, w, 1)
    })
    for (const [pair, count] of this.counts) this.heap.push({ pair, count })
  }

  private count({ symbols, count }: Word, w: number, sign: 1 | -1, changed?: Set<number>): void {
    for (let i = 0; i + 1 < symbols.length; i++) {
      const pair = symbols[i] * PAIR + symbols[i + 1]
      this.counts.set(pair, (this.counts.get(pair) ?? 0) + sign * count)
      let set = this.places.get(pair)
      if (!set) {
        set = new Set()
        this.places.set(pair, set)
      }
      set.add(w)
      changed?.add(pair)
    }
  }

  /** The most frequent pair, or undefined when none occurs `minCount` times. */
  best(minCount: number): number | undefined {
    for (;;) {
      const top = this.heap.pop()
      if (!top) return undefined
      const now = this.counts.get(top.pair) ?? 0
      if (now === top.count) return now >= minCount ? top.pair : undefined
    }
  }

  /** Replaces a pair by one symbol wherever it occurs. */
  merge(pair: number, symbol: number): void {
    const [left, right] = [Math.floor(pair / PAIR), pair % PAIR]
    const changed = new Set<number>()
    for (const w of this.places.get(pair) ?? []) {
      const word = this.words[w]
      this.count(word, w, -1, changed)
      const merged: number[] = []
      for (let i = 0; i < word.symbols.length; i++)
        if (word.symbols[i] === left && word.symbols[i + 1] === right) {
          merged.push(symbol)
          i++
        } else merged.push(word.symbols[i])
      word.symbols = merged
      this.count(word, w, 1, changed)
    }
    this.counts.delete(pair)
    this.places.delete(pair)
    for (const p of changed) {
      const count = this.counts.get(p) ?? 0
      if (count > 0) this.heap.push({ pair: p, count })
    }
  }
}

/**
 * Learns merges until there are `size` new pieces.
 * @param words symbols of each different word, and how often it occurs
 * @param alphabet the symbols to begin with, in a fixed order
 * @returns merges in the order they were learnt, and the new pieces (two merges can make the same one)
 */
function learn(
  words: { symbols: string[]; count: number }[],
  alphabet: string[],
  size: number,
  minCount: number,
): { merges: [string, string][]; pieces: string[] } {
  const symbols = [...alphabet]
  const numbers = new Map(symbols.map((s, i) => [s, i]))
  const counts = new PairCounts(
    words.map((w) => ({ symbols: w.symbols.map((s) => numbers.get(s) as number), count: w.count })),
  )
  const merges: [string, string][] = []
  while (symbols.length - alphabet.length < size) {
    const pair = counts.best(minCount)
    if (pair === undefined) break
    const [left, right] = [symbols[Math.floor(pair / PAIR)], symbols[pair % PAIR]]
    let number = numbers.get(left + right)
    if (number === undefined) {
      number = symbols.push(left + right) - 1
      numbers.set(left + right, number)
    }
    merges.push([left, right])
    counts.merge(pair, number)
  }
  return { merges, pieces: symbols.slice(alphabet.length) }
}

function checkOptions(texts: Iterable<string>, { vocabSize, minCount = 2 }: BpeOptions, smallest: number): void {
  if (typeof texts === 'string') throw mismatch('ERR_ARGUMENT', 'bpe', 'texts', 'a list of texts', 'one string')
  if (!Number.isInteger(vocabSize) || vocabSize < smallest || vocabSize >= PAIR)
    throw mismatch('ERR_ARGUMENT', 'bpe', 'vocabSize', `an integer from ${smallest} to ${PAIR - 1}`, show(vocabSize))
  if (!Number.isInteger(minCount) || minCount < 1)
    throw mismatch('ERR_ARGUMENT', 'bpe', 'minCount', 'an integer >= 1', show(minCount))
}

/** Counts equal strings. */
function tally(strings: Iterable<string>): Map<string, number> {
  const counts = new Map<string, number>()
  for (const s of strings) counts.set(s, (counts.get(s) ?? 0) + 1)
  return counts
}

/** Code point order, the same on every machine. */
const ordered = (strings: Iterable<string>): string[] => [...strings].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0))

const specialToken = (content: string, id: number): Json => ({
  id,
  content,
  single_word: false,
  lstrip: false,
  rstrip: false,
  normalized: false,
  special: true,
})

// ---- LLaMA ----------------------------------------------------------------------------------------------------------------

const SPACE = '▁'
const SPECIAL = ['<unk>', '<s>', '</s>']
const BYTE_TOKENS = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`)
const FIXED = SPECIAL.length + BYTE_TOKENS.length
/** A piece is letters or other signs, never both, so that a name looks the same before a comma; digits stand alone. */
const WORDS = /▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\p{L}\p{M}\p{N}▁]+|▁/gu

/** Letters and signs that get a token of their own: the most frequent ones, the rest is written in bytes. */
function llamaAlphabet(texts: readonly string[], limit: number): string[] {
  const counts = new Map<string, number>()
  for (const text of texts) for (const c of text) if (!/[\s\p{C}▁]/u.test(c)) counts.set(c, (counts.get(c) ?? 0) + 1)
  const frequent = ordered(counts.keys()).sort((a, b) => (counts.get(b) as number) - (counts.get(a) as number))
  return ordered(frequent.slice(0, limit))
}

/** Words of the text as the encoder will see them: ▁ for the space before a word, nothing across unknown characters. */
function* llamaWords(texts: readonly string[], alphabet: Set<string>): Generator<string> {
  for (const text of texts)
    for (const part of text.split(/<unk>|<s>|<\/s>/)) {
      if (part === '') continue
      let known = ''
      for (const c of part.startsWith(' ') ? part : ` ${part}`) known += c === ' ' ? SPACE : alphabet.has(c) ? c : '\n'
      for (const stretch of known.split('\n')) yield* stretch.match(WORDS) ?? []
    }
}

/**
 * Every split of a piece into two tokens, by rank of the piece: transformers lists them so when it converts a
 * sentencepiece model, and then tokenizer.json gives sentencepiece's answer whatever came first in training.
 */
function allSplits(pieces: string[], vocab: Map<string, number>): [string, string][] {
  const rank = (s: string): number => vocab.get(s) as number
  return pieces.flatMap((piece) => {
    const chars = Array.from(piece)
    const splits: [string, string][] = []
    for (let k = 1; k < chars.length; k++) splits.push([chars.slice(0, k).join(''), chars.slice(k).join('')])
    return splits
      .filter(([a, b]) => vocab.has(a) && vocab.has(b))
      .sort((x, y) => rank(x[0]) - rank(y[0]) || rank(x[1]) - rank(y[1]))
  })
}

/**
 * Trains a tokenizer in LLaMA's layout: `<unk> <s> </s>`, 256 byte tokens, merged pieces by rank, single characters.
 * A pure function of the texts (their order does not matter) and the options. Every text without a literal ▁ comes back
 * from decode(encode(text)), except that `metaspace` drops one of the spaces a text begins with, as LLaMA's does.
 * @param texts what the model will read; special tokens in them are left out, line breaks end a word
 * @throws AlignGPTError ERR_ARGUMENT
 */
export function trainBpe(texts: Iterable<string>, options: BpeOptions): TrainedTokenizer {
  const { vocabSize, style = 'metaspace', minCount = 2 } = options
  checkOptions(texts, options, FIXED + 1)
  if (style !== 'metaspace' && style !== 'prepend')
    throw mismatch('ERR_ARGUMENT', 'bpe', 'style', "'metaspace' or 'prepend'", show(style))
  const all = [...texts]
  const chars = llamaAlphabet(all, Math.floor((vocabSize - FIXED - 1) / 2))
  const alphabet = [SPACE, ...chars]
  const words = [...tally(llamaWords(all, new Set(chars)))].map(([w, count]) => ({ symbols: Array.from(w), count }))
  const { pieces } = learn(words, alphabet, vocabSize - FIXED - alphabet.length, minCount)
  const order = [...SPECIAL, ...BYTE_TOKENS, ...pieces, ...alphabet]
  const vocab = new Map(order.map((t, i) => [t, i]))
  const names = { bos_token: '<s>', eos_token: '</s>', unk_token: '<unk>', pad_token: '<unk>' }
  return {
    definition: llamaDefinition(order, allSplits(pieces, vocab), style),
    config: {
      ...names,
      tokenizer_class: 'LlamaTokenizer',
      legacy: style === 'prepend',
      add_bos_token: true,
      add_eos_token: false,
      clean_up_tokenization_spaces: false,
      model_max_length: 2048,
      padding_side: 'right',
    },
    specialTokens: names,
    vocabSize: order.length,
  }
}

function llamaDefinition(order: string[], merges: [string, string][], style: BpeStyle): Json {
  const bos = { SpecialToken: { id: '<s>', type_id: 0 } }
  const text = (id: string): Json => ({ Sequence: { id, type_id: 0 } })
  const prepend = [
    { type: 'Prepend', prepend: SPACE },
    { type: 'Replace', pattern: { String: ' ' }, content: SPACE },
  ]
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: SPECIAL.map(specialToken),
    normalizer: style === 'prepend' ? { type: 'Sequence', normalizers: prepend } : null,
    pre_tokenizer:
      style === 'prepend' ? null : { type: 'Metaspace', replacement: SPACE, prepend_scheme: 'first', split: false },
    post_processor: {
      type: 'TemplateProcessing',
      single: [bos, text('A')],
      pair: [bos, text('A'), bos, text('B')],
      special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: SPACE }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: '<unk>',
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(order.map((t, i) => [t, i])),
      merges,
    },
  }
}

// ---- CLIP -----------------------------------------------------------------------------------------------------------------

const END_OF_WORD = '</w>'
const [CLIP_BOS, CLIP_EOS] = ['<|startoftext|>', '<|endoftext|>']
const CLIP_WORDS =
  "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"

/** Words as CLIP sees them: lower case, letters, single digits or signs. */
function* clipWords(texts: Iterable<string>): Generator<string> {
  const pattern = new RegExp(CLIP_WORDS, 'gu')
  for (const text of texts)
    for (const word of text.normalize('NFC').toLowerCase().match(pattern) ?? [])
      if (word !== CLIP_BOS && word !== CLIP_EOS) yield word
}

/**
 * Trains a tokenizer in CLIP's layout: 256 bytes, 256 bytes that end a word, merged pieces, start and end token.
 * A pure function of the texts (their order does not matter) and the options.
 * @throws AlignGPTError ERR_ARGUMENT
 */
export function trainClipBpe(texts: Iterable<string>, options: Omit<BpeOptions, 'style'>): TrainedTokenizer {
  const { vocabSize, minCount = 2 } = options
  // In CLIP's vocabulary bytes that are printable come first: the order of the stand-ins themselves.
  const bytes = [...BYTE_CHARS].sort()
  const alphabet = [...bytes, ...bytes.map((c) => c + END_OF_WORD)]
  checkOptions(texts, options, alphabet.length + 2)
  const words = [...tally(clipWords(texts))].map(([word, count]) => {
    const symbols = Array.from(Buffer.from(word), (b) => BYTE_CHARS[b])
    symbols[symbols.length - 1] += END_OF_WORD
    return { symbols, count }
  })
  const { merges, pieces } = learn(words, alphabet, vocabSize - alphabet.length - 2, minCount)
  const names = { bos_token: CLIP_BOS, eos_token: CLIP_EOS, unk_token: CLIP_EOS, pad_token: CLIP_EOS }
  const order = [...alphabet, ...pieces, CLIP_BOS, CLIP_EOS]
  return {
    definition: clipDefinition(order, merges),
    config: {
      ...names,
      tokenizer_class: 'CLIPTokenizer',
      do_lower_case: true,
      add_prefix_space: false,
      errors: 'replace',
      model_max_length: 77,
    },
    specialTokens: names,
    vocabSize: order.length,
  }
}

function clipDefinition(order: string[], merges: [string, string][]): Json {
  const [bos, eos] = [order.length - 2, order.length - 1]
  const normalizers = [
    { type: 'NFC' },
    { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
    { type: 'Lowercase' },
  ]
  const pretokenizers = [
    { type: 'Split', pattern: { Regex: CLIP_WORDS }, behavior: 'Removed', invert: true },
    { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
  ]
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [specialToken(CLIP_BOS, bos), specialToken(CLIP_EOS, eos)],
    normalizer: { type: 'Sequence', normalizers },
    pre_tokenizer: { type: 'Sequence', pretokenizers },
    post_processor: {
      type: 'RobertaProcessing',
      sep: [CLIP_EOS, eos],
      cls: [CLIP_BOS, bos],
      trim_offsets: false,
      add_prefix_space: false,
    },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: CLIP_EOS,
      continuing_subword_prefix: '',
      end_of_word_suffix: END_OF_WORD,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(order.map((t, i) => [t, i])),
      merges,
    },
  }
}

/** Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into a folder, which is made if need be. */
export function saveTokenizer(trained: TrainedTokenizer, folder: string): void {
  fs.mkdirSync(folder, { recursive: true })
  const write = (name: string, content: Json): void =>
    fs.writeFileSync(path.join(folder, name), `${JSON.stringify(content, null, 1)}\n`)
  write('tokenizer.json', trained.definition)
  write('tokenizer_config.json', trained.config)
  write('special_tokens_map.json', trained.specialTokens)
}

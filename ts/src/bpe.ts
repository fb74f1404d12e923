/** Training small byte-pair tokenizers, written as the tokenizer.json files Llama and CLIP folders hold. */
import fs from 'node:fs'
import path from 'node:path'
import { AlignGPTError } from './errors.js'

type Merge = [string, string]

/** Words (as lists of symbols) with their counts -> the first `count` merges, most frequent pair first, ties by name. */
function learnMerges(words: Map<string, number>, symbols: (word: string) => string[], count: number): Merge[] {
  const list = [...words].map(([word, n]) => ({ s: symbols(word), n }))
  const pairs = new Map<string, { n: number; where: Set<number> }>()
  const change = (i: number, sign: 1 | -1): void => {
    const { s, n } = list[i]
    for (let k = 0; k + 1 < s.length; k++) {
      const key = `${s[k]} ${s[k + 1]}`
      const p = pairs.get(key) ?? { n: 0, where: new Set<number>() }
      p.n += sign * n
      p.where.add(i)
      if (p.n > 0) pairs.set(key, p)
      else pairs.delete(key)
    }
  }
  for (let i = 0; i < list.length; i++) change(i, 1)
  const merges: Merge[] = []
  while (merges.length < count) {
    let best = ''
    let most = 0
    for (const [key, p] of pairs) if (p.n > most || (p.n === most && key < best)) [best, most] = [key, p.n]
    if (most === 0) break
    const [left, right] = best.split(' ') as Merge
    merges.push([left, right])
    for (const i of [...(pairs.get(best)?.where ?? [])]) {
      const { s } = list[i]
      if (!s.some((x, k) => x === left && s[k + 1] === right)) continue
      change(i, -1)
      const joined: string[] = []
      for (let k = 0; k < s.length; k++)
        if (s[k] === left && s[k + 1] === right) {
          joined.push(left + right)
          k++
        } else joined.push(s[k])
      list[i].s = joined
      change(i, 1)
    }
  }
  return merges
}

function countWords(texts: readonly string[], split: (text: string) => string[]): Map<string, number> {
  const words = new Map<string, number>()
  for (const text of texts) for (const w of split(text)) words.set(w, (words.get(w) ?? 0) + 1)
  return words
}

const added = (id: number, content: string): object => ({
  id,
  content,
  single_word: false,
  lstrip: false,
  rstrip: false,
  normalized: false,
  special: true,
})

function writeTokenizer(folder: string, json: object, config: object): void {
  fs.mkdirSync(folder, { recursive: true })
  fs.writeFileSync(path.join(folder, 'tokenizer.json'), `${JSON.stringify(json)}\n`)
  fs.writeFileSync(path.join(folder, 'tokenizer_config.json'), `${JSON.stringify(config, null, 2)}\n`)
}

/**
 * Trains a Llama-style tokenizer (word starts as ▁, bytes for what is unknown) and writes tokenizer.json.
 * Ids: <unk> <s> </s>, 256 bytes, merged pieces, single characters.
 * @param vocabSize upper limit, at least 300; small texts give fewer pieces
 * @returns the vocabulary's size
 */
export function trainLlamaTokenizer(folder: string, texts: readonly string[], vocabSize: number): number {
  const characters = new Set(texts.flatMap((t) => Array.from(t)).filter((c) => /[\p{L}\p{N}\p{P}\p{S}]/u.test(c)))
  const alphabet = ['▁', ...[...characters].sort()]
  const room = vocabSize - 259 - alphabet.length
  if (room < 1)
    throw new AlignGPTError(
      'ERR_ARGUMENT',
      `[bpe] vocabSize: expected more than ${259 + alphabet.length}, got ${vocabSize}`,
    )
  const words = countWords(texts, (t) =>
    t
      .split(/\s+/)
      .filter((w) => w)
      .map((w) => `▁${w}`),
  )
  const merges = learnMerges(words, (w) => Array.from(w).filter((c) => c === '▁' || characters.has(c)), room)
  const bytes = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`)
  const pieces = [...new Set(merges.map(([a, b]) => a + b))]
  const order = ['<unk>', '<s>', '</s>', ...bytes, ...pieces, ...alphabet]
  const json = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: ['<unk>', '<s>', '</s>'].map((t, id) => added(id, t)),
    normalizer: null,
    pre_tokenizer: { type: 'Metaspace', replacement: '▁', prepend_scheme: 'first', split: false },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [
        { SpecialToken: { id: '<s>', type_id: 0 } },
        { Sequence: { id: 'A', type_id: 0 } },
        { Sequence: { id: 'B', type_id: 1 } },
      ],
      special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
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
      vocab: Object.fromEntries(order.map((p, i) => [p, i])),
      merges,
    },
  }
  const special = { bos_token: '<s>', eos_token: '</s>', unk_token: '<unk>', pad_token: '<unk>' }
  writeTokenizer(folder, json, {
    ...special,
    tokenizer_class: 'LlamaTokenizer',
    legacy: false,
    add_bos_token: true,
    add_eos_token: false,
    model_max_length: 2048,
  })
  return order.length
}

/** GPT-2's printable stand-in for each byte. */
function byteAlphabet(): string[] {
  const keep = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174
  let extra = 0
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(keep(b) ? b : 256 + extra++))
}

const CLIP_WORDS =
  "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"

/** Trains a CLIP-style tokenizer (lower case, words end in </w>) and writes tokenizer.json. @returns the vocabulary's size */
export function trainClipTokenizer(
  folder: string,
  texts: readonly string[],
  merges: number,
  maxLength: number,
): number {
  const alphabet = byteAlphabet()
  const pattern = new RegExp(CLIP_WORDS, 'gu')
  const words = countWords(texts, (t) =>
    (t.toLowerCase().match(pattern) ?? []).map((w) => Array.from(Buffer.from(w), (b) => alphabet[b]).join('')),
  )
  const learned = learnMerges(
    words,
    (w) => Array.from(w).map((c, i, all) => (i === all.length - 1 ? `${c}</w>` : c)),
    merges,
  )
  const pieces = [...new Set(learned.map(([a, b]) => a + b))]
  const base = [...alphabet].sort()
  const order = [...base, ...base.map((c) => `${c}</w>`), ...pieces, '<|startoftext|>', '<|endoftext|>']
  const [bos, eos] = [order.length - 2, order.length - 1]
  const json = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [added(bos, '<|startoftext|>'), added(eos, '<|endoftext|>')],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFC' },
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Lowercase' },
      ],
    },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Split', pattern: { Regex: CLIP_WORDS }, behavior: 'Removed', invert: true },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: {
      type: 'RobertaProcessing',
      sep: ['<|endoftext|>', eos],
      cls: ['<|startoftext|>', bos],
      trim_offsets: false,
      add_prefix_space: false,
    },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: '<|endoftext|>',
      continuing_subword_prefix: '',
      end_of_word_suffix: '</w>',
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(order.map((p, i) => [p, i])),
      merges: learned,
    },
  }
  const special = {
    bos_token: '<|startoftext|>',
    eos_token: '<|endoftext|>',
    unk_token: '<|endoftext|>',
    pad_token: '<|endoftext|>',
  }
  writeTokenizer(folder, json, { ...special, tokenizer_class: 'CLIPTokenizer', model_max_length: maxLength })
  return order.length
}

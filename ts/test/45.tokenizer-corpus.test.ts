/**
 * Tokenizers of every kind that is read, on texts that are hard for them: the same ids, offsets and texts as Hugging Face's Rust library.
 * tokenizers.json.gz is made by scripts/parity/tokenizer_corpus.py, sentencepiece.json.gz by sentencepiece_corpus.py beside it.
 */
import fs from 'node:fs'
import path from 'node:path'
import { gunzipSync } from 'node:zlib'
import { afterAll, describe, expect, it } from 'vitest'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { tempDir } from './data-cases.js'

type Ids = number[]
interface Golden {
  texts: string[]
  tokenizers: {
    name: string
    definition: Record<string, unknown>
    /** text, ids, where each token starts, ids with the template's where they differ, text of all ids, of those that are not special */
    results: [
      text: number,
      ids: Ids,
      starts: number[],
      full: Ids | null,
      decoded: string | null,
      plain: string | null,
    ][]
  }[]
}
const read = (name: string): unknown =>
  JSON.parse(gunzipSync(fs.readFileSync(new URL(name, import.meta.url))).toString())
const golden = read('tokenizers.json.gz') as Golden

it('covers what it says', () => {
  expect(golden.tokenizers.length).toBeGreaterThanOrEqual(20)
  expect(golden.texts.length).toBeGreaterThanOrEqual(2000)
  const used = new Set(golden.tokenizers.flatMap((t) => t.results.map(([text]) => text)))
  expect(used.size).toBe(golden.texts.length)
})

describe.each(golden.tokenizers)('$name', ({ name, definition, results }) => {
  const tokenizer = new Tokenizer(definition, [], {}, name)
  it('ids, offsets, template', () => {
    for (const [i, ids, starts, full] of results) {
      const text = golden.texts[i]
      const made = tokenizer.encodeWithOffsets(text)
      expect({ text, ...made }).toEqual({ text, ids, starts })
      expect(tokenizer.encode(text)).toEqual(full ?? ids)
    }
  })
  it('text', () => {
    for (const [, ids, , , decoded, plain] of results) {
      // null: the Rust library panics
      if (decoded !== null) expect(tokenizer.decode(ids)).toBe(decoded)
      if (plain !== null) expect(tokenizer.decode(ids, { skipSpecialTokens: true })).toBe(plain)
    }
  })
})

interface Sentencepiece {
  texts: string[]
  cases: {
    name: string
    model: string
    config: { legacy: boolean }
    results: [ids: Ids, text: string | null][]
  }[]
}
describe('tokenizer.model', () => {
  const { texts, cases } = read('sentencepiece.json.gz') as Sentencepiece
  const folder = tempDir()
  afterAll(() => fs.rmSync(folder, { recursive: true }))
  it.each(cases.map((c) => [`${c.name}, legacy: ${c.config.legacy}`, c] as const))(
    '%s: ids and texts of sentencepiece, of transformers',
    (_, { model, config, results }) => {
      fs.writeFileSync(path.join(folder, 'tokenizer.model'), Buffer.from(model, 'base64'))
      fs.writeFileSync(path.join(folder, 'tokenizer_config.json'), JSON.stringify(config))
      const tokenizer = Tokenizer.load(folder)
      for (const [i, [ids, decoded]] of results.entries()) {
        const text = texts[i]
        expect({ text, ids: tokenizer.encode(text, { addSpecialTokens: false }) }).toEqual({ text, ids })
        if (decoded !== null) expect(tokenizer.decode(ids)).toBe(decoded)
      }
    },
  )
})

describe('parts that are not read are refused by name', () => {
  const base = golden.tokenizers[0].definition as { model: Record<string, unknown> }
  const cases: [string, Record<string, unknown>, RegExp][] = [
    ['Unigram', { model: { type: 'Unigram', vocab: [['a', 0]] } }, /model\.type: expected BPE, got Unigram/],
    ['WordPiece', { model: { type: 'WordPiece', vocab: { a: 0 } } }, /model\.type: expected BPE, got WordPiece/],
    ['dropout', { model: { ...base.model, dropout: 0.1 } }, /model\.dropout: expected none, got 0\.1/],
    [
      'charsmap',
      { normalizer: { type: 'Precompiled', precompiled_charsmap: '' } },
      /normalizer\.type: .*got Precompiled/,
    ],
    [
      'within a sequence',
      { normalizer: { type: 'Sequence', normalizers: [{ type: 'NFC' }, { type: 'Nmt' }] } },
      /normalizer\[1\]\.type: .*got Nmt/,
    ],
    ['scripts', { pre_tokenizer: { type: 'UnicodeScripts' } }, /pre_tokenizer\.type: .*got UnicodeScripts/],
    [
      'behavior',
      { pre_tokenizer: { type: 'Split', pattern: { String: '-' }, behavior: 'Odd' } },
      /behavior: .*got Odd/,
    ],
    [
      'pattern',
      { pre_tokenizer: { type: 'Split', pattern: { Regex: '(' } } },
      /pattern: expected a regular expression/,
    ],
    [
      'atomic group that looks behind',
      { pre_tokenizer: { type: 'Split', pattern: { Regex: '(?<=a++)b' } } },
      /pattern: .*looks behind/,
    ],
    ['letters that fold', { pre_tokenizer: { type: 'Split', pattern: { Regex: '(?i:ss)' } } }, /more than two forms/],
    [
      'bytes with a suffix',
      { model: { ...base.model, end_of_word_suffix: '</w>' } },
      /byte_fallback: expected false beside a subword prefix or suffix/,
    ],
    [
      'added token of nothing',
      {
        normalizer: { type: 'Strip', strip_left: true, strip_right: true },
        added_tokens: [{ id: 1, content: '\n', normalized: true }],
      },
      /added token "\\n": expected a text that the normalizer leaves/,
    ],
    ['decoder', { decoder: { type: 'WordPiece' } }, /decoder\.type: .*got WordPiece/],
    ['post', { post_processor: { type: 'Odd' } }, /post_processor\.type: .*got Odd/],
    ['added token', { added_tokens: [{ id: 1, content: 5 }] }, /added_tokens\[0\]\.content: expected a text, got 5/],
    ['added id', { added_tokens: [{ id: -1, content: 'a' }] }, /added_tokens\[0\]\.id: expected a whole number/],
    ['merge', { model: { ...base.model, merges: [['q', 'nothing']] } }, /model\.merges: expected two pieces/],
  ]
  it.each(cases)('%s', (_, change, message) => {
    expect(() => new Tokenizer({ ...base, ...change }, [], {}, 'odd')).toThrow(message)
  })
})

describe('long texts', () => {
  it.each(['llama', 'metaspace always', 'llama 3'])(
    '%s: words of 200,000 characters, texts of 120,000 tokens',
    (name) => {
      const { definition } = golden.tokenizers.find((t) => t.name === name) as (typeof golden.tokenizers)[0]
      const tokenizer = new Tokenizer(definition, [], {}, name)
      for (const text of ['ab'.repeat(100_000), 'a red box '.repeat(40_000), 'é'.repeat(60_000)]) {
        const { ids, starts } = tokenizer.encodeWithOffsets(text)
        expect(starts.length).toBe(ids.length)
        expect(starts.at(-1)).toBeLessThan(text.length)
        expect(starts.at(-1)).toBeGreaterThan(text.length - 9)
      }
    },
  )
})

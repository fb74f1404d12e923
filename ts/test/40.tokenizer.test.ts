import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { AlignGPTError } from '../src/util/errors.js'
import { CASES, caseDir, expectedOf, readJson, recordsOf, refuses, tempDir } from './data-cases.js'

const dirs: string[] = []
afterAll(() => {
  for (const d of dirs) fs.rmSync(d, { recursive: true })
})
/** A folder with some files of a model. */
function only(from: string, names: string[]): string {
  const d = tempDir()
  dirs.push(d)
  for (const n of names) fs.copyFileSync(path.join(from, n), path.join(d, n))
  return d
}
const llm = (name: string): string => caseDir(name, 'model', 'llm')
const clip = (name: string): string => caseDir(name, 'model', 'clip')
const fromModel = (name: string): Tokenizer =>
  Tokenizer.load(only(llm(name), ['tokenizer.model', 'tokenizer_config.json']))
const skip = { skipSpecialTokens: true }

describe.each(CASES)('%s', (name) => {
  const expected = expectedOf(name)
  const tokenizers: [string, Tokenizer][] = [
    ['tokenizer.json', Tokenizer.load(llm(name))],
    ['tokenizer.model alone', fromModel(name)],
  ]
  it.each(tokenizers)('%s: every probe, ids and text', (_, t) => {
    for (const p of expected.tokenizer_probes) {
      expect(t.encode(p.text), p.text).toEqual(p.llm_ids)
      expect(t.encode(p.text, { addSpecialTokens: false }), p.text).toEqual(p.llm_ids_no_special)
      expect(t.encodeWithOffsets(p.text).ids, p.text).toEqual(p.llm_ids_no_special)
      expect(t.decode(p.llm_ids, skip), p.text).toBe(p.llm_decoded)
    }
    for (const g of expected.infer) expect(t.decode(g.generated_ids, skip)).toBe(g.generated_text)
  })
  it.each(tokenizers)('%s: special ids', (_, t) => {
    expect([t.bosId, t.eosId, t.padId, t.eosToken, t.vocabSize]).toEqual([
      1,
      2,
      0,
      '</s>',
      readJson<{ vocab_size: number }>(path.join(llm(name), 'config.json')).vocab_size,
    ])
    expect([
      t.tokenToId('<s>'),
      t.idToToken(2),
      t.tokenToId('nope'),
      t.idToToken(1e6),
      t.isSpecial(1),
      t.isSpecial(50),
    ]).toEqual([1, '</s>', undefined, undefined, true, false])
  })
  it.each([
    ['tokenizer.json', Tokenizer.load(clip(name))],
    [
      'vocab.json and merges.txt',
      Tokenizer.load(only(clip(name), ['vocab.json', 'merges.txt', 'tokenizer_config.json'])),
    ],
  ])('CLIP, %s: every probe; captions cut with the end token kept', (_, t) => {
    for (const p of expected.tokenizer_probes) expect(t.encode(p.text), p.text).toEqual(p.clip_ids)
    const spec = readJson<{ text_config: { max_position_embeddings: number; vocab_size: number } }>(
      path.join(clip(name), 'config.json'),
    ).text_config
    for (const r of recordsOf(name, 'data_phase1.json')) {
      const ids = t.encodeClip(r.conversations[1].value, spec.max_position_embeddings)
      expect(ids.length).toBeLessThanOrEqual(spec.max_position_embeddings)
      expect(ids[0]).toBe(spec.vocab_size - 2)
      expect(ids.indexOf(spec.vocab_size - 1)).toBe(ids.length - 1)
    }
    expect([...t.encodeClip('a red circle above a square', 3)]).toEqual([
      spec.vocab_size - 2,
      t.encode('a')[1],
      spec.vocab_size - 1,
    ])
  })
  it('streams what it decodes, in finished characters only', () => {
    for (const [, t] of tokenizers)
      for (const p of [
        ...expected.tokenizer_probes.map((x) => x.llm_ids),
        ...expected.infer.map((x) => x.input_ids.filter((i) => i >= 0)),
      ]) {
        const s = t.stream(skip)
        const pieces = p.map((id) => s.push(id))
        expect(pieces.join('').includes('\ufffd')).toBe(false)
        expect(pieces.join('') + s.end()).toBe(t.decode(p, skip))
      }
  })
})

describe('offsets', () => {
  const all = CASES.flatMap((name) => [Tokenizer.load(llm(name)), fromModel(name)])
  it('are those of the Rust library on samples worked out by hand', () => {
    const t = Tokenizer.load(llm('base'))
    // ▁ASSISTANT(0) :(9) ▁(10) 1 2 ▁a(13) p p le s </s>(20) USER(24) : ...
    const { ids, starts } = t.encodeWithOffsets('ASSISTANT: 12 apples</s>USER: ok 🙂')
    const eos = ids.indexOf(2)
    expect(starts[eos]).toBe(20)
    expect(starts[eos + 1]).toBe(24)
    expect(starts.slice(-4)).toEqual([33, 33, 33, 33])
    expect(starts[0]).toBe(0)
    expect(starts).toContain(10)
  })
  const text = fc.array(
    fc.oneof(
      {
        weight: 6,
        arbitrary: fc.constantFrom(
          'a',
          'red ',
          ' circle',
          ' ',
          '  ',
          '\n',
          '.',
          '▁',
          ':',
          'ASSISTANT',
          '</s>',
          '<s>',
          '<unk>',
          'é',
          '🙂',
          '你',
          '\u0301',
          '<0x41>',
          '\ud800',
        ),
      },
      { weight: 1, arbitrary: fc.string({ unit: 'grapheme', maxLength: 4 }) },
    ),
    { maxLength: 24 },
  )
  it('never decrease, start inside the text, and tile it: any text', () => {
    fc.assert(
      fc.property(text, fc.nat(all.length - 1), (parts, k) => {
        const s = parts.join('')
        const t = all[k]
        const { ids, starts } = t.encodeWithOffsets(s)
        expect(ids).toEqual(t.encode(s, { addSpecialTokens: false }))
        starts.forEach((at, i) => {
          expect(at).toBeGreaterThanOrEqual(i ? starts[i - 1] : 0)
          expect(at).toBeLessThan(s.length)
        })
        // Every special token in the text is found where it stands.
        const specials = [...s.matchAll(/<\/?s>|<unk>/g)].map((m) => m.index)
        expect(ids.map((id, i) => (id < 3 && t.isSpecial(id) ? starts[i] : -1)).filter((x) => x >= 0)).toEqual(specials)
      }),
      { numRuns: 400, seed: 6 },
    )
  })
  it('word-by-word merging changes nothing', () => {
    const t = Tokenizer.load(llm('gqa'))
    const slow = Tokenizer.load(llm('gqa'))
    Object.assign(slow, { splitWords: false })
    expect((t as unknown as { splitWords: boolean }).splitWords).toBe(true)
    fc.assert(
      fc.property(text, (parts) => {
        const s = parts.join('')
        expect(t.encode(s)).toEqual(slow.encode(s))
      }),
      { numRuns: 300, seed: 7 },
    )
  })
  it('go through normalizers that change the text', () => {
    const d = readJson<Record<string, unknown>>(path.join(llm('base'), 'tokenizer.json'))
    const t = new Tokenizer(
      { ...d, normalizer: { type: 'Sequence', normalizers: [{ type: 'NFC' }, { type: 'Lowercase' }] } },
      [{ bos_token: '<s>', eos_token: '</s>' }],
    )
    const s = 'Cafe\u0301 IS </s>Open'
    const { ids, starts } = t.encodeWithOffsets(s)
    expect(starts[ids.indexOf(2)]).toBe(9)
    expect(starts[ids.indexOf(2) + 1]).toBe(13)
    expect(
      ids
        .map((id) => t.idToToken(id))
        .join('')
        .toLowerCase(),
    ).toContain('open')
    expect(Math.max(...starts)).toBeLessThan(s.length)
  })
})

describe('decoding', () => {
  const t = Tokenizer.load(llm('base'))
  const byte = (b: number): number => 3 + b
  it('gives one U+FFFD per byte of a run that is not UTF-8, as the Rust library does', () => {
    expect(t.decode([byte(0xe4), byte(0xbd)])).toBe('\ufffd\ufffd')
    expect(t.decode([byte(0xe4), byte(0xbd), byte(0xa0), byte(0xff)])).toBe('\ufffd\ufffd\ufffd\ufffd')
    expect(t.decode([byte(0xef), byte(0xbb), byte(0xbf)])).toBe('\ufeff')
  })
  it('holds unfinished bytes back and lets hopeless ones go', () => {
    const s = t.stream()
    const smile = [0xf0, 0x9f, 0x99, 0x82].map(byte)
    expect(smile.map((id) => s.push(id))).toEqual(['', '', '', '🙂'])
    expect([byte(0xf0), byte(0x9f)].map((id) => s.push(id))).toEqual(['', ''])
    expect(s.end()).toBe('\ufffd\ufffd')
    const u = t.stream()
    expect([0xff, 0xff, 0xff, 0xff, 0x41].map((b) => u.push(byte(b))).join('') + u.end()).toBe(
      '\ufffd\ufffd\ufffd\ufffdA',
    )
  })
  it('leaves out ids outside the vocabulary and takes no ids', () => {
    expect(t.decode([])).toBe('')
    expect(t.decode([99999, -1])).toBe('')
    expect(t.decode([2], skip)).toBe('')
  })
})

describe('refusals', () => {
  it('names what is missing or broken', async () => {
    const d = tempDir()
    dirs.push(d)
    await refuses(() => Tokenizer.load(d), 'ERR_FORMAT', /tokenizer\.json, tokenizer\.model, or vocab\.json/)
    fs.writeFileSync(path.join(d, 'tokenizer.json'), '{"model": {')
    await refuses(() => Tokenizer.load(d), 'ERR_FORMAT', /tokenizer\.json at byte 11/)
    fs.writeFileSync(path.join(d, 'tokenizer.json'), '{"model": {"type": "Nope"}, "added_tokens": []}')
    await refuses(() => Tokenizer.load(d), 'ERR_FORMAT', /Nope/)
    await refuses(() => Tokenizer.load(clip('base')).encodeClip('x', 1), 'ERR_ARGUMENT', /at least 2/)
    const bare = new Tokenizer(readJson(path.join(llm('base'), 'tokenizer.json')))
    await refuses(() => bare.eosId, 'ERR_CONFIG', /eos_token: expected a token, got none/)
  })
  it.each([
    ['model_type', [0x12, 2, 0x18, 1], /model_type: expected 2 \(BPE\), got 1/],
    ['spaces behind words', [0x12, 3, 0xc0, 1, 1], /treat_whitespace_as_suffix: expected 0, got 1/],
    ['spaces that go', [0x1a, 2, 0x20, 1], /remove_extra_whitespaces: expected 0, got 1/],
    ['spaces that stay spaces', [0x1a, 2, 0x28, 0], /escape_whitespaces: expected 1, got 0/],
    ['nmt_nfkc', [0x1a, 5, 0x12, 3, 1, 2, 3], /precompiled_charsmap: expected none \(identity\), got 3 bytes/],
  ])('names the setting of a tokenizer.model that is not read: %s', async (_, more, message) => {
    const d = only(llm('base'), ['tokenizer.model', 'tokenizer_config.json'])
    fs.appendFileSync(path.join(d, 'tokenizer.model'), Buffer.from(more))
    await refuses(() => Tokenizer.load(d), 'ERR_FORMAT', message)
  })
  it('names a part that has another type, before it is used', async () => {
    const whole = readJson(path.join(llm('base'), 'tokenizer.json'))
    const { model } = whole as { model: object }
    const template = { type: 'TemplateProcessing', special_tokens: { '<s>': { ids: ['1'] } } }
    for (const [changes, pattern] of [
      [
        { post_processor: { type: 'TemplateProcessing', single: 'A' } },
        /post_processor\.single: expected a list, got "A"/,
      ],
      [{ post_processor: { ...template, single: [{ SpecialToken: { id: '<s>' } }] } }, /the ids of "<s>", got \["1"\]/],
      [{ post_processor: { type: 'BertProcessing', cls: ['a', 1] } }, /cls and sep, each a text and an id/],
      [
        { post_processor: { type: 'Sequence', processors: {} } },
        /post_processor\.processors: expected a list, got \{\}/,
      ],
      [{ normalizer: { type: 'Sequence', normalizers: 1 } }, /normalizer\.normalizers: expected a list, got 1/],
      [{ normalizer: { type: 'Prepend', prepend: {} } }, /normalizer\.prepend: expected a text, got \{\}/],
      [
        { pre_tokenizer: { type: 'Metaspace', replacement: [] } },
        /pre_tokenizer\.replacement: expected a text, got \[\]/,
      ],
      [{ decoder: { type: 'Strip', content: 7 } }, /decoder\.content: expected a text, got 7/],
      [{ decoder: { type: 'Sequence', decoders: true } }, /decoder\.decoders: expected a list, got true/],
      [{ model: { ...model, continuing_subword_prefix: {} } }, /model\.continuing_subword_prefix: expected a text/],
      [{ model: { ...model, unk_token: 3 } }, /model\.unk_token: expected a text, got 3/],
    ] as [object, RegExp][])
      await refuses(() => new Tokenizer({ ...(whole as object), ...changes }), 'ERR_FORMAT', pattern)
  })
  it('takes a damaged tokenizer.model with its own errors only', async () => {
    const d = tempDir()
    dirs.push(d)
    const bytes = fs.readFileSync(path.join(llm('base'), 'tokenizer.model'))
    const file = path.join(d, 'tokenizer.model')
    fs.writeFileSync(file, Buffer.from([0x12, 0x02, 0x18, 0x01]))
    await refuses(() => Tokenizer.load(d), 'ERR_FORMAT', /2 \(BPE\), got 1/)
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.nat(bytes.length - 1), fc.nat(255)), { maxLength: 3 }),
        fc.nat(bytes.length),
        (flips, cut) => {
          const b = Buffer.from(bytes.subarray(0, cut))
          for (const [at, v] of flips) if (at < cut) b[at] = v
          fs.writeFileSync(file, b)
          try {
            Tokenizer.load(d)
          } catch (e) {
            expect(e, String((e as Error).stack)).toBeInstanceOf(AlignGPTError)
          }
        },
      ),
      { numRuns: 60, seed: 8 },
    )
  })
})

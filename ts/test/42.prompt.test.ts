import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import type { DataRecord, Turn } from '../src/formats/record-file.js'
import { render, type Style, textOf } from '../src/processing/conversation/styles.js'
import { buildPrompt, buildSample, IGNORE, IMAGE_TOKEN, type Sample } from '../src/processing/sample.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { AlignGPTError } from '../src/util/errors.js'
import { CASES, caseDir, expectedOf, recordsOf, refuses } from './data-cases.js'

const load = (name: string): Tokenizer => Tokenizer.load(caseDir(name, 'model', 'llm'))
const base = load('base')
const human = (value: string): Turn => ({ from: 'human', value })
const gpt = (value: string): Turn => ({ from: 'gpt', value })
const record = (conversations: Turn[], image: string | null = 'a.png'): DataRecord => ({
  id: 'r',
  image,
  conversations,
  similarity: null,
})
/** Text of the labelled tokens. */
const learned = (s: Sample, t: Tokenizer): string => t.decode([...s.labels].filter((x) => x !== IGNORE))

describe.each(CASES)('%s', (name) => {
  const expected = expectedOf(name)
  const t = load(name)
  it.each([
    ['phase1', 'plain'],
    ['phase2', 'vicuna_v1'],
  ] as const)('%s: text, ids and labels of every sample', (phase, style) => {
    const records = recordsOf(name, `data_${phase}.json`)
    expect(expected[phase].samples.length).toBeGreaterThan(2)
    for (const want of expected[phase].samples) {
      const r = records.find((x) => x.id === want.id) as DataRecord
      const s = buildSample(r, t, { style, patches: 16 })
      expect(s.text).toBe(want.text)
      expect([...s.ids], want.id).toEqual(want.input_ids)
      expect([...s.labels], want.id).toEqual(want.labels)
      expect(s.length).toBe(want.input_ids.length + (r.image ? 16 : 0))
      expect(s.skip).toBeNull()
    }
  })
  it('inference: text and ids of every prompt', () => {
    const records = recordsOf(name, 'prompts.json')
    for (const want of expected.infer) {
      const r = records.find((x) => x.id === want.id) as DataRecord
      const s = buildPrompt(r.conversations, r.image, t, { style: 'vicuna_v1', patches: 16 })
      expect(s.text).toBe(want.text)
      expect([...s.ids], want.id).toEqual(want.input_ids)
      expect(s.labels.every((x) => x === IGNORE)).toBe(true)
    }
  })
})

// A byte-level tokenizer with Llama 3's special tokens.
function llama3Tokenizer(): Tokenizer {
  const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174
  let extra = 256
  const vocab: Record<string, number> = {}
  for (let b = 0; b < 256; b++) vocab[String.fromCharCode(printable(b) ? b : extra++)] = b
  for (const [i, m] of ['ĠI', 'is', 'Ġis', 'at', 'cat', 'Ġcat'].entries()) vocab[m] = 256 + i
  const names = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
  const added = names.map((content, i) => ({ id: 300 + i, content, normalized: false, special: true }))
  const merges = [
    ['Ġ', 'I'],
    ['i', 's'],
    ['Ġ', 'is'],
    ['a', 't'],
    ['c', 'at'],
    ['Ġ', 'cat'],
  ]
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true }
  return new Tokenizer(
    { added_tokens: added, pre_tokenizer: byteLevel, decoder: byteLevel, model: { type: 'BPE', vocab, merges } },
    [{ bos_token: '<|begin_of_text|>', eos_token: '<|eot_id|>' }],
  )
}

describe('styles', () => {
  const turns = [human('Hi?\n<image>'), gpt('A cat.'), human('Sure?'), gpt('Yes.')]
  const of = (style: Style, open = false, t = turns): string => textOf(render(record(t), { style, open }))
  it('vicuna_v1, as LLaVA writes it', () => {
    const system =
      "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
    expect(of('vicuna_v1')).toBe(`${system} USER: <image>\nHi? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>`)
    expect(of('vicuna_v1', true, turns.slice(0, 3))).toBe(
      `${system} USER: <image>\nHi? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:`,
    )
    expect(learned(buildSample(record(turns), base, { style: 'vicuna_v1', patches: 4 }), base)).toBe(
      'A cat.</s> Yes.</s>',
    )
  })
  it('llama_2, as LLaVA writes it', () => {
    const got = of('llama_2')
    expect(got).toMatch(/^\[INST\] <<SYS>>\nYou are a helpful, respectful/)
    expect(got).toMatch(
      /false information\.\n<<\/SYS>>\n\n<image>\nHi\? \[\/INST\] A cat\. <\/s><s>\[INST\] Sure\? \[\/INST\] Yes\. <\/s>$/,
    )
    expect(of('llama_2', true, turns.slice(0, 3))).toMatch(/<s>\[INST\] Sure\? \[\/INST\]$/)
    expect(textOf(render(record(turns), { style: 'llama_2', system: '' }))).toMatch(/^\[INST\] <image>\nHi\?/)
    expect(learned(buildSample(record(turns), base, { style: 'llama_2', patches: 4 }), base)).toBe(
      'A cat. </s> Yes. </s>',
    )
  })
  it('llama_3, as its chat template writes it', () => {
    const t = llama3Tokenizer()
    const padded = [human('  Hi?\n<image> '), gpt(' A cat. '), ...turns.slice(2)]
    const got = textOf(render(record(padded), { style: 'llama_3', system: 'S' }))
    expect(got).toBe(
      '<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nHi?<|eot_id|>' +
        '<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>' +
        '<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>',
    )
    const s = buildSample(record(padded), t, { style: 'llama_3', patches: 4 })
    expect(s.ids[0]).toBe(300)
    expect(learned(s, t)).toBe('A cat.<|eot_id|>Yes.<|eot_id|>')
    expect(textOf(render(record(turns.slice(0, 1)), { style: 'llama_3', open: true }))).toMatch(
      /<\|start_header_id\|>assistant<\|end_header_id\|>\n\n$/,
    )
  })
  it('plain drops the question and learns the caption', () => {
    const s = buildSample(record([human('what?'), gpt('a cat')]), base, { style: 'plain', patches: 4 })
    expect(s.text).toBe('<image>a cat\n')
    expect([...s.ids.slice(0, 2)]).toEqual([1, IMAGE_TOKEN])
    expect([...s.labels.slice(2)]).toEqual([...s.ids.slice(2)])
    const alone = buildSample(record([human('what?'), gpt('a cat')], null), base, { style: 'plain', patches: 4 })
    expect(alone.text).toBe('a cat\n')
    expect([...buildPrompt([human('x')], 'a.png', base, { style: 'plain', patches: 4 }).ids]).toEqual([1, IMAGE_TOKEN])
  })
})

describe('rules', () => {
  const text = (conversations: Turn[], image: string | null = 'a.png'): string =>
    textOf(render(record(conversations, image), { style: 'vicuna_v1', system: 'S' }))
  it('moves the picture to the front of its turn and strips it', () => {
    expect(text([human('  What? <image>\n'), gpt(' a ')])).toBe('S USER: <image>\nWhat? ASSISTANT:  a </s>')
    expect(text([human('<image>'), gpt('a')])).toBe('S USER: <image> ASSISTANT: a</s>')
    expect(text([human('one'), gpt('a'), human('two<image>'), gpt('b')])).toBe(
      'S USER: one ASSISTANT: a</s>USER: <image>\ntwo ASSISTANT: b</s>',
    )
    expect(text([human(' one '), gpt('a')])).toBe('S USER: <image>\none ASSISTANT: a</s>')
  })
  it('drops a leading answer, also one that holds the placeholder', () => {
    expect(text([gpt('hello'), human('q <image>'), gpt('a')])).toBe('S USER: <image>\nq ASSISTANT: a</s>')
    expect(text([gpt('hello <image>'), human('q'), gpt('a')])).toBe('S USER: <image>\nq ASSISTANT: a</s>')
    expect(text([gpt('hello'), human('q'), gpt('a')], null)).toBe('S USER: q ASSISTANT: a</s>')
  })
  it('keeps a literal <image> in a text-only sample as text', () => {
    const r = record([human('what is <image>?'), gpt('a tag: <image>')], null)
    const s = buildSample(r, base, { style: 'vicuna_v1', patches: 4 })
    expect(s.text).toContain('what is <image>? ASSISTANT: a tag: <image></s>')
    expect(s.ids.includes(IMAGE_TOKEN)).toBe(false)
    expect(learned(s, base)).toBe('a tag: <image></s>')
  })
  it('takes a system turn in place of the system prompt', () => {
    expect(text([{ from: 'system', value: 'X' }, human('q'), gpt('a')], null)).toBe('X USER: q ASSISTANT: a</s>')
  })
  it.each<[string, Turn[], string | null, RegExp]>([
    ['a second placeholder', [human('<image> and <image>'), gpt('a')], 'a.png', /at most one <image>, got 2/],
    [
      'a second placeholder in another turn',
      [human('<image>'), gpt('a'), human('<image>'), gpt('b')],
      'a.png',
      /at most one/,
    ],
    ['two questions in a row', [human('a'), human('b'), gpt('c')], null, /turn 1: expected from gpt, got from human/],
    ['no question', [gpt('a')], null, /at least one question/],
    ['no answer', [human('a')], null, /an answer to learn/],
    ['a late system turn', [human('a'), { from: 'system', value: 's' }, gpt('c')], null, /only at the start/],
  ])('refuses %s', (_, turns, image, pattern) =>
    refuses(() => buildSample(record(turns, image), base, { style: 'vicuna_v1', patches: 4 }), 'ERR_DATA', pattern),
  )
  it('refuses other misuse', async () => {
    await refuses(
      () => buildSample(record([human('a'), gpt('b'), human('c'), gpt('d')]), base, { style: 'plain', patches: 4 }),
      'ERR_DATA',
      /one question and one caption/,
    )
    await refuses(
      () => buildPrompt([human('a'), gpt('b')], null, base, { style: 'vicuna_v1', patches: 4 }),
      'ERR_DATA',
      /last turn: expected a question/,
    )
    await refuses(
      () => render(record([human('a')]), { style: 'chatml' as Style }),
      'ERR_ARGUMENT',
      /plain or vicuna_v1/,
    )
  })
})

describe('the gate sees', () => {
  it('all text but BOS and the picture, answers marked', () => {
    const s = buildSample(record([human('<image>\nWhat?'), gpt('A cat.')]), base, { style: 'vicuna_v1', patches: 4 })
    expect([...s.gateIds]).toEqual([...s.ids].filter((id, i) => i > 0 && id !== IMAGE_TOKEN))
    expect([...s.gateIds].filter((_, i) => s.gateAnswer[i])).toEqual([...s.labels].filter((x) => x !== IGNORE))
  })
  it('the uncut text of a sample that is cut', () => {
    const long = record([human('<image>\nWhat?'), gpt('word '.repeat(60))])
    const full = buildSample(long, base, { style: 'vicuna_v1', patches: 10 })
    const cut = buildSample(long, base, { style: 'vicuna_v1', patches: 10, maxLength: 100 })
    expect(full.length).toBeGreaterThan(100)
    expect(cut).toMatchObject({ length: 100, fullLength: full.length, skip: null })
    expect(cut.ids).toEqual(full.ids.slice(0, 90))
    expect(cut.labels).toEqual(full.labels.slice(0, 90))
    expect(cut.gateIds).toEqual(full.gateIds)
  })
})

describe('limits', () => {
  const r = record([human('<image>\nWhat?'), gpt('A cat.')])
  const full = buildSample(r, base, { style: 'vicuna_v1', patches: 10 })
  const place = full.ids.indexOf(IMAGE_TOKEN)
  const firstAnswer = full.labels.findIndex((x) => x !== IGNORE)
  const at = (maxLength: number): Sample => buildSample(r, base, { style: 'vicuna_v1', patches: 10, maxLength })
  it('cuts at the limit, skips a picture that does not fit and a sample without answer', () => {
    expect(at(full.length).length).toBe(full.length)
    expect(at(full.length - 1)).toMatchObject({ length: full.length - 1, skip: null })
    // Row firstAnswer + 10 (ALIGN and nine more rows than the placeholder) is the last that must fit.
    expect(at(firstAnswer + 11).skip).toBeNull()
    expect(at(firstAnswer + 10).skip).toMatch(/no answer is left/)
    expect(at(place + 11).skip).toMatch(/no answer/)
    expect(at(place + 10).skip).toMatch(/the picture ends at row/)
  })
  it('labels never vanish: what is learned is exactly the answers, whatever they hold', () => {
    const odd = fc.array(
      fc.constantFrom(
        'a',
        ' ',
        'red',
        '\n',
        'ASSISTANT:',
        'USER:',
        ' ASSISTANT: ',
        'é',
        '🙂',
        '▁',
        '</s>',
        '[/INST]',
        '.',
      ),
      { minLength: 1, maxLength: 10 },
    )
    const tokenizers = CASES.map(load)
    fc.assert(
      fc.property(odd, odd, fc.nat(2), fc.constantFrom<Style>('vicuna_v1', 'llama_2', 'plain'), (q, a, k, style) => {
        const t = tokenizers[k]
        const s = buildSample(record([human(q.join('')), gpt(a.join(''))], null), t, { style, patches: 1 })
        const from = s.labels.findIndex((x) => x !== IGNORE)
        expect(from).toBeGreaterThan(0)
        // One answer at the end: labels are a suffix, equal to the ids.
        expect([...s.labels.slice(from)]).toEqual([...s.ids.slice(from)])
        const answer = {
          vicuna_v1: ` ${a.join('')}</s>`,
          llama_2: ` ${a.join('')} </s>`,
          plain: `${a.join('')}\n`,
          llama_3: '',
        }[style]
        // The `prepend` style puts a space after a special token in the text; spaces are not the point here.
        const spaces = (x: string): string => x.replace(/[▁ ]/g, '')
        expect(spaces(t.decode([...s.ids.slice(from)]))).toBe(spaces(answer))
      }),
      { numRuns: 400, seed: 9 },
    )
  })
  it('any record: a sample or an own error', () => {
    const turn = fc.record({ from: fc.constantFrom<Turn['from']>('human', 'gpt', 'system'), value: fc.string() })
    fc.assert(
      fc.property(fc.array(turn, { maxLength: 5 }), fc.boolean(), fc.nat(60), (turns, image, maxLength) => {
        try {
          const s = buildSample(record(turns, image ? 'x' : null), base, { style: 'vicuna_v1', patches: 5, maxLength })
          if (!s.skip) expect(s.length).toBeLessThanOrEqual(maxLength)
        } catch (e) {
          expect(e, String((e as Error).stack)).toBeInstanceOf(AlignGPTError)
        }
      }),
      { numRuns: 300, seed: 10 },
    )
  })
})

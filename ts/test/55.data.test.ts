import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { type Dataset, loadDataset } from '../src/data/dataset.js'
import { groupByModalityLength } from '../src/data/order.js'
import { wordCount } from '../src/formats/record-file.js'
import { errorOf, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
let serial = 0
const put = (text: string | Buffer): string => {
  const f = path.join(dir, `d${serial++}.json`)
  fs.writeFileSync(f, text)
  return f
}
const turns = [
  { from: 'human', value: 'q' },
  { from: 'gpt', value: 'an answer' },
]
const rec = (id: unknown, more: object = {}): object => ({ id, conversations: turns, ...more })

describe('reading data files', () => {
  it('reads arrays, indented arrays, JSON lines, numbers as ids, a BOM, and finds the same records again', async () => {
    const list = [
      rec('a'),
      rec(2, { image: 'x.png', similarity: 3 }),
      rec('c "]}{[', { extra: [{ a: '\\"}' }] }),
      rec('é🙂'),
    ]
    const texts = [
      JSON.stringify(list),
      JSON.stringify(list, null, 2),
      `\ufeff ${JSON.stringify(list, null, '\t')}\n\n`,
      list.map((r) => JSON.stringify(r)).join('\n'),
      `${list.map((r) => JSON.stringify(r, null, 1)).join('\r\n\r\n')}\n`,
    ]
    for (const text of texts) {
      const d = await loadDataset(put(text), { images: dir })
      expect([...d].map((r) => r.id)).toEqual(['a', '2', 'c "]}{[', 'é🙂'])
      expect(d.record(1)).toEqual({ id: '2', image: 'x.png', conversations: turns, similarity: 3 })
      expect(d.record(0).image).toBeNull()
      d.close()
      expect(d.record(3).id).toBe('é🙂')
    }
    expect((await loadDataset(put('[]'))).length).toBe(0)
    expect(
      (
        await loadDataset(
          put(
            JSON.stringify([
              {
                conversations: [
                  { from: 'user', value: 'a' },
                  { from: 'assistant', value: 'b' },
                ],
              },
            ]),
          ),
        )
      ).record(0),
    ).toMatchObject({ id: '0', conversations: [{ from: 'human' }, { from: 'gpt' }] })
  })

  it('reads a caption, or a question and its answer, as the turns they stand for', async () => {
    const short = [
      { image: 'x.png', caption: 'a cat' },
      { image: 'x.png', question: 'What?', answer: 'A cat.' },
      { image: 'x.png', question: 'What?\n<image>', answer: 'A cat.' },
      { question: 'Who?', answer: 'I.', caption: null },
      rec('a', { caption: 'is not read', question: 'nor this' }),
    ]
    const d = await loadDataset(put(JSON.stringify(short)), { images: dir })
    const talk = (q: string, a: string): object => ({
      conversations: [
        { from: 'human', value: q },
        { from: 'gpt', value: a },
      ],
    })
    expect([...d]).toMatchObject([
      talk('<image>\n', 'a cat'),
      talk('<image>\nWhat?', 'A cat.'),
      talk('What?\n<image>', 'A cat.'),
      talk('Who?', 'I.'),
      { id: 'a', conversations: turns },
    ])
    d.close()
  })
  it('splits records wherever the pieces of the file end', async () => {
    const big = [...Array(40).keys()].map((i) => rec(`r${i}`, { pad: `${'x{"\\'.repeat(1000 * i)}` }))
    const d = await loadDataset(put(JSON.stringify(big)))
    expect(fs.statSync(d.file).size).toBeGreaterThan(3 << 20)
    expect([...d].map((r) => r.id)).toEqual(big.map((_, i) => `r${i}`))
    const huge = [rec('a'), rec('b', { pad: 'x'.repeat(5 << 20) }), rec('c')]
    expect([...(await loadDataset(put(JSON.stringify(huge))))].map((r) => r.id)).toEqual(['a', 'b', 'c'])
  })
  it('counts words as white space separates them, in any script', () => {
    const text = fc.string({ unit: fc.constantFrom(...'a é🙂\t\n\r\u00a0\u3000\u2003\u200b\ufeff\u1680\x1f\x85 ') })
    fc.assert(
      fc.property(fc.array(text), (values) => {
        const conversations = values.map((value) => ({ from: 'human' as const, value }))
        const words = values.reduce((n, v) => n + (v.match(/\S+/g)?.length ?? 0), 0)
        expect(wordCount({ id: '', image: null, conversations, similarity: null })).toBe(words)
      }),
      { numRuns: 500, seed: 4 },
    )
  })

  const good = JSON.stringify(rec('a'))
  const n = good.length
  it.each<[string, string, number, RegExp]>([
    ['an empty file', '', 0, /'\[' of an array or '\{' of a record, got an empty file/],
    ['a number', ' 17', 1, /'\[' of an array or '\{'/],
    ['an array of numbers', '[1]', 1, /'\{' of a record, got "1"/],
    ['an open array', `[${good}`, n + 1, /',' or '\]', got the end of the file/],
    ['a missing comma', `[${good} ${good}]`, n + 2, /',' or '\]', got "\{"/],
    ['a trailing comma', `[${good},]`, n + 2, /'\{' of a record, got "\]"/],
    ['a comma and the end', `[${good},`, n + 2, /'\{' of a record, got the end/],
    ['something behind the array', `[${good}] x`, n + 3, /nothing after the array, got "x"/],
    ['an open record', `[${good.slice(0, -1)}`, n, /'\}' of the record that starts at byte 1, got the end/],
    ['an open string', `[{"id": "a`, 10, /'"' and '\}'/],
    ['a bad value', `[{"id": é}]`, 8, /a value/],
    ['a bad value behind a two-byte letter', `[{"é": 1, "b": x}]`, 16, /a value, got "x\}"/],
    ['a missing colon', `[{"id" 1}]`, 7, /':'/],
    ['a raw newline in a string', `[{"id": "a\nb"}]`, 10, /control characters/],
    ['a bad escape', `[{"id": "a\\q"}]`, 10, /valid escapes/],
    ['brackets that do not match', `[{"id": [1}]`, 10, /',' or '\]'/],
    ['a line that is no record', `${good}\n"x"`, n + 1, /'\{' of a record/],
  ])('names file, byte and expectation: %s', async (_, text, at, pattern) => {
    const file = put(text)
    const e = await errorOf(() => loadDataset(file))
    expect(e.code).toBe('ERR_DATA')
    expect(e.message).toContain(file)
    expect(e.message).toMatch(pattern)
    expect(e.message).toMatch(new RegExp(`at byte ${at}[,:]`))
  })
  it.each<[string, unknown, RegExp]>([
    [
      'no conversations',
      { id: 'a' },
      /record 0 \(id "a"\) at byte 1: conversations: expected an array of turns, or caption.*, got nothing/,
    ],
    ['empty conversations', { id: 'a', conversations: [] }, /array of turns.*, got \[\]/],
    ['a caption that is no text', { caption: 7 }, /record 0 .* caption: expected a string, got 7/],
    ['a question alone', { question: 'Why?' }, /record 0 .* answer: expected a string, got nothing/],
    ['an object as id', { id: {}, conversations: turns }, /id: expected a string or number/],
    ['a list of images', rec('a', { image: ['x', 'y'] }), /image: expected one image, got \["x","y"\]/],
    [
      'a foreign role',
      { id: 'a', conversations: [{ from: 'bot', value: 'x' }] },
      /conversations\[0\]\.from: expected human \| user/,
    ],
    ['a role from Object', { id: 'a', conversations: [{ from: 'constructor', value: 'x' }] }, /\.from/],
    [
      'a value that is no text',
      { id: 'a', conversations: [{ from: 'human', value: 1 }] },
      /\.value: expected a string, got 1/,
    ],
    ['a turn that is null', { id: 'a', conversations: [null] }, /\.from/],
    ['a picture without a folder', rec('a', { image: 'x.png' }), /an images folder/],
  ])('refuses %s', (_, r, pattern) => refuses(() => loadDataset(put(JSON.stringify([r]))), 'ERR_DATA', pattern))
  it('refuses what is not there', async () => {
    await refuses(() => loadDataset(path.join(dir, 'no.json')), 'ERR_DATA', /ENOENT/)
    await refuses(
      () => loadDataset(put('[]'), { images: path.join(dir, 'no') }),
      'ERR_DATA',
      /images .*no: expected a folder, or \.tar files, got ENOENT/,
    )
    await refuses(
      () => loadDataset(put(Buffer.from([0x5b, 0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d, 0x5d]))),
      'ERR_DATA',
      /UTF-8/,
    )
    const d = await loadDataset(put('[]'))
    await refuses(() => d.record(0), 'ERR_ARGUMENT', /record index/)
  })
  it('damaged files: a data set or an own error', async () => {
    const bytes = Buffer.from(JSON.stringify([rec('a'), rec('b', { x: [1, { y: 'z' }] })], null, 1))
    await fc.assert(
      fc.asyncProperty(
        fc.array(
          fc.tuple(fc.nat(bytes.length - 1), fc.oneof(fc.nat(255), fc.constantFrom(...Buffer.from('{}[]",:\\')))),
          { maxLength: 4 },
        ),
        fc.nat(bytes.length),
        async (flips, cut) => {
          const b = Buffer.from(bytes)
          for (const [at, v] of flips) b[at] = v
          const f = path.join(dir, 'fuzz.json')
          fs.writeFileSync(f, b.subarray(0, cut))
          try {
            for (const r of await loadDataset(f)) expect(typeof r.id).toBe('string')
          } catch (e) {
            expect((e as { code?: string }).code, String((e as Error).stack)).toBe('ERR_DATA')
          }
        },
      ),
      { numRuns: 300, seed: 13 },
    )
  })
})

describe('order', () => {
  let d: Dataset
  beforeAll(async () => {
    const value = (k: number): object[] => [
      { from: 'human', value: 'w '.repeat(k) },
      { from: 'gpt', value: 'a' },
    ]
    d = await loadDataset(
      put(
        JSON.stringify(
          [...Array(103).keys()].map((i) => ({
            id: i,
            conversations: value((i * 7) % 50),
            ...(i % 3 ? { image: 'x' } : {}),
          })),
        ),
      ),
      { images: dir },
    )
  })
  const sorted = (a: Int32Array): number[] => [...a].sort((x, y) => x - y)
  const everything = [...Array(103).keys()]
  it('is a permutation, a pure function of seed and epoch', () => {
    for (const groupByLength of [false, true]) {
      const o = (seed: number, epoch: number): Int32Array => d.order({ seed, epoch, batch: 8, groupByLength })
      expect(sorted(o(1, 0))).toEqual(everything)
      expect(o(1, 0)).toEqual(o(1, 0))
      expect(o(1, 0)).not.toEqual(o(1, 1))
      expect(o(1, 0)).not.toEqual(o(2, 0))
      expect(o(2 ** 40 + 1, 0)).not.toEqual(o(1, 0))
    }
    expect([...d.order({ seed: 1, epoch: 0, batch: 8, shuffle: false })]).toEqual(everything)
  })
  it('batches cut the order; a run can start anywhere', () => {
    const o = { seed: 3, epoch: 2, batch: 8 }
    const all = [...d.batches(o)]
    expect(all.length).toBe(d.stepsPerEpoch(8))
    expect(all.flatMap((b) => [...b])).toEqual([...d.order(o)])
    expect([...d.batches({ ...o, start: 5 })]).toEqual(all.slice(5))
    expect(() => [...d.batches({ ...o, batch: 0 })]).toThrow(/positive integer/)
  })
  it('groups by modality and length: full batches are of one kind, longest first', () => {
    const words = Int32Array.from({ length: 103 }, (_, i) => (i % 3 ? 1 : -1) * (((i * 7) % 50) + 1))
    const o = groupByModalityLength(words, 8, 1, 0)
    expect(o).toEqual(d.order({ seed: 1, epoch: 0, batch: 8, groupByLength: true }))
    // 68 with picture and 35 without: 8 and 4 full batches.
    for (let b = 0; b < 12; b++) {
      const w = [...o.slice(8 * b, 8 * b + 8)].map((i) => words[i])
      expect(new Set(w.map(Math.sign)).size).toBe(1)
      expect(w.map(Math.abs)).toEqual(w.map(Math.abs).sort((x, y) => y - x))
    }
    expect(sorted(groupByModalityLength(words.map(Math.abs), 8, 1, 0))).toEqual(everything)
  })
})

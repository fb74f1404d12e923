import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it, vi } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { type Buckets, bucketLevels } from '../src/levels/bucket.js'
import { readLevels, withSimilarity, writeLevels } from '../src/levels/write-levels.js'
import { CASES, caseDir, expectedOf, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
let serial = 0
const put = (text: string): string => {
  const f = path.join(dir, `l${serial++}.json`)
  fs.writeFileSync(f, text)
  return f
}

describe('buckets', () => {
  it.each(CASES)('quantile: the levels of the reference, %s', (name) => {
    const { cosine, levels } = expectedOf(name).clip
    const n = name === 'gqa' ? 6 : 8
    const got = bucketLevels(cosine, n, 'quantile')
    expect([...got.levels]).toEqual(levels)
    expect(got.histogram.reduce((a, b) => a + b, 0)).toBe(cosine.length)
  })
  it('width: equal parts of the range, the best score in the top level', () => {
    const got = bucketLevels([0, 0.1, 0.25, 0.5, 0.74, 0.75, 1], 4)
    expect([...got.levels]).toEqual([0, 0, 1, 2, 2, 3, 3])
    expect(got.edges).toEqual([0, 0.25, 0.5, 0.75, 1])
    expect(got.histogram).toEqual([2, 1, 2, 2])
  })
  it('equal scores: all in the top level; one score; none', () => {
    expect([...bucketLevels([0.3, 0.3, 0.3], 8).levels]).toEqual([7, 7, 7])
    expect([...bucketLevels([2], 8).levels]).toEqual([7])
    expect([...bucketLevels([2], 8, 'quantile').levels]).toEqual([0])
    expect(bucketLevels([], 3)).toEqual({ levels: new Int32Array(0), edges: [0, 0, 0, 0], histogram: [0, 0, 0] })
  })
  it('quantile: equal counts, ties by position', () => {
    expect([...bucketLevels([5, 5, 5, 5], 2, 'quantile').levels]).toEqual([0, 0, 1, 1])
    expect([...bucketLevels([3, 1, 2], 3, 'quantile').levels]).toEqual([2, 0, 1])
  })
  it('levels rise with the score, stay in range, and the histogram counts them', () => {
    const score = fc.double({ min: -1e6, max: 1e6, noNaN: true })
    fc.assert(
      fc.property(
        fc.array(score, { minLength: 1, maxLength: 40 }),
        fc.integer({ min: 1, max: 12 }),
        fc.constantFrom<Buckets>('width', 'quantile'),
        (s, n, kind) => {
          const { levels, histogram, edges } = bucketLevels(s, n, kind)
          expect(edges.length).toBe(n + 1)
          const order = [...s.keys()].sort((a, b) => s[a] - s[b] || a - b)
          order.forEach((i, k) => {
            expect(levels[i]).toBeGreaterThanOrEqual(k ? levels[order[k - 1]] : 0)
            expect(levels[i]).toBeLessThan(n)
          })
          for (const [l, count] of histogram.entries()) expect(count).toBe([...levels].filter((x) => x === l).length)
          if (kind === 'quantile') expect(Math.max(...histogram) - Math.min(...histogram)).toBeLessThanOrEqual(1)
          else expect(levels[order[s.length - 1]]).toBe(n - 1)
        },
      ),
      { numRuns: 300, seed: 14 },
    )
  })
  it('refuses scores that are not finite, and odd arguments', async () => {
    await refuses(() => bucketLevels([1, Number.NaN], 4), 'ERR_DATA', /score 1: expected a finite number, got NaN/)
    await refuses(() => bucketLevels([Number.POSITIVE_INFINITY], 4), 'ERR_DATA', /Infinity/)
    await refuses(() => bucketLevels([1], 0), 'ERR_ARGUMENT', /number of levels/)
    await refuses(() => bucketLevels([1], 4, 'deciles' as Buckets), 'ERR_ARGUMENT', /'width' or 'quantile'/)
  })
})

describe('writing levels', () => {
  it.each([
    ['{"id":1}', '{"id":1,"similarity":5}'],
    ['{"id": 1, "a": 2}', '{"id": 1, "a": 2, "similarity": 5}'],
    ['{ "id" : 1 }', '{ "id" : 1, "similarity" : 5 }'],
    ['{\n  "id": 1,\n  "a": {"similarity": 9}\n}', '{\n  "id": 1,\n  "a": {"similarity": 9},\n  "similarity": 5\n}'],
    ['{"similarity": 3, "id": 1}', '{"similarity": 5, "id": 1}'],
    ['{"id": 1, "similarity" :3.0 }', '{"id": 1, "similarity" :5 }'],
    ['{"s\\u0069milarity":1,"x":1,"similarity":null}', '{"s\\u0069milarity":5,"x":1,"similarity":5}'],
    ['{}', '{"similarity": 5}'],
  ])('%s -> %s', (from, to) => {
    expect(withSimilarity(from, 5)).toBe(to)
    expect(JSON.parse(to).similarity).toBe(5)
  })
  it('any record: only `similarity` changes', () => {
    fc.assert(
      fc.property(
        fc.dictionary(fc.oneof(fc.string(), fc.constant('similarity')), fc.jsonValue()),
        fc.constantFrom(undefined, 1, '\t'),
        fc.nat(9),
        (r, indent, level) => {
          const text = JSON.stringify(r, null, indent)
          const out = withSimilarity(text, level)
          expect(JSON.parse(out)).toEqual({ ...JSON.parse(text), similarity: level })
          expect(withSimilarity(out, level)).toBe(out)
        },
      ),
      { numRuns: 300, seed: 15 },
    )
  })
  it.each(CASES)('%s: removing and writing the levels again gives the file byte for byte', async (name) => {
    const original = fs.readFileSync(caseDir(name, 'data_phase1.json'), 'utf8')
    const stripped = original.replaceAll(/,\n {2}"similarity": \d+/g, '')
    expect(stripped.length).toBeLessThan(original.length)
    const d = await loadDataset(put(stripped), { images: caseDir(name, 'images') })
    expect(new Set(readLevels(d))).toEqual(new Set([null]))
    const { levels } = expectedOf(name).clip
    await writeLevels(d, levels)
    expect(fs.readFileSync(d.file, 'utf8')).toBe(original)
    expect(readLevels(d)).toEqual(levels)
    await writeLevels(
      d,
      levels.map(() => 0),
    )
    expect(readLevels(d)).toEqual(levels.map(() => 0))
    expect(fs.readdirSync(dir).filter((f) => f.includes('tmp'))).toEqual([])
  })
  it('keeps lines, order, modes and links; -1 leaves a record alone; another file can be written', async () => {
    const lines =
      '{"id":1,"conversations":[{"from":"human","value":"\\ud83d\\ude42 é"}]}\r\n\n{"id": 2, "conversations": [{"from": "human", "value": "b"}]}\n'
    const file = put(lines)
    fs.chmodSync(file, 0o640)
    const link = path.join(dir, 'link.json')
    fs.symlinkSync(file, link)
    const d = await loadDataset(link)
    const copy = path.join(dir, 'copy.json')
    await writeLevels(d, [4, -1], copy)
    expect(fs.readFileSync(copy, 'utf8')).toBe(lines.replace('é"}]}', 'é"}],"similarity":4}'))
    expect(fs.readFileSync(file, 'utf8')).toBe(lines)
    await writeLevels(d, [1, 2])
    expect(fs.lstatSync(link).isSymbolicLink()).toBe(true)
    expect(fs.statSync(file).mode & 0o777).toBe(0o640)
    expect(readLevels(d)).toEqual([1, 2])
  })
  it('a disk that gives less at once than it is asked for changes nothing', async () => {
    const records = Array.from({ length: 40 }, (_, id) => ({
      id,
      conversations: [{ from: 'human', value: `é${'word '.repeat(id)}` }],
    }))
    const levels = records.map((_, i) => i % 8)
    const d = await loadDataset(put(JSON.stringify(records)))
    const read = fs.readSync
    const spy = vi
      .spyOn(fs, 'readSync')
      .mockImplementation(((fd: number, b: Uint8Array, at: number, length: number, position: number) =>
        read(fd, b, at, Math.min(length, 7), position)) as typeof fs.readSync)
    try {
      await writeLevels(d, levels)
    } finally {
      spy.mockRestore()
    }
    const written = JSON.parse(fs.readFileSync(d.file, 'utf8'))
    expect(written).toEqual(records.map((r, i) => ({ ...r, similarity: levels[i] })))
  })
  it('refuses wrong numbers and leaves the file alone', async () => {
    const text = '[{"id":1,"conversations":[{"from":"human","value":"a"}]}]'
    const d = await loadDataset(put(text))
    await refuses(() => writeLevels(d, []), 'ERR_ARGUMENT', /1 of them, got 0/)
    await refuses(() => writeLevels(d, [1.5]), 'ERR_ARGUMENT', /an integer >= 0/)
    expect(fs.readFileSync(d.file, 'utf8')).toBe(text)
    expect(fs.readdirSync(dir).filter((f) => f.includes('tmp'))).toEqual([])
  })
})

/** Scoring that can be interrupted, and its page. */
import fs from 'node:fs'
import path from 'node:path'
import { describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { type LevelsOptions, levels } from '../src/levels/clip-scores.js'
import { FeatureFile } from '../src/levels/score-store.js'
import { readLevels } from '../src/levels/write-levels.js'
import { writeLevelsPage } from '../src/report/levels-page.js'
import { caseDir, expectedOf, tempDir } from './data-cases.js'

const clip = caseDir('base', 'model', 'clip')
const images = caseDir('base', 'images')
/** A fresh copy of the pairs, scored. */
async function run(file: string, o: LevelsOptions = {}) {
  const data = await loadDataset(file, { images })
  const seen: number[] = []
  const notices: string[] = []
  try {
    const result = await levels(data, clip, {
      batch: 4,
      onProgress: (done) => seen.push(done),
      onNotice: (t) => notices.push(t),
      ...o,
    })
    return { ...result, seen, notices, written: readLevels(data) }
  } finally {
    data.close()
  }
}
const fresh = (): { dir: string; file: string } => {
  const dir = tempDir()
  const file = path.join(dir, 'pairs.json')
  fs.copyFileSync(caseDir('base', 'data_phase1.json'), file)
  return { dir, file }
}

describe('levels', () => {
  it('are those of the reference, and nothing is left beside the data', async () => {
    const { dir, file } = fresh()
    const { scores, written, bad } = await run(file, { buckets: 'quantile' })
    const { cosine, levels: want } = expectedOf('base').clip
    expect(written).toEqual(want)
    for (const [i, s] of scores.entries()) expect(s).toBeCloseTo(cosine[i], 4)
    expect(bad).toEqual([])
    expect(fs.readdirSync(dir)).toEqual(['pairs.json'])
  })
  it('an interrupted run goes on from what it scored, to the same end', async () => {
    const want = await run(fresh().file)
    const { dir, file } = fresh()
    const stop = new AbortController()
    const onProgress = (done: number): void => void (done >= 8 && stop.abort(new Error('enough')))
    await expect(run(file, { onProgress, signal: stop.signal })).rejects.toThrow('enough')
    const partial = `${file}.scores.jsonl`
    const lines = fs.readFileSync(partial, 'utf8').split('\n')
    expect(lines.length).toBe(1 + 8 + 1)
    // The machine died in the middle of a line; and the first score is changed to see that it is used.
    const { pair } = JSON.parse(lines[1])
    lines[1] = JSON.stringify({ pair, score: 0.99 })
    fs.writeFileSync(partial, lines.join('\n').slice(0, -9))
    const again = await run(file, { scores: partial })
    expect(again.scores[0]).toBe(0.99)
    expect(again.scores.slice(1)).toEqual(want.scores.slice(1))
    expect(again.written[0]).toBe(7)
    // The file is whole again.
    const last = await run(file)
    expect([last.notices, last.scores]).toEqual([[], again.scores])
    expect(fs.readdirSync(dir)).toEqual(['pairs.json'])
  })
  it('a scores file that was named stays: other levels need no CLIP; another CLIP is noticed', async () => {
    const { dir, file } = fresh()
    const scores = path.join(dir, 'kept.jsonl')
    const first = await run(file, { scores })
    // The data file has changed (similarity was written), the pairs have not.
    const size = fs.statSync(scores).size
    const second = await run(file, { scores, buckets: 'quantile', levels: 4 })
    expect(second.scores).toEqual(first.scores)
    expect(new Set(second.written)).toEqual(new Set([0, 1, 2, 3]))
    expect(fs.statSync(scores).size).toBe(size)
    fs.writeFileSync(
      scores,
      fs
        .readFileSync(scores, 'utf8')
        .replace(/"clip":"./, '"clip":"?')
        .replace(/"score":/g, '"score":1'),
    )
    const third = await run(file, { scores })
    expect(third.notices).toEqual([expect.stringMatching(/made again: they belong to another CLIP/)])
    expect(third.scores).toEqual(first.scores)
    fs.writeFileSync(scores, 'no scores\n')
    expect((await run(file, { scores })).notices).toEqual([expect.stringMatching(/cannot be read/)])
  })
  it('embeddings that are kept are used, by picture and by caption', async () => {
    const { dir, file } = fresh()
    const features = path.join(dir, 'features')
    const first = await run(file, { features })
    const folder = path.join(features, fs.readdirSync(features)[0])
    const rows = path.join(folder, 'images.f32')
    const bytes = fs.readFileSync(rows)
    expect(bytes.length).toBe(
      fs.readFileSync(path.join(folder, 'images.keys')).length *
        (bytes.length / 8 / new Set([...(await loadDataset(file, { images }))].map((r) => r.image)).size),
    )
    expect((await run(file, { features })).scores).toEqual(first.scores)
    fs.writeFileSync(rows, Buffer.alloc(bytes.length))
    expect(new Set((await run(file, { features })).scores)).toEqual(new Set([0]))
    // What is cut in the middle of a row is made again.
    fs.writeFileSync(rows, bytes.subarray(0, bytes.length - 5))
    expect((await run(file, { features })).scores).toEqual(first.scores)
  })
  it('a picture that cannot be read is named; a record without a score has no level afterwards', async () => {
    const { file } = fresh()
    const list = JSON.parse(fs.readFileSync(file, 'utf8'))
    list[2].image = 'no.png'
    const [, answer] = list[3].conversations
    list[3] = { id: 'text', conversations: [{ from: 'human', value: 'What?' }, answer], similarity: 3 }
    list[2].similarity = 1
    fs.writeFileSync(file, JSON.stringify(list))
    const { bad, scores, written, removed } = await run(file)
    expect(removed).toBe(2)
    expect(bad).toEqual([{ id: list[2].id, reason: expect.stringMatching(/no\.png: expected a file, got ENOENT/) }])
    expect([scores[2], scores[3], written[2], written[3]]).toEqual([null, null, null, null])
    expect(scores.filter((s) => s === null).length).toBe(2)
  })
  it('the page shows every level with pairs from it and needs nothing from outside', async () => {
    const { dir, file } = fresh()
    const list = JSON.parse(fs.readFileSync(file, 'utf8'))
    list[0].conversations[1].value = '<script>alert(1)</script>'
    fs.writeFileSync(file, JSON.stringify(list))
    const report = path.join(dir, 'new', 'levels.html')
    const o = { write: false, levels: 4, buckets: 'quantile' } as const
    const result = await run(file, { ...o, examples: 8 })
    await writeLevelsPage(report, { data: file, clip, buckets: o.buckets, ...result })
    const { histogram, edges, scores } = result
    const html = fs.readFileSync(report, 'utf8')
    for (let l = 0; l < 4; l++) expect(html).toContain(`<h2>Level ${l}`)
    for (const x of [...histogram.map((n) => `<td>${n}</td>`), edges[1].toFixed(4)]) expect(html).toContain(x)
    for (const r of list) expect(html).toContain(r.id)
    for (const s of scores) expect(html).toContain((s as number).toFixed(4))
    expect(html).not.toContain('<script')
    expect(html).not.toMatch(/https?:|url\(|srcset|<link|NaN|undefined/)
    for (const [, src] of html.matchAll(/src="([^"]*)"/g)) expect(src).toMatch(/^data:image\/webp;base64,/)
    expect(html.match(/<figure>/g)).toHaveLength(list.length)
    // Best last: the examples of a level rise.
    const shown = [...html.matchAll(/<small>(-?[\d.]+) ·/g)].map((m) => Number(m[1]))
    expect(shown).toEqual([...shown].sort((a, b) => a - b))
    expect(JSON.parse(fs.readFileSync(file, 'utf8'))).toEqual(list)
  })
})

it('rows on file: a key counts when its row is complete', () => {
  const dir = tempDir()
  const open = (): FeatureFile => new FeatureFile(dir, 'x', 3)
  let f = open()
  f.add([5, 7], Float32Array.of(1, 2, 3, 4, 5, 6))
  f.add([9], Float32Array.of(7, 8, 9))
  f.close()
  fs.appendFileSync(path.join(dir, 'x.f32'), 'part of a row')
  f = open()
  expect([5, 7, 9, 1].map((k) => f.get(k) && [...(f.get(k) as Float32Array)])).toEqual([
    [1, 2, 3],
    [4, 5, 6],
    [7, 8, 9],
    null,
  ])
  f.add([1], Float32Array.of(0, 0, 1))
  f.close()
  f = open()
  expect(f.get(1)).toEqual(Float32Array.of(0, 0, 1))
  f.close()
})

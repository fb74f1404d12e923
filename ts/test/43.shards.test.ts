/** Data at full size: the saved index. */
import fs from 'node:fs'
import path from 'node:path'
import { describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data.js'
import { refuses, tempDir } from './data-cases.js'

const dir = tempDir()
let serial = 0
const fresh = (end: string): string => path.join(dir, `f${serial++}${end}`)
const put = (text: string | Buffer, end = '.json'): string => {
  const f = fresh(end)
  fs.writeFileSync(f, text)
  return f
}
const turns = (question: string, answer = 'an answer'): object[] => [
  { from: 'human', value: question },
  { from: 'gpt', value: answer },
]
const records = (n: number): object[] =>
  Array.from({ length: n }, (_, i) => ({
    id: i,
    ...(i % 3 ? { image: 'x.png' } : {}),
    conversations: turns(`q${'é '.repeat(i)}`),
  }))

describe('saved index', () => {
  const text = JSON.stringify(records(40), null, 1)
  /** Opens the file; what was said. */
  const open = async (file: string, index: string | false = `${file}.index`) => {
    const notices: string[] = []
    const onNotice = (t: string): void => void notices.push(t)
    const data = await loadDataset(file, { images: dir, index, onNotice })
    const o = { seed: 1, epoch: 0, batch: 4, groupByLength: true }
    const seen = {
      ids: [...data].map((r) => r.id),
      ranges: [...data].map((_, i) => data.range(i)),
      order: data.order(o),
    }
    data.close()
    return { notices, seen }
  }

  it('gives what reading gives, without reading the file', async () => {
    const file = put(text)
    const want = await open(file, false)
    expect(fs.existsSync(`${file}.index`)).toBe(false)
    expect(await open(file)).toEqual(want)
    expect(await open(file)).toEqual(want)
    // Proof that the records were not parsed: one in the middle of a large file is broken behind the index' back.
    const long = put(JSON.stringify(records(700)))
    fs.utimesSync(long, 1000, 1000)
    await open(long)
    const fd = fs.openSync(long, 'r+')
    const { size } = fs.fstatSync(fd)
    fs.writeSync(fd, '"'.repeat(1000), Math.floor(size / 2))
    fs.closeSync(fd)
    fs.utimesSync(long, 1000, 1000)
    const data = await loadDataset(long, { images: dir, index: `${long}.index` })
    expect([data.length, data.record(0).id, data.record(699).id]).toEqual([700, '0', '699'])
    await refuses(() => [...data], 'ERR_DATA', /at byte \d+, expected/)
    data.close()
  })
  it.each<[string, RegExp, (file: string) => void]>([
    ['other content of the same size', /changed since/, (f) => fs.writeFileSync(f, text.replace('"id": 3', '"id": 7'))],
    ['another time', /changed since/, (f) => fs.utimesSync(f, 1, 1)],
    ['a longer file', /changed since/, (f) => fs.appendFileSync(f, '\n')],
    ['an index cut short', /cut short/, (f) => fs.truncateSync(`${f}.index`, fs.statSync(`${f}.index`).size - 1)],
    ['an index of nothing', /cut short/, (f) => fs.truncateSync(`${f}.index`, 5)],
    ['something else', /not an index/, (f) => fs.writeFileSync(`${f}.index`, 'something else')],
    [
      'a flipped bit',
      /checksum/,
      (f) => {
        const b = fs.readFileSync(`${f}.index`)
        b[b.length - 3] ^= 4
        fs.writeFileSync(`${f}.index`, b)
      },
    ],
  ])('is built again, and says so: %s', async (_, reason, harm) => {
    const file = put(text)
    await open(file)
    harm(file)
    const { notices, seen } = await open(file)
    expect(notices).toHaveLength(1)
    expect(notices[0]).toMatch(reason)
    expect(notices[0]).toContain(`${file}.index is built again`)
    expect(seen).toEqual((await open(file, false)).seen)
    expect((await open(file)).notices).toEqual([])
  })
  it('of the same ends and size, but another time, is not trusted', async () => {
    const file = put(text)
    await open(file)
    const later = new Date(Date.now() + 5000)
    fs.utimesSync(file, later, later)
    expect((await open(file)).notices[0]).toMatch(/changed since/)
  })
  it('goes on where it cannot be kept, and says so', async () => {
    const file = put(text)
    const { notices, seen } = await open(file, path.join(dir, 'no', 'folder.index'))
    expect(notices).toEqual([expect.stringMatching(/cannot be kept \(ENOENT\)/)])
    expect(seen.ids).toHaveLength(40)
  })
  it('is not made for small files unless asked for, and knows which records name a picture', async () => {
    const file = put(text)
    await loadDataset(file, { images: dir })
    expect(fs.existsSync(`${file}.index`)).toBe(false)
    const index = `${file}.index`
    await refuses(() => loadDataset(file, { index }), 'ERR_DATA', /record 1, expected an images folder/)
    await open(file)
    await refuses(() => loadDataset(file, { index }), 'ERR_DATA', /record 1, expected an images folder/)
    await refuses(
      () => loadDataset(fresh('.json'), { index: fresh('.index') }),
      'ERR_DATA',
      /readable file, got ENOENT/,
    )
  })
})

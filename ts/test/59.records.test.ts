/** Records as people bring them: keys and shapes of an image, messages, what is left out and named. */
import fs from 'node:fs'
import path from 'node:path'
import { describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { DropLog } from '../src/data/drop-log.js'
import { imageOf } from '../src/formats/image-key.js'
import { withoutSimilarity } from '../src/levels/write-levels.js'
import { problemIn } from '../src/train/run-settings.js'
import { refuses, tempDir } from './data-cases.js'

const turns = [
  { from: 'human', value: '<image>\nq' },
  { from: 'gpt', value: 'a' },
]

describe('the image of a record', () => {
  it.each<[object, string | null]>([
    [{ image: 'a.png' }, 'a.png'],
    [{ images: ['a.png'] }, 'a.png'],
    [{ images: [{ path: 'a.png' }] }, 'a.png'],
    [{ image: { bytes: null, path: 'a.png' } }, 'a.png'],
    [{ image: { filename: 'a.png' } }, 'a.png'],
    [{ image_path: '/x/a.png', image: 'a.png' }, 'a.png'],
    [{ img: 'a.png' }, 'a.png'],
    [{ file_name: 'a.png' }, 'a.png'],
    [{ filename: 'notes.txt' }, null],
    [{ images: 1, image: 'a.png' }, 'a.png'],
    [{ image: null, images: [''], videos: [] }, null],
    [{ image_id: 7, image_size: [2, 3] }, null],
  ])('%j', (raw, image) => expect(imageOf(raw as Record<string, unknown>)).toMatchObject({ image }))
  it.each<[object, string]>([
    [{ images: ['a.png', 'b.png'] }, 'images'],
    [{ image: 'a.png', img: 'b.png' }, 'img'],
    [{ image: 3 }, 'image'],
    [{ images: 3 }, 'images'],
    [{ image: 'http://a/b.png' }, 'image'],
    [{ image: 'data:image/png;base64,AAAA' }, 'image'],
    [{ image: { bytes: 'AAAA', path: 'a.png' } }, 'image'],
    [{ image: { x: 1 } }, 'image'],
    [{ image_url: 'http://a/b.png' }, 'image_url'],
    [{ image_ref: 'a.png' }, 'image_ref'],
    [{ video: 'a.mp4' }, 'video'],
  ])('refuses %j', (raw, key) =>
    expect(imageOf(raw as Record<string, unknown>)).toMatchObject({ problem: { key: expect.stringContaining(key) } }),
  )
})

describe('a data set', () => {
  const dir = tempDir()
  const put = (list: readonly (object | string)[]): string => {
    const file = path.join(dir, 'd.jsonl')
    fs.writeFileSync(file, list.map((r) => `${typeof r === 'string' ? r : JSON.stringify(r)}\n`).join(''))
    return file
  }
  it('reads messages, and images that stand in them', async () => {
    const content = [
      { type: 'image', image: 'a.png' },
      { type: 'text', text: 'q' },
    ]
    const messages = [
      { role: 'user', content },
      { role: 'assistant', content: 'a' },
    ]
    const data = await loadDataset(put([{ messages }]), { images: dir })
    expect(data.record(0)).toMatchObject({ image: 'a.png', conversations: [{ value: '<image>q' }, { value: 'a' }] })
    expect(data.imageKey()).toBe('messages')
    data.close()
  })
  it('says which key names the images', async () => {
    for (const key of ['image', 'images', 'image_path', 'file_name']) {
      const data = await loadDataset(put([{ text: 1, [key]: 'a.png', conversations: turns }]), { images: dir })
      expect(data.imageKey()).toBe(key)
      data.close()
    }
  })
  it('leaves bad records out, names and counts them; the rest keeps its places', async () => {
    const good = { image: 'a.png', conversations: turns, similarity: 7 }
    const bad = [
      { id: 'no image', conversations: turns },
      '{"id": 1,}',
      { id: 'level', ...good, similarity: 8 },
      { id: 'half', ...good, similarity: 0.5 },
      { id: 'unscored', ...good, similarity: null },
      { id: 'order', image: 'a.png', conversations: [turns[0], { from: 'human', value: 'q' }, turns[1]] },
      { id: 'no answer', image: 'a.png', conversations: [turns[0]] },
    ]
    const data = await loadDataset(put([good, ...bad, good]), { images: dir })
    expect(data.bad.map((b) => [b.index, b.id, b.kind])).toEqual([
      [1, 'no image', 'placeholders'],
      [2, null, 'json'],
    ])
    const left = await data.usable({ style: 'plain', levels: 8, levelled: true })
    expect(left.bad.map((b) => b.kind)).toEqual([
      'placeholders',
      'json',
      'level',
      'level',
      'no-level',
      'turns',
      'turns',
    ])
    expect([left.length, left.place(0), left.place(1)]).toEqual([2, 0, 8])
    new DropLog(left).check(0.78)
    await refuses(
      () => new DropLog(left).check(0.5),
      'ERR_DATA',
      /7 of 9:[\s\S]*record 1 \(id "no image"\) at byte \d+/,
    )
    await refuses(() => loadDataset(put(bad.slice(0, 2)), { images: dir }), 'ERR_DATA', /none:[\s\S]*record 1 at byte/)
  })
})

it('a level goes, everything else stays byte for byte', () => {
  expect(withoutSimilarity('{"a": 1, "similarity": 3}')).toBe('{"a": 1}')
  expect(withoutSimilarity('{ "similarity": 3, "a": 1 }')).toBe('{ "a": 1 }')
  expect(withoutSimilarity('{"a": 1,\n "similarity": 3,\n "b": 2}')).toBe('{"a": 1,\n "b": 2}')
  expect(withoutSimilarity('{"similarity":3}')).toBe('{}')
})

it.each([1.5, -0.1, Number.NaN])('maxBad %d is refused', (maxBad) =>
  expect(problemIn('finetune', { maxBad })).toMatchObject({ key: 'maxBad', expected: 'a number from 0 to 1' }),
)

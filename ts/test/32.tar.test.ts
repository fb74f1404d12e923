/** The saved index of a data file, tar files, names in tars and folders, keys by their hash. */

import { execFileSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { tarMembers } from '../src/formats/tar.js'
import { openImages, readImage } from '../src/processing/image/source.js'
import { hash53 } from '../src/util/hash.js'
import { Fingerprints } from '../src/util/hash-map.js'
import { refuses, tempDir, writeTar } from './data-cases.js'

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
    await refuses(() => [...data], 'ERR_DATA', /at byte \d+: expected/)
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
    await refuses(() => loadDataset(file, { index }), 'ERR_DATA', /record 1: expected an images folder/)
    await open(file)
    await refuses(() => loadDataset(file, { index }), 'ERR_DATA', /record 1: expected an images folder/)
    await refuses(
      () => loadDataset(fresh('.json'), { index: fresh('.index') }),
      'ERR_DATA',
      /readable file, got ENOENT/,
    )
  })
})

const tar = (members: [string, Uint8Array][], name = fresh('.tar')): string => writeTar(name, members)
const contents = (file: string): [string, string][] =>
  [...tarMembers(file)].map((m) => [m.name, fs.readFileSync(file).toString('latin1', m.offset, m.offset + m.bytes)])

describe('tar', () => {
  it('what we write, tar(1) reads', () => {
    const file = tar([
      ['a.txt', Buffer.from('one')],
      ['b.bin', Buffer.alloc(512, 7)],
      ['empty', Buffer.alloc(0)],
    ])
    expect(execFileSync('tar', ['-tf', file], { encoding: 'utf8' })).toBe('a.txt\nb.bin\nempty\n')
    expect(execFileSync('tar', ['-xOf', file, 'a.txt'], { encoding: 'utf8' })).toBe('one')
    expect(contents(file).map(([n, c]) => [n, c.length])).toEqual([
      ['a.txt', 3],
      ['b.bin', 512],
      ['empty', 0],
    ])
  })
  it.each(['ustar', 'gnu', 'pax', 'v7'])(
    'what tar --format=%s writes, we read: folders, links, long names',
    (format) => {
      const folder = path.join(dir, `in ${format}`)
      const long = format === 'v7' ? 'deep' : `${'d'.repeat(60)}/${'e'.repeat(60)}`
      const longer = format === 'v7' || format === 'ustar' ? 'file' : `${'é'.repeat(100)}${'f'.repeat(40)}`
      fs.mkdirSync(path.join(folder, long), { recursive: true })
      fs.writeFileSync(path.join(folder, 'plain.txt'), 'plain')
      fs.writeFileSync(path.join(folder, long, longer), 'far away')
      fs.writeFileSync(path.join(folder, 'zz'), 'last')
      fs.symlinkSync('plain.txt', path.join(folder, 'link'))
      const file = fresh('.tar')
      execFileSync('tar', [`--format=${format}`, '--sort=name', '-cf', file, '-C', folder, '.'])
      expect(contents(file)).toEqual([
        [`${long}/${longer}`, 'far away'],
        ['plain.txt', 'plain'],
        ['zz', 'last'],
      ])
    },
  )
  it('reads sizes in base 256', () => {
    const file = tar([['a', Buffer.from('12345')]])
    const b = fs.readFileSync(file)
    b.fill(0, 124, 136)
    b[124] = 0x80
    b[135] = 5
    b.write('        ', 148)
    b.write(
      `${b
        .subarray(0, 512)
        .reduce((x, y) => x + y, 0)
        .toString(8)
        .padStart(6, '0')}\0 `,
      148,
    )
    expect(contents(put(b, '.tar'))).toEqual([['a', '12345']])
  })
  it.each<[string, (b: Buffer) => Buffer, RegExp]>([
    [
      'a wrong checksum',
      (b) => Buffer.concat([b.subarray(0, 3), Buffer.from('y'), b.subarray(4)]),
      /at byte 0: .*checksum/,
    ],
    ['a compressed one', () => Buffer.from([0x1f, 0x8b, ...new Array(600).fill(1)]), /uncompressed tar/],
    ['a cut member', (b) => b.subarray(0, 600), /'a\.txt' of 1000 bytes, got the end of the file at 600/],
    ['a cut header', (b) => b.subarray(0, 400), /at byte 0: expected a header of 512 bytes/],
  ])('refuses %s', async (_, harm, pattern) => {
    const good = fs.readFileSync(tar([['a.txt', Buffer.alloc(1000, 65)]]))
    await refuses(() => contents(put(harm(good), '.tar')), 'ERR_DATA', pattern)
  })
})

describe('names', () => {
  it('finds names however they are written, through links', async () => {
    const folder = tempDir()
    const inside = path.join(folder, 'in')
    fs.mkdirSync(path.join(inside, 'sub'), { recursive: true })
    fs.writeFileSync(path.join(inside, 'p.png'), 'p')
    fs.writeFileSync(path.join(inside, 'sub', 'q.png'), 'q')
    fs.linkSync(path.join(inside, 'p.png'), path.join(inside, 'sub', 'hard.png'))
    const links = {
      'soft.png': 'p.png',
      'chain.png': 'soft.png',
      'sub/up.png': '../p.png',
      folder: 'sub',
      deep: './folder',
      'loop.png': 'pool.png',
      'pool.png': 'loop.png',
      'round/x': '../round',
      'out.png': '../p.png',
      'absolute.png': '/etc/hostname',
      'dangling.png': 'none.png',
      away: '../..',
    }
    fs.mkdirSync(path.join(inside, 'round'))
    for (const [name, to] of Object.entries(links)) fs.symlinkSync(to, path.join(inside, name))
    execFileSync('mkfifo', [path.join(inside, 'pipe.png')])
    for (const [format, top] of [
      ['gnu', '.'],
      ['pax', '.'],
      ['ustar', 'in'],
    ]) {
      const file = fresh('.tar')
      const from = top === '.' ? inside : folder
      execFileSync('tar', [`--format=${format}`, '--sort=name', '-cf', file, '-C', from, top])
      const p = await openImages(file)
      const at = (name: string): string => (top === '.' ? name : `in/${name}`)
      const read = (name: string): string => readImage(p.locate(name)).toString()
      for (const name of ['p.png', './p.png', './/p.png', 'sub/../p.png', 'soft.png', 'chain.png', 'sub/up.png'])
        expect(read(at(name)), `${format} ${name}`).toBe('p')
      for (const name of ['sub/hard.png', 'folder/hard.png', 'deep/up.png']) expect(read(at(name)), name).toBe('p')
      for (const name of ['sub//q.png', 'folder/q.png', 'deep/q.png']) expect(read(at(name)), name).toBe('q')
      const stem = path.basename(file, '.tar')
      expect(read(`/${at('p.png')}`) + read(`./${stem}/./${at('chain.png')}`)).toBe('pp')
      for (const [name, reason] of [
        ['loop.png', /a link that leads to itself/],
        ['round/x/x/x', /a folder|link/],
        ['absolute.png', /a link that leads out of the tar/],
        ['dangling.png', /a link to (in\/)?none\.png, which is not in the tar/],
        ['sub', /a folder, not a file/],
        ['folder', /a folder, not a file/],
        ['pipe.png', /a pipe, not a file/],
        ['none.png', /none of this name/],
        ['folder/none.png', /none of this name|not in the tar/],
      ] as const)
        await refuses(() => read(at(name)), 'ERR_IMAGE', reason)
      if (top === '.')
        for (const name of ['out.png', 'away/x']) await refuses(() => read(name), 'ERR_IMAGE', /out of the tar/)
    }
  })
  it('finds composed and decomposed names in tars and folders', async () => {
    const [composed, decomposed] = ['caf\u00e9/\u00fc.png', 'cafe\u0301/u\u0308.png']
    for (const [stored, asked] of [
      [composed, decomposed],
      [decomposed, composed],
      [composed, composed],
      [decomposed, decomposed],
      ['\uac00.png', '\u1100\u1161.png'],
      ['\u1100\u1161.png', '\uac00.png'],
    ]) {
      const p = await openImages(tar([[stored, Buffer.from(stored)]]))
      expect(readImage(p.locate(asked)).toString()).toBe(stored)
      const folder = tempDir()
      fs.mkdirSync(path.dirname(path.join(folder, stored)), { recursive: true })
      fs.writeFileSync(path.join(folder, stored), stored)
      expect(readImage((await openImages(folder)).locate(asked)).toString()).toBe(stored)
    }
    // Where both are there, each is itself.
    const p = await openImages(
      tar([
        [composed, Buffer.from('1')],
        [decomposed, Buffer.from('2')],
      ]),
    )
    expect(readImage(p.locate(composed)).toString() + readImage(p.locate(decomposed)).toString()).toBe('12')
  })
  it('takes names that stay in the folder, and follows links out of it when told to', async () => {
    const [folder, elsewhere] = [tempDir(), tempDir()]
    fs.mkdirSync(path.join(folder, 'sub'))
    fs.writeFileSync(path.join(folder, 'p.png'), 'p')
    fs.writeFileSync(path.join(folder, 'sub', 'a b.JPG'), 'q')
    fs.writeFileSync(path.join(elsewhere, 'o.png'), 'o')
    fs.symlinkSync(elsewhere, path.join(folder, 'coco'))
    fs.symlinkSync(folder, path.join(elsewhere, 'root'))
    const read = async (name: string, followLinks = false, root = folder): Promise<string> =>
      readImage((await openImages(root, { followLinks })).locate(name)).toString()
    for (const name of ['p.png', './p.png', 'sub/../p.png', 'coco/../p.png', `${folder}/p.png`, 'sub//..//p.png'])
      expect(await read(name), name).toBe('p')
    expect(await read(`${elsewhere}/root/p.png`, false, `${elsewhere}/root`)).toBe('p')
    await refuses(() => read('coco/o.png'), 'ERR_IMAGE', /a link that leads outside \(--follow-links allows that\)/)
    expect(await read('coco/o.png', true)).toBe('o')
    for (const out of ['../p.png', 'coco/../../x', `${elsewhere}/o.png`, '/etc/hostname', '.', ''])
      for (const follow of [true, false])
        await refuses(() => read(out, follow), 'ERR_IMAGE', /inside the image folder .*, got a path that leads outside/)
    for (const near of ['sub\\a b.JPG', 'sub/a%20b.JPG', 'sub/a b.jpg'])
      await refuses(() => read(near), 'ERR_IMAGE', /got ENOENT \(there is sub\/a b\.JPG\)/)
  })
})

it('damaged tars: members inside the file, or an own error', () => {
  const folder = tempDir()
  fs.writeFileSync(path.join(folder, `${'é'.repeat(90)}.txt`), 'x'.repeat(700))
  fs.writeFileSync(path.join(folder, 'short'), 'y')
  const file = fresh('.tar')
  execFileSync('tar', ['--format=pax', '--sort=name', '-cf', file, '-C', folder, '.'])
  const bytes = fs.readFileSync(file)
  const checksum = (b: Buffer, at: number): void => {
    b.write('        ', at + 148)
    const sum = b.subarray(at, at + 512).reduce((x, y) => x + y, 0)
    b.write(`${sum.toString(8).padStart(6, '0')}\0 `, at + 148)
  }
  const flip = fc.tuple(fc.nat(4095), fc.oneof(fc.nat(255), fc.constantFrom(...Buffer.from('0179 =\n\0xgLK'))))
  let read = 0
  fc.assert(
    fc.property(fc.array(flip, { maxLength: 4 }), fc.boolean(), fc.nat(bytes.length), (flips, mend, cut) => {
      const b = Buffer.from(bytes)
      for (const [at, v] of flips) b[at] = v
      // With the sums made right the damage gets further.
      if (mend) for (const [at] of flips) checksum(b, at - (at % 512))
      const size = cut % 2 ? cut : b.length
      fs.writeFileSync(file, b.subarray(0, size))
      try {
        for (const m of tarMembers(file)) {
          read++
          expect(m.offset >= 512 && m.bytes >= 0 && m.offset + m.bytes <= size).toBe(true)
        }
      } catch (e) {
        expect((e as { code?: string }).code, String((e as Error).stack)).toBe('ERR_DATA')
      }
    }),
    { numRuns: 500, seed: 6 },
  )
  expect(read).toBeGreaterThan(100)
})

describe('fingerprints', () => {
  it('behave like a map', () => {
    const [ours, map] = [new Fingerprints(), new Map<number, number>()]
    for (let i = 0; i < 20_000; i++) {
      const key = i === 5 ? 0 : hash53(`name ${i % 15_000}`)
      expect(ours.set(key, i)).toBe(map.get(key))
      map.set(key, i)
    }
    for (const [key, value] of map) expect(ours.get(key)).toBe(value)
    expect(ours.get(hash53('none'))).toBeUndefined()
    expect(map.size).toBe(15_001)
    expect(hash53('a')).toBeLessThan(2 ** 53)
  })
})

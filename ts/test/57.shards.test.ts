/** Data at full size: pictures in shards and folders, Parquet. */

import fs from 'node:fs'
import path from 'node:path'
import { type ColumnSource, parquetWriteBuffer, type SchemaElement } from 'hyparquet-writer'
import { describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { openLoader } from '../src/data/loader.js'
import { imageHeader, loadImage } from '../src/processing/image/decode.js'
import { expandShards, openImages, readImage } from '../src/processing/image/source.js'
import { readPreprocessor } from '../src/processing/preprocessor-config.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { caseDir, refuses, tempDir, writeTar } from './data-cases.js'

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
const tar = (members: [string, Uint8Array][], name = fresh('.tar')): string => writeTar(name, members)
describe('pictures in shards', () => {
  const file = (name: string): Buffer => fs.readFileSync(caseDir('base', 'images', name))
  const shards = path.join(dir, 'shards')
  tar(
    [
      ['a00.png', file('a00.png')],
      ['sub/a01.jpg', file('a10.jpg')],
      ['both.png', file('a00.png')],
    ],
    `${shards}/08.tar`,
  )
  tar(
    [
      ['a08.png', file('a08.png')],
      ['both.png', file('a08.png')],
      ['twice', Buffer.from('1')],
      ['twice', Buffer.from('22')],
    ],
    `${shards}/09.tar`,
  )
  tar(
    [
      ['x', Buffer.from('x')],
      ['both.png', file('a00.png')],
    ],
    `${shards}/10.tar`,
  )
  const pattern = `${shards}/{08..10}.tar`

  it('expands patterns', async () => {
    expect(expandShards('a/{8..10}-{00..01}.tar')).toEqual(
      ['8-00', '8-01', '9-00', '9-01', '10-00', '10-01'].map((x) => `a/${x}.tar`),
    )
    expect(expandShards('plain.tar')).toEqual(['plain.tar'])
    await refuses(() => expandShards('{2..1}.tar'), 'ERR_ARGUMENT', /range/)
  })
  it('finds members by name, or by shard and name', async () => {
    const p = await openImages(pattern)
    const read = (name: string): Buffer => readImage(p.locate(name))
    for (const [name, want] of [
      ['a00.png', 'a00.png'],
      ['08/a00.png', 'a00.png'],
      ['sub/a01.jpg', 'a10.jpg'],
      ['08/sub/a01.jpg', 'a10.jpg'],
      ['a08.png', 'a08.png'],
      ['08/both.png', 'a00.png'],
      ['09/both.png', 'a08.png'],
    ])
      expect(read(name).equals(file(want)), name).toBe(true)
    expect(read('twice').toString()).toBe('22')
    expect(read('10/x').toString()).toBe('x')
    await refuses(() => read('both.png'), 'ERR_IMAGE', /several of this name in .*write shard\/name/)
    for (const none of ['', 'a', '../a00.png', '08/x', '/etc/passwd'])
      await refuses(() => read(none), 'ERR_IMAGE', /none of this name/)
    await refuses(() => readImage(p.locate('a08.png'), { maxBytes: 10 }), 'ERR_IMAGE', /at most 10 bytes/)
  })
  it('refuses shards that are not there', async () => {
    await refuses(
      () => openImages(`${shards}/{08..11}.tar`),
      'ERR_DATA',
      /11\.tar: expected a readable file, got ENOENT/,
    )
    await refuses(() => openImages(`${shards}/no`), 'ERR_DATA', /a folder, or \.tar files/)
  })
  it('gives the loader the same batches as a folder, with and without workers; a bad one is named', async () => {
    const names = fs.readdirSync(caseDir('base', 'images')).sort()
    const half = names.length >> 1
    tar(
      names.slice(0, half).map((n) => [n, file(n)]),
      `${dir}/all/0.tar`,
    )
    tar(
      names.slice(half).map((n) => [n, file(n)]),
      `${dir}/all/1.tar`,
    )
    const collect = async (images: string, workers: number) => {
      const data = await loadDataset(caseDir('base', 'data_phase1.json'), { images })
      const tokenizer = Tokenizer.load(caseDir('base', 'model', 'llm'))
      const preprocess = { ...readPreprocessor(caseDir('base', 'model', 'clip')), pad: true }
      const o = { tokenizer, preprocess, style: 'plain', patches: 16, batch: 5, seed: 1, workers, maxBad: 1 } as const
      const loader = await openLoader(data, o)
      const out = []
      for await (const b of loader) out.push(b)
      await loader.close()
      return { out, bad: loader.dropped.state.bad }
    }
    const want = await collect(caseDir('base', 'images'), 0)
    expect(want.out.flatMap((b) => b.packed?.images ?? []).length).toBeGreaterThan(10)
    expect(await collect(`${dir}/all/{0..1}.tar`, 0)).toEqual(want)
    expect(await collect(`${dir}/all/{0..1}.tar`, 1)).toEqual(want)
    const { bad } = await collect(`${dir}/all/0.tar`, 1)
    expect(bad.length).toBeGreaterThan(3)
    expect(bad[0].reason).toMatch(/none of this name in .*0\.tar/)
  })
  it('reads sizes from headers, in tars and folders', async () => {
    const p = await openImages(pattern)
    const { width, height } = await loadImage(p.locate('a08.png'))
    const png = { width, height, format: 'PNG', orientation: 1 }
    expect(await imageHeader(p.locate('a08.png'))).toEqual(png)
    expect(await imageHeader({ root: caseDir('base', 'images'), name: 'a08.png' })).toEqual(png)
    // 200 kB of application data before the size.
    const jpeg = file('a02.jpg')
    const segment = Buffer.concat([Buffer.from([0xff, 0xef, 0xff, 0xff]), Buffer.alloc(65_533)])
    const long = Buffer.concat([jpeg.subarray(0, 2), segment, segment, segment, jpeg.subarray(2)])
    fs.writeFileSync(path.join(dir, 'long.jpg'), long)
    const { width: w, height: h } = await loadImage({ root: caseDir('base', 'images'), name: 'a02.jpg' })
    const long_ = { width: w, height: h, format: 'JPEG', orientation: 1 }
    expect(await imageHeader({ root: dir, name: 'long.jpg' })).toEqual(long_)
    await refuses(() => imageHeader(p.locate('twice')), 'ERR_IMAGE', /twice: expected a picture that can be decoded/)
    await refuses(() => imageHeader(p.locate('a08.png'), { maxPixels: 10 }), 'ERR_IMAGE', /at most 10 pixels/)
  })
})

describe('Parquet', () => {
  const picture = (name: string): Uint8Array => new Uint8Array(fs.readFileSync(caseDir('base', 'images', name)))
  const conversations = [0, 1, 2, 3, 4].map((i) => turns(`question ${i} é`, `answer ${i}`))
  const turnSchema = (name: string): SchemaElement[] => [
    { name, repetition_type: 'OPTIONAL', num_children: 1, converted_type: 'LIST' },
    { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
    { name: 'element', repetition_type: 'OPTIONAL', num_children: 2 },
    { name: 'from', repetition_type: 'OPTIONAL', type: 'BYTE_ARRAY', converted_type: 'UTF8' },
    { name: 'value', repetition_type: 'OPTIONAL', type: 'BYTE_ARRAY', converted_type: 'UTF8' },
  ]
  const imageSchema: SchemaElement[] = [
    { name: 'image', repetition_type: 'OPTIONAL', num_children: 2 },
    { name: 'bytes', repetition_type: 'OPTIONAL', type: 'BYTE_ARRAY' },
    { name: 'path', repetition_type: 'OPTIONAL', type: 'BYTE_ARRAY', converted_type: 'UTF8' },
  ]
  const text = (name: string): SchemaElement => ({
    name,
    repetition_type: 'OPTIONAL',
    type: 'BYTE_ARRAY',
    converted_type: 'UTF8',
  })
  const int = (name: string): SchemaElement => ({ name, repetition_type: 'OPTIONAL', type: 'INT64' })
  const write = (columnData: ColumnSource[], schema: SchemaElement[], columns: number, codec = 'SNAPPY'): Buffer =>
    Buffer.from(
      parquetWriteBuffer({
        columnData,
        schema: [{ name: 'root', num_children: columns }, ...schema],
        codec: codec as 'SNAPPY',
        rowGroupSize: 2,
      }),
    )
  const ids = ['a', 'b', 'c', 'd', 'e']
  const image = [
    { bytes: picture('a00.png'), path: 'x.png' },
    { bytes: picture('a02.jpg'), path: null },
    null,
    { bytes: picture('a08.png'), path: 'dir/../../y.png' },
    { bytes: picture('a00.png'), path: 'x.png' },
  ]
  const embedded = (): Buffer =>
    write(
      [
        { name: 'id', data: ids },
        { name: 'image', data: image },
        { name: 'conversations', data: conversations },
        { name: 'similarity', data: [3n, null, null, 0n, 7n] },
        { name: 'source', data: ids },
        { name: 'task', data: ['vqa', null, null, '', 'ocr'] },
      ],
      [text('id'), ...imageSchema, ...turnSchema('conversations'), int('similarity'), text('source'), text('task')],
      6,
    )
  const quiet = { onNotice: (): void => {} }

  it('reads records and embedded pictures, row groups of two', async () => {
    const file = put(embedded(), '.parquet')
    const data = await loadDataset(file, quiet)
    const got = [...data]
    expect(got.map((r) => [r.id, r.similarity])).toEqual([
      ['a', 3],
      ['b', null],
      ['c', null],
      ['d', 0],
      ['e', 7],
    ])
    expect(got.map((r) => r.task)).toEqual(['vqa', undefined, undefined, undefined, 'ocr'])
    expect(got.map((r) => r.image)).toEqual(['000000000.png', '000000001', null, '000000003.png', '000000004.png'])
    expect(got.map((r) => r.conversations)).toEqual(conversations)
    for (const [i, r] of got.entries())
      if (r.image !== null) expect(new Uint8Array(readImage(data.picture(r.image)))).toEqual(image[i]?.bytes)
    data.close()
  })
  it('is unpacked once, and again when the file has changed', async () => {
    const file = put(embedded(), '.parquet')
    const said: string[] = []
    const open = async () => (await loadDataset(file, { onNotice: (t) => said.push(t) })).length
    await open()
    const { mtimeMs } = fs.statSync(`${file}.unpacked/records.jsonl`)
    await open()
    expect(fs.statSync(`${file}.unpacked/records.jsonl`).mtimeMs).toBe(mtimeMs)
    expect(said).toEqual([expect.stringMatching(/is unpacked into .*\.unpacked$/)])
    fs.utimesSync(file, 5, 5)
    await open()
    expect(said[1]).toMatch(/again: the Parquet files have changed since/)
    fs.writeFileSync(`${file}.unpacked/manifest.json`, '{')
    await open()
    expect(said[2]).toMatch(/again: .*manifest\.json/)
    expect(fs.readdirSync(dir).filter((f) => f.includes('tmp'))).toEqual([])
  })
  it('takes several files in order, names of pictures in a folder, and other codecs', async () => {
    const part = (from: number, codec: string): Buffer =>
      write(
        [
          { name: 'image', data: ['p.png', null].map((n) => n && `${from}${n}`) },
          { name: 'conversations', data: conversations.slice(from, from + 2) },
          { name: 'id', data: [BigInt(from), BigInt(from + 1)] },
        ],
        [text('image'), ...turnSchema('conversations'), int('id')],
        3,
        codec,
      )
    const folder = tempDir()
    fs.writeFileSync(`${folder}/t-00.parquet`, part(0, 'SNAPPY'))
    fs.writeFileSync(`${folder}/t-01.parquet`, part(2, 'UNCOMPRESSED'))
    const unpacked = fresh('')
    const data = await loadDataset(`${folder}/t-{00..01}.parquet`, { ...quiet, images: dir, unpacked })
    expect([...data].map((r) => [r.id, r.image])).toEqual([
      ['0', '0p.png'],
      ['1', null],
      ['2', '2p.png'],
      ['3', null],
    ])
    expect([...data].map((r) => r.conversations)).toEqual(conversations.slice(0, 4))
    expect(fs.readdirSync(unpacked).sort()).toEqual(['manifest.json', 'records.jsonl'])
    data.close()
    await refuses(() => loadDataset(`${folder}/t-00.parquet`, quiet), 'ERR_DATA', /record 0: expected an images folder/)
  })
  it('reads pairs in short', async () => {
    const columns = [
      { name: 'image', data: image },
      { name: 'caption', data: ids },
    ]
    const data = await loadDataset(put(write(columns, [...imageSchema, text('caption')], 2), '.parquet'), quiet)
    expect(data.record(1)).toMatchObject({
      image: '000000001',
      conversations: [{ value: '<image>\n' }, { value: 'b' }],
    })
    data.close()
  })
  const list = (name: string, ...element: SchemaElement[]): SchemaElement[] => [
    { name, repetition_type: 'OPTIONAL', num_children: 1, converted_type: 'LIST' },
    { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
    ...element,
  ]
  const struct = (name: string, ...fields: SchemaElement[]): SchemaElement[] => [
    { name, repetition_type: 'OPTIONAL', num_children: fields.length },
    ...fields,
  ]
  const bytes = (name: string): SchemaElement => ({ name, repetition_type: 'OPTIONAL', type: 'BYTE_ARRAY' })
  const png = picture('a00.png')
  /** A file of captions and one more column. */
  const captioned = (name: string, data: unknown[], schema: SchemaElement[]): string =>
    put(
      write(
        [
          { name, data },
          { name: 'caption', data: ids.slice(0, data.length) },
        ] as ColumnSource[],
        [...schema, text('caption')],
        2,
      ),
      '.parquet',
    )

  it.each<[string, string, unknown, SchemaElement[]]>([
    ['bytes in image', 'image', png, [bytes('image')]],
    ['bytes in images', 'images', png, [bytes('images')]],
    ['bytes in img', 'img', png, [bytes('img')]],
    ['bytes in jpg', 'jpg', png, [bytes('jpg')]],
    ['bytes in png', 'png', png, [bytes('png')]],
    ['bytes in a column of any name', 'pixels', png, [bytes('pixels')]],
    ['{data, filename}', 'image', { data: png, filename: 'x.png' }, struct('image', bytes('data'), text('filename'))],
    [
      'a list of {bytes, path}',
      'images',
      [{ bytes: png, path: 'x.png' }],
      list('images', ...struct('element', bytes('bytes'), text('path'))),
    ],
    ['a list of bytes', 'image', [png], list('image', bytes('element'))],
    [
      'a list of numbers',
      'image',
      Array.from(png),
      list('image', { name: 'element', repetition_type: 'OPTIONAL', type: 'INT32' }),
    ],
    ['{bytes, path} of any name', 'foto', { bytes: png, path: null }, struct('foto', bytes('bytes'), text('path'))],
  ])('finds a picture: %s', async (_, name, cell, schema) => {
    const data = await loadDataset(captioned(name, [cell, cell], schema), quiet)
    expect(data.length).toBe(2)
    for (const r of data) {
      expect(r.image).toMatch(/^00000000\d(\.png)?$/)
      expect(new Uint8Array(readImage(data.picture(r.image as string)))).toEqual(png)
    }
    data.close()
  })
  it.each<[string, string, unknown, SchemaElement[]]>([
    ['a list of one', 'images', ['p.png'], list('images', text('element'))],
    ['image_path', 'image_path', 'p.png', [text('image_path')]],
    ['bytes that are text', 'image', Buffer.from('p.png'), [bytes('image')]],
    ['{bytes: null, path}', 'image', { bytes: null, path: 'p.png' }, struct('image', bytes('bytes'), text('path'))],
  ])('takes a name: %s', async (_, name, cell, schema) => {
    const data = await loadDataset(captioned(name, [cell], schema), { ...quiet, images: dir })
    expect([...data].map((r) => r.image)).toEqual(['p.png'])
    data.close()
  })
  it('refuses several pictures in one row, by name', async () => {
    const two = captioned('images', [[png, png], [png]], list('images', bytes('element')))
    const data = await loadDataset(two, quiet)
    expect(data.bad.map((b) => [b.index, b.reason])).toEqual([
      [0, expect.stringMatching(/images: expected one image, got .*000000000/)],
    ])
    data.close()
    const file = put(
      write(
        [
          { name: 'left', data: [png] },
          { name: 'right', data: [png] },
          { name: 'caption', data: ['c'] },
        ] as ColumnSource[],
        [bytes('left'), bytes('right'), text('caption')],
        3,
      ),
      '.parquet',
    )
    await refuses(
      () => loadDataset(file, quiet),
      'ERR_DATA',
      /row 0: expected one column with a picture, image, got left and right/,
    )
  })
  it('refuses a folder beside embedded pictures, and takes both where rows differ', async () => {
    const both = [
      { bytes: png, path: 'x.png' },
      { bytes: null, path: 'in the folder.png' },
    ]
    const schema = struct('image', bytes('bytes'), text('path'))
    const folder = tempDir()
    fs.writeFileSync(`${folder}/in the folder.png`, picture('a08.png'))
    const data = await loadDataset(captioned('image', both, schema), { ...quiet, images: folder })
    const seen = [...data].map((r) => new Uint8Array(readImage(data.picture(r.image as string))))
    expect(seen).toEqual([png, picture('a08.png')])
    data.close()
    const all = captioned('image', both.slice(0, 1), schema)
    const embedded = /images: expected none, since all pictures are embedded in the file \(leave --images out/
    await refuses(() => loadDataset(all, { ...quiet, images: folder }), 'ERR_DATA', embedded)
    expect((await loadDataset(all, { ...quiet, defaultImages: folder })).length).toBe(1)
  })
  it('reads turns of messages, of lists in a structure, ids beyond 2^53, text without its mark, and any file name', async () => {
    const roles = list('messages', ...struct('element', text('role'), text('content')))
    const messages = [
      { role: 'user', content: 'q' },
      { role: 'assistant', content: 'a' },
    ]
    const sequences = struct('conversations', ...list('from', text('element')), ...list('value', text('element')))
    sequences[0].num_children = 2
    const want = [
      { from: 'human', value: 'q' },
      { from: 'gpt', value: 'a' },
    ]
    const id = 1234567890123456789n
    for (const [column, schema] of [
      [{ name: 'messages', data: [messages] }, roles],
      [{ name: 'conversations', data: [{ from: ['human', 'gpt'], value: ['q', 'a'] }] }, sequences],
    ] as [ColumnSource, SchemaElement[]][]) {
      const file = put(write([column, { name: 'id', data: [id] }], [...schema, int('id')], 2), '.json')
      const data = await loadDataset(file, quiet)
      expect([...data]).toMatchObject([{ id: `${id}`, conversations: want }])
      data.close()
    }
    const columns = ['question', 'answer'].map((name) => ({ name, data: [Buffer.from('é')] })) as ColumnSource[]
    const raw = await loadDataset(put(write(columns, [bytes('question'), bytes('answer')], 2), '.parquet'), quiet)
    expect(raw.record(0).conversations.map((t) => t.value)).toEqual(['é', 'é'])
    raw.close()
  })
  it('refuses what is no Parquet, or has no conversations, and leaves nothing behind', async () => {
    const other = write([{ name: 'id', data: ids }], [text('id')], 1)
    const cut = embedded()
    for (const [bytes, pattern] of [
      [Buffer.from('no parquet at all'), /a Parquet file that can be read, got .*PAR1/],
      [other, /a column conversations or .* or caption or question, got id/],
      [Buffer.concat([Buffer.alloc(2000), cut.subarray(2000)]), /a Parquet file that can be read/],
    ] as const) {
      const file = put(bytes, '.parquet')
      await refuses(() => loadDataset(file, quiet), 'ERR_DATA', pattern)
      expect(fs.readdirSync(dir).filter((f) => f.startsWith(path.basename(file)))).toEqual([path.basename(file)])
    }
    await refuses(() => loadDataset(fresh('.parquet'), quiet), 'ERR_DATA', /ENOENT/)
  })

  it('refuses sizes and columns that cannot be, where the library reads on for ever or ends the process', async () => {
    const data = { name: 'caption', data: ['one', 'two'] }
    const whole = write([data, { name: 'id', data: ['a', 'b'] }], [text('caption'), text('id')], 2, 'UNCOMPRESSED')
    // The first page's header: its type, then its sizes as zigzag numbers of one byte.
    const page = 4
    expect([...whole.subarray(page, page + 2)]).toEqual([0x15, 6])
    const changed = (at: number, value: number): Buffer => {
      const b = Buffer.from(whole)
      b[at] = value
      return b
    }
    const last = whole.lastIndexOf('caption')
    for (const [bytes, pattern] of [
      [
        changed(page + 3, 0x7f),
        /can be read, got a page of \d+ bytes, unpacked -64, in the last \d+ of column caption/,
      ],
      [changed(page + 5, 0x7f), /can be read, got a page of -64 bytes/],
      [changed(page + 5, 0x7e), /can be read, got a page of 63 bytes/],
      [changed(last, 0x78), /can be read, got a column "xaption" that its schema has not/],
    ] as const)
      await refuses(() => loadDataset(put(bytes, '.parquet'), quiet), 'ERR_DATA', pattern)
  })
})

/** Files of another kind than a reader wants are named, and the way out; integers of records keep their digits. */
import fs from 'node:fs'
import path from 'node:path'
import zlib from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { readConfig, resolveSettings } from '../src/cli/settings.js'
import { loadDataset } from '../src/data/dataset.js'
import { parseBytes } from '../src/formats/record-file.js'
import { openSafetensors } from '../src/formats/safetensors.js'
import { openTorchBin } from '../src/formats/torchbin.js'
import { readJsonObject } from '../src/formats/zod-check.js'
import { decodeImage } from '../src/processing/image/decode.js'
import { openImages } from '../src/processing/image/source.js'
import { kindOfBytes } from '../src/util/file-kind.js'
import { quoteLargeIntegers } from '../src/util/json.js'
import { caseDir, errorOf, refuses, tempDir } from './data-cases.js'

describe('numbers of records', () => {
  const parse = (text: string): unknown => parseBytes(Buffer.from(text), 'f', 0)

  it.each([
    ['{"id":12345678901234567890}', { id: '12345678901234567890' }],
    ['{"id": -9007199254740993 }', { id: '-9007199254740993' }],
    ['{"id":9007199254740991}', { id: 9007199254740991 }],
    [
      '[{"a":[1,9007199254740993,{"b":90071992547409931}]}]',
      [{ a: [1, '9007199254740993', { b: '90071992547409931' }] }],
    ],
    ['{"x":0.12345678901234567890}', { x: 0.12345678901234568 }],
    ['{"x":12345678901234567890.5}', { x: Number('12345678901234567890.5') }],
    ['{"x":12345678901234567890e3}', { x: Number('12345678901234567890e3') }],
    ['{"x":1e0000000000000000001}', { x: 10 }],
    [
      '{"s":"a \\" 12345678901234567890 \\\\","id":12345678901234567891}',
      { s: 'a " 12345678901234567890 \\', id: '12345678901234567891' },
    ],
    ['{"12345678901234567890":1}', { '12345678901234567890': 1 }],
  ])('%s', (text, value) => expect(parse(text)).toEqual(value))

  it('nothing else changes', () => {
    fc.assert(
      fc.property(fc.json(), (text) => {
        if (!/\d{16}/.test(text)) expect(quoteLargeIntegers(text)).toBe(text)
        expect(JSON.parse(quoteLargeIntegers(text))).toBeDefined()
      }),
      { numRuns: 300, seed: 4 },
    )
  })
  it('a record nested 100,000 deep is refused, one of 12 MB is read', async () => {
    await refuses(() => parse(`{"a":${'['.repeat(1e5)}${']'.repeat(1e5)}}`), 'ERR_DATA', /not nested so deep/)
    const long = `${'x'.repeat(12e6)}1234567890123456789`
    expect((parse(JSON.stringify({ long })) as { long: string }).long.length).toBe(long.length)
  })
})

const dir = tempDir()
let serial = 0
const put = (bytes: string | Uint8Array, end: string): string => {
  const file = path.join(dir, `f${serial++}${end}`)
  fs.writeFileSync(file, bytes)
  return file
}
const record = {
  id: 1,
  conversations: [
    { from: 'human', value: 'q' },
    { from: 'gpt', value: 'a' },
  ],
}
const json = JSON.stringify(record)
const utf16 = Buffer.from(json, 'utf16le')
const bigEndian = Buffer.from(utf16).swap16()
const hex = (text: string, fill = 600): Buffer => Buffer.concat([Buffer.from(text, 'hex'), Buffer.alloc(fill, 0x9c)])
const zipOf = (name: string): Buffer => {
  const head = Buffer.alloc(30)
  head.write('PK\x03\x04', 'latin1')
  head.writeUInt16LE(name.length, 26)
  return Buffer.concat([head, Buffer.from(name), Buffer.alloc(600)])
}
const png = fs.readFileSync(caseDir('base', 'images', 'a00.png'))
const jpeg = fs.readFileSync(caseDir('base', 'images', 'a02.jpg'))

/** What people give in place of another file: what it is called in the message. */
const KINDS: [string, string | Uint8Array, RegExp][] = [
  ['gzip', zlib.gzipSync(json), /gzip, compressed \(gunzip it first\)/],
  ['bzip2', Buffer.concat([Buffer.from('BZh91AY&SY'), Buffer.alloc(600, 7)]), /bzip2.*bunzip2/],
  ['xz', hex('fd377a585a00'), /xz, compressed \(unxz/],
  ['zstd', hex('28b52ffd'), /zstd.*unzstd/],
  ['lz4', hex('04224d18'), /lz4/],
  ['7z', hex('377abcaf271c'), /7z archive/],
  ['rar', hex('526172211a0700'), /RAR archive/],
  ['zip', zipOf('data.json'), /a zip archive \(unzip it first\)/],
  ['xlsx', zipOf('[Content_Types].xml'), /an Office document/],
  ['npz', zipOf('arr_0.npy'), /NumPy archive/],
  [
    'UTF-16 with a mark',
    Buffer.concat([Buffer.from([0xff, 0xfe]), utf16]),
    /UTF-16 text \(make it UTF-8: iconv -f UTF-16 -t UTF-8\)/,
  ],
  ['UTF-16 BE with a mark', Buffer.concat([Buffer.from([0xfe, 0xff]), bigEndian]), /UTF-16 text/],
  ['UTF-16 LE', utf16, /UTF-16LE text.*iconv -f UTF-16LE/],
  ['UTF-16 BE', bigEndian, /UTF-16BE text.*iconv -f UTF-16BE/],
  ['UTF-32', Buffer.concat([hex('fffe0000', 0), Buffer.from('7b00000022000000', 'hex')]), /UTF-32/],
  [
    'Git LFS',
    'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n',
    /a Git LFS pointer.*git lfs pull/,
  ],
  ['HTML', '\n<!DOCTYPE html>\n<html><body>404</body></html>', /an HTML page/],
  ['XML', '<?xml version="1.0"?><a/>', /XML/],
  ['Arrow', Buffer.concat([Buffer.from('ARROW1\0\0'), Buffer.alloc(600, 1)]), /Arrow or Feather/],
  ['an Arrow stream', hex('ffffffff1003000010000000'), /an Arrow stream/],
  ['SQLite', Buffer.concat([Buffer.from('SQLite format 3\0'), Buffer.alloc(600, 1)]), /an SQLite database/],
  ['PDF', '%PDF-1.7\n%âãÏÓ\n1 0 obj', /PDF/],
  ['HDF5', hex('894844460d0a1a0a'), /HDF5/],
  ['a pickle', hex('80049520000000'), /a Python pickle/],
  ['GGUF', hex('4747554603000000'), /a GGUF model/],
  ['PNG', png, /a PNG picture/],
  ['JPEG', jpeg, /a JPEG picture/],
  ['nothing', '', /an empty file/],
]
/** Text without a mark: only readers of text can tell. */
const TEXTS: [string, string | Uint8Array, RegExp][] = [
  ['CSV', 'id,image,caption\n1,a.png,cat\n', /a table with commas \(CSV\) \(write it as JSON lines or Parquet\)/],
  ['TSV', 'id\timage\n1\ta.png\n', /TSV/],
  [
    'Latin-1',
    Buffer.from('caf\xe9 au lait\nd\xe9j\xe0 vu', 'latin1'),
    /text that is not UTF-8 \(if it is Latin-1: iconv/,
  ],
  ['binary', hex('0102030405060700'), /binary data/],
]
const without = (...names: string[]): typeof KINDS => KINDS.filter(([name]) => !names.includes(name))

describe('a file of another kind is named, with the way out', () => {
  const one = /^\[[\w-]+\] [^\n]+: expected [^\n]+, got [^\n]+$/
  const all = [...KINDS, ...TEXTS]
  it.each(all)('records: %s', async (_, bytes, name) => {
    for (const end of ['.json', '.jsonl']) {
      const file = put(bytes, end)
      const e = await errorOf(() => loadDataset(file))
      expect([e.code, e.message]).toEqual(['ERR_DATA', expect.stringMatching(name)])
      expect(e.message).toMatch(one)
      expect(e.message).toContain(file)
    }
  })
  it.each(all)('config: %s', async (_, bytes, name) => {
    if (bytes.length) await refuses(() => readConfig(put(bytes, '.yaml')), 'ERR_CONFIG', name)
    await refuses(
      () => readJsonObject(put(bytes, '.json')),
      'ERR_CONFIG',
      _ === 'CSV' || _ === 'TSV' ? /expected a value/ : name,
    )
  })
  it.each(KINDS)('weights, tars, Parquet: %s', async (kind, bytes, name) => {
    await refuses(() => openSafetensors(put(bytes, '.safetensors')), 'ERR_FORMAT', name)
    if (!/zip|xlsx|npz|pickle/.test(kind)) await refuses(() => openTorchBin(put(bytes, '.bin')), 'ERR_FORMAT', name)
    if (bytes.length) await refuses(() => openImages(put(bytes, '.tar')), 'ERR_DATA', name)
    await refuses(() => openImages(put(bytes, '.tar.gz')), 'ERR_DATA', name)
    await refuses(() => loadDataset(put(bytes, '.parquet'), { onNotice: () => {} }), 'ERR_DATA', name)
  })
  it.each(without('PNG', 'JPEG'))('pictures: %s', async (_, bytes, name) => {
    await refuses(() => decodeImage(put(bytes, '.jpg')), 'ERR_IMAGE', name)
  })
  it('a folder for a file, a file for a folder, an address', async () => {
    const file = put(json, '.jsonl')
    await refuses(() => loadDataset(dir), 'ERR_DATA', /expected a regular file, got a folder/)
    await refuses(
      () => loadDataset(file, { images: file }),
      'ERR_DATA',
      /images .*: expected a folder, or \.tar files, got JSON/,
    )
    await refuses(() => readConfig(dir), 'ERR_CONFIG', /got a folder/)
    await refuses(() => openSafetensors(dir), 'ERR_FORMAT', /got a folder/)
    for (const url of ['https://a.b/c.json', 's3://a/b.jsonl', 'hf://datasets/a/b.parquet'])
      await refuses(() => loadDataset(url), 'ERR_DATA', /ENOENT: a URL \(download it first\)/)
    await refuses(() => loadDataset(file, { images: 'https://a.b/images' }), 'ERR_DATA', /got no such file: a URL/)
    await refuses(() => readConfig('https://a.b/run.yaml'), 'ERR_CONFIG', /a URL/)
  })
  it('what is what it should be, with a mistake inside, keeps its message', async () => {
    await refuses(() => loadDataset(put('[{"id": 1}, x]', '.json')), 'ERR_DATA', /'\{' of a record, got "x"/)
    const header = Buffer.from('{"a": 1}')
    const size = Buffer.alloc(8)
    size.writeUInt32LE(header.length)
    await refuses(() => openSafetensors(put(Buffer.concat([size, header]), '.safetensors')), 'ERR_FORMAT', /"?a"?/)
    expect(kindOfBytes(Buffer.from('Hello, world'))).toBeNull()
    expect(kindOfBytes(Buffer.from('é'.repeat(3000)).subarray(0, 4095), false)).toBeNull()
  })
})

describe('config files', () => {
  const read = async (text: string, end = '.json'): Promise<unknown> => (await readConfig(put(text, end))).values
  it.each([
    ['lines', '{\n  // the rate\n  "lr": 1e-5 // all of it\n}\n', { lr: 1e-5 }],
    ['blocks', '/* a */ {"lr": /* b\n c */ 1e-5, "batch": 4,}', { lr: 1e-5, batch: 4 }],
    ['in front', '// model "model"\n{"model": "a // b /* c */ \\" // d"}', { model: 'a // b /* c */ " // d' }],
    ['commas at an end', '{"lora": {"rank": 4,}, "set": [1, 2,],}', { lora: { rank: 4 }, set: [1, 2] }],
    ['a byte order mark', '\ufeff{"lr": 1}', { lr: 1 }],
    ['none', '{"data": "https://a.b/c"}', { data: 'https://a.b/c' }],
  ])('JSON with comments: %s', async (_, text, values) => {
    expect(await read(text)).toEqual(values)
    expect(await read(text, '.yaml')).toEqual(values)
  })
  it('YAML keeps its own', async () => {
    expect(await read('data: http://x # y\nmodel: a//b\n', '.yaml')).toEqual({ data: 'http://x', model: 'a//b' })
  })
  it.each([
    ['lr: .nan', /lr: expected a number .*, got NaN/],
    ['lr: .inf', /lr: expected a number .*, got Infinity/],
    ['lr: -.inf', /got -Infinity/],
    ['lr: null', /lr: expected a number .*, got null/],
    ['batch:', /batch: expected an integer > 0, got null/],
    ['lr: 1\nlr: 2', /Map keys must be unique at line 2, column 1/],
    ['{"lr": 1, "lr": 2}', /Map keys must be unique at line 1, column 11/],
    ['lora:\n\trank: 2', /[Tt]abs.*line 2, column 1/],
    ['- 1\n- 2', /expected keys and values, got \[1,2\]/],
    ['just text', /expected keys and values, got "just text"/],
    ['"x"', /expected keys and values/],
    ['[1]', /expected keys and values, got \[1\]/],
    ['lr: !!python/object:x 1', /Unresolved tag/],
    ['lr: 1\n---\nlr: 2', /multiple documents/],
    ['{"lr": 1 /* open', /line 1, column/],
  ])('%s', async (text, message) => {
    const config = put(text, '.yaml')
    const e = await errorOf(() => resolveSettings('finetune', { config }))
    expect([e.code, e.message]).toEqual(['ERR_CONFIG', expect.stringMatching(message)])
    expect(e.message).not.toContain('\n')
  })
  it('other JSON files say that JSON takes no comments', async () => {
    await refuses(
      () => readJsonObject(put('{ // a\n"b": 1}', '.json')),
      'ERR_CONFIG',
      /at byte 2: .*JSON takes no comments/,
    )
  })
})

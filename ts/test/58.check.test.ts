/** The data linter. */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import fc from 'fast-check'
import sharp from 'sharp'
import { beforeAll, describe, expect, it } from 'vitest'
import { loadDataset } from '../src/data/dataset.js'
import { type CheckOptions, type CheckReport, checkDataset, PROBLEMS, type ProblemKind } from '../src/data/lint.js'
import { TarWriter } from '../src/formats/tar.js'
import { buildSample } from '../src/processing/sample.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { CASES, caseDir, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
const images = path.join(dir, 'images')
let serial = 0
const put = (text: string | Buffer, end = '.json'): string => {
  const f = path.join(dir, `c${serial++}${end}`)
  fs.writeFileSync(f, text)
  return f
}
const human = (value: string) => ({ from: 'human', value })
const gpt = (value: string) => ({ from: 'gpt', value })
const good = (id: unknown, image?: string, text = `${id}`): object => ({
  id,
  ...(image === undefined ? {} : { image }),
  conversations: [human(image === undefined ? 'q' : '<image>\nq'), gpt(`answer ${text}`)],
})
const check = (list: unknown[], o: CheckOptions = {}): Promise<CheckReport> =>
  checkDataset(put(JSON.stringify(list)), o)

beforeAll(async () => {
  fs.mkdirSync(path.join(images, 'sub'), { recursive: true })
  const picture = await sharp({ create: { width: 300, height: 200, channels: 3, background: '#336699' } })
    .png()
    .toBuffer()
  for (const name of ['ok.png', 'sub/ok2.png']) fs.writeFileSync(path.join(images, name), picture)
  const { data } = await sharp(fs.readFileSync(caseDir('base', 'images', 'a02.jpg')))
    .resize(400, 400)
    .jpeg()
    .toBuffer({ resolveWithObject: true })
  fs.writeFileSync(path.join(images, 'cut.jpg'), data.subarray(0, data.length - 2000))
  fs.writeFileSync(path.join(images, 'text.png'), 'not a picture')
  fs.writeFileSync(path.join(images, 'empty.png'), '')
  for (const name of ['exif-6.jpg', 'exif.png', 'exif.webp', 'orientation-6.tif', 'x.heic', '12-bit.jpg'])
    fs.copyFileSync(path.join(import.meta.dirname, 'pictures', name), path.join(images, name))
  fs.writeFileSync(path.join(dir, 'outside.png'), picture)
  fs.symlinkSync('../outside.png', path.join(images, 'link.png'))
})

/** A record with one mistake each, and what is found. */
const MISTAKES: [ProblemKind, unknown, RegExp][] = [
  ['record', { id: 'x' }, /conversations: expected an array of turns, or caption, or question and answer, got nothing/],
  ['record', { id: {}, conversations: [human('q'), gpt('a')] }, /id: expected a string or number/],
  ['image', { id: 'x', image: ['a', 'b'], conversations: [human('q'), gpt('a')] }, /image: expected one image, got/],
  ['image', { id: 'x', video: 'a.mp4', conversations: [human('q'), gpt('a')] }, /video: expected none: only images/],
  ['image', { id: 'x', image_url: 'http://a/b.jpg', conversations: [human('q'), gpt('a')] }, /the image under image/],
  ['image', { id: 'x', caption: 'a cat' }, /image: expected the image of the caption, got nothing/],
  ['record', { id: 'x', conversations: [human('q'), { from: 'gpt', value: 3 }] }, /conversations\[1\]\.value/],
  ['level', { ...good('x'), similarity: 1.5 }, /similarity: expected an integer level/],
  ['level', { ...good('x'), similarity: -1 }, /similarity: expected an integer level/],
  ['level', { ...good('x', 'ok.png'), similarity: '3' }, /similarity: expected an integer level/],
  ['role', { id: 'x', conversations: [human('q'), { from: 'bot', value: 'a' }] }, /human \| user .*got "bot"/],
  ['turns', { id: 'x', conversations: [human('q'), human('q2'), gpt('a')] }, /turn 1: expected from gpt/],
  [
    'turns',
    { id: 'x', conversations: [human('q'), gpt('a'), { from: 'system', value: 's' }] },
    /a system turn only at the start/,
  ],
  ['turns', { id: 'x', conversations: [gpt('a')] }, /at least one question/],
  [
    'placeholders',
    { id: 'x', image: 'ok.png', conversations: [human('<image> <image>'), gpt('a')] },
    /at most one <image>, got 2/,
  ],
  [
    'placeholders',
    { id: 'x', image: 'ok.png', conversations: [human('q'), gpt('<image> a')] },
    /turn 1: expected <image> in a question only/,
  ],
  ['placeholders', { id: 'x', conversations: [human('<img>a.png</img> q'), gpt('a')] }, /not within the text/],
  ['foreign-placeholder', { id: 'x', conversations: [human('<|image_pad|>\nq'), gpt('a')] }, /image_pad/],
  ['foreign-placeholder', { id: 'x', conversations: [human('<video>\nq'), gpt('a')] }, /<video>/],
  ['no-answer', { id: 'x', conversations: [human('q')] }, /an answer to learn, got none/],
  ['empty-answer', { id: 'x', conversations: [human('q'), gpt(' \n')] }, /turn 1 is " \\n"/],
  [
    'placeholders',
    { id: 'x', conversations: [human('<image>\nq'), gpt('a')] },
    /turn 0: expected no <image> in a record/,
  ],
  ['image-without-placeholder', { id: 'x', image: 'ok.png', conversations: [human('q'), gpt('a')] }, /"ok\.png"/],
  ['duplicate-id', good('first', undefined, 'other'), /record 0 has it too/],
  ['duplicate', good('x', undefined, 'first'), /the same as record 0/],
  ['missing', good('x', 'no.png'), /no\.png: expected a file, got ENOENT/],
  ['escaping', good('x', '../outside.png'), /a file inside the image folder .*leads outside/],
  ['escaping', good('x', 'link.png'), /a file inside the image folder/],
  ['escaping', good('x', '/etc/hostname'), /a file inside the image folder/],
  ['corrupt', good('x', 'text.png'), /a picture that can be decoded/],
  ['corrupt', good('x', 'empty.png'), /an empty file/],
  ['corrupt', good('x', 'sub'), /a regular file/],
  ['corrupt', good('x', 'x.heic'), /x\.heic: expected a picture .*, got HEIC \(HEVC\)$/],
  ['corrupt', good('x', '12-bit.jpg'), /got a JPEG of 12 bits$/],
  ['orientation', good('x', 'exif-6.jpg'), /expected EXIF orientation 1 or the setting exifOrientation, got 6/],
  ['orientation', good('x', 'exif.png'), /got 6/],
  ['orientation', good('x', 'exif.webp'), /got 6/],
]

describe('finds', () => {
  it.each(MISTAKES)('%s', async (kind, bad, pattern) => {
    const file = put(JSON.stringify([good('first'), bad, good('last', 'sub/ok2.png')], null, 1))
    const report = await checkDataset(file, { images })
    expect(report.counts).toEqual({ [kind]: 1 })
    const [f] = report.findings
    expect(f.message).toMatch(pattern)
    expect([f.kind, f.record, report.findings.length]).toEqual([kind, 1, 1])
    // The place is the first byte of the record.
    const rest = fs.readFileSync(file).subarray(f.byte).toString()
    expect(JSON.parse(rest.slice(0, rest.indexOf('\n },') + 3))).toEqual(bad)
    const severe = PROBLEMS[kind][0] === 'error'
    expect([report.errors, report.warnings, report.records]).toEqual([severe ? 1 : 0, severe ? 0 : 1, 3])
  })
  it('no turned picture where training turns them; a TIFF always is turned', async () => {
    const turned = [good(1, 'exif-6.jpg'), good(2, 'exif.png'), good(3, 'orientation-6.tif')]
    expect((await check(turned, { images })).counts).toEqual({ orientation: 2 })
    expect((await check(turned, { images, exifOrientation: true, decode: true })).counts).toEqual({})
  })
  it('every kind is tested', () => {
    const elsewhere = ['syntax', 'json', 'too-long', 'cut', 'oversize', 'no-level', 'some-levels', 'special-token']
    expect(new Set([...MISTAKES.map(([k]) => k as string), ...elsewhere])).toEqual(new Set(Object.keys(PROBLEMS)))
  })
  it('nothing in good data: the golden cases', async () => {
    for (const name of CASES)
      for (const [file, style] of [
        ['data_phase1.json', 'plain'],
        ['data_phase2.json', 'vicuna_v1'],
      ] as const) {
        const o = { images: caseDir(name, 'images'), style, decode: true } as const
        const report = await checkDataset(caseDir(name, file), o)
        expect([report.errors, report.counts.missing ?? 0]).toEqual([0, 0])
        expect(report.pictures.read).toBe(report.pictures.named)
        expect(report.pictures.read).toBeGreaterThan(0)
      }
  })
  it('a record that is no JSON, and goes on', async () => {
    const text = `[${JSON.stringify(good('a'))}, {"id": é}, ${JSON.stringify(good('b'))}]`
    const { counts, records, findings } = await checkDataset(put(text))
    expect([counts, records]).toEqual([{ json: 1 }, 3])
    expect(findings[0]).toMatchObject({ id: null, record: 1, byte: text.indexOf('{"id": é') })
    expect(findings[0].message).toMatch(/a value/)
  })
  it('where a file stops being a list of records', async () => {
    const text = `[${JSON.stringify(good('a'))} ${JSON.stringify(good('b'))}]`
    const { counts, records, findings, lengths } = await checkDataset(put(text))
    expect([counts, records]).toEqual([{ syntax: 1 }, 1])
    expect(findings[0].byte).toBe(JSON.stringify(good('a')).length + 2)
    expect(findings[0].message).toMatch(/',' or '\]'/)
    expect(lengths?.max).toBe(3)
    expect((await checkDataset(put(''))).counts).toEqual({ syntax: 1 })
    expect(await checkDataset(put('[]'))).toMatchObject({ records: 0, errors: 0, lengths: null })
  })
  it('damage behind a header only when decoding; pictures above the limits', async () => {
    const list = [good('a', 'cut.jpg'), good('b', 'ok.png')]
    expect((await check(list, { images })).counts).toEqual({})
    const { findings, counts } = await check(list, { images, decode: true })
    expect(counts).toEqual({ corrupt: 1 })
    expect(findings[0]).toMatchObject({ kind: 'corrupt', record: 0, id: 'a' })
    const pixels = await check(list, { images, limits: { maxPixels: 100_000 } })
    expect(pixels.findings.map((f) => [f.id, f.kind, f.message])).toEqual([
      ['a', 'oversize', 'expected at most 100000 pixels, got 400 x 400'],
    ])
    const maxBytes = fs.statSync(path.join(images, 'cut.jpg')).size - 1
    expect((await check(list, { images, limits: { maxBytes } })).counts).toEqual({ oversize: 1 })
  })
  it('pictures in tars', async () => {
    const tar = path.join(dir, 'p.tar')
    const fd = fs.openSync(tar, 'w')
    const writer = new TarWriter(fd)
    for (const n of ['ok.png', 'text.png', 'cut.jpg']) writer.add(n, fs.readFileSync(path.join(images, n)))
    writer.end()
    fs.closeSync(fd)
    const list = ['ok.png', 'text.png', 'no.png', 'cut.jpg'].map((n, i) => good(i, n))
    const { findings } = await check(list, { images: tar, decode: true })
    expect(findings.map((f) => [f.id, f.kind])).toEqual([
      ['1', 'corrupt'],
      ['2', 'missing'],
      ['3', 'corrupt'],
    ])
  })
  it('with a tokenizer: special tokens in the text of a turn', async () => {
    const tokenizer = Tokenizer.load(caseDir('base', 'model', 'llm'))
    const record = (id: string, q: string, a: string): unknown => ({ id, conversations: [human(q), gpt(a)] })
    const list = [record('a', 'what is </s>?', 'ends </s> here <s>'), record('b', '[INST] < /s> <|im_start|>', 'no')]
    const { findings, counts } = await checkDataset(put(JSON.stringify(list)), { tokenizer })
    expect(counts['special-token']).toBe(1)
    expect(findings.find((f) => f.kind === 'special-token')).toMatchObject({ id: 'a', message: '"</s>", "<s>"' })
  })
  it('with a tokenizer: the lengths of training, what is cut, what is left out', async () => {
    const tokenizer = Tokenizer.load(caseDir('base', 'model', 'llm'))
    const file = caseDir('base', 'data_phase2.json')
    const data = await loadDataset(file, { images: caseDir('base', 'images') })
    const o = { style: 'vicuna_v1', patches: 16 } as const
    const lengths = [...data].map((r) => buildSample(r, tokenizer, o).length).sort((a, b) => a - b)
    const all = await checkDataset(file, { tokenizer, ...o })
    expect(all.counts).toEqual((await checkDataset(file)).counts)
    expect(all.lengths).toMatchObject({ unit: 'tokens', min: lengths[0], max: lengths.at(-1) })
    expect(all.lengths?.histogram.reduce((n, h) => n + h.count, 0)).toBe(lengths.length)
    for (const { from, to, count } of all.lengths?.histogram ?? [])
      expect(lengths.filter((x) => x >= from && x < to).length).toBe(count)
    for (const maxLength of [lengths[lengths.length >> 1], 20]) {
      const samples = [...data].map((r) => buildSample(r, tokenizer, { ...o, maxLength }))
      const { counts } = await checkDataset(file, { tokenizer, ...o, maxLength })
      const left = samples.filter((s) => s.skip).length
      expect([counts['too-long'] ?? 0, counts.cut ?? 0]).toEqual([
        left,
        samples.filter((s) => !s.skip && s.length < s.fullLength).length,
      ])
      expect(left + (counts.cut ?? 0)).toBeGreaterThan(0)
    }
  })
  it('counts all, shows some; reads a picture once; does without pictures', async () => {
    const list = Array.from({ length: 50 }, (_, i) => good(i, i % 2 ? 'no.png' : `no${i}.png`))
    const r = await check(list, { images, limit: 3 })
    expect([r.counts, r.findings.length, r.errors, r.pictures]).toEqual([
      { missing: 26 },
      3,
      26,
      { named: 26, looked: 26, read: 0 },
    ])
    expect(await check(list)).toMatchObject({ errors: 0, pictures: { named: 26, looked: 0, read: 0 }, withImage: 50 })
  })
  it('levels: too high for the model, and missing where other records have one', async () => {
    const level = (id: string, similarity?: number): object => ({ ...good(id, 'ok.png'), similarity })
    const list = [level('a', 7), level('b', 8), level('c'), good('text')]
    expect((await check(list)).counts).toEqual({ level: 1, 'some-levels': 1 })
    expect((await check(list, { levels: 9, style: 'plain' })).counts).toEqual({ 'no-level': 1 })
    expect((await check([level('c')], { style: 'plain' })).counts).toEqual({})
  })
  it('plain style wants one caption', async () => {
    const two = { id: 1, conversations: [human('q'), gpt('a'), human('q'), gpt('a')] }
    expect((await check([two])).counts).toEqual({})
    expect((await check([two], { style: 'plain' })).counts).toEqual({ turns: 1 })
  })
  it('what cannot be opened is an error, and a signal ends it', async () => {
    await refuses(() => checkDataset(path.join(dir, 'no.json')), 'ERR_DATA', /ENOENT/)
    await refuses(() => check([], { images: path.join(dir, 'no') }), 'ERR_DATA', /a folder/)
    const o = { images, signal: AbortSignal.abort(new Error('enough')) }
    await expect(check([good('a', 'ok.png')], o)).rejects.toThrow('enough')
  })
})

it('agrees with loading: what loads has no error that loading names, and the other way round', async () => {
  const bytes = Buffer.from(JSON.stringify([good('a'), good('b'), { ...good('c'), similarity: 2 }], null, 1))
  const flip = fc.tuple(fc.nat(bytes.length - 1), fc.constantFrom(...Buffer.from('{}[]",:\\x1')))
  await fc.assert(
    fc.asyncProperty(fc.array(flip, { maxLength: 3 }), fc.nat(bytes.length), async (flips, cut) => {
      const b = Buffer.from(bytes)
      for (const [at, v] of flips) b[at] = v
      const file = path.join(dir, 'fuzz.json')
      fs.writeFileSync(file, b.subarray(0, cut))
      const { counts, records } = await checkDataset(file)
      const bad = (['json', 'record', 'role', 'image', 'placeholders'] as const).reduce(
        (n, k) => n + (counts[k] ?? 0),
        0,
      )
      const fatal = !!counts.syntax || (records > 0 && bad === records)
      let left = bad
      const e = await loadDataset(file, { images: dir }).then(
        (d) => {
          left = d.bad.length
          d.close()
        },
        (e) => e,
      )
      expect(left).toBe(bad)
      expect(e !== undefined, `${b.subarray(0, cut)} ${JSON.stringify(counts)} ${e}`).toBe(fatal)
    }),
    { numRuns: 300, seed: 3 },
  )
})

describe('aligngpt check', () => {
  const root = fileURLToPath(new URL('../..', import.meta.url))
  const run = (...args: string[]) =>
    spawnSync(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', 'check', ...args], { cwd: root, encoding: 'utf8' })

  it('prints counts, places and lengths; status 1 for errors, with --strict also for warnings', () => {
    const file = put(
      [good('a', 'ok.png'), good('b', 'no.png'), good('b')].map((r) => JSON.stringify(r)).join('\n'),
      '.jsonl',
    )
    const bad = run(file, '--images', images)
    expect(bad.stdout).toContain('3 records, 2 with a picture (2 different, 1 read)')
    expect(bad.stdout).toContain('error missing: 1 (a picture that is not there)')
    expect(bad.stdout).toMatch(
      new RegExp(`${file}:${JSON.stringify(good('a', 'ok.png')).length + 1} record 1 \\(b\\): .*ENOENT`),
    )
    expect(bad.stdout).toContain('warning duplicate-id: 1')
    expect(bad.stdout).toContain('1 errors, 1 warnings')
    expect([bad.status, bad.stderr]).toEqual([1, ''])
    expect(run(file).status).toBe(0)
    expect(run(file, '--strict').status).toBe(1)
    const json = run(file, '--json', '--model', caseDir('base', 'model', 'llm'))
    expect(JSON.parse(json.stdout)).toMatchObject({ records: 3, warnings: 1, lengths: { unit: 'tokens' } })
    const none = run(path.join(dir, 'no.json'))
    expect([none.status, none.stderr]).toEqual([1, expect.stringMatching(/^ERR_DATA .*ENOENT/)])
  })
})

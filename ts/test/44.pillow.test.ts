import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { loadPixels } from '../src/inference/request.js'
import { readAlignGPTConfig } from '../src/models/config/aligngpt.js'
import { turned } from '../src/processing/image/colours.js'
import { decodeImage, imageHeader } from '../src/processing/image/decode.js'
import { FORMATS, formatOf } from '../src/processing/image/format.js'
import { ImageCache, prepareImage } from '../src/processing/image/prepare.js'
import { normalise, preprocessImage } from '../src/processing/image/preprocess.js'
import { caseDir, errorOf, tempDir } from './data-cases.js'

const dir = path.join(import.meta.dirname, 'pictures')
/** What Pillow 12 makes of each file (scripts/parity/pictures.py). */
type Expected = { size: [number, number]; sha256: string; rgb?: string } | { error: string }
const EXPECTED = Object.entries(
  JSON.parse(fs.readFileSync(path.join(dir, 'pictures.json'), 'utf8')) as Record<string, Expected>,
)
const bytesOf = (name: string): Buffer => fs.readFileSync(path.join(dir, name))

/** What Pillow reads and this package refuses, and with which words. Nothing else may be refused. */
const REFUSED: [RegExp, RegExp][] = [
  [/^(lzma|zstd)-.*tif$/, /a TIFF with (LZMA|Zstandard) compression$/],
  [/^lab\.tif$/, /a TIFF of CIELab, 3 x 8 bits$/],
  [/^bits-12\.tif$/, /a TIFF of grey, 1 x 12 bits$/],
  [/^planar-16\.tif$/, /a TIFF of RGB, 3 x 16 bits, in planes$/],
  [/^palette-(low|short)\.tif$/, /a TIFF of palette, 1 x 8 bits$/],
  [/^palette-extra-[02]\.tif$/, /a TIFF of palette, 2 x 8 bits \(extra [02]\)$/],
  [/^planar-rgba\.tif$/, /a TIFF of RGB, 4 x 8 bits \(extra 2\), in planes$/],
  [/^no-photometric\.tif$/, /a TIFF that does not name its colours$/],
  [/^strips-short\.tif$/, /a damaged or truncated TIFF$/],
  [/^orientation-9\.tif$/, /a TIFF with orientation 9$/],
  [/^(c3-8-none|idat-crc|unknown-critical)\.png$/, /a damaged or truncated PNG$/],
  [/^(420|alpha|exif|limited|cut)\.avif$/, /an AVIF with colour 4:2:0$/],
  [/^422\.avif$/, /an AVIF with colour 4:2:2$/],
  [/^animated\.avif$/, /got AVIF sequence$/],
  [/\.pfm$/, /got PFM$/],
  [/^x\.(dds|ico|pcx|qoi|sgi|tga)$/, /got (DDS|ICO|PCX|QOI|SGI|TGA)$/],
  [/^x\.(jp2|j2k)$/, /got JPEG 2000$/],
]

/** Kinds of files, each with those of its pictures that are read, or that are not. */
function byKind(read: boolean): [string, [string, Expected][]][] {
  const some = EXPECTED.filter(([name, e]) => ('size' in e && !REFUSED.some(([n]) => n.test(name))) === read)
  const kinds = [...new Set(some.map(([name]) => path.extname(name)))]
  return kinds.map((kind) => [kind, some.filter(([name]) => path.extname(name) === kind)])
}

it.each(byKind(true))("%s: Pillow's very pixels, and its size in the header", async (_, some) => {
  for (const [name, e] of some) {
    const { size, sha256, rgb } = e as Extract<Expected, { size: unknown }>
    const image = await decodeImage(bytesOf(name))
    expect([image.width, image.height], name).toEqual(size)
    if (rgb === undefined) expect(createHash('sha256').update(image.data).digest('hex'), name).toBe(sha256)
    else {
      const far = Buffer.from(rgb, 'base64').map((v, i) => Math.abs(v - image.data[i]))
      expect(Math.max(...far), name).toBeLessThanOrEqual(2)
    }
    const { width, height } = await imageHeader({ root: dir, name })
    expect([width, height], name).toEqual(size)
  }
})

it.each(byKind(false))('%s: what is refused, always with the same words, whatever runs beside it', async (_, some) => {
  for (const [name, e] of some) {
    const errors = await Promise.all(Array.from({ length: 8 }, () => errorOf(() => decodeImage(bytesOf(name)))))
    expect(new Set(errors.map((x) => x.message)).size, name).toBe(1)
    const { code, message } = errors[0]
    expect(code, name).toBe('ERR_IMAGE')
    expect(message).toMatch(/^\[image\] picture: expected a picture that can be decoded(?: \([^)]*\))?, got .+$/)
    const words = REFUSED.find(([n]) => n.test(name))
    if (words) expect(message).toMatch(words[1])
    else expect(e, name).toHaveProperty('error')
  }
})

it('the kinds are all there', () => {
  const count = (read: boolean): number => byKind(read).reduce((n, [, some]) => n + some.length, 0)
  expect(count(true)).toBeGreaterThan(330)
  expect(byKind(true).map(([kind]) => kind)).toEqual(
    expect.arrayContaining(['.png', '.jpg', '.gif', '.tif', '.webp', '.bmp', '.ppm', '.avif']),
  )
})

it('what is not read is refused from the header, by name', async () => {
  const kinds = EXPECTED.filter(([name]) => /^(x|container)\./.test(name)).map(([name]) => name)
  expect(kinds.length).toBeGreaterThan(15)
  for (const name of kinds) {
    const e = await errorOf(() => imageHeader({ root: dir, name }))
    const known: Record<string, string> = {
      heic: 'HEIC \\(HEVC\\)',
      jxl: 'JPEG XL',
      jp2: 'JPEG 2000',
      j2k: 'JPEG 2000',
    }
    const extension = path.extname(name).slice(1)
    expect(e.message).toMatch(new RegExp(`got ${known[extension] ?? extension.toUpperCase()}$`))
  }
  for (const name of ['12-bit.jpg', 'lossless.jpg', 'lzma-RGB.tif', 'lab.tif', '2-bit.bmp', 'text-crc.png', '420.avif'])
    expect((await errorOf(() => imageHeader({ root: dir, name }))).code, name).toBe('ERR_IMAGE')
})

it('files that are no pictures are named', async () => {
  const named: [string, RegExp][] = [
    ['<!DOCTYPE html><html>404', /an HTML page/],
    ['\n<html lang="en">', /an HTML page/],
    ['version https://git-lfs.github.com/spec/v1\noid', /a Git LFS pointer/],
    ['<?xml version="1.0"?>\n<svg xmlns="x">', /SVG$/],
    ['{"error": "not found"}', /JSON$/],
    ['PK\x03\x04....', /zip archive/],
    ['\x1f\x8b\x08', /gzip/],
    ['\0\0\0\x20ftypisom\0\0\0\0isomiso2', /MP4 video/],
    ['\0\0\0\x18ftypmif1\0\0\0\0mif1heic', /HEIC \(HEVC\)$/],
    ['\0\0\0\x18ftypmif1\0\0\0\0mif1unci', /HEIF$/],
    ['hello', /text$/],
    ['\x05\x06\x07\0\x09', /binary data$/],
  ]
  for (const [bytes, got] of named) {
    const e = await errorOf(() => decodeImage(Buffer.from(bytes, 'latin1')))
    expect(e.message).toMatch(/^\[image\] picture: expected a picture that can be decoded \(.*\), got /)
    expect(e.message).toMatch(got)
  }
  expect(formatOf(Buffer.from('\0\0\0\x18ftypmif1\0\0\0\0mif1avif', 'latin1'))).toBe('AVIF')
})

describe('orientation', () => {
  it('EXIF turns only when asked for; TIFF always is turned', async () => {
    const plain = await decodeImage(bytesOf('exif-1.jpg'))
    for (const o of [3, 6, 8]) {
      const stored = await decodeImage(bytesOf(`exif-${o}.jpg`))
      expect(stored).toEqual(plain)
      expect(await decodeImage(bytesOf(`exif-${o}.jpg`), { exifOrientation: true })).toEqual(turned(plain, o))
      expect(await imageHeader({ root: dir, name: `exif-${o}.jpg` })).toMatchObject({ orientation: o })
      expect((await imageHeader({ root: dir, name: `orientation-${o}.tif` })).orientation).toBe(o)
    }
    for (const name of ['exif.png', 'exif.webp'])
      expect((await decodeImage(bytesOf(name), { exifOrientation: true })).width, name).toBe(plain.height)
    const [kept, asked] = [{}, { exifOrientation: true }].map((o) => decodeImage(bytesOf('orientation-6.tif'), o))
    expect(await asked).toEqual(await kept)
  })
  it('is a setting that the model keeps, and that prepared pictures follow', async () => {
    const towers = { llm: caseDir('base', 'model', 'llm'), clip: caseDir('base', 'model', 'clip') }
    const model = await AlignGPT.create({ ...towers, exifOrientation: true })
    const plain = await AlignGPT.create(towers)
    const out = tempDir()
    try {
      expect([model, plain].map((m) => m.preprocess().exifOrientation)).toEqual([true, false])
      model.save(out)
      expect(readAlignGPTConfig(out).image_exif_orientation).toBe(true)
      const cache = new ImageCache()
      const prepared = (m: AlignGPT, name: string) => {
        const task = { source: { root: dir, name }, preprocess: m.preprocess(), augmentation: null, limits: {} }
        return prepareImage(task, cache)
      }
      const upright = preprocessImage(turned(await decodeImage(bytesOf('exif-1.jpg')), 6), plain.preprocess())
      expect(await prepared(plain, 'exif-6.jpg')).toEqual(await prepared(plain, 'exif-1.jpg'))
      expect(await prepared(model, 'exif-6.jpg')).toEqual(upright)
      expect(await prepared(plain, 'exif-6.jpg')).not.toEqual(upright)
      const [asked, not] = await Promise.all([model, plain].map((m) => loadPixels(m, bytesOf('exif-6.jpg'))))
      expect(asked).toEqual(normalise(upright, model.preprocessor))
      expect(not).not.toEqual(asked)
    } finally {
      for (const m of [model, plain]) m.dispose()
      fs.rmSync(out, { recursive: true })
    }
  })
  it('turning and turning back is nothing; alpha turns with the colours', () => {
    const data = Uint8Array.from({ length: 3 * 6 }, (_, i) => i)
    const image = { data, alpha: Uint8Array.from([0, 1, 2, 3, 4, 5]), width: 3, height: 2 }
    const back = [0, 1, 2, 3, 4, 5, 8, 7, 6]
    for (let o = 1; o <= 8; o++) expect(turned(turned(image, o), back[o]), `${o}`).toEqual(image)
    expect([...(turned(image, 6).alpha as Uint8Array)]).toEqual([3, 0, 4, 1, 5, 2])
  })
})

it('damaged files of every format: a picture or an own error', async () => {
  const sources = EXPECTED.filter(
    ([name, e]) => 'size' in e && /^(rle|global|interl|plain|16|offs|4-os2|tiles)/.test(name),
  )
  const files = sources.map(([name]) => bytesOf(name)).filter((b) => FORMATS.includes(formatOf(b) as 'GIF'))
  expect(files.length).toBeGreaterThan(15)
  const flips = fc.array(fc.tuple(fc.nat(3000), fc.nat(255)), { maxLength: 5 })
  await fc.assert(
    fc.asyncProperty(fc.nat(files.length - 1), flips, fc.nat(3000), async (k, some, end) => {
      const b = Buffer.from(files[k])
      for (const [at, v] of some) b[at % b.length] = v
      const cut = end % 3 === 0 ? b.subarray(0, end % b.length) : b
      try {
        const image = await decodeImage(cut, { maxPixels: 1e6 })
        expect(image.data.length).toBe(image.width * image.height * 3)
      } catch (e) {
        expect((e as { code?: string }).code, String(e)).toBe('ERR_IMAGE')
      }
    }),
    { numRuns: 400, seed: 13 },
  )
})

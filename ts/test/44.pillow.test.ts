import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { turned } from '../src/processing/image/colours.js'
import { decodeImage, imageHeader } from '../src/processing/image/decode.js'
import { FORMATS, formatOf } from '../src/processing/image/format.js'
import { errorOf } from './data-cases.js'

const dir = path.join(import.meta.dirname, 'pictures')
/** What Pillow 12 makes of each file (scripts/parity/pictures.py). */
type Expected = { size: [number, number]; mode: string; sha256: string; rgb?: string } | { error: string }
const EXPECTED = Object.entries(
  JSON.parse(fs.readFileSync(path.join(dir, 'pictures.json'), 'utf8')) as Record<string, Expected>,
)
const bytesOf = (name: string): Buffer => fs.readFileSync(path.join(dir, name))

/** What Pillow reads and this package refuses, and with which words. Nothing else may be refused. */
const REFUSED: [RegExp, RegExp][] = [
  [/^(lzma|zstd)-.*tif$/, /a TIFF with (LZMA|Zstandard) compression$/],
  [/^(pillow-LAB|lab)\.tif$/, /a TIFF of CIELab, 3 x 8 bits$/],
  [/^bits-12\.tif$/, /a TIFF of grey, 1 x 12 bits$/],
  [/^planar-16\.tif$/, /a TIFF of RGB, 3 x 16 bits, in planes$/],
  [/^rgb-extra-1\.tif$/, /a TIFF of RGB, 4 x 8 bits \(extra 1\)$/],
  [/^orientation-9\.tif$/, /a TIFF with orientation 9$/],
  [/^(c3-8-none|idat-crc|unknown-critical)\.png$/, /a damaged or truncated PNG$/],
  [/^(420|alpha|exif|limited|cut)\.avif$/, /an AVIF with colour 4:2:0$/],
  [/^422\.avif$/, /an AVIF with colour 4:2:2$/],
  [/^animated\.avif$/, /got AVIF sequence$/],
  [/\.pfm$/, /got PFM$/],
  [/^x\.(dds|ico|pcx|qoi|sgi|tga)$/, /got (DDS|ICO|PCX|QOI|SGI|TGA)$/],
  [/^x\.(jp2|j2k)$/, /got JPEG 2000$/],
]

describe.each([...new Set(EXPECTED.map(([name]) => path.extname(name)))])('%s', (extension) => {
  const some = EXPECTED.filter(([name]) => path.extname(name) === extension)
  const read = some.filter(([name, e]) => 'size' in e && !REFUSED.some(([n]) => n.test(name)))
  const refused = some.filter((s) => !read.includes(s))

  it.runIf(read.length)(`${read.length} pictures have Pillow's very pixels, and their headers its size`, async () => {
    for (const [name, e] of read) {
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
  it.runIf(refused.length)(
    `${refused.length} are refused, each with the same words whatever runs beside it`,
    async () => {
      for (const [name, e] of refused) {
        const errors = await Promise.all(Array.from({ length: 8 }, () => errorOf(() => decodeImage(bytesOf(name)))))
        expect(new Set(errors.map((x) => x.message)).size, name).toBe(1)
        const { code, message } = errors[0]
        expect(code, name).toBe('ERR_IMAGE')
        expect(message).toMatch(/^\[image\] picture: expected a picture that can be decoded(?: \([^)]*\))?, got .+$/)
        const words = REFUSED.find(([n]) => n.test(name))
        if (words) expect(message).toMatch(words[1])
        else expect(e, name).toHaveProperty('error')
      }
    },
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
  for (const name of ['12-bit.jpg', 'lossless.jpg', 'lerc.tif', 'lab.tif', '2-bit.bmp', 'text-crc.png', '420.avif'])
    if (fs.existsSync(path.join(dir, name)))
      expect((await errorOf(() => imageHeader({ root: dir, name }))).code, name).toBe('ERR_IMAGE')
})

it('files that are no pictures are named', () => {
  const named: [string, string][] = [
    ['<!DOCTYPE html><html>404', 'HTML page'],
    ['\n<html lang="en">', 'HTML page'],
    ['version https://git-lfs.github.com/spec/v1\noid', 'Git LFS pointer'],
    ['<?xml version="1.0"?>\n<svg xmlns="x">', 'SVG'],
    ['{"error": "not found"}', 'JSON'],
    ['PK\x03\x04....', 'ZIP archive'],
    ['\x1f\x8b\x08', 'gzip'],
    ['\0\0\0\x20ftypisom\0\0\0\0isomiso2', 'MP4 or QuickTime video'],
    ['\0\0\0\x18ftypmif1\0\0\0\0mif1heic', 'HEIC (HEVC)'],
    ['\0\0\0\x18ftypmif1\0\0\0\0mif1avif', 'AVIF'],
    ['\0\0\0\x18ftypmif1\0\0\0\0mif1unci', 'HEIF'],
  ]
  for (const [bytes, name] of named) expect(formatOf(Buffer.from(bytes, 'latin1')), bytes).toBe(name)
  expect(formatOf(Buffer.from('hello'))).toBeNull()
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

import { execFileSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import sharp from 'sharp'
import { afterAll, describe, expect, it } from 'vitest'
import { openSafetensors, readEntry, readFloats, type TensorEntry } from '../src/formats/safetensors.js'
import { augment, compositeOver } from '../src/processing/image/augment.js'
import { decodeImage, loadImage, type RgbImage } from '../src/processing/image/decode.js'
import { ImageCache, type ImageTask, prepareImage } from '../src/processing/image/prepare.js'
import {
  normalise,
  normaliseInto,
  normaliseTable,
  type Preprocess,
  padColour,
  preprocessImage,
} from '../src/processing/image/preprocess.js'
import { resizeBicubic } from '../src/processing/image/resize.js'
import { readPreprocessor } from '../src/processing/preprocessor-config.js'
import { Rng } from '../src/util/rng.js'
import { CASES, caseDir, doing, errorOf, expectedOf, recordsOf, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
const outside = tempDir()
afterAll(() => {
  fs.rmSync(dir, { recursive: true })
  fs.rmSync(outside, { recursive: true })
})
const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711] } as Pick<
  Preprocess,
  'mean' | 'std'
>
const noise = (width: number, height: number, seed = 1): RgbImage => {
  const rng = new Rng(seed)
  return { width, height, data: Uint8Array.from({ length: width * height * 3 }, () => rng.int(256)) }
}

describe.each(CASES)('%s', (name) => {
  const p = readPreprocessor(caseDir(name, 'model', 'clip'))
  const { entries } = openSafetensors(caseDir(name, 'expected.safetensors'))
  const wanted = [...entries.keys()].filter((k) => k.startsWith('image.'))
  it(`decodes, pads, resizes and crops all ${wanted.length} pictures bit for bit`, async () => {
    expect(wanted.length).toBeGreaterThan(20)
    for (const key of wanted) {
      const [, file, kind] = /^image\.(.*)\.(\w+)_u8$/.exec(key) as RegExpExecArray
      const image = await loadImage({ root: caseDir(name, 'images'), name: file })
      const got = kind === 'decoded' ? image.data : preprocessImage(image, { ...p, pad: kind === 'padded' })
      expect(Buffer.compare(Buffer.from(got), readEntry(entries.get(key) as TensorEntry)), key).toBe(0)
    }
  })
  it('normalises to the very pixel values of the reference', async () => {
    const inputs = openSafetensors(caseDir(name, 'inputs.safetensors')).entries
    for (const [phase, file, pad] of [
      ['phase1', 'data_phase1.json', false],
      ['phase2', 'data_phase2.json', true],
    ] as const) {
      const want = readFloats(inputs.get(`${phase}.pixel_values`) as TensorEntry)
      const records = recordsOf(name, file)
      const images = expectedOf(name)[phase].batch_ids.flatMap((id) => records.find((r) => r.id === id)?.image ?? [])
      const n = 3 * p.crop ** 2
      expect(want.length).toBe(images.length * n)
      for (const [m, f] of images.entries()) {
        const u8 = preprocessImage(await loadImage({ root: caseDir(name, 'images'), name: f }), { ...p, pad })
        expect(normalise(u8, p), f).toEqual(want.slice(m * n, (m + 1) * n))
      }
    }
  })
})

describe('resize', () => {
  // The straightforward way: pad, resize the whole, crop.
  function plainResize(image: RgbImage, width: number, height: number): RgbImage {
    return { width, height, data: resizeBicubic(image, width, height) }
  }
  function padded(image: RgbImage, colour: readonly number[]): RgbImage {
    const side = Math.max(image.width, image.height)
    const data = new Uint8Array(side * side * 3)
    for (let i = 0; i < data.length; i++) data[i] = colour[i % 3]
    const [left, top] = [(side - image.width) >> 1, (side - image.height) >> 1]
    for (let y = 0; y < image.height; y++)
      data.set(image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3), ((top + y) * side + left) * 3)
    return { width: side, height: side, data }
  }
  it('computing only the window, with virtual padding, equals pad, resize, crop', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 40 }),
        fc.integer({ min: 1, max: 40 }),
        fc.integer({ min: 1, max: 30 }),
        fc.boolean(),
        fc.nat(5),
        (w, h, size, pad, less) => {
          const image = noise(w, h, w * 41 + h)
          const crop = Math.max(1, size - less)
          const got = preprocessImage(image, { ...CLIP, size, crop, pad })
          const full = pad ? padded(image, padColour(CLIP.mean)) : image
          const long = Math.trunc((size * Math.max(full.width, full.height)) / Math.min(full.width, full.height))
          const [nw, nh] = full.width <= full.height ? [size, long] : [long, size]
          const whole = plainResize(full, nw, nh)
          const [x, y] = [Math.floor((nw - crop) / 2), Math.floor((nh - crop) / 2)]
          for (let r = 0; r < crop; r++)
            expect(got.subarray(r * crop * 3, (r + 1) * crop * 3)).toEqual(
              whole.data.subarray(((y + r) * nw + x) * 3, ((y + r) * nw + x + crop) * 3),
            )
        },
      ),
      { numRuns: 150, seed: 11 },
    )
  })
  it('same size is the identity, one colour stays one colour', () => {
    const a = noise(13, 7)
    expect(resizeBicubic(a, 13, 7)).toEqual(a.data)
    const flat = { width: 9, height: 30, data: new Uint8Array(810).fill(201) }
    expect(new Set(resizeBicubic(flat, 17, 5))).toEqual(new Set([201]))
  })
  it('a long thin picture costs memory in proportion to its own pixels', () => {
    const thin = { width: 200_000, height: 1, data: new Uint8Array(600_000).fill(9) }
    const before = process.memoryUsage().rss
    expect(preprocessImage(thin, { ...CLIP, size: 32, crop: 32, pad: true }).length).toBe(32 * 32 * 3)
    expect(preprocessImage(thin, { ...CLIP, size: 32, crop: 32, pad: false }).length).toBe(32 * 32 * 3)
    expect(process.memoryUsage().rss - before).toBeLessThan(300e6)
  })
  it('the padding colour is the truncated mean', () => expect(padColour(CLIP.mean)).toEqual([122, 116, 104]))
  it('normalising checks the room', async () => {
    await refuses(
      () => normaliseInto(new Uint8Array(12), normaliseTable(CLIP), new Float32Array(11)),
      'ERR_SHAPE',
      /at least 12 numbers, got 11/,
    )
  })
})

describe('decoding', () => {
  const rgba = Buffer.from(Array.from({ length: 4 * 6 * 5 }, (_, i) => (i * 37) % 256))
  const raw = { raw: { width: 6, height: 5, channels: 4 as const } }
  const rgb = Uint8Array.from(rgba.filter((_, i) => i % 4 < 3))
  it('drops alpha and does not blend; gives it when asked', async () => {
    const png = await sharp(rgba, raw).png().toBuffer()
    const plain = await decodeImage(png)
    expect(Uint8Array.from(plain.data)).toEqual(rgb)
    expect(plain.alpha).toBeUndefined()
    const with4 = await decodeImage(png, { alpha: true })
    expect(with4.alpha).toEqual(Uint8Array.from(rgba.filter((_, i) => i % 4 === 3)))
  })
  it('repeats grey, reduces 16 bits by the high byte, reads webp and gif', async () => {
    const grey = Buffer.from(Array.from({ length: 30 }, (_, i) => i * 8))
    const g = await decodeImage(
      await sharp(grey, { raw: { width: 6, height: 5, channels: 1 } })
        .png()
        .toBuffer(),
    )
    expect([...g.data]).toEqual([...grey].flatMap((v) => [v, v, v]))
    const wide = Uint16Array.from({ length: 90 }, (_, i) => i * 700)
    const b = await sharp(wide, { raw: { width: 6, height: 5, channels: 3 } })
      .toColourspace('rgb16')
      .png()
      .toBuffer()
    expect((await sharp(b).metadata()).depth).toBe('ushort')
    expect([...(await decodeImage(b)).data]).toEqual([...wide].map((v) => v >> 8))
    const webp = await decodeImage(await sharp(rgba, raw).removeAlpha().webp({ lossless: true }).toBuffer())
    expect(Uint8Array.from(webp.data)).toEqual(rgb)
    expect((await decodeImage(await sharp(rgba, raw).gif().toBuffer())).data.length).toBe(90)
  })
  it('ignores EXIF orientation', async () => {
    const jpeg = await sharp(rgba, raw).removeAlpha().withMetadata({ orientation: 6 }).jpeg().toBuffer()
    const image = await decodeImage(jpeg)
    expect([image.width, image.height]).toEqual([6, 5])
  })

  const picture = caseDir('base', 'images', 'a02.jpg')
  const put = (file: string, bytes: string | Uint8Array): string =>
    doing(fs.writeFileSync(path.join(dir, file), bytes), file)
  const link = (to: string, name: string): string => doing(fs.symlinkSync(to, path.join(dir, name)), name)
  fs.copyFileSync(picture, path.join(outside, 'o.jpg'))
  const refused: [string, () => Promise<string> | string, RegExp][] = [
    ['a missing file', () => 'none.png', /none\.png: expected a file, got ENOENT/],
    ['..', () => '../x.png', /inside the image folder .*, got a path that leads outside/],
    ['.. that leads outside later', () => 'a/../../x.png', /a path that leads outside/],
    ['.. inside, of a missing file', () => 'a/../x.png', /x\.png: expected a file, got ENOENT/],
    ['.. with backslashes', () => 'a\\..\\x.png', /expected a file, got ENOENT/],
    ['an absolute path', () => '/etc/passwd', /inside the image folder/],
    ['a NUL', () => 'a\0.png', /without/],
    [
      'a symlink that leads outside',
      () => link(path.join(outside, 'o.jpg'), 'link.jpg'),
      /inside the image folder .*--follow-links/,
    ],
    ['a linked folder that leads outside', () => `${link(outside, 'sub')}/o.jpg`, /inside the image folder/],
    ['a folder', () => doing(fs.mkdirSync(path.join(dir, 'folder.png')), 'folder.png'), /regular file|EISDIR/],
    ['the root itself', () => '.', /inside the image folder/],
    ['a named pipe', () => doing(execFileSync('mkfifo', [path.join(dir, 'pipe.png')]), 'pipe.png'), /regular file/],
    ['an empty file', () => put('empty.png', ''), /an empty file/],
    ['text', () => put('text.png', 'hello'), /can be decoded/],
    ['an SVG', () => put('x.svg', '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), /got SVG/],
    ['a truncated JPEG', () => put('cut.jpg', fs.readFileSync(picture).subarray(0, 900)), /can be decoded/],
    [
      'a truncated PNG',
      () => put('cut.png', fs.readFileSync(caseDir('base', 'images', 'a08.png')).subarray(0, 1500)),
      /can be decoded/,
    ],
    ['a JPEG header alone', () => put('head.jpg', fs.readFileSync(picture).subarray(0, 30)), /can be decoded/],
    [
      'more than 50 million pixels',
      async () =>
        put(
          'big.png',
          await sharp({ create: { width: 8000, height: 6300, channels: 3, background: 'red' } })
            .png()
            .toBuffer(),
        ),
      /at most 50000000 pixels, got 8000 x 6300/,
    ],
  ]
  it.each(refused)('refuses %s', async (_, make, pattern) => {
    const name = await make()
    const e = await errorOf(() => loadImage({ root: dir, name: name }))
    expect(e.code).toBe('ERR_IMAGE')
    expect(e.message).toMatch(pattern)
  })
  it('refuses files over the size limit, takes links inside and a linked root', async () => {
    fs.copyFileSync(picture, path.join(dir, 'in.jpg'))
    fs.symlinkSync('in.jpg', path.join(dir, 'inner.jpg'))
    await refuses(
      () => loadImage({ root: dir, name: 'in.jpg' }, { maxBytes: 100 }),
      'ERR_IMAGE',
      /in\.jpg: expected at most 100 bytes/,
    )
    await refuses(() => loadImage({ root: dir, name: 'in.jpg' }, { maxPixels: 100 }), 'ERR_IMAGE', /at most 100 pixels/)
    expect((await loadImage({ root: dir, name: 'inner.jpg' })).width).toBeGreaterThan(10)
    fs.symlinkSync(dir, path.join(outside, 'root'))
    expect((await loadImage({ root: path.join(outside, 'root'), name: 'in.jpg' })).width).toBeGreaterThan(10)
  })
  it('damaged pictures: an image or an own error, never anything else', async () => {
    const sources = [picture, caseDir('base', 'images', 'a08.png')].map((f) => fs.readFileSync(f))
    await fc.assert(
      fc.asyncProperty(fc.nat(1), fc.array(fc.tuple(fc.nat(5000), fc.nat(255)), { maxLength: 6 }), async (k, flips) => {
        const b = Buffer.from(sources[k])
        for (const [at, v] of flips) b[at % b.length] = v
        try {
          const image = await decodeImage(b)
          expect(image.data.length).toBe(image.width * image.height * 3)
        } catch (e) {
          expect((e as { code?: string }).code, String(e)).toBe('ERR_IMAGE')
        }
      }),
      { numRuns: 120, seed: 12 },
    )
  })
})

describe('augmentation', () => {
  it('is a pure function of picture and stream, and changes the picture mildly', () => {
    const image = noise(20, 16)
    image.data.fill(100)
    const a = augment(image, new Rng(1, 2))
    expect(a).toEqual(augment(image, new Rng(1, 2)))
    expect(a).not.toEqual(augment(image, new Rng(1, 3)))
    expect(a.data.length).toBe(image.data.length)
    expect(Math.abs(a.data[300] - 100)).toBeLessThan(40)
  })
  it('puts a random colour behind transparency', () => {
    const image = { ...noise(4, 4), alpha: new Uint8Array(16) }
    image.alpha[5] = 255
    const over = compositeOver(image, [1, 2, 3])
    expect([...over.data.slice(0, 3)]).toEqual([1, 2, 3])
    expect(over.data.slice(15, 18)).toEqual(image.data.slice(15, 18))
    expect(new Set(augment({ ...image, alpha: new Uint8Array(16) }, new Rng(5)).data).size).toBeLessThanOrEqual(6)
  })
})

it('decoded pictures are kept while there is room, each counted once', async () => {
  const source = (name: string) => ({ root: caseDir('base', 'images'), name })
  const bytes = async (name: string): Promise<number> => (await loadImage(source(name))).data.length
  const [a, b, c] = ['a02.jpg', 'a00.png', 'a08.png']
  const cache = new ImageCache((await bytes(a)) + (await bytes(b)))
  const load = (name: string) => cache.get(name, () => loadImage(source(name)))
  const [first] = await Promise.all([load(a), load(a)])
  const second = await load(b)
  const third = await load(c)
  expect(await load(b)).toBe(second)
  expect((await load(a)).data).toEqual(first.data)
  expect(await load(a)).toBe(await load(a))
  expect(await load(c)).not.toBe(third)
})

it('a prepared picture is the same from the cache; augmented ones differ', async () => {
  const source = { root: caseDir('base', 'images'), name: 'a02.jpg' }
  const cache = new ImageCache()
  const task = (augmentation: [number, number] | null, pad: boolean): ImageTask => ({
    ...{ source, augmentation, limits: {} },
    preprocess: { ...CLIP, size: 32, crop: 32, pad },
  })
  for (const pad of [false, true]) {
    const alone = await prepareImage(task(null, pad))
    const first = await prepareImage(task(null, pad), cache)
    expect(first).toEqual(alone)
    expect(await prepareImage(task(null, pad), cache)).toBe(first)
    const [one, other] = await Promise.all([1, 2].map((n) => prepareImage(task([7, n], pad), cache)))
    expect(one).not.toEqual(other)
    expect(one).toEqual(await prepareImage(task([7, 1], pad)))
  }
})

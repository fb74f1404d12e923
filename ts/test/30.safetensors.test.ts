import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import {
  halfToFloat,
  layoutSafetensors,
  openSafetensors,
  readEntry,
  readFloats,
  type StoredDtype,
  type TensorEntry,
  type TensorToWrite,
  writeSafetensors,
} from '../src/formats/safetensors.js'
import { AlignGPTError } from '../src/util/errors.js'
import { caseDir, doing, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
let serial = 0
const fresh = (ext = 'safetensors'): string => path.join(dir, `${serial++}.${ext}`)

/** A file from a header (object or raw text) and data bytes. */
function craft(header: unknown, data = Buffer.alloc(0), length?: bigint): string {
  const body = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header))
  const n = Buffer.alloc(8)
  n.writeBigUInt64LE(length ?? BigInt(body.length))
  const file = fresh()
  fs.writeFileSync(file, Buffer.concat([n, body, data]))
  return file
}
const f32 = (shape: number[], begin: number, end: number): object => ({
  dtype: 'F32',
  shape,
  data_offsets: [begin, end],
})

describe('reading', () => {
  it('finds every tensor of a golden file by range, without reading the data', () => {
    const { entries, metadata } = openSafetensors(caseDir('base', 'model', 'llm', 'model.safetensors'))
    expect(metadata).toEqual({ format: 'pt' })
    const e = entries.get('model.embed_tokens.weight') as TensorEntry
    expect(e.shape).toEqual([520, 48])
    expect(e.dtype).toBe('F32')
    expect(e.bytes).toBe(520 * 48 * 4)
    const file = fs.readFileSync(e.path)
    expect(readEntry(e).equals(file.subarray(e.offset, e.offset + e.bytes))).toBe(true)
    expect([...entries.values()].reduce((n, x) => n + x.bytes, 0)).toBe(
      file.length - Math.min(...[...entries.values()].map((x) => x.offset)),
    )
  })

  const refused: [string, () => string, string, RegExp][] = [
    [
      'an empty file',
      () => doing(fs.writeFileSync(path.join(dir, 'e'), ''), path.join(dir, 'e')),
      'ERR_FORMAT',
      /an empty file/,
    ],
    [
      'a file of 7 bytes',
      () => doing(fs.writeFileSync(path.join(dir, 'e'), Buffer.alloc(7)), path.join(dir, 'e')),
      'ERR_FORMAT',
      /at least 8 bytes/,
    ],
    ['a missing file', () => path.join(dir, 'none'), 'ERR_FORMAT', /ENOENT/],
    ['a folder', () => dir, 'ERR_FORMAT', /EISDIR|regular file/],
    ['a huge header', () => craft('{}', Buffer.alloc(0), 100_000_001n), 'ERR_FORMAT', /at most 100000000 bytes/],
    ['a header beyond 2^63', () => craft('{}', Buffer.alloc(0), 2n ** 64n - 1n), 'ERR_FORMAT', /at most 100000000/],
    ['a header longer than the file', () => craft('{}', Buffer.alloc(0), 50n), 'ERR_FORMAT', /at least 58 bytes/],
    ['a header that is no UTF-8', () => craft(Buffer.from([0x7b, 0xff, 0x7d])), 'ERR_FORMAT', /UTF-8/],
    ['a header that is no JSON', () => craft('{"a": }'), 'ERR_FORMAT', /character 6: expected a value/],
    ['a header that is no object', () => craft('[]'), 'ERR_FORMAT', /a JSON object/],
    ['trailing garbage in the header', () => craft('{} x'), 'ERR_FORMAT', /the end of the text/],
    ['a deeply nested header', () => craft(`${'{"a":'.repeat(5000)}1${'}'.repeat(5000)}`), 'ERR_FORMAT', /nested/],
    [
      'a name twice',
      () =>
        craft(
          '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
          Buffer.alloc(4),
        ),
      'ERR_FORMAT',
      /twice/,
    ],
    [
      'an unknown dtype',
      () => craft({ a: { dtype: 'F31', shape: [], data_offsets: [0, 4] } }, Buffer.alloc(4)),
      'ERR_DTYPE',
      /"a" dtype.*F31/,
    ],
    [
      'a dtype of Object',
      () => craft({ a: { dtype: 'toString', shape: [], data_offsets: [0, 4] } }, Buffer.alloc(4)),
      'ERR_DTYPE',
      /toString/,
    ],
    ['a negative size', () => craft({ a: f32([-1], 0, 4) }, Buffer.alloc(4)), 'ERR_FORMAT', /array of sizes/],
    ['a fractional size', () => craft({ a: f32([0.5], 0, 2) }, Buffer.alloc(2)), 'ERR_FORMAT', /array of sizes/],
    ['an overflowing shape', () => craft({ a: f32([2 ** 40, 2 ** 40], 0, 4) }, Buffer.alloc(4)), 'ERR_SHAPE', /2\^53/],
    ['an overflow behind a zero', () => craft({ a: f32([0, 2 ** 40, 2 ** 40], 0, 0) }), 'ERR_SHAPE', /2\^53/],
    ['shape * dtype != bytes', () => craft({ a: f32([2], 0, 4) }, Buffer.alloc(4)), 'ERR_SHAPE', /8 bytes for F32/],
    ['reversed offsets', () => craft({ a: f32([1], 4, 0) }, Buffer.alloc(4)), 'ERR_SHAPE', /data_offsets/],
    [
      'offsets that are no numbers',
      () => craft({ a: { dtype: 'F32', shape: [1], data_offsets: ['0', 4] } }, Buffer.alloc(4)),
      'ERR_FORMAT',
      /byte offsets/,
    ],
    ['a foreign key', () => craft({ a: { ...f32([1], 0, 4), x: 1 } }, Buffer.alloc(4)), 'ERR_FORMAT', /the keys dtype/],
    ['an entry that is no object', () => craft({ a: null }), 'ERR_FORMAT', /an object/],
    ['overlap', () => craft({ a: f32([2], 0, 8), b: f32([1], 4, 8) }, Buffer.alloc(8)), 'ERR_FORMAT', /overlap/],
    ['a hole', () => craft({ a: f32([1], 0, 4), b: f32([1], 8, 12) }, Buffer.alloc(12)), 'ERR_FORMAT', /hole/],
    ['a file that is too short', () => craft({ a: f32([2], 0, 8) }, Buffer.alloc(7)), 'ERR_FORMAT', /too short/],
    ['bytes nobody owns', () => craft({ a: f32([1], 0, 4) }, Buffer.alloc(5)), 'ERR_FORMAT', /no tensor owns/],
    ['metadata that is no object', () => craft({ __metadata__: 3 }), 'ERR_FORMAT', /__metadata__/],
    ['metadata that is no string', () => craft({ __metadata__: { a: 1 } }), 'ERR_FORMAT', /a string/],
  ]
  it.each(refused)('refuses %s', async (_, make, code, pattern) => {
    const file = make()
    await refuses(() => openSafetensors(file), code, pattern)
  })

  it('takes scalars, empty tensors and odd names', () => {
    const file = craft(
      '{"__proto__":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"":{"dtype":"U8","shape":[0,7],"data_offsets":[4,4]}}',
      Buffer.alloc(4),
    )
    expect([...openSafetensors(file).entries.keys()].sort()).toEqual(['', '__proto__'])
  })

  it('survives byte flips and truncations with its own errors only', () => {
    const file = fresh()
    writeSafetensors(file, [
      { name: 'a', dtype: 'F32', shape: [2, 3], data: new Uint8Array(24) },
      { name: 'b', dtype: 'BF16', shape: [5], data: new Uint8Array(10) },
    ])
    const bytes = fs.readFileSync(file)
    const broken = fresh()
    let refusals = 0
    const run = (b: Uint8Array): void => {
      fs.writeFileSync(broken, b)
      try {
        for (const e of openSafetensors(broken).entries.values()) readEntry(e)
      } catch (e) {
        expect(e).toBeInstanceOf(AlignGPTError)
        refusals++
      }
    }
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.nat(bytes.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 }),
        fc.nat(bytes.length),
        (flips, cut) => {
          const b = Buffer.from(bytes)
          for (const [at, v] of flips) b[at] = v
          run(b)
          run(bytes.subarray(0, cut))
        },
      ),
      { numRuns: 600, seed: 1 },
    )
    expect(refusals).toBeGreaterThan(600)
  })
})

describe('writing', () => {
  it('round-trips any list of tensors, aligned, and official readers find the order they want', () => {
    const dtypes: StoredDtype[] = ['F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'U8', 'BOOL']
    const widths: Record<string, number> = { F64: 8, I64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, U8: 1, BOOL: 1 }
    const tensor = fc.record({
      name: fc.string(),
      dtype: fc.constantFrom(...dtypes),
      shape: fc.array(fc.nat(4), { maxLength: 3 }),
      seed: fc.nat(255),
    })
    fc.assert(
      fc.property(
        fc.uniqueArray(tensor, { selector: (t) => t.name, maxLength: 8 }),
        fc.dictionary(fc.string(), fc.string()),
        (list, metadata) => {
          const named = list.filter((t) => t.name !== '__metadata__')
          const data = named.map((t) =>
            new Uint8Array(t.shape.reduce((a, b) => a * b, 1) * widths[t.dtype]).fill(t.seed),
          )
          const file = fresh()
          const items: TensorToWrite[] = named.map(({ name, dtype, shape }, i) => ({
            name,
            dtype,
            shape,
            data: i % 2 ? data[i] : () => data[i],
          }))
          writeSafetensors(file, items, metadata)
          const back = openSafetensors(file)
          expect({ ...back.metadata }).toEqual({ ...metadata })
          expect(back.entries.size).toBe(named.length)
          named.forEach((t, i) => {
            const e = back.entries.get(t.name) as TensorEntry
            expect([e.dtype, e.shape]).toEqual([t.dtype, t.shape])
            expect(e.offset % widths[t.dtype]).toBe(0)
            expect(readEntry(e).equals(Buffer.from(data[i]))).toBe(true)
          })
          fs.rmSync(file)
        },
      ),
      { numRuns: 100, seed: 2 },
    )
  })

  it('lets a source write itself', () => {
    const file = fresh()
    const data = Buffer.from('12345678')
    const write = (p: string, at: number): void => {
      const fd = fs.openSync(p, 'r+')
      fs.writeSync(fd, data, 0, 8, at)
      fs.closeSync(fd)
    }
    writeSafetensors(file, [{ name: 'x', dtype: 'F32', shape: [2], write }])
    expect(readEntry(openSafetensors(file).entries.get('x') as TensorEntry).toString()).toBe('12345678')
    expect(layoutSafetensors([{ name: 'x', dtype: 'F32', shape: [2], write }]).size).toBe(fs.statSync(file).size)
  })

  it('leaves the old file and no rest when it fails', async () => {
    const folder = tempDir()
    const file = path.join(folder, 'm.safetensors')
    writeSafetensors(file, [{ name: 'x', dtype: 'U8', shape: [1], data: Uint8Array.of(7) }])
    const one: TensorToWrite = { name: 'x', dtype: 'U8', shape: [2], data: new Uint8Array(3) }
    await refuses(() => writeSafetensors(file, [one]), 'ERR_SHAPE', /x: expected 2 bytes, got 3/)
    await refuses(() => writeSafetensors(file, [{ ...one, data: new Uint8Array(2) }, one]), 'ERR_ARGUMENT', /distinct/)
    await refuses(() => writeSafetensors(file, [{ ...one, dtype: 'X' as StoredDtype }]), 'ERR_DTYPE', /known dtype/)
    await refuses(() => writeSafetensors(file, [{ ...one, shape: [-1] }]), 'ERR_SHAPE', /sizes/)
    const boom = (): Uint8Array => {
      throw new AlignGPTError('ERR_DATA', '[x] y: expected z, got boom')
    }
    await refuses(() => writeSafetensors(file, [{ ...one, data: boom }]), 'ERR_DATA', /boom/)
    expect(fs.readdirSync(folder)).toEqual(['m.safetensors'])
    expect(readEntry(openSafetensors(file).entries.get('x') as TensorEntry)[0]).toBe(7)
    fs.rmSync(folder, { recursive: true })
  })
})

describe('checkpoints', () => {
  it('converts halves', () => {
    expect([0x3c00, 0xc000, 0x0001, 0x7c00, 0xfbff, 0x8000].map(halfToFloat)).toEqual([
      1,
      -2,
      2 ** -24,
      Number.POSITIVE_INFINITY,
      -65504,
      -0,
    ])
    expect(halfToFloat(0x7e00)).toBeNaN()
  })

  const values = (folder: string): Map<string, Float32Array> =>
    new Map(
      [...openCheckpoint(folder)]
        .filter(([n, e]) => /F/.test(e.dtype) && !n.endsWith('inv_freq'))
        .map(([n, e]): [string, Float32Array] => [n, readFloats(e)])
        .sort(([a], [b]) => (a < b ? -1 : 1)),
    )
  it.each([
    ['gqa', 'aligngpt', 'aligngpt_sharded'],
    ['wide', 'aligngpt', 'aligngpt_bin'],
    ['wide', 'clip', 'clip_bin'],
  ])('%s: %s and %s hold the same weights', (name, a, b) => {
    const [x, y] = [values(caseDir(name, 'model', a)), values(caseDir(name, 'model', b))]
    expect(x.size).toBeGreaterThan(20)
    expect([...y.keys()]).toEqual([...x.keys()])
    for (const [k, v] of x) expect(y.get(k), k).toEqual(v)
  })
  it.each(['base', 'gqa', 'wide'])('%s: llm/ (F32, F16, BF16) holds the language model of aligngpt/', (name) => {
    const [x, y] = [values(caseDir(name, 'model', 'llm')), values(caseDir(name, 'model', 'aligngpt'))]
    expect(x.size).toBeGreaterThan(10)
    for (const [k, v] of x) expect(y.get(k), k).toEqual(v)
  })
  it('opens one file or an index given directly', () => {
    const a = openCheckpoint(caseDir('gqa', 'model', 'aligngpt_sharded', 'model.safetensors.index.json'))
    expect(a.size).toBe(openCheckpoint(caseDir('gqa', 'model', 'aligngpt_sharded')).size)
    expect(openCheckpoint(caseDir('base', 'mm_projector_align.bin')).size).toBe(5)
    expect(openCheckpoint(caseDir('base', 'model', 'llm', 'model.safetensors')).size).toBeGreaterThan(10)
  })
  it('refuses broken folders by name', async () => {
    const folder = tempDir()
    const index = path.join(folder, 'model.safetensors.index.json')
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /model.safetensors or .*none of them/)
    await refuses(() => openCheckpoint(path.join(folder, 'no')), 'ERR_FORMAT', /no such folder/)
    const put = (map: unknown): void => fs.writeFileSync(index, JSON.stringify({ weight_map: map }))
    put({ a: '../x.safetensors' })
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /in the same folder/)
    put({ a: 's1.safetensors' })
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /its 1 files, got none called s1.safetensors/)
    writeSafetensors(path.join(folder, 's1.safetensors'), [
      { name: 'b', dtype: 'U8', shape: [], data: new Uint8Array(1) },
    ])
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /"a": expected a tensor in s1/)
    writeSafetensors(path.join(folder, 's2.safetensors'), [
      { name: 'b', dtype: 'U8', shape: [], data: new Uint8Array(1) },
    ])
    writeSafetensors(
      path.join(folder, 's1.safetensors'),
      ['a', 'b'].map((name) => ({ name, dtype: 'U8' as const, shape: [], data: new Uint8Array(1) })),
    )
    put({ a: 's1.safetensors', b: 's2.safetensors' })
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /one shard, got two/)
    fs.writeFileSync(index, '{"weight_map": ')
    await refuses(() => openCheckpoint(folder), 'ERR_FORMAT', /at byte 15/)
    fs.rmSync(folder, { recursive: true })
  })
})

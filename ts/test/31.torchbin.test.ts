import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from '../src/formats/checkpoint-files.js'
import { readFloats, type TensorEntry } from '../src/formats/safetensors.js'
import { openTorchBin } from '../src/formats/torchbin.js'
import { AlignGPTError } from '../src/util/errors.js'
import { caseDir, doing, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
const target = path.join(dir, 'x.bin')

/** A stored zip of the given files. */
function zip(files: Record<string, Buffer>, method = 0): string {
  const [parts, central]: Buffer[][] = [[], []]
  let at = 0
  for (const [name, data] of Object.entries(files)) {
    const local = Buffer.alloc(30)
    local.writeUInt32LE(0x04034b50)
    local.writeUInt16LE(name.length, 26)
    const head = Buffer.alloc(46)
    head.writeUInt32LE(0x02014b50)
    head.writeUInt16LE(method, 10)
    head.writeUInt32LE(data.length, 20)
    head.writeUInt32LE(data.length, 24)
    head.writeUInt16LE(name.length, 28)
    head.writeUInt32LE(at, 42)
    parts.push(local, Buffer.from(name), data)
    central.push(head, Buffer.from(name))
    at += 30 + name.length + data.length
  }
  const dirBytes = Buffer.concat(central)
  const end = Buffer.alloc(22)
  end.writeUInt32LE(0x06054b50)
  end.writeUInt16LE(Object.keys(files).length, 10)
  end.writeUInt32LE(dirBytes.length, 12)
  end.writeUInt32LE(at, 16)
  fs.writeFileSync(target, Buffer.concat([...parts, dirBytes, end]))
  return target
}

// A few pickle instructions by hand.
const str = (s: string): string => `\x8c${String.fromCharCode(s.length)}${s}`
const int = (n: number): string => `J${Buffer.from(Int32Array.of(n).buffer).toString('latin1')}`
const glob = (m: string, n: string): string => `c${m}\n${n}\n`
const storage = (type: string, key: string, n: number): string =>
  `(${str('storage')}${glob('torch', type)}${str(key)}${str('cpu')}${int(n)}tQ`
const tuple = (xs: number[]): string => `(${xs.map(int).join('')}t`
const tensor = (s: string, start: number, shape: number[], stride: number[]): string =>
  `${glob('torch._utils', '_rebuild_tensor_v2')}(${s}${int(start)}${tuple(shape)}${tuple(stride)}\x89${glob('collections', 'OrderedDict')})RtR`
const dict = (entries: Record<string, string>): string =>
  `\x80\x02}(${Object.entries(entries)
    .map(([k, v]) => str(k) + v)
    .join('')}u.`
const floats = Buffer.from(Float32Array.of(0, 1, 2, 3, 4, 5).buffer)
const bin = (pickle: string, files: Record<string, Buffer> = { 'a/data/0': floats }): string =>
  zip({ 'a/data.pkl': Buffer.from(pickle, 'latin1'), ...files })

describe('a whitelisting reader', () => {
  it('reads what the official code leaves after pre-training', () => {
    for (const name of ['base', 'gqa', 'wide']) {
      const bins = openTorchBin(caseDir(name, 'mm_projector_align.bin'))
      const whole = openCheckpoint(caseDir(name, 'model', 'aligngpt'))
      expect(bins.has('align_indicators.indicator_embs')).toBe(true)
      for (const [k, e] of bins) expect(readFloats(e), k).toEqual(readFloats(whole.get(k) as TensorEntry))
    }
  })

  it('reads views, parameters, long strings of dictionaries and state_dict metadata', () => {
    const s = storage('FloatStorage', '0', 6)
    const parameter = `${glob('torch._utils', '_rebuild_parameter')}(${tensor(s, 0, [6], [1])}\x88${glob('collections', 'OrderedDict')})RtR`
    const od = `\x80\x02${glob('collections', 'OrderedDict')})R(${str('v')}${tensor(s, 2, [2, 2], [2, 1])}${str('p')}${parameter}${str('step')}${int(3)}u}${str('_metadata')}}sb.`
    const got = openTorchBin(bin(od))
    expect([...got.keys()]).toEqual(['v', 'p'])
    expect([...readFloats(got.get('v') as TensorEntry)]).toEqual([2, 3, 4, 5])
    expect(got.get('p')?.shape).toEqual([6])
    expect(
      openTorchBin(bin(dict({ e: tensor(s, 0, [0, 3], [9, 9]), one: tensor(s, 5, [1, 1], [7, 3]) }))).get('one')?.bytes,
    ).toBe(4)
  })

  it('reads the state dict in what a trainer saved, and nothing else that is nested', async () => {
    const inner = (name: string): string => `}(${str(name)}${tensor(storage('FloatStorage', '0', 6), 0, [6], [1])}u`
    for (const key of ['state_dict', 'model', 'module'])
      expect([...openTorchBin(bin(dict({ [key]: inner('w'), step: int(3), optimizer: inner('m') }))).keys()]).toEqual([
        'w',
      ])
    const beside = tensor(storage('FloatStorage', '0', 6), 0, [6], [1])
    for (const more of [{ x: beside }, { state_dict: inner('v') }] as Record<string, string>[])
      await refuses(
        () => openTorchBin(bin(dict({ model: inner('w'), ...more }))),
        'ERR_FORMAT',
        /a tensor, got a dictionary/,
      )
  })

  const s6 = storage('FloatStorage', '0', 6)
  const refused: [string, () => string, RegExp][] = [
    [
      'os.system',
      () => bin(`\x80\x02${glob('os', 'system')}${str('true')}\x85R.`),
      /names a state dict needs, got "os system"/,
    ],
    [
      'builtins.eval through STACK_GLOBAL',
      () => bin(`\x80\x04${str('builtins')}${str('eval')}\x93.`),
      /"builtins eval"/,
    ],
    ['a name like a whitelisted one', () => bin(`\x80\x02${glob('torch', 'FloatStorage\u0000')}.`), /state dict needs/],
    ['torch.load', () => bin(`\x80\x02${glob('torch', 'load')}.`), /"torch load"/],
    ['INST', () => bin('\x80\x02(ios\nsystem\n.'), /opcode 0x69/],
    ['OBJ', () => bin('\x80\x02(o.'), /opcode 0x6f/],
    ['NEWOBJ', () => bin('\x80\x02\x81.'), /opcode 0x81/],
    ['EXT1', () => bin('\x80\x02\x82\x01.'), /opcode 0x82/],
    ['PERSID', () => bin('\x80\x02Pxyz\n.'), /opcode 0x50/],
    ['BUILD of a foreign object', () => bin(`\x80\x02${glob('torch', 'FloatStorage')}}b.`), /BUILD/],
    ['calling a storage type', () => bin(`\x80\x02${glob('torch', 'FloatStorage')})R.`), /plain tensor/],
    ['protocol 9', () => bin('\x80\x09}.'), /protocol 2 to 5/],
    ['an unfinished pickle', () => bin('\x80\x02}'), /more bytes/],
    ['an empty stack', () => bin('\x80\x02.'), /value on the stack/],
    ['no mark', () => bin('\x80\x02}u.'), /a mark/],
    ['a missing memo', () => bin('\x80\x02h\x05.'), /value 5 of the memo/],
    ['a list', () => bin('\x80\x02].'), /a dictionary of tensors/],
    ['a nested dictionary', () => bin(dict({ state: '}' })), /"state": expected a tensor, got a dictionary/],
    ['a number as key', () => bin(`\x80\x02}${int(1)}${int(2)}s.`), /key: expected a string/],
    [
      'a storage that is not there',
      () => bin(dict({ x: tensor(storage('FloatStorage', '7', 6), 0, [6], [1]) })),
      /storage data\/7/,
    ],
    [
      'a storage that is too small',
      () => bin(dict({ x: tensor(storage('FloatStorage', '0', 7), 0, [6], [1]) })),
      /28 bytes, got 24/,
    ],
    ['a view outside its storage', () => bin(dict({ x: tensor(s6, 1, [6], [1]) })), /at most 6 elements, got 1\+6/],
    [
      'a transposed tensor',
      () => bin(dict({ x: tensor(s6, 0, [2, 3], [1, 2]) })),
      /"x": expected contiguous strides for \[2,3\] \(convert with: .*\), got \[1,2\]/,
    ],
    ['an expanded tensor', () => bin(dict({ x: tensor(s6, 0, [2, 3], [0, 1]) })), /contiguous/],
    ['a negative size', () => bin(dict({ x: tensor(s6, 0, [-1], [1]) })), /plain tensor/],
    [
      'a huge shape',
      () => bin(dict({ x: tensor(s6, 0, [2 ** 30, 2 ** 30, 2 ** 30], [2 ** 30, 2 ** 30, 1]) })),
      /contiguous|2\^53/,
    ],
    ['a complex storage', () => bin(dict({ x: storage('ComplexFloatStorage', '0', 3) })), /ComplexFloatStorage/],
    ['a deflated entry', () => zip({ 'a/data.pkl': Buffer.from('}.') }, 8), /stored, not packed/],
    ['a zip without pickle', () => zip({ 'a/b': Buffer.from('x') }), /data\.pkl/],
    ['big endian', () => bin('\x80\x02}.', { 'a/byteorder': Buffer.from('big') }), /little/],
    [
      'a legacy file',
      () => doing(fs.writeFileSync(target, Buffer.from('\x80\x02\x8a\nlf', 'latin1')), target),
      /convert with: python/,
    ],
    ['a text file', () => doing(fs.writeFileSync(target, 'hello world'), target), /no zip file/],
    ['an empty file', () => doing(fs.writeFileSync(target, ''), target), /an empty file/],
  ]
  it.each(refused)('refuses %s', async (_, make, pattern) => {
    const file = make()
    await refuses(() => openTorchBin(file), 'ERR_FORMAT', pattern)
  })

  it('survives byte flips and truncations with its own errors only', () => {
    const bytes = fs.readFileSync(caseDir('gqa', 'mm_projector_align.bin'))
    const pickleEnd = 2000
    let refusals = 0
    const run = (b: Uint8Array): void => {
      fs.writeFileSync(target, b)
      try {
        for (const e of openTorchBin(target).values()) expect(e.offset + e.bytes).toBeLessThanOrEqual(b.length)
      } catch (e) {
        expect(e, String(e)).toBeInstanceOf(AlignGPTError)
        refusals++
      }
    }
    const position = fc.oneof(
      fc.nat(pickleEnd),
      fc.nat(bytes.length - 1),
      fc.nat(600).map((n) => bytes.length - 1 - n),
    )
    fc.assert(
      fc.property(
        fc.array(fc.tuple(position, fc.nat(255)), { minLength: 1, maxLength: 5 }),
        fc.nat(bytes.length - 1),
        (flips, cut) => {
          const b = Buffer.from(bytes)
          for (const [at, v] of flips) b[at] = v
          run(b)
          run(bytes.subarray(0, cut))
        },
      ),
      { numRuns: 800, seed: 3 },
    )
    expect(refusals).toBeGreaterThan(800)
  })

  it('survives random pickles', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), (pickle) => {
        try {
          openTorchBin(bin(Buffer.concat([Buffer.from('\x80\x02', 'latin1'), pickle]).toString('latin1')))
        } catch (e) {
          expect(e, String(e)).toBeInstanceOf(AlignGPTError)
        }
      }),
      { numRuns: 500, seed: 4 },
    )
  })
})

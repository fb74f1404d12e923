/** Every reader of other people's bytes, with valid inputs to start from. */
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parquetWriteBuffer } from 'hyparquet-writer'
import sharp from 'sharp'
import { readConfig, resolveSettings } from '../../../ts/src/cli/settings.js'
import { tensor } from '../../../ts/src/core/tensor.js'
import { loadArrays, saveArrays } from '../../../ts/src/formats/index-cache.js'
import { unpackParquet } from '../../../ts/src/formats/parquet.js'
import { parseBytes, readRecord, splitRecords } from '../../../ts/src/formats/record-file.js'
import { openSafetensors, readEntry } from '../../../ts/src/formats/safetensors.js'
import { fromSentencePiece } from '../../../ts/src/formats/sentencepiece.js'
import { TarWriter, tarEntries } from '../../../ts/src/formats/tar.js'
import { openTorchBin } from '../../../ts/src/formats/torchbin.js'
import { parseAlignGPTConfig } from '../../../ts/src/models/config/aligngpt.js'
import { parseClipConfig } from '../../../ts/src/models/config/clip.js'
import { readGenerationConfig } from '../../../ts/src/models/config/generation.js'
import { parseLlamaConfig } from '../../../ts/src/models/config/llama.js'
import { readAdapterConfig } from '../../../ts/src/models/config/peft.js'
import { decodeImage, imageHeader } from '../../../ts/src/processing/image/decode.js'
import { openImages } from '../../../ts/src/processing/image/source.js'
import { parsePreprocessorConfig } from '../../../ts/src/processing/preprocessor-config.js'
import { Tokenizer } from '../../../ts/src/processing/tokenizer.js'
import { readCheckpoint, verifyCheckpoint, writeCheckpoint } from '../../../ts/src/train/checkpoint.js'
import { AlignGPTError } from '../../../ts/src/util/errors.js'
import { readJsonFile } from '../../../ts/src/util/json.js'

export interface Reader {
  /** valid inputs: bytes, or values that become JSON */
  seeds: Buffer[]
  values?: unknown[]
  /** what may stand in an input */
  words?: string[]
  /** name of the file that the input is written to first; none: only the bytes are read */
  file?: string
  /** how many inputs the recorded run is to have */
  target: number
  /** reads one input, whole */
  read(bytes: Buffer, file: string): unknown
}

const base = fileURLToPath(new URL('../../../ts/test/golden/base/', import.meta.url))
const golden = (name: string): Buffer => fs.readFileSync(path.join(base, name))
const json = (name: string): Record<string, unknown> => JSON.parse(golden(name).toString())
const MILLION = 1_000_000
const text = (value: unknown): Buffer => Buffer.from(JSON.stringify(value))

/** A reader of parsed JSON: the input is its text. */
const ofValues = (values: unknown[], use: (value: never, file: string) => unknown): Reader => ({
  seeds: values.map(text),
  values,
  target: MILLION,
  read: (bytes) => {
    let value: unknown
    try {
      value = JSON.parse(bytes.toString())
    } catch {
      return
    }
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) use(value as never, 'config.json')
  },
})

/** The head of a header and the first data of a large file: what is fuzzed is the structure. */
function smallSafetensors(folder: string): Buffer[] {
  const file = path.join(folder, 'seed.safetensors')
  const header = (o: object, data: number): Buffer => {
    const t = text(o)
    const front = Buffer.alloc(8)
    front.writeBigUInt64LE(BigInt(t.length))
    return Buffer.concat([front, t, Buffer.alloc(data)])
  }
  const one = { dtype: 'F32', shape: [2, 2], data_offsets: [0, 16] }
  const two = { dtype: 'BF16', shape: [3], data_offsets: [16, 22] }
  const made = [
    header({ __metadata__: { format: 'pt' }, a: one, b: two }, 22),
    header({}, 0),
    header({ a: { dtype: 'I64', shape: [], data_offsets: [0, 8] } }, 8),
  ]
  fs.rmSync(file, { force: true })
  return made
}

function tokenizerReader(values: unknown[]): Reader {
  return ofValues(values, (value) => {
    const t = new Tokenizer(value as Record<string, unknown>)
    const ids = t.encode('A photo of two  cats, İstanbul 猫 🙂\n<image> </s>')
    t.decode(ids)
  })
}

/** A tokenizer.json with few pieces: one with thousands takes its time to be written as text. */
function smallTokenizer(name: string): unknown {
  const d = json(name) as { model: { vocab: Record<string, number>; merges: unknown[] } }
  const kept = Object.entries(d.model.vocab).slice(0, 300)
  const known = new Set(kept.map(([piece]) => piece))
  const merges = d.model.merges.filter((m) => {
    const [a, b] = Array.isArray(m) ? m : String(m).split(' ')
    return known.has(a) && known.has(b) && known.has(a + b)
  })
  return { ...d, model: { ...d.model, vocab: Object.fromEntries(kept), merges: merges.slice(0, 100) } }
}

function tarSeeds(folder: string): Buffer[] {
  const file = path.join(folder, 'seed.tar')
  const fd = fs.openSync(file, 'w')
  const writer = new TarWriter(fd)
  writer.add('a.txt', Buffer.from('hello'))
  writer.add('folder/b.json', Buffer.from('{"a":1}'))
  writer.end()
  fs.closeSync(fd)
  const plain = fs.readFileSync(file)
  const member = (name: string, type: string, content: string, link = ''): Buffer => {
    const h = Buffer.alloc(512)
    h.write(name, 0)
    h.write('0000644\0', 100)
    h.write(`${content.length.toString(8).padStart(11, '0')}\0`, 124)
    h.write('        ', 148)
    h.write(type, 156)
    h.write(link, 157)
    h.write('ustar\x0000', 257)
    h.write(
      `${[...h]
        .reduce((a, b) => a + b, 0)
        .toString(8)
        .padStart(6, '0')}\0 `,
      148,
    )
    const data = Buffer.alloc(Math.ceil(content.length / 512) * 512)
    data.write(content)
    return Buffer.concat([h, data])
  }
  const end = Buffer.alloc(1024)
  const pax = Buffer.concat([member('p', 'x', '17 path=long/name\n'), member('x', '0', 'abc'), end])
  const gnu = Buffer.concat([member('././@LongLink', 'L', 'long/long\0'), member('x', '0', 'abc'), end])
  const links = Buffer.concat([member('x', '0', 'abc'), member('y', '2', '', 'x'), member('z', '1', '', './x'), end])
  fs.rmSync(file)
  return [plain, pax, gnu, links]
}

/** The checksum of a changed header is mended in half of the inputs, so that what is behind it is reached. */
function mendTar(b: Buffer): void {
  if (b.length % 2) return
  for (let at = 0; at + 512 <= b.length && at < 4096; at += 512) {
    if (b.toString('latin1', at + 257, at + 262) !== 'ustar') continue
    b.fill(32, at + 148, at + 156)
    let sum = 0
    for (let i = at; i < at + 512; i++) sum += b[i]
    b.write(`${sum.toString(8).padStart(6, '0')}\0 `, at + 148)
  }
}

function parquetSeeds(): Buffer[] {
  const png = golden('images/a00.png')
  const make = (codec: 'UNCOMPRESSED' | 'SNAPPY'): Buffer =>
    Buffer.from(
      parquetWriteBuffer({
        codec,
        columnData: [
          { name: 'id', data: ['a', 'b'], type: 'STRING' },
          { name: 'caption', data: ['one', 'two'], type: 'STRING' },
          { name: 'image', data: [png.subarray(0, 64), png.subarray(0, 64)], type: 'BYTE_ARRAY' },
        ],
      }),
    )
  return [make('UNCOMPRESSED'), make('SNAPPY')]
}

const RECORDS = [
  {
    id: 1,
    image: 'a.png',
    conversations: [
      { from: 'human', value: '<image>\nWhat?' },
      { from: 'gpt', value: 'A cat.' },
    ],
  },
  {
    id: 'x',
    messages: [
      { role: 'user', content: [{ type: 'text', text: 'Hé 🙂' }] },
      { role: 'assistant', content: 'b' },
    ],
  },
  { image: { bytes: 'iVBOR', path: null }, caption: 'c', similarity: 3 },
  { question: 'q', answer: 'a', images: ['b.png'], id: 12345678901234567890n.toString() },
]

async function readRecords(file: string): Promise<void> {
  const parts: [Buffer, number][] = []
  await splitRecords(file, (record, at) => parts.push([Buffer.from(record), at]))
  for (const [i, [record, at]] of parts.entries()) readRecord(parseBytes(record, file, at), i)
}

/** A BMP and a PNM as other programs write them; sharp writes neither. */
function plainPictures(): { bmp: Buffer[]; pnm: Buffer[] } {
  const bmp = Buffer.alloc(54 + 8 * 4 * 3)
  bmp.write('BM')
  bmp.writeUInt32LE(bmp.length, 2)
  bmp.writeUInt32LE(54, 10)
  bmp.writeUInt32LE(40, 14)
  bmp.writeInt32LE(8, 18)
  bmp.writeInt32LE(4, 22)
  bmp.writeUInt16LE(1, 26)
  bmp.writeUInt16LE(24, 28)
  const palette = Buffer.concat([bmp.subarray(0, 54), Buffer.alloc(1024), Buffer.from([8, 1, 0, 0, 8, 2, 0, 1])])
  palette.writeUInt32LE(54 + 1024, 10)
  palette.writeUInt16LE(8, 28)
  palette.writeUInt32LE(1, 30)
  const pnm = ['P6 4 2 255\n', 'P5\n# c\n4 2\n65535\n', 'P3 2 1 255 1 2 3 4 5 6', 'P1 4 1 1010', 'P4 8 2\n']
  return { bmp: [bmp, palette], pnm: pnm.map((t) => Buffer.concat([Buffer.from(t), Buffer.alloc(24, 77)])) }
}

async function pictureReaders(): Promise<Record<string, Reader>> {
  const image = sharp(golden('images/a00.png')).resize(24, 16)
  const grey = image.clone().greyscale()
  const reader = (seeds: Buffer[]): Reader => ({
    seeds,
    file: 'picture',
    target: 100_000,
    read: async (bytes, file) => {
      await imageHeader({ name: 'picture', file, offset: 0, bytes: bytes.length }).catch((e) => {
        if (!(e instanceof AlignGPTError)) throw e
      })
      await decodeImage(bytes)
    },
  })
  const { bmp, pnm } = plainPictures()
  return {
    png: reader([await image.png().toBuffer(), await grey.png({ palette: true }).toBuffer()]),
    jpeg: reader([await image.jpeg().toBuffer(), await image.jpeg({ progressive: true }).toBuffer()]),
    gif: reader([await image.gif().toBuffer()]),
    tiff: reader([await image.tiff().toBuffer(), await image.tiff({ compression: 'lzw', tile: true }).toBuffer()]),
    webp: reader([await image.webp().toBuffer(), await image.webp({ lossless: true }).toBuffer()]),
    avif: reader([await image.avif({ effort: 0 }).toBuffer()]),
    bmp: reader(bmp),
    pnm: reader(pnm),
  }
}

/** A whole checkpoint of two small tensors; each input is one of its three files. */
function checkpointReaders(folder: string): Record<string, Reader> {
  const w = tensor(new Float32Array(6), [2, 3]).persist()
  const state = { file: 'weights' as const, name: 'w', tensor: w }
  const stored = { file: 'weights' as const, name: 'w', dtype: 'F32' as const, shape: w.shape, handle: w.h }
  const maker = { version: '0', build: 'b', level: 'c' }
  writeCheckpoint(folder, { step: 1, config: { seed: 1 }, state: {}, maker } as never, [stored], 1)
  const step = path.join(folder, 'step-1')
  const at = (name: string): Buffer => fs.readFileSync(path.join(step, name))
  return {
    manifest: {
      seeds: [at('manifest.json')],
      file: 'checkpoints/step-1/manifest.json',
      target: 100_000,
      read: () => verifyCheckpoint(step),
    },
    checkpoint: {
      seeds: [at('weights.safetensors')],
      file: 'checkpoints/step-1/weights.safetensors',
      target: 100_000,
      read: () => readCheckpoint(step, [state]),
    },
  }
}

function configReaders(): Record<string, Reader> {
  const lora = { peft_type: 'LORA', r: 8, lora_alpha: 16, target_modules: ['q_proj', 'v_proj'], lora_dropout: 0.1 }
  const file = (values: unknown[], name: string, read: Reader['read']): Reader => ({
    seeds: values.map(text),
    values,
    file: name,
    target: MILLION,
    read,
  })
  const llm = json('model/llm/config.json')
  const rope = { rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 }
  return {
    llama: ofValues(
      [llm, { ...llm, rope_scaling: { ...rope, original_max_position_embeddings: 8192 } }],
      parseLlamaConfig,
    ),
    clip: ofValues([json('model/clip/config.json')], parseClipConfig),
    aligngpt: ofValues([json('model/aligngpt/config.json')], parseAlignGPTConfig),
    preprocessor: ofValues([json('model/clip/preprocessor_config.json')], parsePreprocessorConfig),
    generation: file([json('model/llm/generation_config.json')], 'generation_config.json', (_, f) =>
      readGenerationConfig(path.dirname(f)),
    ),
    adapter: file([lora], 'adapter_config.json', (_, f) => readAdapterConfig(f)),
    json: {
      seeds: [golden('model/llm/config.json')],
      file: 'any.json',
      target: MILLION,
      read: (_, f) => readJsonFile(f, 'ERR_FORMAT'),
    },
    run: file([{ phase: 'finetune', lr: 1e-4, batch: 4, lora: { rank: 4 } }], 'run.json', (_, f) =>
      resolveSettings('finetune', { config: f }),
    ),
    yaml: {
      seeds: [
        Buffer.from('phase: finetune\nlr: 1e-4\nlora:\n  rank: 4\n  targets: [q, v]\n# c\nbatch: &a 4\nseed: *a\n'),
      ],
      words: ['&a ', '*a', '<<: ', '!!binary ', '? ', '- ', '---\n', '|\n', '%YAML 1.1\n', '{', '[', '"', '!!set '],
      file: 'run.yaml',
      target: MILLION,
      read: (_, f) => readConfig(f),
    },
  }
}

function indexReader(folder: string): Reader {
  const file = path.join(folder, 'seed.index')
  const stamp = { size: 5, mtime: '1', ends: 'ab' }
  saveArrays(file, 'records', stamp, { a: new Float64Array(4), b: new Int32Array(3) })
  return {
    seeds: [fs.readFileSync(file)],
    file: 'an.index',
    target: MILLION,
    read: (_, f) => loadArrays(f, 'records', stamp),
  }
}

/** @param folder of its own, in memory where the system has such */
export async function readers(folder: string): Promise<Record<string, Reader>> {
  const clip = smallTokenizer('model/clip/tokenizer.json')
  const llama = smallTokenizer('model/llm/tokenizer.json')
  const options = { legacy: true, addBos: true, addEos: false }
  return {
    safetensors: {
      seeds: smallSafetensors(folder),
      words: ['"F8_E4M3"', '"shape":[-1]', '"__metadata__"', '[0,0]', '{', '}', '"a":', '"__proto__":'],
      file: 'a.safetensors',
      target: MILLION,
      read: (_, file) => {
        for (const e of openSafetensors(file).entries.values()) readEntry(e)
      },
    },
    torchbin: {
      seeds: [golden('mm_projector_align.bin')],
      words: ['(', ')', 'c', 'R', '.', '\x80\x02', 'h\x00', 'q\x01', 'PK\x03\x04'],
      file: 'a.bin',
      target: MILLION,
      read: (_, file) => {
        for (const e of openTorchBin(file).values()) if (e.bytes < 1e6) readEntry(e)
      },
    },
    records: {
      seeds: [text(RECORDS), Buffer.from(RECORDS.map((r) => JSON.stringify(r)).join('\n'))],
      words: ['<image>', '{', '}', '[', ']', '"', '\\', '\\u', ',', '\n', '\ufeff', 'null', '"image":', '1e400'],
      file: 'a.json',
      target: MILLION,
      read: (_, file) => readRecords(file),
    },
    record: ofValues(RECORDS, (value) => readRecord(value, 0)),
    tar: {
      seeds: tarSeeds(folder),
      words: ['ustar', '0', '5', 'x', 'L', '17 path=', '\x80\0\0\0', '../', './'],
      file: 'a.tar',
      target: MILLION,
      read: async (bytes, file) => {
        mendTar(bytes)
        fs.writeFileSync(file, bytes)
        for (const _ of tarEntries(file));
        await openImages(file, { index: false })
      },
    },
    parquet: {
      seeds: parquetSeeds(),
      file: 'a.parquet',
      target: 100_000,
      read: async (_, file) => {
        await unpackParquet([file], { onNotice: () => {} }, path.join(folder, 'unpacked'))
      },
    },
    tokenizer: tokenizerReader([clip, llama]),
    sentencepiece: {
      seeds: [golden('model/llm/tokenizer.model').subarray(0, 6000), golden('model/llm/tokenizer.model')],
      target: MILLION,
      read: (bytes) => fromSentencePiece(bytes, 'tokenizer.model', options),
    },
    index: indexReader(folder),
    ...configReaders(),
    ...checkpointReaders(path.join(folder, 'checkpoints')),
    ...(await pictureReaders()),
  }
}

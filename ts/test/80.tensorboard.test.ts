/** TensorBoard's event files, read back by a reader that shares nothing with the writer. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { loadDataset } from '../src/data/dataset.js'
import { EventFile, maskedCrc32c } from '../src/formats/tfevents.js'
import { finetune, pretrain } from '../src/train/trainer.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'tensorboard test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))

/** CRC-32C bit by bit, as its polynomial says, and TFRecord's mask. */
function masked(bytes: Uint8Array): number {
  let crc = 0xffffffffn
  for (const b of bytes) {
    crc ^= BigInt(b)
    for (let i = 0; i < 8; i++) crc = crc & 1n ? (crc >> 1n) ^ 0x82f63b78n : crc >> 1n
  }
  crc ^= 0xffffffffn
  return Number((((crc >> 15n) | (crc << 17n)) + 0xa282ead8n) & 0xffffffffn)
}

/** The fields of a message by number; a message inside stays bytes. */
function message(b: Buffer): Map<number, (number | Buffer)[]> {
  const fields = new Map<number, (number | Buffer)[]>()
  let at = 0
  const varint = (): number => {
    for (let n = 0, scale = 1; ; scale *= 128) {
      const byte = b[at++]
      n += (byte & 127) * scale
      if (byte < 128) return n
    }
  }
  const bytes = (n: number): Buffer => {
    at += n
    expect(at).toBeLessThanOrEqual(b.length)
    return b.subarray(at - n, at)
  }
  while (at < b.length) {
    const key = varint()
    const read = {
      0: varint,
      1: () => bytes(8).readDoubleLE(),
      2: () => bytes(varint()),
      5: () => bytes(4).readFloatLE(),
    }[key & 7]
    if (!read) throw new Error(`wire type ${key & 7}`)
    fields.set(key >> 3, [...(fields.get(key >> 3) ?? []), read()])
  }
  return fields
}

interface Read {
  wall: number
  step: number
  version?: string
  session?: number
  scalars: Record<string, number>
}

function readEvents(file: string): Read[] {
  const b = fs.readFileSync(file)
  const events: Read[] = []
  for (let at = 0; at < b.length; ) {
    const length = Number(b.readBigUInt64LE(at))
    expect(b.readUInt32LE(at + 8)).toBe(masked(b.subarray(at, at + 8)))
    const data = b.subarray(at + 12, at + 12 + length)
    expect(b.readUInt32LE(at + 12 + length)).toBe(masked(data))
    at += 16 + length
    const e = message(data)
    const values = e.has(5) ? (message(e.get(5)?.[0] as Buffer).get(1) as Buffer[]) : []
    events.push({
      wall: e.get(1)?.[0] as number,
      step: (e.get(2)?.[0] as number) ?? 0,
      version: e.get(3)?.[0].toString(),
      session: e.has(7) ? (message(e.get(7)?.[0] as Buffer).get(1)?.[0] as number) : undefined,
      scalars: Object.fromEntries(values.map(message).map((v) => [String(v.get(1)?.[0]), v.get(2)?.[0] as number])),
    })
  }
  return events
}

const eventFiles = (folder: string): string[] =>
  fs
    .readdirSync(folder)
    .filter((n) => n.startsWith('events.out.tfevents.'))
    .sort()
    .map((n) => path.join(folder, n))

test('masked CRC-32C', () => {
  // RFC 3720, B.4: 32 zeros give 0x8a9136aa, '123456789' is the usual check value 0xe3069283
  const unmask = (m: number): number => {
    const rotated = (m - 0xa282ead8) >>> 0
    return ((rotated >>> 17) | (rotated << 15)) >>> 0
  }
  expect(unmask(maskedCrc32c(new Uint8Array(32)))).toBe(0x8a9136aa)
  expect(unmask(maskedCrc32c(Buffer.from('123456789')))).toBe(0xe3069283)
})

test('large steps, and files that sort in the order they were made', () => {
  const folder = fs.mkdtempSync(path.join(scratch, 'names '))
  const written = [0, 300, 2 ** 40].map((start) => {
    const events = new EventFile(folder, start)
    events.step(start, { 'a/b': 0.1 })
    events.close()
    return events.file
  })
  expect(eventFiles(folder)).toEqual(written)
  expect(written.map((f) => readEvents(f).map((e) => e.step))).toEqual([
    [0, 0, 0],
    [0, 300, 300],
    [0, 2 ** 40, 2 ** 40],
  ])
})

async function part(out: string, stopAt?: number): Promise<void> {
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'))
  const data = await loadDataset(path.join(base, 'data_phase1.json'), { images: path.join(base, 'images') })
  const controller = new AbortController()
  const { signal } = controller
  const onStep = ({ step }: { step: number }): void => void (step + 1 === stopAt && controller.abort())
  const options = { batch: 4, steps: 5, workers: 0, progress: false, onMessage: () => {}, signal, onStep } as const
  await pretrain(model, data, { ...options, out, tensorboard: true, resume: true })
  model.dispose()
  data.close()
}

test('a run and its continuation: the numbers of log.jsonl, each step once', async () => {
  const out = path.join(scratch, 'run')
  await part(out, 2)
  await part(out)
  const log = fs
    .readFileSync(path.join(out, 'log.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((l) => JSON.parse(l))
  const files = eventFiles(out).map(readEvents)
  expect(files.map((events) => events.map((e) => e.step))).toEqual([
    [0, 0, 0, 1],
    [0, 2, 2, 3, 4],
  ])
  for (const [version, session, ...steps] of files) {
    expect(version).toMatchObject({ version: 'brain.Event:2', scalars: {} })
    expect(session).toMatchObject({ session: 1, scalars: {} })
    for (const { step, scalars, wall } of steps) {
      const { loss, lr, gradNorm, tokensPerSecond, waited, coefficients, time } = log[step]
      const numbers = { loss, lr, gradNorm, tokensPerSecond, waited }
      const expected = [
        ...Object.entries(numbers).map(([k, v]) => [`train/${k}`, Math.fround(v)]),
        ...coefficients.map((c: number, l: number) => [`coefficients/level_${l}`, Math.fround(c)]),
      ]
      expect(scalars).toEqual(Object.fromEntries(expected))
      expect(Math.abs(wall - Date.parse(time) / 1000)).toBeLessThan(1)
    }
  }
  expect(log[1].coefficients.length).toBeGreaterThan(1)
})

test('evaluations: losses of levels, of tasks, and the gate by task', async () => {
  for (const phase of ['pretrain', 'finetune'] as const) {
    const out = path.join(scratch, `evaluated ${phase}`)
    const model = await AlignGPT.load(path.join(base, 'model/aligngpt'))
    const file = path.join(base, phase === 'pretrain' ? 'data_phase1.json' : 'data_phase2.json')
    const data = await loadDataset(file, { images: path.join(base, 'images') })
    const options = { batch: 3, steps: 4, workers: 0, progress: false, evalData: file, evalEvery: 3 }
    await (phase === 'pretrain' ? pretrain : finetune)(model, data, { ...options, out, tensorboard: true })
    model.dispose()
    data.close()
    const log = fs.readFileSync(path.join(out, 'log.jsonl'), 'utf8').trim().split('\n')
    const lines = log.map((l) => JSON.parse(l)).filter((l) => l.evaluation)
    const events = eventFiles(out).flatMap(readEvents)
    const read = events.filter((e) => 'eval/loss' in e.scalars)
    expect(read.map((e) => e.step)).toEqual([2, 3])
    for (const [i, { evaluation }] of lines.entries()) {
      const expected: [string, number][] = [['eval/loss', evaluation.loss]]
      if (phase === 'pretrain')
        for (let l = 0; l < 8; l++) expected.push([`eval/level_${l}`, evaluation.levels[l].loss])
      else
        for (const [task, c] of [
          ['short', 8],
          ['description', 8],
          ['yes/no', 8],
          ['text', 0],
        ] as const) {
          expected.push([`eval/task_${task}`, evaluation.tasks[task].loss])
          for (let l = 0; l < c; l++) expected.push([`gate/${task}/level_${l}`, evaluation.tasks[task].coefficients[l]])
        }
      expect(read[i].scalars).toEqual(Object.fromEntries(expected.map(([k, v]) => [k, Math.fround(v)])))
    }
  }
})

test('event files want a folder', async () => {
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'))
  const data = await loadDataset(path.join(base, 'data_phase1.json'), { images: path.join(base, 'images') })
  await expect(pretrain(model, data, { tensorboard: true })).rejects.toThrow(/tensorboard: true: expected out/)
  model.dispose()
  data.close()
})

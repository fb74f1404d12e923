import { execFileSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import sharp from 'sharp'
import { afterAll, describe, expect, it } from 'vitest'
import { type Dataset, loadDataset } from '../src/data/dataset.js'
import { DropLog } from '../src/data/drop-log.js'
import { type LoadedBatch, type LoaderOptions, openLoader } from '../src/data/loader.js'
import { openSafetensors, readEntry, readFloats, type TensorEntry } from '../src/formats/safetensors.js'
import { ALIGN_ROW, IMAGE_ROW, type PackedBatch, packBatch } from '../src/models/packed-batch.js'
import { loadImage } from '../src/processing/image/decode.js'
import { normalise, preprocessImage } from '../src/processing/image/preprocess.js'
import { readPreprocessor } from '../src/processing/preprocessor-config.js'
import { buildSample, IGNORE, type Sample } from '../src/processing/sample.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { CASES, caseDir, expectedOf, recordsOf, refuses, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))
let serial = 0
const put = (text: string | Buffer): string => {
  const f = path.join(dir, `d${serial++}.json`)
  fs.writeFileSync(f, text)
  return f
}
const turns = [
  { from: 'human', value: 'q' },
  { from: 'gpt', value: 'an answer' },
]
const rec = (id: unknown, more: object = {}): object => ({ id, conversations: turns, ...more })
const ints = (e: TensorEntry): number[] => [...new Int32Array(Uint8Array.from(readEntry(e)).buffer)]

/** Bookkeeping of a batch that must always hold. */
function checkBatch(b: PackedBatch, patches: number): void {
  const T = b.tokens.length
  expect([b.labels.length, b.positions.length, b.offsets[b.ids.length]]).toEqual([T, T, T])
  expect(b.offsets.length).toBe(b.ids.length + 1)
  for (let s = 0; s < b.ids.length; s++)
    for (let t = b.offsets[s]; t < b.offsets[s + 1]; t++) expect(b.positions[t]).toBe(t - b.offsets[s])
  const targets: [number, number][] = []
  for (let t = 0; t + 1 < T; t++)
    if (b.labels[t + 1] !== IGNORE && b.positions[t + 1] > 0) targets.push([t, b.labels[t + 1]])
  expect([...b.lossRows].map((r, i) => [r, b.lossTargets[i]])).toEqual(targets)
  b.imageRows.forEach((row, m) => {
    expect([...b.tokens.slice(row, row + patches)].every((x) => x === IMAGE_ROW)).toBe(true)
    const start = b.offsets[b.imageSamples[m]]
    expect([b.alignRows[m], b.tokens[b.alignRows[m]]]).toEqual([start + 1, ALIGN_ROW])
  })
  expect(b.tokens.filter((x) => x === IMAGE_ROW).length).toBe(b.imageRows.length * patches)
  expect(b.tokens.filter((x) => x === ALIGN_ROW).length).toBe(b.imageRows.length)
  expect(b.gateOffsets.length).toBe(b.imageRows.length + 1)
  expect(b.pixels.length).toBe(b.imageRows.length * 3 * b.imageSize ** 2)
}

describe.each(CASES)('packing, %s', (name) => {
  const expected = openSafetensors(caseDir(name, 'expected.safetensors')).entries
  const tokenizer = Tokenizer.load(caseDir(name, 'model', 'llm'))
  const patches = (expected.get('phase2.vision_features') as TensorEntry).shape[1]
  it.each([
    ['phase1', 'data_phase1.json', 'plain'],
    ['phase2', 'data_phase2.json', 'vicuna_v1'],
  ] as const)('%s: labels, lengths and loss rows of the reference, without its padding', (phase, file, style) => {
    const records = recordsOf(name, file)
    const samples = expectedOf(name)[phase].batch_ids.map((id) => {
      const r = records.find((x) => x.id === id)
      return buildSample(r as (typeof records)[0], tokenizer, { style, patches })
    })
    const b = packBatch(samples, patches)
    checkBatch(b, patches)
    const entry = (k: string): TensorEntry => expected.get(`${phase}.${k}`) as TensorEntry
    const width = entry('spliced_labels').shape[1]
    const [labels, mask] = [ints(entry('spliced_labels')), ints(entry('spliced_attention_mask'))]
    samples.forEach((_, s) => {
      const length = mask.slice(s * width, (s + 1) * width).reduce((x, y) => x + y, 0)
      expect(b.offsets[s + 1] - b.offsets[s]).toBe(length)
      expect([...b.labels.slice(b.offsets[s], b.offsets[s + 1])]).toEqual(labels.slice(s * width, s * width + length))
    })
    const index = ints(entry('loss_index'))
    expect([...b.lossRows]).toEqual(
      Array.from({ length: index.length / 2 }, (_, i) => b.offsets[index[2 * i]] + index[2 * i + 1]),
    )
    const withImage = samples.filter((s) => s.image !== null)
    expect(b.images).toEqual(withImage.map((s) => s.image))
    expect([...b.levels]).toEqual(withImage.map((s) => s.level ?? -1))
    withImage.forEach((s, m) => {
      expect(b.gateIds.slice(b.gateOffsets[m], b.gateOffsets[m + 1])).toEqual(s.gateIds)
    })
    const instruction = packBatch(samples, patches, { gateText: 'instruction' })
    expect(instruction.gateIds.length).toBe(withImage.reduce((n, s) => n + s.gateAnswer.filter((x) => !x).length, 0))
  })
})

describe('packing refuses', () => {
  it('unusable samples', async () => {
    const t = Tokenizer.load(caseDir('base', 'model', 'llm'))
    const s = buildSample(
      {
        id: 'a',
        image: 'x',
        conversations: [
          { from: 'human', value: 'q' },
          { from: 'gpt', value: 'a' },
        ],
        similarity: null,
      },
      t,
      { style: 'vicuna_v1', patches: 4 },
    )
    await refuses(() => packBatch([{ ...s, skip: 'no' }], 4), 'ERR_DATA', /"a": expected a usable sample, got no/)
    await refuses(() => packBatch([{ ...s, image: null }], 4), 'ERR_DATA', /one placeholder/)
    expect(packBatch([], 4).tokens.length).toBe(0)
  })
})

describe('loader', () => {
  const name = 'base'
  const tokenizer = Tokenizer.load(caseDir(name, 'model', 'llm'))
  const preprocess = { ...readPreprocessor(caseDir(name, 'model', 'clip')), pad: true }
  const options: LoaderOptions = {
    tokenizer,
    preprocess,
    style: 'vicuna_v1',
    patches: 16,
    batch: 4,
    micro: 3,
    seed: 7,
    steps: 6,
    workers: 0,
  }
  const open = (): Promise<Dataset> =>
    loadDataset(caseDir(name, 'data_phase1.json'), { images: caseDir(name, 'images') })
  const collect = async (o: Partial<LoaderOptions>, d?: Dataset): Promise<LoadedBatch[]> => {
    const loader = await openLoader(d ?? (await open()), { ...options, ...o })
    const out: LoadedBatch[] = []
    try {
      for await (const b of loader) out.push(b)
    } finally {
      await loader.close()
    }
    return out
  }

  it('gives the same batches with 0, 1 and 2 workers, ahead 1 or 3, and when a run continues', async () => {
    const want = await collect({})
    expect(want.map((b) => [b.step, b.epoch, b.micro, b.microCount])).toEqual([
      [0, 0, 0, 2],
      [0, 0, 1, 2],
      [1, 0, 0, 2],
      [1, 0, 1, 2],
      [2, 0, 0, 2],
      [2, 0, 1, 2],
      [3, 0, 0, 1],
      [4, 1, 0, 2],
      [4, 1, 1, 2],
      [5, 1, 0, 2],
      [5, 1, 1, 2],
    ])
    for (const b of want) checkBatch(b.packed as PackedBatch, 16)
    expect(await collect({ workers: 1, ahead: 3 })).toEqual(want)
    expect(await collect({ workers: 2, ahead: 1 })).toEqual(want)
    expect(await collect({ workers: 1, startStep: 4 })).toEqual(want.slice(7))
    const first = want[0].packed as PackedBatch
    const pixels = normalise(
      preprocessImage(await loadImage({ root: caseDir(name, 'images'), name: first.images[1] }), preprocess),
      preprocess,
    )
    expect(first.pixels.slice(pixels.length, 2 * pixels.length)).toEqual(pixels)
  })
  it('takes batches without the event loop', async () => {
    const want = await collect({})
    const loader = await openLoader(await open(), { ...options, workers: 1 })
    const got: LoadedBatch[] = []
    for (let b = loader.nextSync(); b; b = loader.nextSync()) got.push(b)
    expect(got).toEqual(want)
    await loader.close()
    await refuses(() => loader.nextSync(), 'ERR_ARGUMENT', /a closed one/)
  })
  it('augments by seed, epoch and record, the same with and without workers', async () => {
    const a = await collect({ augment: true, steps: 1 })
    expect(await collect({ augment: true, steps: 1, workers: 1 })).toEqual(a)
    expect(a[0].packed?.pixels).not.toEqual((await collect({ steps: 1 }))[0].packed?.pixels)
    expect(a[0].packed?.tokens).toEqual((await collect({ steps: 1 }))[0].packed?.tokens)
  })

  /** 30 records on good pictures, some broken. */
  async function broken(bad: Record<number, string>): Promise<Dataset> {
    const images = tempDir()
    await sharp({ create: { width: 20, height: 12, channels: 3, background: '#336699' } })
      .png()
      .toFile(path.join(images, 'ok.png'))
    fs.writeFileSync(path.join(images, 'text.png'), 'not a picture')
    const list = [...Array(30).keys()].map((i) => rec(`r${i}`, { image: bad[i] ?? 'ok.png' }))
    return loadDataset(put(JSON.stringify(list)), { images })
  }
  it.each([0, 1])(
    'drops bad pictures, names and counts them, and leaves the order alone (%i workers)',
    async (workers) => {
      const o: Partial<LoaderOptions> = { workers, micro: undefined, steps: undefined, maxBad: 0.2 }
      const good = await collect(o, await broken({}))
      const d = await broken({ 3: 'missing.png', 11: '../ok.png', 20: 'text.png' })
      const dropped = new DropLog(d)
      const got = await collect({ ...o, dropped }, d)
      expect(dropped.state.bad.map((x) => [x.index, x.id, x.image]).sort()).toEqual([
        [11, 'r11', '../ok.png'],
        [20, 'r20', 'text.png'],
        [3, 'r3', 'missing.png'],
      ])
      expect(dropped.state.bad.find((x) => x.index === 3)?.reason).toMatch(/missing\.png: expected a file, got ENOENT/)
      const lost = new Set(['r3', 'r11', 'r20'])
      expect(got.map((b) => b.packed?.ids)).toEqual(good.map((b) => b.packed?.ids.filter((id) => !lost.has(id))))
      const again = new DropLog(await broken({}))
      again.restore(dropped.state)
      expect(again.state).toEqual(dropped.state)
      await refuses(
        () => collect({ ...o, maxBad: 0.05, dropped }, d),
        'ERR_DATA',
        /at most 5 % of the records \(maxBad\), got 3 of 30:\n {2}r\d+: .*\n {2}r\d+: .*\n/,
      )
    },
  )
  it('a micro-batch of bad pictures alone is null', async () => {
    const d = await broken({ 0: 'missing.png' })
    const got = await collect({ batch: 1, micro: 1, shuffle: false, steps: 2, maxBad: 1 }, d)
    expect(got.map((b) => b.packed?.ids ?? null)).toEqual([null, ['r1']])
  })
  it('skips and counts what does not fit, counts what is cut', async () => {
    const d = await broken({})
    const fits = Math.max(
      ...(await collect({ steps: 1 }, d)).flatMap((b) =>
        (b.packed as PackedBatch).positions.reduce((n, p) => Math.max(n, p + 1), 0),
      ),
    )
    const [cut, left] = [new DropLog(d), new DropLog(d)]
    await collect({ steps: undefined, maxLength: fits - 1, micro: undefined, dropped: cut }, d)
    expect(cut.state.truncated.length).toBe(30)
    await collect({ steps: undefined, maxLength: 20, micro: undefined, dropped: left }, d)
    expect(left.state.skipped.length).toBe(30)
    expect(left.state.skipped[0].reason).toMatch(/picture ends/)
  })
  it('reports a record that cannot be rendered, misuse, and an empty data set', async () => {
    const two = {
      id: 'two',
      image: 'x',
      conversations: [
        { from: 'human', value: '<image><image>' },
        { from: 'gpt', value: 'a' },
      ],
    }
    await refuses(
      () => loadDataset(put(JSON.stringify([two])), { images: dir }),
      'ERR_DATA',
      /record 0 \(id "two"\) at byte 1: .*at most one <image>, got 2/,
    )
    await refuses(() => collect({ batch: 0 }), 'ERR_ARGUMENT', /batch/)
    await refuses(() => collect({ workers: -1 }), 'ERR_ARGUMENT', /workers/)
    const empty = await loadDataset(put('[]'))
    await refuses(() => collect({}, empty), 'ERR_DATA', /at least one record/)
    const loader = await openLoader(await open(), options)
    await refuses(() => loader.nextSync(), 'ERR_ARGUMENT', /at least one worker/)
    const both = await Promise.allSettled([loader.next(), loader.next()])
    expect(both.map((x) => x.status)).toEqual(['fulfilled', 'rejected'])
    await loader.close()
    await loader.close()
  })

  // The same in fresh processes: TypeScript through tsx, compiled JavaScript in plain node, and inside a worker thread.
  const root = fileURLToPath(new URL('../../', import.meta.url))
  const program = (src: string, ext: string, close: boolean): string => `
    import { loadDataset } from ${JSON.stringify(`${src}/data/dataset.${ext}`)}
    import { openLoader } from ${JSON.stringify(`${src}/data/loader.${ext}`)}
    import { Tokenizer } from ${JSON.stringify(`${src}/processing/tokenizer.${ext}`)}
    const c = ${JSON.stringify(caseDir(name))}
    const d = await loadDataset(c + '/data_phase1.json', { images: c + '/images' })
    const preprocess = { size: 32, crop: 32, mean: [0.48, 0.46, 0.41], std: [0.27, 0.26, 0.28], pad: true }
    const l = await openLoader(d, { tokenizer: Tokenizer.load(c + '/model/llm'), preprocess, style: 'plain', patches: 16, batch: 4, seed: 1, workers: 2 })
    let n = 0
    ${close ? 'for await (const b of l) n += b.packed.images.length; await l.close()' : 'n = l.nextSync().packed.images.length'}
    console.log('pictures', n)
  `
  const run = (file: string, args: string[]): string =>
    execFileSync(process.execPath, [...args, file], {
      encoding: 'utf8',
      timeout: 60_000,
      env: { ...process.env, NODE_OPTIONS: '' },
    })
  const tsx = ['--import', 'tsx']
  it('runs under tsx, ends by itself when it is not closed', () => {
    // Inside the repository, so that `tsx` is found from there.
    const file = path.join(root, 'ts/test', `.loader-${process.pid}.mts`)
    try {
      for (const [close, want] of [
        [true, 14],
        [false, 4],
      ] as const) {
        fs.writeFileSync(file, program('../src', 'js', close))
        expect(run(file, tsx)).toBe(`pictures ${want}\n`)
      }
    } finally {
      fs.rmSync(file, { force: true })
    }
  })
  it('runs compiled, in plain node, in a folder with a space, also inside a worker thread', async () => {
    const out = path.join(root, 'ts/test', `.dist ${process.pid}`)
    try {
      fs.mkdirSync(out)
      fs.writeFileSync(path.join(out, 'package.json'), '{"type":"module"}')
      const { buildSync } = await import('esbuild')
      const sources = path.join(root, 'ts/src')
      const files = fs.readdirSync(sources, { recursive: true, encoding: 'utf8' }).filter((f) => f.endsWith('.ts'))
      buildSync({ entryPoints: files.map((f) => path.join(sources, f)), outdir: out, outbase: sources, format: 'esm' })
      for (const [close, want] of [
        [true, 14],
        [false, 4],
      ] as const) {
        fs.writeFileSync(path.join(out, 'main.js'), program('.', 'js', close))
        expect(run(path.join(out, 'main.js'), [])).toBe(`pictures ${want}\n`)
      }
      const worker = new Worker(path.join(out, 'main.js'), { stdout: true, execArgv: [] })
      let text = ''
      worker.stdout.on('data', (x) => {
        text += x
      })
      expect(await new Promise((resolve, reject) => worker.on('exit', resolve).on('error', reject))).toBe(0)
      expect(text).toBe('pictures 4\n')
    } finally {
      fs.rmSync(out, { recursive: true, force: true })
    }
  })
  it('prepares a sample of the type the trainer takes', () => {
    const s: Sample = buildSample(recordsOf(name, 'data_phase2.json')[0], tokenizer, {
      style: 'vicuna_v1',
      patches: 16,
    })
    expect(
      readFloats(openSafetensors(caseDir(name, 'inputs.safetensors')).entries.get('phase2.pixel_values') as TensorEntry)
        .length,
    ).toBe(3 * 3 * 32 * 32)
    expect(s.image).toBe('a00.png')
  })
})

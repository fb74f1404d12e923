/** The commands of the README on a foreign folder: other models, other pictures, other JSON than the quickstart's. */
import { spawn, spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import sharp from 'sharp'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = new URL('../..', import.meta.url)
const golden = fileURLToPath(new URL('golden/wide/model/', import.meta.url))
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'my own däta '))
const pictures = path.join(dir, 'pictures')
const [pairs, instructions] = ['pairs.json', 'instructions.json'].map((f) => path.join(dir, f))
afterAll(() => fs.rmSync(dir, { recursive: true }))

function aligngpt(...args: string[]): Promise<{ status: number | null; out: string; err: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], { cwd: root })
    let [out, err] = ['', '']
    child.stdout.on('data', (d) => (out += d))
    child.stderr.on('data', (d) => (err += d))
    child.on('close', (status) => resolve({ status, out, err }))
  })
}

beforeAll(async () => {
  fs.mkdirSync(pictures)
  const records: object[] = []
  for (let i = 0; i < 12; i++) {
    const name = `photo ${i}.${i % 2 ? 'jpg' : 'webp'}`
    const background = { r: (i * 40) % 256, g: (i * 90) % 256, b: 80 }
    await sharp({ create: { width: 90 + i, height: 60 + 3 * i, channels: 3, background } }).toFile(
      path.join(pictures, name),
    )
    records.push({
      id: i,
      image: name,
      conversations: [
        { from: 'human', value: 'Describe.\n<image>' },
        { from: 'gpt', value: `colour number ${i}` },
      ],
    })
  }
  fs.writeFileSync(pairs, JSON.stringify(records))
  const asked = [
    ...records.slice(0, 6).map((r, i) => ({
      ...r,
      id: `q${i}`,
      conversations: [
        { from: 'human', value: '<image>\nWhat is it?' },
        { from: 'gpt', value: 'A colour.' },
        { from: 'human', value: 'Sure?' },
        { from: 'gpt', value: 'Yes.' },
      ],
    })),
    {
      id: 'text',
      conversations: [
        { from: 'human', value: 'Hello?' },
        { from: 'gpt', value: 'Hello.' },
      ],
    },
  ]
  fs.writeFileSync(instructions, asked.map((r) => JSON.stringify(r)).join('\n')) // JSON lines this time
})

test('levels, pretrain, finetune, chat', async () => {
  const levels = await aligngpt(
    'levels',
    pairs,
    '--images',
    pictures,
    '--clip',
    path.join(golden, 'clip'),
    '--levels',
    '5',
    '--buckets',
    'quantile',
  )
  expect(levels.status, levels.err).toBe(0)
  expect(levels.out).toMatch(/level 4 /)
  const scored = JSON.parse(fs.readFileSync(pairs, 'utf8')) as { similarity: number }[]
  expect(new Set(scored.map((r) => r.similarity))).toEqual(new Set([0, 1, 2, 3, 4]))

  const first = path.join(dir, 'first')
  const pretrain = await aligngpt(
    'pretrain',
    '--llm',
    path.join(golden, 'llm'),
    '--clip',
    path.join(golden, 'clip'),
    '--data',
    pairs,
    '--images',
    pictures,
    '--out',
    first,
    '--levels',
    '5',
    '--batch',
    '4',
    '--epochs',
    '2',
  )
  expect(pretrain.status, pretrain.err).toBe(0)
  expect(pretrain.out).toMatch(/6 steps in .* loss \d/)
  const config = JSON.parse(fs.readFileSync(path.join(first, 'config.json'), 'utf8'))
  expect(config).toMatchObject({ model_type: 'aligngpt', n_indicators: 5, mm_projector_type: 'mlp2x_gelu' })

  const second = path.join(dir, 'second')
  const finetune = await aligngpt(
    'finetune',
    '--model',
    first,
    '--data',
    instructions,
    '--images',
    pictures,
    '--out',
    second,
    '--batch',
    '4',
    '--dtype',
    'bf16',
    '--recompute',
  )
  expect(finetune.status, finetune.err).toBe(0)
  expect(finetune.out).toMatch(/2 steps in/)

  const third = path.join(dir, 'third')
  const usual = ['--model', first, '--data', instructions, '--images', pictures, '--out', third, '--batch', '4']
  const variant = ['--alignment', 'local', '--gate', 'linear']
  const adapters = await aligngpt(
    'finetune',
    ...usual,
    ...variant,
    '--lora-rank',
    '2',
    '--lora-targets',
    'q_proj',
    'up_proj',
  )
  expect(adapters.status, adapters.err).toBe(0)
  const written = JSON.parse(fs.readFileSync(path.join(third, 'adapter', 'adapter_config.json'), 'utf8'))
  expect(written).toMatchObject({ r: 2, lora_alpha: 4, target_modules: ['q_proj', 'up_proj'] })
  const changed = JSON.parse(fs.readFileSync(path.join(third, 'config.json'), 'utf8'))
  expect(changed).toMatchObject({ mm_alignment: 'local', mm_gate_type: 'linear', mm_gate_text: 'all' })

  const chat = await aligngpt(
    'chat',
    '--model',
    second,
    '--image',
    path.join(pictures, 'photo 3.jpg'),
    '--max-new-tokens',
    '5',
    'What is it?',
  )
  expect(chat.status, chat.err).toBe(0)
  expect(chat.err).toMatch(/alignment: 0 0\.\d{3} {2}1 0\.\d{3} .* global 1\.000/)
})

test('mistakes are answered in one line', async () => {
  const runs = await Promise.all([
    aligngpt('levels', path.join(dir, 'none.json'), '--images', pictures, '--clip', path.join(golden, 'clip')),
    aligngpt(
      'pretrain',
      '--llm',
      path.join(golden, 'clip'),
      '--clip',
      path.join(golden, 'clip'),
      '--data',
      pairs,
      '--images',
      pictures,
      '--out',
      path.join(dir, 'x'),
    ),
    aligngpt('chat', '--model', path.join(golden, 'aligngpt'), '--image', path.join(dir, 'missing.png'), 'What?'),
    aligngpt('finetune', '--data', instructions, '--images', pictures, '--out', path.join(dir, 'y')),
  ])
  const expected = [/none\.json/, /model_type|clip/, /missing\.png/, /--model is missing/]
  for (const [i, run] of runs.entries()) {
    expect(run.status).toBe(i === 3 ? 2 : 1)
    expect(run.err).toMatch(expected[i])
    expect(run.err).not.toMatch(/\n\s+at /)
  }
})

test('--help, --version and info; a command line that is not understood ends with status 2', async () => {
  const { version } = JSON.parse(fs.readFileSync(new URL('package.json', root), 'utf8'))
  const [help, short, info, unknown] = await Promise.all([
    aligngpt('--help'),
    aligngpt('--version'),
    aligngpt('info', '--json'),
    aligngpt('dance'),
  ])
  for (const name of ['info', 'check', 'levels', 'plan', 'pretrain', 'finetune', 'eval', 'chat', 'generate'])
    expect(help.out).toMatch(new RegExp(`^ {2}${name} `, 'm'))
  expect(short.out.trim()).toBe(version)
  expect(JSON.parse(info.out)).toMatchObject({ version, cpu: { name: 'cpu' } })
  expect([help.status, short.status, info.status, unknown.status]).toEqual([0, 0, 0, 2])
  expect(unknown.err).toContain("unknown command 'dance'")
})

test('the command line loads no native code before a command runs', async () => {
  const broken = { ...process.env, ALIGNGPT_CPU_LEVEL: 'mmx' } // the addon refuses to load with it
  const run = (...args: string[]) =>
    spawnSync(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], {
      cwd: root,
      env: broken,
      encoding: 'utf8',
    })
  expect(run('finetune', '--help').status).toBe(0)
  const info = run('info')
  expect(info.status).toBe(1)
  expect(info.stderr).toMatch(/^ERR_\w+ .*ALIGNGPT_CPU_LEVEL.*\n$/)
})

test('an interrupted quickstart says so and can be started again', async () => {
  const out = path.join(dir, 'quickstart')
  const script = fileURLToPath(new URL('scripts/quickstart/main.ts', root))
  /** Interrupts a run as soon as it prints something. */
  const run = (until: string): Promise<{ status: number | null; text: string }> =>
    new Promise((resolve) => {
      const child = spawn(process.execPath, ['--import', 'tsx', script, '--fast', '--out', out], { cwd: root })
      let text = ''
      const listen = (d: Buffer): void => {
        text += d
        if (!child.killed && text.includes(until)) child.kill('SIGINT')
      }
      child.stdout.on('data', listen)
      child.stderr.on('data', listen)
      child.on('close', (status) => resolve({ status, text }))
    })
  const first = await run('== Alignment scores')
  expect(first.status).toBe(130)
  expect(first.text).toContain(`Interrupted: ${out} is unfinished. Start again with the same command`)
  const second = await run('== Data')
  expect(second.text).toContain(`An earlier run in ${out} did not finish; starting from the beginning.`)
  expect(second.status).toBe(130)
}, 60_000)

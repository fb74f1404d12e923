/** The commands around training: plan, generate, eval. */
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import sharp from 'sharp'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = new URL('../..', import.meta.url)
const golden = fileURLToPath(new URL('golden/wide/model/', import.meta.url))
const model = ['--model', `${golden}aligngpt`, '--clip', `${golden}clip`]
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt commands '))
const file = (name: string, records: object[]): string => {
  fs.writeFileSync(path.join(dir, name), records.map((r) => JSON.stringify(r)).join('\n'))
  return path.join(dir, name)
}
const jsonLines = (text: string): Record<string, unknown>[] =>
  text
    .trim()
    .split('\n')
    .map((l) => JSON.parse(l))
beforeAll(async () => {
  for (const [name, r] of Object.entries({ 'a.png': 20, 'b.png': 130, 'c.png': 240 }))
    await sharp({ create: { width: 40, height: 30, channels: 3, background: { r, g: 255 - r, b: 60 } } }).toFile(
      path.join(dir, name),
    )
})
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

test('plan: sizes of a preset and of folders, what fits, exit statuses', async () => {
  const usual = ['--dtype', 'bf16', '--recompute', '--text-tokens', '63']
  const compact = ['--optimizer-state', 'compact']
  const [seven, little, given, folders, neither, adapters] = await Promise.all([
    aligngpt('plan', '--preset', '7b', ...usual, ...compact, '--memory', '80G', '--json'),
    aligngpt('plan', '--preset', '13b', ...usual, '--memory', '80G'),
    aligngpt('plan', ...model, '--json'),
    aligngpt('plan', '--llm', `${golden}llm`, '--clip', `${golden}clip`, '--phase', 'pretrain'),
    aligngpt('plan', '--dtype', 'bf16'),
    aligngpt('plan', '--preset', '7b', ...usual, '--lora-rank', '128', '--memory', '80G', '--json'),
  ])
  expect(seven.status, seven.err).toBe(0)
  const { plan, options, largestMicroBatch, memory } = JSON.parse(seven.out)
  // Vicuna 7B, ViT-L/14-336, projector, table and gate: as in 41.plan.test.ts
  expect(plan.parameters).toBe(6_738_415_616 + 303_507_456 + 20_979_712 + 8 * 4096 + 256 * 577 + 7 * 257)
  expect([memory, options.microBatch]).toEqual([80 * 2 ** 30, largestMicroBatch])
  expect(plan.peak).toBeLessThanOrEqual(memory)
  const low = JSON.parse(adapters.out)
  expect(low.plan.trainable).toBeLessThan(plan.trainable / 10)
  expect(low.largestMicroBatch).toBeGreaterThan(largestMicroBatch)

  expect(little.status).toBe(1) // 18 bytes for each of 13 billion
  expect(little.out).toMatch(/^finetune, bf16, 1 x 63 .*\n13\d{3}\.\d M parameters/)
  expect(little.out).toMatch(/largest micro-batch in 80\.00 GiB: 0\n/)
  expect(little.err).toMatch(/^ERR_MEMORY \[plan\] step: expected at most 80\.00 GiB, got 2\d\d\.\d\d GiB\n$/)

  expect(given.status, given.err).toBe(0)
  expect(JSON.parse(given.out)).toMatchObject({
    largestMicroBatch: null,
    options: { phase: 'finetune', microBatch: 1 },
  })
  expect(folders.status, folders.err).toBe(0)
  expect(folders.out).toMatch(/^pretrain, f32, 1 x \d+ text tokens/)
  expect(neither.status).toBe(2)
  expect(neither.err).toContain('--preset NAME, --model DIR, or --llm DIR with --clip DIR')
})

test('generate: one question streams, a file is answered in batches, the gate can be replaced', async () => {
  const asked = [
    { id: 'x', prompt: 'What is it?', image: 'a.png' },
    { prompt: 'Hello?' },
    { prompt: 'And this?', image: 'b.png' },
  ]
  const questions = file('asked.jsonl', asked)
  const out = path.join(dir, 'answers.jsonl')
  const usual = ['generate', ...model, '--max-new-tokens', '6']
  const many = [...usual, questions, '--images', dir, '--show-gate', '--temperature', '2', '--seed', '4']
  const one = [...usual, '--prompt', 'What is it?', '--image', path.join(dir, 'a.png')]
  const alpha = '0.5,0,0,0,0,0,0,-1'
  const broken = file('broken.jsonl', [{ prompt: 'fine' }, { question: 'no prompt' }])
  const [pair, single, gate, level, weights, few, bad, both, none, nowhere] = await Promise.all([
    aligngpt(...many, '--batch', '2', '--out', out),
    aligngpt(...many, '--batch', '1'),
    aligngpt(...one, '--show-gate'),
    aligngpt(...one, '--show-gate', '--level', '2'),
    aligngpt(...usual, questions, '--images', dir, '--show-gate', `--alpha=${alpha}`),
    aligngpt(...one, '--alpha', '1,2'),
    aligngpt(...usual, broken),
    aligngpt(...one, '--alpha', alpha, '--level', '2'),
    aligngpt(...usual),
    aligngpt(...usual, questions),
  ])
  expect(pair.status, pair.err).toBe(0)
  const answers = jsonLines(fs.readFileSync(out, 'utf8'))
  expect(answers).toHaveLength(3)
  for (const [i, a] of answers.entries()) {
    expect(a).toMatchObject(asked[i])
    expect(a.tokens).toBeGreaterThan(0)
    if (asked[i].image) expect(a.alpha).toHaveLength(8)
    else expect(a.alpha).toBeNull()
  }
  expect(new Set(answers.map((a) => a.text)).size).toBe(3)
  expect(jsonLines(single.out).map((a) => a.text)).toEqual(answers.map((a) => a.text)) // a batch changes no draw

  expect(gate.status, gate.err).toBe(0)
  expect(gate.out.trim()).not.toBe('')
  expect(gate.err).toMatch(/^alignment: 0 0\.\d{3} .* global 1\.000\n$/)
  expect(level.err).toMatch(/^alignment: 0 0\.000 {2}1 0\.000 {2}2 1\.000 .* global 0\.000\n$/)
  expect(jsonLines(weights.out)[0].alpha).toEqual(alpha.split(',').map(Number))

  expect(few.err).toMatch(/^ERR_ARGUMENT .*coefficients: expected 8, got 2\n$/)
  expect(bad.err).toMatch(
    /^ERR_DATA \[generate\] .*broken\.jsonl: record 1 prompt, expected a string, got undefined\n$/,
  )
  expect(nowhere.err).toMatch(/^ERR_IMAGE .*a\.png/)
  expect([few, bad, nowhere, both, none].map((r) => r.status)).toEqual([1, 1, 1, 2, 2])
})

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
  // Vicuna 7B, ViT-L/14-336, projector, table and gate: as in 70.plan.test.ts
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
  const [{ prompt: question, ...first }, ...rest] = asked
  const questions = file('asked.jsonl', [{ ...first, question }, ...rest]) // as eval and training call it
  const out = path.join(dir, 'answers.jsonl')
  const usual = ['generate', ...model, '--max-new-tokens', '6']
  const many = [...usual, questions, '--images', dir, '--show-gate', '--temperature', '2', '--seed', '4']
  const one = [...usual, '--prompt', 'What is it?', '--image', path.join(dir, 'a.png')]
  const alpha = '0.5,0,0,0,0,0,0,-1'
  const broken = file('broken.jsonl', [{ prompt: 'fine' }, { caption: 'no prompt' }])
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
    /^not answered: .*broken\.jsonl: record 1: .*prompt: expected a string, .*, got nothing\n1 of 2/,
  )
  expect(jsonLines(bad.out).map((a) => [typeof a.text, typeof a.error])).toEqual([
    ['string', 'undefined'],
    ['undefined', 'string'],
  ])
  expect(nowhere.err).toMatch(/^not answered: .*record 0 \(id "x"\): \[image\] a\.png.*\n.*record 2.*b\.png.*\n2 of 3/)
  expect(jsonLines(nowhere.out).map((a) => a.error === undefined)).toEqual([false, true, false])
  expect([few, bad, nowhere, both, none].map((r) => r.status)).toEqual([1, 1, 1, 2, 2])
})

test('eval: loss, every kind of question, the blind control', async () => {
  const talk = (...turns: string[]) => turns.map((value, i) => ({ from: i % 2 ? 'gpt' : 'human', value }))
  const lettered = 'Which?\nA. red\nB. green\nC. blue'
  const records = [
    { id: 1, image: 'a.png', conversations: talk('<image>\nIs it red?', 'No.', 'Sure?', 'Yes.') },
    { id: 2, image: 'b.png', conversations: talk('Is it red?\n<image>', 'yes') },
    { id: 3, image: 'c.png', conversations: talk(`<image>\n${lettered}`, 'B') },
    {
      id: 4,
      image: 'a.png',
      conversations: talk('<image>\nWhich is it?', 'sky'),
      options: ['sky', 'sea', 'soil', 'sun'],
    },
    { id: 5, conversations: talk('What is it?', 'No one knows.') },
    { id: 6, conversations: [{ from: 'system', value: 'Be kind.' }, ...talk('Hello?', 'Hello.')] },
  ]
  const questions = [{ image: 'a.png', question: 'What is it?', answer: '!' }]
  const mistaken = [{ question: 'Which?', answer: 'c', options: ['a', 'b'] }]
  const [all, plain, wrong] = [
    file('eval.json', records),
    file('questions.json', questions),
    file('mistaken.json', mistaken),
  ]
  const answers = path.join(dir, 'eval answers.jsonl')
  const usual = [...model, '--images', dir, '--max-new-tokens', '4']
  const silent = [records[1], { id: 7, conversations: talk('Anybody?') }]
  const [json, text, first, open, some, bad, empty] = await Promise.all([
    aligngpt('eval', all, ...usual, '--json', '--answers', answers),
    aligngpt('eval', all, ...usual, '--batch', '2', '--no-blind'),
    aligngpt('eval', all, ...usual, '--limit', '1', '--json', '--no-loss'),
    aligngpt('eval', plain, ...usual),
    aligngpt('eval', file('silent.json', silent), ...usual, '--no-loss'),
    aligngpt('eval', wrong, ...usual),
    aligngpt('eval', file('empty.json', []), ...usual),
  ])
  expect(json.status, json.err).toBe(0)
  const { loss, scores, later, leftOut } = JSON.parse(json.out)
  expect([later, leftOut]).toEqual([1, []])
  expect(scores).toMatchObject({
    yesno: { count: 3, chance: 1 / 2 },
    choice: { count: 2 },
    exact: { count: 2, blind: null, chance: null },
    contains: { count: 2 },
  })
  expect(scores.choice.chance).toBeCloseTo((1 / 3 + 1 / 4) / 2, 12)
  expect(scores.yesno.blind).toBeTypeOf('number')
  const given = jsonLines(fs.readFileSync(answers, 'utf8'))
  expect(given.map((a) => [a.id, a.turn, a.kind, a.answer])).toEqual([
    ['1', 0, 'yesno', 'No'],
    ['1', 1, 'yesno', 'Yes'],
    ['2', 0, 'yesno', 'Yes'],
    ['3', 0, 'choice', 'B'],
    ['4', 0, 'choice', 'sky'],
    ['5', 0, 'open', 'No one knows.'],
    ['6', 0, 'open', 'Hello.'],
  ])
  const right = given.filter((a) => a.kind === 'yesno' && a.correct).length
  expect(scores.yesno.accuracy).toBe(right / 3)

  expect(text.status, text.err).toBe(0)
  expect(text.out).toContain(`loss ${loss.loss.toFixed(4)} of ${loss.tokens} tokens in 6 records\n`) // whatever the batch
  expect(text.out).toMatch(/^yes\/no +3 +\d+\.\d % +- +50\.0 %$/m)
  expect(text.err).toBe('1 of the questions were asked after the true turns before them\n')
  expect(JSON.parse(first.out)).toMatchObject({ records: 1, loss: null, scores: { yesno: { count: 2, blind: null } } })
  expect(open.out).toMatch(/^contains the answer +1 +0\.0 %/m) // the answer has no words, the given one has
  expect(open.out).toMatch(/^loss \d+\.\d+ of \d+ tokens in 1 records$/m)
  expect([some.status, some.err]).toEqual([0, 'left out: 7: no question with its answer\n'])
  expect(bad.err).toMatch(
    /^ERR_DATA \[eval\] .* got none; record 0: options: expected some with the answer "c", got \["a","b"\]\n$/,
  )
  expect(empty.err).toMatch(/^ERR_DATA .*empty\.json/)
  expect([bad.status, empty.status]).toEqual([1, 1])
})

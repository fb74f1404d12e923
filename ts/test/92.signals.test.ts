/** Signals and ends of commands. Training runs in a thread of its own and the main one hears; the others are heard between batches. */
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import sharp from 'sharp'
import { afterAll, expect, test } from 'vitest'
import { TESTS } from '../../scripts/quickstart/records.js'
import { listCheckpoints, verifyCheckpoint } from '../src/train/checkpoint.js'

const root = fileURLToPath(new URL('../../', import.meta.url))
const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'signals test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))

interface Ended {
  status: number | null
  signal: NodeJS.Signals | null
  out: string
  err: string
  /** ms from the last signal to the end */
  took: number
}

type Watch = (child: ChildProcess, text: string) => void

/** Runs node with TypeScript and calls `watch` whenever it prints. */
function node(args: string[], watch: Watch = () => {}): Promise<Ended> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', ...args], { cwd: root })
    let [stdout, stderr, last] = ['', '', 0]
    const kill = child.kill.bind(child)
    child.kill = (signal) => {
      last = performance.now()
      return kill(signal)
    }
    child.stdout.on('data', (d) => {
      stdout += d
      watch(child, stdout + stderr)
    })
    child.stderr.on('data', (d) => {
      stderr += d
      watch(child, stdout + stderr)
    })
    child.on('spawn', () => watch(child, ''))
    child.on('close', (status, signal) =>
      resolve({ status, signal, out: stdout, err: stderr, took: performance.now() - last }),
    )
  })
}
function pretrain(out: string, args: string[], watch?: Watch): Promise<Ended> {
  const from = ['--llm', `${base}/model/llm`, '--clip', `${base}/model/clip`]
  const data = ['--data', `${base}/data_phase1.json`, '--images', `${base}/images`, '--out', out, '--batch', '4']
  return node(['ts/src/cli.ts', 'pretrain', ...from, ...data, ...args], watch)
}
/** Calls once, as soon as the text is there. */
function when(text: string, then: (child: ChildProcess) => void): (child: ChildProcess, all: string) => void {
  let done = false
  return (child, all) => {
    if (done || !all.includes(text)) return
    done = true
    then(child)
  }
}
const lines = (out: string): { step: number; loss: number; gradNorm: number }[] =>
  fs
    .readFileSync(path.join(out, 'log.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((l) => JSON.parse(l))

for (const [signal, status] of [
  ['SIGINT', 130],
  ['SIGTERM', 143],
  ['SIGHUP', 129],
] as const)
  test(`${signal}: the step is finished, a checkpoint saved, status ${status}, and the run continued from there`, async () => {
    const out = path.join(scratch, signal)
    const steps = ['--steps', '600', '--save-every', '1000', '--allow-long-interval']
    const first = await pretrain(
      out,
      steps,
      when('step 3/', (child) => child.kill(signal)),
    )
    expect(first.err).toContain(`${signal}: finishing the step and saving (once more to stop at once)`)
    expect(first).toMatchObject({ status, signal: null })
    const [step] = listCheckpoints(path.join(out, 'checkpoints'))
    expect(step).toBeGreaterThanOrEqual(3)
    expect(step).toBeLessThan(600)
    expect(verifyCheckpoint(path.join(out, 'checkpoints', `step-${step}`)).step).toBe(step)
    expect(lines(out)).toHaveLength(step)
    const second = await pretrain(
      out,
      [...steps, '--resume'],
      when(`step ${step + 2}/`, (child) => child.kill(signal)),
    )
    expect(second.err).toMatch(new RegExp(`continuing from .*step-${step}`))
    expect(second.status).toBe(status)
    expect(lines(out).map((l) => l.step)).toEqual(lines(out).map((_, i) => i))
    expect(lines(out).length).toBeGreaterThan(step)
  })

test('a second signal ends it within a second; the checkpoint before stays', async () => {
  const out = path.join(scratch, 'second')
  // a step of many micro-batches takes seconds: the first signal alone would wait for it
  const long = ['--batch', '1400', '--micro-batch', '1', '--epochs', '1']
  const data = path.join(scratch, 'many.json')
  const records = JSON.parse(fs.readFileSync(`${base}/data_phase1.json`, 'utf8'))
  fs.writeFileSync(data, JSON.stringify(Array.from({ length: 200 }, () => records).flat()))
  const args = ['--data', data, ...long, '--save-every', '1']
  const ended = await pretrain(
    out,
    args,
    when('step 1/', (child) => {
      const saved = setInterval(() => {
        if (!fs.existsSync(path.join(out, 'checkpoints/step-1'))) return // it is written while the next step runs
        clearInterval(saved)
        child.kill('SIGINT')
        setTimeout(() => child.kill('SIGTERM'), 150)
      }, 20)
    }),
  )
  expect(ended.err).toContain('stopped at once; what was saved before stays')
  expect(ended).toMatchObject({ status: 143, signal: null })
  expect(ended.took).toBeLessThan(1000)
  expect(lines(out)).toHaveLength(1)
  expect(listCheckpoints(path.join(out, 'checkpoints'))).toEqual([1])
  expect(verifyCheckpoint(path.join(out, 'checkpoints/step-1')).step).toBe(1)
})

test('what cannot be done is one line and a status', async () => {
  const out = path.join(scratch, 'ends')
  fs.mkdirSync(path.join(scratch, 'full'))
  fs.symlinkSync('/proc/nowhere', path.join(scratch, 'full/checkpoints'))
  const [done, unsaved, wrong, late] = await Promise.all([
    pretrain(out, ['--steps', '3', '--skip-outliers']),
    pretrain(path.join(scratch, 'full'), ['--steps', '9', '--save-every', '1']),
    pretrain(path.join(scratch, 'wrong'), ['--steps', '3', '--resume', scratch]),
    pretrain(path.join(scratch, 'late'), ['--steps', '3', '--save-every', '10']),
  ])
  expect(done).toMatchObject({ status: 0, err: '' })
  expect(done.out).toMatch(/3 steps in .* saved to/)
  expect(unsaved.status).toBe(3)
  expect(unsaved.err).toMatch(/ERR_SAVE .*3 failures in a row/)
  expect(wrong.status).toBe(1)
  expect(wrong.err).toMatch(/^ERR_CHECKPOINT \[train\] resume: expected checkpoints in .*, got none\n$/)
  expect(late.err).toMatch(
    /^ERR_ARGUMENT \[train\] saveEvery: expected an interval within the run, one of 3 steps, got 10/,
  )
})

// ---- the other commands -------------------------------------------------------------------------------------------

const model = ['--model', `${base}/model/aligngpt`, '--clip', `${base}/model/clip`]
const cli = (args: string[], watch?: Watch): Promise<Ended> => node(['ts/src/cli.ts', ...args], watch)
/** Sends the signal when the condition holds, which is looked at every 20 ms. */
function once(holds: (child: ChildProcess) => boolean, signal: NodeJS.Signals): Watch {
  let waiting: NodeJS.Timeout | undefined
  return (child) => {
    waiting ??= setInterval(() => {
      if (child.exitCode === null && child.signalCode === null && !holds(child)) return
      clearInterval(waiting)
      child.kill(signal)
    }, 20)
  }
}
const jsonLines = (file: string): Record<string, unknown>[] =>
  fs
    .readFileSync(file, 'utf8')
    .split('\n')
    .filter(Boolean)
    .map((l) => JSON.parse(l))
function write(name: string, content: unknown): string {
  fs.writeFileSync(path.join(scratch, name), JSON.stringify(content))
  return path.join(scratch, name)
}
const many = <T>(n: number, make: (i: number) => T): T[] => Array.from({ length: n }, (_, i) => make(i))

test('generate finishes the batch; its answers are beside the file, which stays', async () => {
  const asked = write(
    'asked.json',
    many(4000, (i) => ({ id: i, prompt: 'What is it?' })),
  )
  const [out, part] = ['answers.jsonl', 'answers.jsonl.part'].map((name) => path.join(scratch, name))
  fs.writeFileSync(out, 'yesterday')
  const args = ['generate', ...model, asked, '--out', out, '--batch', '3', '--max-new-tokens', '4']
  const begun = (): boolean => fs.existsSync(part) && fs.statSync(part).size > 0
  const ended = await cli(args, once(begun, 'SIGTERM'))
  expect(ended.err).toContain('SIGTERM: finishing the answers of this batch (once more to stop at once)')
  expect(ended).toMatchObject({ status: 143, signal: null })
  const answers = jsonLines(part)
  expect(ended.err).toContain(`stopped: ${answers.length} of 4000 answered: in ${part}`)
  expect(answers.length % 3).toBe(0)
  expect(answers.map((a) => a.id)).toEqual([...answers.keys()])
  expect(fs.readFileSync(out, 'utf8')).toBe('yesterday')
})

test('eval finishes the batch and gives the figures so far', async () => {
  const questions = many(4000, (i) => ({
    id: i,
    image: `a0${i % 2 ? 3 : 0}.png`,
    question: 'Is it red?',
    answer: i % 3 ? 'Yes' : 'No',
  }))
  const answers = path.join(scratch, 'judged.jsonl')
  const args = ['eval', write('questions.json', questions), ...model, '--images', `${base}/images`]
  const part = `${answers}.part`
  const begun = (): boolean => fs.existsSync(part) && fs.statSync(part).size > 0
  const ended = await cli([...args, '--answers', answers, '--json', '--batch', '5'], once(begun, 'SIGINT'))
  expect(ended).toMatchObject({ status: 130, signal: null })
  const judged = jsonLines(part)
  expect(judged.length % 5).toBe(0)
  expect(judged.length).toBeLessThan(4000)
  expect(ended.err).toContain(`stopped: ${judged.length} of 4000 questions answered: in ${part}`)
  const { answered, scores } = JSON.parse(ended.out)
  const accuracy = judged.filter((a) => a.correct).length / judged.length
  expect([answered, scores.yesno.count, scores.yesno.accuracy]).toEqual([judged.length, judged.length, accuracy])
  expect(scores.yesno.blind).toBeGreaterThanOrEqual(0)
})
const talk = (...turns: string[]) => turns.map((value, i) => ({ from: i % 2 ? 'gpt' : 'human', value }))

/** SIGINT as soon as the process has the file open. */
function opened(file: string): Watch {
  const has = ({ pid }: ChildProcess): boolean => {
    const fds = `/proc/${pid}/fd`
    try {
      return fs.readdirSync(fds).some((fd) => fs.readlinkSync(path.join(fds, fd)) === file)
    } catch {
      return false // it has ended, or closed one meanwhile
    }
  }
  return once(has, 'SIGINT')
}

test('levels keeps its scores, and the same command goes on from them', async () => {
  const records = JSON.parse(fs.readFileSync(`${base}/data_phase1.json`, 'utf8')) as { image: string }[]
  const pairs = many(3000, (i) => ({
    id: i,
    image: records[i % records.length].image,
    conversations: talk('<image>', `caption ${i}`),
  }))
  const data = write('pairs.json', pairs)
  const before = fs.readFileSync(data)
  const args = ['levels', data, '--images', `${base}/images`, '--clip', `${base}/model/clip`, '--batch', '8']
  const file = `${data}.scores.jsonl`
  const scores = (): unknown[] => jsonLines(file)
  const lineCount = (): number => (fs.existsSync(file) ? fs.readFileSync(file, 'utf8').split('\n').length - 1 : 0)
  let kept: unknown[] = []
  const more = (): boolean => lineCount() > Math.max(1, kept.length)
  const first = await cli(args, once(more, 'SIGINT'))
  expect(first.err).toContain('stopped: the same command goes on from the scores made so far')
  expect(first).toMatchObject({ status: 130, signal: null, out: '' })
  expect(fs.readFileSync(data)).toEqual(before)
  const done = scores().length - 1 // the first line is whose they are
  expect(done % 8).toBe(0)
  expect(done).toBeLessThan(3000)
  kept = scores()
  const second = await cli(args, once(more, 'SIGTERM'))
  expect(second.status).toBe(143)
  expect(scores().slice(0, kept.length)).toEqual(kept)
  expect(scores().length).toBeGreaterThan(kept.length)
})

test('check reports on what it has looked at', async () => {
  const images = path.join(scratch, 'large')
  fs.mkdirSync(images)
  await sharp({ create: { width: 3000, height: 3000, channels: 3, background: 'red' } }).toFile(`${images}/0.png`)
  for (let i = 1; i < 500; i++) fs.linkSync(`${images}/0.png`, `${images}/${i}.png`)
  const data = write(
    'large.json',
    many(500, (i) => ({ id: i, image: `${i}.png`, conversations: talk('<image>', i ? `it is ${i}` : '') })),
  )
  const ended = await cli(['check', data, '--images', images, '--decode', '--json', '--strict'], opened(data))
  expect(ended.err).toContain('SIGINT: the report is made of what was looked at (once more to stop at once)')
  expect(ended).toMatchObject({ status: 130, signal: null })
  const report = JSON.parse(ended.out)
  expect(report).toMatchObject({ stopped: true, records: 500, warnings: 1, pictures: { named: 500 } })
  expect(report.pictures.read).toBeLessThan(500)
})

test('ablate leaves the cell that runs and keeps those before it', async () => {
  const [dir, out] = [path.join(scratch, 'quickstart'), path.join(scratch, 'ablate')]
  const data = path.join(dir, 'data')
  fs.mkdirSync(data, { recursive: true })
  fs.symlinkSync(`${base}/model`, path.join(dir, 'models'))
  fs.symlinkSync(`${base}/images`, path.join(data, 'images'))
  const pairs = JSON.parse(fs.readFileSync(`${base}/data_phase1.json`, 'utf8')) as unknown[]
  const question = { id: '1', image: 'a00.png', question: 'Is it?', answer: 'Yes' }
  const files = { 'data/data.json': { fast: true }, 'scores.json': pairs.map((_, i) => i), 'result.json': {} }
  for (const t of TESTS) Object.assign(files, { [`data/questions_${t}.json`]: [question] })
  for (const [name, content] of Object.entries(files)) fs.writeFileSync(path.join(dir, name), JSON.stringify(content))
  fs.copyFileSync(`${base}/data_phase1.json`, path.join(data, 'pairs.json'))
  fs.copyFileSync(`${base}/data_phase2.json`, path.join(data, 'instructions.json'))
  const ended = await node(
    ['scripts/ablate/main.ts', '--fast', '--base', dir, '--out', out],
    when('adaptive, seed 1:', (child) => child.kill('SIGINT')),
  )
  expect(ended.err).toContain('stopped: the same command goes on from the finished cells')
  expect(ended).toMatchObject({ status: 130, signal: null })
  const cells = jsonLines(path.join(out, 'cells.jsonl'))
  expect(cells[0]).toMatchObject({ variant: 'adaptive', seed: 1 })
  expect(cells.length).toBeLessThan(4)
  expect(fs.existsSync(path.join(out, 'table.md'))).toBe(false)
})

test('a second signal ends a command at once, also while its event loop waits', async () => {
  const file = path.join(scratch, 'busy.mts')
  const module = JSON.stringify(path.join(root, 'ts/src/cli/signals.ts'))
  const work = `console.log('busy'); const end = Date.now() + 20000; while (Date.now() < end);`
  fs.writeFileSync(file, `import { hearing } from ${module}\nawait hearing('waiting', async () => { ${work} })\n`)
  const ended = await node(
    [file],
    when('busy', (child) => {
      child.kill('SIGINT')
      setTimeout(() => child.kill('SIGTERM'), 200)
    }),
  )
  expect(ended).toMatchObject({ status: 143, signal: null, out: 'busy\n' })
  expect(ended.err).toBe('\nstopped at once; what was saved before stays\n')
  expect(ended.took).toBeLessThan(1000)
})

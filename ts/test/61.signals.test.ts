/** Signals and ends of a training command: it runs in a thread of its own, this one hears and decides. */
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { listCheckpoints, verifyCheckpoint } from '../src/checkpoint.js'

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

/** Runs the command and calls `watch` whenever it prints. */
function pretrain(
  out: string,
  args: string[],
  watch: (child: ChildProcess, text: string) => void = () => {},
): Promise<Ended> {
  const from = ['--llm', `${base}/model/llm`, '--clip', `${base}/model/clip`]
  const data = ['--data', `${base}/data_phase1.json`, '--images', `${base}/images`, '--out', out, '--batch', '4']
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', 'pretrain', ...from, ...data, ...args], {
      cwd: root,
    })
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
    child.on('close', (status, signal) =>
      resolve({ status, signal, out: stdout, err: stderr, took: performance.now() - last }),
    )
  })
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
  expect(wrong.err).toMatch(/^ERR_CHECKPOINT \[train\] resume, expected checkpoints in .*, got none\n$/)
  expect(late.err).toMatch(
    /^ERR_ARGUMENT \[train\] saveEvery, expected an interval within the run, one of 3 steps, got 10/,
  )
})

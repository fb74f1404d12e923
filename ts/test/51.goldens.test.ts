/** Numeric parity with PyTorch in both phases, inference and CLIP scoring: scripts/parity/goldens.ts as a user runs it. */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { cpuLevels } from './cpu-levels.js'

const root = new URL('../..', import.meta.url)
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'goldens-'))
afterAll(() => fs.rmSync(scratch, { recursive: true }))

function goldens(args: string[], env: Record<string, string>) {
  return spawnSync(process.execPath, ['--import', 'tsx', 'scripts/parity/goldens.ts', ...args], {
    cwd: root,
    env: { ...process.env, ...env },
    encoding: 'utf8',
  })
}

const places = [
  ...cpuLevels.map((level) => ({ place: level, env: { ALIGNGPT_CPU_LEVEL: level } })),
  ...(typeof native.probeCuda() === 'string' ? [] : [{ place: 'cuda', env: { ALIGNGPT_DEVICE: 'cuda' } }]),
]
for (const { place, env } of places)
  describe(place, () => {
    const runs: (ReturnType<typeof goldens> & { out: string })[] = []
    beforeAll(() => {
      for (const threads of ['1', '2']) {
        const out = path.join(scratch, `${place}-${threads}`)
        runs.push({
          out,
          ...goldens(['--cases', 'ts/test/golden', '--dump', out], { ...env, ALIGNGPT_THREADS: threads }),
        })
      }
    }, 600_000)
    for (const name of ['base', 'gqa', 'wide', 'llama3'])
      test(`${name}: every tensor and list within the case's tolerances`, () => {
        expect(runs[0].stdout).toMatch(new RegExp(`${name}: \\d{3} compared, 0 outside tolerance`))
        expect(runs.map((r) => r.status)).toEqual([0, 0])
      })
    test('1 and 2 threads give the same bytes', () => {
      for (const file of fs.readdirSync(runs[0].out))
        expect(
          fs.readFileSync(path.join(runs[1].out, file)).equals(fs.readFileSync(path.join(runs[0].out, file))),
          file,
        ).toBe(true)
    })
  })

test('the run reads none of the answers, and a wrong one is found', () => {
  const dir = path.join(scratch, 'cases', 'base')
  fs.cpSync(new URL('golden/base', import.meta.url), dir, { recursive: true })
  const file = path.join(dir, 'expected.json')
  const e = JSON.parse(fs.readFileSync(file, 'utf8'))
  const blank = (v: unknown): unknown =>
    Array.isArray(v) ? v.map(blank) : typeof v === 'number' ? 0 : typeof v === 'string' ? '' : v
  for (const p of ['phase1', 'phase2'])
    for (const key of ['loss', 'loss_after', 'lr', 'grad_norm_before_clipping', 'lr_schedule'])
      e[p][key] = blank(e[p][key])
  for (const p of ['phase1', 'phase2'])
    e[p].samples = e[p].samples.map((s: { id: string }) => ({ id: s.id, text: '', input_ids: [], labels: [] }))
  e.infer = e.infer.map((i: { id: string; max_new_tokens: number }) => ({
    id: i.id,
    max_new_tokens: i.max_new_tokens,
    text: '',
    input_ids: [],
    generated_ids: [],
  }))
  for (const key of Object.keys(e.clip)) e.clip[key] = blank(e.clip[key])
  fs.writeFileSync(file, JSON.stringify(e))
  const out = path.join(scratch, 'blanked')
  const run = goldens(['--cases', path.dirname(dir), '--dump', out], {})
  expect(run.status).toBe(1)
  expect(run.stdout).toMatch(/MISS phase1.loss/)
  const again = path.join(scratch, `${cpuLevels[cpuLevels.length - 1]}-2`)
  expect(
    fs.readFileSync(path.join(out, 'base.safetensors')).equals(fs.readFileSync(path.join(again, 'base.safetensors'))),
  ).toBe(true)
})

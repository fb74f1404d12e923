import { spawnSync } from 'node:child_process'
import { expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { allLevels } from './cpu-levels.js'

const root = new URL('../..', import.meta.url)
/** Runs TypeScript in a process of its own. */
function run(code: string, env: Record<string, string> = {}) {
  return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', code], {
    cwd: root,
    env: { ...process.env, ...env },
    encoding: 'utf8',
  })
}
const load = "import { native } from './ts/src/core/native.ts';"

test('the native core loads and says what it runs on', () => {
  const c = native.capabilities()
  expect(c.name).toBe('cpu')
  expect(allLevels).toContain(c.level)
  expect(c.threads).toBeGreaterThanOrEqual(1)
})

test('a CPU level can be chosen, and an unknown one is refused by name', () => {
  const portable = run(`${load} console.log(native.capabilities().level)`, { ALIGNGPT_CPU_LEVEL: 'portable' })
  expect(portable.stdout.trim()).toBe('portable')
  const unknown = run(load, { ALIGNGPT_CPU_LEVEL: 'mmx' })
  expect(unknown.status).not.toBe(0)
  expect(unknown.stderr).toContain('ALIGNGPT_CPU_LEVEL: expected one of')
  expect(unknown.stderr).toContain("got 'mmx'")
})

test('ALIGNGPT_THREADS sets the number of threads', () => {
  expect(run(`${load} console.log(native.threads())`, { ALIGNGPT_THREADS: '3' }).stdout.trim()).toBe('3')
})

test('without a CUDA backend the reason is one line that names the file looked for', () => {
  const script = `${load} console.log(native.probeCuda())`
  const r = run(script, { ALIGNGPT_CUDA_LIBRARY: '/nowhere/backend.so' })
  expect(r.stdout.trim()).toMatch(
    /^\[cuda\] library: expected the CUDA backend in \/nowhere\/backend\.so, got: [^\n]+$/,
  )
  const wrong = run(script, { ALIGNGPT_CUDA_LIBRARY: 'libc.so.6' })
  expect(wrong.stdout.trim()).toContain('got: a library without ag_cuda_backend')
})

test('the process ends by itself after work on the pool', () => {
  const r = run(
    `${load} const a = native.tensor(new Float32Array(250000), [500, 500], 'f32'); native.matmul(a, a, false, false); console.log('done')`,
  )
  expect(r.stdout.trim()).toBe('done')
  expect(r.status).toBe(0)
})

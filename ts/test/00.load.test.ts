import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { native, nativeFile } from '../src/core/native.js'
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

const scratch = fs.realpathSync(fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt lädt ')))
afterAll(() => fs.rmSync(scratch, { recursive: true }))
const PREBUILT = `prebuilds/${process.platform}-${process.arch}`

/** What the loader says in a package that has these files and nothing else: `file` of the native core, or its error. */
function loadIn(name: string, files: Record<string, Buffer>): string {
  const dir = path.join(scratch, name)
  for (const folder of ['src/core', 'src/util'])
    fs.cpSync(fileURLToPath(new URL(`ts/${folder}`, root)), path.join(dir, folder), { recursive: true })
  fs.writeFileSync(path.join(dir, 'package.json'), '{ "name": "aligngpt", "type": "module" }')
  fs.symlinkSync(fileURLToPath(new URL('node_modules', root)), path.join(dir, 'node_modules'))
  for (const [file, bytes] of Object.entries(files)) {
    fs.mkdirSync(path.dirname(path.join(dir, file)), { recursive: true })
    fs.writeFileSync(path.join(dir, file), bytes)
  }
  const loader = JSON.stringify(path.join(dir, 'src/core/native.ts'))
  const code = `import(${loader}).then((m) => m.nativeFile, (e) => `
  return run(`${code} e.code + ' ' + e.message).then(console.log)`).stdout.trim().replaceAll(dir, 'DIR')
}

test('the loader takes what was built here, else what came with the package', () => {
  const ours = fs.readFileSync(nativeFile)
  const prebuilt = { [`${PREBUILT}/aligngpt.node`]: ours }
  expect(loadIn('prebuilt', prebuilt)).toBe(`DIR/${PREBUILT}/aligngpt.node`)
  expect(loadIn('both', { ...prebuilt, 'build/Release/aligngpt.node': ours })).toBe('DIR/build/Release/aligngpt.node')
})

test('where none fits the error is one line with one command; a broken one is not passed over', () => {
  const ours = fs.readFileSync(nativeFile)
  const command = 'Build it from source with: npm run --prefix "DIR" build:native '
  const error = (got: string) =>
    `^ERR_NATIVE \\[native\\] aligngpt\\.node: expected a binary for [^\n]*, got ${got}\\. ${command}[^\n]*$`
  expect(loadIn('none', {})).toMatch(new RegExp(error('nothing in build/Release or prebuilds of DIR')))
  const broken = { 'build/Release/aligngpt.node': Buffer.from('no library'), [`${PREBUILT}/aligngpt.node`]: ours }
  expect(loadIn('broken', broken)).toMatch(new RegExp(error('DIR/build/Release/aligngpt\\.node: [^\n]+')))
  const other = { [`${PREBUILT}/other.node`]: ours }
  expect(loadIn('other', other)).toMatch(new RegExp(error(`DIR/${PREBUILT}/other\\.node, which is another package's`)))
})

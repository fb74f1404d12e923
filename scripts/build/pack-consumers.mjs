// The ways in which programs load an installed package, for pack-check.mjs: `dir` is a project that has it.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { buildSync } from 'esbuild'

const WORK = `
const answer = await new Promise((resolve, reject) => {
  const worker = new Worker(new URL('worker.mjs', import.meta.url))
  worker.on('message', resolve).on('error', reject)
})
console.log(answer)`

const FILES = {
  // one state, whoever asks: the classes are the same objects, and what one allocates the other counts
  'both.cjs': `
const { AlignGPTError } = require('aligngpt')
const { memory } = require('aligngpt/core')
const train = require('aligngpt/train')
import('aligngpt').then(async (esm) => {
  const { pretrain } = await import('aligngpt/train')
  const before = memory().inUse
  const model = await esm.AlignGPT.create({ llm: 'models/llm', clip: 'models/clip', levels: 4 })
  const more = memory().inUse - before
  model.dispose()
  console.log(esm.AlignGPTError === AlignGPTError && train.pretrain === pretrain && more > 100000)
})`,
  'worker.mjs': `
import { parentPort } from 'node:worker_threads'
import { AlignGPT } from 'aligngpt'
const model = await AlignGPT.create({ llm: 'models/llm', clip: 'models/clip', levels: 4 })
let pieces = 0
for await (const _ of model.generate({ image: 'data/pictures/car.png', prompt: 'What?', maxNewTokens: 2 })) pieces++
model.dispose()
parentPort.postMessage(pieces > 0)`,
  'workers.mjs': `import { Worker } from 'node:worker_threads'\n${WORK}`,
  'lazy.ts': `
import type { TrainOptions } from 'aligngpt'
const options: TrainOptions = { batch: 4 }
const loaded = (process.report.getReport() as unknown as { sharedObjects: string[] }).sharedObjects
console.log(options.batch === 4 && !loaded.some((file) => file.endsWith('aligngpt.node')))`,
  'some.test.ts': `
import { AlignGPTError, loadDataset } from 'aligngpt'
import { expect, test } from 'vitest'
test('a dataset', async () => {
  expect((await loadDataset('data/pairs.json', { images: 'data/pictures' })).length).toBe(5)
  await expect(loadDataset('none.json')).rejects.toBeInstanceOf(AlignGPTError)
})`,
  'tsconfig.json': JSON.stringify({
    compilerOptions: { module: 'nodenext', target: 'es2023', strict: true, noEmit: true, types: ['node'] },
    include: ['train.ts', 'types.ts', 'types.cts'],
  }),
}

/** A test for each way; each returns what it has to say or throws. */
export function consumers(root, dir, env) {
  for (const [name, text] of Object.entries(FILES)) fs.writeFileSync(path.join(dir, name), text)
  for (const name of ['types.ts', 'types.cts'])
    fs.copyFileSync(path.join(root, 'ts', 'test', name), path.join(dir, name))
  const own = path.join(root, 'node_modules')
  const node = (...args) => {
    const { status, stdout, stderr } = spawnSync('node', args, { cwd: dir, env, encoding: 'utf8' })
    if (status !== 0) throw new Error(`node ${args.join(' ')}: status ${status}\n${stdout}${stderr}`)
    if (/warning/i.test(stderr)) throw new Error(`node ${args.join(' ')} warns: ${stderr}`)
    return stdout.trim()
  }
  const yes = (...args) => {
    const said = node(...args)
    if (said.split('\n').at(-1) !== 'true') throw new Error(`node ${args.join(' ')}: expected true, got ${said}`)
  }
  /** Tools of the checkout, where the user's project would have its own. */
  const lend = (...names) => {
    for (const name of names) {
      const link = path.join(dir, 'node_modules', name)
      fs.mkdirSync(path.dirname(link), { recursive: true })
      if (!fs.existsSync(link)) fs.symlinkSync(path.join(own, name), link)
    }
  }
  const bundle = (file, options) =>
    buildSync({
      ...{ absWorkingDir: dir, entryPoints: [file], bundle: true, platform: 'node', logLevel: 'silent' },
      ...options,
    })
  return {
    'require and import share one state': () => yes('both.cjs'),
    'in a worker thread': () => yes('workers.mjs'),
    'types alone load no native code, under tsx': () => yes('--import', 'tsx', 'lazy.ts'),
    'types, as a user has them': () => {
      lend('@types/node', 'undici-types')
      node(path.join(own, 'typescript', 'bin', 'tsc'), '-p', '.')
    },
    'under vitest': () => {
      lend('vitest')
      node(path.join(own, 'vitest', 'vitest.mjs'), 'run')
    },
    'bundled by esbuild, the addon and sharp left outside': () => {
      bundle('train.ts', { format: 'esm', external: ['sharp'], outfile: 'bundle/train.mjs' })
      if (!/step 4 loss/.test(node('bundle/train.mjs'))) throw new Error('expected it to train')
    },
    'bundled by esbuild as CommonJS, packages left outside': () => {
      bundle('both.cjs', { format: 'cjs', packages: 'external', outfile: 'bundle/both.cjs' })
      yes('bundle/both.cjs')
    },
  }
}

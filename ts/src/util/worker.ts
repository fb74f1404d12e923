/** Worker threads from this package's own modules, compiled or, in development and tests, from TypeScript. */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { pathToFileURL } from 'node:url'
import { Worker } from 'node:worker_threads'
import { packageRoot } from './package.js'

// From TypeScript through tsx, which node does not have to be started with. A module that does not load says so in `ready` too,
// for a caller that leaves its event loop no time.
const BOOT = `
const { parentPort, workerData } = require('node:worker_threads')
const failed = (e) => {
  if (workerData.ready) {
    const ready = new Int32Array(workerData.ready)
    Atomics.store(ready, 0, -1)
    Atomics.notify(ready, 0)
  }
  throw e
}
const load = async () => {
  if (workerData.tsx) (await import(workerData.tsx)).register()
  await (await import(workerData.url)).work(workerData, parentPort)
}
load().catch(failed)
`

/** tsx's ESM entry by its path: the one CommonJS resolution finds cannot register hooks in a worker. */
function tsxEntry(): string {
  const require = createRequire(import.meta.url)
  const file = require.resolve('tsx/package.json')
  const { exports } = require(file) as { exports: { './esm/api': { import: { default: string } } } }
  return new URL(exports['./esm/api'].import.default, pathToFileURL(file)).href
}

/**
 * Starts a thread that runs `work(data, port)` of a module. When it fails, `error` is emitted and `data.ready[0]` is -1.
 * @param caller import.meta.url of the calling module
 * @param name the worker's module, which lies beside the caller, as its path from the source folder, without .ts or .js
 * @param data what the module finds in workerData, besides `url` and `tsx`
 */
export function startThread(
  caller: string,
  name: string,
  data: { ready?: SharedArrayBuffer } & Record<string, unknown>,
): Worker {
  const typescript = caller.endsWith('.ts')
  const beside = new URL(`./${path.basename(name)}${typescript ? '.ts' : '.js'}`, caller)
  // a bundler leaves the module in the package
  const url = existsSync(beside) ? beside.href : pathToFileURL(path.join(packageRoot(), 'dist', `${name}.js`)).href
  const workerData = { ...data, url, tsx: typescript ? tsxEntry() : null }
  return new Worker(BOOT, { eval: true, workerData, execArgv: [], stdout: false, stderr: false })
}

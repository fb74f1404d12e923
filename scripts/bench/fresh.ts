/** Rows measured in fresh processes: peak memory and start-up. Our side runs as compiled JavaScript, as a user's does. */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { HEAD } from './kernels.js'
import { type Context, type Group, geomean, median, type Result, spreadOf, unavailable } from './measure.js'
import { EVEN, RATE, writeModel } from './model.js'
import { nameOf, VARIANTS } from './steps.js'

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')
/** Below the package's root, so that the native binary and the dependencies are found, and ignored by git. */
const COMPILED = path.join(ROOT, 'build', 'bench-js')
const RUNS = 7
/** A start-up that nobody notices; the row's ratio is this over ours. */
const START_MILLISECONDS = 150

let compiled = false
/** Compiles package and scripts once a run. */
function compile(): void {
  if (compiled) return
  fs.rmSync(COMPILED, { recursive: true, force: true })
  const tsc = createRequire(import.meta.url).resolve('typescript/bin/tsc')
  const flags = ['--noEmit', 'false', '--declaration', 'false', '--rootDir', ROOT, '--outDir', COMPILED]
  const r = spawnSync(process.execPath, [tsc, '-p', ROOT, ...flags], { encoding: 'utf8' })
  if (!fs.existsSync(path.join(COMPILED, 'scripts', 'bench', 'child.js')))
    throw new Error(`tsc: ${r.stdout.trim().split('\n')[0] || r.error?.message}`)
  compiled = true
}

function node(argv: readonly string[]): string {
  const r = spawnSync(process.execPath, argv, { encoding: 'utf8' })
  if (r.status !== 0) throw new Error(`node: ${r.stderr?.trim().split('\n').at(-1) || r.error?.message}`)
  return r.stdout.trim()
}

interface Memory {
  base: number
  peak: number
}
function ourMemory(c: Context, kind: string, args: object): Memory {
  compile()
  const script = path.join(COMPILED, 'scripts', 'bench', 'child.js')
  return JSON.parse(node(['--expose-gc', script, String(c.threads), kind, JSON.stringify(args)]))
}

const noMemory = (): string | null =>
  fs.existsSync('/proc/self/clear_refs') ? null : 'resident sizes are read from /proc, which is not here'

const MB = 1e6

/** Peak of the phase-2 step, each side in fresh processes, against the leanest way to run it in PyTorch. */
async function stepMemory(c: Context, dtype: 'f32' | 'bf16'): Promise<Result> {
  const name = `memory.${dtype}`
  const missing = noMemory()
  if (missing) return unavailable(name, missing)
  const folder = await writeModel(c.temp)
  const args = { folder, phase: 2, lengths: EVEN }
  const variants = VARIANTS[dtype].filter((v) => v.dtype === dtype && v.logits === 'text')
  const peers = variants.map((v) => {
    const { peak } = c.peer.memory('step', { ...args, ...v, lr: RATE })
    c.log(`${name}: PyTorch ${nameOf(v)}: ${(peak / MB).toFixed(0)} MB`)
    return { variant: v, peak }
  })
  const leanest = peers.reduce((a, b) => (b.peak < a.peak ? b : a))
  const peer: number[] = [leanest.peak]
  const ours: number[] = []
  for (let i = 0; i < 2; i++) {
    ours.push(ourMemory(c, 'step', { ...args, dtype }).peak)
    if (i === 0) peer.push(c.peer.memory('step', { ...args, ...leanest.variant, lr: RATE }).peak)
  }
  const note = `phase 2, 8 x 322 rows, whole process, no recompute; PyTorch: ${nameOf(leanest.variant)}`
  return sizeRow(name, ours, peer, note)
}

function sizeRow(name: string, ours: readonly number[], peer: readonly number[], note: string): Result {
  const [a, b] = [median(ours), median(peer)]
  const spread = spreadOf(ours.map((x, i) => peer[i] / x))
  return { name, ours: a / MB, peer: b / MB, unit: 'MB', ratio: b / a, spread, note }
}

const memory = (dtype: 'f32' | 'bf16', target: number): Group => ({
  rows: { [`memory.${dtype}`]: target },
  run: async (c) => [await stepMemory(c, dtype)],
})

const headMemory: Group = {
  rows: { 'lmhead.memory': 5 },
  async run(c) {
    const missing = noMemory()
    if (missing) return [unavailable('lmhead.memory', missing)]
    const extra = (m: Memory): number => m.peak - m.base
    const pairs = (['f32', 'bf16'] as const).map((dtype) => {
      const ours = [0, 1].map(() => extra(ourMemory(c, 'lmhead', { dtype })))
      const peer = [0, 1].map(() => extra(c.peer.memory('lmhead', { ...HEAD, dtype })))
      return sizeRow(dtype, ours, peer, '')
    })
    const mean = (f: (r: Result) => number | null): number => geomean(pairs.map((r) => f(r) as number))
    const note = 'resident above the inputs, weight gradient included; sizes as lmhead.time'
    const spread = Math.max(...pairs.map((r) => r.spread as number))
    const [ours, peer, ratio] = [mean((r) => r.ours), mean((r) => r.peer), mean((r) => r.ratio)]
    return [{ name: 'lmhead.memory', ours, peer, unit: 'MB', ratio, spread, note }]
  },
}

const startup: Group = {
  rows: { startup: 1 },
  async run() {
    compile()
    const url = (file: string): string => JSON.stringify(pathToFileURL(path.join(COMPILED, 'ts', 'src', file)).href)
    const program = `const start = performance.now()
      await import(${url('index.js')})
      const { tensor } = await import(${url('tensor.js')})
      const { add } = await import(${url('ops.js')})
      const two = add(tensor([1]), tensor([1])).item()
      console.log(two === 2 ? performance.now() - start : 'wrong')`
    const times = Array.from({ length: RUNS }, () => Number(node(['--input-type=module', '-e', program])))
    const ours = median(times)
    const note = 'import of the package to the first result, fresh process; against a fixed limit'
    const ratio = START_MILLISECONDS / ours
    return [{ name: 'startup', ours, peer: START_MILLISECONDS, unit: 'ms', ratio, spread: spreadOf(times), note }]
  },
}

export const freshGroups: Group[] = [headMemory, memory('f32', 1.4), memory('bf16', 1.67), startup]

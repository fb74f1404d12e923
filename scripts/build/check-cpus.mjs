// Does the prebuilt addon run on CPUs without the newer instructions? First on this CPU at each level it has, by
// ALIGNGPT_CPU_LEVEL; then on old CPUs that qemu-user emulates, where one instruction too new ends the process. A run
// is a forward and backward pass through the ops that differ between levels; results of one level are the same bits on
// both.
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const script = fileURLToPath(import.meta.url)
process.env.PREBUILDS_ONLY = '1' // node-gyp-build leaves build/Release out
const addon = createRequire(import.meta.url)('node-gyp-build').path(path.resolve(path.dirname(script), '..', '..'))
// x86-64 as it began, with SSE3; 2006: SSSE3; 2008: SSE4.2, POPCNT; 2011: AVX without FMA and AVX2; 2013: AVX2, FMA, no AVX-512
const CPUS = { qemu64: 'portable', core2duo: 'portable', Nehalem: 'portable', SandyBridge: 'portable', Haswell: 'avx2' }

/** A small network in both types, forward and backward; prints the level and a digest of every result. */
function work() {
  const native = createRequire(import.meta.url)(addon)
  const digest = createHash('sha256')
  const see = (t) => digest.update(new Uint8Array(native.read(native.cast(t, 'f32')).buffer))
  let state = 1
  const random = (...shape) => {
    const n = shape.reduce((a, b) => a * b)
    const next = () => {
      state = (state * 48271) % 2147483647
      return state / 2147483647 - 0.5
    }
    return native.tensor(Float32Array.from({ length: n }, next), shape, 'f32')
  }
  const [rows, heads, width] = [37, 3, 48]
  const offsets = native.tensor(Int32Array.from([0, 16, rows]), [3], 'i32')
  for (const dtype of ['f32', 'bf16']) {
    const make = (...shape) => {
      const t = native.cast(random(...shape), dtype)
      native.requiresGrad(t, true)
      return t
    }
    const [x, w, b, norm] = [make(rows, width), make(3 * width, width), make(3 * width), make(width)]
    const h = native.linear(native.rmsNorm(x, norm, 1e-6), w, b, 'gelu')
    const [q, k, v] = [0, 1, 2].map((i) => native.slice(h, 1, i * width, (i + 1) * width))
    const y = native.siluMul(native.attention(q, k, v, offsets, offsets, heads, heads, true, 0.25), x)
    native.backward(native.sum(native.mul(native.softmax(y), y)), null)
    for (const t of [y, ...[x, w, b, norm].map((p) => native.grad(p))]) see(t)
  }
  console.log(native.capabilities().level, digest.digest('hex').slice(0, 16))
}

const { values } = parseArgs({ options: { work: { type: 'boolean' } } })
let failed = false

/** One run; returns its digest. */
function run(name, level, expected, command, args, env = {}) {
  const { status, signal, stdout } = spawnSync(command, [...args, script, '--work'], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  })
  const [got, digest] = stdout.trim().split(' ')
  const ok = status === 0 && got === level && (!expected || digest === expected)
  const problem = signal ?? (status !== 0 ? `status ${status}` : `${got} ${digest}, expected ${level} ${expected}`)
  console.log(`${name.padEnd(24)} ${ok ? `${got} ${digest}` : `FAILED: ${problem}`}`)
  if (!ok) failed = true
  return digest
}

function main() {
  const best = createRequire(import.meta.url)(addon).capabilities().level
  const levels = ['portable', 'avx2', 'avx512', 'avx512bf16', 'amx']
  const digests = {}
  for (const level of levels.slice(0, levels.indexOf(best) + 1))
    digests[level] = run(`this CPU at ${level}`, level, undefined, process.execPath, [], { ALIGNGPT_CPU_LEVEL: level })
  if (spawnSync('qemu-x86_64', ['--version']).status !== 0) {
    console.log('old CPUs: not run, qemu-x86_64 is not on the PATH (apt-get install qemu-user)')
    return
  }
  for (const [cpu, level] of Object.entries(CPUS))
    run(cpu, level, digests[level], 'qemu-x86_64', ['-cpu', cpu, process.execPath])
}

if (values.work) work()
else main()
process.exitCode = failed ? 1 : 0

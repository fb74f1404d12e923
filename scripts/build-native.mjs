// Builds the addon with CMake into build/Release (incremental), or with --tests / --bench the native executables
// under build-native/ and runs the tests. Needs a C++17 compiler, make (or ninja) and cmake >= 3.20.
import { spawnSync } from 'node:child_process'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..')
const { values } = parseArgs({
  options: { tests: { type: 'boolean' }, bench: { type: 'boolean' }, sanitize: { type: 'string' } },
})

function run(command, args) {
  const result = spawnSync(command, args, { stdio: 'inherit', cwd: root })
  if (result.error) {
    console.error(`[build] ${command}: ${result.error.message}. Needed: a C++17 compiler, make and cmake >= 3.20`)
    process.exit(1)
  }
  if (result.status !== 0) process.exit(result.status ?? 1)
}

function build(dir, definitions) {
  run('cmake', ['-S', root, '-B', dir, '-DCMAKE_BUILD_TYPE=Release', ...definitions])
  run('cmake', ['--build', dir, '--config', 'Release', '--parallel', String(os.availableParallelism())])
}

if (values.tests || values.bench) {
  const sanitize = values.sanitize ?? (values.tests ? 'address,undefined' : '')
  const dir = path.join(root, 'build-native', values.bench ? 'bench' : sanitize ? 'sanitized' : 'tests')
  build(dir, [
    '-DALIGNGPT_ADDON=OFF',
    `-DALIGNGPT_TESTS=${values.tests ? 'ON' : 'OFF'}`,
    `-DALIGNGPT_BENCH=${values.bench ? 'ON' : 'OFF'}`,
    `-DALIGNGPT_SANITIZE=${sanitize}`,
  ])
  if (values.tests) run('ctest', ['--test-dir', dir, '--output-on-failure'])
} else {
  const dir = path.join(root, 'build-cmake')
  build(dir, ['-DALIGNGPT_ADDON=ON'])
  run('cmake', ['--install', dir, '--prefix', path.join(root, 'build', 'Release'), '--config', 'Release'])
}

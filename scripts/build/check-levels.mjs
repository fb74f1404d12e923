// The kernel objects compiled with AVX flags must not define weak symbols. Such a symbol is an inline function that the
// linker may take from any object for everybody: taken from here it crashes the package on older CPUs.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')
const commands = path.join(root, 'build-cmake', 'compile_commands.json')
if (!existsSync(commands)) throw new Error(`${commands} is missing: npm run build:native comes first`)

/** What the build compiles now: an object left over from a source since removed does not count. */
const objects = JSON.parse(readFileSync(commands, 'utf8'))
  .map(({ directory, output, command }) => path.resolve(directory, output ?? / -o (\S+)/.exec(command)[1]))
  .filter((file) => /[\\/]kernels_a[vm]x\w*\.dir[\\/](?!Debug|RelWithDebInfo)/.test(file)) // one of several configurations
if (objects.length === 0 && process.arch === 'x64') throw new Error(`no AVX kernels in ${commands}`)

let weak = 0
for (const object of objects) {
  const { status, stdout, error } = spawnSync('nm', ['-C', object], { encoding: 'utf8', maxBuffer: 1 << 28 })
  if (status !== 0) throw error ?? new Error(`nm ${object}: status ${status}`)
  for (const line of stdout.split('\n')) {
    if (!/^[0-9a-f]+ [WVu] /.test(line)) continue
    weak++
    console.error(`${path.relative(root, object)}: ${line.replace(/^[0-9a-f]+ /, '')}`)
  }
}
console.log(`${objects.length} AVX kernel objects, ${weak} weak symbols`)
process.exitCode = weak > 0 ? 1 : 0

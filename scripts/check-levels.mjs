// A kernel object compiled with AVX flags must not export weak symbols: the linker could pick its copy of an inline
// function for everybody, and the package would crash on older CPUs.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..')
const build = path.join(root, 'build-cmake')
const objects = readdirSync(build, { recursive: true })
  .map(String)
  .filter((f) => /kernels_avx[^/]*\.dir.*\.o$/.test(f))
if (objects.length === 0 && process.arch === 'x64') throw new Error(`no AVX kernel objects below ${build}: build first`)
const bad = []
for (const object of objects) {
  const { stdout } = spawnSync('nm', ['-C', path.join(build, object)], { encoding: 'utf8' })
  for (const line of stdout.split('\n')) if (/^[0-9a-f]+ [WVu] /.test(line)) bad.push(`${object}: ${line}`)
}
for (const line of bad) console.error(line)
console.log(`${objects.length} kernel objects, ${bad.length} weak symbols`)
process.exit(bad.length ? 1 : 0)

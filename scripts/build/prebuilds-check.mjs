// What `npm run prebuilds` made, as readelf sees it: hardened, stripped, no path of the machine that built it, nothing
// visible but its entry, made for the same version of the addon, nothing needed that a machine with Node has not, and
// no newer glibc than 2.17 (the CUDA backend: than Node's own). States what each needs. Linux only; needs binutils.
// Exit status 1 when anything is wrong.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')
const MACHINES = { x64: 'X86-64', arm64: 'AArch64' }
const ADDON = 'aligngpt.glibc.node' // as prebuildify names it
// 2.28 is that of Node 20, 22 and 24 (BUILDING.md of Node); there are builds of Node for older distributions as well
const GLIBC = { [ADDON]: '2.17', 'libaligngpt_cuda.so': '2.28' }
const ENTRIES = {
  [ADDON]: ['napi_register_module_v1', 'node_api_module_get_api_version_v1'],
  'libaligngpt_cuda.so': ['ag_cuda_backend'],
}
// what Node is linked with, but for its libstdc++
const SYSTEM = /^(ld-linux-.*|lib(c|m|dl|pthread|gcc_s|rt))\.so\.\d+$/

function readelf(...args) {
  const { status, stdout, stderr, error } = spawnSync('readelf', ['--wide', ...args], {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  })
  if (error || status !== 0) throw new Error(`[prebuilds] readelf: expected binutils, got ${error?.message ?? stderr}`)
  return stdout
}

const all = (text, pattern) => [...text.matchAll(pattern)].map((match) => match[1])
const newest = (versions) => versions.sort((a, b) => a.localeCompare(b, 'en', { numeric: true })).at(-1)
const later = (a, b) => a !== b && newest([a, b]) === a

/** What is wrong with a library, and what it needs. */
function inspect(file, arch) {
  const [header, segments, dynamic, symbols, sections, versions] = ['-h', '-l', '-d', '--dyn-syms', '-S', '-V'].map(
    (option) => readelf(option, file),
  )
  const wrong = []
  const name = path.basename(file)
  const expect = (ok, what) => ok || wrong.push(what)
  expect(header.includes(MACHINES[arch]), `machine: expected ${MACHINES[arch]}`)
  expect(/GNU_RELRO/.test(segments) && /\bNOW\b/.test(dynamic), 'RELRO: expected full')
  expect(/GNU_STACK.* RW +0x/.test(segments), 'stack: expected not executable')
  expect(!/TEXTREL/.test(dynamic), 'text relocations: expected none')
  const paths = all(dynamic, /\((?:RPATH|RUNPATH)\).*\[(.*)\]/g)
  expect(
    paths.every((p) => p === '$ORIGIN'),
    `search path: expected none or $ORIGIN, got ${paths}`,
  )
  expect(!/\.symtab|\.debug_/.test(sections), 'symbol table: expected stripped')
  const visible = all(symbols, /^ *\d+: 0*[1-9a-f][0-9a-f]* .* (?:GLOBAL|WEAK|UNIQUE) +\w+ +\d+ (\S+)$/gm).sort()
  expect(visible.join() === ENTRIES[name]?.join(), `visible symbols: expected the entry, got ${visible}`)
  const needed = all(dynamic, /\(NEEDED\).*\[(.*)\]/g)
  const foreign = needed.filter((name) => !SYSTEM.test(name))
  expect(foreign.length === 0, `libraries: expected those of Node, got ${foreign}`)
  const glibc = newest(all(versions, /Name: GLIBC_(\d[\d.]*)/g))
  expect(!later(glibc, GLIBC[name]), `glibc: expected at most ${GLIBC[name]}, got ${glibc}`)
  if (name === 'libaligngpt_cuda.so' && arch === process.arch) {
    const { probeCuda } = createRequire(import.meta.url)(path.join(path.dirname(file), ADDON))
    expect(!/^\[cuda\] library/.test(probeCuda()), `the addon's contract: ${probeCuda()}`)
  }
  expect(!fs.readFileSync(file).includes(root), `paths of this machine: expected none, got ${root}`)
  return { wrong, glibc, needed }
}

let failed = false
const folders = fs.existsSync(path.join(root, 'prebuilds')) ? fs.readdirSync(path.join(root, 'prebuilds')) : []
const linux = folders.filter((name) => name.startsWith('linux-'))
if (linux.length === 0) throw new Error('[prebuilds] expected prebuilds/linux-*, got none: npm run prebuilds')
for (const folder of linux) {
  for (const name of fs.readdirSync(path.join(root, 'prebuilds', folder))) {
    const file = path.join(root, 'prebuilds', folder, name)
    const { wrong, glibc, needed } = inspect(file, folder.split('-')[1])
    const size = `${(fs.statSync(file).size / 1e6).toFixed(2)} MB`
    console.log(`${folder}/${name}  ${size}  glibc >= ${glibc}  needs ${needed.join(' ')}`)
    for (const line of wrong) console.error(`  WRONG ${line}`)
    if (wrong.length > 0) failed = true
  }
  const cuda = path.join(root, 'prebuilds', folder, 'libaligngpt_cuda.so')
  if (folder === 'linux-x64' && !fs.existsSync(cuda))
    console.log(`${folder}: without the CUDA backend (built where nvcc is)`)
}
process.exitCode = failed ? 1 : 0

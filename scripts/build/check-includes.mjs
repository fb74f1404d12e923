// Which folder of native/ includes which, as the first comment of each says, and that no includes go round in a circle.
// Prints what is wrong, one line each; exit status 1 then.
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const native = path.join(
  fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')),
  'native',
)

/** A folder and what it sees besides itself; the longest name that fits a file is its folder. `.` is native/ itself. */
const sees = {
  '.': [],
  cpu: ['.'],
  cuda: ['.'],
  'cuda/emulator': ['.', 'cuda'],
  core: ['.'],
  ops: ['.', 'core'],
  addon: ['.', 'core', 'ops', 'cpu'],
  bench: ['.', 'core', 'ops', 'cpu'],
  test: ['.', 'core', 'ops', 'cpu', 'cuda', 'cuda/emulator'],
}
/** A kernel's source is CUDA, or C++ with the emulator's words in place of CUDA's: this one include chooses. */
const exceptions = new Set(['cuda/gpu.h > cuda/emulator/shim.h'])
/** The files of core, each of which sees those before it; and arguments.h, which is part of backend.h. */
const floors = ['error', 'shape', 'allocator', 'device', 'tensor', 'tape', 'graph', 'file']
const partOf = { 'arguments.h': 'backend.h' }

const files = fs
  .readdirSync(native, { recursive: true })
  .map((file) => file.split(path.sep).join('/'))
  .filter((file) => /\.(h|c|cc|cu)$/.test(file))
const known = new Set(files)
const folderOf = (file) => {
  const fits = Object.keys(sees).filter((folder) => file.startsWith(`${folder}/`))
  return fits.sort((a, b) => b.length - a.length)[0] ?? '.'
}

/** What a file includes in quotes: beside itself, or from native/. A name that is in neither is somebody else's. */
function includes(file) {
  const text = fs.readFileSync(path.join(native, file), 'utf8')
  const names = [...text.matchAll(/^\s*#\s*include "([^"]+)"/gm)].map((match) => match[1])
  return names.flatMap((name) => {
    const beside = path.posix.join(path.posix.dirname(file), name)
    return known.has(beside) ? [beside] : known.has(name) ? [name] : [`? ${name}`]
  })
}

function wrong(file, to) {
  if (to.startsWith('?')) return 'there is no such file'
  if (exceptions.has(`${file} > ${to}`)) return null
  if (partOf[to] && partOf[to] !== file) return `it is part of ${partOf[to]}`
  const [from, into] = [folderOf(file), folderOf(to)]
  if (from !== into && !sees[from].includes(into)) return `${from} does not see ${into}`
  if (from !== 'core' || into !== 'core') return null
  const floor = (name) => floors.indexOf(path.posix.parse(name).name)
  if (floor(file) < 0) return 'core has a file that is not in the order of its floors'
  return floor(to) <= floor(file) ? null : `${path.posix.basename(to)} is above ${path.posix.basename(file)}`
}

const graph = new Map(files.map((file) => [file, includes(file)]))
const problems = []
for (const [file, list] of graph)
  for (const to of list) {
    const why = wrong(file, to)
    if (why) problems.push(`native/${file} includes ${to}: ${why}`)
  }

const done = new Set()
function walk(file, way) {
  if (way.includes(file)) return problems.push(`a circle: ${[...way.slice(way.indexOf(file)), file].join(' > ')}`)
  if (done.has(file)) return
  for (const to of graph.get(file) ?? []) walk(to, [...way, file])
  done.add(file)
}
for (const file of files) walk(file, [])

for (const problem of problems) console.error(problem)
console.log(`${files.length} files, ${[...graph.values()].flat().length} includes, ${problems.length} wrong`)
process.exitCode = problems.length === 0 ? 0 : 1

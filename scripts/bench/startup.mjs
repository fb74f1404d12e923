// Start-up: milliseconds from the import of the package to the result of its first op, in a fresh process each time;
// the prebuilt addon and dist/ as they are published.
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const { values } = parseArgs({ options: { runs: { type: 'string', default: '15' } } })
const dist = (name) => JSON.stringify(new URL(`../../dist/${name}`, import.meta.url).href)
const program = `
const from = performance.now()
await import(${dist('index.js')})
const imported = performance.now() - from
const [{ tensor }, { linear }] = await Promise.all([import(${dist('core/tensor.js')}), import(${dist('core/ops.js')})])
const a = tensor([1, 2, 3, 4], [2, 2])
if (linear(a, a).toFloats().join() !== '5,11,11,25') throw new Error('wrong result')
console.log(imported, performance.now() - from)`

const root = fileURLToPath(new URL('../..', import.meta.url))
const measure = () =>
  execFileSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8', cwd: root })
    .split(' ')
    .map(Number)
measure() // fills the file cache
const times = Array.from({ length: Number(values.runs) }, measure)
const describe = (column) => {
  const sorted = times.map((t) => t[column]).sort((a, b) => a - b)
  return `median ${sorted[sorted.length >> 1].toFixed(0)} ms (${sorted[0].toFixed(0)}-${sorted.at(-1).toFixed(0)})`
}
console.log(
  `import: ${describe(0)}; import to first op: ${describe(1)}; ${times.length} processes, Node ${process.version}`,
)

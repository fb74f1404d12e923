// What can be known about the CUDA backend without a GPU, as a ladder of seven rungs (docs/cuda.md). Needs the addon
// (npm ci); rung 6 needs nvcc, and is failed without it when --require-nvcc is given. --write-budgets: rung 6 writes
// down what it measured. The last line is JSON: {rungs, planted, found, missed}. Exit status 1 when a rung fails or a
// planted bug is not found.
import { AsyncLocalStorage } from 'node:async_hooks'
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..'))
const { values: options } = parseArgs({
  options: { 'require-nvcc': { type: 'boolean' }, 'write-budgets': { type: 'boolean' }, only: { type: 'string' } },
})
const build = path.join(root, 'build-native', 'cuda-check')
const budgetFile = path.join(root, 'native', 'cuda', 'budgets.json')
const jobs = os.availableParallelism()
const schedules = [0, 1, 7, 1000, 1003] // native/cuda/shim.h
const quiet = {
  ASAN_OPTIONS: 'allocator_may_return_null=1',
  TSAN_OPTIONS: 'allocator_may_return_null=1 halt_on_error=1 exitcode=66',
  ALIGNGPT_THREADS: '1', // the CPU backend it compares with is not instrumented: ThreadSanitizer would not see its pool's order
}

// All rungs climb at once, and as many programs run as there are cores; who asks first goes first.
let free = jobs
const waiting = []
const current = new AsyncLocalStorage() // the rung a program runs for: { seconds } that its programs took

/** Runs a program when its turn has come; resolves with its status and everything it printed. */
async function run(command, args, options) {
  if (free > 0) free--
  else await new Promise((go) => waiting.push(go))
  const start = Date.now()
  const result = await runNow(command, args, options)
  const next = waiting.shift()
  if (next) next()
  else free++
  current.getStore().seconds += (Date.now() - start) / 1000
  return result
}

function runNow(command, args, { limit = 420, cwd = root, env = {} } = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, {
      cwd,
      env: { ...quiet, ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    const parts = []
    child.stdout.on('data', (part) => parts.push(part))
    child.stderr.on('data', (part) => parts.push(part))
    const timer = setTimeout(() => child.kill('SIGKILL'), limit * 1000)
    const end = (status) => {
      clearTimeout(timer)
      resolve({ status, output: Buffer.concat(parts).toString() })
    }
    child.on('error', (error) => {
      parts.push(Buffer.from(error.message))
      end(127)
    })
    child.on('close', (status, signal) => end(signal ? 128 : status))
  })
}

const tail = (text, lines) => text.trimEnd().split('\n').slice(-lines).join('\n')
const program = (name) => path.join(build, name)

/** Runs all; the first failure's output is the rung's. */
async function all(commands) {
  const results = await Promise.all(commands.map(([command, ...args]) => run(command, args)))
  const bad = results.find((result) => result.status !== 0)
  return bad
    ? { ok: false, detail: tail(bad.output, 25) }
    : { ok: true, detail: results.map((r) => tail(r.output, 1)).join('\n') }
}

async function configure() {
  const made = await run('cmake', ['--preset', 'cuda-check'])
  if (made.status !== 0) return { ok: false, detail: tail(made.output, 15) }
  const built = await run('cmake', ['--build', '--preset', 'cuda-check', '--parallel', String(jobs)], { limit: 900 })
  return { ok: built.status === 0, detail: built.status === 0 ? '' : tail(built.output, 40) }
}

// ---- rung 5: planted bugs ---------------------------------------------------------------------------
/** The command that compiles `source` for an emulation, from CMake's own list. */
function compileCommand(emulation, source) {
  const entries = JSON.parse(fs.readFileSync(path.join(build, 'compile_commands.json'), 'utf8'))
  const entry = entries.find(
    (e) => e.command.includes(`/${emulation}.dir/`) && e.file.endsWith(`/native/cuda/${source}`),
  )
  return { entry, object: path.resolve(entry.directory, / -o (\S+)/.exec(entry.command)[1]) }
}

/** A copy of the backend's sources with one bug, beside a copy of the contract they include. */
function plantedTree(plant, index) {
  const tree = path.join(build, 'planted', String(index))
  fs.rmSync(tree, { recursive: true, force: true })
  fs.cpSync(path.join(root, 'native', 'cuda'), path.join(tree, 'cuda'), { recursive: true })
  fs.copyFileSync(path.join(root, 'native', 'backend.h'), path.join(tree, 'backend.h'))
  const file = path.join(tree, 'cuda', plant.file)
  const text = fs.readFileSync(file, 'utf8')
  if (text.split(plant.find).length !== 2)
    throw new Error(`planted bug '${plant.name}': its text is not once in ${plant.file}`)
  fs.writeFileSync(
    file,
    text.replace(plant.find, () => plant.replace),
  )
  return tree
}

const variants = {
  2: ['cuda_emulated', ''],
  3: ['cuda_emulated_asan', 'address,undefined'],
  4: ['cuda_emulated_tsan', 'thread'],
  7: ['cuda_emulated', ''],
}

const objectsBelow = (folder) =>
  fs
    .readdirSync(folder, { recursive: true })
    .filter((f) => f.endsWith('.o'))
    .map((f) => path.join(folder, f))

/** The test program with one planted source in place of the true one. */
async function buildPlanted(plant, index) {
  const [emulation, sanitize] = variants[plant.rung]
  const tree = plantedTree(plant, index)
  const source = plant.compile ?? plant.file
  const { entry, object } = compileCommand(emulation, source)
  const mine = path.join(tree, `${source}.o`)
  const words = entry.command.match(/(?:[^\s"\\]|\\.|"(?:[^"\\]|\\.)*")+/g) // a path may have spaces
  const command = words.map((quoted) => {
    const word = quoted.replace(/\\(.)|"/g, '$1')
    if (word === entry.file) return path.join(tree, 'cuda', source)
    return path.resolve(entry.directory, word) === object ? mine : word
  })
  const compiled = await run(command[0], command.slice(1), { cwd: entry.directory })
  if (compiled.status !== 0)
    throw new Error(`planted bug '${plant.name}' does not compile:\n${tail(compiled.output, 15)}`)
  const folders = [emulation, `${emulation}_shim`, emulation.replace('cuda_emulated', 'test_cuda')]
  const others = folders.flatMap((name) => objectsBelow(path.join(build, 'CMakeFiles', `${name}.dir`)))
  const exe = path.join(tree, 'test')
  const objects = [mine, ...others.filter((file) => path.resolve(file) !== object), program('libaligngpt_core.a')]
  const flags = sanitize === '' ? [] : [`-fsanitize=${sanitize}`]
  const linked = await run(command[0], [...flags, ...objects, '-ldl', '-lpthread', '-o', exe])
  if (linked.status !== 0) throw new Error(`planted bug '${plant.name}' does not link:\n${tail(linked.output, 15)}`)
  return exe
}

/** Where the named rung found it, or null. */
async function hunt(plant, index) {
  if (plant.rung === 6) {
    if (!(await nvcc())) return 'not run'
    const found = await resources([plant.file], path.join(plantedTree(plant, index), 'cuda'), ['90'])
    return overBudget(found.kernels).find((line) => line.startsWith(plant.kernel)) ?? null
  }
  const exe = await buildPlanted(plant, index)
  const small = variants[plant.rung][1] === '' ? [] : ['--small']
  for (const seed of plant.rung === 2 ? schedules : [0]) {
    const { status, output } = await run(exe, ['--filter', plant.filter, '--schedule', String(seed), ...small], {
      env: plant.env,
    })
    const line =
      /^(FAIL .*|\[cuda emulation\].*|.*runtime error.*|.*ERROR: AddressSanitizer.*|WARNING: ThreadSanitizer.*)$/m.exec(
        output,
      )?.[1]
    if (status !== 0) return `schedule ${seed}: ${line ?? `status ${status}`}`
  }
  return null
}

// ---- rung 6: nvcc -----------------------------------------------------------------------------------
async function nvcc() {
  return (await run('nvcc', ['--version'])).status === 0
}

const onlySm90 = (source) => source.endsWith('_sm90.cu') // as native/cuda/CMakeLists.txt has it
const architectures = ['80', '86', '89', '90', '100', '120']

/** Registers, stack, spills and shared memory of every kernel of the sources: the most over its instances and architectures. */
async function resources(sources, folder, archs) {
  const kernels = {}
  const objects = path.join(build, 'nvcc')
  fs.mkdirSync(objects, { recursive: true })
  const compile = (source) => {
    const out = path.join(objects, `${source}.${archs.length}.o`)
    const targets = onlySm90(source) ? ['90a'] : archs
    const gencode = targets.map((arch) => `-gencode=arch=compute_${arch},code=sm_${arch}`)
    const flags = ['-std=c++17', '-O3', '-Xptxas', '-v', ...gencode, '-I', path.join(root, 'native')]
    return run('nvcc', [...flags, '-c', path.join(folder, source), '-o', out])
  }
  const results = await Promise.all(sources.map(compile))
  for (const { status, output } of results) {
    if (status !== 0) return { error: tail(output, 20), kernels }
    await collect(output, kernels)
  }
  return { kernels }
}

/** Reads what `ptxas -v` prints; a template's instances count as one kernel. */
async function collect(output, kernels) {
  const mangled = [...new Set([...output.matchAll(/Compiling entry function '(\S+)'/g)].map((match) => match[1]))]
  const plain = mangled.length === 0 ? [] : (await run('c++filt', mangled)).output.trimEnd().split('\n')
  const names = new Map(
    mangled.map((name, i) => [
      name,
      /([\w]+)(<.*)?\(/.exec(plain[i].replace(/\(anonymous namespace\)::/g, ''))?.[1] ?? name,
    ]),
  )
  for (const part of output.split('Compiling entry function ').slice(1)) {
    const number = (pattern) => Number(pattern.exec(part)?.[1] ?? 0)
    const name = names.get(/'(\S+)'/.exec(part)[1])
    const seen = {
      registers: number(/Used (\d+) registers/),
      stack: number(/(\d+) bytes stack frame/),
      spills: number(/(\d+) bytes spill stores/),
      shared: number(/(\d+) bytes smem/),
    }
    const most = kernels[name] ?? seen
    kernels[name] = Object.fromEntries(Object.keys(seen).map((key) => [key, Math.max(most[key], seen[key])]))
  }
}

function overBudget(kernels) {
  const budgets = JSON.parse(fs.readFileSync(budgetFile, 'utf8'))
  return Object.entries(kernels).flatMap(([name, used]) => {
    if (!budgets[name]) return [`${name}: no budget is written down in ${path.relative(root, budgetFile)}`]
    return Object.keys(used)
      .filter((key) => used[key] > budgets[name][key])
      .map((key) => `${name}: ${key} ${used[key]}, budget ${budgets[name][key]}`)
  })
}

async function checkNvcc() {
  if (!(await nvcc())) return { ok: !options['require-nvcc'], ran: false, detail: 'not run: nvcc is not on the PATH' }
  const folder = path.join(root, 'native', 'cuda')
  const sources = fs.readdirSync(folder).filter((file) => file.endsWith('.cu'))
  const { kernels, error } = await resources(sources, folder, architectures)
  if (error) return { ok: false, detail: error }
  if (options['write-budgets']) {
    const lines = Object.keys(kernels)
      .sort()
      .map((name) => `  "${name}": ${JSON.stringify(kernels[name]).replace(/([:,])/g, '$1 ')}`)
    fs.writeFileSync(budgetFile, `{\n${lines.join(',\n')}\n}\n`)
  }
  const wrong = overBudget(kernels)
  const gone = Object.keys(JSON.parse(fs.readFileSync(budgetFile, 'utf8'))).filter((name) => !kernels[name])
  wrong.push(...gone.map((name) => `${name}: has a budget, but no source has it`))
  const sass = await checkSass(sources)
  const summary = `${Object.keys(kernels).length} kernels, ${sources.length} sources, sm_${architectures.join(' ')}; ${sass.detail}`
  return { ok: wrong.length === 0 && sass.ok, detail: [...wrong, summary].join('\n') }
}

/** In machine code: the sources that multiply on the tensor cores really do. (Local memory shows as `stack` above.) */
async function checkSass(sources) {
  if ((await run('cuobjdump', ['--version'])).status !== 0)
    return { ok: true, detail: 'HMMA in machine code: not run, no cuobjdump' }
  const tensor = sources.filter((file) =>
    /mma_bf16_16816|"flash.h"/.test(fs.readFileSync(path.join(root, 'native', 'cuda', file), 'utf8')),
  )
  const without = []
  for (const source of tensor) {
    const { output } = await run('cuobjdump', [
      '-sass',
      '-arch',
      onlySm90(source) ? 'sm_90a' : 'sm_90',
      path.join(build, 'nvcc', `${source}.${architectures.length}.o`),
    ])
    if (!(onlySm90(source) ? /\bHGMMA\b/ : /\bHMMA\b/).test(output)) without.push(source)
  }
  return {
    ok: without.length === 0,
    detail: without.length ? `no HMMA (HGMMA) in ${without.join(', ')}` : `HMMA in ${tensor.join(', ') || 'no source'}`,
  }
}

// ---- the ladder -------------------------------------------------------------------------------------
/** Folders below which a cublasLt.h may be: the toolkit's, and what pip installed. */
function cublasHeaders() {
  const toolkits = [process.env.CUDA_PATH, '/usr/local/cuda']
    .filter(Boolean)
    .map((folder) => path.join(folder, 'include'))
  const lib = path.join(process.env.VIRTUAL_ENV ?? '/usr/local', 'lib')
  const pythons = fs.existsSync(lib) ? fs.readdirSync(lib).filter((name) => name.startsWith('python3')) : []
  const installed = pythons.flatMap((python) =>
    ['cu13', 'cublas'].map((name) => path.join(lib, python, 'site-packages', 'nvidia', name, 'include')),
  )
  const has = (folder) => fs.existsSync(path.join(folder, 'cublasLt.h'))
  return { found: [...toolkits, ...installed].find(has), toolkits: toolkits.filter((folder) => fs.existsSync(folder)) }
}

/** A golden case on the emulated GPU with every product that can by the stand-in for cublasLt. */
const goldenByCublasLt = () => [
  'env',
  `ALIGNGPT_CUDA_LIBRARY=${program('libaligngpt_cuda_emulated.so')}`,
  `ALIGNGPT_CUBLASLT=${program('fake_cublaslt')}`,
  ...['ALIGNGPT_GEMM=cublaslt', 'ALIGNGPT_DEVICE=cuda', process.execPath, '--import', 'tsx'],
  ...['scripts/parity/goldens.ts', '--cases', 'ts/test/golden', '--only', 'base'],
]

/** The values and prototypes of native/cuda/cublas.h against a list of ours, and against the real header where it is. */
async function checkCublasLt() {
  const { status, output } = await run(program('test_cuda'), ['--filter', 'cublaslt'])
  const asked = /the real cublasLt: .*/.exec(output)?.[0] ?? ''
  const golden = await all([goldenByCublasLt()])
  const compared = golden.ok ? 'golden case base: agrees with PyTorch' : golden.detail
  const detailOf = [tail(output, status === 0 ? 1 : 25), asked, compared].join('\n')
  const tested = { ok: status === 0 && golden.ok, detail: detailOf }
  const { found, toolkits } = cublasHeaders()
  if (!tested.ok || !found)
    return { ...tested, detail: `${tested.detail}\nno cublasLt.h here: compared with values.h alone` }
  const folders = [path.join(root, 'native'), found, ...toolkits].flatMap((folder) => ['-I', folder])
  const source = path.join(root, 'native', 'test', 'cublaslt', 'header.cc')
  const compiled = await run('c++', ['-std=c++17', '-fsyntax-only', ...folders, source])
  const detail = compiled.status === 0 ? `agrees with ${path.join(found, 'cublasLt.h')}` : tail(compiled.output, 20)
  return { ok: compiled.status === 0, detail: `${tested.detail}\n${detail}` }
}

const planted = { found: [], missed: [], notRun: [] }
async function checkPlants() {
  const plants = JSON.parse(fs.readFileSync(path.join(root, 'scripts', 'cuda', 'plants.json'), 'utf8'))
  const where = await Promise.all(plants.map(hunt))
  const lines = plants.map((plant, i) => {
    const list = where[i] === 'not run' ? planted.notRun : where[i] ? planted.found : planted.missed
    list.push(plant.name)
    return `${where[i] ? `rung ${plant.rung}` : 'MISSED'}  ${plant.name}: ${(where[i] ?? 'nothing noticed').slice(0, 110)}`
  })
  return { ok: planted.missed.length === 0, detail: lines.join('\n') }
}

/** Tests of the addon with the emulated library in place of a GPU's: `device` is where their models go. */
const inNode = (device, ...words) => [
  ...['env', `ALIGNGPT_CUDA_LIBRARY=${program('libaligngpt_cuda_emulated.so')}`, `ALIGNGPT_DEVICE=${device}`],
  ...['npx', 'vitest', 'run', ...words.map((word) => (/^\d/.test(word) ? `ts/test/${word}.test.ts` : word))],
]
const throughNode = () => [
  inNode('cpu', '-t', 'cuda|GPU', '12.ops', '81.device', '51.goldens', '76.resume'), // those that name the device themselves
  inNode('cuda', '72.train'),
]
const emulated = (name, seeds, ...more) => seeds.map((seed) => [program(name), '--schedule', String(seed), ...more])
/** Everything, and attention once more for each variable that chooses another kernel. */
const everything = (name, seeds, ...more) => [
  ...emulated(name, seeds, ...more),
  ...['ALIGNGPT_DETERMINISTIC=0', 'ALIGNGPT_ATTENTION=wgmma'].flatMap((variable) =>
    emulated(name, seeds, ...more, '--filter', 'attention_packed').map((command) => ['env', variable, ...command]),
  ),
]
const rungs = [
  [
    '1 CPU backend against the goldens',
    () =>
      all([
        ['npx', 'vitest', 'run', 'ts/test/51.goldens.test.ts'],
        [program('test_loader'), program('libaligngpt_cuda_emulated.so')],
      ]),
  ],
  [
    '2 emulation against the CPU, bytes moved',
    () => all([...throughNode(), ...everything('test_cuda', schedules), [program('test_traffic')]]),
  ],
  ['3 AddressSanitizer, UndefinedBehaviorSanitizer', () => all(everything('test_cuda_asan', [0, 1000], '--small'))],
  ['4 ThreadSanitizer', () => all(everything('test_cuda_tsan', [0], '--small'))],
  ['5 planted bugs', checkPlants],
  ['6 nvcc, budgets', checkNvcc],
  ['7 cublasLt constants', checkCublasLt],
]

/** Climbs one rung; resolves with whether it passed. */
async function climb(name, work) {
  const spent = { seconds: 0 }
  const failed = (error) => ({ ok: false, detail: error.message })
  const { ok, ran = true, detail } = await current.run(spent, () => work().catch(failed))
  const state = !ok ? 'failed' : ran ? 'passed' : 'not run'
  if (!ok) process.exitCode = 1
  return { name, ok, state, text: `=== ${name}: ${state}, ${spent.seconds.toFixed(0)} s of programs\n${detail}` }
}

const start = Date.now()
const results = {}
const built = await climb('build', configure)
console.log(built.text)
if (built.ok) {
  const wanted = rungs.filter(([name]) => !options.only || options.only.includes(name[0]))
  // long programs first, the many short ones of the planted bugs last: no core waits at the end
  const climbing = [...wanted].sort(([a], [b]) => '6421375'.indexOf(a[0]) - '6421375'.indexOf(b[0]))
  const ends = new Map(climbing.map(([name, work]) => [name, climb(name, work)]))
  for (const [name] of wanted) {
    const { state, text } = await ends.get(name)
    results[name] = state
    console.log(text)
  }
}
console.log(`${((Date.now() - start) / 1000).toFixed(0)} s`)
const total = planted.found.length + planted.missed.length + planted.notRun.length
console.log(
  JSON.stringify({
    rungs: results,
    planted: total,
    found: planted.found.length,
    missed: planted.missed,
    notRun: planted.notRun,
  }),
)

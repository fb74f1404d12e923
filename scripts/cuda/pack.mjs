// One folder for a run of both phases on a machine with a GPU but without Node, network or npm: node itself, the addon,
// the CUDA library, the compiled sources, what they import, the goldens and the pictures of the quick start.
//
//   npm run cuda:pack [-- --without-cuda]       -> build-native/cuda-pack, at most 60 MB; copy it there, then: bash cuda-pack/run.sh
//
// Needs the addon (npm ci), xz, tar and strip, and nvcc for the CUDA library, which is built for all architectures.
// --without-cuda leaves it out: the folder then runs with ALIGNGPT_DEVICE=cpu only.
import { execFileSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'

const MOST_BYTES = 60e6
const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')
const { values: options } = parseArgs({ options: { 'without-cuda': { type: 'boolean' } } })
const from = (...names) => path.join(root, ...names)
const out = from('build-native', 'cuda-pack')
const files = from('build-native', 'cuda-pack-files') // what files.tar.xz unpacks to
const to = (...names) => path.join(files, ...names)

function run(command, ...args) {
  try {
    return execFileSync(command, args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] })
  } catch (error) {
    throw new Error(`[cuda-pack] ${command} ${args.join(' ')}: ${error.stderr || error.stdout || error.message}`)
  }
}

function copy(source, target) {
  if (!fs.existsSync(source))
    throw new Error(`[cuda-pack] expected ${source}, found nothing: npm ci builds and installs it`)
  fs.mkdirSync(path.dirname(target), { recursive: true })
  fs.copyFileSync(source, target)
}

/** The running node without symbols, compressed; made once for each version. */
function packNode() {
  const packed = from('build-native', `node-${process.version}-${process.arch}.xz`)
  if (!fs.existsSync(packed)) {
    const bare = packed.replace(/\.xz$/, '')
    run('strip', '-o', bare, fs.realpathSync(process.execPath))
    run('xz', '-9', '--force', bare)
  }
  copy(packed, path.join(out, 'node.xz'))
}

function packLibraries() {
  run('npm', 'run', 'build:native') // an addon of these sources, as the library will be
  copy(from('build', 'Release', 'aligngpt.node'), to('build', 'Release', 'aligngpt.node'))
  if (options['without-cuda']) return
  run('cmake', '--preset', 'cuda')
  run('cmake', '--build', '--preset', 'cuda', '--parallel', String(os.availableParallelism()))
  const target = to('build', 'Release', 'libaligngpt_cuda.so') // beside the addon, where it is looked for
  copy(from('build-native', 'cuda', 'native', 'cuda', 'libaligngpt_cuda.so'), target)
  run('strip', '--strip-unneeded', target)
}

/** The TypeScript that runs there, as JavaScript in the same folders. */
function packSources() {
  const scripts = ['parity/goldens', 'quickstart/main', 'cuda/step'].map((name) => from('scripts', `${name}.ts`))
  const settings = {
    extends: from('tsconfig.json'),
    compilerOptions: { noEmit: false, declaration: false, rootDir: root, outDir: files },
    include: [from('ts', 'src'), ...scripts],
  }
  fs.writeFileSync(to('tsconfig.json'), JSON.stringify(settings))
  run(process.execPath, from('node_modules', 'typescript', 'bin', 'tsc'), '-p', to('tsconfig.json'))
  fs.rmSync(to('tsconfig.json'))
  const { name, version, type } = JSON.parse(fs.readFileSync(from('package.json'), 'utf8'))
  const exports = { '.': './ts/src/index.js', './*': './ts/src/entries/*.js' } // the sources name the package's entries
  fs.writeFileSync(to('package.json'), JSON.stringify({ name, version, type, exports }))
  fs.cpSync(from('scripts', 'quickstart', 'towers'), to('scripts', 'quickstart', 'towers'), { recursive: true })
  fs.cpSync(from('ts', 'test', 'golden'), to('ts', 'test', 'golden'), { recursive: true })
}

/** What the package depends on, without types, sources and documents. */
function packDependencies() {
  const folders = run('npm', 'ls', '--omit=dev', '--all', '--parseable').trim().split('\n').slice(1)
  const wanted = (file) => !/\.(ts|mts|cts|map|md)$/.test(file) && !/\/(src|node_modules)$/.test(file)
  for (const folder of folders)
    fs.cpSync(folder, to(path.relative(root, folder)), { recursive: true, filter: (f) => f === folder || wanted(f) })
}

/** Of the emoji packages the words and those pictures that the quick start takes with --fast; with these alone it takes the same. */
async function packPictures() {
  const load = (name) => import(pathToFileURL(to('scripts', 'quickstart', name)).href)
  const { sourceImages } = await load('emoji.js')
  const { prepareData } = await load('data.js')
  const copied = (file) => copy(file, to(path.relative(root, file)))
  const modules = (...names) => from('node_modules', ...names)
  const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-pack-'))
  try {
    const { emoji } = await prepareData(temp, { fast: true })
    for (const style of ['noto', 'twemoji', 'fluent']) {
      const pictures = sourceImages(style)
      for (const { id } of emoji) copied(pictures.get(id))
    }
  } finally {
    fs.rmSync(temp, { recursive: true })
  }
  for (const name of [
    'emoji-datasource-google',
    'emoji-datasource-twitter',
    '@lobehub/fluent-emoji-3d',
    'emojibase-data',
  ])
    copied(modules(name, 'package.json'))
  for (const name of ['en/data.json', 'meta/groups.json']) copied(modules('emojibase-data', name))
}

for (const folder of [out, files]) {
  fs.rmSync(folder, { recursive: true, force: true })
  fs.mkdirSync(folder, { recursive: true })
}
packNode()
packLibraries()
packSources()
await packPictures()
packDependencies()
run('tar', '-C', files, '-cJf', path.join(out, 'files.tar.xz'), '.')
fs.rmSync(files, { recursive: true })
copy(from('scripts', 'cuda', 'pack-run.sh'), path.join(out, 'run.sh'))
let total = 0
for (const name of fs.readdirSync(out)) {
  const { size } = fs.statSync(path.join(out, name))
  total += size
  console.log(`${(size / 1e6).toFixed(1).padStart(6)} MB  ${name}`)
}
console.log(`${(total / 1e6).toFixed(1).padStart(6)} MB  ${out}`)
if (total > MOST_BYTES)
  throw new Error(`[cuda-pack] size: expected at most ${MOST_BYTES / 1e6} MB, got ${(total / 1e6).toFixed(1)}`)

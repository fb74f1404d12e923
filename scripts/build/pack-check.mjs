// Is the package what a user needs? Packs it, compares the tarball with scripts/build/pack-files.txt, and installs it
// as a user would, into an empty folder with a space and letters beyond ASCII in its path and a PATH that holds node
// and npm alone: there examples/project trains on its five pictures. Then the same from git and from this checkout.
// Downloads nothing but the dependencies, from npm's cache where it has them. --all-nodes: on Node 20, 22 and 24, not
// just the one that runs this. --quick: neither from git nor from source. Exit status 1 when anything fails; leaves no
// folder behind.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { ownHeaders } from './headers.mjs'
import { consumers } from './pack-consumers.mjs'

const root = fs.realpathSync(path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..'))
const { values } = parseArgs({ options: { 'all-nodes': { type: 'boolean' }, quick: { type: 'boolean' } } })
const MEGABYTES = 15
const temp = fs.realpathSync(fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt päck ')))
const NPM = ['install', '--no-audit', '--no-fund', '--prefer-offline']
let failures = 0

/** The environment of a user: this one without what `npm run` added. */
function clean(PATH) {
  const kept = /^npm_config_(cache|registry|userconfig)$/
  const mine = Object.entries(process.env).filter(
    ([key]) => !/^(npm_|INIT_CWD|NODE_OPTIONS|NODE_PATH|ALIGNGPT_)/i.test(key) || kept.test(key),
  )
  return { ...Object.fromEntries(mine), PATH, npm_config_script_shell: '/bin/sh' }
}

/** Runs a command; its output, or an error with it. */
function run(command, args, cwd, env) {
  const { status, stdout, stderr, error } = spawnSync(command, args, { cwd, env, encoding: 'utf8', maxBuffer: 1 << 28 })
  if (status !== 0)
    throw new Error(`${path.basename(command)} ${args.join(' ')}: status ${status}\n${error ?? ''}${stdout}${stderr}`)
  return stdout
}

function check(name, test) {
  const from = performance.now()
  try {
    const said = test()
    console.log(`ok      ${name}${said ? `: ${said}` : ''} (${((performance.now() - from) / 1000).toFixed(1)} s)`)
  } catch (e) {
    failures++
    console.log(`FAILED  ${name}\n${String(e.message).replace(/^/gm, '        ')}`)
  }
}

function expect(ok, message) {
  if (!ok) throw new Error(message)
}

/** `npm pack`; the tarball and npm's description of it. What it runs beforehand runs apart: it writes to the same output. */
function pack() {
  run('npm', ['run', 'prepare'], root, clean(process.env.PATH))
  const options = ['--json', '--ignore-scripts', '--pack-destination', temp]
  const described = JSON.parse(run('npm', ['pack', ...options], root, clean(process.env.PATH)))
  const [info] = Array.isArray(described) ? described : Object.values(described)
  return { ...info, file: path.join(temp, info.filename) }
}

function checkList(files) {
  const lines = fs.readFileSync(path.join(root, 'scripts', 'build', 'pack-files.txt'), 'utf8').split('\n')
  const patterns = lines
    .filter((line) => line && !line.startsWith('#'))
    .map((line) => ({ line, name: line.replace(/ \?$/, ''), optional: line.endsWith(' ?') }))
  const expression = (name) => name.replaceAll('.', '\\.').replaceAll('**/', '(?:.+/)?').replaceAll('*', '[^/]*')
  const match = ({ name }, file) => new RegExp(`^${expression(name)}$`).test(file)
  const extra = files.filter((file) => !patterns.some((pattern) => match(pattern, file)))
  const missing = patterns.filter((pattern) => !pattern.optional && !files.some((file) => match(pattern, file)))
  expect(extra.length === 0, `not in scripts/build/pack-files.txt: ${extra.join(' ')}`)
  expect(missing.length === 0, `missing: ${missing.map((m) => m.line).join(', ')}`)
  const cuda = files.includes('prebuilds/linux-x64/libaligngpt_cuda.so') ? 'with' : 'without'
  return `${files.length} files, ${cuda} the CUDA backend`
}

/** A folder with nothing but node and npm, to be the PATH. `node`: the executable of a version. */
function tools(name, node) {
  const folder = path.join(temp, `bin-${name}`)
  fs.mkdirSync(folder)
  const cli = path.join(path.dirname(fs.realpathSync(process.env.npm_execpath ?? which('npm'))), 'npm-cli.js')
  fs.symlinkSync(node, path.join(folder, 'node'))
  for (const tool of ['npm', 'npx']) {
    const launcher = `#!/bin/sh\nexec node '${cli.replace('npm-cli.js', `${tool}-cli.js`)}' "$@"\n`
    fs.writeFileSync(path.join(folder, tool), launcher, { mode: 0o755 })
  }
  return folder
}
const which = (name) =>
  process.env.PATH.split(path.delimiter)
    .map((folder) => path.join(folder, name))
    .find((file) => fs.existsSync(file))

/** A user's project with two small models, which depends on `dependency`. */
function project(name, dependency) {
  const dir = path.join(temp, `${name} proyecto`)
  fs.cpSync(path.join(root, 'examples', 'project'), dir, { recursive: true })
  for (const model of ['llm', 'clip'])
    fs.cpSync(path.join(root, 'ts', 'test', 'golden', 'base', 'model', model), path.join(dir, 'models', model), {
      recursive: true,
    })
  const file = path.join(dir, 'package.json')
  const description = JSON.parse(fs.readFileSync(file, 'utf8'))
  description.dependencies.aligngpt = dependency
  fs.writeFileSync(file, JSON.stringify(description, null, 2))
  return dir
}

/** The README's install section: the user's script on the user's pictures, then the command line. */
function use(dir, env) {
  expect(env, 'expected it to be installed')
  fs.rmSync(path.join(dir, 'my-aligngpt'), { recursive: true, force: true })
  const trained = run('npm', ['run', 'train'], dir, env)
  expect(/step 4 loss \d/.test(trained) && fs.existsSync(path.join(dir, 'my-aligngpt', 'model.safetensors')), trained)
  const scored = JSON.parse(fs.readFileSync(path.join(dir, 'data', 'pairs.json'), 'utf8'))
  expect(
    scored.every((pair) => Number.isInteger(pair.similarity)),
    'expected a level for each pair',
  )
  expect(run('npx', ['aligngpt', '--help'], dir, env).includes('pretrain'), 'expected the commands')
  const answer = run(
    'npx',
    ['aligngpt', 'chat', '--model', 'my-aligngpt', '--image', 'data/pictures/dog.png', 'What is this?'],
    dir,
    env,
  )
  expect(answer.length > 0, 'expected an answer')
  const { cpu, node } = JSON.parse(run('npx', ['aligngpt', 'info', '--json'], dir, env))
  return `${node}, ${cpu.level}`
}

/** Where no binary loads the error names one command, and that command is enough; node-gyp does the same. */
function fromSource(dir, env) {
  const folder = path.join(dir, 'node_modules', 'aligngpt')
  fs.rmSync(path.join(folder, 'prebuilds'), { recursive: true })
  const info = () => spawnSync('npx', ['aligngpt', 'info'], { cwd: dir, env, encoding: 'utf8' })
  const { status, stderr } = info()
  const command = /^ERR_NATIVE .*Build it from source with: (npm .*) \(needs.*\n$/.exec(stderr)?.[1]
  expect(status === 1 && command, `expected one line with the command, got ${stderr}`)
  if (values.quick) return 'its error'
  const everything = clean(process.env.PATH)
  run('sh', ['-c', command], dir, everything)
  expect(info().status === 0, info().stderr)
  const built = path.join(folder, 'build', 'Release', 'aligngpt.node')
  fs.rmSync(built)
  const nodeGyp = process.env.npm_config_node_gyp // npm's own, as every script of npm's has it
  expect(nodeGyp, 'expected npm run pack:check: npm brings node-gyp')
  run(process.execPath, [nodeGyp, 'rebuild'], folder, { ...everything, ...ownHeaders() })
  expect(fs.existsSync(built) && info().status === 0, `expected ${built} from node-gyp: ${info().stderr}`)
  return command
}

/** The executable of another version of Node, from npm. */
function otherNode(major) {
  const dir = path.join(temp, `node ${major}`)
  fs.mkdirSync(dir)
  fs.writeFileSync(path.join(dir, 'package.json'), '{}')
  const name = `node-${process.platform}-${process.arch}`
  run('npm', [...NPM, `${name}@${major}`], dir, clean(process.env.PATH))
  return path.join(dir, 'node_modules', name, 'bin', 'node')
}

const OWN = process.versions.node.split('.')[0]

/** Installs and uses the package on a version of Node; where, and in which environment. */
function onNode(tarball, major) {
  const dir = project(major, `file:${tarball}`)
  let env
  check(`Node ${major}: npm install, with node and npm alone`, () => {
    env = clean(tools(major, major === OWN ? process.execPath : otherNode(major)))
    return run('npm', NPM, dir, env).trim().split('\n')[0]
  })
  check(`Node ${major}: a user's script, then the command line`, () => use(dir, env))
  return { dir, env }
}

function main() {
  let packed
  check('npm pack', () => {
    packed = pack()
    expect(packed.size <= MEGABYTES * 1e6, `expected at most ${MEGABYTES} MB, got ${packed.size}`)
    return `${(packed.size / 1e6).toFixed(2)} MB, unpacked ${(packed.unpackedSize / 1e6).toFixed(2)} MB`
  })
  if (!packed) return
  check('list of files', () => checkList(packed.files.map((file) => file.path)))
  const bin = (name, ...args) => run(path.join(root, 'node_modules', '.bin', name), args, root, clean(process.env.PATH))
  if (process.platform === 'linux')
    check('binaries', () => run(process.execPath, ['scripts/build/prebuilds-check.mjs'], root, process.env).trim())
  check('publint', () => void bin('publint', packed.file, '--strict'))
  // CommonJS gets the one ES module, which Node can do from 20.19; other resolutions than Node's are not aimed at
  check('attw', () => void bin('attw', packed.file, '--profile', 'node16', '--ignore-rules', 'cjs-resolves-to-esm'))

  if (failures > 0) return // what is wrong with it may do harm when it runs

  const { dir, env } = onNode(packed.file, OWN)
  check('no network and no scripts', () => {
    fs.rmSync(path.join(dir, 'node_modules'), { recursive: true })
    run('npm', ['ci', '--offline', '--ignore-scripts', '--no-audit', '--no-fund'], dir, env)
    return use(dir, env)
  })
  for (const [name, test] of Object.entries(consumers(root, dir, env))) check(name, test)
  check('no binary that fits', () => fromSource(dir, env))
  const others = values['all-nodes'] ? ['20', '22', '24'].filter((major) => major !== OWN) : []
  for (const major of others) onNode(packed.file, major)

  const everything = clean(process.env.PATH)
  const checkout = project('checkout', `file:${root}`)
  check('from this checkout', () => run('npm', NPM, checkout, everything) && use(checkout, everything))
  if (values.quick) return
  const git = project('git', `git+file://${root}`)
  check('from git', () => run('npm', NPM, git, everything) && use(git, everything))
}

try {
  main()
} finally {
  fs.rmSync(temp, { recursive: true, force: true })
}
console.log(failures === 0 ? 'the package is sound' : `${failures} failed`)
process.exitCode = failures === 0 ? 0 : 1

// The floors of ts/src: which folder may import which, in one table. From it come the linter's rules in biome.json, and the table and
// the drawing in ARCHITECTURE.md. `node scripts/build/house.mjs` compares them with it (exit status 1 when they differ);
// `--write` writes them.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')

/** Folder: what it is, and the folders it may import besides itself. From the bottom up. */
export const FLOORS = {
  util: ['nothing about tensors or models: errors, JSON, files, random numbers, threads', []],
  core: ['the native boundary: handles, tensors, ops, graphs, devices', ['util']],
  nn: ['layers and optimizers, no model', ['core', 'util']],
  formats: ["other people's files, no model", ['util']],
  processing: ['text and images to numbers', ['formats', 'util']],
  models: ['networks and their configs, one file a family', ['nn', 'core', 'formats', 'processing', 'util']],
  data: ['records and batches', ['models', 'processing', 'formats', 'util']],
  levels: ['CLIP scores to alignment levels', ['data', 'models', 'processing', 'formats', 'core', 'util']],
  inference: ['tokens out', ['models', 'processing', 'formats', 'core', 'util']],
  evaluation: ['answers to numbers', ['inference', 'data', 'models', 'processing', 'formats', 'core', 'util']],
  train: [
    'one training loop, what the phases train, checkpoints, the memory plan',
    ['evaluation', 'inference', 'data', 'models', 'nn', 'core', 'formats', 'processing', 'util'],
  ],
  convert: ["other people's checkpoints, the Hub", ['models', 'nn', 'core', 'formats', 'processing', 'util']],
  report: ['HTML pages', ['train', 'levels', 'processing', 'util']],
  cli: [
    'the command line',
    [
      ...['report', 'convert', 'train', 'evaluation', 'inference', 'levels', 'data', 'models', 'processing', 'formats'],
      ...['nn', 'core', 'util'],
    ],
  ],
  entries: [
    'the public subpaths: re-exports only',
    [
      ...['report', 'convert', 'train', 'evaluation', 'inference', 'levels', 'data', 'models', 'processing', 'formats'],
      ...['nn', 'core', 'util'],
    ],
  ],
}

/** Who may load the native core itself; everybody else has tensors and ops. */
const NATIVE = ['core', 'nn', 'models', 'train', 'cli']

const restricted = (patterns) => ({
  style: { noRestrictedImports: { level: 'error', options: { patterns } } },
})

/** An override of the linter for the files of one folder. */
function override(folder, [, may]) {
  const others = Object.keys(FLOORS).filter((f) => f !== folder && !may.includes(f))
  const roots = folder === 'cli' ? [] : ['aligngpt.js', 'index.js'] // the facade is for the command line and for users
  const up = ['..', '../..', '../../..']
  const group = up.flatMap((dots) => [...others.map((f) => `${dots}/${f}/**`), ...roots.map((f) => `${dots}/${f}`)])
  const message = may.length
    ? `${folder}/ may import ${may.join(', ')} (scripts/build/house.mjs)`
    : `${folder}/ imports no other folder`
  const patterns = [{ group, message }]
  if (!NATIVE.includes(folder))
    patterns.push({
      group: up.map((dots) => `${dots}/core/native.js`),
      message:
        'the native core is for core, nn, models, train and cli; tensors and ops for all (core/tensor.js, core/ops.js)',
    })
  return { includes: [`ts/src/${folder}/**`], linter: { rules: restricted(patterns) } }
}

/** Scripts that show the package to its users see what its users see. */
const PUBLIC_ONLY = {
  includes: ['scripts/quickstart/**', 'scripts/ablate/**', 'examples/**'],
  linter: {
    rules: restricted([
      {
        group: ['**/ts/src/**'],
        message: "quickstart, ablations and examples import 'aligngpt' and its entries, as users do",
      },
    ]),
  },
}

export const overrides = () => [
  ...Object.entries(FLOORS).map(([folder, floor]) => override(folder, floor)),
  PUBLIC_ONLY,
]

/** Every import between two folders of ts/src: 'from to' -> how many. */
function imports() {
  const source = path.join(root, 'ts', 'src')
  const counts = new Map()
  for (const name of fs.readdirSync(source, { recursive: true })) {
    if (!name.endsWith('.ts')) continue
    const from = name.includes(path.sep) ? name.split(path.sep)[0] : null
    for (const [, target] of fs
      .readFileSync(path.join(source, name), 'utf8')
      .matchAll(/(?:from|import\()\s*'(\.[^']+)'/g)) {
      const to = path.relative(source, path.join(source, path.dirname(name), target)).split(path.sep)
      const key = `${from} ${to.length > 1 ? to[0] : null}`
      counts.set(key, (counts.get(key) ?? 0) + 1)
    }
  }
  return counts
}

/** The folders as a drawing that GitHub renders: an arrow for each pair of them that has imports. */
function drawing() {
  const counts = imports()
  const names = Object.keys(FLOORS).filter((f) => f !== 'cli' && f !== 'entries')
  // util is imported by all: an arrow from each would hide the others
  const arrows = names
    .flatMap((from) =>
      names.filter((to) => to !== 'util' && to !== from && counts.has(`${from} ${to}`)).map((to) => [from, to]),
    )
    .map(([from, to]) => `  ${from} --> ${to}`)
  return ['```mermaid', 'flowchart TB', ...arrows, '```'].join('\n')
}

function table() {
  const rows = Object.entries(FLOORS).map(([folder, [line, may]]) => {
    const all = folder === 'cli' ? ['everything'] : folder === 'entries' ? ['everything but cli and report'] : may
    return `| \`${folder}/\` | ${line} | ${all.join(', ') || '-'} |`
  })
  return ['| folder | what it is | may import |', '|---|---|---|', ...rows].join('\n')
}

const between = (text, name, content) => {
  const [begin, end] = [`<!-- ${name}: generated by scripts/build/house.mjs -->`, `<!-- end of ${name} -->`]
  const [from, to] = [text.indexOf(begin), text.indexOf(end)]
  if (from < 0 || to < 0) throw new Error(`ARCHITECTURE.md: expected ${begin} and ${end}`)
  return `${text.slice(0, from + begin.length)}\n${content}\n${text.slice(to)}`
}

/** File -> what it should hold. */
export function generated() {
  const biome = JSON.parse(fs.readFileSync(path.join(root, 'biome.json'), 'utf8'))
  const require = createRequire(import.meta.url)
  const bin = path.join(path.dirname(require.resolve('@biomejs/biome/package.json')), 'bin', 'biome')
  const json = JSON.stringify({ ...biome, overrides: overrides() }, null, 2)
  const { stdout, stderr, status } = spawnSync(process.execPath, [bin, 'format', '--stdin-file-path=biome.json'], {
    input: json,
    cwd: root,
    encoding: 'utf8',
  })
  if (status !== 0) throw new Error(`biome format: ${stderr}`)
  const page = fs.readFileSync(path.join(root, 'ARCHITECTURE.md'), 'utf8')
  return {
    'biome.json': stdout,
    'ARCHITECTURE.md': between(between(page, 'table of folders', table()), 'drawing', drawing()),
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  for (const [file, content] of Object.entries(generated())) {
    const where = path.join(root, file)
    if (process.argv.includes('--write')) fs.writeFileSync(where, content)
    else if (fs.readFileSync(where, 'utf8') !== content) {
      console.error(`${file} differs from scripts/build/house.mjs: node scripts/build/house.mjs --write`)
      process.exitCode = 1
    }
  }
}

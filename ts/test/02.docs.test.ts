/**
 * docs/api.md has every public name and none that is not there, with its parameters and options. The `ts` blocks of the
 * documentation compile: those of a section are one program.
 */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import ts from 'typescript'
import { expect, test } from 'vitest'
import { commandLine } from '../src/cli/main.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const read = (file: string): string => fs.readFileSync(path.join(root, file), 'utf8')
const QUOTES = 'docs/tutorial-op.md' // its blocks are pieces of the sources
const PAGES = ['README.md', ...fs.readdirSync(path.join(root, 'docs')).map((f) => `docs/${f}`)].filter(
  (f) => f.endsWith('.md') && f !== QUOTES,
)
/** The entries that are documented, and the file of each. */
const ENTRIES: Record<string, string> = Object.fromEntries(
  (JSON.parse(read('typedoc.json')).entryPoints as string[]).map((file) => [
    path.posix.join('aligngpt', path.basename(file, '.ts')).replace('/index', ''),
    file,
  ]),
)

/** The program of each section of a page, by a name for messages: page and line of the heading. */
function programsOf(page: string): [name: string, text: string][] {
  let line = 1
  return read(page)
    .split(/^(?=## )/m)
    .map((section): [string, string] => {
      const name = `${page}.${line}.ts`
      line += section.split('\n').length - 1
      return [name, [...section.matchAll(/^```ts\n(.*?)^```$/gms)].map(([, text]) => text).join('')]
    })
    .filter(([, text]) => text !== '')
}

const programs = new Map(PAGES.flatMap(programsOf).map(([name, text]) => [path.join(root, name), text]))
const { config } = ts.readConfigFile(path.join(root, 'tsconfig.json'), ts.sys.readFile)
const { options } = ts.parseJsonConfigFileContent(config, ts.sys, root)
options.noUnusedLocals = false
const host = ts.createCompilerHost(options)
const { getSourceFile, fileExists } = host
host.fileExists = (file) => programs.has(file) || fileExists(file)
host.getSourceFile = (file, version, ...rest) => {
  const text = programs.get(file)
  return text === undefined ? getSourceFile(file, version, ...rest) : ts.createSourceFile(file, text, version, true)
}
const files = [...programs.keys(), ...Object.values(ENTRIES).map((f) => path.join(root, f))]
const program = ts.createProgram(files, options, host)
const checker = program.getTypeChecker()

test('the programs of the documentation compile', () => {
  expect(programs.size).toBeGreaterThan(5)
  const wrong = [...programs].flatMap(([file, text]) => {
    const source = program.getSourceFile(file) as ts.SourceFile
    return [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)].map((d) => {
      const line = text.split('\n')[source.getLineAndCharacterOfPosition(d.start ?? 0).line]
      return `${path.relative(root, file)}: ${line}: ${ts.flattenDiagnosticMessageText(d.messageText, ' ')}`
    })
  })
  expect(wrong).toEqual([])
})

/** As the page writes them: '' for a needed one, `?` for one that is not, `...` for any number; null: no function. */
type Parameters = string | null
type Names = Map<string, Parameters>
const resolved = (s: ts.Symbol): ts.Symbol => (s.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(s) : s)
const exportsOf = (file: ts.SourceFile): ts.Symbol[] =>
  checker.getExportsOfModule(checker.getSymbolAtLocation(file) as ts.Symbol)

const mark = (p: ts.ParameterDeclaration): string => {
  if (p.dotDotDotToken) return '...'
  return p.questionToken || p.initializer ? '?' : ''
}
const signature = (list: readonly ts.ParameterDeclaration[]): string => `(${list.map(mark)})`

function parametersOf({ valueDeclaration: d }: ts.Symbol): Parameters {
  const f = d && ts.isVariableDeclaration(d) ? d.initializer : d
  if (!f || !ts.isFunctionLike(f) || ts.isAccessor(f)) return null
  return signature(f.parameters as ts.NodeArray<ts.ParameterDeclaration>)
}

/** Declared in this package, and not private. */
function isPublic(s: ts.Symbol): boolean {
  const d = s.valueDeclaration
  if (!d?.getSourceFile().fileName.includes('/ts/src/') || /^_|#/.test(s.name)) return false
  return !(ts.getCombinedModifierFlags(d) & (ts.ModifierFlags.Private | ts.ModifierFlags.Protected))
}

/** What a class offers: methods and accessors have to be on the page, fields and the constructor may be. */
function membersOf(name: string, symbol: ts.Symbol): { needed: Names; allowed: Names } {
  const [needed, allowed]: [Names, Names] = [new Map(), new Map()]
  const add = (member: string, s: ts.Symbol): void => {
    if (isPublic(s)) (s.flags & ts.SymbolFlags.Property ? allowed : needed).set(member, parametersOf(s))
  }
  for (const s of checker.getDeclaredTypeOfSymbol(symbol).getProperties()) add(`${name}#${s.name}`, s)
  for (const s of symbol.exports?.values() ?? []) if (s.name !== 'prototype') add(`${name}.${s.name}`, s)
  const d = symbol.members?.get(ts.InternalSymbolName.Constructor)?.declarations?.[0]
  if (d && ts.isConstructorDeclaration(d)) allowed.set(`new ${name}`, signature(d.parameters))
  return { needed, allowed }
}

/** Every value that an entry exports, namespaces and classes opened. */
function exportedBy(entry: string): { needed: Names; allowed: Names } {
  const [needed, allowed]: [Names, Names] = [new Map(), new Map()]
  const visit = (file: ts.SourceFile, prefix: string): void => {
    for (const s of exportsOf(file)) {
      const [symbol, name] = [resolved(s), prefix + s.name]
      if (symbol.flags & ts.SymbolFlags.ValueModule) visit(symbol.valueDeclaration as ts.SourceFile, `${name}.`)
      const typeOnly = s.declarations?.some((d) => ts.isExportSpecifier(d) && ts.isTypeOnlyExportDeclaration(d))
      if (typeOnly || !(symbol.flags & ts.SymbolFlags.Value)) continue
      needed.set(name, parametersOf(symbol))
      if (prefix || !(symbol.flags & ts.SymbolFlags.Class)) continue
      const members = membersOf(name, symbol)
      for (const [n, p] of members.needed) needed.set(n, p)
      for (const [n, p] of members.allowed) allowed.set(n, p)
    }
  }
  visit(program.getSourceFile(path.join(root, ENTRIES[entry])) as ts.SourceFile, '')
  return { needed, allowed }
}

/** A name as the page writes it, `load(folder, options?)`, below the heading of a class or a namespace. */
function parse(code: string, owner: string | null, needed: Names): [name: string, parameters: Parameters] {
  const [, own, list] = /^([^(]+)(?:\((.*)\))?$/.exec(code) ?? [code, code]
  const marks = list?.split(', ').map((p) => (p.startsWith('...') ? '...' : p.endsWith('?') ? '?' : ''))
  const parameters = list === undefined ? null : `(${marks})`
  if (!owner || own.startsWith('new ') || own.startsWith(`${owner}.`)) return [own, parameters]
  return [needed.has(`${owner}.${own}`) ? `${owner}.${own}` : `${owner}#${own}`, parameters]
}

/** Names of a section: its headings, and the first column of the tables below a class or a namespace. */
function namesIn(section: string, needed: Names): Names {
  const names: Names = new Map()
  let owner: string | null = null
  for (const line of section.replaceAll(/^```.*?^```$/gms, '').split('\n')) {
    const heading = /^### `(.*)`$/.exec(line)?.[1]
    if (heading) owner = null
    const first = heading ? `\`${heading}\`` : /^\| (`.*?`) \|/.exec(line)?.[1]
    for (const [, code] of first?.matchAll(/`(.*?)`/g) ?? []) names.set(...parse(code, owner, needed))
    if (heading && !heading.includes('(')) owner = heading
  }
  return names
}

const sectionsOf = (page: string): Map<string, string> =>
  new Map(
    read(page)
      .split(/^## /m)
      .slice(1)
      .map((text) => [text.slice(0, text.indexOf('\n')), text]),
  )
const sections = sectionsOf('docs/api.md')

test('docs/api.md has a section for each entry', () => {
  expect([...sections.keys()].sort()).toEqual(Object.keys(ENTRIES).sort())
})

for (const entry of Object.keys(ENTRIES))
  test(`docs/api.md has the names of ${entry}, with their parameters, and no others`, () => {
    const { needed, allowed } = exportedBy(entry)
    const written = namesIn(sections.get(entry) as string, needed)
    const there = new Map([...allowed, ...needed])
    const differ = [...written].filter(([name, p]) => p !== null && p !== there.get(name))
    expect([...needed.keys()].filter((name) => !written.has(name))).toEqual([])
    expect([...written.keys()].filter((name) => !there.has(name))).toEqual([])
    expect(differ.map(([name, p]) => `${name}${p}, in the code ${there.get(name)}`)).toEqual([])
    expect(
      [...needed].filter(([name, p]) => p !== null && !name.startsWith('nn.') && written.get(name) === null),
    ).toEqual([])
    const examples = [...programs].filter(([file]) => path.basename(file).startsWith('api.md')).map(([, text]) => text)
    const values = [...needed.keys()].filter((name) => !/[#.]/.test(name))
    expect(values.filter((name) => !new RegExp(`\\b${name}\\b`).test(examples.join('\n')))).toEqual([])
  })

test('docs/api.md has the options of each function', () => {
  const types = new Map(
    Object.values(ENTRIES).flatMap((f) =>
      exportsOf(program.getSourceFile(path.join(root, f)) as ts.SourceFile).map((s) => [s.name, resolved(s)]),
    ),
  )
  const lists = [
    ...read('docs/api.md').matchAll(
      /^[^\n]* \(`(\w+(?:Options|Request))`[^\n]*(?:\n[^\n-][^\n]*)*\n\n((?:[- ] [^\n]+\n)+)/gm,
    ),
  ]
  expect(lists.length).toBeGreaterThan(10)
  for (const [, name, list] of lists) {
    const written = [...list.matchAll(/^- (`.*?`(?:, `.*?`)*)(?::|$)/gm)].flatMap(
      ([, codes]) => codes.match(/\w+/g) ?? [],
    )
    const symbol = types.get(name)
    const there =
      symbol &&
      checker
        .getDeclaredTypeOfSymbol(symbol)
        .getProperties()
        .map((s) => s.name)
    expect([name, ...written.sort()]).toEqual([name, ...(there ?? []).sort()])
  }
})

test('docs/cli.md has each command, and no flag that its command lacks', () => {
  const visible = commandLine().createHelp().visibleCommands(commandLine())
  const flags = new Map(visible.map((c) => [c.name(), c.options.map((o) => o.long)]))
  flags.delete('help')
  const texts = sectionsOf('docs/cli.md')
  for (const title of ['Exit statuses', 'Environment']) expect(texts.delete(title)).toBe(true)
  expect([...texts.keys()].sort()).toEqual([...flags.keys()].sort())
  // what is said of both training commands stands below the second
  flags.get('finetune')?.push(...(flags.get('pretrain') ?? []))
  for (const [name, text] of texts) {
    const unknown = (text.match(/(?<=[\s`])--[a-z-]+/g) ?? []).filter((f) => !flags.get(name)?.includes(f))
    expect([name, ...unknown]).toEqual([name])
  }
})

/** Where a heading of a page is linked to, as GitHub makes it. */
const anchor = (heading: string): string =>
  heading
    .toLowerCase()
    .replaceAll(/[^\w\s-]/g, '')
    .replaceAll(' ', '-')

test('links of the documentation lead somewhere', () => {
  const pages = [...PAGES, QUOTES, 'ARCHITECTURE.md', 'CONTRIBUTING.md']
  const broken = pages.flatMap((page) =>
    [...read(page).matchAll(/\]\(([^)\s]*)\)/g)].flatMap(([, link]) => {
      if (/^https?:/.test(link)) return []
      const [file, place] = link.split('#')
      const target = file ? path.join(path.dirname(page), file) : page
      if (!fs.existsSync(path.join(root, target))) return [`${page}: ${link}`]
      const headings = place ? [...read(target).matchAll(/^#+ (.*)$/gm)].map(([, heading]) => anchor(heading)) : []
      return place && !headings.includes(place) ? [`${page}: ${link}`] : []
    }),
  )
  expect(broken).toEqual([])
})

test('docs/core.md shows examples/core.ts, and what it prints', () => {
  const [, code, printed] = /^```ts\n(.*?)^```\n\n```\n(.*?)^```$/ms.exec(read('docs/core.md')) ?? []
  expect(code).toBe(read('examples/core.ts'))
  const args = ['--import', 'tsx', 'examples/core.ts']
  const { stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8' })
  expect(stderr).toBe('')
  // a loss rounds in its own way at each CPU level
  const form = (text: string): string => text.replaceAll(/loss \S+/g, 'loss')
  expect(form(stdout)).toBe(form(printed))
})

test('lines of the documentation have at most 120 characters', () => {
  // numbers and generated tables
  const wide = ['docs/benchmarks.md', 'docs/config.md', 'docs/cuda.md']
  const pages = ['ARCHITECTURE.md', 'CONTRIBUTING.md', 'SECURITY.md', ...PAGES.filter((page) => !wide.includes(page))]
  const long = pages.flatMap((page) =>
    read(page)
      .replaceAll(/^<!-- .* generated .*?^<!-- end/gms, '')
      .split('\n')
      .filter((line) => line.length > 120)
      .map((line) => `${page}: ${line}`),
  )
  expect(long).toEqual([])
})

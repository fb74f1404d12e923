/**
 * docs/training.md is true: its commands run in its order, in an empty folder, and print what it shows, numbers aside. Small is what
 * they work on: models of the parity tests, a fortieth of the data, and the settings of SMALLER.
 */
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))
const models = path.join(root, 'ts/test/golden/base/model')
const dir = fs.realpathSync(fs.mkdtempSync(path.join(os.tmpdir(), 'walk ')))
afterAll(() => fs.rmSync(dir, { recursive: true }))

/** Settings that little data needs otherwise; each has to occur. */
const SMALLER: [string, string][] = [
  ['--batch 64', '--batch 8'],
  ['--save-every 60', '--save-every 12'],
  ['--eval-every 80', '--eval-every 4'],
]

type Step = { write: string; text: string } | { edit: string; diff: string } | { command: string; shown: string[] }

/** Files, changes to them and commands of a document, in order; blocks of other kinds are not run. */
function stepsOf(markdown: string): Step[] {
  return [...markdown.matchAll(/^```(\w+)(?: (\S+))?\n(.*?)^```$/gms)].flatMap(([, kind, file, text]): Step[] => {
    if (kind === 'js') return [{ write: file, text }]
    if (kind === 'diff') return [{ edit: file, diff: text }]
    if (kind !== 'console') return []
    const commands = text.replaceAll('\\\n', '').split(/^\$ /m).slice(1)
    return commands.map((c) => {
      const [command, ...shown] = c.trimEnd().split('\n')
      return { command, shown }
    })
  })
}

/** What has to be the same in a line whatever the data are: words and form, not numbers, bars, folders and what a model says. */
function form(line: string): string {
  return line
    .replace(/, the best so far$/, '')
    .replace(/(\[image\]) \S.*(?=\/pictures\/)/, '$1 ')
    .replace(/"(text|given|answer|question|prompt|image|caption|finish|kind)":"[^"]*"/g, '"$1":""')
    .replace(/\b(true|false)\b/g, 'true')
    .replace(/pictures\/[\w-]+\.webp/, 'pictures/')
    .replace(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?( %| [KM]\b| [MG]iB)?|(?<= )-(?= |$)/g, '0')
    .replace(/#+/g, '#')
    .replace(/\s+/g, ' ')
    .trim()
}

/** Lines of a document that a command did not print. `...` stands for any lines, or the rest of one. */
function missing(shown: readonly string[], printed: string): string[] {
  const lines = printed.split('\n').map(form)
  return shown
    .filter((line) => line !== '' && line !== '...' && line !== '^C')
    .filter((line) => {
      if (!line.endsWith('...')) return !lines.includes(form(line))
      const [keys, got] = [line, printed].map((text): string[] => text.match(/"\w+"(?=:)/g) ?? [])
      return !keys.length || keys.some((k) => !got.includes(k))
    })
}

/** Runs a command line; `stopAt`: Ctrl-C as soon as this is printed. */
function shell(command: string, stopAt: string | null): Promise<{ status: number | null; printed: string }> {
  return new Promise((resolve) => {
    const env = { ...process.env, PATH: `${dir}/bin:${process.env.PATH}` }
    const child = spawn('bash', ['-c', command], { cwd: dir, env, detached: true }) // a group of its own, as a terminal makes
    let [printed, stopped] = ['', false]
    const read = (d: Buffer): void => {
      printed += d
      if (stopAt === null || stopped || !printed.includes(stopAt)) return
      stopped = true
      process.kill(-(child.pid as number), 'SIGINT')
    }
    child.stdout.on('data', read)
    child.stderr.on('data', read)
    child.on('close', (status) => resolve({ status, printed }))
  })
}

/** The folder before the first command: models, packages and a `npx` that runs this checkout. */
function prepare(): void {
  const link = (to: string, from: string): void => {
    fs.mkdirSync(path.dirname(path.join(dir, from)), { recursive: true })
    fs.symlinkSync(to, path.join(dir, from))
  }
  for (const tower of ['llm', 'clip']) link(path.join(models, tower), `models/${tower}`)
  const pictures = path.join(root, 'node_modules/@lobehub/fluent-emoji-3d/assets')
  link(pictures, 'pictures')
  const names = 'node_modules/emojibase-data/en/data.json'
  const all = JSON.parse(fs.readFileSync(path.join(root, names), 'utf8')) as { hexcode: string }[]
  fs.mkdirSync(path.join(dir, path.dirname(names)), { recursive: true })
  const some = all.filter((e, i) => i % 40 === 8 || e.hexcode === '2639' || e.hexcode === '1FAE9')
  fs.writeFileSync(path.join(dir, names), JSON.stringify(some))
  const cli = `exec "${process.execPath}" --import "${import.meta.resolve('tsx')}" "${root}ts/src/cli.ts" "$@"`
  fs.mkdirSync(path.join(dir, 'bin'))
  fs.writeFileSync(path.join(dir, 'bin/npx'), `#!/bin/sh\nshift\n${cli}\n`, { mode: 0o755 })
}

const change = (file: string, edit: (text: string) => string): void => {
  const at = path.join(dir, file)
  fs.writeFileSync(at, edit(fs.readFileSync(at, 'utf8')))
}

beforeAll(prepare)

test('the commands of docs/training.md do what it shows', async () => {
  let small = fs.readFileSync(path.join(root, 'docs/training.md'), 'utf8')
  for (const [given, smaller] of SMALLER) {
    expect(small).toContain(given)
    small = small.replaceAll(given, smaller)
  }
  const steps = stepsOf(small)
  let [ran, status] = [0, 0 as number | null]
  for (const [i, step] of steps.entries()) {
    if ('write' in step) fs.writeFileSync(path.join(dir, step.write), step.text)
    else if ('edit' in step)
      change(step.edit, (text) => {
        const side = (sign: string): string =>
          [...step.diff.matchAll(/^([-+])(.*\n)/gm)].map((m) => (m[1] === sign ? m[2] : '')).join('')
        expect(text).toContain(side('-'))
        return text.replace(side('-'), () => side('+'))
      })
    else if (step.command === 'echo $?')
      expect(String(status), steps[i - 1] && JSON.stringify(steps[i - 1])).toBe(step.shown[0])
    else {
      const stops = step.shown.includes('^C')
      const result = await shell(step.command, stops ? 'step 1/' : null)
      const asked = steps[i + 1]
      const expected = stops ? 130 : asked && 'command' in asked && asked.command === 'echo $?' ? 1 : 0
      status = result.status
      expect(status, `${step.command}\n${result.printed}`).toBe(expected)
      // what a model says is its own affair
      const shown = /aligngpt chat/.test(step.command) ? step.shown.slice(1) : step.shown
      expect(missing(shown, result.printed), `${step.command}\nprinted\n${result.printed}\nbut not`).toEqual([])
      ran++
    }
  }
  expect(ran).toBeGreaterThan(18)
})

test('its table of plans is what plan says', async () => {
  const text = fs.readFileSync(path.join(root, 'docs/training.md'), 'utf8')
  const rows = [...text.matchAll(/^\|[^|]+\| `(plan [^`]+)` \| ([\d.]+) GiB \| (\d+) \|$/gm)]
  expect(rows.length).toBeGreaterThan(5)
  const printed = await Promise.all(rows.map(([, command]) => shell(`npx aligngpt ${command}`, null)))
  for (const [i, [, command, memory, batch]] of rows.entries()) {
    const said = printed[i].printed
    expect(Number(/on the device at once +([\d.]+) GiB/.exec(said)?.[1]).toFixed(1), `${command}\n${said}`).toBe(memory)
    expect(said).toMatch(new RegExp(`largest micro-batch in .*: ${batch}\n`))
  }
})

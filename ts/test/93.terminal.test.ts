/** Commands at a terminal and in a pipe: output that nobody reads or that has no room, paths that are none, words of other tools. */
import { spawn, spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openLines } from '../src/cli/line-file.js'
import { commandLine } from '../src/cli/main.js'
import { flagOf } from '../src/cli/settings.js'
import { hint, WORDS } from '../src/cli/words.js'
import { SETTINGS } from '../src/train/run-settings.js'
import { fileToWrite, folderToWrite } from '../src/util/paths.js'

const root = fileURLToPath(new URL('../../', import.meta.url))
const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const model = path.join(base, 'model/aligngpt')
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'terminal test '))
const at = (name: string): string => path.join(dir, name)
beforeAll(() => {
  fs.writeFileSync(at('file'), 'yesterday\n')
  fs.mkdirSync(at('folder'))
  fs.symlinkSync(at('nowhere'), at('dangling'))
  fs.writeFileSync(at('q.jsonl'), `${JSON.stringify({ prompt: 'What?', question_id: 7 })}\n{"prompt": 5}\n`)
})
afterAll(() => fs.rmSync(dir, { recursive: true }))

interface Ended {
  status: number | null
  out: string
  err: string
}
/** Runs the command line; `stdout` may be a descriptor, or `closed`: nobody reads it. */
function aligngpt(args: readonly string[], stdout: number | 'pipe' | 'closed' = 'pipe', env = {}): Promise<Ended> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], {
      ...{ cwd: root, env: { ...process.env, ...env } },
      stdio: ['ignore', typeof stdout === 'number' ? stdout : 'pipe', 'pipe'],
    })
    let [out, err] = ['', '']
    if (stdout === 'closed') child.stdout?.destroy()
    child.stdout?.on('data', (d) => {
      out += d
    })
    child.stderr?.on('data', (d) => {
      err += d
    })
    child.on('close', (status) => resolve({ status, out, err }))
  })
}
const full = (): number => fs.openSync('/dev/full', 'w')
const oneLine = (text: string): void => expect(text.trimEnd()).not.toMatch(/\n/)

describe.skipIf(process.platform === 'win32')('output that cannot be written', () => {
  test('is the end of a command that makes nothing else: one line and 1, or 141 where the reader went away', async () => {
    const asked = [['info'], ['--help']] as const
    const ended = await Promise.all(asked.flatMap((a) => [aligngpt(a, full()), aligngpt(a, 'closed')]))
    for (const [i, { status, err }] of ended.entries()) {
      if (i % 2) expect([status, err]).toEqual([141, ''])
      else {
        expect(status).toBe(1)
        expect(err).toMatch(/^ERR_FILE \[output\] standard output: .*ENOSPC/)
        oneLine(err)
      }
    }
  })
  test.for(['closed', 'full'] as const)('does not end a training run: %s', async (kind) => {
    const out = at(`run ${kind}`)
    const from = ['--llm', `${base}/model/llm`, '--clip', `${base}/model/clip`, '--out', out, '--batch', '4']
    const data = ['--data', `${base}/data_phase1.json`, '--images', `${base}/images`, '--steps', '6']
    const { status, err } = await aligngpt(['pretrain', ...from, ...data], kind === 'full' ? full() : 'closed')
    expect(status, err).toBe(0)
    expect(err.match(/standard output: /g)).toHaveLength(1)
    expect(err).not.toMatch(/\n\s+at /)
    expect(fs.readFileSync(path.join(out, 'log.jsonl'), 'utf8').trim().split('\n')).toHaveLength(6)
    expect(fs.existsSync(path.join(out, 'config.json'))).toBe(true)
  })
})

describe('--out of generate', () => {
  const generate = (...args: string[]): Promise<Ended> =>
    aligngpt(['generate', at('q.jsonl'), '--model', model, '--max-new-tokens', '2', ...args])
  const parts = (): string[] => fs.readdirSync(dir).filter((name) => name.includes('.part'))
  test('is replaced when all is there: the bad question in its place, status 1', async () => {
    const { status, err } = await generate('--out', at('file'))
    expect(status).toBe(1)
    expect(err).toMatch(/not answered: .*record 1.* prompt: expected a string, got 5\n1 of 2 questions not answered/)
    const lines = fs.readFileSync(at('file'), 'utf8').trim().split('\n')
    expect(lines.map((l) => JSON.parse(l))).toEqual([
      expect.objectContaining({ question_id: 7, prompt: 'What?', text: expect.any(String) }),
      { prompt: 5, error: expect.stringContaining('expected a string') },
    ])
    expect(parts()).toEqual([])
  })
  test('keeps what it has where the model cannot be loaded, and where it cannot be written', async () => {
    fs.writeFileSync(at('old'), 'yesterday\n')
    const { status, err } = await aligngpt(['generate', at('q.jsonl'), '--model', at('folder'), '--out', at('old')])
    expect(status).toBe(1)
    oneLine(err)
    for (const [name, got] of [
      ['folder', 'a folder'],
      ['dangling', 'a link that leads nowhere'],
      ['none/a.jsonl', 'no folder'],
      ['file/a.jsonl', 'no folder|a file where a folder'],
    ])
      expect(() => openLines('generate', '--out', at(name))).toThrow(
        new RegExp(`--out .* expected a file to write, got ${got}`),
      )
    expect(fs.readFileSync(at('old'), 'utf8')).toBe('yesterday\n')
    expect(parts()).toEqual([])
  })
  test.skipIf(process.platform !== 'linux')(
    'may be a device or standard output, which stay what they are',
    async () => {
      const [nothing, dash] = await Promise.all([generate('--out', '/dev/null'), generate('--out', '-')])
      expect([nothing.status, dash.status]).toEqual([1, 1])
      expect(fs.statSync('/dev/null').isCharacterDevice()).toBe(true)
      expect(dash.out.trim().split('\n')).toHaveLength(2)
    },
  )
})

describe('paths that are named', () => {
  const said = (check: () => unknown): string => {
    try {
      check()
    } catch (e) {
      const { code, message } = e as { code: string; message: string }
      expect(code).toBe('ERR_FILE')
      oneLine(message)
      return message.replace(/.*, got /, '')
    }
    return 'taken'
  }
  const linux = process.platform === 'linux'
  test.for<[string, string, RegExp, RegExp]>([
    ['a file', 'file', /^taken/, /^a file$/],
    ['a folder', 'folder', /^a folder$/, /^taken/],
    ['a new name', 'new', /^taken/, /^taken/],
    ['in a folder that is not there', 'no/new', /^no folder/, /^taken/],
    ['below a file', 'file/new', /no folder|a folder of the path/, /a folder of the path/],
    ['a dangling link', 'dangling', /leads nowhere/, /leads nowhere/],
    ['too long', 'x'.repeat(300), /too long|taken/, /too long/],
    ['with a line break', 'a\nb', /^taken/, /^taken/],
  ])('%s', ([, name, file, folder]) => {
    expect(said(() => fileToWrite('test', '--out', at(name)))).toMatch(file)
    expect(said(() => folderToWrite('test', '--to', at(name)))).toMatch(folder)
    expect(fs.existsSync(at('no'))).toBe(false)
    expect(fs.existsSync(at('new'))).toBe(false)
  })
  test('no name at all', () => {
    expect(said(() => fileToWrite('test', '--out', ''))).toBe('no name')
    expect(said(() => folderToWrite('test', '--to', ''))).toBe('no name')
  })
  test.skipIf(!linux)('/proc, where folders cannot be made, and circles of links', () => {
    expect(said(() => folderToWrite('test', '--to', '/proc/x'))).toMatch(/ENOENT|permission/)
    fs.symlinkSync(at('circle'), at('circle'))
    expect(said(() => fileToWrite('test', '--out', at('circle')))).toMatch(/circle|nowhere/)
    expect(said(() => folderToWrite('test', '--to', at('circle')))).toMatch(/circle|nowhere/)
  })
  test.skipIf(process.getuid?.() !== 0)('a folder that an ordinary user may not write into', () => {
    fs.chmodSync(dir, 0o755)
    const script = `import { fileToWrite, folderToWrite } from './ts/src/util/paths.ts'
      process.setuid(65534)
      for (const [check, name] of [[fileToWrite, 'x'], [fileToWrite, 'file'], [folderToWrite, 'folder'], [folderToWrite, 'x/y']])
        try { check('test', '--out', ${JSON.stringify(dir)} + '/' + name); console.log('taken') } catch (e) { console.log(e.message) }`
    const r = spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { cwd: root })
    const lines = r.stdout.toString().trim().split('\n')
    expect(lines, r.stderr.toString()).toHaveLength(4)
    for (const line of lines) expect(line).toMatch(/no permission \(EACCES\)$/)
  })
  test.each([
    [['eval', 'q', '--model', 'https://huggingface.co/x'], 2, 'an address'],
    [['export', model, '--format', 'aligngpt', '--to', at('file')], 1, 'expected a folder to write into, got a file'],
  ] as const)('%j', async (args, status, message) => {
    const ended = await aligngpt(args)
    expect(ended.status).toBe(status)
    expect(ended.err).toContain(message)
    expect(ended.err).not.toMatch(/(E[A-Z]+) \1|\n\s+at /)
  })
})

describe('words of other tools', () => {
  const program = commandLine()
  const flags = new Set(program.commands.flatMap((c) => c.options.map((o) => o.long)))
  test.for(Object.entries(WORDS))('%s leads to one of ours', ([word, { ours, note = '' }]) => {
    expect(word).toMatch(/^[a-z0-9]+$/)
    const named = [...(ours === null ? [] : [ours]), ...Array.from(note.matchAll(/\{([\w.]+)\}/g), (m) => m[1])]
    for (const key of named) expect(flags, key).toContain(flagOf({ key }))
    expect(ours !== null || note !== '').toBe(true)
  })
  /** What a command says to a flag. */
  const told = (...args: string[]): string => {
    const said: string[] = []
    const program = commandLine()
    for (const c of [program, ...program.commands]) {
      c.exitOverride()
      c.configureOutput({ writeErr: (t) => void said.push(t) })
    }
    expect(() => program.parse(['node', 'aligngpt', ...args])).toThrow()
    return said.join('').split('\n')[0]
  }
  test.for([
    [['finetune', '--learning_rate', '1e-5'], "unknown option '--learning_rate' (here it is --lr)"],
    [['finetune', '--learning-rate=1e-5'], "unknown option '--learning-rate' (here it is --lr)"],
    [['finetune', '--learningRate', '1'], "unknown option '--learningRate' (here it is --lr)"],
    [['finetune', '--micro_batch', '1'], "unknown option '--micro_batch' (the nearest: --micro-batch)"],
    [['finetune', '--per_device_train_batch_size', '1'], 'here it is --batch; samples of a whole step'],
    [['finetune', '--bf16', 'True'], 'here it is --dtype; bf16 in place of true'],
    [['finetune', '--deepspeed', 'zero3.json'], 'here there is none: a run has one device; --optimizer-state'],
    [['finetune', '--stps', '1'], 'the nearest: --steps'],
    [['generate', 'q', '--model', 'm', '--num_beams', '3'], 'here there is none: there is no beam search'],
    [['generate', 'q', '--model_path', 'm'], "unknown option '--model_path' (here it is --model"],
    [['generate', 'q', '--model', 'm', '--answers-file', 'a'], 'here it is --out'],
    [['export', 'm', '--format', 'llava', '--output_dir', 'a'], 'here it is --to'],
  ] as const)('%j', ([args, message]) => expect(told(...args)).toContain(message))
  test('no hint where nothing is meant', () => {
    expect(told('finetune', '--zzzzzz', '1')).toBe("error: unknown option '--zzzzzz'")
    expect(hint('gate', ['lr', 'batch'], (k) => k)).toBeUndefined()
  })
  test.for([
    ['learning_rate', 'here it is lr'],
    ['num_train_epochs', 'here it is epochs'],
    ['gradient_checkpointing', 'here it is recompute'],
    ['warmup_steps', 'here it is warmupRatio; a share of the steps'],
    ['lr_scheduler_type', 'here there is none'],
    ['loraR', 'here it is lora.rank'],
  ])('as a key of a config: %s', ([key, message]) =>
    expect(hint(key, [...SETTINGS.map((s) => s.key)], (k) => k)).toMatch(message),
  )
})

/** Downloads, from a small server that speaks the part of the Hub's interface they use: resumed, pinned, verified, refused. */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import http from 'node:http'
import type { AddressInfo } from 'node:net'
import os from 'node:os'
import path from 'node:path'
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest'
import { type DownloadOptions, downloadRepo, readDownloadManifest } from '../src/convert/hub.js'

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'hub test '))
let folder = ''
let count = 0
beforeEach(() => {
  folder = path.join(scratch, `${count++}`)
  Object.assign(hub, { main: FIRST, cutAfter: [], token: null, lies: null, gone: false })
  hub.requests.length = 0
})
afterAll(() => fs.rmSync(scratch, { recursive: true }))

const [FIRST, SECOND] = ['a'.repeat(40), 'b'.repeat(40)]
const bytes = (n: number, seed: number): Buffer =>
  Buffer.from(Array.from({ length: n }, (_, i) => (i * 31 + seed + (i >> 8)) % 256))
const WEIGHTS = bytes(3_000_000, 1)
const common = { 'config.json': Buffer.from('{"a": 1}'), 'sub/dir/vocab.txt': Buffer.from('words\n') }
const commits: Record<string, Record<string, Buffer>> = {
  [FIRST]: { ...common, 'model.safetensors': WEIGHTS, 'tf_model.h5': bytes(10, 2), 'pytorch_model.bin': bytes(10, 3) },
  [SECOND]: { ...common, 'config.json': Buffer.from('{"a": 2}'), 'model-00001-of-00001.safetensors': bytes(2000, 4) },
}
const sha256 = (b: Buffer): string => createHash('sha256').update(b).digest('hex')
const gitSha = (b: Buffer): string => createHash('sha1').update(`blob ${b.length}\0`).update(b).digest('hex')

/** How the server behaves. */
const hub = {
  main: FIRST,
  /** bytes after which the next transfers of the weights break off */
  cutAfter: [] as number[],
  token: null as string | null,
  /** bytes in place of the config's */
  lies: null as Buffer | null,
  gone: false,
  requests: [] as string[],
}

function answer(req: http.IncomingMessage, res: http.ServerResponse): unknown {
  const url = new URL(req.url as string, 'http://hub')
  hub.requests.push(`${url.pathname} ${req.headers.range ?? ''}`.trim())
  const status = (code: number, name = ''): void =>
    void res.writeHead(code, name ? { 'X-Error-Code': name } : {}).end('{}')
  const json = (value: unknown): void =>
    void res.writeHead(200, { 'Content-Type': 'application/json' }).end(JSON.stringify(value))
  if (hub.token && req.headers.authorization !== `Bearer ${hub.token}`) return status(401)
  const [, info, tree, at, name] =
    /^\/api\/(?:models|datasets)\/own\/tiny\/(?:revision\/(\w+)|tree\/(\w+))$|^(?:\/datasets)?\/own\/tiny\/resolve\/(\w+)\/(.+)$/.exec(
      url.pathname,
    ) ?? []
  const files = commits[tree ?? at]
  if (info) {
    const sha = info === 'main' ? hub.main : commits[info] ? info : null
    return sha && !hub.gone ? json({ _id: '1', id: 'own/tiny', sha }) : status(404, 'RevisionNotFound')
  }
  if (tree && files) {
    const list = Object.entries(files).map(([p, b]) => {
      const lfs = b.length > 1000 && { lfs: { oid: sha256(b), size: b.length, pointerSize: 130 } }
      return { type: 'file', path: p, size: b.length, oid: gitSha(b), ...lfs }
    })
    return json([{ type: 'directory', path: 'sub', size: 0, oid: '0' }, ...list])
  }
  if (!files?.[name]) return status(404, name ? 'EntryNotFound' : 'RepoNotFound')
  return sendFile(req, res, name, name === 'config.json' && hub.lies ? hub.lies : files[name])
}

function sendFile(req: http.IncomingMessage, res: http.ServerResponse, name: string, body: Buffer): void {
  const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(req.headers.range ?? '') ?? []
  const [start, end] = from ? [Number(from), Math.min(Number(to) + 1, body.length)] : [0, body.length]
  const headers = { ETag: '"x"', 'Content-Length': end - start }
  res.writeHead(
    from ? 206 : 200,
    from ? { ...headers, 'Content-Range': `bytes ${start}-${end - 1}/${body.length}` } : headers,
  )
  const cut = name === 'model.safetensors' && end - start > 1 ? hub.cutAfter.shift() : undefined
  if (cut === undefined) return void res.end(body.subarray(start, end))
  res.write(body.subarray(start, start + cut), () => setTimeout(() => res.destroy(), 20))
}

const server = http.createServer(answer)
let endpoint = ''
beforeAll(async () => {
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  endpoint = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
})
afterAll(() => server.close())

const get = (o: DownloadOptions = {}) => downloadRepo('own/tiny', folder, { endpoint, pause: 1, ...o })
const read = (name: string): Buffer => fs.readFileSync(path.join(folder, name))
const transfers = (): string[] => hub.requests.filter((r) => r.includes('/resolve/') && !r.endsWith('bytes=0-0'))

test('fetches what is wanted, pins the commit, says sizes and hashes; again, nothing is fetched', async () => {
  const said: string[] = []
  const seen: [number, number][] = []
  const m = await get({ onMessage: (t) => said.push(t), onProgress: (done, total) => seen.push([done, total]) })
  expect(said).toEqual(['not fetched (name them with include): tf_model.h5, pytorch_model.bin'])
  expect(read('model.safetensors').equals(WEIGHTS)).toBe(true)
  expect(read('sub/dir/vocab.txt').toString()).toBe('words\n')
  expect(m).toMatchObject({ repo: 'own/tiny', revision: 'main', commit: FIRST, endpoint })
  expect(m.files.map((f) => [f.path, f.size, f.sha256])).toEqual(
    ['config.json', 'sub/dir/vocab.txt', 'model.safetensors'].map((n) => [n, read(n).length, sha256(read(n))]),
  )
  expect(readDownloadManifest(folder)).toEqual(m)
  const total = 3_000_000 + 8 + 6
  expect(seen.every(([, t]) => t === total)).toBe(true)
  expect(seen.at(-1)).toEqual([total, total])
  hub.requests.length = 0
  hub.main = SECOND // moved on, but the folder is pinned
  expect(await get()).toEqual(m)
  expect(hub.requests).toEqual([])
})

test('a transfer that breaks off goes on by itself from where it was', async () => {
  hub.cutAfter = [1_000_000, 500_000]
  const said: string[] = []
  await get({ onMessage: (t) => said.push(t) })
  expect(read('model.safetensors').equals(WEIGHTS)).toBe(true)
  expect(said.filter((t) => t.includes('trying again')).length).toBe(2)
  const starts = transfers().flatMap((r) => /model\.safetensors bytes=(\d+)-/.exec(r)?.[1] ?? [])
  expect(starts.length).toBe(2)
  expect(Number(starts[0])).toBeGreaterThan(0)
  expect(Number(starts[1])).toBeGreaterThan(Number(starts[0]))
})

test('an ended process goes on later with the same commit, though the branch has other files of that name', async () => {
  hub.cutAfter = [1_000_000]
  const stop = new AbortController()
  await expect(get({ signal: stop.signal, onMessage: (t) => t.includes('again') && stop.abort() })).rejects.toThrow()
  expect(fs.existsSync(path.join(folder, 'model.safetensors'))).toBe(false)
  expect(fs.readdirSync(folder).some((f) => f.endsWith('.part'))).toBe(true)
  hub.requests.length = 0
  hub.main = SECOND
  const m = await get()
  expect(m.commit).toBe(FIRST)
  expect(read('config.json').toString()).toBe('{"a": 1}')
  expect(read('model.safetensors').equals(WEIGHTS)).toBe(true)
  expect(transfers().every((r) => r.includes(FIRST))).toBe(true)
  expect(transfers()[0]).toMatch(/model\.safetensors bytes=[1-9]/)
  expect(fs.readdirSync(folder).some((f) => f.endsWith('.part'))).toBe(false)
})

test('--revision moves to another commit: changed files are fetched, files that are gone go', async () => {
  await get()
  hub.main = SECOND
  hub.requests.length = 0
  const m = await get({ revision: 'main' })
  expect(m.commit).toBe(SECOND)
  expect(read('config.json').toString()).toBe('{"a": 2}')
  expect(fs.existsSync(path.join(folder, 'model.safetensors'))).toBe(false) // it would be loaded in place of the shards
  expect(transfers().some((r) => r.includes('vocab.txt'))).toBe(false)
})

test('a file that was changed here is never overwritten', async () => {
  await get()
  fs.writeFileSync(path.join(folder, 'config.json'), '{"a": 9}')
  await expect(get()).rejects.toThrow(/config\.json: expected the file of own\/tiny, got another: move it away/)
  await expect(get({ revision: SECOND })).rejects.toThrow(/move it away/)
  expect(read('config.json').toString()).toBe('{"a": 9}')
})

test('bytes that are not what the Hub says are refused and do not stay', async () => {
  hub.lies = Buffer.from('{"a": 3}')
  await expect(get()).rejects.toMatchObject({
    code: 'ERR_HUB',
    message: expect.stringMatching(/config\.json.*8 others; removed/),
  })
  expect(fs.readdirSync(folder)).toEqual(['download.json'])
  hub.lies = Buffer.from('{"a": 1}  ')
  await expect(get()).rejects.toThrow(/config\.json: expected 8 bytes, got 10/)
  hub.lies = null
  await get()
})

test('globs choose files and are remembered; one that fits nothing is an error', async () => {
  await expect(get({ include: ['*.gguf'] })).rejects.toThrow(
    /include "\*\.gguf": expected files of the repository, got none/,
  )
  await get({ include: ['*.txt', 'tf_model.??'] })
  const there = (): string[] => fs.readdirSync(folder).sort()
  expect(there()).toEqual(['download.json', 'sub', 'tf_model.h5'])
  await get()
  expect(there()).toEqual(['download.json', 'sub', 'tf_model.h5'])
  await get({ include: ['*.json'] })
  expect(there()).toEqual(['config.json', 'download.json', 'sub'])
})

test('a data set is fetched whole', async () => {
  const m = await downloadRepo('datasets/own/tiny', folder, { endpoint })
  expect(m.files.map((f) => f.path)).toEqual(Object.keys(commits[FIRST]))
  expect(hub.requests.every((r) => /^\/(api\/)?datasets\/own\/tiny\//.test(r))).toBe(true)
})

test('names that leave the folder are refused', async () => {
  for (const name of ['../evil', '/etc/evil', 'a/../../evil', 'a\\evil', 'download.json', './x']) {
    commits[FIRST][name] = Buffer.from('x')
    await expect(get(), name).rejects.toThrow(/file name: expected one inside the folder/)
    delete commits[FIRST][name]
  }
})

test('no access, no repository, no revision, no connection: each one line, and no folder', async () => {
  hub.token = 'hf_right'
  await expect(get()).rejects.toThrow(/own\/tiny: expected a repository that is there and open to you, got status 401/)
  await expect(get({ token: 'hf_wrong' })).rejects.toThrow(/status 401/)
  await expect(get({ token: 'right' })).rejects.toThrow(/token: expected one that starts with 'hf_'/)
  hub.token = null
  await expect(get({ revision: 'nope' })).rejects.toThrow(
    /expected this revision and file, got status 404 RevisionNotFound/,
  )
  await expect(downloadRepo('own/other', folder, { endpoint })).rejects.toThrow(/own\/other: .*404 RepoNotFound/)
  await expect(downloadRepo('a/b/c', folder, { endpoint })).rejects.toThrow(/expected owner\/name/)
  await expect(get({ endpoint: 'http://127.0.0.1:1' })).rejects.toThrow(/127\.0\.0\.1:1: expected a connection, got/)
  expect(fs.existsSync(folder)).toBe(false)
  hub.token = 'hf_right'
  await get({ token: 'hf_right' })
  hub.token = null
  await expect(downloadRepo('own/other', folder, { endpoint })).rejects.toThrow(
    /expected a folder of own\/other, got one of own\/tiny/,
  )
})

test('the command: HF_ENDPOINT and HF_TOKEN, killed and stopped in the middle and run again', async () => {
  const run = (whenSaid?: RegExp, signal: NodeJS.Signals = 'SIGKILL') =>
    new Promise<{ status: number | null; out: string; err: string }>((resolve) => {
      const env = { ...process.env, HF_ENDPOINT: `${endpoint}/`, HF_TOKEN: 'hf_right' }
      const args = ['--import', 'tsx', 'ts/src/cli.ts', 'download', 'own/tiny', '--to', folder]
      const child = spawn(process.execPath, args, { cwd: new URL('../..', import.meta.url), env })
      let [out, err] = ['', '']
      child.stdout.on('data', (d) => (out += d))
      child.stderr.on('data', (d) => {
        err += d
        if (whenSaid?.test(err)) child.kill(signal)
        whenSaid = whenSaid?.test(err) ? undefined : whenSaid
      })
      child.on('close', (status) => resolve({ status, out, err }))
    })
  hub.token = 'hf_right'
  hub.cutAfter = [1_500_000]
  await run(/trying again/)
  expect(fs.readdirSync(folder).find((f) => f.endsWith('.part'))).toBeDefined()
  hub.cutAfter = [500_000]
  const stopped = await run(/trying again/, 'SIGHUP')
  expect([stopped.status, stopped.out]).toEqual([129, ''])
  expect(stopped.err).toContain('stopped: the same command goes on from what is there')
  expect(fs.readdirSync(folder).find((f) => f.endsWith('.part'))).toBeDefined()
  hub.requests.length = 0
  const { status, out, err } = await run()
  expect(status, err).toBe(0)
  expect(out).toBe(`${folder}: 3 files, 3.0 MB, verified; own/tiny at ${FIRST}\n`)
  expect(transfers().length).toBe(1)
  expect(read('model.safetensors').equals(WEIGHTS)).toBe(true)
  hub.token = 'hf_other'
  const refused = await run() // verified without the network
  expect(refused.status, refused.err).toBe(0)
  fs.rmSync(path.join(folder, 'config.json'))
  const denied = await run()
  expect(denied.status).toBe(1)
  expect(denied.err.trim().split('\n').at(-1)).toMatch(/^ERR_HUB \[hub\] own\/tiny: .*status 401/)
})

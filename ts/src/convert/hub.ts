/**
 * Models and data from the Hugging Face Hub into a folder. A manifest there (download.json) pins the commit and says how large
 * each file is and what its hash is: an interrupted download goes on with the same files, a finished one can be verified offline.
 * @huggingface/hub speaks with the Hub and is loaded only here. Files come as plain HTTP ranges, which mirrors have too.
 */
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { checkConfig } from '../formats/zod-check.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { readJsonFile, writeJsonFile } from '../util/json.js'

export const MANIFEST = 'download.json'

export interface DownloadOptions {
  /** branch, tag or commit; default: the manifest's commit where there is one, else main */
  revision?: string
  /** globs of the files wanted, `*` and `?`, over the whole path; default: what the manifest says, else see `unwanted` */
  include?: readonly string[]
  /** default HF_TOKEN */
  token?: string
  /** default HF_ENDPOINT, else https://huggingface.co */
  endpoint?: string
  signal?: AbortSignal
  /** bytes that are there, of all, and the file that is being worked on */
  onProgress?: (done: number, total: number, file: string) => void
  onMessage?: (text: string) => void
  /** milliseconds before the first retry of a broken transfer, doubled with each; default 1000 */
  pause?: number
}

const fileSchema = z.object({
  path: z.string(),
  size: z.int().nonnegative(),
  /** what the Hub says: SHA-256 of a large file, of others git's SHA-1 */
  oid: z.string().regex(/^([0-9a-f]{40}|[0-9a-f]{64})$/, 'a SHA-1 or SHA-256'),
  /** of the file that has arrived and is what the Hub says */
  sha256: z.string().optional(),
})
const manifestSchema = z.object({
  repo: z.string(),
  endpoint: z.string(),
  revision: z.string(),
  commit: z.string().regex(/^[0-9a-f]{40}$/, 'a commit'),
  include: z.array(z.string()).nullable(),
  files: z.array(fileSchema),
})
export type DownloadManifest = z.output<typeof manifestSchema>
type HubFile = z.output<typeof fileSchema>

const fail = (what: string, expected: string, got: string, cause?: unknown): AlignGPTError =>
  mismatch('ERR_HUB', 'hub', what, expected, got, cause)

// ---- which files --------------------------------------------------------------------------------------------------------

/** As Python's fnmatch: `*` matches any characters, `/` too. */
function glob(pattern: string): RegExp {
  const escaped = pattern.replace(/[.+^${}()|[\]\\]/g, '\\$&')
  return new RegExp(`^${escaped.replaceAll('*', '.*').replaceAll('?', '.')}$`)
}
const OTHER_FRAMEWORKS = ['*.h5', '*.msgpack', '*.onnx', '*.onnx_data', '*.ot', '*.tflite', '*.gguf', 'original/*'].map(
  glob,
)

/** Files of a model that nobody asked for: other frameworks' weights, and PyTorch's where there are safetensors. */
function unwanted(files: readonly HubFile[]): (file: HubFile) => boolean {
  const safe = files.some((f) => /^model.*\.safetensors$/.test(f.path))
  return (f) =>
    OTHER_FRAMEWORKS.some((g) => g.test(f.path)) || (safe && /^pytorch_model.*\.bin(\.index\.json)?$/.test(f.path))
}

/** A path from the Hub stays inside the folder and is not the manifest. */
function checkPath(name: string): void {
  const inside = name === path.posix.normalize(name) && !/^(\/|\.\.(\/|$))|[\\:\0]/.test(name)
  if (!inside || name === '.' || name === MANIFEST) throw fail('file name', 'one inside the folder', show(name))
}

function choose(
  all: readonly HubFile[],
  include: readonly string[] | null,
  isModel: boolean,
  say: (text: string) => void,
): HubFile[] {
  for (const { path: name } of all) checkPath(name)
  if (include) {
    const patterns = include.map(glob)
    const nothing = include.find((_, i) => !all.some((f) => patterns[i].test(f.path)))
    if (nothing !== undefined) throw fail(`include ${show(nothing)}`, 'files of the repository', 'none')
    return all.filter((f) => patterns.some((p) => p.test(f.path)))
  }
  const skip = isModel ? unwanted(all) : () => false
  const skipped = all.filter(skip).map((f) => f.path)
  if (skipped.length) say(`not fetched (name them with include): ${skipped.join(', ')}`)
  return all.filter((f) => !skip(f))
}

// ---- the Hub ------------------------------------------------------------------------------------------------------------

/** One repository on one Hub. */
class Hub {
  readonly #params: { hubUrl: string; accessToken?: string; fetch: typeof fetch }
  /** why the last request failed: the library keeps only the text of some */
  #failure: unknown
  constructor(
    readonly repo: string,
    readonly endpoint: string,
    token: string | undefined,
    private readonly signal?: AbortSignal,
  ) {
    if (!/^(datasets\/)?[\w.-]+(\/[\w.-]+)?$/.test(repo))
      throw mismatch('ERR_ARGUMENT', 'hub', 'repository', 'owner/name or datasets/owner/name', show(repo))
    if (token !== undefined && !token.startsWith('hf_'))
      throw mismatch('ERR_ARGUMENT', 'hub', 'token', "one that starts with 'hf_'", 'another')
    this.#params = { hubUrl: endpoint, fetch: this.#fetch, ...(token !== undefined && { accessToken: token }) }
  }

  get isModel(): boolean {
    return !this.repo.startsWith('datasets/')
  }

  #fetch: typeof fetch = async (url, init) => {
    this.#failure = undefined
    try {
      const response = await fetch(url, { ...init, signal: this.signal })
      if (response.ok) return response
      throw this.#refused(response)
    } catch (e) {
      this.#failure = e instanceof AlignGPTError ? e : this.#unreachable(e)
      throw this.#failure
    }
  }

  /** What a status means here. The Hub answers 401 for a repository that does not exist, too. */
  #refused(r: Response): AlignGPTError {
    const code = r.headers.get('X-Error-Code') ?? ''
    const got = `status ${r.status}${code && ` ${code}`}`
    if (r.status === 401 || code === 'RepoNotFound')
      return fail(
        this.repo,
        'a repository that is there and open to you',
        `${got}: check its name and HF_TOKEN or --token`,
      )
    if (r.status === 403)
      return fail(this.repo, 'access', `${got}: accept its terms at ${this.endpoint}/${this.repo}, and use a token`)
    if (r.status === 404) return fail(this.repo, 'this revision and file', got)
    return new Broken(`[hub] ${new URL(r.url).host}: expected an answer, got ${got}`)
  }

  #unreachable(e: unknown): Error {
    if (this.signal?.aborted) return e as Error
    const cause = (e as Error).cause as { code?: string; message?: string } | undefined
    const got = cause?.code ?? cause?.message ?? String(e)
    return new Broken(`[hub] ${this.endpoint}: expected a connection, got ${got}; HF_ENDPOINT names a mirror`, {
      cause: e,
    })
  }

  /** The commit that a branch, a tag or a commit is. */
  async commit(revision: string): Promise<string> {
    const { modelInfo, datasetInfo } = await import('@huggingface/hub')
    const name = this.repo.replace(/^datasets\//, '')
    const asked = { ...this.#params, name, revision, additionalFields: ['sha' as const] }
    const { sha } = await (this.isModel ? modelInfo(asked) : datasetInfo(asked))
    if (typeof sha !== 'string' || !/^[0-9a-f]{40}$/.test(sha)) throw fail(`${this.repo}: sha`, 'a commit', show(sha))
    return sha
  }

  async list(commit: string): Promise<HubFile[]> {
    const { listFiles } = await import('@huggingface/hub')
    const files: unknown[] = []
    for await (const f of listFiles({ ...this.#params, repo: this.repo, revision: commit, recursive: true }))
      if (f.type === 'file') files.push({ path: f.path, size: f.size, oid: f.lfs?.oid ?? f.oid })
    return checkConfig(z.array(fileSchema), files, `${this.endpoint}: files of ${this.repo}`)
  }

  /** The bytes of a file from `start` on. */
  async *read(name: string, commit: string, size: number, start: number): AsyncGenerator<Uint8Array> {
    const { downloadFile } = await import('@huggingface/hub')
    const blob = await downloadFile({ ...this.#params, repo: this.repo, path: name, revision: commit, xet: false })
    if (!blob) throw fail(`${this.repo}: ${name}`, 'a file', 'none')
    if (blob.size !== size) throw fail(`${this.repo}: ${name}`, `${size} bytes`, `${blob.size}`)
    const part = start ? blob.slice(start) : blob
    const reader = (part.stream() as ReadableStream<Uint8Array>).getReader()
    try {
      for (;;) {
        const { done, value } = await reader.read()
        if (done) return
        yield value
      }
    } catch (e) {
      throw this.#failure ?? this.#unreachable(e)
    } finally {
      reader.cancel().catch(() => {}) // it may have failed already, which is known
    }
  }
}

/** A transfer that broke off, or a server that could not answer: worth another attempt. */
class Broken extends AlignGPTError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_HUB', message, options)
  }
}

// ---- one file -----------------------------------------------------------------------------------------------------------

/** The hash that the Hub gives of a file (git's is of a header too), and its SHA-256. */
class Digest {
  readonly #sha256 = createHash('sha256')
  readonly #git
  #bytes = 0
  constructor(private readonly file: HubFile) {
    this.#git = file.oid.length === 40 ? createHash('sha1').update(`blob ${file.size}\0`) : null
  }
  get bytes(): number {
    return this.#bytes
  }
  update(data: Uint8Array): void {
    this.#bytes += data.byteLength
    this.#sha256.update(data)
    this.#git?.update(data)
  }
  /** Takes in what is in a file already. */
  async read(file: string): Promise<void> {
    for await (const piece of fs.createReadStream(file, { highWaterMark: 1 << 20 })) this.update(piece as Buffer)
  }
  end(): { sha256: string; fits: boolean } {
    const sha256 = this.#sha256.digest('hex')
    const oid = this.#git?.digest('hex') ?? sha256
    return { sha256, fits: this.#bytes === this.file.size && oid === this.file.oid }
  }
}

/** SHA-256 of a file that is what the Hub says; null where it is another or none. */
async function verified(at: string, file: HubFile): Promise<string | null> {
  if (fs.statSync(at, { throwIfNoEntry: false })?.size !== file.size) return null
  const digest = new Digest(file)
  await digest.read(at)
  const { sha256, fits } = digest.end()
  return fits ? sha256 : null
}

const ATTEMPTS = 6

/** Fetches a file into a part beside its place, going on where an earlier attempt ended; renamed once its hash is right. */
async function fetchFile(
  hub: Hub,
  commit: string,
  file: HubFile,
  at: string,
  o: DownloadOptions,
  tell: (bytes: number) => void,
): Promise<string> {
  const part = `${at}.${file.oid.slice(0, 12)}.part` // a part belongs to one content
  fs.mkdirSync(path.dirname(at), { recursive: true })
  for (let failures = 0, before = -1; ; ) {
    const digest = new Digest(file)
    if (fs.existsSync(part)) await digest.read(part)
    if (digest.bytes > before) failures = 0
    before = digest.bytes
    try {
      await append(hub.read(file.path, commit, file.size, digest.bytes), part, file, digest, tell)
    } catch (e) {
      if (!(e instanceof Broken) || ++failures === ATTEMPTS) throw e
      o.onMessage?.(`${file.path}: ${e.message}; trying again`)
      await new Promise((r) => setTimeout(r, (o.pause ?? 1000) * 2 ** (failures - 1)))
      continue
    }
    const { sha256, fits } = digest.end()
    if (!fits) {
      fs.rmSync(part)
      throw fail(
        `${hub.repo}: ${file.path}`,
        `${file.size} bytes with hash ${file.oid}`,
        `${digest.bytes} others; removed`,
      )
    }
    fs.renameSync(part, at)
    return sha256
  }
}

async function append(
  from: AsyncIterable<Uint8Array>,
  part: string,
  file: HubFile,
  digest: Digest,
  tell: (bytes: number) => void,
): Promise<void> {
  const to = await fs.promises.open(part, 'a')
  try {
    tell(digest.bytes)
    if (digest.bytes < file.size)
      for await (const piece of from) {
        await to.appendFile(piece)
        digest.update(piece)
        tell(digest.bytes)
        if (digest.bytes > file.size) return // a server that sends all where a part was asked for
      }
    if (digest.bytes < file.size)
      throw new Broken(`[hub] ${file.path}: expected ${file.size} bytes, got ${digest.bytes}`)
    await to.sync()
  } finally {
    await to.close()
  }
}

// ---- a folder -----------------------------------------------------------------------------------------------------------

/** The manifest of a folder; null where there is none. @throws ERR_CONFIG */
export function readDownloadManifest(folder: string): DownloadManifest | null {
  const file = path.join(folder, MANIFEST)
  return fs.existsSync(file) ? checkConfig(manifestSchema, readJsonFile(file, 'ERR_CONFIG'), file) : null
}

/** What is to be in the folder: the manifest's own list where nothing else is asked for, else the Hub's. */
async function pin(hub: Hub, old: DownloadManifest | null, o: DownloadOptions): Promise<DownloadManifest> {
  const include = o.include ? [...o.include] : (old?.include ?? null)
  const revision = o.revision ?? old?.revision ?? 'main'
  const commit = old && o.revision === undefined ? old.commit : await hub.commit(revision)
  const same = old && old.commit === commit && JSON.stringify(old.include) === JSON.stringify(include)
  if (same) return { ...old, revision }
  const files = choose(await hub.list(commit), include, hub.isModel, (text) => o.onMessage?.(text))
  return { repo: hub.repo, endpoint: hub.endpoint, revision, commit, include, files }
}

/** Takes away what an earlier commit had and this one has not, or has otherwise; never a file that somebody changed. */
async function removeOld(to: string, old: DownloadManifest, now: DownloadManifest): Promise<void> {
  for (const file of old.files) {
    const at = path.join(to, file.path)
    const stays = now.files.some((f) => f.path === file.path && f.oid === file.oid)
    if (!stays && (await verified(at, file))) fs.rmSync(at)
  }
}

/**
 * Brings a repository's files into a folder, or goes on with it, or verifies what is there.
 * @param repo `owner/name` of a model, `datasets/owner/name` of a data set
 * @returns the manifest as it is in the folder: the commit, and size and SHA-256 of each file
 * @throws ERR_HUB: no such repository or revision, no access, no connection, a hash that is not the Hub's, a file in the way
 */
export async function downloadRepo(repo: string, to: string, o: DownloadOptions = {}): Promise<DownloadManifest> {
  const old = readDownloadManifest(to)
  if (old && old.repo !== repo) throw fail(to, `a folder of ${repo}`, `one of ${old.repo}`)
  const endpoint = (o.endpoint ?? process.env.HF_ENDPOINT ?? 'https://huggingface.co').replace(/\/+$/, '')
  const hub = new Hub(repo, endpoint, (o.token ?? process.env.HF_TOKEN) || undefined, o.signal)
  const manifest = await pin(hub, old, o)
  if (old && old.commit !== manifest.commit) o.onMessage?.(`${old.commit} was here, now ${manifest.commit}`)
  if (old) await removeOld(to, old, manifest)
  fs.mkdirSync(to, { recursive: true })
  const keep = (): void => writeJsonFile(path.join(to, MANIFEST), manifest)
  keep()
  const total = manifest.files.reduce((n, f) => n + f.size, 0)
  let before = 0
  for (const file of manifest.files) {
    const at = path.join(to, file.path)
    const tell = (bytes: number): void => o.onProgress?.(before + bytes, total, file.path)
    o.signal?.throwIfAborted()
    const there = await verified(at, file)
    if (!there && fs.existsSync(at)) throw fail(at, `the file of ${repo}`, 'another: move it away, or it would be lost')
    const sha256 = there ?? (await fetchFile(hub, manifest.commit, file, at, o, tell))
    if (file.sha256 !== sha256) {
      file.sha256 = sha256
      keep()
    }
    before += file.size
    tell(0)
  }
  return manifest
}

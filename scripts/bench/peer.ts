/** The resident PyTorch process: requests and replies are JSON lines (see peer.py). */
import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process'
import path from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { AlignGPTError } from '../../ts/src/util/errors.js'

const SCRIPT = path.join(path.dirname(fileURLToPath(import.meta.url)), 'peer.py')
const NEEDED = 'python3 -m venv VENV && VENV/bin/pip install torch transformers numpy safetensors'

type Json = Record<string, unknown>
interface Waiting {
  resolve: (reply: Json) => void
  reject: (error: Error) => void
}

/** The peer cannot be used at all: one line that says what to install. */
function unusable(python: string, reason: string): AlignGPTError {
  return new AlignGPTError(
    'ERR_ARGUMENT',
    `[bench] --python: expected a Python with PyTorch, got ${python} (${reason}); install one with: ${NEEDED}`,
  )
}

const last = (text: string): string => text.trim().split('\n').at(-1) ?? ''

export class Peer {
  readonly #argv: string[]
  readonly #child: ChildProcessWithoutNullStreams
  readonly #waiting: Waiting[] = []
  #errors = ''
  #ended: string | undefined
  #cases = 0
  versions: { torch: string; transformers: string } = { torch: '', transformers: '' }

  private constructor(
    readonly python: string,
    readonly threads: number,
    cache: string,
  ) {
    this.#argv = ['-B', SCRIPT, '--threads', String(threads), '--cache', cache]
    this.#child = spawn(python, this.#argv)
    const end = (reason: string): void => {
      this.#ended = reason
      for (const w of this.#waiting.splice(0)) w.reject(unusable(python, reason))
    }
    this.#child.on('error', (e) => end(e.message))
    this.#child.on('close', (code, signal) => end(last(this.#errors) || `it ended with ${signal ?? `status ${code}`}`))
    this.#child.stdin.on('error', () => {}) // 'close' tells the story
    this.#child.stderr.on('data', (chunk) => {
      this.#errors = (this.#errors + chunk).slice(-4000)
    })
    createInterface({ input: this.#child.stdout }).on('line', (line) => {
      const reply = JSON.parse(line) as Json
      const waiting = this.#waiting.shift()
      if (typeof reply.error === 'string') waiting?.reject(new Error(`PyTorch: ${reply.error}`))
      else waiting?.resolve(reply)
    })
  }

  /** Process id. */
  get pid(): number {
    return this.#child.pid as number
  }

  /** @param cache folder for what torch.compile compiles */
  static async start(python: string, threads: number, cache: string): Promise<Peer> {
    const peer = new Peer(python, threads, cache)
    peer.versions = (await peer.#request({ op: 'hello' })) as unknown as Peer['versions']
    return peer
  }

  #request(body: Json): Promise<Json> {
    return new Promise((resolve, reject) => {
      if (this.#ended !== undefined) return reject(unusable(this.python, this.#ended))
      this.#waiting.push({ resolve, reject })
      this.#child.stdin.write(`${JSON.stringify(body)}\n`)
    })
  }

  /** Builds a case on the other side. */
  async make(kind: string, args: object): Promise<PeerCase> {
    const id = ++this.#cases
    await this.#request({ op: 'make', id, kind, ...args })
    const about = (op: string, rest: Json = {}): Promise<Json> => this.#request({ op, id, ...rest })
    return {
      time: async (reps) => (await about('time', { reps })).seconds as number,
      values: <T>() => about('values') as Promise<T>,
      drop: async () => void (await about('drop')),
    }
  }

  /** Runs a case in a fresh process. @returns bytes: resident before the first run, and at most once it is warm */
  memory(kind: string, args: object): { base: number; peak: number } {
    const argv = [...this.#argv, '--memory', kind, '--args', JSON.stringify(args)]
    const r = spawnSync(this.python, argv, { encoding: 'utf8' })
    if (r.status !== 0) throw new Error(`PyTorch: ${last(r.stderr ?? '') || r.error?.message || `status ${r.status}`}`)
    return JSON.parse(last(r.stdout))
  }

  close(): void {
    this.#child.stdin.end()
  }
}

export interface PeerCase {
  /** @returns seconds of one run, mean over `reps` */
  time(reps: number): Promise<number>
  /** results of the last run */
  values<T>(): Promise<T>
  drop(): Promise<void>
}

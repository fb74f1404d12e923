/** Saves a run's checkpoints from a snapshot, in another thread, one at a time. */

import { once } from 'node:events'
import path from 'node:path'
import type { Worker } from 'node:worker_threads'
import { native } from '../core/native.js'
import { to } from '../core/ops.js'
import { noGrad, scope, Tensor } from '../core/tensor.js'
import type { StateTensor } from '../nn/adamw.js'
import { AlignGPTError } from '../util/errors.js'
import { startThread } from '../util/worker.js'
import { removeLeftovers, type StoredTensor, storedDtype } from './checkpoint.js'
import type { SaveAnswer, SaveJob } from './saver-worker.js'

/** So many failed saves in a row end a run. */
const MAX_FAILURES = 3

export class Saver {
  readonly folder: string
  readonly #keep: number
  readonly #tell: (text: string) => void
  #thread: Worker | null = null
  #flight: Promise<void> | null = null
  #failures = 0
  #reason = ''
  #last = -1

  /**
   * @param folder of the checkpoints
   * @param keep newest checkpoints that stay, at least 2
   * @param tell is told of a save that failed
   */
  constructor(folder: string, keep: number, tell: (text: string) => void) {
    this.folder = folder
    this.#keep = keep
    this.#tell = tell
    removeLeftovers(folder)
  }

  /** The newest step that was saved, -1: none. */
  get last(): number {
    return this.#last
  }

  /**
   * Waits for the save before this one, copies the tensors and has the copies written while the caller goes on. A save that
   * fails is told of.
   * @throws AlignGPTError ERR_SAVE when it is the third in a row
   */
  async save(content: SaveJob['content'], tensors: readonly StateTensor[]): Promise<void> {
    await this.settled()
    let snapshot: StoredTensor[]
    try {
      snapshot = takeSnapshot(tensors)
    } catch (e) {
      return this.#done(content.step, e instanceof Error ? e.message : String(e))
    }
    this.#flight = this.#write({ folder: this.folder, keep: this.#keep, content, tensors: snapshot })
  }

  /** Waits until nothing is being saved. @throws AlignGPTError ERR_SAVE after the third failure in a row */
  async settled(): Promise<void> {
    await this.#flight
    this.check()
  }

  /** @throws AlignGPTError ERR_SAVE after the third failure in a row */
  check(): void {
    if (this.#failures < MAX_FAILURES) return
    const left =
      this.#last < 0 ? 'nothing was saved' : `the last good one is ${path.join(this.folder, `step-${this.#last}`)}`
    throw new AlignGPTError(
      'ERR_SAVE',
      `[train] checkpoint: expected to be saved, got ${this.#failures} failures in a row: ${this.#reason}; ${left}`,
    )
  }

  async close(): Promise<void> {
    await this.#flight
    await this.#thread?.terminate()
    this.#thread = null
  }

  async #write(job: SaveJob): Promise<void> {
    let answer: SaveAnswer
    try {
      answer = await this.#ask(job)
    } catch (e) {
      answer = `saving thread: ${e}`
      this.#thread = null // a new one next time
      for (const t of job.tensors) takeBack(t.handle)
    }
    this.#flight = null
    this.#done(job.content.step, answer)
  }

  async #ask(job: SaveJob): Promise<SaveAnswer> {
    this.#thread ??= startThread(import.meta.url, 'train/saver-worker', {})
    const thread = this.#thread
    thread.ref() // the process does not end in the middle
    try {
      const answer = once(thread, 'message')
      thread.postMessage(job)
      return (await answer)[0]
    } finally {
      thread.unref()
    }
  }

  #done(step: number, problem: SaveAnswer): void {
    if (problem === null) {
      this.#failures = 0
      this.#last = step
      return
    }
    this.#failures++
    this.#reason = problem
    this.#tell(`checkpoint step-${step} was not saved (${this.#failures} in a row): ${problem}; training goes on`)
  }
}

/** The same bytes once more, in main memory. */
function hostCopy(t: Tensor): Tensor {
  if (t.device !== 'cpu') return scope(() => noGrad(() => to(t, 'cpu').persist()))
  const copy = new Tensor(native.empty([...t.shape], t.dtype)).persist()
  native.copy(copy.h, t.h)
  return copy
}

/** Copies that another thread can take. @throws ERR_MEMORY, with nothing left behind */
function takeSnapshot(tensors: readonly StateTensor[]): StoredTensor[] {
  const done: StoredTensor[] = []
  try {
    for (const t of tensors) {
      const copy = hostCopy(t.tensor)
      try {
        const { shape } = copy
        done.push({ file: t.file, name: t.name, dtype: storedDtype(t), shape, handle: native.send(copy.h) })
      } finally {
        copy.dispose()
      }
    }
    return done
  } catch (e) {
    for (const t of done) takeBack(t.handle)
    throw e
  }
}

/** Frees what a ticket stands for, unless somebody took it. */
function takeBack(ticket: number): void {
  try {
    native.dispose(native.receive(ticket))
  } catch (e) {
    if ((e as AlignGPTError).code !== 'ERR_HANDLE') throw e
  }
}

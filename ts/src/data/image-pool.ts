/** The threads that prepare a loader's images (image-worker.ts), and the memory they share with it. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import type { PictureTask } from '../processing/image/prepare.js'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { startThread } from '../util/worker.js'
import { BAD, ERROR_BYTES, PENDING, type SharedSlots, type WorkerMessage } from './image-worker.js'

/** Threads on which Node runs sharp's work for all workers together, unless UV_THREADPOOL_SIZE says otherwise. */
const SHARP_THREADS = 4

/** Fixed set of threads with their shared memory. */
export class ImagePool {
  readonly slots: SharedSlots
  readonly #workers: Worker[] = []
  #failure: Error | null = null
  #next = 0
  constructor(count: number, slotCount: number, capacity: number, pictureBytes: number) {
    const room = slotCount * capacity
    this.slots = {
      pixels: new SharedArrayBuffer(room * pictureBytes),
      errors: new SharedArrayBuffer(room * ERROR_BYTES),
      status: new SharedArrayBuffer(4 * room),
      done: new SharedArrayBuffer(4 * slotCount),
      ready: new SharedArrayBuffer(4),
      capacity,
      pictureBytes,
    }
    const lanes = Math.max(2, Math.ceil(SHARP_THREADS / count))
    for (let i = 0; i < count; i++) {
      const w = startThread(import.meta.url, 'data/image-worker', {
        decodeSlots: this.slots,
        lanes,
        ready: this.slots.ready,
      })
      w.unref()
      w.on('error', (e) => {
        this.#failure ??= e
      })
      this.#workers.push(w)
    }
  }

  #check(): void {
    if (this.#failure || Atomics.load(new Int32Array(this.slots.ready), 0) < 0)
      throw mismatch(
        'ERR_DATA',
        'loader',
        'decode worker',
        'a running worker',
        String(this.#failure ?? 'failed to start'),
        this.#failure,
      )
  }
  /** Waits until all workers run. */
  async started(timeoutMs: number): Promise<void> {
    const ready = new Int32Array(this.slots.ready)
    const end = Date.now() + timeoutMs
    while (Atomics.load(ready, 0) < this.#workers.length) {
      this.#check()
      if (Date.now() > end)
        throw mismatch('ERR_DATA', 'loader', 'decode workers', 'a start in time', `${timeoutMs} ms passed`)
      await sleep(2)
    }
  }
  submit(slot: number, tasks: PictureTask[]): void {
    new Int32Array(this.slots.status).fill(PENDING, slot * this.slots.capacity, (slot + 1) * this.slots.capacity)
    Atomics.store(new Int32Array(this.slots.done), slot, 0)
    tasks.forEach((task, i) => {
      this.#workers[this.#next++ % this.#workers.length].postMessage({ slot, i, task } satisfies WorkerMessage)
    })
  }
  /** Waits for `count` pictures of a slot, leaving the event loop free. */
  async wait(slot: number, count: number, timeoutMs: number): Promise<void> {
    const done = new Int32Array(this.slots.done)
    const end = Date.now() + timeoutMs
    while (Atomics.load(done, slot) < count) {
      this.#check()
      if (Date.now() > end) throw this.#late(slot, count, timeoutMs)
      await sleep(1)
    }
  }
  /** The same without the event loop. */
  waitSync(slot: number, count: number, timeoutMs: number): void {
    const done = new Int32Array(this.slots.done)
    const end = Date.now() + timeoutMs
    for (let n = Atomics.load(done, slot); n < count; n = Atomics.load(done, slot)) {
      this.#check()
      if (Date.now() > end) throw this.#late(slot, count, timeoutMs)
      Atomics.wait(done, slot, n, 1000)
    }
  }
  #late(slot: number, count: number, timeoutMs: number): AlignGPTError {
    const n = Atomics.load(new Int32Array(this.slots.done), slot)
    return mismatch('ERR_DATA', 'loader', 'decode workers', `${count} pictures in ${timeoutMs} ms`, `${n}`)
  }
  /** The finished picture, or why there is none. The bytes are valid until the slot is used again. */
  result(slot: number, i: number): Uint8Array | Error {
    const { status, errors, pixels, capacity, pictureBytes } = this.slots
    const at = slot * capacity + i
    if (Atomics.load(new Int32Array(status), at) !== BAD) return new Uint8Array(pixels, at * pictureBytes, pictureBytes)
    const text = Buffer.from(new Uint8Array(errors, at * ERROR_BYTES, ERROR_BYTES))
    return new AlignGPTError('ERR_IMAGE', text.toString('utf8', 0, text.indexOf(0)))
  }
  /** Lets the workers finish what they have and ends them. */
  async close(): Promise<void> {
    await Promise.all(
      this.#workers.map(async (w) => {
        const ended = new Promise((resolve) => w.once('exit', resolve))
        w.ref()
        w.postMessage(null satisfies WorkerMessage)
        const timer = setTimeout(() => void w.terminate(), 5000)
        await ended
        clearTimeout(timer)
      }),
    )
  }
}

/** Worker thread of loader.ts: prepares pictures and writes them into shared memory. */
import type { MessagePort } from 'node:worker_threads'
import { ImageCache, type ImageTask, prepareImage } from '../processing/image/prepare.js'

/** Memory shared between the loader and its workers; slot k, picture i. */
export interface SharedSlots {
  /** uint8 [slots, capacity, side * side * 3] */
  pixels: SharedArrayBuffer
  /** uint8 [slots, capacity, ERROR_BYTES]: message, ended by 0 */
  errors: SharedArrayBuffer
  /** int32 [slots, capacity]: PENDING, GOOD or BAD */
  status: SharedArrayBuffer
  /** int32 [slots]: pictures finished; waited for */
  done: SharedArrayBuffer
  /** int32 [1]: workers ready; -1 when one failed to start */
  ready: SharedArrayBuffer
  capacity: number
  imageBytes: number
}
export const ERROR_BYTES = 512
export const PENDING = 0
export const GOOD = 1
export const BAD = 2

/** One picture to prepare; null asks the worker to end. */
export type WorkerMessage = { slot: number; i: number; task: ImageTask } | null

const cache = new ImageCache()
async function handle(shared: SharedSlots, slot: number, i: number, task: ImageTask): Promise<void> {
  const at = slot * shared.capacity + i
  let status = GOOD
  try {
    const u8 = await prepareImage(task, cache)
    new Uint8Array(shared.pixels, at * shared.imageBytes, shared.imageBytes).set(u8)
  } catch (e) {
    status = BAD
    const text = Buffer.from(e instanceof Error ? e.message : String(e)).subarray(0, ERROR_BYTES - 1)
    const room = new Uint8Array(shared.errors, at * ERROR_BYTES, ERROR_BYTES)
    room.fill(0)
    room.set(text)
  }
  Atomics.store(new Int32Array(shared.status), at, status)
  const done = new Int32Array(shared.done)
  Atomics.add(done, slot, 1)
  Atomics.notify(done, slot)
}

/** The thread's work. The loader imports this file too, and has no need of sharp. */
export async function work(
  { decodeSlots: shared, lanes: count }: { decodeSlots: SharedSlots; lanes: number },
  port: MessagePort,
): Promise<void> {
  const { default: sharp } = await import('sharp')
  // Several workers share the threads that decode; each decodes one picture with one thread and caches nothing.
  sharp.concurrency(1)
  sharp.cache(false)
  // Several pictures at once: while sharp decodes some on threads of its own, another is resized here.
  const lanes = Array.from({ length: count }, () => Promise.resolve())
  let turn = 0
  port.on('message', async (m: WorkerMessage) => {
    if (m === null) {
      await Promise.all(lanes)
      port.close()
      return
    }
    const lane = turn++ % lanes.length
    lanes[lane] = lanes[lane].then(() => handle(shared, m.slot, m.i, m.task))
  })
  Atomics.add(new Int32Array(shared.ready), 0, 1)
  Atomics.notify(new Int32Array(shared.ready), 0)
}

/** Worker thread of saver.ts: writes snapshots as checkpoints. */
import type { MessagePort } from 'node:worker_threads'
import { native } from '../core/native.js'
import { type Manifest, type StoredTensor, writeCheckpoint } from './checkpoint.js'

export interface SaveJob {
  folder: string
  keep: number
  content: Omit<Manifest, 'format' | 'files'>
  /** `handle` is a ticket (native.send) */
  tensors: StoredTensor[]
}
/** Why it was not saved; null: it was. */
export type SaveAnswer = string | null

function save({ folder, keep, content, tensors }: SaveJob): SaveAnswer {
  const mine = tensors.map((t) => ({ ...t, handle: native.receive(t.handle) }))
  let answer: SaveAnswer = null
  try {
    writeCheckpoint(folder, content, mine, keep)
  } catch (e) {
    answer = e instanceof Error ? e.message : String(e)
  }
  for (const t of mine) native.dispose(t.handle)
  return answer
}

export function work(_: unknown, port: MessagePort): void {
  port.on('message', (job: SaveJob) => port.postMessage(save(job)))
}

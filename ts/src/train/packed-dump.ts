/** Micro-batches of a phase as a person can look at them. */
import path from 'node:path'
import { type StoredDtype, type TensorToWrite, writeSafetensors } from '../formats/safetensors.js'
import type { PackedBatch } from '../models/packed-batch.js'

/** Names in a message. */
const NAMES = 32

/** Records of some batches with their images, for a message. */
export function describeRecords(batches: readonly PackedBatch[]): string {
  const names = batches.flatMap((b) => {
    const images = new Map([...b.imageSamples].map((sample, m) => [sample, b.images[m]]))
    return b.ids.map((id, i) => (images.has(i) ? `${id} (${images.get(i)})` : id))
  })
  return `${names.slice(0, NAMES).join(', ')}${names.length > NAMES ? ` and ${names.length - NAMES} more` : ''}`
}

const FIELDS = ['tokens', 'labels', 'offsets', 'positions', 'imageRows', 'alignRows', 'levels', 'pixels'] as const

function batchTensors(b: PackedBatch): TensorToWrite[] {
  return FIELDS.map((name) => {
    const data = b[name]
    const shape = name === 'pixels' ? [b.imageRows.length, 3, b.imageSize, b.imageSize] : [data.length]
    const dtype: StoredDtype = data instanceof Float32Array ? 'F32' : 'I32'
    return { name, dtype, shape, data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) }
  })
}

/** Writes the rows and pixels of each batch as safetensors. @returns the names of their records */
export function dumpBatches(folder: string, batches: readonly PackedBatch[]): Record<string, unknown> {
  for (const [i, b] of batches.entries()) writeSafetensors(path.join(folder, `batch-${i}.safetensors`), batchTensors(b))
  return { batches: batches.map((b) => ({ ids: b.ids, images: b.images })) }
}

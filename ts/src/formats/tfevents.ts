/**
 * TensorBoard event files: TFRecord frames around the two protocol buffer messages that scalars need, Event and Summary
 * (tensorflow/core/util/event.proto and framework/summary.proto), whose few fields are encoded here by hand.
 */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'

// CRC-32C (Castagnoli), reflected; node:zlib has only the other polynomial.
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0x82f63b78 : n >>> 1
  return n
})

/** CRC-32C of bytes, rotated and shifted as TFRecord stores it (a CRC of data that holds CRCs is weak). */
export function maskedCrc32c(bytes: Uint8Array): number {
  let crc = 0xffffffff
  for (const b of bytes) crc = CRC_TABLE[(crc ^ b) & 255] ^ (crc >>> 8)
  crc = ~crc >>> 0
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0
}

/** A TFRecord: length, its CRC, data, its CRC, little-endian. */
function frame(data: Buffer): Buffer {
  const out = Buffer.alloc(data.length + 16)
  out.writeBigUInt64LE(BigInt(data.length), 0)
  out.writeUInt32LE(maskedCrc32c(out.subarray(0, 8)), 8)
  data.copy(out, 12)
  out.writeUInt32LE(maskedCrc32c(data), data.length + 12)
  return out
}

function varint(n: number): Buffer {
  const bytes: number[] = []
  for (; n > 127; n = Math.floor(n / 128)) bytes.push((n % 128) | 128)
  return Buffer.from([...bytes, n])
}
// A field is its number and wire type (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes), then the value.
const integerField = (field: number, n: number): Buffer => Buffer.concat([varint(field << 3), varint(n)])
const bytesField = (field: number, bytes: Buffer): Buffer =>
  Buffer.concat([varint((field << 3) | 2), varint(bytes.length), bytes])
function doubleField(field: number, x: number): Buffer {
  const out = Buffer.from([(field << 3) | 1, 0, 0, 0, 0, 0, 0, 0, 0])
  out.writeDoubleLE(x, 1)
  return out
}
function floatField(field: number, x: number): Buffer {
  const out = Buffer.from([(field << 3) | 5, 0, 0, 0, 0])
  out.writeFloatLE(x, 1)
  return out
}

/** Summary.Value: tag = 1, simple_value = 2. */
const scalar = ([tag, value]: [string, number]): Buffer =>
  bytesField(1, Buffer.concat([bytesField(1, Buffer.from(tag)), floatField(2, value)]))

/** An Event: wall_time = 1 (s), step = 2, and one of file_version = 3, summary = 5, session_log = 7. */
const event = (step: number, what: Buffer): Buffer =>
  frame(Buffer.concat([doubleField(1, Date.now() / 1000), integerField(2, step), what]))

const NAME = /^events\.out\.tfevents\.(\d+)\./

/** A name that sorts behind those of all event files in the folder: TensorBoard reads them in the order of their names. */
function nextName(folder: string): string {
  const seconds = fs.readdirSync(folder).flatMap((n) => NAME.exec(n)?.[1] ?? [])
  const time = Math.max(Math.floor(Date.now() / 1000), ...seconds.map((s) => Number(s) + 1))
  return `events.out.tfevents.${String(time).padStart(10, '0')}.${os.hostname()}.${process.pid}`
}

/** One event file that is being written. */
export class EventFile {
  readonly file: string
  readonly #fd: number
  #size = 0

  /**
   * Makes a new file in a folder. Its first record is the version, its second tells TensorBoard that a session starts: points
   * that an earlier one wrote of this and later steps are not shown.
   * @param start the first step that will be written
   * @throws an error of the file system
   */
  constructor(folder: string, start: number) {
    this.file = path.join(folder, nextName(folder))
    this.#fd = fs.openSync(this.file, 'wx')
    this.#write(event(0, bytesField(3, Buffer.from('brain.Event:2'))))
    this.#write(event(start, bytesField(7, integerField(1, 1)))) // SessionLog.status = START
  }

  /** The scalars of one step. @throws an error of the file system; the next step takes the place of one that failed */
  step(step: number, scalars: Record<string, number>): void {
    this.#write(event(step, bytesField(5, Buffer.concat(Object.entries(scalars).map(scalar)))))
  }

  #write(record: Buffer): void {
    for (let done = 0; done < record.length; )
      done += fs.writeSync(this.#fd, record, done, record.length - done, this.#size + done)
    this.#size += record.length
  }

  close(): void {
    fs.closeSync(this.#fd)
  }
}

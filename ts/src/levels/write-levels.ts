/** Alignment levels in data files: the field `similarity`, everything else byte for byte as it was. */
import fs from 'node:fs'
import type { Dataset } from '../data/dataset.js'
import { mismatch, show } from '../util/errors.js'
import { readRange, writeAll, writeAtomic } from '../util/files.js'
import { decodeUtf8, scanJson } from '../util/json.js'

/** Text of a record with its `similarity` set; everything else stays as it is, byte for byte. */
export function withSimilarity(record: string, level: number): string {
  const { members } = scanJson(record)
  if (!members) throw mismatch('ERR_DATA', 'levels', 'record', 'a JSON object', show(record))
  const mine = members.filter((m) => m.key === 'similarity')
  if (mine.length) {
    let out = ''
    let at = 0
    for (const m of mine) {
      out += record.slice(at, m.valueStart) + level
      at = m.valueEnd
    }
    return out + record.slice(at)
  }
  const last = members.at(-1)
  if (!last) return `{"similarity": ${level}}`
  // In the style of the record: what stands before its first key, and between the key and the value.
  const first = members[0]
  const indent = record.slice(record.indexOf('{') + 1, first.keyStart)
  const colon = record.slice(first.keyStart, first.valueStart).replace(/^"(?:[^"\\]|\\.)*"/, '')
  const space =
    indent === '' && members[1] ? record.slice(members[0].valueEnd, members[1].keyStart).replace(/^[^,]*,/, '') : indent
  return `${record.slice(0, last.valueEnd)},${space}"similarity"${colon}${level}${record.slice(last.valueEnd)}`
}

/** `similarity` of every record; null where a record has none. */
export function readLevels(dataset: Dataset): (number | null)[] {
  return Array.from({ length: dataset.length }, (_, i) => dataset.record(i).similarity)
}

/**
 * Writes levels into the `similarity` fields of a data set's file: atomically, record by record, everything else byte
 * for byte as it was. The data set is read again afterwards.
 * @param levels one integer >= 0 per record; -1 leaves a record as it is
 * @param target file to write; default: the data set's own, in place
 * @throws AlignGPTError ERR_ARGUMENT, ERR_DATA
 */
export async function writeLevels(dataset: Dataset, levels: ArrayLike<number>, target = dataset.file): Promise<void> {
  if (levels.length !== dataset.length)
    throw mismatch('ERR_ARGUMENT', 'levels', 'levels', `${dataset.length} of them`, `${levels.length}`)
  const source = fs.openSync(dataset.file, 'r')
  try {
    const size = fs.fstatSync(source).size
    const mode = fs.fstatSync(source).mode
    // A link stays a link.
    const real = fs.existsSync(target) ? fs.realpathSync(target) : target
    writeAtomic(real, (fd) => {
      fs.fchmodSync(fd, mode & 0o777)
      const out = new Appender(fd)
      let at = 0
      for (let i = 0; i < dataset.length; i++) {
        const level = levels[i]
        if (level === -1) continue
        if (!Number.isInteger(level) || level < 0)
          throw mismatch('ERR_ARGUMENT', 'levels', `level ${i}`, 'an integer >= 0, or -1', show(level))
        const { offset, bytes } = dataset.range(i)
        copyRange(source, dataset.file, [at, offset], out)
        const record = decodeUtf8(readRange(source, offset, bytes, dataset.file), dataset.file, 'ERR_DATA', offset)
        out.add(Buffer.from(withSimilarity(record, level)))
        at = offset + bytes
      }
      copyRange(source, dataset.file, [at, size], out)
      out.flush()
    })
  } finally {
    fs.closeSync(source)
  }
  if (target === dataset.file) await dataset.reindex()
}

// Bytes that are read or written at once.
const PIECE = 1 << 20

/** Collects small writes. */
class Appender {
  #parts: Buffer[] = []
  #waiting = 0
  #position = 0
  readonly #fd: number
  constructor(fd: number) {
    this.#fd = fd
  }
  add(b: Buffer): void {
    this.#parts.push(b)
    this.#waiting += b.length
    if (this.#waiting > PIECE) this.flush()
  }
  flush(): void {
    writeAll(this.#fd, Buffer.concat(this.#parts), this.#position)
    this.#position += this.#waiting
    this.#waiting = 0
    this.#parts = []
  }
}

function copyRange(fd: number, file: string, [from, to]: readonly [number, number], out: Appender): void {
  for (let at = from; at < to; at += PIECE) out.add(readRange(fd, at, Math.min(to - at, PIECE), file))
}

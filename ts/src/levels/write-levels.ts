/** Alignment levels in data files: the field `similarity`, everything else byte for byte as it was. */
import fs from 'node:fs'
import type { Dataset } from '../data/dataset.js'
import type { BadRecord } from '../data/record-check.js'
import type { RecordRange } from '../formats/record-file.js'
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

/** Text of a record without `similarity`; everything else stays as it is, byte for byte. */
export function withoutSimilarity(record: string): string {
  const { members } = scanJson(record)
  if (!members) throw mismatch('ERR_DATA', 'levels', 'record', 'a JSON object', show(record))
  let out = ''
  let at = 0
  for (const [i, m] of members.entries()) {
    if (m.key !== 'similarity') continue
    // With the comma behind it; the last one goes with the comma before it.
    const [from, to] =
      i + 1 < members.length
        ? [m.keyStart, members[i + 1].keyStart]
        : [Math.max(at, members[i - 1]?.valueEnd ?? m.keyStart), m.valueEnd]
    out += record.slice(at, from)
    at = to
  }
  return out + record.slice(at)
}

/** A level for `writeLevels`: the record keeps what it has. */
export const KEEP_LEVEL = -1
/** A level for `writeLevels`: the record has no `similarity` afterwards. */
export const NO_LEVEL = -2

/** Byte ranges of a data set's records and their levels, in the order of the file; bad records have none. */
function* edits(dataset: Dataset, levels: ArrayLike<number>): Generator<RecordRange & { level: number }> {
  const bad = [...dataset.bad]
  for (let i = 0; i < dataset.length; i++) {
    const range = dataset.range(i)
    while (bad.length && bad[0].byte < range.offset) yield rangeOf(bad.shift() as BadRecord)
    yield { ...range, level: levels[i] }
  }
  for (const b of bad) yield rangeOf(b)
}
// What is no JSON has no keys that could be taken out.
const rangeOf = ({ byte, bytes, kind }: BadRecord): RecordRange & { level: number } => ({
  ...{ offset: byte, bytes },
  level: kind === 'json' ? KEEP_LEVEL : NO_LEVEL,
})

/**
 * Writes levels into the `similarity` fields of a data set's file: atomically, record by record, everything else byte
 * for byte as it was. The data set is read again afterwards. Bad records of the file have no level afterwards.
 * @param levels one integer >= 0 per record; -1 leaves a record as it is, -2 takes its level away
 * @param target file to write; default: the data set's own, in place
 * @returns how many records had a level and have none now
 * @throws AlignGPTError ERR_ARGUMENT, ERR_DATA
 */
export async function writeLevels(dataset: Dataset, levels: ArrayLike<number>, target = dataset.file): Promise<number> {
  if (levels.length !== dataset.length)
    throw mismatch('ERR_ARGUMENT', 'levels', 'levels', `${dataset.length} of them`, `${levels.length}`)
  let removed = 0
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
      for (const { offset, bytes, level } of edits(dataset, levels)) {
        if (level === KEEP_LEVEL) continue
        if (!Number.isInteger(level) || (level < 0 && level !== NO_LEVEL))
          throw mismatch('ERR_ARGUMENT', 'levels', 'a level', 'an integer >= 0, -1 or -2', show(level))
        const record = decodeUtf8(readRange(source, offset, bytes, dataset.file), dataset.file, 'ERR_DATA', offset)
        const changed = level === NO_LEVEL ? withoutSimilarity(record) : withSimilarity(record, level)
        if (level === NO_LEVEL && changed === record) continue
        if (level === NO_LEVEL) removed++
        copyRange(source, dataset.file, [at, offset], out)
        out.add(Buffer.from(changed))
        at = offset + bytes
      }
      copyRange(source, dataset.file, [at, size], out)
      out.flush()
    })
  } finally {
    fs.closeSync(source)
  }
  if (target === dataset.file) await dataset.reindex()
  return removed
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

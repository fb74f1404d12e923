/**
 * What scoring keeps on disk, so that a run that was interrupted goes on: scores by pair, and CLIP's embeddings by picture
 * and caption. Both belong to one CLIP.
 */

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { stampOf } from '../formats/index-cache.js'
import { readRange, writeAll } from '../util/files.js'
import { hash53 } from '../util/hash.js'
import { Fingerprints } from '../util/hash-map.js'

/** Identity of a CLIP folder: its JSON files, and size and ends of its weights. */
export function clipIdentity(dir: string): string {
  const hash = createHash('sha256')
  for (const f of fs.readdirSync(dir).sort()) {
    const file = path.join(dir, f)
    if (!fs.statSync(file).isFile()) continue
    const { size, ends } = stampOf(file)
    hash.update(`${f}\0${size}\0${ends}\0`)
  }
  return hash.digest('hex').slice(0, 32)
}

/** Name of a pair: what its score depends on besides the CLIP. */
export const pairKey = (image: string, caption: string): number => hash53(`${image}\0${caption}`)

/** The part of a text file up to its last newline; a line that was being written when a run died is cut off. */
function completeLines(file: string): string[] {
  if (!fs.existsSync(file)) return []
  const text = fs.readFileSync(file, 'utf8')
  const end = text.lastIndexOf('\n') + 1
  if (end < text.length) fs.truncateSync(file, Buffer.byteLength(text.slice(0, end)))
  return text.slice(0, end).split('\n').filter(Boolean)
}

/** Scores as JSON lines: first the CLIP they belong to, then {pair, score}. */
export class ScoreFile {
  readonly #file: string
  readonly #known = new Map<number, number>()
  /** why scores found there are not used, null when they are */
  readonly stale: string | null = null

  constructor(file: string, clip: string) {
    this.#file = file
    const [first, ...rest] = completeLines(file)
    let owner: unknown = null
    try {
      if (first) owner = (JSON.parse(first) as { clip?: unknown }).clip
      if (owner === clip)
        for (const line of rest) {
          const { pair, score } = JSON.parse(line) as { pair: number; score: number }
          this.#known.set(pair, score)
        }
    } catch {
      owner = 'unreadable'
      this.#known.clear()
    }
    if (owner === clip) return
    if (first) this.stale = owner === 'unreadable' ? 'they cannot be read' : 'they belong to another CLIP'
    fs.writeFileSync(file, `${JSON.stringify({ clip })}\n`)
  }
  get(pair: number): number | undefined {
    return this.#known.get(pair)
  }
  /** Adds scores and writes them out. */
  add(scores: readonly { pair: number; score: number }[]): void {
    for (const { pair, score } of scores) this.#known.set(pair, score)
    fs.appendFileSync(this.#file, scores.map((s) => `${JSON.stringify(s)}\n`).join(''))
  }
}

/** Embeddings by key: `<name>.keys` (float64 each) and `<name>.f32` (rows of the same order). */
export class FeatureFile {
  readonly #path: string
  readonly #width: number
  readonly #places = new Fingerprints()
  readonly #keys: number
  readonly #rows: number
  #count: number

  constructor(folder: string, name: string, width: number) {
    this.#width = width
    this.#path = path.join(folder, name)
    fs.mkdirSync(folder, { recursive: true })
    const open = (end: string): number => fs.openSync(this.#name(end), fs.constants.O_RDWR | fs.constants.O_CREAT)
    this.#keys = open('keys')
    this.#rows = open('f32')
    // Rows are written before their keys, so that every complete key has its row.
    const stored = Math.floor(Math.min(fs.fstatSync(this.#keys).size / 8, fs.fstatSync(this.#rows).size / (4 * width)))
    const keys = readRange(this.#keys, 0, 8 * stored, this.#name('keys'))
    for (let i = 0; i < stored; i++) this.#places.set(keys.readDoubleLE(8 * i), i)
    this.#count = stored
  }
  #name(end: string): string {
    return `${this.#path}.${end}`
  }
  /** The row of a key, null when there is none. */
  get(key: number): Float32Array | null {
    const i = this.#places.get(key)
    if (i === undefined) return null
    const bytes = 4 * this.#width
    const row = readRange(this.#rows, i * bytes, bytes, this.#name('f32'))
    return new Float32Array(row.buffer.slice(row.byteOffset, row.byteOffset + bytes))
  }
  /** @param rows [keys.length, width] */
  add(keys: readonly number[], rows: Float32Array): void {
    writeAll(this.#rows, new Uint8Array(rows.buffer, rows.byteOffset, rows.byteLength), this.#count * 4 * this.#width)
    writeAll(this.#keys, new Uint8Array(Float64Array.from(keys).buffer), this.#count * 8)
    for (const k of keys) this.#places.set(k, this.#count++)
  }
  close(): void {
    fs.closeSync(this.#keys)
    fs.closeSync(this.#rows)
  }
}

/**
 * What one run left out of its data, and why. A run owns its log: the data set stays as it is and serves any number of runs. The
 * loader writes it, checkpoints hold its state.
 */
import { mismatch } from '../util/errors.js'
import type { Dataset } from './dataset.js'
import { listOf, sayBad } from './record-check.js'

/** A record that was left out of its batch, and why. */
export interface Dropped {
  /** its place in the file, from 0 */
  index: number
  id: string
  /** file name of the picture, null for text */
  image: string | null
  reason: string
}

/** The content of a log; plain JSON. */
export interface DropState {
  /** records, and pictures, that could not be used */
  bad: Dropped[]
  /** samples that do not fit the length limit */
  skipped: Dropped[]
  /** places of samples whose text was cut */
  truncated: number[]
}

/** Records of a data set that were left out or cut, each named once. */
export class DropLog {
  readonly #data: Dataset
  readonly #bad = new Map<number, Dropped>()
  readonly #skipped = new Map<number, Dropped>()
  readonly #truncated = new Set<number>()

  /** What the data set itself left out is noted at once. */
  constructor(data: Dataset) {
    this.#data = data
    for (const d of data.bad)
      add(this.#bad, { index: d.index, id: d.id ?? `${d.index}`, image: null, reason: sayBad(d) })
  }

  /** Notes a record, or its picture, that could not be used; `index` is that of the record in the data set, the state has its place in the file. */
  noteBad(d: Dropped): void {
    this.#note(this.#bad, d)
  }
  /** Notes a sample that does not fit. */
  noteSkipped(d: Dropped): void {
    this.#note(this.#skipped, d)
  }
  /** Notes a sample whose text was cut. */
  noteTruncated(index: number): void {
    this.#truncated.add(this.#data.place(index))
  }
  #note(list: Map<number, Dropped>, d: Dropped): void {
    add(list, { ...d, index: this.#data.place(d.index) })
  }

  /** What was left out so far. */
  get state(): DropState {
    return { bad: [...this.#bad.values()], skipped: [...this.#skipped.values()], truncated: [...this.#truncated] }
  }
  /** Goes on from a saved state. */
  restore(state: DropState): void {
    for (const d of state.bad) add(this.#bad, d)
    for (const d of state.skipped) add(this.#skipped, d)
    for (const i of state.truncated) this.#truncated.add(i)
  }

  /**
   * Stops a run whose data is broken.
   * @param maxBad share of the records that may be unusable, they or their pictures
   * @throws AlignGPTError ERR_DATA with the list
   */
  check(maxBad: number): void {
    const { file, length, bad } = this.#data
    const all = length + bad.length
    const n = this.#bad.size
    if (n <= maxBad * all) return
    const list = [...this.#bad.values()].map((d) => (d.image === null ? d.reason : `${d.id}: ${d.image}: ${d.reason}`))
    const expected = `at most ${100 * maxBad} % of the records (maxBad)`
    throw mismatch('ERR_DATA', 'data', `${file}: unusable records`, expected, `${n} of ${all}:${listOf(list, 50)}`)
  }
}

function add(list: Map<number, Dropped>, d: Dropped): void {
  if (!list.has(d.index)) list.set(d.index, d)
}

/**
 * A text on its way to tokens, and where each part of it comes from in the text that was given: the rules are those of
 * NormalizedString in Hugging Face's Rust library, so that offsets are the same.
 */
import { matchesOf } from './pattern.js'

/** Where each UTF-16 unit comes from: its offset in the original, or the offset of the first where nothing has changed. */
type Origin = Int32Array | number

export class AlignedText {
  readonly text: string
  readonly #origin: Origin
  /** offset in the original at which this part begins */
  readonly base: number

  constructor(text: string, origin: Origin, base = typeof origin === 'number' ? origin : (origin[0] ?? 0)) {
    this.text = text
    this.#origin = origin
    this.base = base
  }

  /** Offset in the original that the unit at `i` comes from; behind the end that of the last one. */
  at(i: number): number {
    const k = Math.min(i, this.text.length - 1)
    if (k < 0) return this.base
    if (typeof this.#origin !== 'number') return this.#origin[k]
    // The second half of a character comes from where the first does.
    const second =
      k > 0 && (this.text.charCodeAt(k) & 0xfc00) === 0xdc00 && (this.text.codePointAt(k - 1) ?? 0) > 0xffff
    return this.#origin + k - Number(second)
  }

  /** Writes where the units of a part come from. */
  origins(from: number, to: number, out: Int32Array): void {
    if (typeof this.#origin !== 'number') out.set(this.#origin.subarray(from, to))
    else for (let i = from; i < to; i++) out[i - from] = this.at(i)
  }

  slice(from: number, to: number): AlignedText {
    if (from === 0 && to === this.text.length && this.at(0) === this.base) return this
    const origin = typeof this.#origin === 'number' ? this.#origin + from : this.#origin.subarray(from, to)
    return new AlignedText(this.text.slice(from, to), origin, this.at(from))
  }

  /** Other characters, each from where the one in its place came from; `text` has as many UTF-16 units. */
  with(text: string): AlignedText {
    return text === this.text ? this : new AlignedText(text, this.#origin, this.base)
  }

  /** Nothing in front of an empty text. */
  prepend(prefix: string): AlignedText {
    if (this.text === '') return this
    const b = new Builder(this)
    b.add(prefix, this.at(0))
    b.keep(0, this.text.length)
    return b.done()
  }

  /** `content` in place of every match; it comes from the last character that it replaces. */
  replace(pattern: RegExp, content: string): AlignedText {
    const b = new Builder(this)
    let last = 0
    for (const { from, to } of matchesOf(this.text, pattern)) {
      b.keep(last, from)
      last = to
      b.add(content, last === 0 ? this.base : this.at(last - 1))
    }
    if (last === 0 && b.empty) return this
    b.keep(last, this.text.length)
    return b.done()
  }

  /**
   * The characters of `changes` in place of all: of each how many it is more than the one that stood there (1: it is new), or fewer
   * (-n: n behind it are gone). Origins follow the places.
   * @param skipped units that are gone at the front
   */
  transform(changes: Iterable<readonly [char: string, change: number]>, skipped = 0): AlignedText {
    const b = new Builder(this)
    const width = (i: number): number => ((this.text.codePointAt(i) ?? 0) > 0xffff ? 2 : 1)
    let at = skipped
    for (const [char, change] of changes) {
      if (change > 0) b.add(char, at === 0 ? this.base : this.at(at - 1))
      else {
        b.add(char, this.at(at))
        for (let gone = change; gone <= 0; gone++) at += width(at)
      }
    }
    return b.done()
  }
}

/** Puts a changed text together. */
class Builder {
  readonly #from: AlignedText
  #text = ''
  #origin: Int32Array
  #length = 0
  constructor(from: AlignedText) {
    this.#from = from
    this.#origin = new Int32Array(from.text.length + 8)
  }
  get empty(): boolean {
    return this.#text === ''
  }
  /** Room for more units; where they begin. */
  #more(units: number): number {
    const at = this.#length
    this.#length += units
    if (this.#length > this.#origin.length) {
      const larger = new Int32Array(2 * this.#length)
      larger.set(this.#origin)
      this.#origin = larger
    }
    return at
  }
  add(text: string, origin: number): void {
    this.#text += text
    const at = this.#more(text.length)
    this.#origin.fill(origin, at, this.#length)
  }
  keep(from: number, to: number): void {
    this.#text += this.#from.text.slice(from, to)
    const at = this.#more(to - from)
    this.#from.origins(from, to, this.#origin.subarray(at))
  }
  done(): AlignedText {
    return new AlignedText(this.#text, this.#origin.subarray(0, this.#length), this.#from.base)
  }
}

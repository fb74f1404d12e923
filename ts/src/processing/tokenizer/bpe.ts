/**
 * Byte-pair encoding of tokenizer.json (Hugging Face's Rust library, models/bpe): a word becomes its characters, then the pair with the
 * best rank is merged until none is left, in n log n.
 */
import { mismatch, show } from '../../util/errors.js'
import type { Json } from '../tokenizer-files.js'
import { listOf, textOf, Unsupported } from './pattern.js'

export interface EncodedWord {
  ids: readonly number[]
  /** UTF-16 units of the word that each token stands for; UTF-8 bytes where `bytes` says so */
  lengths: readonly number[]
  /** characters without a token were left out: lengths are bytes, and later tokens move forward, as the Rust library has it */
  bytes: boolean
}

/** Symbols of a word while they are merged: a list in which merged ones have no length left. */
interface Symbols {
  ids: number[]
  lengths: number[]
}

// Words that are kept with their tokens, and the longest of them.
const KEPT = 1 << 16
const LONGEST_KEPT = 128
// Place in a word beside a rank in one number: words of up to 2^26 symbols.
const PLACES = 2 ** 26

const BYTES = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`)

/** Smallest number first. */
class Heap {
  readonly #items: number[] = []
  push(x: number): void {
    const a = this.#items
    let i = a.length
    a.push(x)
    while (i > 0) {
      const parent = (i - 1) >> 1
      if (a[parent] <= x) break
      a[i] = a[parent]
      i = parent
    }
    a[i] = x
  }
  pop(): number | undefined {
    const a = this.#items
    const top = a[0]
    const x = a.pop()
    if (x === undefined || a.length === 0) return top
    let i = 0
    for (;;) {
      let child = 2 * i + 1
      if (child >= a.length) break
      if (child + 1 < a.length && a[child + 1] < a[child]) child++
      if (a[child] >= x) break
      a[i] = a[child]
      i = child
    }
    a[i] = x
    return top
  }
}

export class Bpe {
  readonly vocab: ReadonlyMap<string, number>
  /** by id */
  readonly tokens: ReadonlyMap<number, string>
  readonly unkToken: string | null
  readonly byteFallback: boolean
  /** rank of a pair of ids: left * size + right */
  readonly #ranks = new Map<number, number>()
  /** by rank: the token that a merge makes */
  readonly #made: number[] = []
  readonly #size: number
  readonly #prefix: string
  readonly #suffix: string
  readonly #fuseUnk: boolean
  readonly #ignoreMerges: boolean
  readonly #where: string
  readonly #kept = new Map<string, EncodedWord>()

  /** @throws Unsupported */
  constructor(model: Json, where: string) {
    this.#where = where
    const type = model.type ?? (Array.isArray(model.merges) ? 'BPE' : undefined)
    if (type !== 'BPE') throw new Unsupported('model.type', 'BPE', String(type))
    if (Number(model.dropout ?? 0) !== 0) throw new Unsupported('model.dropout', 'none', String(model.dropout))
    this.vocab = new Map(Object.entries((model.vocab ?? {}) as Record<string, number>))
    this.tokens = new Map([...this.vocab].map(([token, id]) => [id, token]))
    let largest = 0
    for (const id of this.vocab.values()) {
      if (!Number.isInteger(id) || id < 0) throw new Unsupported('model.vocab', 'ids of whole numbers', show(id))
      if (id > largest) largest = id
    }
    this.#size = largest + 1
    this.unkToken = model.unk_token == null ? null : textOf(model.unk_token, 'model.unk_token')
    this.byteFallback = model.byte_fallback === true
    this.#prefix = textOf(model.continuing_subword_prefix, 'model.continuing_subword_prefix')
    this.#suffix = textOf(model.end_of_word_suffix, 'model.end_of_word_suffix')
    if (this.byteFallback && this.#prefix + this.#suffix !== '')
      throw new Unsupported('model.byte_fallback', 'false beside a subword prefix or suffix', 'true')
    this.#fuseUnk = model.fuse_unk === true
    this.#ignoreMerges = model.ignore_merges === true
    for (const merge of listOf<string | [string, string]>(model.merges, 'model.merges')) this.#addMerge(merge)
  }

  #addMerge(merge: string | readonly string[]): void {
    const [left, right, ...rest] = typeof merge === 'string' ? merge.split(' ') : merge
    const [a, b] = [this.vocab.get(left), this.vocab.get(right)]
    const made = this.vocab.get(`${left}${(right ?? '').slice(this.#prefix.length)}`)
    if (a === undefined || b === undefined || made === undefined || rest.length)
      throw new Unsupported('model.merges', 'two pieces of the vocabulary that make a third', show(merge))
    this.#ranks.set(a * this.#size + b, this.#made.length)
    this.#made.push(made)
  }

  /** Whether words that begin with ▁ can be merged one by one: no piece crosses to a ▁, and nothing else depends on the whole. */
  get splitsAtMarks(): boolean {
    if (this.#prefix || this.#suffix || this.#ignoreMerges || !this.vocab.has('▁')) return false
    // A character that is left out moves the offsets of the whole word.
    if (this.unkToken === null && !(this.byteFallback && BYTES.every((token) => this.vocab.has(token)))) return false
    for (const token of this.vocab.keys()) if (/[^▁]▁/.test(token)) return false
    return true
  }

  encode(word: string): EncodedWord {
    const known = this.#kept.get(word)
    if (known) return known
    const made = this.#encode(word)
    if (word.length <= LONGEST_KEPT) {
      if (this.#kept.size >= KEPT) this.#kept.clear()
      this.#kept.set(word, made)
    }
    return made
  }

  #encode(word: string): EncodedWord {
    const whole = this.#ignoreMerges ? this.vocab.get(word) : undefined
    if (whole !== undefined) return { ids: [whole], lengths: [word.length], bytes: false }
    const symbols = this.#symbols(word, (s) => s.length)
    if (symbols) return { ...this.#merged(symbols), bytes: false }
    const counted = this.#symbols(word, (s) => Buffer.byteLength(s), true) as Symbols
    return { ...this.#merged(counted), bytes: true }
  }

  /** The tokens of single characters; null where one has none and there is no token for the unknown. */
  #symbols(word: string, measure: (s: string) => number, drops = false): Symbols | null {
    const s: Symbols = { ids: [], lengths: [] }
    let unknown = 0
    const flush = (): void => {
      if (unknown) this.#add(s, this.#unkId(), unknown)
      unknown = 0
    }
    for (let i = 0; i < word.length; ) {
      const end = i + ((word.codePointAt(i) as number) > 0xffff ? 2 : 1)
      const char = word.slice(i, end)
      const text = `${i > 0 ? this.#prefix : ''}${char}${end === word.length ? this.#suffix : ''}`
      const length = measure(char)
      i = end
      const id = this.vocab.get(text)
      if (id !== undefined) {
        flush()
        this.#add(s, id, length)
        continue
      }
      const bytes = this.byteFallback ? this.#bytesOf(text) : null
      // As in the Rust library, unknown characters before these follow them.
      if (bytes) for (const [k, b] of bytes.entries()) this.#add(s, b, k === bytes.length - 1 ? length : 0)
      else if (this.unkToken !== null) {
        if (!this.#fuseUnk) flush()
        unknown += length
      } else if (!drops) return null
    }
    flush()
    return s
  }

  #add(s: Symbols, id: number, length: number): void {
    s.ids.push(id)
    s.lengths.push(length)
  }

  #unkId(): number {
    const id = this.vocab.get(this.unkToken as string)
    if (id === undefined)
      throw mismatch(
        'ERR_DATA',
        'tokenizer',
        `${this.#where}: unk_token`,
        'a token of the vocabulary',
        show(this.unkToken),
      )
    return id
  }

  #bytesOf(text: string): number[] | null {
    const ids = Array.from(Buffer.from(text), (b) => this.vocab.get(BYTES[b]))
    return ids.includes(undefined) ? null : (ids as number[])
  }

  /** Merges pairs, the best rank first, of equal ones the first in the word. */
  #merged({ ids, lengths }: Symbols): Symbols {
    const n = ids.length
    if (n < 2) return { ids, lengths }
    const next = Int32Array.from({ length: n }, (_, i) => (i + 1 < n ? i + 1 : -1))
    const previous = Int32Array.from({ length: n }, (_, i) => i - 1)
    const gone = new Uint8Array(n)
    const heap = new Heap()
    const offer = (left: number): void => {
      const rank = left < 0 || next[left] < 0 ? undefined : this.#ranks.get(ids[left] * this.#size + ids[next[left]])
      if (rank !== undefined) heap.push(rank * PLACES + left)
    }
    for (let i = 0; i + 1 < n; i++) offer(i)
    for (let top = heap.pop(); top !== undefined; top = heap.pop()) {
      const [rank, at] = [Math.floor(top / PLACES), top % PLACES]
      const right = next[at]
      if (gone[at] || right < 0) continue
      const now = this.#ranks.get(ids[at] * this.#size + ids[right])
      if (now === undefined || this.#made[now] !== this.#made[rank]) continue
      ids[at] = this.#made[rank]
      lengths[at] += lengths[right]
      gone[right] = 1
      next[at] = next[right]
      if (next[at] >= 0) previous[next[at]] = at
      offer(previous[at])
      offer(at)
    }
    const out: Symbols = { ids: [], lengths: [] }
    for (let i = 0; i >= 0; i = next[i]) this.#add(out, ids[i], lengths[i])
    return out
  }
}

/** The paged key/value cache of a batch of sequences while they are being generated. */
import { native } from './native.js'
import { type AttentionOptions, attention } from './ops.js'
import { type Device, type Dtype, Indices, Tensor, tensor, zeros } from './tensor.js'

const BLOCK = 32

export class Cache {
  readonly #k: Tensor[]
  readonly #v: Tensor[]
  readonly #lengths: number[]
  readonly #perSequence: number
  readonly #blockTable: Tensor
  readonly #slots = new Indices()
  readonly #kvLen = new Indices()
  #fresh = true

  /** @param maxLength longest any sequence may become */
  constructor(layers: number, sequences: number, maxLength: number, width: number, dtype: Dtype, device: Device) {
    this.#perSequence = Math.max(1, Math.ceil(maxLength / BLOCK))
    const blocks = sequences * this.#perSequence
    const make = (): Tensor => zeros([blocks, BLOCK, width], dtype, device).persist()
    this.#k = Array.from({ length: layers }, make)
    this.#v = Array.from({ length: layers }, make)
    this.#lengths = Array.from({ length: sequences }, () => 0)
    const table = Int32Array.from({ length: blocks }, (_, i) => i)
    this.#blockTable = tensor(table, [sequences, this.#perSequence]).persist()
  }

  /** Announces `counts[s]` new tokens of each sequence; returns their positions. Then every layer calls `attention`. */
  extend(counts: readonly number[]): number[] {
    const slots: number[] = []
    const positions: number[] = []
    this.#fresh = this.#lengths.every((n) => n === 0)
    for (const [s, n] of counts.entries()) {
      for (let i = 0; i < n; i++) {
        positions.push(this.#lengths[s] + i)
        slots.push(s * this.#perSequence * BLOCK + this.#lengths[s] + i)
      }
      this.#lengths[s] += n
    }
    this.#slots.set(slots)
    this.#kvLen.set(this.#lengths)
    return positions
  }

  /** Stores this layer's new keys and values and attends to all there are. */
  attention(layer: number, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, o: AttentionOptions): Tensor {
    native.cacheWrite(this.#k[layer].h, k.h, this.#slots.tensor.h)
    native.cacheWrite(this.#v[layer].h, v.h, this.#slots.tensor.h)
    if (this.#fresh) return attention(q, k, v, offsets, offsets, o) // nothing older to look at
    const scale = o.scale ?? 1 / Math.sqrt(q.shape[1] / o.heads)
    return new Tensor(
      native.attentionCached(
        q.h,
        this.#k[layer].h,
        this.#v[layer].h,
        offsets.h,
        this.#blockTable.h,
        this.#kvLen.tensor.h,
        o.heads,
        o.kvHeads,
        scale,
      ),
    )
  }

  dispose(): void {
    for (const t of [...this.#k, ...this.#v, this.#blockTable, this.#slots, this.#kvLen]) t.dispose()
  }
}

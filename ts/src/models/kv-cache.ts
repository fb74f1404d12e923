/** The paged key/value cache of a batch of sequences while they are being generated. */
import { native } from '../core/native.js'
import { type AttentionOptions, selfAttention } from '../core/ops.js'
import { type Device, type Dtype, Indices, Tensor, tensor, zeros } from '../core/tensor.js'

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

  /** Announces `counts[s]` new tokens of each sequence; returns their positions. Then every layer stores them and attends. */
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

  /** Where `qkvLinear` stores this layer's new keys and values. */
  place(layer: number): { k: Tensor; v: Tensor; slots: Tensor } {
    return { k: this.#k[layer], v: this.#v[layer], slots: this.#slots.tensor }
  }

  /** Attention of the new rows of `qkvLinear`, which are stored, to all there are. */
  attention(layer: number, qkv: Tensor, offsets: Tensor, o: AttentionOptions): Tensor {
    if (this.#fresh) return selfAttention(qkv, offsets, o) // nothing older to look at
    const scale = o.scale ?? 1 / Math.sqrt(qkv.shape[1] / (o.heads + 2 * o.kvHeads))
    return new Tensor(
      native.attentionCached(
        qkv.h,
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

/** Texts remembered by their hash: names of a tar's members, texts seen before. 12 bytes an entry and half as much room. */

/** Integers by 53-bit key. */
export class Fingerprints {
  // Open addressing; 0 marks an empty place, so keys are stored plus 1.
  #keys = new Float64Array(1024)
  #values = new Int32Array(1024)
  #count = 0

  #place(key: number): number {
    const mask = this.#keys.length - 1
    // The low 32 bits are as good a hash as any.
    for (let i = key & mask; ; i = (i + 1) & mask) if (this.#keys[i] === 0 || this.#keys[i] === key + 1) return i
  }
  /** The value of a key, undefined when there is none. */
  get(key: number): number | undefined {
    const i = this.#place(key)
    return this.#keys[i] === 0 ? undefined : this.#values[i]
  }
  /** Sets the value of a key. @returns the value it had */
  set(key: number, value: number): number | undefined {
    if (this.#count >= this.#keys.length * 0.6) this.#grow()
    const i = this.#place(key)
    const old = this.#keys[i] === 0 ? undefined : this.#values[i]
    if (old === undefined) this.#count++
    this.#keys[i] = key + 1
    this.#values[i] = value
    return old
  }
  #grow(): void {
    const [keys, values] = [this.#keys, this.#values]
    this.#keys = new Float64Array(2 * keys.length)
    this.#values = new Int32Array(2 * keys.length)
    for (let j = 0; j < keys.length; j++) {
      if (keys[j] === 0) continue
      const i = this.#place(keys[j] - 1)
      this.#keys[i] = keys[j]
      this.#values[i] = values[j]
    }
  }
}

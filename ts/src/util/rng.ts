/** Philox4x32-10 (Salmon et al. 2011): random numbers as a pure function of (seed, stream, counter). */

const mulHigh = (a: number, b: number): number => {
  const a0 = a & 0xffff
  const a1 = a >>> 16
  const b0 = b & 0xffff
  const b1 = b >>> 16
  const mid = a1 * b0 + ((a0 * b0) >>> 16)
  const low = a0 * b1 + (mid & 0xffff)
  return (a1 * b1 + Math.floor(mid / 65536) + Math.floor(low / 65536)) >>> 0
}

/** Four 32-bit words. */
export function philox(seed: number, stream: number, counter: number): [number, number, number, number] {
  let c0 = counter >>> 0
  let c1 = Math.floor(counter / 4294967296) >>> 0
  let c2 = stream >>> 0
  let c3 = Math.floor(stream / 4294967296) >>> 0
  let k0 = seed >>> 0
  let k1 = Math.floor(seed / 4294967296) >>> 0
  for (let round = 0; round < 10; round++) {
    const n0 = (mulHigh(0xcd9e8d57, c2) ^ c1 ^ k0) >>> 0
    const n2 = (mulHigh(0xd2511f53, c0) ^ c3 ^ k1) >>> 0
    c1 = Math.imul(0xcd9e8d57, c2) >>> 0
    c3 = Math.imul(0xd2511f53, c0) >>> 0
    c0 = n0
    c2 = n2
    k0 = (k0 + 0x9e3779b9) >>> 0
    k1 = (k1 + 0xbb67ae85) >>> 0
  }
  return [c0, c1, c2, c3]
}

/** A stream of uniform numbers in [0, 1); the same arguments give the same stream. */
export class Rng {
  #counter = 0
  #words: number[] = []
  constructor(
    private readonly seed: number,
    private readonly stream = 0,
  ) {}
  next(): number {
    if (this.#words.length === 0) this.#words = philox(this.seed, this.stream, this.#counter++)
    return (this.#words.pop() as number) / 4294967296
  }
  /** An integer in 0..n-1. */
  int(n: number): number {
    return Math.floor(this.next() * n)
  }
  pick<T>(list: readonly T[]): T {
    return list[this.int(list.length)]
  }
}

/** A random order of 0..n-1 (Fisher-Yates). */
export function permutation(n: number, seed: number, stream: number): Int32Array {
  const rng = new Rng(seed, stream)
  const order = Int32Array.from({ length: n }, (_, i) => i)
  for (let i = n - 1; i > 0; i--) {
    const j = rng.int(i + 1)
    const t = order[i]
    order[i] = order[j]
    order[j] = t
  }
  return order
}

/**
 * Philox4x32-10 (Salmon et al., SC 2011): random numbers as a pure function of (seed, stream, counter), so that order and
 * augmentation can be computed at any point of a run without replaying it.
 */

const mulHi = (a: number, b: number): number => {
  const [ah, al, bh, bl] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff]
  const u = ah * bl + Math.floor((al * bl) / 0x10000)
  const v = al * bh + (u % 0x10000)
  return ah * bh + Math.floor(u / 0x10000) + Math.floor(v / 0x10000)
}

/** One block: counter (4 words) and key (2 words) -> 4 random words. */
export function philox(counter: readonly number[], key: readonly number[]): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter.map((x) => x >>> 0)
  let [k0, k1] = key.map((x) => x >>> 0)
  for (let i = 0; i < 10; i++) {
    const [h0, l0] = [mulHi(0xd2511f53, c0), Math.imul(0xd2511f53, c0) >>> 0]
    const [h1, l1] = [mulHi(0xcd9e8d57, c2), Math.imul(0xcd9e8d57, c2) >>> 0]
    ;[c0, c1, c2, c3] = [(h1 ^ c1 ^ k0) >>> 0, l1, (h0 ^ c3 ^ k1) >>> 0, l0]
    k0 = (k0 + 0x9e3779b9) >>> 0
    k1 = (k1 + 0xbb67ae85) >>> 0
  }
  return [c0, c1, c2, c3]
}

/** A stream of random numbers, named by a seed and up to three 32-bit stream numbers. */
export class Rng {
  private block: number[] = []
  private counter = 0
  private readonly key: [number, number]
  constructor(
    seed: number,
    private readonly a = 0,
    private readonly b = 0,
    private readonly c = 0,
  ) {
    this.key = [seed >>> 0, Math.floor(seed / 0x100000000) >>> 0]
  }
  /** Uniform in 0..2^32-1. */
  uint32(): number {
    if (!this.block.length) this.block = philox([this.counter++, this.a, this.b, this.c], this.key)
    return this.block.shift() as number
  }
  /** Uniform in [0, 1), 53 bits. */
  uniform(): number {
    return ((this.uint32() >>> 5) * 0x4000000 + (this.uint32() >>> 6)) / 0x20000000000000
  }
  /** Uniform in [lo, hi). */
  between(lo: number, hi: number): number {
    return lo + (hi - lo) * this.uniform()
  }
  /** Uniform integer in 0..n-1. */
  int(n: number): number {
    return Math.floor(this.uniform() * n)
  }
}

/** Random permutation of 0..n-1 (Fisher-Yates), a pure function of its arguments. */
export function permutation(n: number, seed: number, stream = 0): Int32Array {
  const rng = new Rng(seed, 0x5f5f, stream)
  const out = Int32Array.from({ length: n }, (_, i) => i)
  for (let i = n - 1; i > 0; i--) {
    const j = rng.int(i + 1)
    const x = out[i]
    out[i] = out[j]
    out[j] = x
  }
  return out
}

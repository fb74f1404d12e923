/** Numbers that both sides make from the same formula, and what they compare of their results. */
import type { Dtype } from '../../ts/src/core/native.js'
import { type Tensor, tensor } from '../../ts/src/core/tensor.js'

/** n 32-bit hashes of (seed, index) (murmur3's finalizer); `bits` in peer_kernels.py is the same function. */
function bits(n: number, seed: number): Uint32Array {
  const out = new Uint32Array(n)
  const base = Math.imul(seed, 0x9e3779b9)
  for (let i = 0; i < n; i++) {
    let x = (i + base) >>> 0
    x ^= x >>> 16
    x = Math.imul(x, 0x85ebca6b)
    x ^= x >>> 13
    x = Math.imul(x, 0xc2b2ae35)
    out[i] = x ^ (x >>> 16)
  }
  return out
}

/** n numbers, uniform in [-scale, scale). */
export function floats(n: number, seed: number, scale = 1): Float32Array {
  const out = new Float32Array(n)
  const hashes = bits(n, seed)
  for (let i = 0; i < n; i++) out[i] = ((hashes[i] >>> 8) / 8388608 - 1) * scale
  return out
}

/** n integers in [low, high). */
export function integers(n: number, seed: number, low: number, high: number): Int32Array {
  return Int32Array.from(bits(n, seed), (x) => low + (x % (high - low)))
}

/** Offsets [n+1] of n pieces of the given lengths. */
export function running(lengths: readonly number[]): number[] {
  const offsets = [0]
  for (const l of lengths) offsets.push((offsets.at(-1) as number) + l)
  return offsets
}

/** A tensor that lives until it is disposed, uniform in offset + [-scale, scale). */
export function random(shape: readonly number[], seed: number, scale = 1, dtype: Dtype = 'f32', offset = 0): Tensor {
  const data = floats(
    shape.reduce((n, d) => n * d, 1),
    seed,
    scale,
  )
  if (offset) for (let i = 0; i < data.length; i++) data[i] += offset
  return tensor(data, shape, dtype).persist()
}

/** Size, norm over all elements, and 256 elements spread over a result. */
export interface Digest {
  n: number
  norm: number
  samples: number[]
}

export function digest(t: Tensor): Digest {
  const values = t.toFloats()
  const n = values.length
  let squares = 0
  for (const v of values) squares += v * v
  const samples = Array.from({ length: Math.min(256, n) }, (_, i) => values[(i * 2654435761) % n])
  return { n, norm: Math.sqrt(squares), samples }
}

/**
 * Throws unless both sides computed the same thing.
 * @param tolerance of the norm, relative; of a single element, relative to the root mean square
 */
export function assertSame(
  what: string,
  ours: Record<string, Digest>,
  peer: Record<string, Digest>,
  tolerance: number,
): void {
  for (const [name, a] of Object.entries(ours)) {
    const b = peer[name]
    if (!b || a.n !== b.n) throw new Error(`${what}: ${name}: expected ${a.n} elements from the peer, got ${b?.n}`)
    const rms = b.norm / Math.sqrt(b.n) || 1
    const worst = Math.max(...a.samples.map((v, i) => Math.abs(v - b.samples[i]))) / rms
    const norm = Math.abs(a.norm - b.norm) / (b.norm || 1)
    if (!(norm <= tolerance && worst <= 8 * tolerance))
      throw new Error(
        `${what}: ${name} differs from PyTorch: norm ${a.norm} against ${b.norm}, worst element off by ${worst.toExponential(1)} of the root mean square`,
      )
  }
}

/** Tolerance of `assertSame` for single operations: f32 rounding of long sums, and bf16's 8 bits. */
export const TOLERANCE = { f32: 1e-4, bf16: 1e-2 } as const

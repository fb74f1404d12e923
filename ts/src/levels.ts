/** Alignment scores and levels (arXiv 2405.14129, section 3.1): CLIP cosine of each pair, cut into N buckets. */
import type { CLIPModel } from './clip.js'
import type { PreprocessorConfig } from './config.js'
import { AlignGPTError } from './errors.js'
import { loadPixels } from './image.js'
import { noGrad, scope, tensor } from './tensor.js'
import type { Tokenizer } from './tokenizer.js'

export interface Pair {
  id: string
  /** file, or bytes of one */
  image: string | Uint8Array
  caption: string
}

export interface Levels {
  /** level of each score, 0 = least aligned */
  levels: number[]
  /** lower edge of each bucket */
  edges: number[]
  histogram: number[]
}

/**
 * Scores -> levels. `width` (the paper's equally spaced intervals, default): min(N-1, floor(N (s - min) / (max - min)));
 * `quantile`: floor(rank N / n), ascending, ties by position. Equal scores all get level 0 under `width`.
 * @throws ERR_DATA for a score that is not finite
 */
export function bucketLevels(scores: readonly number[], n: number, buckets: 'width' | 'quantile' = 'width'): Levels {
  if (!Number.isInteger(n) || n < 1) throw new AlignGPTError('ERR_ARGUMENT', `[levels] levels: expected an integer >= 1, got ${n}`)
  const bad = scores.findIndex((s) => !Number.isFinite(s))
  if (bad >= 0) throw new AlignGPTError('ERR_DATA', `[levels] score ${bad}: expected a finite number, got ${scores[bad]}`)
  const order = scores.map((_, i) => i).sort((a, b) => scores[a] - scores[b] || a - b)
  const low = scores[order[0]] ?? 0
  const range = (scores[order.at(-1) ?? 0] ?? 0) - low
  const levels = new Array<number>(scores.length)
  if (buckets === 'quantile') for (const [rank, i] of order.entries()) levels[i] = Math.floor((rank * n) / scores.length)
  else for (const [i, s] of scores.entries()) levels[i] = range > 0 ? Math.min(n - 1, Math.floor((n * (s - low)) / range)) : 0
  const histogram = Array.from({ length: n }, (_, l) => levels.filter((x) => x === l).length)
  const edges = Array.from({ length: n }, (_, l) =>
    buckets === 'width' ? low + (l * range) / n : (scores[order[Math.ceil((l * scores.length) / n)]] ?? low + range),
  )
  return { levels, edges, histogram }
}

/** Cosine of CLIP's image and text embeddings for each pair, in batches. Plain CLIP preprocessing, captions truncated. */
export async function clipScores(
  clip: CLIPModel,
  tokenizer: Tokenizer,
  preprocessor: PreprocessorConfig,
  pairs: readonly Pair[],
  o: { batch?: number; onProgress?: (done: number) => void; pad?: boolean } = {},
): Promise<{ scores: number[]; imageEmbeds: Float32Array; textEmbeds: Float32Array }> {
  const size = o.batch ?? 64
  const width = clip.config.projection_dim
  const imageEmbeds = new Float32Array(pairs.length * width)
  const textEmbeds = new Float32Array(pairs.length * width)
  const limit = clip.config.text.max_position_embeddings
  const side = preprocessor.crop
  for (let at = 0; at < pairs.length; at += size) {
    const part = pairs.slice(at, at + size)
    const pictures = await Promise.all(part.map((p) => loadPixels(p.image, preprocessor, o.pad ?? false)))
    const pixels = new Float32Array(part.length * 3 * side * side)
    for (const [i, p] of pictures.entries()) pixels.set(p, i * 3 * side * side)
    const texts = part.map((p) => tokenizer.encodeClip(p.caption, limit))
    scope(() =>
      noGrad(() => {
        const images = tensor(pixels, [part.length, 3, side, side], clip.dtype)
        imageEmbeds.set(clip.imageEmbeds(images).toFloats(), at * width)
        textEmbeds.set(clip.textEmbeds(texts).toFloats(), at * width)
      }),
    )
    o.onProgress?.(Math.min(at + size, pairs.length))
  }
  const scores = pairs.map((_, i) => {
    let s = 0
    for (let j = 0; j < width; j++) s += imageEmbeds[i * width + j] * textEmbeds[i * width + j]
    return s
  })
  return { scores, imageEmbeds, textEmbeds }
}

/** Alignment scores (arXiv 2405.14129, section 3.1): the cosine of a pair's CLIP embeddings. */
import { loadClip } from './aligngpt.js'
import type { CLIPModel } from './clip.js'
import { type PreprocessorConfig, readPreprocessor } from './config.js'
import type { Dataset } from './data.js'
import { AlignGPTError, mismatch } from './errors.js'
import { decodeImage, loadImage, normaliseInto, normaliseTable, preprocessImage, type RgbImage } from './image.js'
import { type Buckets, bucketLevels, type Levels, writeLevels } from './levels.js'
import type { PictureSource } from './pictures.js'
import type { DataRecord } from './prompt.js'
import { noGrad, scope, tensor } from './tensor.js'
import { Tokenizer } from './tokenizer.js'

export interface Pair {
  id: string
  /** file, bytes of one, or place in a data set */
  image: string | Uint8Array | PictureSource
  caption: string
}

const decode = (image: Pair['image']): Promise<RgbImage> =>
  typeof image === 'string' || image instanceof Uint8Array ? decodeImage(image) : loadImage(image)

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
  const table = normaliseTable(preprocessor)
  for (let at = 0; at < pairs.length; at += size) {
    const part = pairs.slice(at, at + size)
    const pixels = new Float32Array(part.length * 3 * side * side)
    const pictures = await Promise.all(part.map((p) => decode(p.image)))
    for (const [i, p] of pictures.entries())
      normaliseInto(preprocessImage(p, { ...preprocessor, pad: o.pad ?? false }), table, pixels, i * 3 * side * side)
    const texts = part.map((p) => tokenizer.encodeClip(p.caption, limit))
    scope(() =>
      noGrad(() => {
        const images = tensor(pixels, [part.length, 3, side, side], clip.dtype, clip.device)
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

export interface LevelsOptions {
  /** N, default the model's */
  levels?: number
  /** width: equal parts of the score range (the paper's rule, default); quantile: equal counts */
  buckets?: Buckets
  batch?: number
  /** false: only compute, do not write `similarity` into the file */
  write?: boolean
  onProgress?: (done: number, total: number) => void
}

/** The caption of a pair: its first answer. */
export function captionOf(record: DataRecord): string {
  const turn = record.conversations.find((t) => t.from === 'gpt')
  if (!turn) throw mismatch('ERR_DATA', 'levels', `record '${record.id}'`, 'a caption (gpt turn)', 'none')
  return turn.value
}

/**
 * Scores every pair of a data set with a CLIP, cuts the scores into levels and writes them into the file as `similarity`.
 * Records without a picture, and pictures that cannot be read, keep what they have.
 * @param model an AlignGPT (its CLIP is used), or the folder of a CLIP
 */
export async function levels(
  data: Dataset,
  model: { clipDir: string; levels: number } | string,
  o: LevelsOptions = {},
): Promise<Levels & { scores: (number | null)[]; bad: { id: string; reason: string }[] }> {
  const dir = typeof model === 'string' ? model : model.clipDir
  const n = o.levels ?? (typeof model === 'string' ? 8 : model.levels)
  const clip = loadClip(dir)
  try {
    const pairs: (Pair & { index: number })[] = []
    const bad: { id: string; reason: string }[] = []
    for (let index = 0; index < data.length; index++) {
      const r = data.record(index)
      if (r.image === null) continue
      try {
        const image = data.picture(r.image)
        await loadImage(image)
        pairs.push({ id: r.id, image, caption: captionOf(r), index })
      } catch (e) {
        if (!(e instanceof AlignGPTError) || e.code !== 'ERR_IMAGE') throw e
        bad.push({ id: r.id, reason: e.message })
      }
    }
    const tokenizer = Tokenizer.load(dir)
    const { scores } = await clipScores(clip, tokenizer, readPreprocessor(dir), pairs, {
      batch: o.batch,
      onProgress: (done) => o.onProgress?.(done, pairs.length),
    })
    const result = bucketLevels(scores, n, o.buckets ?? 'width')
    const all = new Int32Array(data.length).fill(-1)
    const every: (number | null)[] = Array.from({ length: data.length }, () => null)
    for (const [i, p] of pairs.entries()) {
      all[p.index] = result.levels[i]
      every[p.index] = scores[i]
    }
    if (o.write !== false) await writeLevels(data, all)
    return { ...result, scores: every, bad }
  } finally {
    clip.dispose()
  }
}

/** Alignment scores (arXiv 2405.14129, section 3.1): the cosine of a pair's CLIP embeddings. */

import fs from 'node:fs'
import path from 'node:path'
import { noGrad, scope, tensor } from '../core/tensor.js'
import type { Dataset } from '../data/dataset.js'
import { sayBad } from '../data/record-check.js'
import type { DataRecord } from '../formats/record-file.js'
import { type LoadedClip, loadClip } from '../models/load.js'
import { decodeImage, loadImage, type RgbImage } from '../processing/image/decode.js'
import { normaliseInto, normaliseTable, type Preprocess, preprocessImage } from '../processing/image/preprocess.js'
import type { ImageSource } from '../processing/image/source.js'
import { AlignGPTError, mismatch } from '../util/errors.js'
import { hash53 } from '../util/hash.js'
import { type Buckets, bucketLevels, type Levels } from './bucket.js'
import { clipIdentity, FeatureFile, pairKey, ScoreFile } from './score-store.js'
import { NO_LEVEL, writeLevels } from './write-levels.js'

export interface Pair {
  id: string
  /** file, or bytes of one */
  image: string | Uint8Array
  caption: string
}

/** A CLIP with what it needs to embed pictures and captions. Plain CLIP preprocessing, captions truncated. */
class Embedder {
  readonly #preprocess: Preprocess
  readonly #table: Float32Array
  readonly clip: LoadedClip
  constructor(clip: LoadedClip, pad = false) {
    this.clip = clip
    this.#preprocess = { ...clip.preprocessor, pad }
    this.#table = normaliseTable(clip.preprocessor)
  }
  get width(): number {
    return this.clip.config.projection_dim
  }
  /** [n, width], rows of norm 1 */
  images(pictures: readonly RgbImage[]): Float32Array {
    const side = this.#preprocess.crop
    const size = 3 * side * side
    const pixels = new Float32Array(pictures.length * size)
    for (const [i, p] of pictures.entries())
      normaliseInto(preprocessImage(p, this.#preprocess), this.#table, pixels, i * size)
    const { dtype, device } = this.clip
    const shape = [pictures.length, 3, side, side]
    const run = () => this.clip.imageEmbeds(tensor(pixels, shape, dtype, device)).toFloats()
    return Float32Array.from(scope(() => noGrad(run)))
  }
  /** [n, width], rows of norm 1 */
  texts(captions: readonly string[]): Float32Array {
    const limit = this.clip.config.text.max_position_embeddings
    const ids = captions.map((c) => this.clip.tokenizer.encodeClip(c, limit))
    return Float32Array.from(scope(() => noGrad(() => this.clip.textEmbeds(ids).toFloats())))
  }
}

function dot(a: Float32Array, b: Float32Array): number {
  let s = 0
  for (let j = 0; j < a.length; j++) s += a[j] * b[j]
  return s
}

/**
 * Cosine of CLIP's image and text embeddings for each pair (arXiv 2405.14129, section 3.1), in batches. Captions are cut to the
 * text tower's length with the end token kept; images are preprocessed as CLIP's are.
 * @param clip of loadClip
 * @param o.batch pairs embedded at once, default 64
 * @param o.pad images are padded to a square first; scores of the paper are without
 * @returns scores, and unit rows [pairs, projection_dim] of images and texts
 * @throws ERR_IMAGE naming the file
 */
export async function clipScores(
  clip: LoadedClip,
  pairs: readonly Pair[],
  o: { batch?: number; onProgress?: (done: number) => void; pad?: boolean } = {},
): Promise<{ scores: number[]; imageEmbeds: Float32Array; textEmbeds: Float32Array }> {
  const size = o.batch ?? 64
  const embedder = new Embedder(clip, o.pad)
  const { width } = embedder
  const imageEmbeds = new Float32Array(pairs.length * width)
  const textEmbeds = new Float32Array(pairs.length * width)
  for (let at = 0; at < pairs.length; at += size) {
    const part = pairs.slice(at, at + size)
    imageEmbeds.set(embedder.images(await Promise.all(part.map((p) => decodeImage(p.image)))), at * width)
    textEmbeds.set(embedder.texts(part.map((p) => p.caption)), at * width)
    o.onProgress?.(Math.min(at + size, pairs.length))
  }
  const row = (a: Float32Array, i: number): Float32Array => a.subarray(i * width, (i + 1) * width)
  const scores = pairs.map((_, i) => dot(row(imageEmbeds, i), row(textEmbeds, i)))
  return { scores, imageEmbeds, textEmbeds }
}

export interface LevelsOptions {
  /** N, default the model's */
  levels?: number
  /** width: equal parts of the score range (the paper's rule, default); quantile: equal counts */
  buckets?: Buckets
  /** pairs scored at once, default 64 */
  batch?: number
  /** false: only compute, do not write `similarity` into the file */
  write?: boolean
  /**
   * where scores are kept while they are made; a run that was interrupted goes on from there. Default `<data>.scores.jsonl`,
   * removed at the end; a file named here stays, and other levels can be cut from it without scoring again.
   */
  scores?: string
  /** folder that keeps CLIP's embeddings, so that other captions, or other pictures, need only what is new */
  features?: string
  /** pairs of each level that the result shows, from its lowest score to its highest; default 0 */
  examples?: number
  onProgress?: (done: number, total: number) => void
  /** told what was found or not used; default: process.emitWarning */
  onNotice?: (text: string) => void
  /** stops between batches; what was scored stays */
  signal?: AbortSignal
}

/** A pair of a level. */
export interface LevelExample {
  level: number
  image: ImageSource
  id: string
  caption: string
  score: number
}

/** Levels of the pairs that have a score, in their order. */
export interface ScoredLevels extends Levels {
  /** of every record; null without a picture, or with one that cannot be read */
  scores: (number | null)[]
  /** records that are none, that have no caption, or whose picture cannot be read */
  bad: { id: string; reason: string }[]
  /** records without a score whose level of an earlier run was taken away */
  removed: number
  examples: LevelExample[]
}

/** The caption of a pair: its first answer, null without one. */
const captionOf = (record: DataRecord): string | null =>
  record.conversations.find((t) => t.from === 'gpt')?.value ?? null

/** A pair on its way to a score. */
interface Waiting {
  id: string
  image: string
  caption: string
  pair: number
}

interface ScorerOptions {
  data: Dataset
  /** folder of the CLIP, and which one it is */
  dir: string
  identity: string
  scores: ScoreFile
  /** folder of embeddings on file */
  features: string | undefined
}

/** Scores the pairs of a data set that have none yet. The CLIP is loaded with the first of them. */
class Scorer {
  readonly #o: ScorerOptions
  readonly bad: { id: string; reason: string }[] = []
  #embedder: Embedder | null = null
  #files: { images: FeatureFile; texts: FeatureFile } | null = null
  constructor(o: ScorerOptions) {
    this.#o = o
  }

  #open(): Embedder {
    if (this.#embedder) return this.#embedder
    this.#embedder = new Embedder(loadClip(this.#o.dir))
    if (this.#o.features !== undefined) {
      const folder = path.join(this.#o.features, this.#o.identity)
      const { width } = this.#embedder
      this.#files = {
        images: new FeatureFile(folder, 'images', width),
        texts: new FeatureFile(folder, 'texts', width),
      }
    }
    return this.#embedder
  }

  /** Embeddings by name: those on file, and those that `compute` makes of the rest; null where it could not. */
  async #rows(
    names: string[],
    file: FeatureFile | undefined,
    compute: (missing: string[]) => Promise<(Float32Array | null)[]>,
  ): Promise<Map<string, Float32Array | null>> {
    const out = new Map<string, Float32Array | null>(names.map((n) => [n, file?.get(hash53(n)) ?? null]))
    const missing = [...out].filter(([, row]) => row === null).map(([n]) => n)
    if (missing.length === 0) return out
    const made = await compute(missing)
    const good = missing.filter((n, i) => {
      out.set(n, made[i])
      return made[i] !== null
    })
    const all = Float32Array.from(good.flatMap((n) => [...(out.get(n) as Float32Array)]))
    file?.add(
      good.map((name) => hash53(name)),
      all,
    )
    return out
  }

  async run(batch: Waiting[]): Promise<void> {
    const embedder = this.#open()
    const { width } = embedder
    const cut = (a: Float32Array, n: number) => Array.from({ length: n }, (_, i) => a.slice(i * width, (i + 1) * width))
    const images = await this.#rows(
      batch.map((p) => p.image),
      this.#files?.images,
      async (names) => {
        const pictures = await Promise.all(names.map((n) => this.#decode(n, batch)))
        const good = pictures.filter((p) => p !== null)
        const rows = good.length ? cut(embedder.images(good), good.length) : []
        return pictures.map((p) => (p === null ? null : (rows.shift() as Float32Array)))
      },
    )
    const usable = batch.filter((p) => images.get(p.image))
    const texts = await this.#rows(
      usable.map((p) => p.caption),
      this.#files?.texts,
      async (captions) => cut(embedder.texts(captions), captions.length),
    )
    const score = (p: Waiting): number => dot(images.get(p.image) as Float32Array, texts.get(p.caption) as Float32Array)
    this.#o.scores.add(usable.map((p) => ({ pair: p.pair, score: score(p) })))
  }

  async #decode(name: string, batch: Waiting[]): Promise<RgbImage | null> {
    try {
      return await loadImage(this.#o.data.picture(name))
    } catch (e) {
      if (!(e instanceof AlignGPTError) || e.code !== 'ERR_IMAGE') throw e
      for (const p of batch) if (p.image === name) this.bad.push({ id: p.id, reason: e.message })
      return null
    }
  }

  close(): void {
    this.#files?.images.close()
    this.#files?.texts.close()
    this.#embedder?.clip.dispose()
  }
}

/** Scores by record; null without a picture, or with one that cannot be read. */
async function scoreAll(
  data: Dataset,
  scorer: Scorer,
  scores: ScoreFile,
  o: LevelsOptions,
): Promise<(number | null)[]> {
  const every = new Array<number | null>(data.length).fill(null)
  const pairs = new Float64Array(data.length).fill(Number.NaN)
  const size = o.batch ?? 64
  let waiting: Waiting[] = []
  const indices: number[] = []
  for (let i = 0; i < data.length; i++) if (data.hasImage(i)) indices.push(i)
  for (const [done, index] of indices.entries()) {
    const r = data.record(index)
    const [image, caption] = [r.image as string, captionOf(r)]
    if (caption === null)
      scorer.bad.push({ id: r.id, reason: 'conversations: expected a caption (gpt turn), got none' })
    else {
      const pair = pairKey(image, caption)
      pairs[index] = pair
      if (scores.get(pair) === undefined && !waiting.some((p) => p.pair === pair))
        waiting.push({ id: r.id, image, caption, pair })
    }
    if (waiting.length < size && done + 1 < indices.length) continue
    o.signal?.throwIfAborted()
    if (waiting.length) await scorer.run(waiting)
    waiting = []
    o.onProgress?.(done + 1, indices.length)
  }
  for (const index of indices) every[index] = scores.get(pairs[index]) ?? null
  return every
}

/** Of each level `most` pairs from its lowest score to its highest. */
function pickExamples(
  data: Dataset,
  every: readonly (number | null)[],
  all: Int32Array,
  { n, most }: { n: number; most: number },
): LevelExample[] {
  const byLevel: number[][] = Array.from({ length: n }, () => [])
  for (const [i, l] of all.entries()) if (l >= 0) byLevel[l].push(i)
  return byLevel.flatMap((indices, level) => {
    const sorted = indices.sort((a, b) => (every[a] as number) - (every[b] as number) || a - b)
    const count = Math.min(most, sorted.length)
    return Array.from({ length: count }, (_, k) => {
      const index = sorted[count === 1 ? 0 : Math.round((k * (sorted.length - 1)) / (count - 1))]
      const r = data.record(index)
      const [image, score] = [data.picture(r.image as string), every[index] as number]
      return { level, image, id: r.id, caption: captionOf(r) as string, score }
    })
  })
}

function nothingScored(data: Dataset, bad: readonly { id: string; reason: string }[]): AlignGPTError {
  const all = data.length + data.bad.length
  const why = bad.length ? `the first: ${bad[0].id}: ${bad[0].reason}` : 'none names a picture'
  const got = `none of ${all} records (${all - bad.length} without a picture, ${bad.length} unusable; ${why})`
  return mismatch('ERR_DATA', 'levels', data.file, 'a pair that can be scored', got)
}

/**
 * Scores every pair of a data set with a CLIP, cuts the scores into levels and writes them into the file as `similarity`.
 * Records without a score (no picture, or one that cannot be read) have no level afterwards. A score belongs to the name of the picture
 * and the caption: a picture that changes under its name needs another scores file.
 * @param model an AlignGPT (its CLIP is used), or the folder of a CLIP
 * @throws AlignGPTError ERR_DATA, also when nothing could be scored (the file is as it was then); ERR_ARGUMENT; the signal's reason when
 *   aborted
 */
export async function levels(
  data: Dataset,
  model: { parts: { clipDir: string }; levels: number } | string,
  o: LevelsOptions = {},
): Promise<ScoredLevels> {
  const dir = typeof model === 'string' ? model : model.parts.clipDir
  const n = o.levels ?? (typeof model === 'string' ? 8 : model.levels)
  const notice = o.onNotice ?? ((text: string) => process.emitWarning(text, 'AlignGPTWarning'))
  const file = o.scores ?? `${data.file}.scores.jsonl`
  const identity = clipIdentity(dir)
  const scores = new ScoreFile(file, identity)
  if (scores.stale) notice(`[levels] the scores in ${file} are made again: ${scores.stale}`)
  const scorer = new Scorer({ data, dir, identity, scores, features: o.features })
  try {
    const ill = data.bad.map((b) => ({ id: b.id ?? `${b.index}`, reason: sayBad(b) }))
    const every = await scoreAll(data, scorer, scores, o)
    const bad = [...ill, ...scorer.bad]
    const scored = [...every.keys()].filter((i) => every[i] !== null)
    if (scored.length === 0) {
      if (o.scores === undefined) fs.rmSync(file, { force: true })
      throw nothingScored(data, bad)
    }
    const result = bucketLevels(
      scored.map((i) => every[i] as number),
      n,
      o.buckets ?? 'width',
    )
    const all = new Int32Array(data.length).fill(NO_LEVEL)
    for (const [k, i] of scored.entries()) all[i] = result.levels[k]
    const examples = pickExamples(data, every, all, { n, most: o.examples ?? 0 })
    const removed = o.write === false ? 0 : await writeLevels(data, all)
    if (o.scores === undefined) fs.rmSync(file, { force: true })
    return { ...result, scores: every, bad, removed, examples }
  } finally {
    scorer.close()
  }
}

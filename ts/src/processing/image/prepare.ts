/** An image from its source to what a tower wants, for the workers that do it ahead of training. */
import { Rng } from '../../util/rng.js'
import { augment } from './augment.js'
import { type ImageLimits, loadImage, type RgbImage } from './decode.js'
import { type Preprocess, preprocessImage } from './preprocess.js'
import type { ImageSource } from './source.js'

/** Pictures as long as there is room: those of a small data set are decoded in its first epoch only. */
export class ImageCache {
  readonly #kept = new Map<string, RgbImage>()
  /** @param room bytes */
  constructor(private room = 64 * 2 ** 20) {}
  /** The picture of this key, made when it is not kept. */
  async get(key: string, make: () => Promise<RgbImage>): Promise<RgbImage> {
    const known = this.#kept.get(key)
    if (known) return known
    const image = await make()
    const bytes = image.data.length + (image.alpha?.length ?? 0)
    // Somebody else may have made it meanwhile.
    if (bytes > this.room || this.#kept.has(key)) return image
    this.room -= bytes
    this.#kept.set(key, image)
    return image
  }
}

/**
 * What a decode worker does for one picture; also the inline way.
 * @returns uint8 [crop, crop, 3]
 */
export async function prepareImage(task: ImageTask, cache?: ImageCache): Promise<Uint8Array> {
  const { source, preprocess, augmentation, limits } = task
  const keep = (key: unknown[], make: () => Promise<RgbImage>): Promise<RgbImage> =>
    cache ? cache.get(JSON.stringify(key), make) : make()
  const { crop, exifOrientation } = preprocess
  if (augmentation) {
    const options = { ...limits, exifOrientation, alpha: true }
    const decoded = await keep([source, options], () => loadImage(source, options))
    return preprocessImage(augment(decoded, new Rng(...augmentation)), preprocess)
  }
  // Always the same, and smaller than what was decoded: the result is kept.
  const make = async (): Promise<RgbImage> => {
    const data = preprocessImage(await loadImage(source, { ...limits, exifOrientation }), preprocess)
    return { data, width: crop, height: crop }
  }
  return (await keep([source, limits, preprocess], make)).data
}

/** Everything needed to prepare a picture, in plain values that can be sent to a worker. */
export interface ImageTask {
  source: ImageSource
  preprocess: Preprocess
  /** null, or seed and stream of the random numbers */
  augmentation: [number, number] | null
  limits: ImageLimits
}

/** Small pictures inside pages and JSON. */
import { loadImage } from './decode.js'
import type { ImageSource } from './source.js'

/** The picture, at most so many pixels wide and high, as a data URI. @throws ERR_IMAGE */
export async function thumbnail(source: ImageSource, side: number): Promise<string> {
  const { default: sharp } = await import('sharp') // a page without pictures does not need it
  const { data, width, height } = await loadImage(source)
  const resize = { width: side, height: side, fit: 'inside', withoutEnlargement: true } as const
  const small = sharp(data, { raw: { width, height, channels: 3 } })
    .resize(resize)
    .webp({ quality: 80 })
  return `data:image/webp;base64,${(await small.toBuffer()).toString('base64')}`
}

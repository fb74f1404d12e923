/** Small pictures inside pages and JSON. */
import { type PictureSource, readPicture } from './source.js'

/** The picture, at most so many pixels wide and high, as a data URI. @throws ERR_IMAGE, or sharp's error when it is none */
export async function thumbnail(source: PictureSource, side: number): Promise<string> {
  const { default: sharp } = await import('sharp') // a page without pictures does not need it
  const resize = { width: side, height: side, fit: 'inside', withoutEnlargement: true } as const
  const small = sharp(readPicture(source)).resize(resize).webp({ quality: 80 })
  return `data:image/webp;base64,${(await small.toBuffer()).toString('base64')}`
}

/** Random views of an image for training on few of them. */
import type { Rng } from '../../util/rng.js'
import type { RgbImage } from './decode.js'
import { clip8 } from './resize.js'

/** Blends a picture with alpha over one colour; without alpha the picture itself. */
export function compositeOver(image: RgbImage, colour: readonly number[]): RgbImage {
  const { data, alpha, width, height } = image
  if (!alpha) return image
  const out = new Uint8Array(data.length)
  for (let i = 0; i < alpha.length; i++)
    for (let c = 0; c < 3; c++)
      out[3 * i + c] = Math.round((data[3 * i + c] * alpha[i] + colour[c] * (255 - alpha[i])) / 255)
  return { data: out, width, height }
}

/**
 * Mild augmentation for training: random background where there is alpha, small rotation, scale and shift (edges are
 * repeated, the background beside a picture with alpha is its colour), brightness, contrast and saturation.
 * A pure function of the picture and the stream of random numbers.
 */
export function augment(image: RgbImage, rng: Rng): RgbImage {
  const colour = [rng.int(256), rng.int(256), rng.int(256)]
  const { data: src, width: w, height: h } = compositeOver(image, colour)
  const between = (lo: number, hi: number): number => lo + (hi - lo) * rng.next()
  const angle = between(-0.17, 0.17)
  const zoom = between(0.85, 1.15)
  const [dx, dy] = [between(-0.06, 0.06) * w, between(-0.06, 0.06) * h]
  const [gain, contrast, saturation] = [between(0.85, 1.15), between(0.85, 1.15), between(0.7, 1.3)]
  const [cos, sin] = [Math.cos(angle) / zoom, Math.sin(angle) / zoom]
  const background = image.alpha ? colour : null
  const out = new Uint8Array(src.length)
  const beside = background !== null
  for (let y = 0, d = 0; y < h; y++)
    for (let x = 0; x < w; x++, d += 3) {
      const u = x - (w - 1) / 2 - dx
      const v = y - (h - 1) / 2 - dy
      const px = cos * u + sin * v + (w - 1) / 2
      const py = cos * v - sin * u + (h - 1) / 2
      let r = colour[0]
      let g = colour[1]
      let b = colour[2]
      if (!beside || (px >= -0.5 && py >= -0.5 && px <= w - 0.5 && py <= h - 0.5)) {
        // bilinear, in scalars: this loop runs for every pixel of every training picture
        const cx = px < 0 ? 0 : px > w - 1 ? w - 1 : px
        const cy = py < 0 ? 0 : py > h - 1 ? h - 1 : py
        const x0 = cx | 0
        const y0 = cy | 0
        const fx = cx - x0
        const fy = cy - y0
        const i00 = 3 * (y0 * w + x0)
        const i01 = x0 + 1 < w ? i00 + 3 : i00
        const below = y0 + 1 < h ? 3 * w : 0
        const i10 = i00 + below
        const i11 = i01 + below
        const w00 = (1 - fx) * (1 - fy)
        const w01 = fx * (1 - fy)
        const w10 = (1 - fx) * fy
        const w11 = fx * fy
        r = src[i00] * w00 + src[i01] * w01 + src[i10] * w10 + src[i11] * w11
        g = src[i00 + 1] * w00 + src[i01 + 1] * w01 + src[i10 + 1] * w10 + src[i11 + 1] * w11
        b = src[i00 + 2] * w00 + src[i01 + 2] * w01 + src[i10 + 2] * w10 + src[i11 + 2] * w11
      }
      const grey = 0.299 * r + 0.587 * g + 0.114 * b
      out[d] = clip8(Math.round(((grey + (r - grey) * saturation - 128) * contrast + 128) * gain))
      out[d + 1] = clip8(Math.round(((grey + (g - grey) * saturation - 128) * contrast + 128) * gain))
      out[d + 2] = clip8(Math.round(((grey + (b - grey) * saturation - 128) * contrast + 128) * gain))
    }
  return { data: out, width: w, height: h }
}

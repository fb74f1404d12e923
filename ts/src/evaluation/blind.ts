/** The blind control: the same questions, each about another image. A model that answers them as well does not look. */
import { createHash } from 'node:crypto'
import { readFilePart, readImage } from '../processing/image/source.js'
import { permutation } from '../util/rng.js'
import { type ImagePlace, imageFile, type Question } from './questions.js'

/** Hash of an image file's bytes; null where it cannot be read, which the question about it says. */
function contentOf(image: string, images: ImagePlace): string | null {
  try {
    return hashOf(image, images)
  } catch (e) {
    if ((e as { code?: unknown }).code !== 'ERR_IMAGE') throw e
    return null
  }
}

function hashOf(image: string, images: ImagePlace): string {
  const bytes = typeof images === 'object' ? readImage(images.locate(image)) : readFilePart(imageFile(image, images))
  return createHash('sha256').update(bytes).digest('base64')
}

/**
 * The questions, each about another image: a random cycle of all images that differ in content, so that none is about its own,
 * under whatever name. Null when there are no two.
 */
export function otherImages(
  questions: readonly Question[],
  o: { images?: ImagePlace; seed?: number },
): Question[] | null {
  const names = [...new Set(questions.flatMap((q) => q.image || []))]
  const content = new Map(
    names.flatMap((name) => {
      const hash = contentOf(name, o.images)
      return hash === null ? [] : [[name, hash] as const]
    }),
  )
  const one = new Map([...content].map(([name, hash]) => [hash, name])) // of each content
  const cycle = [...one.keys()]
  if (cycle.length < 2) return null
  const order = permutation(cycle.length, o.seed ?? 0, 7)
  const next = new Map<string, string>()
  for (let i = 0; i < order.length; i++) next.set(cycle[order[i]], cycle[order[(i + 1) % order.length]])
  const other = (image: string): string => one.get(next.get(content.get(image) as string) as string) as string
  return questions.map((q) => (q.image && content.has(q.image) ? { ...q, image: other(q.image) } : q))
}

/**
 * The image of a record, whatever the usual key and shape: LLaVA's `image`, the `images` of LLaMA-Factory and ms-swift, Hugging Face's
 * `file_name` and `{bytes, path}`, parts of a message. Exactly one is taken; what is not understood is a problem, never text.
 */
import { isObject } from '../util/json.js'

/** What is wrong with a record: the key, what it should be, what it is. */
export interface RecordProblem {
  key: string
  expected: string
  got: unknown
  /** of the linter; default: record */
  kind?: 'role' | 'image' | 'placeholders' | 'level' | 'no-level'
}

type Raw = Record<string, unknown>
/** The name of an image, null for none; or what is wrong. */
export type FoundImage = { image: string | null; key?: string; problem?: undefined } | { problem: RecordProblem }

/** Keys that mean the image of the record and nothing else, in the order in which one of them is taken. */
export const IMAGE_KEYS = [
  ...['image', 'images', 'image_path', 'image_paths', 'image_file', 'image_files', 'image_name', 'image_names'],
  ...['image_filename', 'image_file_name', 'img', 'imgs', 'img_path', 'img_paths', 'img_file', 'img_name'],
  ...['picture', 'pictures', 'picture_path', 'photo', 'pic'],
] as const
/** Keys of any file: an image where the name ends as one and no other key has it. */
export const FILE_KEYS = ['file_name', 'file_names', 'filename', 'filepath', 'file_path', 'path', 'file'] as const
/** Of an object that stands for an image: where its name may be. */
const NAME_KEYS = [...FILE_KEYS, ...IMAGE_KEYS, 'name', 'image_url', 'url'] as const
/** Of an object that stands for an image: its bytes as text. */
const BYTE_KEYS = ['bytes', 'data', 'base64', 'b64', 'buffer'] as const
/** What no model of this package sees. */
const OTHER_MEDIA = ['video', 'videos', 'video_path', 'audio', 'audios', 'audio_path', 'speech'] as const

const IMAGE_END = /\.(jpe?g|jfif|png|webp|gif|tiff?|bmp|heic|heif|avif|ppm|pgm|jp2)$/i
/** Other keys that speak of an image; one of them that names a file is not passed over. */
const SPEAKS = /(^|[_-])(images?|imgs?|pictures?|photos?|pics?)([_-]|$)/i
const LONGEST = 1024

/** Whether a value says nothing: null, '', [], {}, or a list or object of such. */
function isEmpty(v: unknown): boolean {
  if (v === undefined || v === null || v === '') return true
  if (typeof v !== 'object') return false
  return Object.values(v).every(isEmpty)
}

/**
 * The image that one value stands for: a name, a list of one, or an object with a name in it.
 * @param key of the value, for the problem
 */
export function imageIn(value: unknown, key: string): FoundImage {
  const wrong = (expected: string, got: unknown = value): FoundImage => ({ problem: { key, expected, got } })
  if (isEmpty(value)) return { image: null }
  if (typeof value === 'string') {
    if (/^data:/i.test(value)) return wrong('a file name, not an embedded image', `${value.slice(0, 40)}...`)
    if (/^[a-z][a-z0-9+.-]+:\/\//i.test(value)) return wrong('the name of a file that is here, not an address')
    if (value.length > LONGEST)
      return wrong(
        `a file name of at most ${LONGEST} characters`,
        `${value.slice(0, 40)}... (${value.length} characters)`,
      )
    return value.includes('\0') ? wrong('a file name') : { image: value }
  }
  if (Array.isArray(value)) {
    const some = value.filter((v) => !isEmpty(v))
    if (some.length > 1) return wrong('one image')
    return Array.isArray(some[0])
      ? wrong('a list of one file name')
      : imageIn(some[0], `${key}[${value.indexOf(some[0])}]`)
  }
  if (!isObject(value)) return wrong('a file name')
  const embedded = BYTE_KEYS.find((k) => !isEmpty(value[k]))
  if (embedded) return wrong(`a file name, not an image embedded as ${embedded}`, Object.keys(value))
  const named = NAME_KEYS.find((k) => !isEmpty(value[k]))
  if (!named) return wrong('a file name, or an object with path', Object.keys(value))
  return imageIn(value[named], `${key}.${named}`)
}

/** Whether two names may be of one file: one is the end of the other's path. */
const same = (a: string, b: string): boolean => a === b || a.endsWith(`/${b}`) || b.endsWith(`/${a}`)

/** A problem where a key that is not known speaks of an image and names a file. */
function unread(record: Raw): RecordProblem | null {
  const known: readonly string[] = [...IMAGE_KEYS, ...FILE_KEYS]
  for (const [key, value] of Object.entries(record)) {
    if (known.includes(key) || !SPEAKS.test(key) || isEmpty(value)) continue
    const found = imageIn(value, key)
    const file = found.problem ? typeof value !== 'number' && /[./]/.test(JSON.stringify(value)) : found.image
    const names = typeof file === 'string' ? IMAGE_END.test(file) : file && /url|path|file|data|bytes/i.test(key)
    if (names) return { key, expected: 'the image under image or images', got: value }
  }
  return null
}

/**
 * The image of a parsed record, and the key that names it.
 * @param more images that stand elsewhere in it, such as in parts of its messages: key and value
 */
export function imageOf(record: Raw, more: readonly (readonly [string, unknown])[] = []): FoundImage {
  for (const key of OTHER_MEDIA)
    if (!isEmpty(record[key])) return { problem: { key, expected: 'none: only images are read', got: record[key] } }
  const values = [...IMAGE_KEYS.map((key) => [key, record[key]] as const), ...more].filter(([, v]) => !isEmpty(v))
  let taken: { key: string; image: string } | null = null
  let wrong: RecordProblem | null = null
  for (const [key, value] of values) {
    const found = imageIn(value, key)
    if (found.problem) {
      // `images: 1` beside `image` counts them; alone it names none.
      const counts = key !== 'image' && (typeof value === 'number' || typeof value === 'boolean')
      if (!counts) return found
      wrong ??= found.problem
    } else if (found.image !== null) {
      if (taken && !same(taken.image, found.image))
        return { problem: { key, expected: `the image that ${taken.key} names (${taken.image})`, got: value } }
      taken ??= { key, image: found.image }
    }
  }
  if (taken) return taken
  if (wrong) return { problem: wrong }
  for (const key of FILE_KEYS) {
    const found = imageIn(record[key], key)
    const list = Array.isArray(record[key]) ? record[key] : [record[key]]
    if (!list.some((v) => typeof v === 'string' && IMAGE_END.test(v))) continue
    return found.problem ? found : { ...found, key }
  }
  const problem = unread(record)
  return problem ? { problem } : { image: null }
}

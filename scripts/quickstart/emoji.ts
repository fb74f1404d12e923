/**
 * The quickstart's pictures and words: which emoji are used, what they are called, and their pictures in three styles.
 *
 * An emoji is in when it has a picture in all three styles and shows a thing of its own. Left out are skin tones and
 * other variants of the same thing (a woman and a man where there is a person, hair, families, facing right): pictures
 * that differ in a few pixels would count as many things. Flags are left out too: 250 of them would be a sixth of all
 * training and teach nothing but country names.
 *
 * Training pictures are PNG, 64 x 64 (the size in which both packages hold single files), with alpha, which the
 * augmentation uses for random backgrounds. Under the alpha lies the picture on white, so a program that drops alpha
 * (Pillow's convert('RGB'), this package) sees the same as one that shows the file on a white page. Test pictures are
 * RGB on white, scaled down from 256 x 256.
 */
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { permutation } from 'aligngpt/core'
import sharp from 'sharp'
import { nameOf, plain } from './words.js'

/** Emojibase groups and the one word each is called by here. */
export const CATEGORIES = ['smiley', 'people', 'nature', 'food', 'travel', 'activity', 'object', 'symbol'] as const
export type Category = (typeof CATEGORIES)[number]
const GROUPS: Record<number, Category> = {
  0: 'smiley',
  1: 'people',
  3: 'nature',
  4: 'food',
  5: 'travel',
  6: 'activity',
  7: 'object',
  8: 'symbol',
}

/** Noto and Twemoji are for training, Fluent is for testing only. */
export const STYLES = ['noto', 'twemoji', 'fluent'] as const
export type ImageStyle = (typeof STYLES)[number]
export const TRAINING_STYLES: readonly ImageStyle[] = ['noto', 'twemoji']
/** Side of every picture, pixels. */
export const SIDE = 64

export interface Emoji {
  /** code points in hexadecimal without variation selectors, also the pictures' file name */
  id: string
  /** the emoji as text */
  char: string
  /** a noun phrase in lower case: letters, digits, spaces, hyphens and apostrophes */
  name: string
  /** single words, lower case; at least one */
  keywords: string[]
  category: Category
  /** finer than the category: animal-bird, food-fruit, ... */
  subgroup: string
  /** which of the two scoring CLIPs is trained on it */
  half: 0 | 1
}

interface EmojibaseEntry {
  hexcode: string
  emoji: string
  label: string
  tags?: string[]
  group?: number
  subgroup?: number
  order?: number
  gender?: number
}

const require = createRequire(import.meta.url)
const folderOf = (name: string): string => path.dirname(require.resolve(`${name}/package.json`))
const FOLDERS: Record<ImageStyle, () => string> = {
  noto: () => path.join(folderOf('emoji-datasource-google'), 'img/google/64'),
  twemoji: () => path.join(folderOf('emoji-datasource-twitter'), 'img/twitter/64'),
  fluent: () => path.join(folderOf('@lobehub/fluent-emoji-3d'), 'assets'),
}

const idOf = (hexcode: string): string => hexcode.toLowerCase().replaceAll('-fe0f', '')

/** Picture file of every emoji of a style, by id. */
export function sourceImages(style: ImageStyle): Map<string, string> {
  const folder = FOLDERS[style]()
  const files = fs.readdirSync(folder).filter((f) => /\.(png|webp)$/.test(f))
  return new Map(files.map((f) => [idOf(f.replace(/\.\w+$/, '')), path.join(folder, f)]))
}

// ---- words --------------------------------------------------------------------------------------------------

/** Human keywords that are one word and not just the category. */
function keywordsOf(tags: readonly string[], name: string): string[] {
  const usable = (w: string): boolean =>
    /^[a-z]{3,}$/.test(w) && w !== name && !(CATEGORIES as readonly string[]).includes(w)
  const words = [...new Set(tags.map(plain))].filter(usable)
  if (words.length) return words
  const parts = name.split(' ').filter((w) => /^[a-z]{3,}$/.test(w))
  return parts.length ? parts.slice(-1) : [name]
}

const FILLING = new Set(['and', 'with', 'without', 'the', 'from', 'for', 'over', 'not', 'free'])
/** Every word that says something about an emoji. */
export const wordsOf = (e: Emoji): Set<string> =>
  new Set([...e.name.split(/[ -]/), ...e.keywords, e.category].filter((w) => w.length > 2 && !FILLING.has(w)))

// ---- selection ----------------------------------------------------------------------------------------------

/** A thing of its own, not the same once more in another colour, sex or direction. */
function distinct(e: EmojibaseEntry): boolean {
  if (e.label.includes(':') && !e.label.startsWith('keycap')) return false
  if (e.group !== 1) return true
  return e.gender === undefined && !/^1F46[89]-200D/.test(e.hexcode)
}

/** Subgroup by subgroup, emoji go to the two halves in turn, so each half has something of everything. */
function assignHalves(list: Emoji[], seed: number): void {
  const seen = new Map<string, number>()
  for (const i of permutation(list.length, seed, 1)) {
    const n = seen.get(list[i].subgroup) ?? i % 2
    list[i].half = (n % 2) as 0 | 1
    seen.set(list[i].subgroup, n + 1)
  }
}

/** Everything with a name of its own, in the order of the Unicode charts, and in which half. The words alone decide. */
function candidates(seed: number): Emoji[] {
  const data = require('emojibase-data/en/data.json') as EmojibaseEntry[]
  const { subgroups } = require('emojibase-data/meta/groups.json') as { subgroups: Record<string, string> }
  const names = new Set<string>()
  const list: Emoji[] = []
  for (const e of [...data].sort((a, b) => (a.order ?? 0) - (b.order ?? 0))) {
    const category = GROUPS[e.group ?? -1]
    const name = nameOf(e.label)
    if (!category || !distinct(e) || names.has(name)) continue
    names.add(name)
    const keywords = keywordsOf(e.tags ?? [], name)
    const subgroup = subgroups[String(e.subgroup)]
    list.push({ id: idOf(e.hexcode), char: e.emoji, name, keywords, category, subgroup, half: 0 })
  }
  assignHalves(list, seed)
  return list
}

/**
 * The emoji of the quickstart, in the order of the Unicode charts. Each is in the same half whatever is chosen,
 * because each of the shipped scoring CLIPs knows one half.
 * @param perCategory at most so many of each category, half of them of each half (a random choice); default: all
 */
export function selectEmoji(seed: number, perCategory = Number.POSITIVE_INFINITY): Emoji[] {
  const images = STYLES.map(sourceImages)
  const list = candidates(seed).filter(({ id }) => images.every((m) => m.has(id)))
  const taken = new Map<string, number>()
  const chosen = new Set<Emoji>()
  for (const i of permutation(list.length, seed, 0)) {
    const pile = `${list[i].category} ${list[i].half}`
    const n = (taken.get(pile) ?? 0) + 1
    taken.set(pile, n)
    if (n <= perCategory / 2) chosen.add(list[i])
  }
  return list.filter((e) => chosen.has(e))
}

// ---- pictures -----------------------------------------------------------------------------------------------

/** Path of a picture below the image folder, as the JSON files name it. */
export const imageName = (style: ImageStyle, e: Emoji): string => `${style}/${e.id}.png`

async function trainingImage(source: string, target: string): Promise<void> {
  const { data, info } = await sharp(source)
    .resize(SIDE, SIDE)
    .ensureAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true })
  for (let i = 0; i < data.length; i += 4)
    for (let c = i; c < i + 3; c++) data[c] = Math.round((data[c] * data[i + 3] + 255 * (255 - data[i + 3])) / 255)
  const raw = { width: info.width, height: info.height, channels: 4 } as const
  await sharp(data, { raw }).png({ compressionLevel: 4 }).toFile(target)
}

async function testImage(source: string, target: string): Promise<void> {
  const flat = sharp(source).resize(SIDE, SIDE).flatten({ background: '#ffffff' })
  await flat.png({ compressionLevel: 4 }).toFile(target)
}

/** Runs a task for each item, a few at once. */
async function forEachParallel<T>(items: readonly T[], task: (item: T) => Promise<void>, signal?: AbortSignal) {
  let next = 0
  const worker = async (): Promise<void> => {
    while (next < items.length) {
      signal?.throwIfAborted()
      await task(items[next++])
    }
  }
  await Promise.all(Array.from({ length: 8 }, worker))
}

/** Writes the pictures of some emoji in one style below the image folder. */
export async function writeImages(
  images: string,
  style: ImageStyle,
  list: readonly Emoji[],
  signal?: AbortSignal,
): Promise<void> {
  fs.mkdirSync(path.join(images, style), { recursive: true })
  const sources = sourceImages(style)
  const write = TRAINING_STYLES.includes(style) ? trainingImage : testImage
  await forEachParallel(list, (e) => write(sources.get(e.id) as string, path.join(images, imageName(style, e))), signal)
}

/**
 * The quickstart's data: real pictures with real human names and keywords, written as ordinary LLaVA JSON.
 *
 * Noto (emoji-datasource-google) and Twemoji (emoji-datasource-twitter) are two drawing styles of the same things and are
 * trained on; Fluent 3D (@lobehub/fluent-emoji-3d) draws them a third way and is only ever tested on. Names, keywords and
 * categories come from emojibase-data (CLDR). Left out: flags (one category of look-alikes), skin tones (the same name),
 * components. A picture is 64 x 64; its colour channels hold it on a plain background, its alpha channel lets training
 * put it on others. Everything is a pure function of the seed.
 */
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import sharp from 'sharp'
import type { Question } from '../../ts/src/evaluate.js'
import { permutation, Rng } from '../../ts/src/rng.js'

const require = createRequire(import.meta.url)
export const SIDE = 64

export interface Thing {
  code: string
  name: string
  keywords: string[]
  category: string
  /** file names below images/ */
  noto: string
  twemoji: string | null
  fluent: string | null
}
export const CATEGORIES = [
  'faces',
  'people',
  'animals and plants',
  'food',
  'travel',
  'activities',
  'objects',
  'symbols',
] as const
const GROUPS: Record<number, (typeof CATEGORIES)[number]> = {
  0: 'faces',
  1: 'people',
  3: 'animals and plants',
  4: 'food',
  5: 'travel',
  6: 'activities',
  7: 'objects',
  8: 'symbols',
}

interface Turn {
  from: 'human' | 'gpt'
  value: string
}
interface Record_ {
  id: string
  image?: string
  conversations: Turn[]
}
export type Quality = 'name' | 'keyword' | 'category' | 'wrong'

export interface QuickstartData {
  images: string
  things: Thing[]
  /** LLaVA JSON files */
  pairs: string
  instructions: string
  /** caption quality of each pair, by id: the ground truth the levels are compared with */
  quality: Map<string, Quality>
  /** the thing of each pair */
  thingOf: Map<string, Thing>
  /** plain sentences and conversations for the language model */
  texts: string[]
  dialogues: { question: string; answer: string }[]
  questions: { yesno: Question[]; category: Question[]; name: Question[] }
}

const bare = (code: string): string => code.toLowerCase().replace(/-fe0f/g, '')

/** File of each code point sequence in a folder, variation selectors ignored. */
function filesByCode(dir: string): Map<string, string> {
  return new Map(
    fs
      .readdirSync(dir)
      .flatMap((f) => (/\.(png|webp)$/.test(f) ? [[bare(path.parse(f).name), path.join(dir, f)]] : [])),
  )
}

interface Entry {
  hexcode: string
  label: string
  tags?: string[]
  group?: number
}

/** Things that all sources know, with their source files. */
function listThings(limit: number, seed: number): { thing: Thing; sources: Record<string, string> }[] {
  const folder = (name: string, sub: string): Map<string, string> =>
    filesByCode(path.join(path.dirname(require.resolve(`${name}/package.json`)), sub))
  const noto = folder('emoji-datasource-google', 'img/google/64')
  const twemoji = folder('emoji-datasource-twitter', 'img/twitter/64')
  const fluent = folder('@lobehub/fluent-emoji-3d', 'assets')
  const entries = require('emojibase-data/en/data.json') as Entry[]
  const all = entries.flatMap((e) => {
    const code = bare(e.hexcode)
    const category = e.group === undefined ? undefined : GROUPS[e.group]
    const source = noto.get(code)
    if (!category || !source) return []
    const sources: Record<string, string> = { noto: source }
    const [t, f] = [twemoji.get(code), fluent.get(code)]
    if (t) sources.twemoji = t
    if (f) sources.fluent = f
    const file = (style: string): string | null => (sources[style] ? `${style}/${code}.png` : null)
    const name = e.label.toLowerCase().replace(/[“”:]/g, '')
    const keywords = (e.tags ?? []).map((k) => k.toLowerCase())
    const thing: Thing = {
      code,
      name,
      keywords,
      category,
      noto: `noto/${code}.png`,
      twemoji: file('twemoji'),
      fluent: file('fluent'),
    }
    return [{ thing, sources }]
  })
  const order = permutation(all.length, seed, 1)
  return Array.from(order.subarray(0, limit), (i) => all[i])
}

/** Writes one picture: colours over a pale background, alpha kept. */
async function writePicture(source: string, target: string, rng: Rng): Promise<void> {
  const { data } = await sharp(source)
    .resize(SIDE, SIDE, { fit: 'contain', background: { r: 0, g: 0, b: 0, alpha: 0 } })
    .ensureAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true })
  const background = [0, 1, 2].map(() => 200 + rng.int(56))
  for (let i = 0; i < data.length; i += 4)
    for (let c = 0; c < 3; c++)
      data[i + c] = Math.round((data[i + c] * data[i + 3] + background[c] * (255 - data[i + 3])) / 255)
  await sharp(data, { raw: { width: SIDE, height: SIDE, channels: 4 } })
    .png({ compressionLevel: 3 })
    .toFile(target)
}

const a = (name: string): string => (/^[aeiou]/.test(name) ? `an ${name}` : `a ${name}`)

/** A caption and how good it is: half full names, then keywords, categories, and 12 % wrong ones. */
function captionOf(thing: Thing, things: readonly Thing[], rng: Rng): { text: string; quality: Quality } {
  const u = rng.next()
  if (u < 0.12) {
    let other = rng.pick(things)
    while (other.category === thing.category) other = rng.pick(things)
    return { text: `${other.name}, ${other.category}`, quality: 'wrong' }
  }
  if (u < 0.6) return { text: `${thing.name}, ${thing.category}`, quality: 'name' }
  if (u < 0.85 && thing.keywords.length) return { text: rng.pick(thing.keywords), quality: 'keyword' }
  return { text: thing.category, quality: 'category' }
}

const NAME_QUESTIONS = [
  'What is this?',
  'What is shown in this picture?',
  'What do you see?',
  'Name the thing in the picture.',
]
const CATEGORY_QUESTION = (options: readonly string[]): string => `Which category fits: ${options.join(', ')}?`
const THING_QUESTION = (name: string): string => `Is there ${a(name)} in the picture?`
const CATEGORY_YESNO = (category: string): string => `Does this picture belong to ${category}?`

function otherCategory(category: string, rng: Rng): string {
  return rng.pick(CATEGORIES.filter((c) => c !== category))
}
function shuffled<T>(list: readonly T[], rng: Rng): T[] {
  const out = [...list]
  for (let i = out.length - 1; i > 0; i--) {
    const j = rng.int(i + 1)
    ;[out[i], out[j]] = [out[j], out[i]]
  }
  return out
}

interface Asked {
  question: string
  answer: string
  options?: string[]
}
function askName(thing: Thing, rng: Rng): Asked {
  return { question: rng.pick(NAME_QUESTIONS), answer: thing.name }
}
function askCategory(thing: Thing, rng: Rng): Asked {
  const others = shuffled(
    CATEGORIES.filter((c) => c !== thing.category),
    rng,
  ).slice(0, 3)
  const options = shuffled([thing.category, ...others], rng)
  return { question: CATEGORY_QUESTION(options), answer: thing.category, options }
}
/** Yes and no in turn; what is not there comes from another category. */
function askYesNo(thing: Thing, things: readonly Thing[], yes: boolean, rng: Rng): Asked {
  const answer = yes ? 'Yes' : 'No'
  if (rng.next() < 0.5)
    return { question: CATEGORY_YESNO(yes ? thing.category : otherCategory(thing.category, rng)), answer }
  let other = thing
  while (!yes && other.category === thing.category) other = rng.pick(things)
  return { question: THING_QUESTION(yes ? thing.name : other.name), answer }
}

function turns(list: readonly Asked[], image: boolean): Turn[] {
  return list.flatMap((t, i): Turn[] => [
    { from: 'human', value: image && i === 0 ? `<image>\n${t.question}` : t.question },
    { from: 'gpt', value: t.answer },
  ])
}

/** Questions about every training picture, some of several turns, and some without a picture. */
function makeInstructions(things: readonly Thing[], rng: Rng): Record_[] {
  const records: Record_[] = []
  for (const thing of things)
    for (const image of [thing.noto, thing.twemoji]) {
      if (!image) continue
      const id = path.basename(path.dirname(image)) + thing.code
      const kinds = [
        [askCategory(thing, rng)],
        [askYesNo(thing, things, true, rng), askName(thing, rng)],
        [askYesNo(thing, things, false, rng), askCategory(thing, rng)],
        [askName(thing, rng), askYesNo(thing, things, rng.next() < 0.5, rng)],
      ]
      for (const [k, list] of kinds.entries())
        records.push({ id: `${id}-${k}`, image, conversations: turns(list, true) })
      if (rng.next() < 0.2)
        records.push({
          id: `${id}-text`,
          conversations: turns(
            [{ question: `Which category does ${a(thing.name)} belong to?`, answer: thing.category }],
            false,
          ),
        })
    }
  return records
}

/** Held-out questions on Fluent pictures, balanced by category and by yes and no. */
function makeQuestions(things: readonly Thing[], count: number, rng: Rng): QuickstartData['questions'] {
  const byCategory = CATEGORIES.map((c) =>
    shuffled(
      things.filter((t) => t.fluent && t.category === c),
      rng,
    ),
  )
  const each = (n: number): Thing[] =>
    Array.from({ length: n }, (_, i) => {
      const list = byCategory[i % byCategory.length]
      return list[Math.floor(i / byCategory.length) % list.length]
    })
  const ask = (prefix: string, thing: Thing, i: number, q: Asked): Question => ({
    id: `${prefix}-${i}`,
    image: thing.fluent as string,
    ...q,
  })
  const nameOptions = (thing: Thing): string[] => {
    const names = new Set([thing.name])
    while (names.size < 10) names.add(rng.pick(things).name)
    return shuffled([...names], rng)
  }
  return {
    // whole rounds over the categories answer yes, the next ones no
    yesno: each(count * 2).map((t, i) => ask('yesno', t, i, askYesNo(t, things, Math.floor(i / 8) % 2 === 0, rng))),
    category: each(count).map((t, i) => ask('category', t, i, askCategory(t, rng))),
    name: each(count).map((t, i) => ask('name', t, i, { ...askName(t, rng), options: nameOptions(t) })),
  }
}

function writeJson(file: string, value: unknown): string {
  fs.writeFileSync(file, `${JSON.stringify(value, null, 1)}\n`)
  return file
}

/** Writes pictures and JSON files below `out`. @param o.fast a few hundred things instead of all */
export async function prepareData(out: string, o: { fast: boolean; seed?: number }): Promise<QuickstartData> {
  const seed = o.seed ?? 1
  const images = path.join(out, 'images')
  for (const style of ['noto', 'twemoji', 'fluent']) fs.mkdirSync(path.join(images, style), { recursive: true })
  const listed = listThings(o.fast ? 240 : Number.POSITIVE_INFINITY, seed)
  const things = listed.map((l) => l.thing)
  const jobs = listed.flatMap(({ thing, sources }, i) =>
    Object.entries(sources).map(([style, source], k) => ({
      source,
      target: path.join(images, style, `${thing.code}.png`),
      rng: new Rng(seed, 1000 + 8 * i + k),
    })),
  )
  for (let i = 0; i < jobs.length; i += 64)
    await Promise.all(jobs.slice(i, i + 64).map((j) => writePicture(j.source, j.target, j.rng)))

  const rng = new Rng(seed, 2)
  const quality = new Map<string, Quality>()
  const thingOf = new Map<string, Thing>()
  const pairs = things.flatMap((thing) =>
    [thing.noto, thing.twemoji].flatMap((image) => {
      if (!image) return []
      const id = `${path.dirname(image)}-${thing.code}`
      const caption = captionOf(thing, things, rng)
      quality.set(id, caption.quality)
      thingOf.set(id, thing)
      return [
        {
          id,
          image,
          conversations: [
            { from: 'human', value: '<image>' },
            { from: 'gpt', value: caption.text },
          ],
        },
      ]
    }),
  )
  const dialogues = things.flatMap((t) => [
    { question: `Which category does ${a(t.name)} belong to?`, answer: t.category },
    askCategory(t, rng),
    { question: `Is ${a(t.name)} part of ${t.category}?`, answer: 'Yes' },
    { question: `Is ${a(t.name)} part of ${otherCategory(t.category, rng)}?`, answer: 'No' },
    ...t.keywords.slice(0, 2).map((k) => ({ question: `What has to do with ${k}?`, answer: t.name })),
  ])
  const texts = things.flatMap((t) => [
    `${t.name}, ${t.category}\n`,
    `${t.name}: ${t.keywords.join(', ')}\n`,
    `This is ${a(t.name)}. It belongs to ${t.category}.\n`,
  ])
  return {
    images,
    things,
    pairs: writeJson(path.join(out, 'pairs.json'), pairs),
    instructions: writeJson(path.join(out, 'instructions.json'), makeInstructions(things, new Rng(seed, 3))),
    quality,
    thingOf,
    texts,
    dialogues,
    questions: makeQuestions(things, o.fast ? 48 : 320, new Rng(seed, 4)),
  }
}

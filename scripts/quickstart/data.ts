/**
 * The quickstart's data: ordinary LLaVA JSON and a folder of pictures, made from emoji. Look at what it writes and
 * do the same with your own pictures:
 *
 *   images/{noto,twemoji,fluent}/CODE.png   64 x 64; Fluent is for testing only
 *   pairs.json           picture + caption, for CLIP and for pre-training; captions of mixed quality
 *   quality.json         how good each caption of pairs.json is; for the report only, no training reads it
 *   halves.json          0 or 1 for each pair, see below
 *   instructions.json    questions and answers, for instruction tuning
 *   text.txt             plain text for the language model, documents are separated by an empty line
 *   conversations.json   conversations without pictures for the language model
 *   questions_{yesno,category,name}.json   the test, on Fluent pictures
 *   emoji.json           names, keywords and categories
 *   data.json            seed, counts
 *
 * The test is the rendering style: the things are the same, every picture is new.
 *
 * A CLIP that was trained on a pair cannot judge it, so pairs are scored by a CLIP that was trained on the other
 * half. All captions and both pictures of an emoji lie in the same half, because another picture of the same thing
 * with the same name would give it away.
 *
 * Everything is a pure function of the seed.
 */
import fs from 'node:fs'
import path from 'node:path'
import type { DataRecord, Turn } from 'aligngpt'
import { render } from 'aligngpt/data'
import { CATEGORIES, type Emoji, imageName, selectEmoji, TRAINING_STYLES, writeImages } from './emoji.js'
import {
  type LlavaRecord,
  makeConversations,
  makeInstructions,
  makePairs,
  makeTests,
  makeText,
  QUALITY_SHARES,
  type Quality,
  TESTS,
  type Test,
  type TestQuestion,
} from './records.js'

export interface DataOptions {
  /** a few hundred emoji instead of all */
  fast?: boolean
  seed?: number
  signal?: AbortSignal
}

/** Where everything is. */
export interface QuickstartData {
  dir: string
  images: string
  pairs: string
  quality: string
  halves: string
  instructions: string
  text: string
  conversations: string
  questions: Record<Test, string>
  emoji: Emoji[]
  /** records of each file, pictures of each style, emoji of each category */
  counts: Record<string, number>
  seconds: number
}

// ---- files --------------------------------------------------------------------------------------------------

const NOTE = `Made by "npm run quickstart" from npm packages; open the files and imitate them with your own pictures.

pairs.json           picture + caption (pre-training, CLIP)
instructions.json    questions and answers (instruction tuning)
conversations.json   the same kind of thing without pictures (language model)
text.txt             plain text (language model)
questions_*.json     the test: pictures in a style that is in no training
quality.json         which captions of pairs.json are good or wrong on purpose; only the report reads it
halves.json          which half of the pairs each one is in: pairs are scored by a CLIP trained on the other half

Pictures are 64 x 64. Training pictures have alpha, with the picture on white under it.
images/noto      Noto Emoji, Google, Apache License 2.0
images/twemoji   Twemoji, Twitter, Inc. and other contributors, CC-BY 4.0
images/fluent    Fluent Emoji, Microsoft Corporation, MIT License
Names, keywords and categories: Emojibase, Miles Johnson, MIT License; Unicode CLDR
`

/**
 * Writes the quickstart's data into `out`/data, anew each time: an earlier one, finished or not, is replaced.
 * @throws when an emoji package is missing (it is a development dependency) or the folder cannot be written
 */
export async function prepareData(out: string, options: DataOptions = {}): Promise<QuickstartData> {
  const { fast = false, seed = 1, signal } = options
  const start = performance.now()
  const dir = path.join(out, 'data')
  const file = (name: string): string => path.join(dir, name)
  const images = file('images')
  fs.rmSync(images, { recursive: true, force: true })
  fs.rmSync(file('data.json'), { force: true })
  fs.mkdirSync(dir, { recursive: true })

  const emoji = selectEmoji(seed, fast ? 40 : undefined)
  const pairs = makePairs(emoji, seed)
  const instructions = makeInstructions(emoji, seed)
  const text = makeText(emoji, seed)
  const talks = makeConversations(emoji, seed)
  const tests = makeTests(emoji, seed, fast)
  const tested = new Set(TESTS.flatMap((t) => tests[t].map((q) => q.image)))
  for (const style of TRAINING_STYLES) await writeImages(images, style, emoji, signal)
  const shown = emoji.filter((e) => tested.has(imageName('fluent', e)))
  await writeImages(images, 'fluent', shown, signal)

  const write = (name: string, value: unknown): void =>
    fs.writeFileSync(file(name), typeof value === 'string' ? value : `${JSON.stringify(value, null, 2)}\n`)
  write('pairs.json', pairs.records)
  write('quality.json', pairs.quality)
  write('halves.json', pairs.halves)
  write('instructions.json', instructions)
  write('text.txt', `${text.join('\n\n')}\n`)
  write('conversations.json', talks)
  for (const t of TESTS) write(`questions_${t}.json`, tests[t])
  write('emoji.json', emoji)
  write('README.txt', NOTE)

  const counts: Record<string, number> = {
    emoji: emoji.length,
    pairs: pairs.records.length,
    ...Object.fromEntries(TRAINING_STYLES.map((s) => [`${s} pictures`, emoji.length])),
    'fluent pictures': shown.length,
    instructions: instructions.length,
    'text documents': text.length,
    conversations: talks.length,
    ...Object.fromEntries(TESTS.map((t) => [`${t} questions`, tests[t].length])),
    ...Object.fromEntries(CATEGORIES.map((c) => [c, emoji.filter((e) => e.category === c).length])),
  }
  // Written last: a folder without it is unfinished.
  write('data.json', { seed, fast, qualityShares: QUALITY_SHARES, counts })
  const questions = Object.fromEntries(TESTS.map((t) => [t, file(`questions_${t}.json`)])) as Record<Test, string>
  return {
    dir,
    images,
    pairs: file('pairs.json'),
    quality: file('quality.json'),
    halves: file('halves.json'),
    instructions: file('instructions.json'),
    text: file('text.txt'),
    conversations: file('conversations.json'),
    questions,
    emoji,
    counts,
    seconds: (performance.now() - start) / 1000,
  }
}

const readJson = <T>(file: string): T => JSON.parse(fs.readFileSync(file, 'utf8')) as T
export const readQuality = (data: QuickstartData): Record<string, Quality> => readJson(data.quality)
export const readHalves = (data: QuickstartData): Record<string, 0 | 1> => readJson(data.halves)
export const readQuestions = (data: QuickstartData, test: Test): TestQuestion[] => readJson(data.questions[test])
export const readRecords = (file: string): LlavaRecord[] => readJson(file)
/** The documents of text.txt. */
export const readText = (data: QuickstartData): string[] => fs.readFileSync(data.text, 'utf8').trimEnd().split('\n\n')

/** A file's record as the library knows it. */
const toRecord = (r: LlavaRecord): DataRecord => ({
  id: r.id,
  image: r.image ?? null,
  conversations: r.conversations as Turn[],
  similarity: null,
})

/** Texts of conversations as the model reads them, in pieces where a picture lies between. */
export function conversationTexts(records: readonly LlavaRecord[]): string[] {
  return records.flatMap((r) => {
    const pieces = render(toRecord(r), { style: 'vicuna_v1' })
    return pieces
      .map((p) => ('image' in p ? '\0' : p.text))
      .join('')
      .split('\0')
  })
}

/** What the tokenizers are trained on: everything the language model will read, and the captions CLIP will read. */
export function tokenizerTexts(data: QuickstartData): { llm: string[]; clip: string[] } {
  const captions = readRecords(data.pairs).map((r) => r.conversations[1].value)
  const llm = [
    ...readText(data),
    ...captions.map((c) => `${c}\n`),
    ...conversationTexts(readRecords(data.conversations)),
    ...conversationTexts(readRecords(data.instructions)),
  ]
  return { llm, clip: captions }
}

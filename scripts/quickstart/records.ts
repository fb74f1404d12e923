/**
 * The records of the quickstart: captions, conversations, plain text and test questions, all from names, keywords and
 * categories of emoji. No files are touched here; everything is a pure function of the list and the seed.
 */
import { permutation, Rng } from 'aligngpt/core'
import { CATEGORIES, type Category, type Emoji, type ImageStyle, imageName, TRAINING_STYLES, wordsOf } from './emoji.js'
import { isThere, withArticle } from './words.js'

/**
 * full: name, mostly with keywords and category; keyword: one keyword; category: nothing else; wrong: of another
 * thing.
 */
export const QUALITIES = ['full', 'keyword', 'category', 'wrong'] as const
export type Quality = (typeof QUALITIES)[number]
/** Share of each quality in pairs.json. */
export const QUALITY_SHARES: Record<Quality, number> = { full: 0.5, keyword: 0.22, category: 0.16, wrong: 0.12 }

/** A record of a LLaVA data file. */
export interface LlavaRecord {
  id: string
  image?: string
  conversations: { from: 'human' | 'gpt'; value: string }[]
}
/** A test question; `evaluate` takes it as it is. */
export interface TestQuestion {
  id: string
  image: string
  question: string
  answer: string
  options?: string[]
}
export const TESTS = ['yesno', 'category', 'name'] as const
export type Test = (typeof TESTS)[number]

/** Streams of random numbers, one for each purpose, so that a change in one place does not move the others. */
const STREAM = { pairs: 10, wrong: 11, instructions: 12, textOnly: 13, text: 14, conversations: 15, tests: 16 }

interface Drawing {
  emoji: Emoji
  style: ImageStyle
}

// ---- captions -----------------------------------------------------------------------------------------------

/** Some different keywords of an emoji. */
function keywords(e: Emoji, n: number, rng: Rng): string[] {
  const left = [...e.keywords]
  return Array.from({ length: Math.min(n, left.length) }, () => left.splice(rng.int(left.length), 1)[0])
}

function fullCaption(e: Emoji, rng: Rng): string {
  const kind = rng.int(10)
  if (kind < 3) return e.name
  if (kind < 6) return `${e.name}, ${e.category}`
  return `${e.name}, ${keywords(e, 2, rng).join(', ')}, ${e.category}`
}

function caption(e: Emoji, quality: Quality, rng: Rng): string {
  if (quality === 'keyword') return rng.pick(e.keywords)
  if (quality === 'category') return e.category
  return fullCaption(e, rng)
}

/** Exact counts of each quality; rounding goes to the first one. */
function qualityList(n: number): Quality[] {
  const list: Quality[] = []
  for (const q of ['keyword', 'category', 'wrong'] as const)
    list.push(...new Array<Quality>(Math.round(QUALITY_SHARES[q] * n)).fill(q))
  return [...new Array<Quality>(n - list.length).fill('full'), ...list]
}

/** Some other thing: of another category, with no word in common. */
function other(e: Emoji, list: readonly Emoji[], rng: Rng): Emoji {
  for (;;) {
    const category = rng.pick(CATEGORIES)
    const candidate = rng.pick(list)
    if (category !== e.category && candidate.category === category && apart(e, candidate)) return candidate
  }
}

const wordCache = new WeakMap<Emoji, Set<string>>()
/** Whether nothing true of one could be said of the other. */
function apart(a: Emoji, b: Emoji): boolean {
  const words = (e: Emoji): Set<string> => {
    let set = wordCache.get(e)
    if (!set) {
      set = wordsOf(e)
      wordCache.set(e, set)
    }
    return set
  }
  const of = words(b)
  return a.category !== b.category && ![...words(a)].some((w) => of.has(w))
}

export interface PairData {
  records: LlavaRecord[]
  quality: Record<string, Quality>
  halves: Record<string, 0 | 1>
}

/** Two pairs of each training picture. */
export function makePairs(list: readonly Emoji[], seed: number, perImage = 2): PairData {
  const drawings = TRAINING_STYLES.flatMap((style) => list.map((emoji) => ({ emoji, style })))
  const n = drawings.length * perImage
  const qualities = qualityList(n)
  const order = permutation(n, seed, STREAM.pairs)
  const rng = new Rng(seed, STREAM.wrong)
  const data: PairData = { records: [], quality: {}, halves: {} }
  for (let i = 0; i < n; i++) {
    const { emoji, style } = drawings[i % drawings.length]
    const quality = qualities[order[i]]
    const id = `${style}-${emoji.id}-${Math.floor(i / drawings.length)}`
    const text = caption(quality === 'wrong' ? other(emoji, list, rng) : emoji, quality, rng)
    const conversations: LlavaRecord['conversations'] = [
      { from: 'human', value: '<image>\nDescribe the picture.' },
      { from: 'gpt', value: text },
    ]
    data.records.push({ id, image: imageName(style, emoji), conversations })
    data.quality[id] = quality
    data.halves[id] = emoji.half
  }
  return data
}

// ---- questions ----------------------------------------------------------------------------------------------

interface Asked {
  question: string
  answer: string
}

const categoryQuestion = (options: readonly string[]): string =>
  `Which category is this: ${options.slice(0, -1).join(', ')} or ${options.at(-1)}?`

/** Four categories in random order, the right one among them. */
function fourCategories(right: Category, rng: Rng): Category[] {
  const rest = CATEGORIES.filter((c) => c !== right)
  const options: Category[] = Array.from({ length: 3 }, () => rest.splice(rng.int(rest.length), 1)[0])
  options.splice(rng.int(4), 0, right)
  return options
}

const nameTurn = (e: Emoji): Asked => ({ question: 'What is this?', answer: e.name })
function categoryTurn(e: Emoji, rng: Rng): Asked {
  const question = rng.int(3) === 0 ? 'Which category is this?' : categoryQuestion(fourCategories(e.category, rng))
  return { question, answer: e.category }
}

/**
 * A yes/no question about `about`, asked of itself and of another thing. Asking the same of both keeps the balance:
 * every question text is as often right as wrong, for each category.
 */
function yesNoQuestion(about: Emoji, kind: (typeof YES_NO_KINDS)[number], rng: Rng): string {
  if (kind === 'name') return isThere(about.name)
  if (kind === 'category') return `Is this in the category ${about.category}?`
  return `Does the keyword ${rng.pick(about.keywords)} fit the picture?`
}

/**
 * Pairs things of different categories with no word in common, at random.
 * @returns pairs of indices; a few items can be left over
 */
function pairAcross(items: readonly Emoji[], seed: number, stream: number): [number, number][] {
  const order = [...permutation(items.length, seed, stream)]
  const rng = new Rng(seed, stream + 0x1000)
  const good = (i: number, j: number): boolean => apart(items[order[i]], items[order[j]])
  const last = order.length - (order.length % 2)
  for (let i = 0; i < last; i += 2)
    for (let tries = 0; !good(i, i + 1) && tries < 1000; tries++) {
      // Exchange the second of this pair with that of another, when both are right afterwards.
      const j = 2 * rng.int(last / 2)
      if (good(i, j + 1) && (j > i || good(j, i + 1))) [order[i + 1], order[j + 1]] = [order[j + 1], order[i + 1]]
    }
  const pairs: [number, number][] = []
  for (let i = 0; i < last; i += 2) if (good(i, i + 1)) pairs.push([order[i], order[i + 1]])
  return pairs
}

const shuffled = <T>(items: readonly T[], rng: Rng): T[] => {
  const out = [...items]
  for (let i = out.length - 1; i > 0; i--) {
    const j = rng.int(i + 1)
    ;[out[i], out[j]] = [out[j], out[i]]
  }
  return out
}

/**
 * How four questions about one thing become conversations. An answer must not follow from an earlier one without
 * looking: a Yes or a name tells everything and ends its conversation, a category says which other things are not
 * there. Yes and No never meet, as the second would be the opposite of the first.
 */
function conversations(e: Emoji, yes: Asked, no: Asked, rng: Rng): Asked[][] {
  const [name, category] = [nameTurn(e), categoryTurn(e, rng)]
  const kind = rng.int(3)
  if (kind === 0) return [[yes], [no, category, name]]
  if (kind === 1) return [[yes], [no, category], [name]]
  return [[yes], [no], [category], [name]]
}

const YES_NO_KINDS = ['name', 'name', 'name', 'category', 'category', 'keyword'] as const

function yesAndNo(a: Emoji, b: Emoji, rng: Rng): { yes: Asked; no: Asked }[] {
  const kind = rng.pick(YES_NO_KINDS)
  const [ofA, ofB] = [yesNoQuestion(a, kind, rng), yesNoQuestion(b, kind, rng)]
  const turn = (question: string, answer: string): Asked => ({ question, answer })
  return [
    { yes: turn(ofA, 'Yes'), no: turn(ofB, 'No') },
    { yes: turn(ofB, 'Yes'), no: turn(ofA, 'No') },
  ]
}

const toTurns = (asked: readonly Asked[], before: string): LlavaRecord['conversations'] =>
  asked.flatMap(({ question, answer }, i) => [
    { from: 'human' as const, value: i === 0 ? before + question : question },
    { from: 'gpt' as const, value: answer },
  ])

/** Questions about training pictures, and a tenth without pictures. */
export function makeInstructions(list: readonly Emoji[], seed: number, rounds = 2): LlavaRecord[] {
  const drawings: Drawing[] = TRAINING_STYLES.flatMap((style) => list.map((emoji) => ({ emoji, style })))
  const things = drawings.map((d) => d.emoji)
  const rng = new Rng(seed, STREAM.instructions)
  const records: LlavaRecord[] = []
  for (let round = 0; round < rounds; round++)
    for (const [i, j] of pairAcross(things, seed, 100 + round)) {
      const questions = yesAndNo(things[i], things[j], rng)
      for (const [side, k] of [i, j].entries()) {
        const { emoji, style } = drawings[k]
        const talks = conversations(emoji, questions[side].yes, questions[side].no, rng)
        for (const [n, talk] of talks.entries())
          records.push({
            id: `ask-${style}-${emoji.id}-${4 * round + n}`,
            image: imageName(style, emoji),
            conversations: toTurns(talk, '<image>\n'),
          })
      }
    }
  const order = permutation(list.length, seed, STREAM.textOnly)
  const textOnly = Math.round(records.length / 9)
  const text = new Rng(seed, STREAM.textOnly + 0x1000)
  for (let n = 0; n < textOnly; n++) {
    const e = list[order[n % list.length]]
    records.push(aboutAThing(e, list, text, `ask-text-${e.id}-${Math.floor(n / list.length)}`))
  }
  return records
}

/** A conversation about a thing by name, without a picture. */
function aboutAThing(e: Emoji, list: readonly Emoji[], rng: Rng, id: string): LlavaRecord {
  const options = fourCategories(e.category, rng)
  const right = rng.int(2) === 0
  const category = right ? e.category : other(e, list, rng).category
  const turns: Asked[] = [
    {
      question: `Which category fits ${withArticle(e.name)}: ${options.slice(0, -1).join(', ')} or ${options.at(-1)}?`,
      answer: e.category,
    },
    { question: `Does the category ${category} fit ${withArticle(e.name)}?`, answer: right ? 'Yes' : 'No' },
    { question: `Name a keyword for ${withArticle(e.name)}.`, answer: rng.pick(e.keywords) },
  ]
  return { id, conversations: toTurns(shuffled(turns, rng).slice(0, 1 + rng.int(2)), '') }
}

// ---- text for the language model ----------------------------------------------------------------------------

/** A thing in words, as a picture would show it: short or long, sometimes only what it has to do with. */
function description(e: Emoji, rng: Rng): string {
  const kind = rng.int(4)
  if (kind === 0) return e.name
  if (kind === 1) return `${e.name}, ${e.category}`
  if (kind === 2) return `${e.name}, ${keywords(e, 2, rng).join(', ')}, ${e.category}`
  return keywords(e, 3, rng).join(', ')
}

/**
 * Plain text: a few sentences about each thing, lists of similar things, and descriptions with a caption below,
 * which is the form of pre-training with words where the picture will be.
 */
export function makeText(list: readonly Emoji[], seed: number): string[] {
  const rng = new Rng(seed, STREAM.text)
  const documents: string[] = []
  for (const e of list) {
    const a = withArticle(e.name)
    const [k1, k2 = k1] = keywords(e, 2, rng)
    const sentences = [
      `A picture of ${a}.`,
      `The picture shows ${a}.`,
      `The category of ${a} is ${e.category}.`,
      `The keywords ${k1} and ${k2} fit ${a}.`,
      `The keyword ${rng.pick(e.keywords)} fits ${a}.`,
      `A thing in the category ${e.category}: ${e.name}.`,
    ]
    documents.push(shuffled(sentences, rng).slice(0, 2).join(' '))
    for (let i = 0; i < 4; i++) documents.push(`${description(e, rng)}\n${fullCaption(e, rng)}\n`)
  }
  const groups = new Map<string, Emoji[]>()
  for (const e of list) groups.set(e.subgroup, [...(groups.get(e.subgroup) ?? []), e])
  for (const [group, members] of groups)
    for (let at = 0; at < members.length; at += 6) {
      const some = shuffled(members, rng).slice(0, 6)
      documents.push(`${group.replaceAll('-', ' ')}, ${some[0].category}: ${some.map((e) => e.name).join(', ')}`)
    }
  return shuffled(documents, rng)
}

/** Four questions about a thing, each kind by chance. */
function fourTurns(e: Emoji, list: readonly Emoji[], rng: Rng): Asked[] {
  return Array.from({ length: 4 }, () => {
    const kind = rng.int(6)
    if (kind === 0) return nameTurn(e)
    if (kind === 1) return categoryTurn(e, rng)
    const yes = rng.int(2) === 0
    const question = yesNoQuestion(yes ? e : other(e, list, rng), rng.pick(YES_NO_KINDS), rng)
    return { question, answer: yes ? 'Yes' : 'No' }
  })
}

/**
 * Conversations in the form of instruction tuning, with words where the picture will be: the language model learns to
 * answer from what stands there before it sees anything.
 */
export function makeConversations(list: readonly Emoji[], seed: number, rounds = 10): LlavaRecord[] {
  const rng = new Rng(seed, STREAM.conversations)
  const records: LlavaRecord[] = []
  for (let round = 0; round < rounds; round++)
    for (const e of list)
      records.push({
        id: `text-${e.id}-${round}`,
        conversations: toTurns(fourTurns(e, list, rng), `${description(e, rng)}\n`),
      })
  for (const e of list) records.push(aboutAThing(e, list, rng, `text-${e.id}-about`))
  return records
}

// ---- the test -----------------------------------------------------------------------------------------------

/** Things of each category, in random order, over and over. */
class Deck {
  private readonly piles: Map<Category, Emoji[]>
  private readonly at = new Map<Category, number>()
  constructor(list: readonly Emoji[], rng: Rng) {
    const pile = (c: Category): Emoji[] =>
      shuffled(
        list.filter((e) => e.category === c),
        rng,
      )
    this.piles = new Map(CATEGORIES.map((c) => [c, pile(c)]))
  }
  draw(category: Category): Emoji {
    const pile = this.piles.get(category) as Emoji[]
    const i = this.at.get(category) ?? 0
    this.at.set(category, i + 1)
    return pile[i % pile.length]
  }
}

const image = (e: Emoji): string => imageName('fluent', e)

/**
 * Two things of different categories, four questions: is there this one, is there the other one, on both pictures.
 * So each question text is as often answered Yes as No and nothing can be known without looking. Each round has
 * every category once.
 */
function yesNoTest(list: readonly Emoji[], rounds: number, rng: Rng): TestQuestion[] {
  const deck = new Deck(list, rng)
  const out: TestQuestion[] = []
  for (let round = 0; round < rounds; round++) {
    const order = shuffled(CATEGORIES, rng)
    for (let i = 0; i < order.length; i += 2) {
      const a = deck.draw(order[i])
      let b = deck.draw(order[i + 1])
      while (!apart(a, b)) b = deck.draw(order[i + 1])
      for (const about of [a, b])
        for (const shown of [a, b])
          out.push({
            id: `yesno-${out.length}`,
            image: image(shown),
            question: isThere(about.name),
            answer: about === shown ? 'Yes' : 'No',
          })
    }
  }
  return out
}

/** The same question with the same four categories for a thing of each of them. Each round has every category once. */
function categoryTest(list: readonly Emoji[], rounds: number, rng: Rng): TestQuestion[] {
  const deck = new Deck(list, rng)
  const out: TestQuestion[] = []
  for (let round = 0; round < rounds; round++) {
    const order = shuffled(CATEGORIES, rng)
    for (const options of [order.slice(0, 4), order.slice(4)])
      for (const answer of options)
        out.push({
          id: `category-${out.length}`,
          image: image(deck.draw(answer)),
          question: categoryQuestion(options),
          answer,
          options: [...options],
        })
  }
  return out
}

/** Ten things at a time: each is shown once, the ten names are the options. Every category equally often. */
function nameTest(list: readonly Emoji[], perCategory: number, rng: Rng): TestQuestion[] {
  const deck = new Deck(list, rng)
  const cards = shuffled(
    CATEGORIES.flatMap((c) => Array.from({ length: perCategory }, () => deck.draw(c))),
    rng,
  )
  const out: TestQuestion[] = []
  for (let at = 0; at + 10 <= cards.length; at += 10) {
    const ten = cards.slice(at, at + 10)
    for (const e of ten)
      out.push({
        id: `name-${out.length}`,
        image: image(e),
        question: 'What is this?',
        answer: e.name,
        options: ten.map((x) => x.name),
      })
  }
  return out
}

/** The test questions: 608, 400 and 320, or 128, 80 and 80. */
export function makeTests(list: readonly Emoji[], seed: number, fast: boolean): Record<Test, TestQuestion[]> {
  const rng = (k: number): Rng => new Rng(seed, STREAM.tests + k * 0x1000)
  return {
    yesno: yesNoTest(list, fast ? 8 : 38, rng(0)),
    category: categoryTest(list, fast ? 10 : 50, rng(1)),
    name: nameTest(list, fast ? 10 : 40, rng(2)),
  }
}

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import {
  prepareData,
  type QuickstartData,
  readHalves,
  readQuality,
  readQuestions,
  readRecords,
  readText,
  tokenizerTexts,
} from '../../scripts/quickstart/data.js'
import { CATEGORIES, type Emoji, SIDE, selectEmoji, wordsOf } from '../../scripts/quickstart/emoji.js'
import { makeInstructions, QUALITIES, QUALITY_SHARES, TESTS } from '../../scripts/quickstart/records.js'
import { isThere, nameOf, RENAMED, SIGNS } from '../../scripts/quickstart/words.js'
import { loadDataset } from '../src/data/dataset.js'
import { decodeImage } from '../src/processing/image/decode.js'
import { tempDir } from './data-cases.js'

const roots: string[] = []
afterAll(() => {
  for (const d of roots) fs.rmSync(d, { recursive: true })
})
const prepare = (seed: number): Promise<QuickstartData> => {
  roots.push(tempDir())
  return prepareData(roots.at(-1) as string, { fast: true, seed })
}

let data: QuickstartData
beforeAll(async () => {
  data = await prepare(1)
})

/** Every file below a folder with a hash of its contents. */
function hashes(dir: string): Record<string, string> {
  const files = fs.readdirSync(dir, { recursive: true, encoding: 'utf8' }).sort()
  const plain = files.filter((f) => fs.statSync(path.join(dir, f)).isFile())
  const hash = (f: string): string =>
    createHash('sha256')
      .update(fs.readFileSync(path.join(dir, f)))
      .digest('hex')
  return Object.fromEntries(plain.map((f) => [f, hash(f)]))
}
const count = <T>(items: Iterable<T>): Map<T, number> => {
  const counts = new Map<T, number>()
  for (const x of items) counts.set(x, (counts.get(x) ?? 0) + 1)
  return counts
}
const emojiOf = (image: string): Emoji => {
  const id = path.basename(image, '.png')
  return data.emoji.find((e) => e.id === id) as Emoji
}
const byName = (name: string): Emoji => data.emoji.find((e) => e.name === name) as Emoji
const byIsThere = (question: string): Emoji => data.emoji.find((e) => isThere(e.name) === question) as Emoji

describe('selection', () => {
  const all = selectEmoji(1)
  it('has each thing once, in all categories', () => {
    expect(all.length).toBeGreaterThan(1300)
    expect(new Set(all.map((e) => e.name)).size).toBe(all.length)
    expect(new Set(all.map((e) => e.id)).size).toBe(all.length)
    for (const c of CATEGORIES) expect(all.filter((e) => e.category === c).length, c).toBeGreaterThan(80)
    for (const e of all) {
      expect(e.id, e.name).not.toMatch(/1f3f[b-f]/)
      expect(e.name).toMatch(/^[a-z0-9][a-z0-9' -]*$/)
      expect(e.keywords.length, e.name).toBeGreaterThan(0)
    }
  })
  it('splits every category into halves', () => {
    for (const c of CATEGORIES) {
      const members = all.filter((e) => e.category === c)
      const zero = members.filter((e) => e.half === 0).length
      expect(Math.abs(zero - members.length / 2), c).toBeLessThanOrEqual(10)
    }
  })
  it('calls things by noun phrases', () => {
    expect(nameOf('construction')).toBe('construction barrier')
    expect(nameOf('Aries')).toBe('aries sign')
    expect(nameOf('man’s shoe')).toBe("man's shoe")
    expect(nameOf('two-thirty')).toBe('clock at two-thirty')
    expect(nameOf('A button (blood type)')).toBe('blood type a button')
    // what is renamed occurs, and the new name is nobody else's
    for (const name of [...Object.values(RENAMED), ...SIGNS.map((s) => `${s} sign`)])
      expect(all.filter((e) => e.name === name).length, name).toBe(1)
    for (const label of [...Object.keys(RENAMED), ...SIGNS])
      expect(
        all.some((e) => e.name === label),
        label,
      ).toBe(false)
  })
  it.each([
    ['kite', 'Is there a kite in the picture?'],
    ['otter', 'Is there an otter in the picture?'],
    ['unicorn', 'Is there a unicorn in the picture?'],
    ['running hourglass', 'Is there a running hourglass in the picture?'],
    ['x-ray', 'Is there an x-ray in the picture?'],
    ['chopsticks', 'Are there chopsticks in the picture?'],
    ['skis', 'Are there skis in the picture?'],
    ['women holding hands', 'Are there women holding hands in the picture?'],
    ['person lifting weights', 'Is there a person lifting weights in the picture?'],
    ['leftwards pushing hand', 'Is there a leftwards pushing hand in the picture?'],
    ['sunrise over mountains', 'Is there a sunrise over mountains in the picture?'],
    ['smiling face with hearts', 'Is there a smiling face with hearts in the picture?'],
    ['bread', 'Is there bread in the picture?'],
    ['luggage', 'Is there luggage in the picture?'],
    ['potable water sign', 'Is there a potable water sign in the picture?'],
    ['mount fuji', 'Is mount fuji in the picture?'],
    ['milky way', 'Is the milky way in the picture?'],
  ])('asks for %s in English', (name, question) => expect(isThere(name)).toBe(question))
})

describe('files', () => {
  it('are read by the library', async () => {
    for (const file of [data.pairs, data.instructions, data.conversations]) {
      const set = await loadDataset(file, { images: data.images })
      expect(set.length).toBe(readRecords(file).length)
      set.close()
    }
  })
  it('give every record an id of its own', () => {
    const ids = [data.pairs, data.instructions, data.conversations].flatMap((f) => readRecords(f).map((r) => r.id))
    const all = [...ids, ...TESTS.flatMap((t) => readQuestions(data, t).map((q) => q.id))]
    expect(new Set(all).size).toBe(all.length)
  })
  it('name pictures that exist and can be decoded', async () => {
    const named = new Set<string>()
    for (const f of [data.pairs, data.instructions]) for (const r of readRecords(f)) if (r.image) named.add(r.image)
    for (const t of TESTS) for (const q of readQuestions(data, t)) named.add(q.image)
    const found = ['noto', 'twemoji', 'fluent'].flatMap((s) =>
      fs.readdirSync(path.join(data.images, s)).map((f) => `${s}/${f}`),
    )
    expect([...named].sort()).toEqual(found.sort())
    for (const name of named) {
      const picture = await decodeImage(path.join(data.images, name), { alpha: true })
      expect([picture.width, picture.height], name).toEqual([SIDE, SIDE])
      expect(picture.alpha !== undefined, name).toBe(!name.startsWith('fluent/'))
      expect(new Set(picture.data).size, name).toBeGreaterThan(1)
    }
  })
  it('have the picture on white under the alpha', async () => {
    const { data: rgb, alpha } = await decodeImage(path.join(data.images, 'noto', `${data.emoji[0].id}.png`), {
      alpha: true,
    })
    for (const [i, a] of (alpha as Uint8Array).entries())
      if (a === 0) expect([...rgb.subarray(3 * i, 3 * i + 3)]).toEqual([255, 255, 255])
  })
  it('keep Fluent out of every training', () => {
    for (const f of [data.pairs, data.instructions, data.conversations])
      expect(fs.readFileSync(f, 'utf8')).not.toContain('fluent')
    const training = new Set(['noto', 'twemoji'].flatMap((s) => Object.values(hashes(path.join(data.images, s)))))
    for (const h of Object.values(hashes(path.join(data.images, 'fluent')))) expect(training.has(h)).toBe(false)
    for (const t of TESTS) for (const q of readQuestions(data, t)) expect(q.image).toMatch(/^fluent\//)
  })
  it('are the same for the same seed, others for another', async () => {
    const [again, another] = [await prepare(1), await prepare(2)]
    expect(hashes(again.dir)).toEqual(hashes(data.dir))
    expect(fs.readFileSync(another.pairs)).not.toEqual(fs.readFileSync(data.pairs))
    expect(another.emoji).not.toEqual(data.emoji)
  })
})

describe('pairs', () => {
  it('have captions of the stated qualities', () => {
    const records = readRecords(data.pairs)
    const quality = readQuality(data)
    expect(Object.keys(quality).sort()).toEqual(records.map((r) => r.id).sort())
    for (const q of QUALITIES) {
      const share = Object.values(quality).filter((x) => x === q).length / records.length
      expect(Math.abs(share - QUALITY_SHARES[q]), q).toBeLessThan(0.002)
    }
    for (const r of records) {
      const e = emojiOf(r.image as string)
      const caption = r.conversations[1].value
      const parts = caption.split(', ')
      if (quality[r.id] === 'category') expect(caption).toBe(e.category)
      if (quality[r.id] === 'keyword') expect(e.keywords).toContain(caption)
      if (quality[r.id] === 'full') expect(parts[0]).toBe(e.name)
      if (quality[r.id] !== 'wrong') continue
      const named = byName(parts[0])
      expect(named.category).not.toBe(e.category)
      expect([...wordsOf(named)].filter((w) => wordsOf(e).has(w))).toEqual([])
    }
    expect(fs.readFileSync(data.pairs, 'utf8')).not.toMatch(/quality|wrong"/)
  })
  it('of one thing lie in one half', () => {
    const halves = readHalves(data)
    const seen = new Map<string, number>()
    for (const r of readRecords(data.pairs)) {
      const id = emojiOf(r.image as string).id
      expect(seen.get(id) ?? halves[r.id]).toBe(halves[r.id])
      seen.set(id, halves[r.id])
    }
    const zeros = Object.values(halves).filter((h) => h === 0).length / Object.keys(halves).length
    expect(Math.abs(zeros - 0.5)).toBeLessThan(0.03)
  })
})

describe('instructions', () => {
  it('are right, and Yes and No are balanced for every category and question', () => {
    const records = readRecords(data.instructions)
    const perCategory = new Map<string, number>()
    const perQuestion = new Map<string, number>()
    let multi = 0
    for (const r of records.filter((x) => x.image)) {
      const e = emojiOf(r.image as string)
      const turns = r.conversations
      if (turns.length > 2) multi++
      const answers = new Set(turns.map((t) => t.value))
      expect(answers.has('Yes') && answers.has('No')).toBe(false)
      expect(turns[0].value.startsWith('<image>\n')).toBe(true)
      for (let i = 0; i < turns.length; i += 2) {
        const question = turns[i].value.replace('<image>\n', '')
        const answer = turns[i + 1].value
        if (question === 'What is this?') expect(answer).toBe(e.name)
        else if (question.startsWith('Which category')) {
          expect(answer).toBe(e.category)
          if (question.includes(':')) expect(question.split(/: |, | or |\?/)).toContain(answer)
        } else {
          const sign = answer === 'Yes' ? 1 : -1
          expect(['Yes', 'No']).toContain(answer)
          perCategory.set(e.category, (perCategory.get(e.category) ?? 0) + sign)
          perQuestion.set(question, (perQuestion.get(question) ?? 0) + sign)
          const about = byIsThere(question)
          if (about) expect(answer === 'Yes').toBe(about === e)
          if (about && answer === 'No') expect(about.category).not.toBe(e.category)
          const category = /^Is this in the category (\w+)\?$/.exec(question)?.[1]
          if (category) expect(answer === 'Yes').toBe(category === e.category)
          const word = /^Does the keyword (\w+) fit the picture\?$/.exec(question)?.[1]
          if (word) expect(answer === 'Yes').toBe(e.keywords.includes(word))
        }
      }
    }
    expect([...perCategory.values()].every((n) => n === 0)).toBe(true)
    expect([...perQuestion.values()].every((n) => n === 0)).toBe(true)
    expect(multi / records.length).toBeGreaterThan(0.2)
    const textOnly = records.filter((r) => !r.image).length / records.length
    expect(textOnly).toBeGreaterThan(0.08)
    expect(textOnly).toBeLessThan(0.12)
  })
  it('ask something of nearly every picture', () => {
    const all = selectEmoji(1)
    const asked = new Set(makeInstructions(all, 1).map((r) => r.image))
    expect(asked.size).toBeGreaterThan(0.98 * 2 * all.length)
  })
})

describe('test questions', () => {
  it('yes/no: every question is asked of a right and of a wrong picture of another category', () => {
    const questions = readQuestions(data, 'yesno')
    expect(questions).toHaveLength(data.counts['yesno questions'])
    const sums = new Map<string, number>()
    const categories: string[] = []
    for (const q of questions) {
      const [shown, about] = [emojiOf(q.image), byIsThere(q.question)]
      expect(q.answer === 'Yes').toBe(shown === about)
      if (shown !== about) {
        expect(shown.category).not.toBe(about.category)
        expect([...wordsOf(shown)].filter((w) => wordsOf(about).has(w))).toEqual([])
      }
      sums.set(q.question, (sums.get(q.question) ?? 0) + (q.answer === 'Yes' ? 1 : -1))
      categories.push(`${shown.category} ${q.answer}`)
    }
    expect([...sums.values()].every((n) => n === 0)).toBe(true)
    expect([...count(categories).values()]).toEqual(new Array(16).fill(questions.length / 16))
  })
  it('category: four options, each as often right, whatever the wording', () => {
    const questions = readQuestions(data, 'category')
    for (const q of questions) {
      expect(emojiOf(q.image).category).toBe(q.answer)
      expect(q.options).toContain(q.answer)
      expect(new Set(q.options).size).toBe(4)
      for (const o of q.options as string[]) expect(q.question).toContain(o)
    }
    expect([...count(questions.map((q) => q.answer)).values()]).toEqual(new Array(8).fill(questions.length / 8))
    const places = count(questions.map((q) => (q.options as string[]).indexOf(q.answer)))
    expect([...places.values()]).toEqual(new Array(4).fill(questions.length / 4))
  })
  it('name: ten names, each shown once', () => {
    const questions = readQuestions(data, 'name')
    for (const q of questions) {
      expect(emojiOf(q.image).name).toBe(q.answer)
      expect(new Set(q.options).size).toBe(10)
      expect(q.options).toContain(q.answer)
    }
    expect([...count(questions.map((q) => emojiOf(q.image).category)).values()]).toEqual(
      new Array(8).fill(questions.length / 8),
    )
  })
  it('can be asked in every form in training too', () => {
    const trained = readRecords(data.instructions).flatMap((r) => r.conversations.map((t) => t.value))
    for (const start of ['What is this?', 'Which category is this: ', 'Is there a', 'Are there '])
      expect(trained.some((t) => t.replace('<image>\n', '').startsWith(start))).toBe(true)
  })
})

it('gives the tokenizers what the models will read', () => {
  const { llm, clip } = tokenizerTexts(data)
  expect(clip).toHaveLength(data.counts.pairs)
  expect(readText(data)).toHaveLength(data.counts['text documents'])
  expect(llm.some((t) => t.startsWith('\nWhat is this? ASSISTANT: '))).toBe(true)
  expect(llm.every((t) => !t.includes('<image>'))).toBe(true)
})

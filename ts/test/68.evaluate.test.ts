/** Questions after other turns, and the blind control. */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { otherImages } from '../src/evaluation/blind.js'
import { evaluate } from '../src/evaluation/evaluate.js'
import type { Question } from '../src/evaluation/questions.js'
import type { Turn } from '../src/formats/record-file.js'
import { generateBatch } from '../src/inference/generate.js'
import type { Style } from '../src/processing/conversation/styles.js'
import { buildSample, IGNORE } from '../src/processing/sample.js'

const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const images = fs.mkdtempSync(path.join(os.tmpdir(), 'evaluate test '))
const PICTURES = ['a00.png', 'a01.png', 'a03.png', 'a04.png']
let model: AlignGPT
beforeAll(async () => {
  for (const name of PICTURES) fs.copyFileSync(path.join(base, 'images', name), path.join(images, name))
  for (const name of PICTURES.slice(0, 2)) fs.copyFileSync(path.join(images, name), path.join(images, `again ${name}`))
  model = await AlignGPT.load(path.join(base, 'model/aligngpt'), { device: 'cpu' })
})
afterAll(() => {
  model.dispose()
  fs.rmSync(images, { recursive: true })
})

const turns = (...texts: string[]): Turn[] => texts.map((value, i) => ({ from: i % 2 ? 'gpt' : 'human', value }))
const history = [{ from: 'system', value: 'Be kind.' } as Turn, ...turns('<image>\nWhat is it?', 'A red cat.')]

describe('the blind control', () => {
  const bytes = (name: string): string => fs.readFileSync(path.join(images, name), 'base64')
  test('no question keeps the content of its picture, whatever the names, and nothing else changes', () => {
    const names = [...PICTURES, ...PICTURES.slice(0, 2).map((n) => `again ${n}`)]
    const questions = Array.from({ length: 60 }, (_, i): Question => {
      const asked = { id: `${i}`, question: `${i}?`, answer: 'yes' }
      return i % 7 ? { ...asked, image: names[i % names.length] } : asked
    })
    for (let seed = 0; seed < 30; seed++) {
      const others = otherImages(questions, { images, seed }) as Question[]
      const given = new Map<string, string>()
      for (const [i, { image, ...rest }] of others.entries()) {
        const { image: own, ...asked } = questions[i]
        expect(rest).toEqual(asked)
        if (own === undefined) {
          expect(image).toBeUndefined()
          continue
        }
        expect(bytes(image as string)).not.toBe(bytes(own))
        expect(given.get(bytes(own)) ?? image).toBe(image)
        given.set(bytes(own), image as string)
      }
      expect(new Set([...given.values()].map(bytes)).size).toBe(4) // a picture is given to one only
      expect(otherImages(questions, { images, seed })).toEqual(others)
    }
  })
  test('without another picture there is none', async () => {
    const questions = ['a00.png', 'again a00.png'].map((image, i) => ({
      id: `${i}`,
      question: 'Red?',
      answer: 'yes',
      image,
    }))
    expect(otherImages(questions, { images })).toBeNull()
    expect(await evaluate(model, questions, { images })).toMatchObject({ blind: null, blindAnswers: null, count: 2 })
  })
})

describe('a question after other turns', () => {
  test.each<Style>(['vicuna_v1', 'llama_2', 'llama_3'])('%s: only its own answer is looked at', (style) => {
    const record = {
      id: 'r',
      image: 'a',
      similarity: null,
      conversations: [...history, ...turns('Sure?', 'Yes, a cat.')],
    }
    const o = { style, patches: model.patches }
    const [all, last] = [
      buildSample(record, model.tokenizer, o),
      buildSample(record, model.tokenizer, { ...o, lastAnswer: true }),
    ]
    expect(last.ids).toEqual(all.ids)
    const from = last.labels.findIndex((l) => l !== IGNORE)
    expect(last.labels.slice(from)).toEqual(all.labels.slice(from))
    expect(model.tokenizer.decode([...last.labels.slice(from)])).toContain('Yes, a cat.')
    expect(all.labels.slice(0, from).some((l) => l !== IGNORE)).toBe(true)
    // what was answered before is part of the prompt, for the gate too
    expect(last.gateAnswer.reduce((n, x) => n + x, 0)).toBe(last.labels.length - from)
  })
  test('by likelihood: what goes through the model is the conversation and one answer', async () => {
    const loss = vi.spyOn(model, 'loss')
    const question = { id: 'q', image: 'a00.png', question: 'Is it red?', answer: 'Yes', history }
    await evaluate(model, [question], { images, blind: false })
    const [batch] = loss.mock.calls[0]
    loss.mockRestore()
    for (const [s, text] of ['Yes', 'No'].entries()) {
      const conversations = [...history, ...turns('Is it red?', text)]
      const record = { id: 'q', image: 'a00.png', similarity: null, conversations }
      const { ids } = buildSample(record, model.tokenizer, { style: 'vicuna_v1', patches: model.patches })
      const [begin, end] = [batch.offsets[s], batch.offsets[s + 1]]
      expect([...batch.tokens.slice(begin, end)].filter((t) => t >= 0)).toEqual([...ids].filter((t) => t >= 0))
      const learned = [...batch.lossTargets].filter((_, i) => batch.lossRows[i] >= begin && batch.lossRows[i] < end)
      expect(model.tokenizer.decode(learned).trim()).toBe(`${text}</s>`)
    }
  })
  test('generated: as generateBatch answers with that history, and otherwise than without', async () => {
    const question = { id: 'q', image: 'a01.png', question: 'What colour?', answer: 'red' }
    const o = { images, blind: false, maxNewTokens: 8 } as const
    const { answers } = await evaluate(model, [{ ...question, history }, question], o)
    const image = path.join(images, 'a01.png')
    const requests = [
      { prompt: question.question, image, history },
      { prompt: question.question, image },
    ]
    const said = await generateBatch(model, requests, { maxNewTokens: 8 })
    expect(answers.map((a) => a.given)).toEqual(said.map((g) => g.text))
    expect(said[0].text).not.toBe(said[1].text)
  })
  test('a conversation that is too long is not asked and counts as wrong; the others are', async () => {
    const long = turns(...new Array<string>(400).fill('word word word word word word'))
    const question = { id: 'q', question: 'What colour?', answer: '?' }
    const { answers, accuracy } = await evaluate(model, [{ ...question, history: long }, question], { maxNewTokens: 2 })
    expect(answers[0]).toMatchObject({ given: '', correct: false })
    expect(answers[0].problem).toMatch(/^a prompt of \d+ rows, the limit is \d+$/)
    expect(answers[1].problem).toBeUndefined()
    expect(accuracy).toBe(Number(answers[1].correct) / 2)
  })
})

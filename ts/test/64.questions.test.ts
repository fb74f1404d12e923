/** Files of questions: what is wrong with one is its own matter, and every key comes back. */
import fs from 'node:fs'
import path from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { evaluate } from '../src/evaluation/evaluate.js'
import { readQuestions } from '../src/evaluation/questions.js'
import { generateBatch } from '../src/inference/generate.js'
import { answerLine, type FileQuestion, readQuestionFile } from '../src/inference/question-file.js'
import { caseDir, tempDir } from './data-cases.js'

const dir = tempDir()
const image = caseDir('base', 'images', 'a00.png')
const broken = path.join(dir, 'broken.png')
fs.writeFileSync(broken, fs.readFileSync(image).subarray(0, 60))
const write = (text: string): string => {
  const file = path.join(dir, 'questions.jsonl')
  fs.writeFileSync(file, text)
  return file
}
const read = (...lines: (object | string)[]): Promise<FileQuestion[]> =>
  readQuestionFile(write(lines.map((l) => (typeof l === 'string' ? l : JSON.stringify(l))).join('\n')))
const one = async (question: object | string): Promise<FileQuestion> => (await read(question))[0]
let model: AlignGPT
beforeAll(async () => {
  model = await AlignGPT.load(caseDir('base', 'model', 'aligngpt'), {
    device: 'cpu',
    clip: caseDir('base', 'model', 'clip'),
  })
})
afterAll(() => {
  model.dispose()
  fs.rmSync(dir, { recursive: true })
})

describe('where a question may be', () => {
  const turns = [
    { from: 'human', value: 'One?' },
    { from: 'gpt', value: 'Yes.' },
    { from: 'human', value: '<image>\nTwo?' },
    { from: 'gpt', value: 'No.' },
  ]
  test.for<[object, object]>([
    [{ prompt: 'a?' }, { prompt: 'a?' }],
    [{ question: 'a?' }, { prompt: 'a?' }],
    [{ text: 'a?' }, { prompt: 'a?' }],
    [{ prompt: 'a?', text: 'old answer' }, { prompt: 'a?' }],
    [{ prompt: null, question: 'a?' }, { prompt: 'a?' }],
    [{ messages: [{ role: 'user', content: 'a?' }] }, { prompt: 'a?', history: [] }],
    [
      { image: 'x.png', conversations: turns },
      { prompt: 'Two?', history: turns.slice(0, 2), image: 'x.png', imageTurn: 2 },
    ],
    [
      { prompt: '<image>\na?', image: 'x.png' },
      { prompt: 'a?', image: 'x.png', imageTurn: 0 },
    ],
    [
      { prompt: 'a?', images: ['x.png'] },
      { prompt: 'a?', image: 'x.png' },
    ],
    [
      { prompt: 'a?', image_path: 'x.png' },
      { prompt: 'a?', image: 'x.png' },
    ],
  ])('%j', async ([asked, request]) => {
    const q = await one(asked)
    expect(q.error).toBeUndefined()
    const { name: _, ...found } = q.request as object & { name: string }
    expect(found).toEqual(request)
  })
})

describe('what is wrong with one', () => {
  test.for<[object | string, RegExp]>([
    [{ prompt: 5 }, /prompt: expected a string, got 5/],
    [{ prompt: ['a'] }, /prompt: expected a string/],
    [{ image: 'x.png' }, /prompt: expected .* got nothing/],
    [{ id: true, prompt: 'a?' }, /id: expected a string or number, got true/],
    [{ question_id: [1], text: 'a?' }, /question_id: expected a string or number/],
    [{ prompt: 'a?', images: ['x.png', 'y.png'] }, /expected one image/],
    [{ prompt: '<image>\na?' }, /no <image> in a question without an image/],
    [{ prompt: '<image>\n<image>\na?', image: 'x.png' }, /at most one <image>, got "?2/],
    [{ conversations: [{ from: 'gpt', value: 'No.' }] }, /a question/],
    ['{"prompt": "a?" "image": 1}', /questions\.jsonl/],
    ['not JSON at all', /questions\.jsonl/],
    ['{"prompt": "a?"', /questions\.jsonl/],
  ])('%j', async ([bad, message]) => {
    const asked = await read({ prompt: 'first' }, bad, { prompt: 'last', id: 7 })
    expect(asked.map((q) => q.error?.message ?? q.request?.prompt)).toEqual([
      'first',
      expect.stringMatching(message),
      'last',
    ])
    expect(asked[1].name).toMatch(/record 1/)
    expect(asked[1].error?.code).toBe('ERR_DATA')
    expect(asked[2].name).toMatch(/record 2 \(id 7\)$/)
    expect(JSON.parse(answerLine(asked[1], { error: asked[1].error })).error).toMatch(message)
  })
  test('a file that is none of questions is refused', async () => {
    await expect(read('a', 'b')).rejects.toMatchObject({ code: 'ERR_DATA' })
    await expect(readQuestionFile(path.join(dir, 'none'))).rejects.toMatchObject({ code: 'ERR_DATA' })
    await expect(readQuestionFile(write('[{"prompt": "a?"}, oops]'))).rejects.toMatchObject({ code: 'ERR_DATA' })
  })
})

describe('a line of answers', () => {
  const given = { text: 'Yes.', finish: 'end', ids: [1, 2], alpha: [0.5, 0.5] } as const
  const line = async (question: object | string): Promise<string> => {
    const q = await one(question)
    return answerLine(q, { ...given, ids: [...given.ids], alpha: [...given.alpha] })
  }
  const ours = '"text":"Yes.","finish":"end","tokens":2}'
  test.for<[string, string]>([
    ['{"prompt":"a?","question_id":7,"category":"conv"}', `{"prompt":"a?","question_id":7,"category":"conv",${ours}`],
    ['{"id":12345678901234567890,"prompt":"a?"}', `{"id":12345678901234567890,"prompt":"a?",${ours}`],
    ['{"prompt":"a?","x":1.50,"y":1e400,"z":-0}', `{"prompt":"a?","x":1.50,"y":1e400,"z":-0,${ours}`],
    ['{"prompt":"a?","meta":{"a":[1,{"b":null}]}}', `{"prompt":"a?","meta":{"a":[1,{"b":null}]},${ours}`],
    ['{"question_id":1,"text":"a?","answer":"b"}', `{"question_id":1,"answer":"b","prompt":"a?",${ours}`],
    ['{"question":"a?"}', `{"question":"a?","prompt":"a?",${ours}`],
    ['{"prompt":"a?","text":"old","tokens":9}', `{"prompt":"a?","input":{"text":"old","tokens":9},${ours}`],
    ['{"prompt":"a?","input":1,"finish":2}', `{"prompt":"a?","input":{"finish":2,"input":1},${ours}`],
    ['{"prompt":"\\u00e4?","__proto__":1,"k":"\\ud800"}', `{"prompt":"\\u00e4?","__proto__":1,"k":"\\ud800",${ours}`],
  ])('%s', async ([question, answer]) => {
    const made = await line(question)
    expect(made).toBe(answer)
    JSON.parse(made)
  })
  test('is one line, however the question is broken into lines', async () => {
    const q = (await readQuestionFile(write('[{\n  "prompt": "a?",\r\n  "meta": {\n    "b": [1,\n 2]\n  }\n}]')))[0]
    const made = answerLine(q, { ...given, ids: [], alpha: null })
    expect(made).not.toMatch(/[\r\n]/)
    expect(JSON.parse(made)).toMatchObject({ prompt: 'a?', meta: { b: [1, 2] } })
  })
  test('with the gate where it is wanted, and what was no JSON as it was', async () => {
    const q = await one({ prompt: 'a?' })
    expect(JSON.parse(answerLine(q, { ...given, ids: [], alpha: [1, 0] }, true)).alpha).toEqual([1, 0])
    const [, bad] = await read({ prompt: 'a?' }, 'oops')
    expect(JSON.parse(answerLine(bad, { error: bad.error }))).toMatchObject({ input: 'oops' })
  })
})

describe('generateBatch', () => {
  const good = { prompt: 'What is this?', image }
  const long = { prompt: 'word '.repeat(3000) }
  const bad = [
    { prompt: 'a?', image: path.join(dir, 'none.png') },
    { prompt: 'a?', image: broken },
    { prompt: 'a?', image: new Uint8Array(0), name: 'the third' },
    long,
    { prompt: 7 as unknown as string },
  ]
  const o = { maxNewTokens: 3, temperature: 1, seed: 5 }
  test('with keepGoing each bad request has its error, and the others what they have alone', async () => {
    const asked = [good, ...bad, { ...good, prompt: 'And now?' }]
    const answers = await generateBatch(model, asked, { ...o, keepGoing: true })
    expect(answers.map((a) => a.finish === 'error')).toEqual([false, true, true, true, true, true, false])
    expect(answers.map((a) => a.error?.code)).toEqual([
      ...[undefined, 'ERR_IMAGE', 'ERR_IMAGE', 'ERR_IMAGE', 'ERR_DATA', 'ERR_DATA', undefined],
    ])
    expect(answers[1].error?.message).toContain('none.png')
    expect(answers[2].error?.message).toContain('broken.png')
    expect(answers[3].error?.message).toContain('the third')
    expect(answers[4].error?.message).toContain('request 4')
    const alone = await generateBatch(model, [{ ...good, prompt: 'And now?', stream: 6 }], o)
    expect(answers[6]).toEqual(alone[0])
    expect(await generateBatch(model, bad, { ...o, keepGoing: true })).toHaveLength(bad.length)
  })
  test.for(bad.map((_, i) => i))('without it bad request %i ends all', async (i) => {
    await expect(generateBatch(model, [good, bad[i]], o)).rejects.toMatchObject({ name: 'AlignGPTError' })
  })
  test.for([
    ['temperature', -1],
    ['temperature', Number.NaN],
    ['topP', 0],
    ['topP', 1.5],
    ['topK', 2.5],
    ['maxNewTokens', 0],
    ['seed', -1],
  ] as const)('%s %d is refused with its range', async ([key, value]) => {
    await expect(generateBatch(model, [good], { [key]: value, keepGoing: true })).rejects.toThrow(
      new RegExp(`^\\[generate\\] ${key}: expected .*, got `),
    )
  })
})

describe('evaluation', () => {
  const q = (id: string, picture: string, answer = 'yes') => ({ id, image: picture, question: 'Is it?', answer })
  const second = caseDir('base', 'images', 'a01.png')
  const none = path.join(dir, 'none.png')
  test.for(['yes', 'a cat'])('a picture that cannot be read is named and counts for nothing: %s', async (answer) => {
    const questions = [q('0', image, answer), q('1', none, answer), q('2', broken, answer), q('3', second, answer)]
    const e = await evaluate(model, questions, { maxNewTokens: 2, batch: 3 })
    expect(e.count).toBe(2)
    expect(e.leftOut.map((l) => l.id)).toEqual(['1', '2'])
    expect(e.leftOut[0].reason).toContain('none.png')
    expect(e.leftOut[1].reason).toContain('broken.png')
    expect(e.answers.map((a) => a.code)).toEqual([undefined, 'ERR_IMAGE', 'ERR_IMAGE', undefined])
    expect(e.blindAnswers?.map((a) => a.problem !== undefined).slice(1, 3)).toEqual([true, true])
    const good = await evaluate(model, [questions[0], questions[3]], { maxNewTokens: 2 })
    expect(e.accuracy).toBe(good.accuracy)
  })
  test('bad records of a data file are left out and named', async () => {
    const file = write(
      [
        { id: 'a', question: 'Is it?', answer: 'yes', question_id: 7, category: 'conv' },
        { id: 'b', question: 'Is it?', answer: 5 },
        { id: 'c', question: '<image> Is it?', answer: 'yes' },
        { id: 'd', question: 'Which?', answer: 'cat', options: ['dog', 'cow'] },
        { id: 'e', question: 'Which?', answer: 'cat', options: 'cat' },
        { id: 'f', question: 'Is it?', answer: 'no' },
      ]
        .map((r) => JSON.stringify(r))
        .join('\n'),
    )
    const asked = await readQuestions(file, 100)
    expect(asked.questions.yesno.map(({ q }) => q.id)).toEqual(['a', 'f'])
    expect(asked.questions.yesno[0].record).toEqual({ question_id: 7, category: 'conv' })
    expect(asked.bad.map(({ id, index }) => [id, index])).toEqual([
      ['b', 1],
      ['c', 2],
      ['d', 3],
      ['e', 4],
    ])
    expect(asked.bad[2].reason).toMatch(/options: expected some with the answer "cat"/)
  })
})

import fs from 'node:fs'
import path from 'node:path'
import { Tokenizer as Library } from '@huggingface/tokenizers'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import {
  type BpeStyle,
  saveTokenizer,
  type TrainedTokenizer,
  trainBpe,
  trainClipBpe,
} from '../src/processing/bpe-trainer.js'
import { Tokenizer } from '../src/processing/tokenizer.js'
import { refuses, tempDir } from './data-cases.js'

const TEXTS = [
  'A chat between a curious user and an assistant. USER: What is this? ASSISTANT: grinning face',
  'What is this?\nA kite, not a cat; the kite flies, the cat sleeps.',
  'Which category is this: food, travel, object or symbol?',
  'kites and cats and kites and cats, 12 apples at 7:30',
  'Grüße aus Köln, 東京 und 🦊🦊',
  'the thing is the thing is the thing',
]
const MANY = Array.from({ length: 20 }, () => TEXTS).flat()

interface Model {
  vocab: Record<string, number>
  merges: [string, string][]
}
const modelOf = (t: TrainedTokenizer): Model => t.definition.model as Model

/** Merges the neighbours of lowest rank, leftmost first, until none is left. */
function naiveMerge(symbols: string[], merges: [string, string][]): string[] {
  const rank = new Map(merges.map(([a, b], i) => [`${a} ${b}`, i]))
  for (;;) {
    let best = -1
    let lowest = Number.POSITIVE_INFINITY
    for (let i = 0; i + 1 < symbols.length; i++) {
      const r = rank.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Number.POSITIVE_INFINITY
      if (r < lowest) [lowest, best] = [r, i]
    }
    if (best < 0) return symbols
    symbols = [...symbols.slice(0, best), symbols[best] + symbols[best + 1], ...symbols.slice(best + 2)]
  }
}

/** LLaMA's encoding as its definition says it: ▁ for spaces, merge, bytes for what is unknown. */
function naiveLlama(text: string, t: TrainedTokenizer, style: BpeStyle): number[] {
  if (text === '') return []
  const { vocab, merges } = modelOf(t)
  const spaced = text.replaceAll(' ', '▁')
  const whole = style === 'metaspace' && spaced.startsWith('▁') ? spaced : `▁${spaced}`
  return naiveMerge(Array.from(whole), merges).flatMap((piece) =>
    Object.hasOwn(vocab, piece)
      ? [vocab[piece]]
      : Array.from(Buffer.from(piece), (b) => vocab[`<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`]),
  )
}

const BYTE_CHARS = Array.from({ length: 256 }, (_, b) => b)
const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174
const standIn = (b: number): string =>
  String.fromCharCode(printable(b) ? b : 256 + BYTE_CHARS.slice(0, b).filter((x) => !printable(x)).length)

function naiveClip(text: string, t: TrainedTokenizer): number[] {
  const { vocab, merges } = modelOf(t)
  const words =
    text
      .normalize('NFC')
      .toLowerCase()
      .match(/'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu) ?? []
  const ids = words.flatMap((word) => {
    const symbols = Array.from(Buffer.from(word), standIn)
    symbols[symbols.length - 1] += '</w>'
    return naiveMerge(symbols, merges).map((p) => vocab[p])
  })
  return [vocab['<|startoftext|>'], ...ids, vocab['<|endoftext|>']]
}

const dirs: string[] = []
afterAll(() => {
  for (const d of dirs) fs.rmSync(d, { recursive: true })
})
function saved(t: TrainedTokenizer): { dir: string; tokenizer: Tokenizer; library: Library } {
  const dir = path.join(tempDir(), 'tokenizer')
  dirs.push(path.dirname(dir))
  saveTokenizer(t, dir)
  const read = (name: string): object => JSON.parse(fs.readFileSync(path.join(dir, name), 'utf8'))
  return {
    dir,
    tokenizer: Tokenizer.load(dir),
    library: new Library(read('tokenizer.json'), read('tokenizer_config.json')),
  }
}

/** Words of the training texts, other words, signs, spaces, line breaks, any Unicode; no literal ▁, no special token. */
const anyText = fc
  .array(
    fc.oneof(
      fc.constantFrom(
        'What',
        'is',
        'this',
        '?',
        ' ',
        '  ',
        '\n',
        'kite',
        'cats',
        'grinning',
        'face',
        ':',
        ',',
        '12',
        '🦊',
      ),
      fc.string({ unit: 'grapheme', maxLength: 6 }),
    ),
    { maxLength: 12 },
  )
  .map((parts) => parts.join(''))
  .filter((s) => !s.includes('▁') && !/<s>|<\/s>|<unk>|<0x/.test(s) && !/\p{Cs}/u.test(s))

describe.each<BpeStyle>(['metaspace', 'prepend'])('trainBpe, %s', (style) => {
  const trained = trainBpe(MANY, { vocabSize: 420, style })
  const { tokenizer, library } = saved(trained)

  it('writes the layout of a LLaMA', () => {
    const { vocab, merges } = modelOf(trained)
    expect([vocab['<unk>'], vocab['<s>'], vocab['</s>'], vocab['<0x00>'], vocab['<0xFF>']]).toEqual([0, 1, 2, 3, 258])
    expect(Object.keys(vocab)).toHaveLength(trained.vocabSize)
    expect(new Set(Object.values(vocab)).size).toBe(trained.vocabSize)
    expect(trained.vocabSize).toBe(420)
    for (const [a, b] of merges) expect(vocab[a + b], `${a} ${b}`).toBeDefined()
    expect([tokenizer.bosId, tokenizer.eosId, tokenizer.padId, tokenizer.vocabSize]).toEqual([1, 2, 0, 420])
    expect(tokenizer.encode('kite')[0]).toBe(1)
  })
  it('gives whole words of the texts one token, also after a line break', () => {
    expect(tokenizer.encode('kites', { addSpecialTokens: false })).toHaveLength(1)
    expect(tokenizer.encode('the thing is', { addSpecialTokens: false })).toHaveLength(3)
    // A piece never joins letters and signs, and digits stand alone.
    for (const piece of Object.keys(modelOf(trained).vocab).filter((p) => !p.startsWith('<')))
      expect(piece).toMatch(/^(▁?[\p{L}\p{M}]*|▁?\p{N}|▁?[^\p{L}\p{M}\p{N}▁]+)$/u)
  })
  it('is what a plain encoder makes of its merges, and comes back', () => {
    fc.assert(
      fc.property(anyText, (text) => {
        const ids = tokenizer.encode(text, { addSpecialTokens: false })
        expect(ids).toEqual(naiveLlama(text, trained, style))
        expect(tokenizer.encodeWithOffsets(text).ids).toEqual(ids)
        expect(library.encode(text, { add_special_tokens: false }).ids).toEqual(ids)
        const back = tokenizer.decode([1, ...ids, 2], { skipSpecialTokens: true })
        expect(back).toBe(style === 'metaspace' ? text.replace(/^ /, '') : text)
      }),
      { numRuns: 400 },
    )
  })
  it('does not depend on the order of the texts', () => {
    expect(trainBpe([...MANY].reverse(), { vocabSize: 420, style })).toEqual(trained)
  })
})

describe('trainBpe', () => {
  it('stops when nothing is left to merge', () => {
    const t = trainBpe(['ab ab'], { vocabSize: 5000 })
    expect(Object.keys(modelOf(t).vocab).slice(259)).toEqual(['▁a', '▁ab', '▁', 'a', 'b'])
    expect(t.vocabSize).toBe(264)
  })
  it('writes rare characters in bytes when there is no room', () => {
    const { tokenizer } = saved(trainBpe(['abcdefgh', 'aaaa'], { vocabSize: 264 }))
    expect(tokenizer.vocabSize).toBeLessThanOrEqual(264)
    expect(tokenizer.decode(tokenizer.encode('hgfedcba'), { skipSpecialTokens: true })).toBe('hgfedcba')
  })
  it('works without any text', () => {
    const { tokenizer } = saved(trainBpe([], { vocabSize: 300 }))
    expect(tokenizer.decode(tokenizer.encode('é'), { skipSpecialTokens: true })).toBe('é')
  })
  it('refuses odd options', async () => {
    for (const vocabSize of [0, 259, 300.5, Number.NaN, 2 ** 30])
      await refuses(() => trainBpe([], { vocabSize }), 'ERR_ARGUMENT', /vocabSize/)
    await refuses(() => trainBpe('text' as unknown as string[], { vocabSize: 300 }), 'ERR_ARGUMENT', /texts/)
    await refuses(() => trainBpe([], { vocabSize: 300, minCount: 0 }), 'ERR_ARGUMENT', /minCount/)
    await refuses(() => trainBpe([], { vocabSize: 300, style: 'x' as BpeStyle }), 'ERR_ARGUMENT', /style/)
    await refuses(() => trainClipBpe([], { vocabSize: 513 }), 'ERR_ARGUMENT', /vocabSize/)
  })
  it('makes 2,000 pieces of a megabyte in a few seconds', () => {
    const letters = 'etaoinshrdlucmfwypvbgkjqxz'
    let state = 1
    const next = (n: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      return Math.floor((state / 2 ** 32) ** 2 * n)
    }
    const words = Array.from({ length: 20000 }, () =>
      Array.from({ length: 2 + next(9) }, () => letters[next(26)]).join(''),
    )
    const lines = Array.from({ length: 20000 }, () => Array.from({ length: 10 }, () => words[next(20000)]).join(' '))
    expect(lines.join('\n').length).toBeGreaterThan(900_000)
    const start = performance.now()
    expect(trainBpe(lines, { vocabSize: 2300 }).vocabSize).toBe(2300)
    const seconds = (performance.now() - start) / 1000
    expect(seconds).toBeLessThan(15)
  })
})

describe('trainClipBpe', () => {
  const trained = trainClipBpe(MANY, { vocabSize: 620 })
  const { tokenizer, library } = saved(trained)
  it('writes the layout of a CLIP', () => {
    const { vocab } = modelOf(trained)
    expect(vocab['!']).toBe(0)
    expect(vocab['!</w>']).toBe(256)
    expect(vocab['<|startoftext|>']).toBe(trained.vocabSize - 2)
    expect(vocab['<|endoftext|>']).toBe(trained.vocabSize - 1)
    expect(Object.keys(vocab)).toHaveLength(trained.vocabSize)
    expect(trained.vocabSize).toBe(620)
    expect(tokenizer.encodeClip('Kites', 77)).toHaveLength(3)
  })
  it('is what a plain encoder makes of its merges', () => {
    fc.assert(
      fc.property(
        anyText.filter((s) => !s.includes('<|') && s.normalize('NFC') === s && !/[İẞς]/.test(s)),
        (text) => {
          const ids = tokenizer.encode(text)
          expect(ids).toEqual(naiveClip(text, trained))
          expect(library.encode(text).ids).toEqual(ids)
        },
      ),
      { numRuns: 300 },
    )
  })
})

/** Files of another kind than a reader wants are named, and the way out; integers of records keep their digits. */
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { parseBytes } from '../src/formats/record-file.js'
import { quoteLargeIntegers } from '../src/util/json.js'
import { refuses } from './data-cases.js'

describe('numbers of records', () => {
  const parse = (text: string): unknown => parseBytes(Buffer.from(text), 'f', 0)

  it.each([
    ['{"id":12345678901234567890}', { id: '12345678901234567890' }],
    ['{"id": -9007199254740993 }', { id: '-9007199254740993' }],
    ['{"id":9007199254740991}', { id: 9007199254740991 }],
    [
      '[{"a":[1,9007199254740993,{"b":90071992547409931}]}]',
      [{ a: [1, '9007199254740993', { b: '90071992547409931' }] }],
    ],
    ['{"x":0.12345678901234567890}', { x: 0.12345678901234568 }],
    ['{"x":12345678901234567890.5}', { x: Number('12345678901234567890.5') }],
    ['{"x":12345678901234567890e3}', { x: Number('12345678901234567890e3') }],
    ['{"x":1e0000000000000000001}', { x: 10 }],
    [
      '{"s":"a \\" 12345678901234567890 \\\\","id":12345678901234567891}',
      { s: 'a " 12345678901234567890 \\', id: '12345678901234567891' },
    ],
    ['{"12345678901234567890":1}', { '12345678901234567890': 1 }],
  ])('%s', (text, value) => expect(parse(text)).toEqual(value))

  it('nothing else changes', () => {
    fc.assert(
      fc.property(fc.json(), (text) => {
        if (!/\d{16}/.test(text)) expect(quoteLargeIntegers(text)).toBe(text)
        expect(JSON.parse(quoteLargeIntegers(text))).toBeDefined()
      }),
      { numRuns: 300, seed: 4 },
    )
  })
  it('a record nested 100,000 deep is refused, one of 12 MB is read', async () => {
    await refuses(() => parse(`{"a":${'['.repeat(1e5)}${']'.repeat(1e5)}}`), 'ERR_DATA', /not nested so deep/)
    const long = `${'x'.repeat(12e6)}1234567890123456789`
    expect((parse(JSON.stringify({ long })) as { long: string }).long.length).toBe(long.length)
  })
})

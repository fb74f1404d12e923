import fs from 'node:fs'
import path from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import { stackedColumns, weightBars } from '../../scripts/quickstart/charts.js'
import { type QuickstartResult, type ReportExtras, renderReport, writeReport } from '../../scripts/quickstart/report.js'
import { heatMap, lineChart, smooth, ticks } from '../src/report/charts.js'
import { escapeHtml } from '../src/report/html.js'
import { caseDir, tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))

const picture = caseDir('base', 'images', 'a00.png')
const falling = (n: number, from: number, to: number): number[] =>
  Array.from({ length: n }, (_, i) => to + (from - to) * Math.exp((-5 * i) / n))

const RESULT: QuickstartResult = {
  accuracy: { yesno: 0.8625, category: 0.7125, name: 0.5875 },
  blind: { yesno: 0.5033, category: 0.2475, name: 0.0938 },
  chance: { yesno: 0.5, category: 0.25, name: 0.1 },
  questions: { yesno: 608, category: 404, name: 320 },
  levels: {
    wrongInLowestQuarter: 0.4567,
    auc: 0.7423,
    edges: [0.101, 0.202, 0.303, 0.404, 0.505],
    byQuality: { full: [11, 22, 33, 44], keyword: [5, 6, 7, 8], category: [1, 2, 3, 4], wrong: [19, 9, 4, 0] },
  },
  seconds: { data: 6.43, CLIP: 110.27, 'phase <1>': 25.16 },
  towers: { made: 'here', isa: 'avx512', sameAsShipped: true },
  loss: {
    clip: falling(50, 5.512, 1.1),
    llm: falling(60, 7.625, 1.2),
    pretrain: falling(70, 6.218, 2.3),
    finetune: falling(80, 3.241, 0.4),
  },
}
const EVIL = '<script>alert("x")</script> & \'<img src=x onerror=alert(1)>'
const EXTRAS: ReportExtras = {
  fast: true,
  seed: 7,
  date: '2026-01-02',
  machine: 'two <cores>',
  facts: [['pairs & things', '5,652']],
  levelExamples: [
    { level: 0, image: picture, caption: EVIL, score: 0.1234, quality: 'wrong' },
    { level: 3, image: fs.readFileSync(picture), caption: 'a kite', score: 0.4321, quality: 'full' },
  ],
  answers: [
    {
      image: picture,
      question: 'What is this?',
      expected: EVIL,
      given: EVIL,
      correct: false,
      gate: [0.61, 0.28, 0.11],
    },
    { image: null, question: EVIL, expected: 'No', given: 'No', correct: true, gate: [] },
  ],
}

describe('report', () => {
  const file = path.join(dir, 'a', 'b', 'report.html')
  writeReport(file, RESULT, EXTRAS)
  const html = fs.readFileSync(file, 'utf8')
  const visible = html.replace(/<(style|script)[\s\S]*?<\/\1>/g, '').replace(/data:image[^"]*/g, '')

  it('shows every number', () => {
    for (const n of ['86.3 %', '71.3 %', '58.8 %', '50.3 %', '24.8 %', '9.4 %', '50.0 %', '25.0 %', '10.0 %'])
      expect(visible).toContain(n)
    for (const n of ['+35.9', '+46.5', '+49.4', '608', '404', '320', '45.7 %', '0.742']) expect(visible).toContain(n)
    for (const n of ['6.4 s', '110.3 s', '25.2 s', '2:22 <em>min</em>']) expect(visible).toContain(n)
    for (const n of ['5.512', '7.625', '6.218', '3.241', '50 steps', '80 steps']) expect(visible).toContain(n)
    // levels: totals, edges, share of wrong captions, scores
    for (const n of ['>36<', '>39<', '>47<', '>56<', '0.101 to 0.202', '0.404 to 0.505', '53 % wrong', '0 % wrong'])
      expect(visible).toContain(n)
    for (const n of ['0.123', '0.432', '0.61', '0.28', '0.11', 'seed 7', '2026-01-02', '5,652', '32 of 178'])
      expect(visible).toContain(n)
  })
  it('holds the result as JSON', () => {
    const json = /<script type="application\/json" id="result">([\s\S]*?)<\/script>/.exec(html)?.[1]
    expect(JSON.parse(json as string)).toEqual(RESULT)
  })
  it('escapes text in captions, questions, answers and names', () => {
    expect(html).not.toContain('alert("x")')
    expect(html).not.toContain('<img src=x')
    expect(html.split(escapeHtml(EVIL)).length - 1).toBe(4)
    expect(html).not.toContain('<1>')
    expect(html).not.toContain('<cores>')
    expect(html.match(/<script/g)).toHaveLength(1)
  })
  it('needs nothing from outside', () => {
    const [licence, ...more] = html.match(/https?:\/\/[^\s<"')]*/g) ?? []
    expect(licence).toBe('https://creativecommons.org/licenses/by/4.0/')
    expect(more).toEqual([])
    expect(html).not.toMatch(/<(link|iframe|object|embed|a|base)\b|@import|url\(|srcset/i)
    for (const [, src] of html.matchAll(/src="([^"]*)"/g)) expect(src).toMatch(/^data:image\/(png|jpeg|webp);base64,/)
    expect(html).toContain("default-src 'none'")
    for (const name of ['Noto', 'Twemoji', 'Fluent', 'Emojibase', 'Apache', 'CC-BY 4.0', 'MIT'])
      expect(html).toContain(name)
  })
  it('is well formed', () => {
    const open: string[] = []
    const empty = new Set(['meta', 'img', 'line', 'polyline', 'rect'])
    for (const [, slash, name] of html.replace(/<style>[\s\S]*?<\/style>/, '').matchAll(/<(\/?)([a-z]\w*)[^>]*>/g)) {
      if (slash) {
        expect(open.pop()).toBe(name)
      } else if (name === 'rect') {
        // a rect holds its title
        open.push(name)
      } else if (!empty.has(name)) open.push(name)
    }
    expect(open).toEqual([])
    expect(html).not.toMatch(/NaN|undefined|Infinity/)
  })
  it('says which parts were trained in the run', () => {
    expect(visible).toContain('model from random numbers on')
    expect(visible).toContain('with tokenizers; the shipped ones bit for bit')
    const towers = { made: 'shipped', isa: 'avx512', date: '2026-01-01' } as const
    const { pretrain, finetune } = RESULT.loss
    const text = renderReport({ ...RESULT, towers, loss: { pretrain, finetune } }, EXTRAS)
    expect(text).toContain('come with the repository')
    expect(text).toContain('made on 2026-01-01, CPU code path avx512')
    expect(text).not.toContain('from random numbers')
    expect(text.match(/loss by step"/g)).toHaveLength(2)
  })
  it('bears a run that recorded nothing', () => {
    const nothing = { clip: [], llm: [Number.NaN], pretrain: [1], finetune: [2, 2] }
    const none = { yesno: Number.NaN, category: 0, name: 1 }
    const levels = { ...RESULT.levels, byQuality: { full: [0, 0], keyword: [0, 0], category: [0, 0], wrong: [0, 0] } }
    const result = { ...RESULT, loss: nothing, accuracy: none, levels, seconds: {} }
    const text = renderReport(result, { ...EXTRAS, answers: [], levelExamples: [], facts: [] })
    expect(text.replace(/<script[\s\S]*?<\/script>/, '')).not.toMatch(/undefined|Infinity|="NaN|NaN%/)
  })
})

describe('charts', () => {
  it('ticks are round, inside and not too many', () => {
    expect(ticks(0, 10)).toEqual([0, 5, 10])
    expect(ticks(0, 0.31)).toEqual([0, 0.1, 0.2, 0.3])
    expect(ticks(3, 3)).toEqual([3])
    fc.assert(
      fc.property(
        fc.double({ min: -1e6, max: 1e6, noNaN: true }),
        fc.double({ min: 1e-3, max: 1e6, noNaN: true }),
        (a, d) => {
          const t = ticks(a, a + d)
          expect(t.length).toBeLessThanOrEqual(5)
          for (const v of t) expect(v >= a - 1e-6 * d && v <= a + d + 1e-6 * d).toBe(true)
        },
      ),
    )
  })
  it('smoothing keeps constants and straight lines', () => {
    for (const v of smooth([2, 2, 2, 2], 3)) expect(v).toBeCloseTo(2)
    smooth([1, 2, 3, 4, 5], 2).forEach((v, i) => {
      expect(v).toBeCloseTo(i + 1)
    })
  })
  it('lines stay in their frame', () => {
    fc.assert(
      fc.property(
        fc.array(fc.double({ noDefaultInfinity: true, min: -50, max: 1e4 }), { maxLength: 900 }),
        (values) => {
          const svg = lineChart([{ points: values.map((v, i) => [i + 7, v]), colour: 'red' }], 'x')
          for (const [, points] of svg.matchAll(/points="([^"]*)"/g))
            for (const p of points.split(' ')) {
              const [x, y] = p.split(',').map(Number)
              expect(x >= 0 && x <= 420 && y >= 0 && y <= 200, p).toBe(true)
            }
        },
      ),
      { numRuns: 50 },
    )
  })
  it('numbers of the axes are short', () => {
    const points = [0, 5e4, 1e5].map((y, x) => [1e4 * x, y] as const)
    const text = lineChart([{ points, colour: 'red' }], 'x')
    for (const t of ['50K', '100K', '>5000<', '20K']) expect(text).toContain(t)
    expect(
      lineChart(
        [
          {
            points: [
              [0, 0],
              [1, 2e-5],
            ],
            colour: 'red',
          },
        ],
        'x',
      ),
    ).toContain('>2e-5<')
  })
  it('a line stands over its own steps, on one scale with the others', () => {
    const lines = [
      {
        points: [
          [0, 4],
          [10, 2],
        ] as const,
        colour: 'red',
      },
      {
        points: [
          [10, Number.NaN],
          [10, 4],
          [20, 0],
        ] as const,
        colour: 'blue',
      },
    ]
    const drawn = [...lineChart(lines, 'x').matchAll(/stroke:(\w+)" points="([^"]*)"/g)].map((m) => m.slice(1))
    // x from 40 to 406 for 0 to 20, y from 174 to 10 for 0 to 4
    const [red, blue] = [
      ['red', '40.0,10.0 223.0,92.0'],
      ['blue', '223.0,10.0 406.0,174.0'],
    ]
    expect(drawn).toEqual([red, blue, red, blue])
  })
  it('a heat map has a cell for each level and step, the mean where there are more steps than columns', () => {
    const cells = (svg: string) =>
      [...svg.matchAll(/y="(\d+)"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)/g)].map((m) => m.slice(1))
    const svg = heatMap(
      [5, 6],
      [
        [0.5, 1],
        [0.25, 2],
      ],
      'x',
    )
    expect(cells(svg)).toEqual([
      ['28', '0.250', 'level 0, step 5: 0.500'],
      ['10', '0.500', 'level 1, step 5: 1.000'],
      ['28', '0.125', 'level 0, step 6: 0.250'],
      ['10', '1.000', 'level 1, step 6: 2.000'],
    ])
    // a row that is always 1 does not set the scale
    expect(
      cells(
        heatMap(
          [5, 6],
          [
            [0.1, 1],
            [0.2, 1],
          ],
          'x',
        ),
      ).map((c) => c[1]),
    ).toEqual(['0.500', '1.000', '1.000', '1.000'])
    const steps = Array.from({ length: 250 }, (_, i) => i)
    const many = cells(
      heatMap(
        steps,
        steps.map((i) => [i]),
        'x',
      ),
    )
    expect(many).toHaveLength(84) // of three steps each, the last of one
    expect(many[1]).toEqual(['10', (4 / 249).toFixed(3), 'level 0, steps 3 to 5: 4.000'])
    expect(
      heatMap(
        [0, 1],
        [
          [0, 0],
          [0, 0],
        ],
        'x',
      ),
    ).toContain('nothing recorded')
  })
  it('columns and weights show their values', () => {
    const svg = stackedColumns(
      [
        { colour: 'full', label: 'a', values: [3, 0] },
        { colour: 'wrong', label: 'b', values: [4, 1] },
      ],
      ['x', 'y'],
      'l',
    )
    expect(svg).toContain('>7<')
    expect(svg.match(/<rect/g)).toHaveLength(3)
    expect(weightBars([0.25, 0.75])).toContain('local level 1: 0.750')
  })
  it('escapes everything HTML knows', () => {
    expect(escapeHtml(`<a href="x">'&`)).toBe('&#60;a href=&#34;x&#34;&#62;&#39;&#38;')
    expect(escapeHtml('a\u0000b\u202ec')).toBe('a b c')
  })
})

/**
 * The quickstart's report: one HTML file with everything in it. It asks nobody for anything: no script, no link, no
 * font.
 */
import fs from 'node:fs'
import path from 'node:path'
import { CHART_STYLE, escapeHtml, htmlPage, lineChart, PAGE_STYLE } from 'aligngpt/report'
import { barWithMarks, legend, type Series, stackedColumns, weightBars } from './charts.js'
import { QUALITIES, type Quality, TESTS, type Test } from './records.js'

export type Scores = Record<Test, number>

/** What runs/quickstart/result.json holds. */
export interface QuickstartResult {
  accuracy: Scores
  /** the same questions with the pictures shuffled */
  blind: Scores
  /** guessing */
  chance: Scores
  /** questions of each test */
  questions: Scores
  levels: {
    /** share of the captions that are wrong on purpose among the lowest quarter of the scores; of all wrong ones */
    wrongInLowestQuarter: number
    /** chance that a wrong caption scores lower than another one */
    auc: number
    /** scores at which the levels begin, and the highest score: N + 1 numbers */
    edges: number[]
    /** pairs of each level, by quality of the caption: N numbers each */
    byQuality: Record<Quality, number[]>
  }
  seconds: Record<string, number>
  towers: TowersMade
  /** by step; of the towers only where they were trained in this run */
  loss: { clip?: number[]; llm?: number[]; pretrain: number[]; finetune: number[] }
}

/** Where CLIP, the scoring CLIPs and the language model come from. */
export interface TowersMade {
  made: 'shipped' | 'here'
  /** CPU code path they were made with */
  isa: string
  /** day the shipped ones were made */
  date?: string
  /** whether those made here are the shipped ones, byte for byte */
  sameAsShipped?: boolean
}

/** A picture: a file, or its bytes. */
export type ReportImage = string | Uint8Array

export interface LevelExample {
  level: number
  image: ReportImage
  caption: string
  score: number
  quality: Quality
}
export interface AnswerExample {
  /** null for a question without a picture */
  image: ReportImage | null
  question: string
  /** what would be right */
  expected: string
  given: string
  correct: boolean
  /** weights of the local levels, N - 1 numbers; empty without a picture */
  gate: number[]
}

/** What the report shows besides the result. */
export interface ReportExtras {
  fast: boolean
  seed: number
  /** day or time of the run, as it shall be printed */
  date: string
  /** processor, threads, ... */
  machine: string
  /** rows of the table at the end: parameters, pictures, pairs, ... */
  facts: [string, string][]
  levelExamples: LevelExample[]
  answers: AnswerExample[]
}

const percent = (v: number, digits = 1): string => (Number.isFinite(v) ? `${(100 * v).toFixed(digits)} %` : 'none')
const points = (v: number): string =>
  Number.isFinite(v) ? `${v < 0 ? '−' : '+'}${Math.abs(100 * v).toFixed(1)}` : 'none'
/** Number and unit. */
function duration(s: number): [string, string] {
  if (s < 90) return [s.toFixed(1), 's']
  const whole = Math.round(s)
  return [`${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}`, 'min']
}
const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

const TEST_NAMES: Record<Test, string> = {
  yesno: 'Yes or no',
  category: 'Which of four categories',
  name: 'Which of ten names',
}
const QUALITY_NAMES: Record<Quality, string> = {
  full: 'full name',
  keyword: 'keyword only',
  category: 'category only',
  wrong: 'wrong on purpose',
}

/** data: URI of a picture. */
function dataUri(image: ReportImage): string {
  const bytes = Buffer.from(typeof image === 'string' ? fs.readFileSync(image) : image)
  const head = bytes.subarray(0, 12).toString('latin1')
  const type = head.startsWith('\xff\xd8') ? 'jpeg' : head.startsWith('RIFF') ? 'webp' : 'png'
  return `data:image/${type};base64,${bytes.toString('base64')}`
}
const img = (image: ReportImage, size: number): string =>
  `<img src="${dataUri(image)}" width="${size}" height="${size}" alt="">`

function headline({ accuracy, blind, levels, seconds, towers }: QuickstartResult): string {
  const tile = ([value, unit]: readonly string[], name: string, note: string): string =>
    `<div class="tile"><strong>${value} <em>${unit}</em></strong><span>${name}</span><small>${note}</small></div>`
  const share = (v: number): string[] => (Number.isFinite(v) ? [(100 * v).toFixed(1), '%'] : ['none', ''])
  const luck = 'in the lowest quarter of the scores; 25 % would be luck'
  const work = 'scores, both phases and the test'
  const total = Object.values(seconds).reduce((a, b) => a + b, 0)
  const tests = TESTS.map((t) =>
    tile(share(accuracy[t]), TEST_NAMES[t], `${points(accuracy[t] - blind[t])} points over the blind control`),
  )
  return `<div class="tiles">${tests.join('')}
${tile(share(levels.wrongInLowestQuarter), 'of the wrong captions found', luck)}
${tile(duration(total), 'for this run', towers.made === 'here' ? `towers, ${work}` : work)}</div>`
}

function accuracyTable({ accuracy, blind, chance, questions }: QuickstartResult): string {
  const row = (t: Test): string => `<tr><th scope="row">${TEST_NAMES[t]}</th>
<td class="wide">${barWithMarks(accuracy[t], [
    { at: blind[t], kind: 'blind' },
    { at: chance[t], kind: 'chance' },
  ])}</td>
<td class="number"><strong>${percent(accuracy[t])}</strong></td><td class="number">${percent(blind[t])}</td>
<td class="number">${percent(chance[t])}</td><td class="number">${points(accuracy[t] - blind[t])}</td>
<td class="number">${questions[t]}</td></tr>`
  return `<section><h2>How well it sees</h2>
<p>Questions about pictures in a drawing style (Fluent) that is in no training; the things are the same as in training.
Blind control: the same questions with the pictures shuffled, so what it gets right there needs no looking.</p>
<div class="scroll"><table><thead><tr><th>Test</th><th></th><th class="number">Model</th><th class="number">Blind</th>
<th class="number">Chance</th><th class="number">Over blind</th><th class="number">Questions</th></tr></thead>
<tbody>${TESTS.map(row).join('\n')}</tbody></table></div>
<p class="legend"><span><i style="background:var(--accent)"></i>model</span><span><i class="blind"></i>blind control</span><span><i class="chance"></i>chance</span></p>
</section>`
}

function lossCurves({ loss }: QuickstartResult): string {
  const panel = (values: readonly number[], name: string, note: string): string => {
    const finite = values.filter(Number.isFinite)
    const end = finite.slice(-Math.max(1, Math.ceil(finite.length / 20)))
    const ends = finite.length
      ? `${values.length} steps, ${finite[0].toFixed(3)} at first, ${mean(end).toFixed(3)} at the end`
      : ''
    return `<figure><figcaption><strong>${name}</strong> <span>${note}</span></figcaption>
${lineChart([{ points: values.map((v, i) => [i, v]), colour: 'var(--accent)' }], `${name}: loss by step`)}<p class="muted">${ends}</p></figure>`
  }
  return `<section><h2>Learning</h2><p>Loss by step: thin, every step; bold, its moving average. The end is the mean of the
last twentieth.</p><div class="panels">
${loss.clip ? panel(loss.clip, 'CLIP', 'pictures and captions find each other (contrastive)') : ''}
${loss.llm ? panel(loss.llm, 'Language model', 'plain text and conversations') : ''}
${panel(loss.pretrain, 'Phase 1, pre-training', 'projector and alignment vectors')}
${panel(loss.finetune, 'Phase 2, instruction tuning', 'language model, projector and gate')}
</div></section>`
}

function levelChart({ levels }: QuickstartResult): string {
  const series: Series[] = QUALITIES.map((q) => ({ colour: q, label: QUALITY_NAMES[q], values: levels.byQuality[q] }))
  const n = levels.byQuality.full.length
  const totals = Array.from({ length: n }, (_, i) => QUALITIES.reduce((s, q) => s + levels.byQuality[q][i], 0))
  const wrong = levels.byQuality.wrong
  const below = totals.map((t, i) => (t ? `${percent(wrong[i] / t, 0)} wrong` : ''))
  const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0)
  return `<section><h2>Levels of alignment</h2>
<p>CLIP scores how well each caption fits its picture; the scores are cut into ${n} levels, 0 fits worst. Each pair is
scored by a CLIP that was trained on the other half of the pairs. ${sum(wrong)} of ${sum(totals)} captions
(${percent(sum(wrong) / Math.max(1, sum(totals)))}) were made wrong on purpose: ${percent(levels.wrongInLowestQuarter)} of them are among the lowest quarter of
the scores (25 % would be luck), and a wrong caption scores below another one with probability ${levels.auc.toFixed(3)} (AUC).</p>
${legend(series)}<div class="scroll">${stackedColumns(series, below, 'pairs of each level by quality of the caption')}</div></section>`
}

function levelExamples({ levels }: QuickstartResult, examples: readonly LevelExample[]): string {
  if (!examples.length) return ''
  const n = levels.byQuality.full.length
  const card = (e: LevelExample): string =>
    `<figure class="example${e.quality === 'wrong' ? ' bad' : ''}">${img(e.image, 56)}<figcaption>${escapeHtml(e.caption)}
<small>${e.score.toFixed(3)}${e.quality === 'wrong' ? ', <b>✗ wrong</b>' : ''}</small></figcaption></figure>`
  const rows = Array.from({ length: n }, (_, level) => {
    const some = examples.filter((e) => e.level === level)
    const range = `${levels.edges[level].toFixed(3)} to ${levels.edges[level + 1].toFixed(3)}`
    const cards = some.length ? some.map(card).join('\n') : '<p class="muted">no pairs</p>'
    return `<div class="level"><h3>Level ${level}<small>${range}</small></h3><div class="examples">${cards}</div></div>`
  })
  return `<section><h2>Pairs of each level</h2><p>Drawn at random, with their scores; ✗ marks captions that were made wrong on purpose.</p>${rows.join('\n')}</section>`
}

function answers(list: readonly AnswerExample[]): string {
  if (!list.length) return ''
  const card = (a: AnswerExample): string => {
    const verdict = a.correct
      ? '<span class="right">✓ right</span>'
      : `<span class="wrong">✗ expected: ${escapeHtml(a.expected)}</span>`
    const gate = a.gate.length
      ? `<p class="muted">gate: weights of the local levels</p>${weightBars(a.gate)}`
      : '<p class="muted">no picture, no gate</p>'
    return `<article class="answer">${a.image === null ? '' : img(a.image, 96)}<div><p class="question">${escapeHtml(a.question)}</p>
<p class="given">${escapeHtml(a.given)} ${verdict}</p>${gate}</div></article>`
  }
  return `<section><h2>Some answers</h2><p>Held-out pictures. The alignment vector of an answer is the global level (always
weight 1) plus the local levels, weighted by the gate, which looks at picture and question.</p>
<div class="answers">${list.map(card).join('\n')}</div></section>`
}

function stages(seconds: Record<string, number>): string {
  const longest = Math.max(...Object.values(seconds), 1e-9)
  const rows = Object.entries(seconds).map(
    ([name, s]) => `<tr><th scope="row">${escapeHtml(name)}</th>
<td class="wide">${barWithMarks(s / longest, [])}</td><td class="number">${s.toFixed(1)} s</td></tr>`,
  )
  return `<section><h2>Time</h2><table>${rows.join('\n')}</table></section>`
}

const ATTRIBUTION = `<section class="small"><h2>Where the pictures and words come from</h2><ul>
<li>Noto Emoji, Google: Apache License 2.0 (emoji-datasource-google), for training</li>
<li>Twemoji, Twitter, Inc. and other contributors: graphics CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
(emoji-datasource-twitter), for training; composited over random backgrounds, turned, scaled and recoloured a little</li>
<li>Fluent Emoji, Microsoft Corporation: MIT License (@lobehub/fluent-emoji-3d), for testing only; scaled down</li>
<li>Names, keywords and categories: Emojibase, Miles Johnson, MIT License, with data of the Unicode Consortium</li>
</ul><p>The method: Zhao et al., AlignGPT, arXiv 2405.14129.</p></section>`

/** What this run trained and what it took ready-made. */
function parts({ towers }: QuickstartResult): [string, string][] {
  const made = 'CLIP, two scoring CLIPs, language model'
  const phases: [string, string] = [
    'Trained in this run',
    'projector, alignment vectors, gate, language model (phase 2)',
  ]
  if (towers.made === 'shipped')
    return [phases, ['Taken from the repository', `${made}; made on ${towers.date}, CPU code path ${towers.isa}`]]
  const same =
    towers.sameAsShipped === undefined ? '' : `; ${towers.sameAsShipped ? 'the' : 'not the'} shipped ones bit for bit`
  return [phases, ['Trained in this run before', `${made}, with tokenizers${same}`]]
}

function facts(result: QuickstartResult, extras: ReportExtras): string {
  const rows: [string, string][] = [
    ['Run', `${extras.date}, seed ${extras.seed}${extras.fast ? ', --fast' : ''}`],
    ['Machine', extras.machine],
    ...parts(result),
    ...extras.facts,
  ]
  const cells = rows.map(([k, v]) => `<tr><th scope="row">${escapeHtml(k)}</th><td>${escapeHtml(v)}</td></tr>`)
  return `<section><h2>What was trained</h2><table>${cells.join('\n')}</table></section>`
}

const STYLE = `${PAGE_STYLE}${CHART_STYLE}
:root{--full:#2a78d6;--keyword:#1aa37a;--category:#e3a008;--wrong:#d8423f;--good:#0b7a4b;--badink:#b3261e;--shot:#fff}
@media(prefers-color-scheme:dark){:root{--full:#4a90e6;--keyword:#27a981;--category:#d39a1a;--wrong:#ea6a66;--good:#53c492;
--badink:#ff8f88;--shot:#f4f4f2}}
h3{font-size:14px;margin:0;white-space:nowrap}h3 small{display:block;font-weight:400;color:var(--muted);font-size:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:24px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;display:flex;flex-direction:column}
.tile strong{font-size:29px;line-height:1.15;letter-spacing:-.02em;white-space:nowrap}
.tile em{font-style:normal;font-size:17px;letter-spacing:0}.tile span{font-weight:600;margin-top:2px}
.tile small{font-size:12.5px;line-height:1.35;margin-top:4px}
td.wide{width:38%}.scroll>svg{min-width:560px}
.track{position:relative;height:14px;border-radius:4px;background:var(--line)}
.track>i{position:absolute;inset:0 auto 0 0;background:var(--accent);border-radius:4px}
.track>b{position:absolute;top:-4px;bottom:-4px;width:3px;margin-left:-1.5px;background:var(--ink);box-shadow:0 0 0 1.5px var(--card)}
.track>b.chance{width:0;background:none;box-shadow:none;border-left:2px dotted var(--muted);top:-7px;bottom:-7px}
.legend i.blind{width:3px;background:var(--ink);border-radius:0}.legend i.chance{width:0;height:14px;border-left:2px dotted var(--muted);border-radius:0}
.level{display:grid;grid-template-columns:118px 1fr;gap:12px;padding:12px 0;border-top:1px solid var(--line)}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:10px}
.example{font-size:12.5px;line-height:1.3}.example figcaption{margin-top:4px;overflow-wrap:anywhere}.example small{display:block}
.example b{color:var(--badink);font-weight:600}img{background:var(--shot);border-radius:8px;border:1px solid var(--line);padding:3px}
.bad img{border-color:var(--wrong);box-shadow:0 0 0 1px var(--wrong)}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:14px}
.answer{display:flex;gap:14px;border:1px solid var(--line);border-radius:10px;padding:14px}.answer img{flex:none}
.answer>div{flex:1;min-width:0}.question{color:var(--muted);margin:0 0 2px;overflow-wrap:anywhere}.given{font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
.given span{font-weight:400;font-size:13px;margin-left:6px}.right{color:var(--good);white-space:nowrap}.wrong{color:var(--badink)}
.weights{display:flex;gap:5px;max-width:260px}.weight{flex:1;text-align:center;line-height:1.2}
.weight i{display:flex;align-items:flex-end;height:34px;border-bottom:1px solid var(--muted)}
.weight b{display:block;width:100%;max-width:22px;margin:0 auto;background:var(--accent);border-radius:3px 3px 0 0;min-height:1px}
.weight em{display:block;font-style:normal;font-size:11px;font-variant-numeric:tabular-nums;margin-top:2px}.weight small{font-size:11px}
.small{font-size:13px}.small ul{margin:0 0 10px;padding-left:18px}
@media(max-width:620px){.level{grid-template-columns:1fr}td.wide{min-width:110px}}
@media print{.tile{break-inside:avoid}}`

/** JSON inside a script element: no tag can begin in it. */
const embedded = (value: unknown): string => JSON.stringify(value).replaceAll('<', '\\u003c')

const PAPER = `AlignGPT's alignment levels, pre-training and instruction tuning, and a test on new pictures`
const INTRODUCTION: Record<TowersMade['made'], string> = {
  here: `A small multimodal model from random numbers on: tokenizers, CLIPs, a language model, then ${PAPER}.`,
  shipped: `A small multimodal model: on a CLIP and a language model that come with the repository, ${PAPER}.`,
}

/** The report as text. */
export function renderReport(result: QuickstartResult, extras: ReportExtras): string {
  const body = `<header><h1>AlignGPT, trained on this machine</h1><p>${INTRODUCTION[result.towers.made]}</p></header>
${headline(result)}
${accuracyTable(result)}
${answers(extras.answers)}
${levelChart(result)}
${levelExamples(result, extras.levelExamples)}
${lossCurves(result)}
${stages(result.seconds)}
${facts(result, extras)}
${ATTRIBUTION}
<script type="application/json" id="result">${embedded(result)}</script>`
  return htmlPage('AlignGPT quickstart', STYLE, body)
}

/**
 * Writes the report; folders are made. The numbers are in it once more as JSON, in the element with the id
 * `result`.
 */
export function writeReport(file: string, result: QuickstartResult, extras: ReportExtras): void {
  fs.mkdirSync(path.dirname(file), { recursive: true })
  fs.writeFileSync(file, renderReport(result, extras))
}

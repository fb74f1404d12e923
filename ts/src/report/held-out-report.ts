/** The report's sections about alignment levels, the gate by task, and what the model says to held-out records. */

import type { Group, LoggedEvaluation, RunLog } from '../train/run-folder.js'
import { isObject } from '../util/json.js'
import { fixed, heatMap, type Line, lineChart, swatch } from './charts.js'
import { escapeHtml } from './html.js'

/** Goes into the style of the report. */
export const HELD_OUT_STYLE = `.bar{width:34%}.bar i{display:block;height:14px;background:var(--accent);border-radius:3px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px;margin:8px 0 18px}
.samples figure{border:1px solid var(--line);border-radius:8px;padding:12px;overflow-wrap:anywhere}
.samples img{display:block;max-width:100%;margin:0 auto 8px;border-radius:4px}.samples dl{margin:0;font-size:14px}
.samples dt{color:var(--muted);font-size:13px}.samples dd{margin:0 0 6px;white-space:pre-wrap}
`

/** Of 0..n-1, from warm to cold. */
const levelColour = (level: number, n: number): string =>
  `hsl(${20 + (200 * level) / Math.max(n - 1, 1)} 65% var(--tone))`

const percent = (share: number): string => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : '–')
const lossRange = (first: Group | undefined, last: Group | undefined): string =>
  `${fixed(first?.loss ?? Number.NaN, 4)} → ${fixed(last?.loss ?? Number.NaN, 4)}`
const caption = (run: number, name: string, note: string): string =>
  `<figcaption>${swatch(run)}<strong>${escapeHtml(name)}</strong> <span>${escapeHtml(note)}</span></figcaption>`

/** Whether each picture's vector was that of its level, so that the logged weights count pictures. */
function byLevel({ phase, options }: RunLog): boolean {
  const mix = options?.mix
  return phase === 'pretrain' && (!isObject(mix) || (mix.mode === 'level' && mix.level === undefined))
}

/** Share of each level among the pictures that were trained on. */
function trainedShares({ steps }: RunLog): number[] {
  const total = steps.reduce((n, s) => n + s.samples, 0)
  const levels = Math.max(0, ...steps.map((s) => s.coefficients.length))
  return Array.from({ length: levels }, (_, l) =>
    steps.reduce((n, s) => n + ((s.coefficients[l] ?? 0) * s.samples) / total, 0),
  )
}

function levelTable(run: RunLog): string {
  const shares = trainedShares(run)
  const most = Math.max(...shares.filter(Number.isFinite), 1e-9)
  const [first, last] = [run.evaluations[0]?.levels, run.evaluations.at(-1)?.levels]
  const heldOut = first?.length
    ? '<th class="number">Held out</th><th class="number">Their loss, first → last</th>'
    : ''
  const rows = shares.map((share, l) => {
    const mark = `<i class="swatch" style="background:${levelColour(l, shares.length)}"></i>`
    const bar = `<i style="width:${Number.isFinite(share) ? ((100 * share) / most).toFixed(1) : 0}%"></i>`
    const held = `<td class="number">${fixed(last?.[l]?.samples ?? 0, 0)}</td><td class="number">${lossRange(first?.[l], last?.[l])}</td>`
    return `<tr><th scope="row">${mark}${l}</th><td class="bar">${bar}</td><td class="number">${percent(share)}</td>${heldOut && held}</tr>`
  })
  return `<table><thead><tr><th>Level</th><th>Trained on</th><th></th>${heldOut}</tr></thead><tbody>
${rows.join('\n')}</tbody></table>`
}

function levelCurves({ evaluations }: RunLog, name: string): string {
  const count = Math.max(0, ...evaluations.map((e) => e.levels.length))
  if (count === 0) return ''
  const lines = Array.from(
    { length: count },
    (_, l): Line => ({
      points: evaluations.map((e) => [e.step, e.levels[l]?.loss ?? Number.NaN] as const),
      colour: levelColour(l, count),
      dots: true,
    }),
  )
  return lineChart(lines, `held-out loss of each level by step, ${name}`, Number.POSITIVE_INFINITY)
}

function levels(runs: readonly RunLog[], names: readonly string[]): string {
  const panels = runs.flatMap((run, i) => {
    if (!byLevel(run) || run.steps.length === 0) return []
    return [
      `<figure>${caption(i, names[i], '')}<div class="panels"><div class="scroll">${levelTable(run)}</div>
<div>${levelCurves(run, names[i])}</div></div></figure>`,
    ]
  })
  if (panels.length === 0) return ''
  return `<section><h2>Alignment levels</h2>
<p>Which share of the pictures trained on has which level, 0 being aligned worst; and the loss of held-out pairs of each level, each with the
vector of its level.</p>${panels.join('\n')}</section>`
}

function gateByTask(runs: readonly RunLog[], names: readonly string[]): string {
  const panels = runs.flatMap(({ evaluations }, i) => {
    const tasks = [...new Set(evaluations.flatMap((e) => [...e.tasks.keys()]))]
    return tasks.map((task) => {
      const seen = evaluations.filter((e) => e.tasks.has(task))
      const groups = seen.map((e) => e.tasks.get(task) as Group)
      const [first, last] = [groups[0], groups[groups.length - 1]]
      const note = `${names[i]}, ${fixed(last.samples, 0)} records, loss ${lossRange(first, last)}`
      const steps = seen.map((e) => e.step)
      const label = `weights of the alignment vectors for ${task} by step, ${names[i]}`
      const map = last.coefficients.length
        ? heatMap(steps, groups.map((g) => g.coefficients), label) // biome-ignore format: one line
        : '<p class="muted">no pictures, or no vectors</p>'
      return `<figure>${caption(i, task, note)}${map}</figure>`
    })
  })
  if (panels.length === 0) return ''
  return `<section><h2>The gate by task</h2><p>Mean weight of each alignment vector over the held-out pictures of a task, by step, the best aligned
level on top (it is the global one too). Full colour is the largest value of the rows that change, in each chart by itself.</p>
<div class="panels">${panels.join('\n')}</div></section>`
}

/** The evaluations whose answers are shown: the best, and the last where that is another one. */
function shownEvaluations({ evaluations }: RunLog): [string, LoggedEvaluation][] {
  const [best, last] = [evaluations.findLast((e) => e.best), evaluations.at(-1)]
  return [
    ...(best ? [[`best, step ${best.step}`, best] as [string, LoggedEvaluation]] : []),
    ...(last && last !== best ? [[`last, step ${last.step}`, last] as [string, LoggedEvaluation]] : []),
  ]
}

function samples(runs: readonly RunLog[], names: readonly string[]): string {
  const parts = runs.flatMap((run, i) => {
    const evaluations = shownEvaluations(run)
    if (run.shown.length === 0 || evaluations.length === 0) return []
    const figures = run.shown.map(({ id, question, expected, picture }) => {
      const answers = evaluations.map(([when, e]): [string, string] => [`Model (${when})`, e.answers.get(id) ?? '–'])
      const entries: [string, string][] = [['Question', question], ['Expected', expected], ...answers]
      const list = entries.flatMap(([k, v]) =>
        k === 'Question' && v === '' ? [] : [`<dt>${k}</dt><dd>${escapeHtml(v)}</dd>`],
      )
      return `<figure>${picture ? `<img src="${picture}" alt="">` : ''}<dl>${list.join('')}</dl><small>${escapeHtml(id)}</small></figure>`
    })
    const head = runs.length > 1 ? `<p>${swatch(i)}<strong>${escapeHtml(names[i])}</strong></p>` : ''
    return [`${head}<div class="samples">${figures.join('\n')}</div>`]
  })
  if (parts.length === 0) return ''
  return `<section><h2>Held-out samples</h2><p>The same records at every evaluation. The model's most likely answer, cut after 32 tokens.</p>${parts.join('\n')}</section>`
}

/** Sections, as HTML; none for runs that have nothing of the kind. */
export const heldOutSections = (runs: readonly RunLog[], names: readonly string[]): string =>
  [levels(runs, names), gateByTask(runs, names), samples(runs, names)].filter(Boolean).join('\n')

/** What training runs did: one HTML page that needs nothing besides itself, of one run or of several beside each other. */
import fs from 'node:fs'
import path from 'node:path'
import { type Curve, numberOf, type RunLog, readRun, type Step } from '../train/run-folder.js'
import { mismatch } from '../util/errors.js'
import { writeAtomicText } from '../util/files.js'
import { CHART_STYLE, colour, fixed, heatMap, type Line, lineChart, swatch } from './charts.js'
import { HELD_OUT_STYLE, heldOutSections } from './held-out-report.js'
import { escapeHtml, htmlPage, PAGE_STYLE } from './html.js'

const CURVES: Record<Curve, [name: string, note: string]> = {
  loss: ['Loss', 'mean over the answer tokens of a step'],
  lr: ['Learning rate', 'of the main group'],
  gradNorm: ['Gradient norm', 'before clipping'],
  tokensPerSecond: ['Tokens per second', 'the wait for pictures included'],
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

/** Shortest names that tell the folders apart. */
function namesOf(folders: readonly string[]): string[] {
  const all = folders.map((f) => path.resolve(f).split(path.sep))
  for (let n = 1; ; n++) {
    const names = all.map((p) => p.slice(-n).join('/'))
    if (new Set(names).size === new Set(all.map(String)).size) return names
  }
}

function status({ state, steps, wanted }: RunLog): string {
  if (state) return state.aborted ? 'stopped' : 'done'
  return steps.length && steps[steps.length - 1].step + 1 === wanted ? 'done' : 'running or killed'
}

/** The lowest loss on held-out records. */
function heldOut({ evaluations }: RunLog): string {
  const best = evaluations.findLast((e) => e.best)
  return best ? `<br><small>held out ${fixed(best.loss, 4)}, step ${best.step}</small>` : ''
}

function summary(runs: readonly RunLog[], names: readonly string[]): string {
  const rows = runs.map((r, i) => {
    const losses = r.steps.map((s) => s.loss)
    const end = losses.slice(-Math.max(1, Math.ceil(losses.length / 20)))
    const total = (of: (s: Step) => number): number => r.steps.reduce((sum, s) => sum + of(s), 0)
    const seconds = total((s) => s.seconds)
    const count = (key: string): string => (Array.isArray(r.state?.[key]) ? String(r.state[key].length) : '–')
    const cells = [
      `${(r.steps.at(-1)?.step ?? -1) + 1} of ${fixed(r.wanted, 0)}`,
      `${fixed(losses[0], 4)} → ${fixed(losses.length ? mean(end) : Number.NaN, 4)}${heldOut(r)}`,
      fixed(total((s) => s.tokens) / seconds, 0),
      `${fixed((100 * total((s) => s.waited * s.seconds)) / seconds, 1)} %`,
      fixed(numberOf(r.state?.seconds), 1),
      fixed(numberOf(r.state?.outliers), 0),
      `${count('bad')} / ${count('skipped')}`,
    ]
    const broken = r.broken ? `<br><small>${r.broken} broken lines in log.jsonl</small>` : ''
    return `<tr><th scope="row">${swatch(i)}${escapeHtml(names[i])}${broken}</th><td>${escapeHtml(r.phase)}</td><td>${status(r)}</td>
${cells.map((c) => `<td class="number">${c}</td>`).join('')}</tr>`
  })
  const heads = ['Steps', 'Loss', 'Tokens/s', 'Waited', 'Seconds', 'Outliers', 'Unusable / too long']
  return `<section><h2>Runs</h2><div class="scroll"><table><thead><tr><th>Run</th><th>Phase</th><th>State</th>
${heads.map((h) => `<th class="number">${h}</th>`).join('')}</tr></thead><tbody>${rows.join('\n')}</tbody></table></div>
<p class="muted">Loss: first step and mean of the last twentieth; the lowest on held-out records. Seconds: since the last start. –: not known before a run has ended.</p></section>`
}

function curves(runs: readonly RunLog[]): string {
  const panels = (Object.keys(CURVES) as Curve[]).map((key) => {
    const [name, note] = CURVES[key]
    const lines = runs.flatMap((r, i): Line[] => {
      const line = { points: r.steps.map((s) => [s.step, s[key]] as const), colour: colour(i) }
      const evaluated = r.evaluations.map((e) => [e.step, e.loss] as const)
      return key === 'loss' ? [line, { points: evaluated, colour: colour(i), dots: true }] : [line]
    })
    return `<figure><figcaption><strong>${name}</strong> <span>${note}</span></figcaption>
${lineChart(lines, `${name} by step`)}</figure>`
  })
  return `<section><h2>Curves</h2><p>By step: thin, every step; bold, the moving average. The few values far above the rest are drawn at the upper edge.
Dots on a dashed line are the loss on held-out records.</p>
<div class="panels">${panels.join('\n')}</div></section>`
}

function gate(runs: readonly RunLog[], names: readonly string[]): string {
  const panels = runs.map((r, i) => {
    // Lines of a log that is not ours may have another number of levels, or none.
    const levels = r.steps[0]?.coefficients.length
    const steps = r.steps.filter((s) => s.coefficients.length === levels && s.coefficients.every(Number.isFinite))
    const map = heatMap(
      steps.map((s) => s.step),
      steps.map((s) => s.coefficients),
      `weights of the alignment vectors by step, ${names[i]}`,
    )
    const largest = steps.reduce((m, s) => Math.max(m, ...s.coefficients), 0)
    return `<figure><figcaption>${swatch(i)}<strong>${escapeHtml(names[i])}</strong> <span>largest of a step ${largest.toFixed(3)}</span></figcaption>
${map}</figure>`
  })
  return `<section><h2>Weights of the alignment vectors</h2>
<p>Mean over a step's pictures, a row for each level, the best aligned on top (it is the global one too). In pre-training that is the share of
the pairs with that level; in instruction tuning the gate's weight for each local level, and 1 for the global one. Full colour is the largest
value of the rows that change.</p><div class="panels">${panels.join('\n')}</div></section>`
}

function options(runs: readonly RunLog[], names: readonly string[]): string {
  if (runs.every((r) => r.options === null))
    return '<section><h2>Options</h2><p class="muted">Not written yet: they come with the first checkpoint or the end.</p></section>'
  const keys = [...new Set(runs.flatMap((r) => Object.keys(r.options ?? {})))]
  const text = (v: unknown): string => (v === undefined ? '–' : typeof v === 'string' ? v : JSON.stringify(v))
  const rows = keys.map((key) => {
    const values = runs.map((r) => text(r.options?.[key]))
    const differs = new Set(values).size > 1 ? ' class="differs"' : ''
    return `<tr${differs}><th scope="row">${escapeHtml(key)}</th>${values.map((v) => `<td>${escapeHtml(v)}</td>`).join('')}</tr>`
  })
  const heads = names.map((n, i) => `<th>${swatch(i)}${escapeHtml(n)}</th>`).join('')
  return `<section><h2>Options</h2>${runs.length > 1 ? '<p>Bold: not the same in all runs.</p>' : ''}
<div class="scroll"><table class="options"><thead><tr><th></th>${heads}</tr></thead><tbody>${rows.join('\n')}</tbody></table></div></section>`
}

const STYLE = `${PAGE_STYLE}${CHART_STYLE}${HELD_OUT_STYLE}:root{--tone:42%}@media(prefers-color-scheme:dark){:root{--tone:66%}}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px}
td{white-space:nowrap}.scroll td,.scroll th{padding-right:18px}.options td{overflow-wrap:anywhere;white-space:normal}.differs{font-weight:600}
.differs>*{font-weight:600}
`

/**
 * The report of runs, as the text of an HTML page.
 * @param folders of the runs (`out` of a training)
 * @throws AlignGPTError ERR_DATA when one has no log.jsonl, ERR_ARGUMENT without any
 */
export function reportPage(folders: readonly string[]): string {
  if (folders.length === 0) throw mismatch('ERR_ARGUMENT', 'report', 'runs', 'at least one folder', 'none')
  const runs = folders.map(readRun)
  const names = namesOf(folders)
  const title = runs.length === 1 ? `Training run ${names[0]}` : `${runs.length} training runs`
  return htmlPage(
    title,
    STYLE,
    `<header><h1>${escapeHtml(title)}</h1></header>
${summary(runs, names)}
${curves(runs)}
${gate(runs, names)}
${heldOutSections(runs, names)}
${options(runs, names)}`,
  )
}

/** Writes the report of runs to a file; folders are made. @throws what reportPage throws, an error of the file system */
export function writeReport(file: string, folders: readonly string[]): void {
  const page = reportPage(folders)
  fs.mkdirSync(path.dirname(path.resolve(file)), { recursive: true })
  writeAtomicText(file, page)
}

/** What training runs did: one HTML page that needs nothing besides itself, of one run or of several beside each other. */
import fs from 'node:fs'
import path from 'node:path'
import { CHART_STYLE, heatMap, lineChart } from './charts.js'
import { listCheckpoints } from './checkpoint.js'
import { mismatch } from './errors.js'
import { escapeHtml, htmlPage, PAGE_STYLE } from './html.js'
import { readJsonFile, writeAtomicText } from './json.js'
import { checkpointFolder } from './resume.js'

/** A line of log.jsonl; numbers that it does not have are NaN. */
interface Step extends Record<Curve, number> {
  step: number
  /** that the step took */
  seconds: number
  tokens: number
  waited: number
  coefficients: number[]
}
type Curve = 'loss' | 'lr' | 'gradNorm' | 'tokensPerSecond'

interface RunLog {
  folder: string
  phase: string
  /** steps that the run shall have */
  wanted: number
  steps: Step[]
  /** lines that are none, such as the last one of a killed run */
  broken: number
  /** every option that the numbers depend on, null where the run has not written them yet */
  options: Record<string, unknown> | null
  /** state.json, when it is of the log's last step */
  state: Record<string, unknown> | null
}

const CURVES: Record<Curve, [name: string, note: string]> = {
  loss: ['Loss', 'mean over the answer tokens of a step'],
  lr: ['Learning rate', 'of the main group'],
  gradNorm: ['Gradient norm', 'before clipping'],
  tokensPerSecond: ['Tokens per second', 'the wait for pictures included'],
}

type Json = Record<string, unknown>
const isObject = (v: unknown): v is Json => typeof v === 'object' && v !== null && !Array.isArray(v)
const numberOf = (v: unknown): number => (typeof v === 'number' ? v : Number.NaN)
const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

function parseLine(line: string): Json | null {
  try {
    const value: unknown = JSON.parse(line)
    return isObject(value) && Number.isInteger(value.step) ? value : null
  } catch {
    return null
  }
}

function stepOf(line: Json): Step {
  const { coefficients } = line
  return {
    step: line.step as number,
    seconds: numberOf(line.tokens) / numberOf(line.tokensPerSecond),
    tokens: numberOf(line.tokens),
    loss: numberOf(line.loss),
    lr: numberOf(line.lr),
    gradNorm: numberOf(line.gradNorm),
    tokensPerSecond: numberOf(line.tokensPerSecond),
    waited: numberOf(line.waited),
    coefficients: Array.isArray(coefficients) ? coefficients.map(numberOf) : [],
  }
}

/** The JSON object in a file, null without one. */
function readObject(file: string): Json | null {
  const value = fs.existsSync(file) ? readJsonFile(file, 'ERR_DATA') : null
  return isObject(value) ? value : null
}

/** A run that has not ended has its options in its checkpoints only. */
function savedOptions(folder: string): Json | null {
  const checkpoints = checkpointFolder(folder)
  for (const step of listCheckpoints(checkpoints)) {
    const manifest = readObject(path.join(checkpoints, `step-${step}`, 'manifest.json'))?.manifest
    if (isObject(manifest) && isObject(manifest.config)) return manifest.config
  }
  return null
}

/** @throws AlignGPTError ERR_DATA when the folder has no log */
function readRun(folder: string): RunLog {
  const file = path.join(folder, 'log.jsonl')
  if (!fs.existsSync(file)) throw mismatch('ERR_DATA', 'report', folder, "a run's folder with log.jsonl", 'none')
  const text = fs.readFileSync(file, 'utf8').split('\n').filter(Boolean)
  const lines = text.map(parseLine).filter((l) => l !== null)
  const last = lines.at(-1)
  const state = readObject(path.join(folder, 'state.json'))
  // That of an earlier run, or of the part before this one, says nothing about this log.
  const current = state && last && state.steps === (last.step as number) + 1 ? state : null
  return {
    folder,
    phase: String(last?.phase ?? ''),
    wanted: numberOf(last?.steps),
    steps: lines.map(stepOf),
    broken: text.length - lines.length,
    options: isObject(current?.options) ? current.options : savedOptions(folder),
    state: current,
  }
}

// Neighbours in this order are far apart in hue, however many there are; the page says how light.
const colour = (run: number): string => `hsl(${(215 + 137.5 * run) % 360} 65% var(--tone))`
const swatch = (run: number): string => `<i class="swatch" style="background:${colour(run)}"></i>`

/** Shortest names that tell the folders apart. */
function namesOf(folders: readonly string[]): string[] {
  const all = folders.map((f) => path.resolve(f).split(path.sep))
  for (let n = 1; ; n++) {
    const names = all.map((p) => p.slice(-n).join('/'))
    if (new Set(names).size === new Set(all.map(String)).size) return names
  }
}

const fixed = (v: number, digits: number): string => (Number.isFinite(v) ? v.toFixed(digits) : '–')

function status({ state, steps, wanted }: RunLog): string {
  if (state) return state.aborted ? 'stopped' : 'done'
  return steps.length && steps[steps.length - 1].step + 1 === wanted ? 'done' : 'running or killed'
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
      `${fixed(losses[0], 4)} → ${fixed(losses.length ? mean(end) : Number.NaN, 4)}`,
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
<p class="muted">Loss: first step and mean of the last twentieth. Seconds: since the last start. –: not known before a run has ended.</p></section>`
}

function curves(runs: readonly RunLog[]): string {
  const panels = (Object.keys(CURVES) as Curve[]).map((key) => {
    const [name, note] = CURVES[key]
    const lines = runs.map((r, i) => ({
      points: r.steps.map((s) => [s.step, s[key]] as const),
      colour: colour(i),
    }))
    return `<figure><figcaption><strong>${name}</strong> <span>${note}</span></figcaption>
${lineChart(lines, `${name} by step`)}</figure>`
  })
  return `<section><h2>Curves</h2><p>By step: thin, every step; bold, the moving average. The few values far above the rest are drawn at the upper edge.</p>
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

const STYLE = `${PAGE_STYLE}${CHART_STYLE}
:root{--tone:42%}@media(prefers-color-scheme:dark){:root{--tone:66%}}
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
${options(runs, names)}`,
  )
}

/** Writes the report of runs to a file; folders are made. @throws what reportPage throws, an error of the file system */
export function writeReport(file: string, folders: readonly string[]): void {
  const page = reportPage(folders)
  fs.mkdirSync(path.dirname(path.resolve(file)), { recursive: true })
  writeAtomicText(file, page)
}

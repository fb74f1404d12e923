/**
 * Curves and heat maps as SVG text. No chart library: the pages hold no script (a library would draw with one, on a canvas that
 * print and text search do not see), and what they need is polylines and rectangles. Colours are CSS of the page, light and dark.
 */
import { escapeHtml } from './html.js'

type Point = readonly [x: number, y: number]

export interface Line {
  /** by ascending x; those whose y is not finite are left out */
  points: readonly Point[]
  /** CSS colour */
  colour: string
  /** few values, each worth seeing: dots on a dashed line, and no average */
  dots?: boolean
}

/** Goes into the style of a page with charts. */
export const CHART_STYLE = `svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--muted)}
svg .strong{fill:var(--ink);font-weight:600}.grid{stroke:var(--line)}.axis{stroke:var(--muted)}
.raw,.curve{fill:none}.raw{opacity:.35}.dots{fill:none;stroke-width:1.6;stroke-dasharray:4 3}.curve{stroke-width:2.2;stroke-linejoin:round}.cell{fill:var(--accent)}
`

// Neighbours in this order are far apart in hue, however many there are; the page says how light.
/** CSS colour of a run, and a square of it. */
export const colour = (run: number): string => `hsl(${(215 + 137.5 * run) % 360} 65% var(--tone))`
export const swatch = (run: number): string => `<i class="swatch" style="background:${colour(run)}"></i>`

export const fixed = (v: number, digits: number): string => (Number.isFinite(v) ? v.toFixed(digits) : '–')

/** A few round numbers that cover a range. */
export function ticks(low: number, high: number, wanted = 4): number[] {
  const span = high - low
  if (!(span > 0)) return [low]
  const power = 10 ** Math.floor(Math.log10(span / wanted))
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= wanted) as number
  const first = Math.ceil(low / step - 1e-9)
  const last = Math.floor(high / step + 1e-9)
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)))
}

const COMPACT = new Intl.NumberFormat('en', { notation: 'compact', maximumSignificantDigits: 4 })

/** A tick's number, short enough for the margin. */
function tickText(t: number): string {
  if (Math.abs(t) >= 1e4) return COMPACT.format(t)
  return t !== 0 && Math.abs(t) < 1e-3 ? t.toExponential() : String(t)
}

/** Centred moving average over `reach` values to either side, fewer at the ends. */
export function smooth(values: readonly number[], reach: number): number[] {
  const sums = [0]
  for (const v of values) sums.push(sums[sums.length - 1] + v)
  return values.map((_, i) => {
    const r = Math.min(Math.floor(reach), i, values.length - 1 - i)
    return (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)
  })
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

/** Consecutive parts of equal size, at most `most`. */
function parts<T>(values: readonly T[], most: number): T[][] {
  const size = Math.max(1, Math.ceil(values.length / most))
  return Array.from({ length: Math.ceil(values.length / size) }, (_, i) => values.slice(i * size, (i + 1) * size))
}

/** At most `most` points, each the mean of its neighbours. */
const thin = (points: readonly Point[], most: number): Point[] =>
  parts(points, most).map((part) => [mean(part.map(([x]) => x)), mean(part.map(([, y]) => y))])

function smoothed(points: readonly Point[]): Point[] {
  const averages = smooth(
    points.map(([, y]) => y),
    points.length / 30,
  )
  return points.map(([x], i) => [x, averages[i]])
}

const WIDTH = 420
const HEIGHT = 200
const LEFT = 40
const BOTTOM = 26
const TOP = 10
const RIGHT = 14

const open = (height: number, label: string): string =>
  `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escapeHtml(label)}">`

function stepTicks(low: number, high: number, height: number): string {
  const at = (t: number): string => (LEFT + ((WIDTH - LEFT - RIGHT) * (t - low)) / Math.max(high - low, 1)).toFixed(1)
  return ticks(low, high, 5)
    .map((t) => `<text x="${at(t)}" y="${height - 8}" text-anchor="middle">${tickText(t)}</text>`)
    .join('')
}

/**
 * Of each line all its values, thin, and their moving average; the few far above the rest are drawn at the upper edge.
 * @param low the axis begins there or below; Infinity: at the smallest value
 */
export function lineChart(lines: readonly Line[], label: string, low = 0): string {
  const finite = lines
    .map((l) => ({ ...l, points: l.points.filter(([, y]) => Number.isFinite(y)) }))
    .filter((l) => l.points.length > (l.dots ? 0 : 1))
  if (finite.length === 0) return '<p class="muted">no steps recorded</p>'
  const sorted = Float64Array.from(finite.flatMap((l) => l.points.map(([, y]) => y))).sort()
  // A first step far above the rest must not flatten the curve.
  const lowest = Math.min(sorted[0], low)
  const usual = sorted[Math.ceil(0.98 * (sorted.length - 1))]
  const highest = Math.min(sorted[sorted.length - 1], lowest + 1.25 * (usual - lowest))
  const from = Math.min(...finite.map((l) => l.points[0][0]))
  const to = Math.max(...finite.map((l) => l.points[l.points.length - 1][0]))
  const y = (v: number): string => {
    const share = (Math.min(v, highest) - lowest) / Math.max(highest - lowest, 1e-12)
    return (HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share).toFixed(1)
  }
  const x = (v: number): string => (LEFT + ((WIDTH - LEFT - RIGHT) * (v - from)) / Math.max(to - from, 1)).toFixed(1)
  const polyline = (kind: string, points: readonly Point[], colour: string): string => {
    const places = points.map(([a, b]) => `${x(a)},${y(b)}`).join(' ')
    return `<polyline class="${kind}" style="stroke:${colour}" points="${places}"/>`
  }
  const dot = (p: Point, colour: string): string =>
    `<circle cx="${x(p[0])}" cy="${y(p[1])}" r="3" style="fill:${colour}"/>`
  const curved = finite.filter((l) => !l.dots)
  const dotted = finite.filter((l) => l.dots)
  const grid = ticks(lowest, highest).map(
    (t) =>
      `<line class="grid" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y(t)}" y2="${y(t)}"/>` +
      `<text x="${LEFT - 6}" y="${(Number(y(t)) + 4).toFixed(1)}" text-anchor="end">${tickText(t)}</text>`,
  )
  return `${open(HEIGHT, label)}
${grid.join('')}${stepTicks(from, to, HEIGHT)}
${curved.map((l) => polyline('raw', thin(l.points, 400), l.colour)).join('\n')}
${curved.map((l) => polyline('curve', thin(smoothed(l.points), 200), l.colour)).join('\n')}
${dotted.map((l) => polyline('dots', l.points, l.colour) + l.points.map((p) => dot(p, l.colour)).join('')).join('\n')}
</svg>`
}

const ROW = 18
/** Columns of a heat map; more steps than these are averaged. */
const COLUMNS = 100

/** The largest value of the rows that change, of all when none does: a row that is always 1 must not make the others pale. */
function fullColour(columns: readonly (readonly number[])[]): number {
  const largest = (columns[0] ?? []).map((_, r) => columns.reduce((m, c) => Math.max(m, c[r]), 0))
  const changing = largest.filter((top, r) => columns.some((c) => c[r] < top - 1e-3))
  return Math.max(0, ...(changing.length ? changing : largest))
}

/**
 * Rows of values over steps as cells, the stronger the larger; the full colour is the largest value of the rows that change.
 * @param steps ascending
 * @param values of each step, one for each row; the first row is drawn lowest
 */
export function heatMap(steps: readonly number[], values: readonly (readonly number[])[], label: string): string {
  const rows = values[0]?.length ?? 0
  const columns = parts([...steps.keys()], COLUMNS).map((indices) => ({
    steps: [steps[indices[0]], steps[indices[indices.length - 1]]],
    means: Array.from({ length: rows }, (_, r) => mean(indices.map((i) => values[i][r]))),
  }))
  const largest = fullColour(columns.map((c) => c.means))
  if (!(largest > 0)) return '<p class="muted">nothing recorded</p>'
  const height = TOP + rows * ROW + BOTTOM
  const width = (WIDTH - LEFT - RIGHT) / columns.length
  const top = (r: number): number => TOP + (rows - 1 - r) * ROW
  const cells = columns.flatMap((c, i) =>
    c.means.map((v, r) => {
      const place = `x="${(LEFT + i * width).toFixed(2)}" y="${top(r)}" width="${width.toFixed(2)}" height="${ROW - 1}"`
      const span = c.steps[0] === c.steps[1] ? `step ${c.steps[0]}` : `steps ${c.steps.join(' to ')}`
      const strength = Math.min(Math.max(v, 0) / largest, 1).toFixed(3)
      return `<rect class="cell" ${place} fill-opacity="${strength}"><title>level ${r}, ${span}: ${v.toFixed(3)}</title></rect>`
    }),
  )
  const names = Array.from(
    { length: rows },
    (_, r) => `<text x="${LEFT - 6}" y="${top(r) + 13}" text-anchor="end">${r}</text>`,
  )
  return `${open(height, label)}
${names.join('')}${stepTicks(steps[0], steps[steps.length - 1], height)}
${cells.join('\n')}
</svg>`
}

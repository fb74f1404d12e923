/** Small SVG charts as text. Colours are CSS variables of the page, so they follow light and dark mode. */

import { escapeHtml } from '../../ts/src/html.js'

export { escapeHtml }

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

/** Centred moving average over `reach` values to either side, fewer at the ends. */
export function smooth(values: readonly number[], reach: number): number[] {
  const sums = [0]
  for (const v of values) sums.push(sums[sums.length - 1] + v)
  return values.map((_, i) => {
    const r = Math.min(Math.floor(reach), i, values.length - 1 - i)
    return (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)
  })
}

/** At most `most` points, each the mean of its neighbours, with the index it stands for. */
function thin(values: readonly number[], most: number): [number, number][] {
  const size = Math.max(1, Math.ceil(values.length / most))
  const out: [number, number][] = []
  for (let at = 0; at < values.length; at += size) {
    const part = values.slice(at, at + size)
    out.push([at + (part.length - 1) / 2, part.reduce((a, b) => a + b, 0) / part.length])
  }
  return out
}

const WIDTH = 420
const HEIGHT = 200
const LEFT = 40
const BOTTOM = 26
const TOP = 10
const RIGHT = 14

/** The loss of every step, thin, and its moving average. Non-finite values are left out. */
export function lineChart(values: readonly number[], label: string): string {
  const finite = values.filter(Number.isFinite)
  if (finite.length < 2) return '<p class="muted">no steps recorded</p>'
  // A first step far above the rest must not flatten the curve.
  const sorted = [...finite].sort((a, b) => a - b)
  const lowest = Math.min(sorted[0], 0)
  const usual = sorted[Math.floor(0.98 * (sorted.length - 1))]
  const highest = Math.min(sorted[sorted.length - 1], lowest + 1.25 * (usual - lowest))
  const x = (i: number): number => LEFT + ((WIDTH - LEFT - RIGHT) * i) / (finite.length - 1)
  const y = (v: number): number => {
    const share = (Math.min(v, highest) - lowest) / Math.max(highest - lowest, 1e-12)
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share
  }
  const line = (points: [number, number][]): string =>
    points.map(([i, v]) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(' ')
  const grid = ticks(lowest, highest).map(
    (t) =>
      `<line class="grid" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y(t).toFixed(1)}" y2="${y(t).toFixed(1)}"/>` +
      `<text x="${LEFT - 6}" y="${(y(t) + 4).toFixed(1)}" text-anchor="end">${t}</text>`,
  )
  const steps = ticks(0, finite.length - 1, 5).map(
    (t) => `<text x="${x(t).toFixed(1)}" y="${HEIGHT - 8}" text-anchor="middle">${t}</text>`,
  )
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escapeHtml(label)}">
${grid.join('')}${steps.join('')}
<polyline class="raw" points="${line(thin(finite, 400))}"/>
<polyline class="curve" points="${line(thin(smooth(finite, finite.length / 30), 200))}"/>
</svg>`
}

export interface Series {
  /** name of the CSS variable of its colour, without -- */
  colour: string
  label: string
  values: readonly number[]
}

/** Columns of stacked parts with the total above and a note below. */
export function stackedColumns(series: readonly Series[], below: readonly string[], label: string): string {
  const n = Math.max(...series.map((s) => s.values.length))
  const totals = Array.from({ length: n }, (_, i) => series.reduce((sum, s) => sum + (s.values[i] ?? 0), 0))
  const highest = Math.max(1, ...totals)
  const [width, height, base] = [860, 260, 212]
  const slot = (width - 10) / n
  const bar = Math.min(64, slot * 0.66)
  const scale = (base - 26) / highest
  const columns = totals.map((total, i) => {
    const left = 5 + i * slot + (slot - bar) / 2
    let top = base
    const parts = series.map((s) => {
      const value = s.values[i] ?? 0
      if (value === 0) return ''
      const h = value * scale
      top -= h
      const tip = `<title>level ${i}, ${escapeHtml(s.label)}: ${value}</title>`
      // A gap between the parts, and never nothing where there is something.
      const shown = Math.max(1.5, h - 1.5).toFixed(1)
      const place = `x="${left.toFixed(1)}" y="${top.toFixed(1)}" width="${bar.toFixed(1)}" height="${shown}"`
      return `<rect ${place} style="fill:var(--${s.colour})">${tip}</rect>`
    })
    const middle = (left + bar / 2).toFixed(1)
    return `${parts.join('')}<text class="strong" x="${middle}" y="${(top - 7).toFixed(1)}" text-anchor="middle">${total}</text>
<text x="${middle}" y="${base + 18}" text-anchor="middle" class="strong">${i}</text>
<text x="${middle}" y="${base + 36}" text-anchor="middle">${escapeHtml(below[i] ?? '')}</text>`
  })
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escapeHtml(label)}">
<line class="axis" x1="5" x2="${width - 5}" y1="${base}" y2="${base}"/>
${columns.join('\n')}
</svg>`
}

export const legend = (series: readonly Series[]): string =>
  `<p class="legend">${series
    .map((s) => `<span><i style="background:var(--${s.colour})"></i>${escapeHtml(s.label)}</span>`)
    .join('')}</p>`

/** Small columns for weights that sum to 1, each with its value. */
export function weightBars(weights: readonly number[]): string {
  const highest = Math.max(...weights, 0.5)
  const columns = weights.map((w, i) => {
    const percent = ((100 * w) / highest).toFixed(1)
    const name = `local level ${i}: ${w.toFixed(3)}`
    return `<span class="weight" title="${name}"><i><b style="height:${percent}%"></b></i><em>${w.toFixed(2)}</em><small>${i}</small></span>`
  })
  return `<div class="weights" role="img" aria-label="gate weights ${weights.map((w) => w.toFixed(3)).join(', ')}">${columns.join('')}</div>`
}

/** A bar with up to two marks on one scale from 0 to 1. */
export function barWithMarks(value: number, marks: readonly { at: number; kind: string }[]): string {
  const percent = (v: number): string => `${(100 * Math.min(1, Math.max(0, v || 0))).toFixed(1)}%`
  const lines = marks.map((m) => `<b class="${m.kind}" style="left:${percent(m.at)}"></b>`).join('')
  return `<div class="track"><i style="width:${percent(value)}"></i>${lines}</div>`
}

/** The quickstart's own charts, as text. Colours are CSS variables of the page, so they follow light and dark mode. */
import { escapeHtml } from 'aligngpt/report'

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

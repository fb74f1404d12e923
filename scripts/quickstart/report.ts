/** runs/quickstart/report.html: one self-contained page, no script, no request. */
import fs from 'node:fs'

export interface Result {
  accuracy: { yesno: number; category: number; name: number }
  blind: { yesno: number; category: number; name: number }
  chance: { yesno: number; category: number; name: number }
  levels: {
    /** share of the wrong captions whose score is in the lowest quarter */
    wrongInLowestQuarter: number
    /** probability that a right caption scores higher than a wrong one */
    auc: number
    /** pairs of each level, and how many of their captions are wrong */
    histogram: number[]
    wrong: number[]
  }
  seconds: Record<string, number>
  loss: { clip: number[]; llama: number[]; pretrain: number[]; finetune: number[] }
  settings: Record<string, string | number>
}
export interface Example {
  /** PNG bytes */
  picture: Uint8Array
  caption: string
  note?: string
}
export interface Sampled {
  picture: Uint8Array
  question: string
  answer: string
  given: string
  /** weights of the local levels, and of the global one */
  alpha: number[]
}

const html = (text: string): string =>
  text.replace(/[&<>"]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c] as string)
const percent = (x: number): string => `${(100 * x).toFixed(1)} %`
const picture = (bytes: Uint8Array, alt: string): string =>
  `<img width="64" height="64" alt="${html(alt)}" src="data:image/png;base64,${Buffer.from(bytes).toString('base64')}">`

/** A smoothed loss curve as SVG. */
function curve(title: string, values: readonly number[]): string {
  const [w, h, pad] = [340, 150, 30]
  if (values.length < 2) return ''
  const smooth: number[] = []
  let mean = values[0]
  for (const [i, v] of values.entries()) {
    mean += (v - mean) / Math.min(i + 1, 12)
    smooth.push(mean)
  }
  const top = Math.max(...smooth)
  const low = Math.min(...smooth, 0)
  const x = (i: number): string => (pad + ((w - pad - 8) * i) / (values.length - 1)).toFixed(1)
  const y = (v: number): string => (h - 22 - ((h - 34) * (v - low)) / (top - low || 1)).toFixed(1)
  const line = smooth.map((v, i) => `${x(i)},${y(v)}`).join(' ')
  return `<figure><svg viewBox="0 0 ${w} ${h}" role="img" aria-label="${html(title)} loss">
<line class="axis" x1="${pad}" y1="${h - 22}" x2="${w - 8}" y2="${h - 22}"/><line class="axis" x1="${pad}" y1="8" x2="${pad}" y2="${h - 22}"/>
<polyline class="line" points="${line}"/>
<text x="2" y="16">${top.toFixed(1)}</text><text x="2" y="${h - 20}">${low.toFixed(1)}</text><text x="${w - 8}" y="${h - 6}" text-anchor="end">${values.length} steps</text>
</svg><figcaption>${html(title)}: ${values[0].toFixed(2)} &rarr; ${smooth[smooth.length - 1].toFixed(2)}</figcaption></figure>`
}

function histogram(r: Result): string {
  const [w, h] = [700, 190]
  const n = r.levels.histogram.length
  const top = Math.max(...r.levels.histogram, 1)
  const bars = r.levels.histogram.map((count, l) => {
    const x = 10 + (l * (w - 20)) / n
    const width = (w - 20) / n - 10
    const full = ((h - 50) * count) / top
    const bad = ((h - 50) * r.levels.wrong[l]) / top
    const base = h - 30
    return `<rect class="bar" x="${x}" y="${base - full}" width="${width}" height="${full}"/><rect class="bad" x="${x}" y="${base - bad}" width="${width}" height="${bad}"/>
<text x="${x + width / 2}" y="${base - full - 5}" text-anchor="middle">${count}</text><text x="${x + width / 2}" y="${h - 12}" text-anchor="middle">level ${l}</text>`
  })
  return `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="pairs of each level">${bars.join('')}</svg>`
}

const STYLE = `:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--paper:#fbfaf8;--card:#fff;--edge:#e3e0da;--main:#2f6f6b;--bad:#c4543a}
@media(prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa3ad;--paper:#14171a;--card:#1c2024;--edge:#2e343a;--main:#6fc2ba;--bad:#e88a6f}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:960px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:1.9rem;margin:0 0 4px}h2{font-size:1.2rem;margin:40px 0 10px}p{color:var(--soft);margin:6px 0 14px;max-width:70ch}
table{border-collapse:collapse;width:100%}td,th{text-align:right;padding:7px 10px;border-bottom:1px solid var(--edge);font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}th{color:var(--soft);font-weight:500}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px}.card b{display:block;font-size:1.7rem;color:var(--main)}.card span{color:var(--soft);font-size:.9rem}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px}figure{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:8px}figcaption{font-size:.85rem;color:var(--soft);padding:0 6px 4px}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}.axis{stroke:var(--edge)}.line{fill:none;stroke:var(--main);stroke-width:2}.bar{fill:var(--main);opacity:.55}.bad{fill:var(--bad)}
.row{display:flex;gap:10px;align-items:flex-start;flex-wrap:wrap;margin:6px 0 14px}.ex{width:104px;font-size:.78rem;line-height:1.25;color:var(--soft)}.ex img{display:block;border-radius:8px;margin-bottom:4px}.lv{width:64px;font-weight:600}
.qa{display:flex;gap:14px;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px;margin:8px 0}.qa img{border-radius:8px;flex:none}.qa div{flex:1}.ok{color:var(--main)}.no{color:var(--bad)}
.gate{display:flex;gap:3px;align-items:flex-end;height:34px;margin-top:8px}.gate i{display:block;width:22px;background:var(--main);border-radius:3px 3px 0 0;min-height:1px}.gate i:last-child{background:var(--soft)}small{color:var(--soft)}`

function answers(list: readonly Sampled[]): string {
  return list
    .map((s) => {
      const right = s.given.trim().toLowerCase() === s.answer.toLowerCase()
      const bars = s.alpha.map(
        (v, i) =>
          `<i style="height:${Math.round(Math.min(1, v) * 34)}px" title="${i === s.alpha.length - 1 ? 'global' : `level ${i}`}: ${v.toFixed(3)}"></i>`,
      )
      return `<div class="qa">${picture(s.picture, s.answer)}<div><b>${html(s.question)}</b><br><span class="${right ? 'ok' : 'no'}">${html(s.given || '(nothing)')}</span> <small>expected: ${html(s.answer)}</small>
<div class="gate" aria-label="gate weights">${bars.join('')}</div><small>gate: ${s.alpha
        .slice(0, -1)
        .map((v) => v.toFixed(2))
        .join(' ')} + global</small></div></div>`
    })
    .join('\n')
}

/** Writes the page. @param examples a few pairs of each level */
export function writeReport(
  file: string,
  r: Result,
  examples: readonly Example[][],
  sampled: readonly Sampled[],
): void {
  const kinds = [
    ['yes/no', 'yesno'],
    ['category (one of 4)', 'category'],
    ['name (one of 10)', 'name'],
  ] as const
  const rows = kinds
    .map(
      ([title, k]) =>
        `<tr><td>${title}</td><td><b>${percent(r.accuracy[k])}</b></td><td>${percent(r.blind[k])}</td><td>${percent(r.chance[k])}</td><td>+${(100 * (r.accuracy[k] - r.blind[k])).toFixed(1)}</td></tr>`,
    )
    .join('')
  const levels = examples
    .map(
      (list, l) =>
        `<div class="row"><div class="lv">level ${l}</div>${list.map((e) => `<div class="ex">${picture(e.picture, e.caption)}${html(e.caption)}${e.note ? `<br><span class="no">${html(e.note)}</span>` : ''}</div>`).join('')}</div>`,
    )
    .join('\n')
  const seconds = Object.entries(r.seconds)
    .map(([k, v]) => `<tr><td>${html(k)}</td><td>${v.toFixed(1)} s</td></tr>`)
    .join('')
  const settings = Object.entries(r.settings)
    .map(([k, v]) => `<tr><td>${html(k)}</td><td>${html(String(v))}</td></tr>`)
    .join('')
  const page = `<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>AlignGPT quickstart</title><style>${STYLE}</style>
<h1>AlignGPT quickstart</h1><p>A small multimodal model went through everything the paper describes, on this machine: alignment scores, levels, pre-training, instruction tuning. The pictures it is asked about are drawn in a style that no training has seen.</p>
<div class="cards">${kinds.map(([title, k]) => `<div class="card"><b>${percent(r.accuracy[k])}</b><span>${title}</span></div>`).join('')}<div class="card"><b>${percent(r.levels.wrongInLowestQuarter)}</b><span>of the wrong captions in the lowest quarter of scores</span></div></div>
<h2>Accuracy on held-out pictures</h2><table><tr><th>question</th><th>model</th><th>blind control</th><th>chance</th><th>points over blind</th></tr>${rows}</table><p>Blind control: the same questions with the pictures shuffled.</p>
<h2>Loss</h2><div class="curves">${curve('CLIP (contrastive)', r.loss.clip)}${curve('LLaMA on text', r.loss.llama)}${curve('phase 1, pre-training', r.loss.pretrain)}${curve('phase 2, instruction tuning', r.loss.finetune)}</div>
<h2>Alignment levels</h2><p>Pairs of each level; in red, captions that were made wrong on purpose. A right caption scores higher than a wrong one with probability ${r.levels.auc.toFixed(2)} (AUC); chance is 0.50.</p>${histogram(r)}
${levels}
<h2>Answers, with the gate's weights</h2><p>Bars: weight of each local alignment level, and of the global one (grey).</p>${answers(sampled)}
<h2>Time</h2><table>${seconds}</table><h2>Settings</h2><table>${settings}</table>
<h2>Data</h2><p>Pictures: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, CC-BY-4.0), Fluent Emoji (Microsoft, MIT; test only). Names and keywords: Unicode CLDR through emojibase (MIT).</p></html>
`
  fs.writeFileSync(file, page)
}

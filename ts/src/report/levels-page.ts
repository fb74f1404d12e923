/** What the levels of a data set look like: one HTML page that needs nothing besides itself. */
import fs from 'node:fs'
import path from 'node:path'
import type { Buckets, Levels } from '../levels/bucket.js'
import type { LevelExample } from '../levels/clip-scores.js'
import { thumbnail } from '../processing/image/thumbnail.js'
import { escapeHtml, htmlPage } from './html.js'

export interface LevelsPage extends Pick<Levels, 'edges' | 'histogram'> {
  data: string
  clip: string
  buckets: Buckets
  examples: LevelExample[]
}

// Longer captions are cut on the page.
const CAPTION = 300
const SIDE = 192

const STYLE = `
:root { color-scheme: light dark; --ink: light-dark(#1d2430, #e8ebf0); --soft: light-dark(#667085, #98a2b3);
  --line: light-dark(#e3e7ee, #323a47); --bar: light-dark(#3b6fd4, #7aa5f7); --page: light-dark(#fbfcfe, #12161d) }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page) }
main { margin: 0 auto; max-width: 76rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem } p, small, td { color: var(--soft) }
table { border-collapse: collapse; width: 100% } th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap }
td.bar { width: 60%; text-align: left } td.bar i { display: block; height: 1rem; background: var(--bar); border-radius: 3px }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: 8px; overflow-wrap: anywhere }
figure img { display: block; max-width: 100%; margin: 0 auto .5rem; border-radius: 4px }`

async function figure(e: LevelExample): Promise<string> {
  const caption = e.caption.length > CAPTION ? `${e.caption.slice(0, CAPTION)}...` : e.caption
  return `<figure><img src="${await thumbnail(e.image, SIDE)}" alt=""><figcaption>${escapeHtml(caption)}<br>
<small>${e.score.toFixed(4)} · ${escapeHtml(e.id)}</small></figcaption></figure>`
}

/** The page as text. */
export async function levelsPage(p: LevelsPage): Promise<string> {
  const most = Math.max(...p.histogram, 1)
  const total = p.histogram.reduce((a, b) => a + b, 0)
  const rows = p.histogram.map(
    (n, l) => `<tr><th scope="row">${l}</th><td>${p.edges[l].toFixed(4)} to ${p.edges[l + 1].toFixed(4)}</td>
<td class="bar"><i style="width:${((100 * n) / most).toFixed(1)}%"></i></td><td>${n}</td></tr>`,
  )
  const sections: string[] = []
  for (const l of p.histogram.keys()) {
    const figures: string[] = []
    for (const e of p.examples) if (e.level === l) figures.push(await figure(e))
    const pairs = figures.length ? `<div class="pairs">${figures.join('\n')}</div>` : '<p>no pair</p>'
    sections.push(`<h2>Level ${l}${l === 0 ? ', aligned worst' : l === p.histogram.length - 1 ? ', aligned best' : ''}</h2>
${pairs}`)
  }
  const rule = p.buckets === 'width' ? 'equal parts of the range of scores' : 'equal counts'
  const body = `<h1>Alignment levels of ${escapeHtml(path.basename(p.data))}</h1>
<p>${total} pairs, scored by ${escapeHtml(path.basename(p.clip))} (cosine of its embeddings), cut into ${p.histogram.length} levels: ${rule}.
The examples of a level go from its lowest score to its highest.</p>
<table><thead><tr><th>level</th><th>score</th><th></th><th>pairs</th></tr></thead><tbody>
${rows.join('\n')}
</tbody></table>
${sections.join('\n')}`
  return htmlPage('Alignment levels', STYLE, body)
}

/** Writes the page; folders are made. */
export async function writeLevelsPage(file: string, p: LevelsPage): Promise<void> {
  fs.mkdirSync(path.dirname(path.resolve(file)), { recursive: true })
  fs.writeFileSync(file, await levelsPage(p))
}

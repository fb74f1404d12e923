/** `aligngpt report`: the page about runs. */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { loadDataset } from '../src/data/dataset.js'
import { escapeHtml } from '../src/report/html.js'
import { reportPage } from '../src/report/run-report.js'
import { finetune } from '../src/train/trainer.js'
import { tempDir } from './data-cases.js'

const dir = tempDir()
afterAll(() => fs.rmSync(dir, { recursive: true }))

const EVIL = '<script>alert("x")</script>'

/** A run's folder with a log of these losses. */
function folder(name: string, losses: (number | null)[], more: Record<string, unknown> = {}): string {
  const out = path.join(dir, name)
  fs.mkdirSync(out, { recursive: true })
  const line = (loss: number | null, step: number): string =>
    JSON.stringify({
      ...{
        phase: 'pretrain',
        step,
        steps: 40,
        loss,
        lr: 1e-5 * step,
        gradNorm: 2,
        tokens: 600,
        tokensPerSecond: step % 2 ? 300 : 100,
        waited: step % 2 ? 0.5 : 0,
      },
      coefficients: [0.25, 0.75, 1],
      ...more,
    })
  fs.writeFileSync(path.join(out, 'log.jsonl'), losses.map((l, i) => `${line(l, i)}\n`).join(''))
  return out
}
const falling = (n: number): number[] => Array.from({ length: n }, (_, i) => 4 - i / n)

function checkPage(html: string): void {
  for (const [, src] of html.matchAll(/src="([^"]*)/g)) expect(src).toMatch(/^data:image\/webp;base64,/)
  expect(html).not.toMatch(/<(script|link|iframe|object|embed|a|base)\b|@import|url\(|srcset|https?:/i)
  expect(html.replace(/<style>[\s\S]*?<\/style>/, '')).not.toMatch(/NaN|undefined|Infinity/)
  expect(html).toContain("default-src 'none'")
  const open: string[] = []
  const empty = new Set(['meta', 'line', 'polyline', 'br', 'circle', 'img'])
  for (const [, slash, name] of html.replace(/<style>[\s\S]*?<\/style>/, '').matchAll(/<(\/?)([a-z]\w*)[^>]*>/g))
    if (slash) expect(open.pop()).toBe(name)
    else if (!empty.has(name)) open.push(name)
  expect(open).toEqual([])
}

test('the command, on a run that was made: its curves, weights, options and end', async () => {
  const base = fileURLToPath(new URL('golden/base/', import.meta.url))
  const out = path.join(dir, 'my rün')
  const model = await AlignGPT.load(path.join(base, 'model/aligngpt'))
  const data = await loadDataset(path.join(base, 'data_phase2.json'), { images: path.join(base, 'images') })
  const { loss } = await finetune(model, data, {
    out,
    batch: 4,
    steps: 3,
    seed: 9,
    lr: 3e-4,
    workers: 0,
    progress: false,
  })
  model.dispose()
  data.close()
  const cli = spawnSync(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', 'report', out], {
    cwd: new URL('../..', import.meta.url),
    encoding: 'utf8',
  })
  expect(cli.stderr).toBe('')
  expect(cli.status).toBe(0)
  const html = fs.readFileSync(path.join(out, 'report.html'), 'utf8')
  checkPage(html)
  for (const x of [
    'my rün',
    '3 of 3',
    `${loss[0].toFixed(4)} → ${loss[2].toFixed(4)}`,
    '<td>done</td>',
    '<td>finetune</td>',
  ])
    expect(html).toContain(x)
  expect(html.match(/class="curve"/g)).toHaveLength(4)
  expect(html.match(/class="cell"/g)).toHaveLength(3 * model.levels)
  for (const [key, value] of [
    ['lr', '0.0003'],
    ['seed', '9'],
    ['batch', '4'],
    ['alignment', 'adaptive'],
  ])
    expect(html).toContain(`<th scope="row">${key}</th><td>${value}</td>`)
})

// Steps of the logs take 6 and 2 s in turn for 600 tokens each, and every second one waits for 1 s: 150 tokens/s, an eighth waited.
test('several runs: one line each, options that differ, a killed one with a cut line and its checkpoint', () => {
  const done = folder('a/run', falling(40))
  const killed = folder('b/run', [...falling(12), null])
  fs.appendFileSync(path.join(killed, 'log.jsonl'), '{"phase":"pretr')
  const options = { lr: 1, seed: 1 }
  fs.writeFileSync(
    path.join(done, 'state.json'),
    JSON.stringify({ steps: 40, aborted: false, seconds: 61.25, bad: [1], skipped: [], outliers: 2, options }),
  )
  // of an earlier part: says nothing about this log
  fs.writeFileSync(
    path.join(killed, 'state.json'),
    JSON.stringify({ steps: 5, aborted: true, seconds: 77.75, options: { lr: 5 } }),
  )
  const checkpoint = path.join(killed, 'checkpoints/step-10')
  fs.mkdirSync(checkpoint, { recursive: true })
  fs.writeFileSync(path.join(checkpoint, 'manifest.json'), JSON.stringify({ manifest: { config: { lr: 1, seed: 2 } } }))
  const html = reportPage([done, killed])
  checkPage(html)
  for (const x of [
    'a/run',
    'b/run',
    '40 of 40',
    '13 of 40',
    '61.3',
    '1 / 0',
    '>150<',
    '12.5 %',
    '1 broken lines',
    'running or killed',
  ])
    expect(html).toContain(x)
  expect(html).not.toContain('>77.8<')
  expect(html.match(/class="curve"/g)).toHaveLength(8)
  expect(html).toContain('<tr><th scope="row">lr</th><td>1</td><td>1</td></tr>')
  expect(html).toContain('<tr class="differs"><th scope="row">seed</th><td>1</td><td>2</td></tr>')
})

const group = (samples: number, loss: number | null, coefficients: number[] | null = null) => ({
  ...{ samples, tokens: 9, loss, coefficients },
})
/** A line of an evaluation behind those of a log. */
function evaluated(out: string, step: number, loss: number, best: boolean, more: object): void {
  const evaluation = { samples: 3, tokens: 9, loss, best, answers: [], seconds: 1, ...more }
  const phase = 'levels' in more ? 'pretrain' : 'finetune'
  fs.appendFileSync(path.join(out, 'log.jsonl'), `${JSON.stringify({ phase, step, steps: 40, evaluation })}\n`)
}
const text = (html: string): string => html.replace(/<[^>]*>/g, '|').replace(/\|[|\s]*/g, '|')

test('levels: the share trained on is that of the pictures, and the held-out loss of each', () => {
  // samplesPerSecond: steps of 6 and 2 s have 12 and 8 pictures; 12 * 0.25 + 8 * 0.5 of 20 are 35 %
  const out = folder('levels', [])
  for (const [step, rate, samplesPerSecond, coefficients] of [
    [0, 100, 2, [0.25, 0.75]],
    [1, 300, 4, [0.5, 0.5]],
  ]) {
    const line = {
      phase: 'pretrain',
      step,
      steps: 40,
      loss: 1,
      tokens: 600,
      tokensPerSecond: rate,
      samplesPerSecond,
      coefficients,
    }
    fs.appendFileSync(path.join(out, 'log.jsonl'), `${JSON.stringify(line)}\n`)
  }
  evaluated(out, 0, 2.5, true, { levels: [group(2, 2.25), group(0, null)] })
  evaluated(out, 1, 2.75, false, { levels: [group(2, 2.125), group(0, null)] })
  const html = reportPage([out])
  checkPage(html)
  expect(text(html)).toContain('|0|35.0 %|2|2.2500 → 2.1250|')
  expect(text(html)).toContain('|1|65.0 %|0|– → –|')
  expect(text(html)).toContain('held out 2.5000, step 0')
  expect(html.match(/class="dots"/g)).toHaveLength(2) // all records, and level 0; level 1 has none
  expect(html.match(/<circle/g)).toHaveLength(4)
})

test('the gate by task, and samples with what the model says at its best and last', () => {
  const out = folder('tasks', falling(3), { phase: 'finetune' })
  const gate = (a: number) => ({ tasks: { [EVIL]: group(2, 1.5, [a, 1 - a, 1]), text: group(1, 0.5) } })
  const said = (answer: string) => [{ id: EVIL, text: answer }, { id: 'other', text: 'nobody asked' }] // biome-ignore format: one line
  evaluated(out, 0, 1.25, true, { ...gate(0.25), answers: said('a car') })
  evaluated(out, 2, 1.75, false, { ...gate(0.75), answers: said(EVIL) })
  const picture = 'data:image/webp;base64,AAAA'
  const shown = [
    { id: EVIL, question: 'What is it?', expected: EVIL, picture },
    { id: 'unseen', question: '', expected: 'a bus', picture: `${picture}" onload="alert(1)` },
  ]
  fs.writeFileSync(path.join(out, 'samples.json'), JSON.stringify(shown))
  const html = reportPage([out])
  checkPage(html)
  expect(html).toContain('level 0, step 2: 0.750')
  expect(html).toContain('2 records, loss 1.5000 → 1.5000')
  expect(html).toContain('no pictures, or no vectors')
  expect(html.match(/<img/g)).toHaveLength(1)
  expect(html).not.toContain('onload')
  expect(text(html)).toContain('|Question|What is it?|Expected|')
  expect(text(html)).toContain('|Model (best, step 0)|a car|Model (last, step 2)|')
  expect(text(html)).toContain('|Expected|a bus|Model (best, step 0)|–|Model (last, step 2)|–|unseen|')
  expect(html).not.toContain('nobody asked')
  expect(html).not.toContain('Alignment levels')
  expect(reportPage([folder('a/none', falling(3))])).not.toContain('held out ')
})

test('text is escaped, and a run that recorded nothing is borne', () => {
  const evil = folder(`evil & "${'x'}"`, falling(3), { phase: EVIL })
  const options = { [EVIL]: EVIL }
  fs.writeFileSync(path.join(evil, 'state.json'), JSON.stringify({ steps: 3, aborted: true, options }))
  const html = reportPage([evil, folder('empty', []), folder('no weights', [1, 2], { coefficients: [] })])
  checkPage(html)
  expect(html.split(escapeHtml(EVIL)).length - 1).toBe(3)
  expect(html).toContain('stopped')
  expect(html).toContain('nothing recorded')
  expect(reportPage([folder('empty', [])])).toContain('Not written yet')
})

test('what is no run is named', () => {
  expect(() => reportPage([path.join(dir, 'none')])).toThrow(
    /\[report\] .*none: expected a run's folder with log.jsonl/,
  )
  expect(() => reportPage([])).toThrow(/at least one folder/)
})

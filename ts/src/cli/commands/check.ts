/** The data linter: what training would refuse, leave out or misunderstand, before it starts. */

import path from 'node:path'
import { type Command, Option } from 'commander'
import type { CheckReport, ProblemKind } from '../../data/lint.js'
import { MODEL_DEFAULTS } from '../../models/config/variants.js'
import { STYLES, type Style } from '../../processing/conversation/styles.js'
import { FOLLOW_LINKS, integer, positive } from '../options.js'

interface Options {
  images?: string
  followLinks?: boolean
  model?: string
  style: Style
  patches: number
  maxLength: number
  decode?: boolean
  limit: number
  strict?: boolean
  json?: boolean
}

/** A path as one would write it here. */
function shown(file: string): string {
  const below = path.relative('', file)
  return below.startsWith('..') ? file : below
}

/** The report as lines for people. */
function lines(r: CheckReport, problems: Record<ProblemKind, readonly [string, string]>): string[] {
  const { pictures, lengths } = r
  const file = shown(r.file)
  const { named, looked, read } = pictures
  const seen = looked ? `${read} read` : named ? 'not read (--images)' : 'none read'
  const out = r.stopped ? ['stopped: the report is of what was looked at so far'] : []
  out.push(
    `${file}: ${r.records} records, ${r.withImage} with a picture (${named} different, ${seen}), ${r.seconds.toFixed(1)} s`,
  )
  if (lengths) {
    const { unit, min, median, p95, max, mean, histogram } = lengths
    out.push(`length in ${unit}: min ${min}, median ${median}, mean ${mean.toFixed(1)}, 95 % ${p95}, max ${max}`)
    const most = Math.max(...histogram.map((h) => h.count))
    for (const { from, to, count } of histogram)
      out.push(
        `  ${`${from}..${to - 1}`.padStart(15)}  ${String(count).padStart(8)}  ${'#'.repeat(Math.ceil((40 * count) / most))}`,
      )
  }
  for (const [kind, count] of Object.entries(r.counts) as [ProblemKind, number][]) {
    const [severity, meaning] = problems[kind]
    out.push(`${severity} ${kind}: ${count} (${meaning})`)
    const found = r.findings.filter((f) => f.kind === kind)
    for (const f of found) {
      const name = f.id === null || f.id === String(f.record) ? '' : ` (${f.id})`
      out.push(`  ${file}:${f.byte} record ${f.record}${name}: ${f.message}`)
    }
    if (count > found.length) out.push(`  ... and ${count - found.length} more (--limit)`)
  }
  out.push(`${r.errors} errors, ${r.warnings} warnings`)
  return out
}

async function run(file: string, o: Options): Promise<void> {
  const [{ checkDataset, PROBLEMS }, { hearing }] = await Promise.all([
    import('../../data/lint.js'),
    import('../signals.js'),
  ])
  const { model, json, strict, ...options } = o
  const tokenizer =
    model === undefined ? undefined : (await import('../../processing/tokenizer.js')).Tokenizer.load(model)
  const bar = process.stderr.isTTY
  const onProgress = (done: number, total: number, unit: string): unknown =>
    bar && process.stderr.write(`\r${Math.floor((100 * done) / total)} % of ${unit} `)
  const report = await hearing('the report is made of what was looked at', (signals) =>
    checkDataset(file, { ...options, tokenizer, onProgress, stop: () => signals.heard !== null }),
  )
  if (bar) process.stderr.write('\r\x1b[K')
  console.log(json ? JSON.stringify(report) : lines(report, PROBLEMS).join('\n'))
  if (!report.stopped && (report.errors > 0 || (strict && report.warnings > 0))) process.exitCode = 1
}

export function check(program: Command): void {
  program
    .command('check')
    .argument('<data>', 'LLaVA JSON, JSON lines or Parquet')
    .description('check data: records, turns, pictures, lengths; exit status 1 when there are errors')
    .option('--images <dir>', 'folder of the pictures, or shards/{00000..00009}.tar; without it they are not read')
    .option(...FOLLOW_LINKS)
    .option('--model <dir>', 'folder of a tokenizer: lengths are tokens then, and too long ones are found')
    .addOption(
      new Option(
        '--style <style>',
        "how records are rendered, plain for pre-training; default the tokenizer's",
      ).choices(STYLES),
    )
    .option('--patches <n>', 'rows that a picture takes', positive, 576)
    .option('--max-length <n>', 'longest sequence in rows', positive, MODEL_DEFAULTS.maxLength)
    .option('--decode', 'decode every picture instead of reading its header')
    .option('--exif-orientation', 'no warning of pictures that their EXIF turns: training will turn them')
    .option('--limit <n>', 'places shown of each kind', integer, 20)
    .option('--strict', 'warnings count as errors')
    .option('--json', 'the report as JSON')
    .action(run)
}

/**
 * This package and PyTorch side by side, in one run and in turn, on the same numbers.
 *
 *   npm run bench:torch -- --python PATH [--json FILE] [--threads N] [--filter ROW]
 *
 * PATH is a Python with torch, transformers, numpy and safetensors. ROW is the beginning of row names (step.f32), several
 * with commas. The ratio is larger-is-better for us everywhere. Ends with status 1 when both sides do not agree on a
 * result, or a case cannot be run.
 */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { Command } from 'commander'
import { integer } from '../../ts/src/cli/options.js'
import { complain } from '../../ts/src/cli/output.js'
import { native } from '../../ts/src/core/native.js'
import { AlignGPTError } from '../../ts/src/util/errors.js'
import { freshGroups } from './fresh.js'
import { kernelGroups } from './kernels.js'
import { BUSY, type Context, type Group, type Row } from './measure.js'
import { Peer } from './peer.js'
import { describeScaling, measureScaling } from './scaling.js'
import { stepGroups } from './steps.js'

/** Nothing is repeated after so many minutes: the whole run takes at most 20. */
const MINUTES = 14
/** So long it waits for other programs to become idle, all in all. */
const PATIENCE_MINUTES = 3
/** Not rows: exponents of our own cost, for which there is no peer, and f32 products with both sides held to AVX2. */
const SCALING = 'scaling'
const AVX2 = 'avx2'
const GROUPS: Group[] = [...kernelGroups, ...stepGroups, ...freshGroups]

type Wants = (row: string) => boolean

function wanted(filter: string | undefined): Wants {
  if (filter === undefined) return () => true
  const starts = filter.split(',').map((s) => s.trim())
  const wants = (row: string): boolean => starts.some((s) => s !== '' && row.startsWith(s))
  const names = [...GROUPS.flatMap((g) => Object.keys(g.rows)), SCALING, AVX2]
  if (!names.some(wants))
    throw new AlignGPTError(
      'ERR_ARGUMENT',
      `[bench] --filter: expected the beginning of ${names.join(', ')}, got ${filter}`,
    )
  return wants
}

/** The rows of one group; an error becomes the note of its rows. */
async function runGroup(c: Context, group: Group, wants: Wants): Promise<Row[]> {
  const names = Object.keys(group.rows).filter(wants)
  if (names.length === 0) return []
  try {
    const rows = await group.run(c, wants)
    return rows.filter((r) => wants(r.name)).map((r) => ({ ...r, target: group.rows[r.name] }))
  } catch (e) {
    const note = `FAILED: ${e instanceof Error ? e.message : e}`
    const empty = { ours: null, peer: null, unit: '', ratio: null, spread: null, failed: true }
    return names.map((name) => ({ name, ...empty, target: group.rows[name], note }))
  }
}

function shown(n: number | null): string {
  if (n === null) return '-'
  return n.toFixed(n >= 1000 ? 0 : n >= 100 ? 1 : 2)
}

function table(rows: readonly Row[]): string {
  const lines = rows.map((r) => {
    const verdict = r.ratio === null ? '' : r.ratio >= r.target ? 'reached' : 'missed'
    const spread = r.spread === null ? '-' : `${(100 * r.spread).toFixed(0)} %`
    return [r.name, shown(r.ours), shown(r.peer), r.unit, shown(r.ratio), String(r.target), spread, verdict, r.note]
  })
  const all = [['row', 'ours', 'PyTorch', 'unit', 'ratio', 'target', 'spread', '', 'what'], ...lines]
  const widths = all[0].map((_, i) => Math.max(...all.map((l) => l[i].length)))
  const right = (i: number): boolean => [1, 2, 4, 5, 6].includes(i)
  const pad = (text: string, i: number): string => (right(i) ? text.padStart(widths[i]) : text.padEnd(widths[i]))
  return all.map((l) => l.map(pad).join('  ').trimEnd()).join('\n')
}

/** Rows that were measured while others worked are not worth much. */
function warning(rows: readonly Row[]): string {
  const disturbed = rows.filter((r) => (r.others ?? 0) > BUSY)
  if (disturbed.length === 0) return ''
  const names = disturbed.map((r) => `${r.name} (${r.others?.toFixed(1)})`).join(', ')
  return `\n\nNot on an idle machine: other programs used CPUs during ${names}. Measure these again.`
}

function machine(peer: Peer): Record<string, unknown> {
  const { level } = native.capabilities()
  return {
    cpu: os.cpus()[0]?.model,
    cores: os.availableParallelism(),
    memoryGiB: Math.round(os.totalmem() / 2 ** 30),
    threads: peer.threads,
    level,
    /** processes that wanted to run in the last minutes: more than the threads of one side means the machine was shared */
    load: os.loadavg().map((x) => Number(x.toFixed(1))),
    node: process.version,
    ...peer.versions,
  }
}

/** The rows of f32 products from a run of this program in which both sides use AVX2 and nothing above. */
function avx2Rows(o: Options, temp: string): Row[] {
  const file = path.join(temp, 'avx2.json')
  const limits = {
    ALIGNGPT_CPU_LEVEL: 'avx2',
    ATEN_CPU_CAPABILITY: 'avx2',
    ONEDNN_MAX_CPU_ISA: 'AVX2',
    MKL_ENABLE_INSTRUCTIONS: 'AVX2',
  }
  const argv = [...process.execArgv, process.argv[1], '--python', o.python, '--threads', String(o.threads)]
  const r = spawnSync(process.execPath, [...argv, '--filter', 'gemm.f32', '--json', file], {
    env: { ...process.env, ...limits },
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  if (r.status !== 0) throw new Error(`avx2: the run ended with ${r.status ?? r.signal}`)
  return JSON.parse(fs.readFileSync(file, 'utf8')).rows
}

interface Options {
  python: string
  json?: string
  threads: number
  filter?: string
}

/** Measures what was asked for and prints it; the file is written after every group, for runs that are stopped. */
async function measure(o: Options, c: Context, wants: Wants): Promise<void> {
  const rows: Row[] = []
  const report: Record<string, unknown> = { rows, machine: machine(c.peer), date: new Date().toISOString() }
  const save = (): void => {
    if (o.json) fs.writeFileSync(o.json, `${JSON.stringify(report, null, 2)}\n`)
  }
  for (const group of GROUPS) {
    rows.push(...(await runGroup(c, group, wants)))
    save()
  }
  if (rows.length) console.log(`${table(rows)}${warning(rows)}`)
  if (wants(AVX2)) {
    const avx2 = avx2Rows(o, c.temp).map((r) => ({ ...r, target: 0.9 }))
    report.avx2 = avx2
    console.log(`\nBoth sides held to AVX2:\n${table(avx2)}`)
  }
  if (wants(SCALING)) {
    const scaling = await measureScaling(c.temp, c.log)
    report.scaling = scaling
    console.log(`\n${describeScaling(scaling)}`)
  }
  report.machine = machine(c.peer)
  save()
  console.log(`\n${JSON.stringify(report.machine)}`)
  if (rows.some((r) => r.failed)) process.exitCode = 1
}

async function main(o: Options): Promise<void> {
  const wants = wanted(o.filter)
  if (o.threads < 1) throw new AlignGPTError('ERR_ARGUMENT', `[bench] --threads: expected at least 1, got ${o.threads}`)
  native.setThreads(o.threads)
  const temp = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt-bench-'))
  const tidy = (): void => fs.rmSync(temp, { recursive: true, force: true })
  process.once('exit', tidy)
  process.once('SIGINT', () => process.exit(130))
  process.once('SIGTERM', () => process.exit(143))
  const peer = await Peer.start(o.python, o.threads, path.join(temp, 'inductor'))
  const deadline = Date.now() + MINUTES * 60_000
  const patience = { milliseconds: PATIENCE_MINUTES * 60_000 }
  const log = (line: string): void => console.error(line)
  try {
    await measure(o, { peer, threads: o.threads, temp, deadline, patience, log }, wants)
  } finally {
    peer.close()
  }
}

const command = new Command('bench:torch')
  .description('this package and PyTorch side by side')
  .requiredOption('--python <path>', 'a Python with torch, transformers, numpy and safetensors')
  .option('--json <file>', 'where the numbers go')
  .option('--threads <n>', 'of each side', integer, 2)
  .option('--filter <rows>', 'beginning of row names, several with commas')

await main(command.parse().opts()).catch((e) => {
  complain(e)
  process.exit(1)
})

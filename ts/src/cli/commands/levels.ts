/** Scores the pairs of a LLaVA JSON file with a CLIP and writes their alignment levels (`similarity`) into it. */
import { type Command, Option } from 'commander'
import type { Buckets } from '../../levels/bucket.js'
import { atLeast, FOLLOW_LINKS, positive } from '../options.js'

// Pairs of each level on the page.
const EXAMPLES = 8

interface Options {
  images?: string
  followLinks?: boolean
  clip: string
  levels: number
  buckets: Buckets
  batch: number
  scores?: string
  features?: string
  report?: string
  exifOrientation?: boolean
  write: boolean
}

async function run(file: string, o: Options): Promise<void> {
  const [{ loadDataset }, score, { hearing }] = await Promise.all([
    import('../../data/dataset.js'),
    import('../../levels/clip-scores.js'),
    import('../signals.js'),
  ])
  const { images, followLinks, clip, report, ...options } = o
  const examples = report === undefined ? 0 : EXAMPLES
  const bar = process.stderr.isTTY
  const data = await loadDataset(file, { images, followLinks })
  const onProgress = (done: number, total: number): unknown =>
    bar && process.stderr.write(`\r${done}/${total} pairs scored `)
  const result = await hearing('finishing the batch; its scores are kept', (signals) =>
    score.levels(data, clip, { ...options, examples, onProgress, signal: signals.signal }).catch((e) => {
      if (e !== signals.signal.reason) throw e
      console.error('stopped: the same command goes on from the scores made so far')
      return null
    }),
  )
  if (!result) return data.close()
  if (bar) process.stderr.write('\r\x1b[K')
  const most = Math.max(...result.histogram, 1)
  for (const [l, n] of result.histogram.entries())
    console.log(
      `level ${l}  from ${result.edges[l].toFixed(4)}  ${String(n).padStart(7)}  ${'#'.repeat(Math.round((40 * n) / most))}`,
    )
  for (const b of result.bad) console.error(`left out: ${b.id}: ${b.reason}`)
  const without = result.scores.filter((s) => s === null).length + data.bad.length
  if (without)
    console.error(`${without} records without a score${o.write ? `: ${result.removed} lost the level they had` : ''}`)
  if (o.write) console.log(`similarity written to ${file}`)
  if (report !== undefined) {
    const { writeLevelsPage } = await import('../../report/levels-page.js')
    await writeLevelsPage(report, { data: data.file, clip, buckets: o.buckets, ...result })
  }
  if (report) console.log(`pairs of each level: ${report}`)
  data.close()
}

export function levels(program: Command): void {
  program
    .command('levels')
    .description('alignment scores and levels of image-text pairs')
    .argument('<data>', 'LLaVA JSON, JSON lines or Parquet; `similarity` is written into it')
    .option(
      '--images <dir>',
      'folder of the pictures, or shards/{00000..00009}.tar (default: those in the Parquet file)',
    )
    .option(...FOLLOW_LINKS)
    .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--levels <n>', 'number of levels', atLeast(2), 8)
    .addOption(
      new Option('--buckets <rule>', 'equal widths (the paper) or equal counts')
        .choices(['width', 'quantile'])
        .default('width'),
    )
    .option('--batch <n>', 'pairs scored at once', positive, 64)
    .option('--scores <file>', 'keep the scores there (default: beside the data until done); a run goes on from them')
    .option('--features <dir>', "keep CLIP's embeddings there")
    .option('--report <file>', 'HTML page with the histogram and pairs of each level')
    .option('--exif-orientation', 'turn pictures as their EXIF says, as in training with this setting')
    .option('--no-write', 'leave the data file alone')
    .action(run)
}

/** Scores the pairs of a LLaVA JSON file with a CLIP and writes their alignment levels (`similarity`) into it. */
import { Command, Option } from 'commander'
import { loadDataset } from '../ts/src/data.js'
import { levels } from '../ts/src/score.js'
import { fail, integer } from './cli.js'

const o = new Command('levels')
  .description('alignment scores and levels of image-text pairs')
  .requiredOption('--data <file>', 'LLaVA JSON; `similarity` is written into it')
  .requiredOption('--images <dir>', 'folder of the pictures')
  .requiredOption('--clip <dir>', 'CLIP in Hugging Face layout')
  .option('--levels <n>', 'number of levels', integer, 8)
  .addOption(
    new Option('--buckets <rule>', 'equal widths (the paper) or equal counts')
      .choices(['width', 'quantile'])
      .default('width'),
  )
  .option('--batch <n>', 'pairs scored at once', integer, 64)
  .parse()
  .opts()

try {
  const data = await loadDataset(o.data, { images: o.images })
  const result = await levels(data, o.clip, {
    levels: o.levels,
    buckets: o.buckets,
    batch: o.batch,
    onProgress: (done, total) => process.stderr.write(`\r${done}/${total} pairs scored`),
  })
  process.stderr.write('\n')
  const most = Math.max(...result.histogram, 1)
  for (const [l, n] of result.histogram.entries())
    console.log(
      `level ${l}  from ${result.edges[l].toFixed(4)}  ${String(n).padStart(7)}  ${'#'.repeat(Math.round((40 * n) / most))}`,
    )
  for (const b of result.bad) console.error(`left out: ${b.id}: ${b.reason}`)
  console.log(`similarity written to ${o.data}`)
  data.close()
} catch (e) {
  fail(e)
}

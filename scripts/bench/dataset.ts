/**
 * Data at full size: makes a data file like LLaVA's instruction mix and measures reading it.
 *   npx tsx scripts/bench/dataset.ts make FILE --bytes 2e9     (FILE.jsonl: JSON lines)
 *   npx tsx scripts/bench/dataset.ts index FILE                twice: reading everything, then from the saved index
 *   npx tsx scripts/bench/dataset.ts check FILE                the data linter, without pictures
 *   npx tsx scripts/bench/dataset.ts make FILE.tar --records N      a tar with N members of 1 to 4 kB
 *   npx tsx scripts/bench/dataset.ts tar FILE.tar              its index, as `index`
 */
import fs from 'node:fs'
import { Command } from 'commander'
import { loadDataset } from '../../ts/src/data/dataset.js'
import { checkDataset } from '../../ts/src/data/lint.js'
import { TarWriter } from '../../ts/src/formats/tar.js'
import { openImages } from '../../ts/src/processing/image/source.js'
import { Rng } from '../../ts/src/util/rng.js'

const WORDS =
  'a the of in on with two red blue small large old wooden table street dog cat bird person people sitting standing holding next to near and is are there what color how many which side left right image photo café naïve “quoted” 日本 🙂'.split(
    ' ',
  )

/** A record of about 1.5 kB: 2 to 8 turns, every 8th record without a picture. */
function record(i: number, rng: Rng): object {
  const text = (n: number): string => Array.from({ length: n }, () => WORDS[rng.int(WORDS.length)]).join(' ')
  const rounds = 1 + rng.int(4)
  const conversations = Array.from({ length: 2 * rounds }, (_, t) =>
    t % 2
      ? { from: 'gpt', value: `${text(20 + rng.int(120))}.\n\n"${text(6)}"` }
      : { from: 'human', value: `${t === 0 && i % 8 ? '<image>\n' : ''}${text(8 + rng.int(20))}?` },
  )
  const id = String(i).padStart(12, '0')
  return { id, ...(i % 8 ? { image: `coco/train2017/${id}.jpg` } : {}), conversations }
}

function make(file: string, bytes: number, records: number): void {
  const lines = file.endsWith('.jsonl')
  const fd = fs.openSync(file, 'w')
  const rng = new Rng(1, 0)
  let [written, n, part] = [0, 0, lines ? '' : '[\n']
  while (written < bytes && n < records) {
    const r = record(n, rng)
    part += lines ? `${JSON.stringify(r)}\n` : `${n ? ',\n' : ''}${JSON.stringify(r, null, 2)}`
    n++
    if (part.length < 1 << 20 && n < records) continue
    written += fs.writeSync(fd, part)
    part = ''
  }
  fs.writeSync(fd, `${part}${lines ? '' : '\n]\n'}`)
  fs.closeSync(fd)
  console.log(`${n} records, ${fs.statSync(file).size} bytes`)
}

function makeTar(file: string, records: number): void {
  const fd = fs.openSync(file, 'w')
  const writer = new TarWriter(fd)
  const rng = new Rng(1, 0)
  for (let i = 0; i < records; i++)
    writer.add(`${String(i).padStart(9, '0')}.jpg`, Buffer.alloc(1000 + rng.int(3000), i))
  writer.end()
  fs.closeSync(fd)
  console.log(`${records} members, ${fs.statSync(file).size} bytes`)
}

/** Runs `f` and prints seconds and the largest resident memory of the process so far. */
async function measure<T>(what: string, f: () => Promise<T>): Promise<T> {
  const from = performance.now()
  const result = await f()
  const seconds = (performance.now() - from) / 1000
  console.log(
    `${what}: ${seconds.toFixed(2)} s, peak ${(process.resourceUsage().maxRSS / 1024).toFixed(0)} MB resident`,
  )
  return result
}

const program = new Command('dataset')
program
  .command('make')
  .argument('<file>')
  .option('--bytes <n>', 'size', Number, Number.POSITIVE_INFINITY)
  .option('--records <n>', 'or number of records', Number, Number.POSITIVE_INFINITY)
  .action((file, o) => (file.endsWith('.tar') ? makeTar(file, o.records) : make(file, o.bytes, o.records)))
program
  .command('index')
  .argument('<file>')
  .action(async (file) => {
    const data = await measure('index', () => loadDataset(file, { images: '.' }))
    console.log(`${data.length} records, the last is ${data.record(data.length - 1).id}`)
  })
program
  .command('tar')
  .argument('<file>')
  .action(async (file) => {
    const pictures = await measure('tar', () => openImages(file))
    console.log(pictures.locate('000000007.jpg'))
  })
program
  .command('check')
  .argument('<file>')
  .action(async (file) => {
    const { records, counts } = await measure('check', () => checkDataset(file))
    console.log(`${records} records`, counts)
  })
await program.parseAsync()

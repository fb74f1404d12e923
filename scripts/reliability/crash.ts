/**
 * Kills small training runs at random moments and continues them, then damages a checkpoint in every way it can think of:
 * `npm run crash -- --kills 30`. Ends with status 1 when anything was not as it must be (docs/reliability.md).
 */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { Command } from 'commander'
import { integer } from '../../ts/src/cli/options.js'
import { crash, damage } from './campaign.js'

const o = new Command('crash')
  .description('kills training runs and damages checkpoints')
  .option('--kills <n>', 'kill -9, most of them inside a save', integer, 30)
  .option('--flips <n>', 'changed bytes', integer, 1600)
  .option('--cuts <n>', 'cut files', integer, 200)
  .option('--loads <n>', 'loads of a whole checkpoint', integer, 1000)
  .option('--seed <n>', 'of the moments and places', integer, 1)
  .parse()
  .opts()

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'aligngpt crash '))
try {
  const killed = await crash(folder, o.kills, o.seed, (text) => console.log(text))
  console.log(JSON.stringify(killed, null, 2))
  const some = fs.readdirSync(folder).find((n) => fs.existsSync(path.join(folder, n, 'checkpoints')))
  const damaged = damage(path.join(folder, some ?? '', 'checkpoints'), {
    flips: o.flips,
    cuts: o.cuts,
    loads: o.loads,
    seed: o.seed,
  })
  console.log(JSON.stringify(damaged, null, 2))
  const wrong = [...killed.different, ...killed.unloadable, ...damaged.missed, ...damaged.falseAlarms]
  if (killed.insideSave < 0.4 * killed.kills)
    wrong.push(`only ${killed.insideSave} of ${killed.kills} kills inside a save`)
  console.log(wrong.length ? `WRONG: ${wrong.join('; ')}` : 'as it must be')
  process.exitCode = wrong.length ? 1 : 0
} finally {
  fs.rmSync(folder, { recursive: true })
}

/**
 * Trains the towers of the quickstart and compares them with those that the repository ships, byte for byte.
 *
 *   npm run quickstart:towers [-- --only clip,llm] [-- --out DIR] [-- --keep] [-- --ship]
 *
 * --keep leaves out those that are in the folder already, --ship puts them into the repository in place of its own.
 * Status 1 where they differ, which towers made with another CPU code path do.
 */
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { cpuInfo } from 'aligngpt/core'
import { prepareData } from './data.js'
import { different, FULL, SHIPPED, ship, shippedMaking, TOWERS, TowerMaker } from './made.js'
import { SEED } from './settings.js'

const { values: args } = parseArgs({
  options: {
    only: { type: 'string', default: TOWERS.join(',') },
    out: { type: 'string', default: 'runs/towers' },
    keep: { type: 'boolean', default: false },
    ship: { type: 'boolean', default: false },
  },
})
const out = path.resolve(args.out)
const wanted = TOWERS.filter((t) => args.only.split(',').includes(t))
const data = await prepareData(out, { seed: SEED })
const maker = new TowerMaker(data, out, FULL, (steps) => ({
  steps,
  onStep: (step, loss) => void (step % 100 === 0 && console.log(`   step ${step}/${steps} loss ${loss.toFixed(3)}`)),
}))
for (const tower of wanted) {
  if (args.keep && fs.existsSync(path.join(out, tower, 'model.safetensors'))) continue
  const began = performance.now()
  console.log(`== ${tower}`)
  await maker.make(tower)
  console.log(`   ${((performance.now() - began) / 1000).toFixed(0)} s`)
}
if (args.ship) {
  ship(out, FULL)
  console.log(`shipped: ${SHIPPED}`)
} else {
  const others = different(out, wanted)
  const { isa } = shippedMaking()
  console.log(
    others.length
      ? `different: ${others.join(', ')}; made with CPU code path ${cpuInfo().isa}, the shipped ones with ${isa}`
      : `${wanted.join(', ')}: the shipped ones, bit for bit`,
  )
  if (others.length) process.exitCode = 1
}

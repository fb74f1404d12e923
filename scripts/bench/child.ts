/**
 * Our side of a memory row, in a fresh process (the other side is `--memory` of peer.py):
 *
 *   node --expose-gc child.js THREADS step|lmhead JSON
 *
 * Builds one case, runs it twice, forgets the peak so far, runs it twice again and prints {"base", "peak"}: bytes resident
 * before the first run, and at most during the last ones.
 */
import fs from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { type Dtype, native } from '../../ts/src/core/native.js'
import { lmHeadCase } from './kernels.js'
import { TrainStep } from './model.js'

/** A size of /proc/self/status in bytes. */
function status(key: string): number {
  const found = new RegExp(`^${key}:\\s+(\\d+) kB`, 'm').exec(fs.readFileSync('/proc/self/status', 'utf8'))
  return Number(found?.[1]) * 1024
}

const [threads, kind, text] = process.argv.slice(2)
const args = JSON.parse(text) as { folder: string; phase: 1 | 2; dtype: Dtype; lengths: number[] }
native.setThreads(Number(threads))
const runner =
  kind === 'lmhead' ? lmHeadCase(args.dtype) : await TrainStep.load(args.folder, args.phase, args.dtype, args.lengths)
// what building the inputs left behind is not the step's; buffers are given back in the background
;(globalThis as { gc?: () => void }).gc?.()
await setTimeout(300)
native.trim()
const base = status('VmRSS')
for (let run = 0; run < 4; run++) {
  if (run === 2) fs.writeFileSync('/proc/self/clear_refs', '5') // the peak starts again
  runner.run()
}
console.log(JSON.stringify({ base, peak: status('VmHWM') }))

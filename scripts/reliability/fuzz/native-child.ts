/** Fuzzes the native core in a process of its own. */
import fs from 'node:fs'
import { fuzzNative } from './native.js'

await fuzzNative(JSON.parse(process.argv[2]), (report) => {
  fs.writeSync(1, `${JSON.stringify(report)}\n`)
})

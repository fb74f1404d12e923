/** What this machine offers, and why not the rest: `npm run info [-- --json]`. */
import fs from 'node:fs'
import os from 'node:os'
import { Command } from 'commander'
import { type Capabilities, native } from '../ts/src/native.js'
import { fail } from './cli.js'

function described(c: Capabilities): string {
  const memory = c.memoryBytes ? `, ${(c.memoryBytes / 2 ** 30).toFixed(1)} GiB` : ''
  const products = c.products ? `; matrix products: ${c.products}` : ''
  return `${c.device}, level ${c.level}${c.name === 'cpu' ? `, ${c.threads} threads` : ''}${memory}${products}`
}

function main(o: { json?: boolean }): void {
  const { version } = JSON.parse(fs.readFileSync(new URL('../package.json', import.meta.url), 'utf8'))
  const [cpu, cuda] = [native.capabilities(), native.probeCuda()]
  if (o.json) {
    console.log(JSON.stringify({ version, node: process.version, os: os.version(), cpu, cuda }))
    return
  }
  console.log(`aligngpt ${version}, Node ${process.version}, ${os.type()} ${os.release()} ${process.arch}`)
  console.log(`cpu   ${described(cpu)}`)
  console.log(`cuda  ${typeof cuda === 'string' ? `not used: ${cuda}` : described(cuda)}`)
}

const command = new Command('info')
  .description('what this machine offers, and why not the rest')
  .option('--json', 'as JSON')
try {
  main(command.parse().opts())
} catch (e) {
  fail(e)
}

/** What this machine offers, and why not the rest. */
import os from 'node:os'
import type { Command } from 'commander'
import type { Capabilities } from '../../core/native.js'
import { version } from '../../util/package.js'

function described(c: Capabilities): string {
  const memory = c.memoryBytes ? `, ${(c.memoryBytes / 2 ** 30).toFixed(1)} GiB` : ''
  const products = c.products ? `; matrix products: ${c.products}` : ''
  return `${c.device}, level ${c.level}${c.name === 'cpu' ? `, ${c.threads} threads` : ''}${memory}${products}`
}

async function run(o: { json?: boolean }): Promise<void> {
  const { native } = await import('../../core/native.js')
  const [cpu, cuda] = [native.capabilities(), native.probeCuda()]
  if (o.json) {
    console.log(JSON.stringify({ version: version(), node: process.version, os: os.version(), cpu, cuda }))
    return
  }
  console.log(`aligngpt ${version()}, Node ${process.version}, ${os.type()} ${os.release()} ${process.arch}`)
  console.log(`cpu   ${described(cpu)}`)
  console.log(`cuda  ${typeof cuda === 'string' ? `not used: ${cuda}` : described(cuda)}`)
}

export function info(program: Command): void {
  program
    .command('info')
    .description('what this machine offers, and why not the rest')
    .option('--json', 'as JSON')
    .action(run)
}

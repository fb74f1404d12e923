/** An HTML page about a training run, or about several beside each other. */
import path from 'node:path'
import type { Command } from 'commander'
import { fileToWrite } from '../../util/paths.js'

async function run(runs: string[], o: { out?: string }): Promise<void> {
  const { writeReport } = await import('../../report/run-report.js')
  const file = o.out ?? path.join(runs.length === 1 ? runs[0] : '.', 'report.html')
  const page = fileToWrite('report', '--out', file)
  writeReport(page.file, runs)
  console.log(`report written to ${file}`)
}

export function report(program: Command): void {
  program
    .command('report')
    .description('HTML page with the curves, gate weights and options of training runs')
    .argument('<run...>', 'folders that pretrain or finetune wrote (--out); several are compared')
    .option('--out <file>', 'the page (default: report.html in the run; of several, in this folder)')
    .action(run)
}

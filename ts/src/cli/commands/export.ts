/** Writes an AlignGPT folder in the layout of another code. */
import { type Command, Option } from 'commander'
import type { ExportOptions } from '../../convert/export.js'
import { folderToWrite } from '../../util/paths.js'
import { describe, readingOptions } from './import.js'

interface Options extends ExportOptions {
  to: string
}

async function run(from: string, { to, ...options }: Options): Promise<void> {
  folderToWrite('export', '--to', to)
  const { exportModel } = await import('../../convert/export.js')
  const result = await exportModel(from, to, options)
  for (const line of describe(result, to)) console.log(line)
  if (options.dropAlignment && result.dropped.length)
    console.log('it was trained with an alignment vector in front of the picture: without one it answers differently')
}

export function exporting(program: Command): void {
  const command = program
    .command('export')
    .description('write a model for another code, as safetensors')
    .argument('<model>', 'AlignGPT folder, or any that `import` reads')
    .requiredOption('--to <dir>', 'the new folder')
    .addOption(
      new Option(
        '--format <layout>',
        'official AlignGPT, official LLaVA 1.5, transformers, or projector and alignment vectors alone',
      )
        .choices(['aligngpt', 'llava', 'llava-hf', 'projector'])
        .makeOptionMandatory(),
    )
    .option('--drop-alignment', 'leave out alignment vectors and gate, which a LLaVA has not')
    .option('--vision-tower <name>', 'llava: where the official code is to load CLIP from, a folder or Hub name')
  readingOptions(command)
    .addHelpText(
      'after',
      `
Examples:
  aligngpt export runs/finetune --to share/aligngpt --format aligngpt --dtype bf16
  aligngpt export models/base --adapter runs/lora/adapter --to share/merged --format aligngpt
  aligngpt export runs/finetune --to share/hf --format llava-hf --drop-alignment
  aligngpt export runs/pretrain --to share/projector --format projector`,
    )
    .action(run)
}

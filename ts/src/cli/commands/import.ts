/** Makes an AlignGPT folder of a checkpoint in another layout. */
import { type Command, Option } from 'commander'
import type { Converted } from '../../convert/folder.js'
import type { ConvertOptions } from '../../convert/tensors.js'
import { folderToWrite } from '../../util/paths.js'
import { atLeast, integer } from '../options.js'

interface Options extends ConvertOptions {
  to: string
}

/** What a conversion wrote, in lines. */
export function describe(c: Converted, to: string): string[] {
  const list = (names: readonly string[]): string => names.join(', ')
  return [
    `${to}: ${c.tensors} tensors, ${(c.bytes / 1e6).toFixed(1)} MB, from ${c.from}; mm_alignment: ${c.alignment}`,
    ...(c.fresh.length ? [`drawn from the seed, to be trained: ${list(c.fresh)}`] : []),
    ...(c.dropped.length ? [`left out: ${list(c.dropped)}`] : []),
  ]
}

async function run(from: string, { to, ...options }: Options): Promise<void> {
  folderToWrite('import', '--to', to)
  const { importModel } = await import('../../convert/import.js')
  const result = await importModel(from, to, options)
  for (const line of describe(result, to)) console.log(line)
  if (result.alignment === 'none')
    console.log('there are no alignment vectors in it: it answers as a LLaVA does; --levels 8 draws some, for pretrain')
}

/** The options that reading a checkpoint has in both directions. */
export const readingOptions = (command: Command): Command =>
  command
    .option('--clip <dir>', 'CLIP: the vision tower, where the checkpoint has no settings or weights of it')
    .addOption(new Option('--dtype <type>', 'of the weights written (default: each as it is)').choices(['f32', 'bf16']))
    .option('--adapter <dir>', 'merge this LoRA adapter')
    .option('--llm <dir>', 'LLaMA, for a file with a projector alone')
    .option('--levels <n>', 'draw N alignment vectors and a gate where there are none', atLeast(2))
    .option('--seed <n>', 'of what is drawn', integer, 0)

export function importing(program: Command): void {
  const command = program
    .command('import')
    .description('make an AlignGPT folder of an official AlignGPT, LLaVA 1.5, llava-hf, or a projector file')
    .argument('<from>', 'folder (safetensors or .bin, sharded or not), or file such as mm_projector_align.bin')
    .requiredOption('--to <dir>', 'the new folder')
  readingOptions(command)
    .addHelpText(
      'after',
      `
Examples:
  aligngpt import llava-1.5-7b-hf --to models/llava
  aligngpt import llava-v1.5-7b --clip clip-vit-large-patch14-336 --to models/llava --dtype bf16
  aligngpt import mm_projector_align.bin --llm vicuna-7b-v1.5 --clip clip-vit-large-patch14-336 --to models/pretrained`,
    )
    .action(run)
}

/** Asks an AlignGPT about a picture and streams the answer. */
import { type Command, Option } from 'commander'
import type { LoadOptions, Mix } from '../aligngpt.js'
import type { Style } from '../prompt.js'
import { integer, number } from './options.js'

interface Options {
  model: string
  image?: string
  clip?: string
  maxNewTokens: number
  temperature: number
  topP: number
  topK: number
  seed: number
  level?: number
  style: Style
  dtype: LoadOptions['dtype']
  device: LoadOptions['device']
}

async function run(prompt: string, o: Options): Promise<void> {
  const { AlignGPT } = await import('../aligngpt.js')
  const { model: folder, clip, dtype, device, level, ...sampling } = o
  const model = await AlignGPT.load(folder, { dtype, device, clip })
  const mix: Mix = level === undefined ? { mode: 'gate' } : { mode: 'level', level }
  let alpha: number[] | null = null
  for await (const piece of model.generate({ prompt, ...sampling, mix })) {
    process.stdout.write(piece.text)
    alpha = piece.alpha
  }
  process.stdout.write('\n')
  if (alpha)
    console.error(
      `alignment: ${alpha.map((a, i) => `${i === alpha!.length - 1 ? 'global' : i} ${a.toFixed(3)}`).join('  ')}`,
    )
  model.dispose()
}

export function chat(program: Command): void {
  program
    .command('chat')
    .description('ask about a picture')
    .argument('<question>')
    .requiredOption('--model <dir>', 'AlignGPT folder')
    .option('--image <file>', 'picture')
    .option('--clip <dir>', 'settings of the vision tower, where the config does not lead to them')
    .option('--max-new-tokens <n>', 'longest answer', integer, 256)
    .option('--temperature <x>', '0: the most likely answer', number, 0)
    .option('--top-p <x>', 'nucleus', number, 1)
    .option('--top-k <n>', '0: all', integer, 0)
    .option('--seed <n>', 'of sampling', integer, 0)
    .option('--level <k>', 'use the vector of one level instead of the gate', integer)
    .addOption(
      new Option('--style <name>', 'prompt style').choices(['vicuna_v1', 'llama_2', 'llama_3']).default('vicuna_v1'),
    )
    .option('--dtype <type>', 'f32 or bf16', 'f32')
    .option('--device <device>', 'auto, cpu or cuda', 'auto')
    .action(run)
}

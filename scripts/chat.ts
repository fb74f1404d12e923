/** Asks an AlignGPT about a picture and streams the answer. */
import { Command, Option } from 'commander'
import { AlignGPT, type Mix } from '../ts/src/aligngpt.js'
import { fail, integer, number } from './cli.js'

const command = new Command('chat')
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
  .parse()

try {
  const o = command.opts()
  const model = await AlignGPT.load(o.model, { dtype: o.dtype, clip: o.clip })
  const mix: Mix = o.level === undefined ? model.mix : { mode: 'level', level: o.level }
  const { maxNewTokens, temperature, topP, topK, seed, style, image } = o
  let alpha: number[] | null = null
  for await (const piece of model.generate({
    prompt: command.args[0],
    image,
    maxNewTokens,
    temperature,
    topP,
    topK,
    seed,
    style,
    mix,
  })) {
    process.stdout.write(piece.text)
    alpha = piece.alpha
  }
  process.stdout.write('\n')
  if (alpha)
    console.error(
      `alignment: ${alpha.map((a, i) => `${i === alpha!.length - 1 ? 'global' : i} ${a.toFixed(3)}`).join('  ')}`,
    )
  model.dispose()
} catch (e) {
  fail(e)
}

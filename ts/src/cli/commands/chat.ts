/** Asks an AlignGPT about a picture and streams the answer. */
import type { Command } from 'commander'
import {
  alphaLine,
  loadModel,
  type ModelOptions,
  modelOptions,
  type SamplingOptions,
  samplingOptions,
} from '../options.js'

interface Options extends ModelOptions, SamplingOptions {
  image?: string
}

/** Writes an answer as it comes. @returns the weights of its alignment vectors; null without a picture */
export async function stream(prompt: string, o: Options): Promise<number[] | null> {
  const { model, mix } = await loadModel(o)
  const { image, maxNewTokens, temperature, topP, topK, seed, style } = o
  let alpha: number[] | null = null
  for await (const piece of model.generate({
    prompt,
    ...{ image, maxNewTokens, temperature, topP, topK, seed, style, mix },
  })) {
    process.stdout.write(piece.text)
    alpha = piece.alpha
  }
  process.stdout.write('\n')
  model.dispose()
  return alpha
}

async function run(prompt: string, o: Options): Promise<void> {
  const alpha = await stream(prompt, o)
  if (alpha) console.error(alphaLine(alpha))
}

export function chat(program: Command): void {
  const command = program.command('chat').description('ask about a picture').argument('<question>')
  samplingOptions(modelOptions(command)).option('--image <file>', 'picture').action(run)
}

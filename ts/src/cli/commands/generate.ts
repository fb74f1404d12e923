/** Answers many questions from a file, in batches, or one that is streamed. */
import fs from 'node:fs'
import type { Command } from 'commander'
import {
  alphaLine,
  FOLLOW_LINKS,
  loadModel,
  type ModelOptions,
  modelOptions,
  positive,
  type SamplingOptions,
  samplingOptions,
} from '../options.js'
import { stream } from './chat.js'

interface Options extends ModelOptions, SamplingOptions {
  prompt?: string
  image?: string
  images?: string
  followLinks?: boolean
  out?: string
  batch: number
  showGate?: boolean
}

/** One line of the file. */
interface Asked {
  id?: string | number
  prompt: string
  image?: string
}

/** Reads every question before anything else is done. @throws AlignGPTError ERR_DATA naming file, record and key */
async function readAsked(file: string): Promise<Asked[]> {
  const [{ mismatch, show }, { parseBytes, splitRecords }] = await Promise.all([
    import('../../util/errors.js'),
    import('../../formats/record-file.js'),
  ])
  const asked: Asked[] = []
  await splitRecords(file, (bytes, offset) => {
    const { id, question, prompt = question, image } = parseBytes(bytes, file, offset) as Record<string, unknown>
    const refuse = (key: string, expected: string, got: unknown): never => {
      throw mismatch('ERR_DATA', 'generate', `${file}: record ${asked.length} ${key}`, expected, show(got))
    }
    if (typeof prompt !== 'string') return refuse('prompt', 'a string', prompt)
    const missing = image === undefined || image === null
    if (!missing && (typeof image !== 'string' || image === '')) return refuse('image', 'a file name', image)
    if (id !== undefined && typeof id !== 'string' && typeof id !== 'number')
      return refuse('id', 'a string or number', id)
    asked.push({ id, prompt, image: missing ? undefined : (image as string) })
  })
  return asked
}

async function answerFile(file: string, o: Options): Promise<void> {
  const asked = await readAsked(file)
  const [{ generateBatch }, { hearing }] = await Promise.all([
    import('../../inference/generate.js'),
    import('../signals.js'),
  ])
  const { resolveImage } = await import('../../processing/image/source.js')
  const find = (image: string): string => (o.images === undefined ? image : resolveImage(o.images, image, o))
  const { model, mix } = await loadModel(o)
  const { maxNewTokens, temperature, topP, topK, seed, style } = o
  const out = o.out === undefined ? process.stdout.fd : fs.openSync(o.out, 'w')
  const answer = async (at: number): Promise<void> => {
    const part = asked.slice(at, at + o.batch)
    // a stream for each question of the file: the size of a batch changes no draw
    const requests = part.map(({ prompt, image }, i) => ({
      prompt,
      ...(image && { image: find(image) }),
      stream: at + i,
    }))
    const answers = await generateBatch(model, requests, {
      ...{ maxNewTokens, temperature, topP, topK, seed, style, mix },
    })
    const lines = answers.map(({ text, finish, ids, alpha }, i) =>
      JSON.stringify({ ...part[i], text, finish, tokens: ids.length, ...(o.showGate && { alpha }) }),
    )
    fs.writeSync(out, `${lines.join('\n')}\n`)
    if (process.stderr.isTTY && o.out !== undefined)
      process.stderr.write(`\r${at + part.length}/${asked.length} answered`)
  }
  await hearing('finishing the answers of this batch', async (signals) => {
    for (let at = 0; at < asked.length; at += o.batch) {
      if (signals.heard) {
        console.error(`stopped: ${at} of ${asked.length} answered`)
        break
      }
      await answer(at)
    }
  })
  if (process.stderr.isTTY && o.out !== undefined) process.stderr.write('\n')
  model.dispose()
}

async function run(this: Command, file: string | undefined, o: Options): Promise<void> {
  if ((file === undefined) === (o.prompt === undefined))
    this.error('error: expected a file of questions or --prompt TEXT, one of them')
  if (file !== undefined && o.image !== undefined) this.error('error: --image goes with --prompt; a file names its own')
  if (file !== undefined) return answerFile(file, o)
  if (o.out !== undefined || o.images !== undefined) this.error('error: --out and --images go with a file of questions')
  const alpha = await stream(o.prompt as string, o)
  if (o.showGate && alpha) console.error(alphaLine(alpha))
}

export function generate(program: Command): void {
  const command = program
    .command('generate')
    .description('answer the questions of a file, or one')
    .argument(
      '[questions]',
      'JSON lines of {"prompt": "...", "image": "a.png", "id": 1}, or "question"; image and id may be missing',
    )
    .option('--prompt <text>', 'one question instead of a file; its answer is streamed')
    .option('--image <file>', 'its picture')
    .option('--images <dir>', 'folder that the pictures of a file lie in (default: names are paths)')
    .option(...FOLLOW_LINKS)
    .option('--out <file>', 'JSON lines with text, finish and tokens beside each question (default: standard output)')
    .option('--batch <n>', 'questions answered at once', positive, 8)
    .option('--show-gate', 'with the weights of the alignment vectors (alpha)')
  samplingOptions(modelOptions(command)).action(run)
}

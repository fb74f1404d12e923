/** Answers many questions from a file, in batches, or one that is streamed. */
import type { Command } from 'commander'
import type { Generated } from '../../inference/generate.js'
import type { FileQuestion } from '../../inference/question-file.js'
import type { GenerateRequest } from '../../inference/request.js'
import type { AlignGPTError } from '../../util/errors.js'
import type { LineFile } from '../line-file.js'
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

/** Answers the questions in batches; writes the lines of each when it is there. @returns how many were not answered */
async function answerAll(asked: readonly FileQuestion[], out: LineFile, o: Options): Promise<number> {
  const [{ generateBatch }, { answerLine }, { hearing }, { openImages, readImage }] = await Promise.all([
    import('../../inference/generate.js'),
    import('../../inference/question-file.js'),
    import('../signals.js'),
    import('../../processing/image/source.js'),
  ])
  const pictures = o.images === undefined ? null : await openImages(o.images, o)
  const { model, mix } = await loadModel(o)
  const { maxNewTokens, temperature, topP, topK, seed, style } = o
  const options = { maxNewTokens, temperature, topP, topK, seed, style, mix, keepGoing: true }
  const bar = process.stderr.isTTY && out.temporary !== null
  let failed = 0
  const tell = ({ name }: FileQuestion, error: Error): void => {
    failed++
    console.error(`not answered: ${name}: ${error.message.replace(`${name} `, '')}`)
  }
  /** The request, with its picture where that is; a question without one has an error. */
  const requestOf = (q: FileQuestion, at: number): GenerateRequest | null => {
    const { request } = q
    if (!request) return null
    const { image } = request
    try {
      // a stream for each question of the file: the size of a batch changes no draw
      return {
        ...request,
        ...(image && pictures && { image: readImage(pictures.locate(image)), name: image }),
        stream: at,
      }
    } catch (e) {
      if ((e as { code?: unknown }).code !== 'ERR_IMAGE') throw e
      q.error = e as AlignGPTError
      return null
    }
  }
  const answer = async (at: number): Promise<void> => {
    const part = asked.slice(at, at + o.batch)
    const requests = part.map((q, i) => requestOf(q, at + i))
    const answers = (
      await generateBatch(
        model,
        requests.filter((r) => r !== null),
        options,
      )
    ).values()
    const lines = part.map((q, i) => {
      const a = requests[i] ? (answers.next().value as Generated) : { error: q.error }
      if (a.error) tell(q, a.error)
      return answerLine(q, a, o.showGate)
    })
    await out.write(`${lines.join('\n')}\n`)
    if (bar) process.stderr.write(`\r${at + part.length}/${asked.length} answered`)
  }
  const stopped = await hearing('finishing the answers of this batch', async (signals) => {
    for (let at = 0; at < asked.length; at += o.batch) {
      if (signals.heard) return at
      await answer(at)
    }
    return null
  })
  if (bar) process.stderr.write('\n')
  model.dispose()
  if (stopped === null) out.finish()
  else {
    out.leave()
    const where = out.temporary !== null && stopped > 0 ? `: in ${out.temporary}` : ''
    console.error(`stopped: ${stopped} of ${asked.length} answered${where}`)
  }
  return failed
}

async function answerFile(file: string, o: Options): Promise<void> {
  const [{ readQuestionFile }, { openLines }] = await Promise.all([
    import('../../inference/question-file.js'),
    import('../line-file.js'),
  ])
  const asked = await readQuestionFile(file)
  const out = openLines('generate', '--out', o.out)
  let failed: number
  try {
    failed = await answerAll(asked, out, o)
  } catch (e) {
    out.leave()
    throw e
  }
  if (failed) {
    console.error(`${failed} of ${asked.length} questions not answered: their lines say why (error)`)
    process.exitCode ??= 1
  }
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
      'JSON lines of {"prompt": "...", "image": "a.png"}; the question may be under question, text, conversations or messages too',
    )
    .option('--prompt <text>', 'one question instead of a file; its answer is streamed')
    .option('--image <file>', 'its picture')
    .option(
      '--images <dir>',
      'folder of the pictures of a file, or shards/{00000..00009}.tar (default: names are paths)',
    )
    .option(...FOLLOW_LINKS)
    .option(
      '--out <file>',
      'JSON lines with text, finish and tokens beside each question, replaced when all are there (default: standard output)',
    )
    .option('--batch <n>', 'questions answered at once', positive, 8)
    .option('--show-gate', 'with the weights of the alignment vectors (alpha)')
  samplingOptions(modelOptions(command))
    .addHelpText(
      'after',
      `
All keys of a question come back. One that cannot be answered has an "error" in place of a text, at its place; the exit status is 1 then.
Answers so far are in FILE.part, also after a signal.`,
    )
    .action(run)
}

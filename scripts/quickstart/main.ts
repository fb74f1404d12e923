/**
 * Everything the paper describes, on real pictures, in a few minutes on two cores and without any download:
 * scores -> levels -> pre-training -> instruction tuning -> answers with the gate's weights. `--fast` takes a minute and
 * shows the way rather than results.
 */
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { AlignGPT } from '../ts/src/aligngpt.js'
import { native } from '../ts/src/core/native.js'
import { loadDataset } from '../ts/src/data/dataset.js'
import { evaluate, type Question } from '../ts/src/evaluation/evaluate.js'
import { generateBatch } from '../ts/src/inference/generate.js'
import { bucketLevels, type Levels, writeLevels } from '../ts/src/levels/bucket.js'
import { clipScores } from '../ts/src/levels/clip-scores.js'
import { loadClip } from '../ts/src/models/load.js'
import { saveTokenizer, trainBpe, trainClipBpe } from '../ts/src/processing/bpe-trainer.js'
import { readPreprocessor } from '../ts/src/processing/preprocessor-config.js'
import { Tokenizer } from '../ts/src/processing/tokenizer.js'
import { finetune, pretrain, type StepInfo } from '../ts/src/train/trainer.js'
import {
  prepareData,
  type QuickstartData,
  readHalves,
  readQuality,
  readQuestions,
  readText,
  tokenizerTexts,
} from './quickstart/data.js'
import { pictureName, TRAINING_STYLES } from './quickstart/emoji.js'
import { QUALITIES, type Quality, TESTS } from './quickstart/records.js'
import {
  type AnswerExample,
  type LevelExample,
  type QuickstartResult,
  type Scores,
  writeReport,
} from './quickstart/report.js'
import { PHASE_1, PHASE_2, SCORES, VISION } from './quickstart/settings.js'
import {
  type Budget,
  type ClipPair,
  clipCaptions,
  Pictures,
  trainClip,
  trainLlama,
  writeClipConfig,
  writeLlamaConfig,
} from './quickstart/towers.js'

const { values: args } = parseArgs({
  options: { fast: { type: 'boolean', default: false }, out: { type: 'string', default: 'runs/quickstart' } },
})
const LEVELS = 8
const SEED = 1
const SIZE = args.fast
  ? { clip: 60, half: 40, llama: 60, pretrain: 8, finetune: 20, clipBatch: 64, versions: 2 }
  : { clip: 2000, half: 400, llama: 1500, pretrain: 100, finetune: 2400, clipBatch: 128, versions: 8 }

const seconds: Record<string, number> = {}
async function stage<T>(name: string, what: string, run: () => Promise<T>): Promise<T> {
  const began = performance.now()
  console.log(`\n== ${what}`)
  const result = await run()
  seconds[name] = (performance.now() - began) / 1000
  console.log(`   ${seconds[name].toFixed(1)} s`)
  return result
}
/** Prints a loss ten times over a run. */
function meter(steps: number): Budget {
  const every = Math.max(1, Math.floor(steps / 10))
  return {
    steps,
    onStep: (step, loss) =>
      void (step % every === 0 && console.log(`   step ${step}/${steps} loss ${loss.toFixed(3)}`)),
  }
}

function makeTokenizers(d: QuickstartData, clipDir: string, llmDir: string): void {
  const texts = tokenizerTexts(d)
  const clip = trainClipBpe(texts.clip, { vocabSize: 2048 })
  saveTokenizer(clip, clipDir)
  writeClipConfig(clipDir, clip.vocabSize)
  const llm = trainBpe(texts.llm, { vocabSize: 2048 })
  saveTokenizer(llm, llmDir)
  writeLlamaConfig(llmDir, llm.vocabSize)
}

/** Scores each pair with a CLIP trained on the other half: one that has seen a pair cannot judge it. */
async function scorePairs(d: QuickstartData, clipDir: string, pictures: Pictures, out: string): Promise<number[]> {
  const data = await loadDataset(d.pairs, { images: d.images })
  const records = [...data]
  const halves = readHalves(d)
  const scores = new Array<number>(records.length)
  for (const half of [0, 1]) {
    const dir = path.join(out, `clip-half-${half}`)
    fs.cpSync(clipDir, dir, { recursive: true })
    const seen: ClipPair[] = records
      .filter((r) => halves[r.id] === half)
      .map((r) => ({ image: r.image as string, captions: [r.conversations[1].value] }))
    await trainClip(dir, pictures, seen, { ...meter(SIZE.half), batch: SIZE.clipBatch, lr: 1e-3, seed: 11 + half })
    const clip = loadClip(dir)
    const judged = records.flatMap((r, i) => (halves[r.id] === half ? [] : [i]))
    const pairs = judged.map((i) => ({
      id: records[i].id,
      image: path.join(d.images, records[i].image as string),
      caption: records[i].conversations[1].value,
    }))
    const result = await clipScores(clip, Tokenizer.load(dir), readPreprocessor(dir), pairs)
    for (const [k, i] of judged.entries()) scores[i] = result.scores[k]
    clip.dispose()
  }
  return scores
}

/** Probability that a right caption scores higher than a wrong one. */
function auc(scores: readonly number[], wrong: readonly boolean[]): number {
  const order = scores.map((_, i) => i).sort((a, b) => scores[a] - scores[b])
  let [below, sum] = [0, 0]
  for (const i of order) {
    if (wrong[i]) below++
    else sum += below
  }
  const right = wrong.filter((w) => !w).length
  return sum / Math.max(1, below * right)
}

async function main(): Promise<void> {
  const out = path.resolve(args.out)
  const done = path.join(out, 'result.json')
  if (fs.existsSync(out) && !fs.existsSync(done))
    console.log(`An earlier run in ${out} did not finish; starting from the beginning.`)
  fs.rmSync(out, { recursive: true, force: true })
  fs.mkdirSync(out, { recursive: true })
  for (const [signal, code] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)
    process.once(signal, () => {
      console.error(
        `\nInterrupted: ${out} is unfinished. Start again with the same command; nothing has to be removed first.`,
      )
      process.exit(code)
    })
  const { level, threads } = native.capabilities()
  console.log(
    `AlignGPT quickstart, ${args.fast ? 'fast' : 'full'}: CPU level ${level}, ${threads} threads, writing to ${out}`,
  )

  const [clipDir, llmDir] = ['clip', 'llm'].map((n) => path.join(out, 'models', n))
  const d = await stage('data', 'Data: real pictures and names, written as LLaVA JSON', async () => {
    const data = await prepareData(out, { fast: args.fast, seed: SEED })
    makeTokenizers(data, clipDir, llmDir)
    return data
  })
  const names = d.emoji.flatMap((e) => TRAINING_STYLES.map((style) => pictureName(style, e)))
  const pictures = await stage('augment', `Augmenting ${names.length} pictures`, () =>
    Pictures.load(d.images, names, SIZE.versions, readPreprocessor(clipDir), 5),
  )
  const scores = await stage('levels', 'Alignment scores: two CLIPs, each judges the half it has not seen', () =>
    scorePairs(d, clipDir, pictures, path.join(out, 'models')),
  )

  const data = await loadDataset(d.pairs, { images: d.images })
  const cut = bucketLevels(scores, LEVELS, 'width')
  await writeLevels(data, cut.levels)
  fs.writeFileSync(path.join(out, SCORES), JSON.stringify(scores))
  const quality = readQuality(d)
  const qualities = [...data].map((r) => quality[r.id])
  const levels = describeLevels(scores, qualities, cut)
  console.log(
    `   wrong captions: AUC ${levels.auc.toFixed(3)}, ${(100 * levels.wrongInLowestQuarter).toFixed(0)} % in the lowest quarter; levels ${cut.histogram.join(' ')}`,
  )

  const clipCurve = await stage('clip', 'CLIP on all training pictures (stands in for OpenAI’s)', () => {
    const pairs = d.emoji.flatMap((e) =>
      TRAINING_STYLES.map((style) => ({
        image: pictureName(style, e),
        captions: clipCaptions(e),
        category: e.category,
      })),
    )
    return trainClip(clipDir, pictures, pairs, { ...meter(SIZE.clip), batch: SIZE.clipBatch, lr: 1.5e-3, seed: 7 })
  })
  const conversations = await loadDataset(d.conversations)
  const llamaCurve = await stage('llama', 'LLaMA on text (stands in for Vicuna)', () =>
    trainLlama(llmDir, readText(d), [...conversations], { ...meter(SIZE.llama), batch: 32, lr: 2e-3, seed: 3 }),
  )

  const model = await AlignGPT.create({ llm: llmDir, clip: clipDir, levels: LEVELS, ...VISION }, { seed: SEED })
  /** Prints the loss now and then, at the end also what the steps spent waiting for pictures. */
  const show = (steps: number) => {
    const m = meter(steps)
    let [waited, all] = [0, 0]
    return (s: StepInfo): void => {
      m.onStep?.(s.step, s.loss)
      const took = s.tokens / s.tokensPerSecond
      waited += s.waited * took
      all += took
      if (s.step === steps - 1)
        console.log(`   waited for pictures: ${((100 * waited) / all).toFixed(1)} % of ${all.toFixed(1)} s`)
    }
  }
  const first = await stage('pretrain', 'Phase 1, pre-training: projector and alignment vectors', () =>
    pretrain(model, data, { ...PHASE_1, steps: SIZE.pretrain, onStep: show(SIZE.pretrain) }),
  )
  const instructions = await loadDataset(d.instructions, { images: d.images })
  const second = await stage('finetune', 'Phase 2, instruction tuning: language model, projector and gate', () =>
    finetune(model, instructions, { ...PHASE_2, steps: SIZE.finetune, onStep: show(SIZE.finetune) }),
  )
  await model.save(path.join(out, 'model'))

  const [accuracy, blind, chance, questions] = [{}, {}, {}, {}] as Scores[]
  await stage('test', 'Test on pictures in a style no training has seen', async () => {
    for (const test of TESTS) {
      const e = await evaluate(model, readQuestions(d, test), { images: d.images, batch: 32 })
      accuracy[test] = e.accuracy
      blind[test] = e.blind as number
      chance[test] = e.chance as number
      questions[test] = e.count
      console.log(
        `   ${test}: ${(100 * e.accuracy).toFixed(1)} %, blind ${(100 * (e.blind as number)).toFixed(1)} %, chance ${(100 * (e.chance as number)).toFixed(1)} % (${e.count} questions)`,
      )
    }
  })
  const sampled = await answerSome(model, d)
  model.dispose()

  const result: QuickstartResult = {
    accuracy,
    blind,
    chance,
    questions,
    levels,
    seconds,
    loss: { clip: clipCurve, llm: llamaCurve, pretrain: first.loss, finetune: second.loss },
  }
  const levelExamples = cut.histogram.flatMap((_, level) =>
    [...cut.levels.keys()]
      .filter((i) => cut.levels[i] === level)
      .slice(0, 6)
      .map((i): LevelExample => {
        const r = data.record(i)
        const image = path.join(d.images, r.image as string)
        return { level, image, caption: r.conversations[1].value, score: scores[i], quality: qualities[i] }
      }),
  )
  writeReport(path.join(out, 'report.html'), result, {
    fast: args.fast,
    seed: SEED,
    date: new Date().toISOString().slice(0, 16).replace('T', ' '),
    machine: `CPU level ${level}, ${threads} threads`,
    facts: [
      ...Object.entries(d.counts).map(([k, v]): [string, string] => [k, String(v)]),
      ...Object.entries(SIZE).map(([k, v]): [string, string] => [`steps or size: ${k}`, String(v)]),
    ],
    levelExamples,
    answers: sampled,
  })
  fs.writeFileSync(done, `${JSON.stringify(result, null, 2)}\n`)
  for (const s of [data, instructions, conversations]) s.close()
  const rel = path.relative('.', out)
  console.log(`
Report:  ${path.join(rel, 'report.html')}
Numbers: ${path.join(rel, 'result.json')}

Ask it yourself:
  npm run chat -- --model ${rel}/model --image ${rel}/data/images/fluent/${path.basename(readQuestions(d, 'name')[0].image)} "What is this?"
Train on a folder of your own:
  npm run levels   -- pairs.json --images DIR --clip ${rel}/models/clip
  npm run pretrain -- --llm ${rel}/models/llm --clip ${rel}/models/clip --data pairs.json --images DIR --out runs/mine-1
  npm run finetune -- --model runs/mine-1 --data instructions.json --images DIR --out runs/mine-2`)
}

/** How the scores sort the captions that are wrong on purpose. */
function describeLevels(
  scores: readonly number[],
  qualities: readonly Quality[],
  cut: Levels,
): QuickstartResult['levels'] {
  const wrong = qualities.map((q) => q === 'wrong')
  const quarter = [...scores].sort((a, b) => a - b)[Math.floor(scores.length / 4)]
  const wrongCount = Math.max(1, wrong.filter((w) => w).length)
  const byQuality = Object.fromEntries(
    QUALITIES.map((q) => [
      q,
      cut.histogram.map((_, l) => qualities.filter((x, i) => x === q && cut.levels[i] === l).length),
    ]),
  ) as Record<Quality, number[]>
  return {
    wrongInLowestQuarter: scores.filter((s, i) => wrong[i] && s < quarter).length / wrongCount,
    auc: auc(scores, wrong),
    edges: [...cut.edges],
    byQuality,
  }
}

/** A few generated answers with the gate's weights, for the report. */
async function answerSome(model: AlignGPT, d: QuickstartData): Promise<AnswerExample[]> {
  const list: Question[] = TESTS.flatMap((test) => readQuestions(d, test).slice(0, 5))
  const files = list.map((q) => path.join(d.images, q.image as string))
  const requests = list.map((q, i) => ({ prompt: q.question, image: files[i] }))
  const given = await generateBatch(model, requests, { maxNewTokens: 16 })
  return list.map((q, i) => ({
    image: files[i],
    question: q.question,
    expected: q.answer,
    given: given[i].text,
    correct: given[i].text.toLowerCase() === q.answer.toLowerCase(),
    gate: (given[i].alpha ?? []).slice(0, -1),
  }))
}

await main()

/**
 * Everything the paper describes, on real pictures, in a few minutes on two cores and without any download:
 * scores -> levels -> pre-training -> instruction tuning -> answers with the gate's weights. `--fast` takes a minute and
 * shows the way rather than results.
 */
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { AlignGPT, loadClip } from '../ts/src/aligngpt.js'
import { saveTokenizer, trainBpe, trainClipBpe } from '../ts/src/bpe.js'
import { loadDataset } from '../ts/src/data.js'
import { evaluate, type Question } from '../ts/src/evaluate.js'
import { generateBatch } from '../ts/src/generate.js'
import { bucketLevels, writeLevels } from '../ts/src/levels.js'
import { native } from '../ts/src/native.js'
import { DEFAULT_SYSTEM } from '../ts/src/prompt.js'
import { clipScores } from '../ts/src/score.js'
import { Tokenizer } from '../ts/src/tokenizer.js'
import { finetune, pretrain } from '../ts/src/train.js'
import { prepareData, type QuickstartData, type Thing } from './quickstart/data.js'
import { type Example, type Result, type Sampled, writeReport } from './quickstart/report.js'
import {
  type Budget,
  type ClipPair,
  clipCaptions,
  Pictures,
  readPreprocessor,
  trainClip,
  trainLlama,
  writeClipConfig,
  writeLlamaConfig,
} from './quickstart/towers.js'

const { values: args } = parseArgs({
  options: { fast: { type: 'boolean', default: false }, out: { type: 'string', default: 'runs/quickstart' } },
})
const LEVELS = 8
const SIZE = args.fast
  ? { clip: 60, half: 40, llama: 60, pretrain: 8, finetune: 20, clipBatch: 64, versions: 2 }
  : { clip: 1250, half: 230, llama: 800, pretrain: 60, finetune: 420, clipBatch: 128, versions: 6 }

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
  const captions = d.things.flatMap(clipCaptions)
  const clip = trainClipBpe(captions, { vocabSize: 1500 })
  saveTokenizer(clip, clipDir)
  writeClipConfig(clipDir, clip.vocabSize)
  const prompt = `${DEFAULT_SYSTEM.vicuna_v1} USER: ASSISTANT:`
  const instructions = JSON.parse(fs.readFileSync(d.instructions, 'utf8')) as { conversations: { value: string }[] }[]
  const spoken = instructions
    .slice(0, 3000)
    .flatMap((r) => r.conversations.map((t) => t.value.replace('<image>', '').trim()))
  const texts = [
    ...d.texts,
    ...d.dialogues.flatMap((x) => [x.question, x.answer]),
    ...spoken,
    ...Array<string>(500).fill(prompt),
  ]
  const llm = trainBpe(texts, { vocabSize: 1600 })
  saveTokenizer(llm, llmDir)
  writeLlamaConfig(llmDir, llm.vocabSize)
}

/** Both renderings of a thing are in the same half, so a CLIP never judges a thing it has seen. */
const halfOf = (t: Thing, d: QuickstartData): number => d.things.indexOf(t) % 2

/** Scores each pair with a CLIP trained on the other half: one that has seen a pair cannot judge it. */
async function scorePairs(d: QuickstartData, clipDir: string, pictures: Pictures, out: string): Promise<number[]> {
  const data = await loadDataset(d.pairs, { images: d.images })
  const records = [...data]
  const scores = new Array<number>(records.length)
  for (const half of [0, 1]) {
    const dir = path.join(out, `clip-half-${half}`)
    fs.cpSync(clipDir, dir, { recursive: true })
    const seen: ClipPair[] = records
      .filter((r) => halfOf(d.thingOf.get(r.id) as Thing, d) === half)
      .map((r) => ({ image: r.image as string, captions: [r.conversations[1].value] }))
    await trainClip(dir, pictures, seen, { ...meter(SIZE.half), batch: SIZE.clipBatch, lr: 1e-3, seed: 11 + half })
    const clip = loadClip(dir)
    const judged = records.flatMap((r, i) => (halfOf(d.thingOf.get(r.id) as Thing, d) === half ? [] : [i]))
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
    console.log(`An earlier run in ${out} did not finish; starting again.`)
  fs.rmSync(out, { recursive: true, force: true })
  fs.mkdirSync(out, { recursive: true })
  const { level, threads } = native.capabilities()
  console.log(
    `AlignGPT quickstart, ${args.fast ? 'fast' : 'full'}: CPU level ${level}, ${threads} threads, writing to ${out}`,
  )

  const [clipDir, llmDir] = ['clip', 'llama'].map((n) => path.join(out, 'models', n))
  const d = await stage('data', 'Data: real pictures and names, written as LLaVA JSON', async () => {
    const data = await prepareData(path.join(out, 'data'), { fast: args.fast })
    makeTokenizers(data, clipDir, llmDir)
    return data
  })
  const names = d.things.flatMap((t) => [t.noto, t.twemoji].filter((f) => f !== null))
  const pictures = await stage('augment', `Augmenting ${names.length} pictures`, () =>
    Pictures.load(d.images, names, SIZE.versions, readPreprocessor(clipDir), 5),
  )
  const scores = await stage('levels', 'Alignment scores: two CLIPs, each judges the half it has not seen', () =>
    scorePairs(d, clipDir, pictures, path.join(out, 'models')),
  )

  const data = await loadDataset(d.pairs, { images: d.images })
  const ids = [...data].map((r) => r.id)
  const wrong = ids.map((id) => d.quality.get(id) === 'wrong')
  const cut = bucketLevels(scores, LEVELS, 'width')
  await writeLevels(data, cut.levels)
  const quarter = [...scores].sort((a, b) => a - b)[Math.floor(scores.length / 4)]
  const wrongCount = wrong.filter((w) => w).length
  const levels = {
    wrongInLowestQuarter: scores.filter((s, i) => wrong[i] && s < quarter).length / Math.max(1, wrongCount),
    auc: auc(scores, wrong),
    histogram: cut.histogram,
    wrong: cut.histogram.map((_, l) => wrong.filter((w, i) => w && cut.levels[i] === l).length),
  }
  console.log(
    `   wrong captions: AUC ${levels.auc.toFixed(3)}, ${(100 * levels.wrongInLowestQuarter).toFixed(0)} % in the lowest quarter; levels ${cut.histogram.join(' ')}`,
  )

  const clipCurve = await stage('clip', 'CLIP on all training pictures (stands in for OpenAI’s)', () => {
    const pairs = d.things.flatMap((t) =>
      [t.noto, t.twemoji].flatMap((image) => (image ? [{ image, captions: clipCaptions(t) }] : [])),
    )
    return trainClip(clipDir, pictures, pairs, { ...meter(SIZE.clip), batch: SIZE.clipBatch, lr: 1e-3, seed: 7 })
  })
  const llamaCurve = await stage('llama', 'LLaMA on text (stands in for Vicuna)', () =>
    trainLlama(llmDir, d.texts, d.dialogues, { ...meter(SIZE.llama), batch: 32, lr: 2e-3, seed: 3 }),
  )

  const model = await AlignGPT.create({ llm: llmDir, clip: clipDir, levels: LEVELS }, { seed: 1 })
  const show = (steps: number) => {
    const m = meter(steps)
    return (s: { step: number; loss: number }): void => m.onStep?.(s.step, s.loss)
  }
  const first = await stage('pretrain', 'Phase 1, pre-training: projector and alignment vectors', () =>
    pretrain(model, data, {
      batch: 64,
      steps: SIZE.pretrain,
      lr: 2e-3,
      augment: true,
      onStep: show(SIZE.pretrain),
      progress: false,
    }),
  )
  const instructions = await loadDataset(d.instructions, { images: d.images })
  const second = await stage('finetune', 'Phase 2, instruction tuning: language model, projector and gate', () =>
    finetune(model, instructions, {
      batch: 32,
      microBatch: 32,
      steps: SIZE.finetune,
      lr: 8e-4,
      augment: true,
      onStep: show(SIZE.finetune),
      progress: false,
    }),
  )
  await model.save(path.join(out, 'model'))

  const kinds = ['yesno', 'category', 'name'] as const
  const [accuracy, blind, chance] = [{}, {}, {}] as Result['accuracy'][]
  await stage('test', 'Test on pictures in a style no training has seen', async () => {
    for (const kind of kinds) {
      const list = kind === 'name' ? d.questions.name.slice(0, args.fast ? 24 : 160) : d.questions[kind]
      const e = await evaluate(model, list, { images: d.images, batch: 32 })
      accuracy[kind] = e.accuracy
      blind[kind] = e.blind as number
      chance[kind] = e.chance as number
      console.log(
        `   ${kind}: ${(100 * e.accuracy).toFixed(1)} %, blind ${(100 * (e.blind as number)).toFixed(1)} %, chance ${(100 * (e.chance as number)).toFixed(1)} % (${e.count} questions)`,
      )
    }
  })
  const sampled = await answerSome(model, d)
  model.dispose()

  const result: Result = {
    accuracy,
    blind,
    chance,
    levels,
    seconds: { ...seconds, total: Object.values(seconds).reduce((a, b) => a + b, 0) },
    loss: { clip: clipCurve, llama: llamaCurve, pretrain: first.loss, finetune: second.loss },
    settings: { things: d.things.length, pairs: ids.length, levels: LEVELS, ...SIZE, cpu: level, threads },
  }
  const examples = cut.histogram.map((_, l): Example[] =>
    ids
      .flatMap((_id, i) => (cut.levels[i] === l ? [i] : []))
      .slice(0, 6)
      .map((i) => {
        const r = data.record(i)
        return {
          picture: fs.readFileSync(path.join(d.images, r.image as string)),
          caption: r.conversations[1].value,
          ...(wrong[i] && { note: 'wrong on purpose' }),
        }
      }),
  )
  writeReport(path.join(out, 'report.html'), result, examples, sampled)
  fs.writeFileSync(done, `${JSON.stringify(result, null, 2)}\n`)
  for (const s of [data, instructions]) s.close()
  const rel = path.relative('.', out)
  console.log(`
Report:  ${path.join(rel, 'report.html')}
Numbers: ${path.join(rel, 'result.json')}

Ask it yourself:
  npm run chat -- --model ${rel}/model --image ${rel}/data/images/fluent/${d.things.find((t) => t.fluent)?.code}.png "What is this?"
Train on a folder of your own:
  npm run levels   -- --data pairs.json --images DIR --clip ${rel}/models/clip
  npm run pretrain -- --llm ${rel}/models/llm --clip ${rel}/models/clip --data pairs.json --images DIR --out runs/mine-1
  npm run finetune -- --model runs/mine-1 --data instructions.json --images DIR --out runs/mine-2`)
}

/** A few generated answers with the gate's weights, for the report. */
async function answerSome(model: AlignGPT, d: QuickstartData): Promise<Sampled[]> {
  const list: Question[] = [
    ...d.questions.category.slice(0, 4),
    ...d.questions.yesno.slice(6, 10),
    ...d.questions.name.slice(0, 4),
  ]
  const files = list.map((q) => path.join(d.images, q.image as string))
  const given = await generateBatch(
    model,
    list.map((q, i) => ({ prompt: q.question, image: files[i] })),
    { maxNewTokens: 16 },
  )
  return list.map((q, i) => ({
    picture: fs.readFileSync(files[i]),
    question: q.question,
    answer: q.answer,
    given: given[i].text,
    alpha: given[i].alpha ?? [],
  }))
}

await main()

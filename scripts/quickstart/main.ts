/**
 * Everything the paper describes, on real pictures, in a few minutes on two cores and without any download:
 * scores -> levels -> pre-training -> instruction tuning -> answers with the gate's weights.
 *
 *   npm run quickstart [-- --fast] [-- --from-scratch] [-- --out DIR]
 *
 * It starts from the small towers of the repository, as one starts from OpenAI's CLIP and Vicuna; --from-scratch
 * trains them first and says whether they are the same. --fast takes half a minute and shows the way rather than
 * results.
 */
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import {
  AlignGPT,
  type Dataset,
  evaluate,
  finetune,
  loadDataset,
  pretrain,
  type Question,
  type StepInfo,
} from 'aligngpt'
import { cpuInfo } from 'aligngpt/core'
import { bucketLevels, type Levels, writeLevels } from 'aligngpt/data'
import { clipScores, loadClip } from 'aligngpt/models'
import { prepareData, type QuickstartData, readHalves, readQuality, readQuestions } from './data.js'
import { different, FAST, FULL, shippedMaking, TOWERS, TowerMaker, takeShipped } from './made.js'
import { QUALITIES, type Quality, TESTS } from './records.js'
import { type AnswerExample, type LevelExample, type QuickstartResult, type Scores, writeReport } from './report.js'
import { PHASE_1, PHASE_2, SCORES, SEED, VISION } from './settings.js'
import type { Budget } from './towers.js'

const { values: args } = parseArgs({
  options: {
    fast: { type: 'boolean', default: false },
    'from-scratch': { type: 'boolean', default: false },
    out: { type: 'string', default: 'runs/quickstart' },
  },
})
const LEVELS = 8
const STEPS = args.fast ? { pretrain: 8, finetune: 20 } : { pretrain: 100, finetune: 2800 }

const percent = (v: number): string => `${(100 * v).toFixed(1)} %`
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
/** Prints the loss of a phase now and then, at the end also what the steps spent waiting for pictures. */
function show(steps: number): (s: StepInfo) => void {
  const m = meter(steps)
  let [waited, all] = [0, 0]
  return (s) => {
    m.onStep?.(s.step, s.loss)
    const took = s.tokens / s.tokensPerSecond
    waited += s.waited * took
    all += took
    if (s.step === steps - 1) console.log(`   waited for pictures: ${percent(waited / all)} of ${all.toFixed(1)} s`)
  }
}

/** An empty folder, and a word for whoever interrupts the run. */
function begin(out: string): void {
  if (fs.existsSync(out) && !fs.existsSync(path.join(out, 'result.json')))
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
}

// ---- towers -------------------------------------------------------------------------------------------------

type Towers = Pick<QuickstartResult, 'towers'> & { loss: Pick<QuickstartResult['loss'], 'clip' | 'llm'> }

const STAGES: Record<(typeof TOWERS)[number], string> = {
  'clip-half-0': 'CLIP of the first half of the pairs, which judges the second',
  'clip-half-1': 'CLIP of the second half of the pairs, which judges the first',
  clip: 'CLIP of all training pictures (stands in for OpenAI’s)',
  llm: 'LLaMA of text (stands in for Vicuna)',
}

/** Puts the towers into `folder`: the shipped ones, or new ones. */
async function getTowers(d: QuickstartData, folder: string): Promise<Towers> {
  const made = shippedMaking()
  if (!args['from-scratch']) {
    takeShipped(folder)
    console.log(`\nTowers: those of the repository, made on ${made.date} with CPU code path ${made.isa}`)
    return { towers: { made: 'shipped', isa: made.isa, date: made.date }, loss: {} }
  }
  const maker = new TowerMaker(d, folder, args.fast ? FAST : FULL, meter)
  const curves: Record<string, number[]> = {}
  for (const t of TOWERS) curves[t] = await stage(t, STAGES[t], () => maker.make(t))
  const loss = { clip: curves.clip, llm: curves.llm }
  const { isa } = cpuInfo()
  if (args.fast) return { towers: { made: 'here', isa }, loss }
  const others = different(folder)
  console.log(
    others.length
      ? `\nThese towers differ from the shipped ones, made with CPU code path ${made.isa}: ${others.join(', ')}`
      : '\nThese towers are the shipped ones, bit for bit.',
  )
  return { towers: { made: 'here', isa, sameAsShipped: !others.length }, loss }
}

// ---- levels -------------------------------------------------------------------------------------------------

/** Scores each pair with a CLIP trained on the other half: one that has seen a pair cannot judge it. */
async function scorePairs(d: QuickstartData, models: string): Promise<number[]> {
  const data = await loadDataset(d.pairs, { images: d.images })
  const records = [...data]
  data.close()
  const halves = readHalves(d)
  const scores = new Array<number>(records.length)
  for (const half of [0, 1]) {
    const dir = path.join(models, `clip-half-${half}`)
    const clip = loadClip(dir)
    const judged = records.flatMap((r, i) => (halves[r.id] === half ? [] : [i]))
    const pairs = judged.map((i) => ({
      id: records[i].id,
      image: path.join(d.images, records[i].image as string),
      caption: records[i].conversations[1].value,
    }))
    const result = await clipScores(clip, pairs)
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

interface Leveled {
  data: Dataset
  levels: QuickstartResult['levels']
  examples: LevelExample[]
}

/** Scores, cut into levels and written into the pairs. */
async function makeLevels(d: QuickstartData, out: string): Promise<Leveled> {
  const scores = await stage('levels', 'Alignment scores: two CLIPs, each judges the half it has not seen', () =>
    scorePairs(d, path.join(out, 'models')),
  )
  const data = await loadDataset(d.pairs, { images: d.images })
  const cut = bucketLevels(scores, LEVELS, 'width')
  await writeLevels(data, cut.levels)
  fs.writeFileSync(path.join(out, SCORES), JSON.stringify(scores))
  const quality = readQuality(d)
  const qualities = [...data].map((r) => quality[r.id])
  const levels = describeLevels(scores, qualities, cut)
  const low = `${(100 * levels.wrongInLowestQuarter).toFixed(0)} % in the lowest quarter`
  console.log(`   wrong captions: AUC ${levels.auc.toFixed(3)}, ${low}; levels ${cut.histogram.join(' ')}`)
  const examples = cut.histogram.flatMap((_, level) =>
    [...cut.levels.keys()]
      .filter((i) => cut.levels[i] === level)
      .slice(0, 6)
      .map((i): LevelExample => {
        const r = data.record(i)
        const image = path.join(d.images, r.image as string)
        return { level, image, caption: r.conversations[1].value, score: scores[i], quality: qualities[i] }
      }),
  )
  return { data, levels, examples }
}

// ---- training and test --------------------------------------------------------------------------------------

/** Both phases. @returns their losses, step by step */
async function train(
  model: AlignGPT,
  data: Dataset,
  d: QuickstartData,
): Promise<{ pretrain: number[]; finetune: number[] }> {
  const first = await stage('pretrain', 'Phase 1, pre-training: projector and alignment vectors', () =>
    pretrain(model, data, { ...PHASE_1, steps: STEPS.pretrain, onStep: show(STEPS.pretrain) }),
  )
  const instructions = await loadDataset(d.instructions, { images: d.images })
  const second = await stage('finetune', 'Phase 2, instruction tuning: language model, projector and gate', () =>
    finetune(model, instructions, { ...PHASE_2, steps: STEPS.finetune, onStep: show(STEPS.finetune) }),
  )
  instructions.close()
  return { pretrain: first.loss, finetune: second.loss }
}

type Tested = Pick<QuickstartResult, 'accuracy' | 'blind' | 'chance' | 'questions'>

async function test(model: AlignGPT, d: QuickstartData): Promise<Tested> {
  const [accuracy, blind, chance, questions] = [{}, {}, {}, {}] as Scores[]
  for (const name of TESTS) {
    const e = await evaluate(model, readQuestions(d, name), { images: d.images, batch: 32 })
    accuracy[name] = e.accuracy
    blind[name] = e.blind as number
    chance[name] = e.chance as number
    questions[name] = e.count
    const controls = `blind ${percent(blind[name])}, chance ${percent(chance[name])}`
    console.log(`   ${name}: ${percent(e.accuracy)}, ${controls} (${e.count} questions)`)
  }
  return { accuracy, blind, chance, questions }
}

/** A few generated answers with the gate's weights, for the report. */
async function answerSome(model: AlignGPT, d: QuickstartData): Promise<AnswerExample[]> {
  const list: Question[] = TESTS.flatMap((t) => readQuestions(d, t).slice(0, 5))
  const files = list.map((q) => path.join(d.images, q.image as string))
  const requests = list.map((q, i) => ({ prompt: q.question, image: files[i] }))
  const given = await model.generateBatch(requests, { maxNewTokens: 16 })
  return list.map((q, i) => ({
    image: files[i],
    question: q.question,
    expected: q.answer,
    given: given[i].text,
    correct: given[i].text.toLowerCase() === q.answer.toLowerCase(),
    gate: (given[i].alpha ?? []).slice(0, -1),
  }))
}

function nextSteps(out: string, d: QuickstartData): string {
  const image = path.join(out, 'data', 'images', readQuestions(d, 'name')[0].image)
  return `
Report:  ${path.join(out, 'report.html')}
Numbers: ${path.join(out, 'result.json')}

Ask it yourself:
  npm run chat -- --model ${out}/model --image ${image} "What is this?"
Train on a folder of your own:
  npm run levels   -- pairs.json --images DIR --clip ${out}/models/clip
  npm run pretrain -- --llm ${out}/models/llm --clip ${out}/models/clip --data pairs.json --images DIR --out runs/mine-1
  npm run finetune -- --model runs/mine-1 --data instructions.json --images DIR --out runs/mine-2`
}

async function main(): Promise<void> {
  const out = path.resolve(args.out)
  begin(out)
  const { isa, threads } = cpuInfo()
  const way = args.fast ? 'fast' : 'full'
  console.log(`AlignGPT quickstart, ${way}: CPU code path ${isa}, ${threads} threads, writing to ${out}`)
  const d = await stage('data', 'Data: real pictures and names, written as LLaVA JSON', () =>
    prepareData(out, { fast: args.fast, seed: SEED }),
  )
  const [clip, llm] = ['clip', 'llm'].map((n) => path.join(out, 'models', n))
  const { towers, loss } = await getTowers(d, path.join(out, 'models'))
  const { data, levels, examples } = await makeLevels(d, out)
  const model = await AlignGPT.create({ llm, clip, levels: LEVELS, ...VISION }, { seed: SEED })
  const phases = await train(model, data, d)
  data.close()
  await model.save(path.join(out, 'model'))
  const tested = await stage('test', 'Test on pictures in a style no training has seen', () => test(model, d))
  const answers = await answerSome(model, d)
  model.dispose()

  const result: QuickstartResult = { ...tested, levels, seconds, towers, loss: { ...loss, ...phases } }
  writeReport(path.join(out, 'report.html'), result, {
    fast: args.fast,
    seed: SEED,
    date: new Date().toISOString().slice(0, 16).replace('T', ' '),
    machine: `CPU code path ${isa}, ${threads} threads`,
    facts: [
      ...Object.entries(d.counts).map(([k, v]): [string, string] => [k, String(v)]),
      ...Object.entries(STEPS).map(([k, v]): [string, string] => [`steps of ${k}`, String(v)]),
    ],
    levelExamples: examples,
    answers,
  })
  fs.writeFileSync(path.join(out, 'result.json'), `${JSON.stringify(result, null, 2)}\n`)
  console.log(nextSteps(path.relative('.', out), d))
}

await main()

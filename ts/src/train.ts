/** One training loop for both phases. */
import fs from 'node:fs'
import path from 'node:path'
import type { SingleBar } from 'cli-progress'
import type { AlignGPT, Mix } from './aligngpt.js'
import type { PackedBatch } from './batch.js'
import type { Dataset, Dropped } from './data.js'
import { AlignGPTError } from './errors.js'
import { type Loader, openLoader } from './loader.js'
import { addLora, hasLora, type LoraOptions, saveAdapter } from './lora.js'
import { native } from './native.js'
import { AdamW, cosineRate, type OptimizerState } from './optim.js'
import { FINETUNE, type Phase, PRETRAIN, phaseOf, trainable } from './phases.js'

export interface TrainOptions {
  /** folder for the model, log.jsonl and state.json; without one nothing is written */
  out?: string
  /** samples of a step (the phase's: 256 in pre-training, 128 in instruction tuning) */
  batch?: number
  /** samples run at once, default 16 at most; the step's gradient is the same whatever it is */
  microBatch?: number
  /** peak learning rate (the phase's: 1e-3, 2e-5; with adapters 2e-4, and 2e-5 for the projector) */
  lr?: number
  /** of the projector, where it is to have its own */
  projectorLr?: number
  /** instruction tuning gives the language model adapters and trains those in its place; without it a model keeps those it has */
  lora?: LoraOptions
  epochs?: number
  /** instead of epochs */
  steps?: number
  /** default 0.03 */
  warmupRatio?: number
  weightDecay?: number
  /** gradients are scaled down to this norm; default 1, null: never */
  clipGradNorm?: number | null
  /** full: 18 bytes for each trained bf16 parameter (default); compact: 10 */
  optimizerState?: OptimizerState
  /** the optimizer's state of a model on a GPU stays in main memory, and the CPU updates it (AdamWOptions.offload) */
  offloadOptimizer?: boolean
  seed?: number
  /** run layers again on the way back instead of keeping their activations */
  recompute?: boolean
  /** batch: token mean over the whole step (default); micro: mean of the micro-batches' means, as the official code */
  lossNorm?: 'batch' | 'micro'
  /** what the gate's text mean sees; all: answers too, as the official code. Default: what the model's config says, else all */
  gateText?: 'all' | 'instruction'
  /** batches of similar lengths */
  groupByLength?: boolean
  /** mild augmentation of the pictures (background, affine, colour) */
  augment?: boolean
  /** threads that decode pictures, 0: this one */
  workers?: number
  /** share of the records that may be unusable before the run stops, default 0.01 */
  maxBad?: number
  /** how the alignment vector is made, instead of the phase's way (the paper's ablations) */
  mix?: Mix
  onStep?: (step: StepInfo) => void
  /** a bar on the terminal; default: when standard error is one */
  progress?: boolean
  signal?: AbortSignal
}

export interface StepInfo {
  /** from 0 */
  step: number
  steps: number
  loss: number
  lr: number
  /** before clipping */
  gradNorm: number
  tokens: number
  tokensPerSecond: number
  samplesPerSecond: number
  /** mean weight of each row of the alignment table over the step's pictures */
  coefficients: number[]
}

export interface TrainResult {
  steps: number
  loss: number[]
  seconds: number
  /** records that could not be used, each named once */
  bad: Dropped[]
  /** records that do not fit into the longest sequence */
  skipped: Dropped[]
  aborted: boolean
}

/** Phase 1: projector and alignment vectors learn from image-text pairs with levels (section 3.2 of the paper). */
export function pretrain(model: AlignGPT, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  return train(model, data, phaseOf(model, PRETRAIN, o), o)
}

/**
 * Phase 2: language model, projector and gate learn from instructions (section 3.3 of the paper). Of a model with adapters (LoRA)
 * `out` holds the merged weights, and the adapters themselves are in its folder `adapter`.
 */
export async function finetune(model: AlignGPT, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  if (o.lora) addLora(model, o.lora, o.seed)
  const result = await train(model, data, phaseOf(model, FINETUNE, o), o)
  if (o.out && hasLora(model)) saveAdapter(model, path.join(o.out, 'adapter'))
  return result
}

function checkOptions(o: TrainOptions, data: Dataset): void {
  const positive = ['batch', 'microBatch', 'epochs', 'steps'] as const
  for (const key of positive)
    if (o[key] !== undefined && !(Number.isInteger(o[key]) && o[key] > 0))
      throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected an integer > 0, got ${o[key]}`)
  for (const key of ['lr', 'projectorLr', 'warmupRatio', 'weightDecay', 'maxBad'] as const)
    if (o[key] !== undefined && !(Number.isFinite(o[key]) && o[key] >= 0))
      throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected a number >= 0, got ${o[key]}`)
  if (data.length === 0) throw new AlignGPTError('ERR_DATA', `[train] ${data.file}: expected records, got none`)
}

/** The micro-batches of the next step. They are gathered first because the loss is a mean over the whole step. */
async function nextStep(loader: Loader): Promise<PackedBatch[]> {
  const batches: PackedBatch[] = []
  for (;;) {
    const loaded = await loader.next()
    if (loaded?.packed) batches.push(loaded.packed)
    if (!loaded || loaded.micro === loaded.microCount - 1) return batches
  }
}

/** Forward and backward of one step's micro-batches. */
function accumulate(
  model: AlignGPT,
  batches: PackedBatch[],
  mix: Mix,
  o: TrainOptions,
): { loss: number; coefficients: number[] } {
  const labelled = batches.filter((b) => b.lossRows.length > 0)
  const total = labelled.reduce((n, b) => n + b.lossRows.length, 0)
  const images = labelled.reduce((n, b) => n + b.imageRows.length, 0)
  const coefficients = new Array<number>(model.levels).fill(0)
  let loss = 0
  for (const b of labelled) {
    const denominator = o.lossNorm === 'micro' ? labelled.length * b.lossRows.length : total
    const result = model.lossAndGradients(b, mix, { denominator, recompute: o.recompute })
    loss += result.loss
    for (const [l, c] of result.coefficients.entries())
      coefficients[l] += images ? (c * b.imageRows.length) / images : 0
  }
  return { loss, coefficients }
}

class Log {
  #bar: SingleBar | undefined
  private constructor(
    private readonly phase: Phase,
    private readonly file: string | undefined,
  ) {}
  static async open(phase: Phase, o: TrainOptions, steps: number): Promise<Log> {
    const log = new Log(phase, o.out && path.join(o.out, 'log.jsonl'))
    if (o.out && log.file) {
      fs.mkdirSync(o.out, { recursive: true })
      fs.writeFileSync(log.file, '')
    }
    if (o.progress ?? process.stderr.isTTY) {
      const { SingleBar } = await import('cli-progress') // where nobody looks it need not be loaded
      const format = `${phase.name} [{bar}] {value}/{total} loss {loss} {rate} tokens/s, {eta_formatted} left`
      log.#bar = new SingleBar({ format, stream: process.stderr, hideCursor: true })
      log.#bar.start(steps, 0, { loss: '-', rate: '-' })
    }
    return log
  }
  step(s: StepInfo): void {
    if (this.file)
      fs.appendFileSync(
        this.file,
        `${JSON.stringify({ phase: this.phase.name, ...s, time: new Date().toISOString() })}\n`,
      )
    this.#bar?.update(s.step + 1, { loss: s.loss.toFixed(4), rate: s.tokensPerSecond.toFixed(0) })
  }
  end(): void {
    this.#bar?.stop()
  }
}

/** Options that go to the loader as they are. */
function pick({ groupByLength, maxBad, augment, workers }: TrainOptions) {
  return { groupByLength, maxBad, augment, workers }
}

async function train(model: AlignGPT, data: Dataset, phase: Phase, options: TrainOptions): Promise<TrainResult> {
  checkOptions(options, data)
  const o = { ...options, batch: Math.min(options.batch ?? phase.batch, data.length), seed: options.seed ?? 0 }
  const steps = o.steps ?? Math.ceil(data.length / o.batch) * (o.epochs ?? 1)
  const mix = o.mix ?? phase.mix
  const loader = await openLoader(data, {
    tokenizer: model.tokenizer,
    preprocess: { ...model.preprocessor, pad: phase.pad && model.config.image_aspect_ratio === 'pad' },
    style: phase.style,
    patches: model.patches,
    maxLength: model.config.tokenizer_model_max_length,
    micro: Math.min(o.microBatch ?? 16, o.batch),
    ...pick(o),
    gateText: o.gateText ?? model.config.mm_gate_text,
    align: mix.mode !== 'none',
    batch: o.batch,
    seed: o.seed,
    steps,
  })
  const optimizer = new AdamW(trainable(model, phase), {
    weightDecay: o.weightDecay,
    state: o.optimizerState,
    offload: o.offloadOptimizer,
    seed: o.seed,
  })
  const log = await Log.open(phase, o, steps)
  const result: TrainResult = { steps: 0, loss: [], seconds: 0, bad: [], skipped: [], aborted: false }
  const began = performance.now()
  try {
    for (let step = 0; step < steps && !o.signal?.aborted; step++) {
      const from = performance.now()
      const batches = await nextStep(loader)
      const lr = cosineRate(step, { lr: o.lr ?? phase.lr, totalSteps: steps, warmupRatio: o.warmupRatio ?? 0.03 })
      const { loss, coefficients } = accumulate(model, batches, mix, o)
      const gradNorm = update(optimizer, loss, lr, o, batches)
      const seconds = (performance.now() - from) / 1000
      const tokens = batches.reduce((n, b) => n + b.tokens.length, 0)
      const samples = batches.reduce((n, b) => n + b.ids.length, 0)
      const info: StepInfo = {
        step,
        steps,
        loss,
        lr,
        gradNorm,
        tokens,
        tokensPerSecond: tokens / seconds,
        samplesPerSecond: samples / seconds,
        coefficients,
      }
      result.loss.push(loss)
      result.steps++
      log.step(info)
      o.onStep?.(info)
      await new Promise((resolve) => setImmediate(resolve)) // signals and decoding get their turn
    }
  } finally {
    log.end()
    await loader.close()
    optimizer.dispose()
    native.trim(model.device) // what lay idle between the steps
  }
  result.aborted = result.steps < steps
  result.seconds = (performance.now() - began) / 1000
  const { bad, skipped } = data.state
  Object.assign(result, { bad, skipped })
  if (o.out) {
    await model.save(o.out)
    fs.writeFileSync(
      path.join(o.out, 'state.json'),
      `${JSON.stringify({ phase: phase.name, ...result, loss: undefined }, null, 2)}\n`,
    )
  }
  return result
}

/** The optimizer step. @throws ERR_NOT_FINITE naming the records, with the weights as they were */
function update(optimizer: AdamW, loss: number, lr: number, o: TrainOptions, batches: PackedBatch[]): number {
  try {
    if (!Number.isFinite(loss))
      throw new AlignGPTError('ERR_NOT_FINITE', `[train] loss: expected a finite number, got ${loss}`)
    return optimizer.update(lr, o.clipGradNorm === undefined ? 1 : o.clipGradNorm)
  } catch (e) {
    optimizer.zeroGrad()
    if (!(e instanceof AlignGPTError) || e.code !== 'ERR_NOT_FINITE') throw e
    const ids = batches.flatMap((b) => b.ids)
    throw new AlignGPTError(
      e.code,
      `${e.message}; weights unchanged, records of the step: ${ids.slice(0, 32).join(', ')}`,
      { cause: e },
    )
  }
}

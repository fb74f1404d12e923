/** The two phases of the paper on the training loop: what learns, from which batches, what is saved, told and evaluated. */
import fs from 'node:fs'
import path from 'node:path'
import type { Dataset } from '../data/dataset.js'
import { DropLog, type DropState } from '../data/drop-log.js'
import { type Loader, openLoader } from '../data/loader.js'
import { listOf, sayBad } from '../data/record-check.js'
import { type EvaluationInfo, HeldOut, type HeldOutState, holdOut } from '../evaluation/held-out.js'
import { addLora, hasLora } from '../models/adapters.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { PackedBatch } from '../models/packed-batch.js'
import { saveAdapter } from '../models/peft.js'
import { saveModel } from '../models/save.js'
import { bearErrors } from '../util/output.js'
import { BestModel } from './best-model.js'
import { train } from './loop.js'
import { averageText, RunMemory, widestText } from './memory-advice.js'
import { microBatchesAhead } from './memory-plan.js'
import { checkOptions, type Resolved, resolve, settings, type TrainOptions } from './options.js'
import { describeRecords, dumpBatches } from './packed-dump.js'
import { PhaseModel, type PhaseResult } from './phase-model.js'
import { FINETUNE, type Phase, PRETRAIN, phaseOf, savedWeights, trainable } from './phases.js'
import { Bar } from './progress-bar.js'
import { EventLog } from './run-log.js'
import type { BatchSource, LoopHooks, LoopStep, RunSink, StepInfo, TrainResult } from './types.js'

export type { TrainOptions } from './options.js'
export type { StepInfo, TrainResult } from './types.js'

/** Phase 1: projector and alignment vectors learn from image-text pairs with levels (section 3.2 of the paper). */
export async function pretrain(model: AlignGPTNetwork, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  checkOptions('pretrain', o, data)
  return trainPhase(model, data, phaseOf(model, PRETRAIN, o), o)
}

/**
 * Phase 2: language model, projector and gate learn from instructions (section 3.3 of the paper). Of a model with adapters (LoRA)
 * `out` holds the merged weights, and the adapters themselves are in its folder `adapter`.
 */
export async function finetune(model: AlignGPTNetwork, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  checkOptions('finetune', o, data)
  if (o.lora) addLora(model, o.lora, o.seed)
  const result = await trainPhase(model, data, phaseOf(model, FINETUNE, o), o)
  if (o.out && hasLora(model)) saveAdapter(model, path.join(o.out, 'adapter'))
  return result
}

/** The micro-batches of a phase: what the loader makes of its records. */
class PhaseBatches implements BatchSource<PackedBatch> {
  readonly #open: (start: number) => Promise<Loader>
  #loader: Loader | null = null
  #waitedBefore = 0

  constructor(open: (start: number) => Promise<Loader>) {
    this.#open = open
  }

  async open(start: number): Promise<void> {
    this.#loader = await this.#open(start)
  }

  /** The step that the loader has come to. They are gathered first because the loss is a mean over the whole step. */
  async next(): Promise<PackedBatch[]> {
    this.#waitedBefore = this.#loader?.waited ?? 0
    const batches: PackedBatch[] = []
    for (;;) {
      const loaded = await this.#loader?.next()
      if (loaded?.packed) batches.push(loaded.packed)
      if (!loaded || loaded.micro === loaded.microCount - 1) return batches
    }
  }

  /** Seconds of the last step that were spent waiting for images. */
  get waited(): number {
    return (this.#loader?.waited ?? 0) - this.#waitedBefore
  }

  async close(): Promise<void> {
    await this.#loader?.close()
  }
}

type StepNumbers = Omit<StepInfo, keyof LoopStep>

/** What is told of a step besides what the loop knows; `results` are of the batches with a labelled row. */
function stepNumbers(
  step: { batches: readonly PackedBatch[]; results: readonly PhaseResult[]; seconds: number },
  levels: number,
  waited: number,
): StepNumbers {
  const { batches, results, seconds } = step
  const images = batches.reduce((n, b) => n + (b.lossRows.length > 0 ? b.imageRows.length : 0), 0)
  const coefficients = new Array<number>(levels).fill(0)
  for (const r of results) {
    const sums = new Array<number>(levels).fill(0)
    for (const [i, c] of r.coefficients.toFloats().entries()) sums[i % levels] += c
    for (const [l, c] of sums.entries()) coefficients[l] += images ? c / images : 0
  }
  const tokens = batches.reduce((n, b) => n + b.tokens.length, 0)
  const samples = batches.reduce((n, b) => n + b.ids.length, 0)
  const rates = { tokensPerSecond: tokens / seconds, samplesPerSecond: samples / seconds, waited: waited / seconds }
  return { tokens, ...rates, coefficients }
}

/** What a phase adds to the state of a checkpoint. The order of the data is computed from seed and step. */
interface PhaseState {
  position: { epoch: number; step: number }
  dropped: DropState
  evaluation: HeldOutState | null
}

/** One run of a phase: everything that the loop asks for. */
class PhaseRun {
  readonly #model: AlignGPTNetwork
  readonly #data: Dataset
  readonly #phase: Phase
  readonly #o: Resolved
  readonly #dropped: DropLog
  readonly #held: HeldOut | null
  readonly #best: BestModel
  readonly #memory: RunMemory
  readonly #learner: PhaseModel
  readonly #batches: PhaseBatches

  constructor(model: AlignGPTNetwork, { trained, held }: Data, phase: Phase, options: TrainOptions) {
    const o = resolve(model, trained, phase, options)
    this.#model = model
    this.#data = trained
    this.#phase = phase
    this.#o = o
    this.#dropped = new DropLog(trained)
    this.#best = new BestModel(model, o.out, o.onMessage)
    const { style, pad } = phase
    this.#held = held && new HeldOut(model, held, { ...o, style, pad, keep: (step) => this.#best.keep(step) })
    this.#memory = new RunMemory(model, phase, o, averageText(model, trained, o.microBatch))
    this.#learner = new PhaseModel(model, o.mix, trainable(model, phase), o.recompute)
    this.#batches = new PhaseBatches((start) => this.#openLoader(start))
  }

  #openLoader(startStep: number): Promise<Loader> {
    const [model, phase, o] = [this.#model, this.#phase, this.#o]
    const { groupByLength, gateText, maxBad, augment, workers, batch, seed, steps } = o
    return openLoader(this.#data, {
      tokenizer: model.tokenizer,
      preprocess: model.preprocess(phase.pad),
      style: phase.style,
      patches: model.patches,
      maxLength: model.config.tokenizer_model_max_length,
      micro: o.microBatch,
      ahead: microBatchesAhead(batch, o.microBatch),
      ...{ groupByLength, gateText, maxBad, augment, workers, batch, seed, steps },
      align: o.mix.mode !== 'none',
      startStep,
      dropped: this.#dropped,
    })
  }

  async run(): Promise<TrainResult> {
    this.#tellBad()
    const warning = this.#memory.warning()
    if (warning) this.#o.onMessage(warning)
    const unmind = bearErrors(process.stderr) // a terminal that closes is no reason to stop
    try {
      const options = { ...this.#o, name: this.#phase.name, ...this.#hooks() }
      const { settings, ...result } = await train(this.#learner, this.#batches, options)
      return this.#finish(result, settings)
    } finally {
      await this.#batches.close()
      await this.#held?.close()
      this.#learner.dispose()
      unmind()
    }
  }

  /** The records that are left out, before the first step. @throws AlignGPTError ERR_DATA when they are too many */
  #tellBad(): void {
    this.#dropped.check(this.#o.maxBad)
    const told = [
      [this.#data.file, this.#data.bad],
      [this.#o.evalData, this.#held?.bad ?? []],
    ] as const
    for (const [file, bad] of told)
      if (bad.length) this.#o.onMessage(`[data] ${file}: left out:${listOf(bad.map(sayBad))}`)
  }

  #hooks(): LoopHooks<PackedBatch, PhaseResult, StepNumbers, EvaluationInfo> {
    const [model, data, phase, o, held] = [this.#model, this.#data, this.#phase, this.#o, this.#held]
    return {
      info: (step) => stepNumbers(step, model.levels, this.#batches.waited),
      settings: () => settings(model, data, phase, o, held),
      weights: savedWeights(model, phase),
      state: (done) => ({ ...this.#state(done) }),
      restore: (state, checkpoint) => this.#restore(state as unknown as PhaseState, checkpoint),
      evaluation: held ?? undefined,
      sinks: (start) => this.#sinks(start),
      finish: () => o.out && saveModel(model, o.out),
      describe: describeRecords,
      dump: dumpBatches,
      outOfMemory: (cause, where, batches) => {
        if (batches.length === 0) return this.#memory.error(cause, where)
        return new RunMemory(model, phase, o, widestText(model, batches)).error(cause, where)
      },
    }
  }

  #state(done: number): PhaseState {
    const perEpoch = this.#data.stepsPerEpoch(this.#o.batch)
    return {
      position: { epoch: Math.floor(done / perEpoch), step: done % perEpoch },
      dropped: this.#dropped.state,
      evaluation: this.#held?.state ?? null,
    }
  }

  #restore({ dropped, evaluation }: PhaseState, checkpoint: string): void {
    this.#dropped.restore(dropped)
    if (!evaluation || !this.#held) return
    this.#held.restore(evaluation)
    this.#best.takeOver(path.resolve(checkpoint, '../..'), evaluation.best)
  }

  async #sinks(start: number): Promise<RunSink<StepInfo, EvaluationInfo>[]> {
    const { out, tensorboard, onMessage: tell, progress, steps } = this.#o
    return [
      ...(out && tensorboard ? [new EventLog({ out, tell }, start)] : []),
      ...((progress ?? process.stderr.isTTY) ? [await Bar.open(this.#phase.name, steps, start)] : []),
    ]
  }

  /** The result of the phase, and the model in `out`. */
  #finish(result: Omit<TrainResult, 'bad' | 'skipped' | 'best'>, options: unknown): TrainResult {
    const { out } = this.#o
    const dropped = [this.#dropped.state, ...(this.#held ? [this.#held.state.dropped] : [])]
    const [bad, skipped] = [dropped.flatMap((d) => d.bad), dropped.flatMap((d) => d.skipped)]
    const { steps, resumed, loss, seconds, outliers, aborted } = result
    const best = this.#held?.best ?? null
    const whole = { steps, resumed, loss, seconds, bad, skipped, outliers, best, aborted }
    if (out) {
      const state = { phase: this.#phase.name, ...whole, loss: undefined, options }
      fs.writeFileSync(path.join(out, 'state.json'), `${JSON.stringify(state, null, 2)}\n`)
    }
    return whole
  }
}

type Data = Awaited<ReturnType<typeof holdOut>>

async function trainPhase(
  model: AlignGPTNetwork,
  data: Dataset,
  phase: Phase,
  options: TrainOptions,
): Promise<TrainResult> {
  if (options.conversation) model.conversation = options.conversation
  const mix = options.mix ?? phase.mix
  const levelled = mix.mode === 'level' && mix.level === undefined
  const trained = await holdOut(data, { style: phase.style, levels: model.levels, levelled }, options)
  return new PhaseRun(model, trained, phase, options).run()
}

/** One training loop for both phases. */

import fs from 'node:fs'
import path from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { native } from '../core/native.js'
import type { Dataset, DatasetState, Dropped } from '../data/dataset.js'
import { type Loader, openLoader } from '../data/loader.js'
import { type Best, HeldOut, type HeldOutState, holdOut } from '../evaluation/held-out.js'
import { addLora, hasLora } from '../models/adapters.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { PackedBatch } from '../models/packed-batch.js'
import { saveAdapter } from '../models/peft.js'
import { saveModel } from '../models/save.js'
import { AdamW, type StateTensor } from '../nn/adamw.js'
import { cosineRate } from '../nn/schedule.js'
import { AlignGPTError } from '../util/errors.js'
import { listCheckpoints, type Manifest, readCheckpoint } from './checkpoint.js'
import { averageText, RunMemory, widestText } from './memory-advice.js'
import { microBatchesAhead } from './memory-plan.js'
import { MicroSteps } from './micro-batches.js'
import { checkOptions, type Resolved, resolve, settings, type TrainOptions } from './options.js'
import { describeRecords, dumpStep, type OutlierState, Outliers } from './outliers.js'
import { FINETUNE, type Phase, PRETRAIN, phaseOf, trainable } from './phases.js'
import { checkpointFolder, findResume, maker, Schedule, savedTensors } from './resume.js'
import { Log } from './run-log.js'
import { Saver } from './saver.js'

export type { TrainOptions } from './options.js'

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
  /** share of the step's time spent waiting for pictures to be decoded, 0 to 1 */
  waited: number
  /** mean weight of each row of the alignment table over the step's pictures */
  coefficients: number[]
  /** an outlier: the weights stayed as they were */
  skipped: boolean
}

export interface TrainResult {
  /** done, those before a resume included */
  steps: number
  /** steps that were there already */
  resumed: number
  /** of the steps since */
  loss: number[]
  seconds: number
  /** records that could not be used, each named once */
  bad: Dropped[]
  /** records that do not fit into the longest sequence */
  skipped: Dropped[]
  /** steps without an update (skipOutliers) */
  outliers: number
  /** the evaluation with the lowest loss, null without evalShare or evalData; its model is in `out/best` */
  best: Best | null
  /** stopped by the signal: steps or the last evaluation are missing */
  aborted: boolean
}

/** Phase 1: projector and alignment vectors learn from image-text pairs with levels (section 3.2 of the paper). */
export async function pretrain(model: AlignGPTNetwork, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  checkOptions('pretrain', o, data)
  return train(model, data, phaseOf(model, PRETRAIN, o), o)
}

/**
 * Phase 2: language model, projector and gate learn from instructions (section 3.3 of the paper). Of a model with adapters (LoRA)
 * `out` holds the merged weights, and the adapters themselves are in its folder `adapter`.
 */
export async function finetune(model: AlignGPTNetwork, data: Dataset, o: TrainOptions = {}): Promise<TrainResult> {
  checkOptions('finetune', o, data)
  if (o.lora) addLora(model, o.lora, o.seed)
  const result = await train(model, data, phaseOf(model, FINETUNE, o), o)
  if (o.out && hasLora(model)) saveAdapter(model, path.join(o.out, 'adapter'))
  return result
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

/** Forward and backward of one step's micro-batches; others get their turn in between. */
async function accumulate(
  steps: MicroSteps,
  batches: PackedBatch[],
  o: TrainOptions,
): Promise<{ loss: number; losses: number[]; coefficients: number[] }> {
  const labelled = batches.filter((b) => b.lossRows.length > 0)
  const total = labelled.reduce((n, b) => n + b.lossRows.length, 0)
  const images = labelled.reduce((n, b) => n + b.imageRows.length, 0)
  for (const [i, b] of labelled.entries()) {
    if (i) await turn()
    steps.run(b, o.lossNorm === 'micro' ? labelled.length * b.lossRows.length : total)
  }
  const results = steps.read()
  const losses = results.map((r) => r.loss)
  const coefficients = new Array<number>(steps.model.levels).fill(0)
  for (const r of results) for (const [l, c] of r.coefficients.entries()) coefficients[l] += images ? c / images : 0
  return { loss: losses.reduce((a, b) => a + b, 0), losses, coefficients }
}

/** What a checkpoint holds besides tensors. The order of the data and all random numbers are computed from seed and step. */
interface RunState {
  optimizerStep: number
  random: { generator: 'philox4x32-10'; seed: number; step: number }
  position: { epoch: number; step: number }
  dropped: DatasetState
  outliers: OutlierState | null
  evaluation: HeldOutState | null
}

/** One training run. */
class Run {
  readonly optimizer: AdamW
  private readonly microSteps: MicroSteps
  readonly outliers: Outliers | null
  readonly result: TrainResult
  private loader!: Loader
  private log!: Log
  private saver: Saver | null = null
  private schedule!: Schedule
  /** what every checkpoint of the run says */
  private origin!: Pick<Manifest, 'config' | 'maker'>
  private done = 0
  /** of the step that runs */
  private batches: PackedBatch[] = []

  constructor(
    readonly model: AlignGPTNetwork,
    readonly data: Dataset,
    readonly phase: Phase,
    readonly o: Resolved,
    readonly held: HeldOut | null,
  ) {
    const { weightDecay, optimizerState: state, offloadOptimizer: offload, seed, skipOutliers } = o
    this.outliers = skipOutliers ? new Outliers(skipOutliers === true ? {} : skipOutliers) : null
    this.schedule = new Schedule(o.saveEvery, o.steps, !!o.saveEvery && !o.allowLongInterval)
    const parameters = trainable(model, phase)
    this.microSteps = new MicroSteps(model, o.mix, parameters, o.recompute)
    this.optimizer = new AdamW(parameters, { weightDecay, state, offload, seed })
    this.result = {
      steps: 0,
      resumed: 0,
      loss: [],
      seconds: 0,
      bad: [],
      skipped: [],
      outliers: 0,
      best: null,
      aborted: false,
    }
  }

  private tensors(): StateTensor[] {
    return savedTensors(this.model, this.phase, this.optimizer)
  }

  async open(): Promise<void> {
    const { model, data, phase, o, held } = this
    if (o.out || o.resume) {
      this.origin = { config: settings(model, data, phase, o, held), maker: maker(model.device) }
      const found = findResume(o, this.origin, o.onMessage)
      if (found) this.restore(found.folder, found.manifest)
    }
    if (o.out) this.saver = new Saver(checkpointFolder(o.out), o.keep, o.onMessage)
    this.result.resumed = this.done
    const { groupByLength, gateText, maxBad, augment, workers, batch, seed, steps } = o
    this.loader = await openLoader(data, {
      tokenizer: model.tokenizer,
      preprocess: model.preprocess(phase.pad),
      style: phase.style,
      patches: model.patches,
      maxLength: model.config.tokenizer_model_max_length,
      micro: o.microBatch,
      ahead: microBatchesAhead(batch, o.microBatch),
      ...{ groupByLength, gateText, maxBad, augment, workers, batch, seed, steps },
      align: o.mix.mode !== 'none',
      startStep: this.done,
    })
    this.log = await Log.open(phase.name, o, this.done, held?.state.evaluated)
  }

  private restore(folder: string, { step, state }: Manifest): void {
    const { optimizerStep, dropped, outliers, evaluation } = state as unknown as RunState
    readCheckpoint(folder, this.tensors())
    this.optimizer.resume(optimizerStep)
    this.data.restore(dropped)
    if (outliers) this.outliers?.restore(outliers)
    if (evaluation) this.held?.restore(evaluation, path.resolve(folder, '../..'))
    this.done = step
  }

  /** Steps until the end or the signal. */
  async go(): Promise<void> {
    const { o } = this
    await this.evaluate() // a signal may have come in the middle of it
    for (const start = this.done; this.done < o.steps && !o.signal?.aborted; ) {
      const info = await this.step()
      this.done++
      this.result.loss.push(info.loss)
      this.log.step(info)
      o.onStep?.(info)
      if (this.done === start + 2) this.schedule.measured(info.tokens / info.tokensPerSecond)
      await this.evaluate()
      if (this.done < o.steps && this.schedule.due(this.done)) await this.save()
      this.saver?.check()
      await turn() // signals and decoding get their turn
    }
    const stopped = this.unfinished && this.done > this.result.resumed
    if (stopped && this.saver?.last !== this.done) await this.save()
    await this.saver?.settled()
  }

  /** Whether steps or the last evaluation are missing. */
  private get unfinished(): boolean {
    return this.done < this.o.steps || !!this.held?.due(this.done)
  }

  /** The evaluation on held-out records, when it is due. */
  private async evaluate(): Promise<void> {
    const info = await this.held?.evaluate(this.done)
    if (!info) return
    this.log.evaluation(info)
    this.o.onEvaluation?.(info)
  }

  private async step(): Promise<StepInfo> {
    const { o, done: step } = this
    const from = performance.now()
    const waitedBefore = this.loader.waited
    const batches = await nextStep(this.loader)
    this.batches = batches
    const lr = cosineRate(step, { lr: o.lr, totalSteps: o.steps, warmupRatio: o.warmupRatio })
    const { loss, losses, coefficients } = await accumulate(this.microSteps, batches, o)
    const { gradNorm, skipped } = this.update(loss, lr, batches, losses)
    const seconds = (performance.now() - from) / 1000
    const tokens = batches.reduce((n, b) => n + b.tokens.length, 0)
    const samples = batches.reduce((n, b) => n + b.ids.length, 0)
    const waited = (this.loader.waited - waitedBefore) / seconds
    const rates = { tokensPerSecond: tokens / seconds, samplesPerSecond: samples / seconds, waited }
    return { step, steps: o.steps, loss, lr, gradNorm, tokens, ...rates, coefficients, skipped }
  }

  /** The optimizer step. @throws ERR_NOT_FINITE naming the records and their pictures, with the weights as they were */
  private update(
    loss: number,
    lr: number,
    batches: PackedBatch[],
    losses: number[],
  ): { gradNorm: number; skipped: boolean } {
    const { optimizer, outliers, o } = this
    try {
      if (!Number.isFinite(loss))
        throw new AlignGPTError('ERR_NOT_FINITE', `[train] loss: expected a finite number, got ${loss}`)
      const norm = outliers ? optimizer.gradientNorm() : 0
      if (outliers && Number.isFinite(norm) && outliers.isOutlier(loss, norm)) {
        optimizer.zeroGrad()
        return { gradNorm: norm, skipped: true }
      }
      return { gradNorm: optimizer.update(lr, o.clipGradNorm), skipped: false }
    } catch (e) {
      if (!(e instanceof AlignGPTError) || e.code !== 'ERR_NOT_FINITE') {
        optimizer.zeroGrad()
        throw e
      }
      const culprits = batches.filter((b) => b.lossRows.length > 0).filter((_, i) => !Number.isFinite(losses[i]))
      const records = describeRecords(culprits.length ? culprits : batches)
      const dump = this.dump({ step: this.done, loss, lr, losses: losses.map(String) }, batches)
      optimizer.zeroGrad()
      const message = `${e.message}; weights unchanged, records of the step: ${records}${dump}`
      throw new AlignGPTError(e.code, message, { cause: e })
    }
  }

  /** Where the step can be looked at, for the message. */
  private dump(numbers: Record<string, unknown>, batches: PackedBatch[]): string {
    if (!this.o.out) return ''
    const folder = path.join(this.o.out, 'dumps', `step-${this.done}`)
    try {
      dumpStep(folder, numbers, batches, trainable(this.model, this.phase))
      return `; to look at: ${folder}`
    } catch (e) {
      return `; it could not be written to ${folder}: ${(e as Error).message}`
    }
  }

  private async save(): Promise<void> {
    const { data, o, done: step, optimizer, outliers, origin } = this
    const perEpoch = data.stepsPerEpoch(o.batch)
    const state: RunState = {
      optimizerStep: optimizer.step,
      random: { generator: 'philox4x32-10', seed: o.seed, step },
      position: { epoch: Math.floor(step / perEpoch), step: step % perEpoch },
      dropped: data.state,
      outliers: outliers?.state ?? null,
      evaluation: this.held?.state ?? null,
    }
    await this.saver?.save({ step, ...origin, state: { ...state } }, this.tensors())
  }

  /** The error of a step that found no memory: what was planned, what would fit, where to go on. */
  async outOfMemory(cause: AlignGPTError): Promise<AlignGPTError> {
    const { model, data, phase, o, batches, done, saver } = this
    await saver?.settled().catch(() => {}) // what it could not save it has told
    const text = batches.length ? widestText(model, batches) : averageText(model, data, o.microBatch)
    const saved = saver && listCheckpoints(saver.folder).at(0)
    const place = saved === undefined || saved === null ? '' : ` (step-${saved} in ${saver?.folder} is whole: resume)`
    return new RunMemory(model, phase, o, text).error(cause, `in step ${done + 1}${place}`)
  }

  async close(): Promise<void> {
    this.log?.end()
    await this.loader?.close()
    await this.held?.close()
    await this.saver?.close()
    this.microSteps.dispose()
    this.optimizer.dispose()
    native.trim(this.model.device) // what lay idle between the steps
  }

  /** The result, and the model in `out`. */
  async finish(seconds: number): Promise<TrainResult> {
    const { result, done, o, data, phase, held } = this
    const states = held ? [data.state, held.state.dropped] : [data.state]
    const [bad, skipped] = [states.flatMap((s) => s.bad), states.flatMap((s) => s.skipped)]
    Object.assign(result, { steps: done, aborted: this.unfinished, seconds, bad, skipped, best: held?.best ?? null })
    result.outliers = this.outliers?.skipped ?? 0
    if (o.out) {
      saveModel(this.model, o.out)
      const state = { phase: phase.name, ...result, loss: undefined, options: this.origin.config }
      fs.writeFileSync(path.join(o.out, 'state.json'), `${JSON.stringify(state, null, 2)}\n`)
    }
    return result
  }
}

const isMemory = (e: unknown): e is AlignGPTError => (e as { code?: unknown }).code === 'ERR_MEMORY'

/** The optimizer's state may already find no memory. */
function makeRun(memory: RunMemory, make: () => Run): Run {
  try {
    return make()
  } catch (e) {
    throw isMemory(e) ? memory.error(e, 'before the first step') : e
  }
}

async function train(model: AlignGPTNetwork, data: Dataset, phase: Phase, options: TrainOptions): Promise<TrainResult> {
  if (options.conversation) model.conversation = options.conversation
  const { trained, held } = await holdOut(data, options.seed ?? 0, options)
  const o = resolve(model, trained, phase, options)
  const memory = new RunMemory(model, phase, o, averageText(model, trained, o.microBatch))
  const warning = memory.warning()
  if (warning) o.onMessage(warning)
  const run = makeRun(memory, () => new Run(model, trained, phase, o, held && new HeldOut(model, phase, held, o)))
  const began = performance.now()
  try {
    await run.open()
    await run.go()
  } catch (e) {
    throw isMemory(e) ? await run.outOfMemory(e) : e
  } finally {
    await run.close()
  }
  return run.finish((performance.now() - began) / 1000)
}

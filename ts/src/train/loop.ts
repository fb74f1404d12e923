/**
 * The training loop: micro-batches and accumulation, cosine schedule, AdamW, clipping, outliers, checkpoints and their continuation, a log,
 * evaluations between the steps. It knows no model: whoever has gradients to give trains with it.
 */
import fs from 'node:fs'
import path from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { native } from '../core/native.js'
import { AdamW, type StateTensor } from '../nn/adamw.js'
import { cosineRate } from '../nn/schedule.js'
import { AlignGPTError, show } from '../util/errors.js'
import { permutation } from '../util/rng.js'
import { listCheckpoints, type Manifest, readCheckpoint } from './checkpoint.js'
import { MicroSteps } from './micro-batches.js'
import { type OutlierState, Outliers } from './outliers.js'
import { checkpointFolder, checkpointTensors, findResume, maker, Schedule } from './resume.js'
import { StepLog } from './run-log.js'
import { RUN_SETTINGS } from './run-settings.js'
import { Saver } from './saver.js'
import { dumpStep } from './step-dump.js'
import type {
  BatchSource,
  LoopHooks,
  LoopOptions,
  LoopResult,
  LoopSetting,
  LoopStep,
  MicroResult,
  RunSink,
  TrainableModel,
} from './types.js'

/** What a checkpoint holds besides tensors, beside what hooks add. All random numbers are computed from seed and step. */
interface LoopState {
  optimizerStep: number
  random: { generator: 'philox4x32-10'; seed: number; step: number }
  outliers: OutlierState | null
}

/** Options with what holds for those not given. */
type Resolved = LoopOptions & Required<Pick<LoopOptions, Exclude<LoopSetting, 'out' | 'resume'> | 'name' | 'onMessage'>>

function resolve(options: LoopOptions): Resolved {
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined))
  const usual = {
    ...Object.fromEntries(DEFAULTED.map((key) => [key, RUN_SETTINGS[key].default])),
    name: 'train',
    onMessage: (text: string) => console.error(text),
  }
  // the usual interval may be longer than the run, one that was asked for may not
  const allowLongInterval = options.allowLongInterval || options.saveEvery === undefined
  return { ...usual, ...given, allowLongInterval } as Resolved
}

const REQUIRED = ['steps', 'lr'] as const
/** The loop's own of the table. */
const DEFAULTED = [
  ...(['warmupRatio', 'weightDecay', 'clipGradNorm', 'lossNorm', 'optimizerState', 'offloadOptimizer'] as const),
  ...(['seed', 'skipOutliers', 'saveEvery', 'keep'] as const),
]

/** @throws AlignGPTError ERR_ARGUMENT naming the option */
function checkOptions(o: LoopOptions): void {
  for (const key of [...REQUIRED, ...DEFAULTED]) {
    const { kind } = RUN_SETTINGS[key]
    if (kind.accepts(o[key]) || (o[key] === undefined && !REQUIRED.some((k) => k === key))) continue
    throw new AlignGPTError('ERR_ARGUMENT', `[train] ${key}: expected ${kind.expected}, got ${show(o[key])}`)
  }
}

/** What the numbers of a run depend on, as far as the loop knows. */
function loopSettings(o: Resolved): Record<string, unknown> {
  const { lr, steps, warmupRatio, clipGradNorm, seed, weightDecay, beta1, beta2 } = o
  const { optimizerState, offloadOptimizer, lossNorm, skipOutliers } = o
  return {
    ...{ lr, steps, warmupRatio, clipGradNorm, seed, weightDecay, beta1, beta2 },
    ...{ optimizerState, offloadOptimizer, lossNorm, skipOutliers },
  }
}

/** Steps that are handed to `onStep`. */
type Info<X> = LoopStep & X

type TrainOptions<B, R extends MicroResult, X extends object, V> = LoopOptions &
  LoopHooks<B, R, X, V> & {
    onStep?: (step: Info<X>) => void
    onEvaluation?: (evaluation: V) => void
  }

/** One training run. */
class Run<B, R extends MicroResult, X extends object, V> {
  readonly #model: TrainableModel<B, R>
  readonly #source: BatchSource<B>
  readonly #o: Resolved & TrainOptions<B, R, X, V>
  readonly #optimizer: AdamW
  readonly #micro: MicroSteps<B, R>
  readonly #outliers: Outliers | null
  readonly #schedule: Schedule
  readonly #losses: number[] = []
  readonly #sinks: RunSink<Info<X>, V>[] = []
  #saver: Saver | null = null
  /** what every checkpoint of the run says */
  #origin: Pick<Manifest, 'config' | 'maker'> | null = null
  #done = 0
  #resumed = 0
  /** the weights may be between two steps */
  #updating = false
  /** of the step that runs */
  #batches: readonly B[] = []

  constructor(model: TrainableModel<B, R>, source: BatchSource<B>, options: TrainOptions<B, R, X, V>) {
    const o = { ...options, ...resolve(options) }
    const { weightDecay, beta1, beta2, optimizerState: state, offloadOptimizer: offload, seed, skipOutliers } = o
    this.#model = model
    this.#source = source
    this.#o = o
    this.#outliers = skipOutliers ? new Outliers(skipOutliers === true ? {} : skipOutliers) : null
    this.#schedule = new Schedule(o.saveEvery, o.steps, !o.allowLongInterval)
    this.#micro = new MicroSteps(model, o.lossNorm)
    this.#optimizer = new AdamW(model.parameters, { weightDecay, beta1, beta2, state, offload, seed })
  }

  #tensors(): StateTensor[] {
    return checkpointTensors(this.#o.weights ?? this.#model.parameters, this.#optimizer)
  }

  get #device() {
    return this.#model.parameters[0].tensor.device
  }

  /** Goes on where a run stopped, and opens what the steps need. */
  async open(): Promise<void> {
    const o = this.#o
    if (o.out || o.resume) {
      this.#origin = { config: { ...o.settings?.(), ...loopSettings(o) }, maker: maker(this.#device) }
      const found = findResume(o, this.#origin, o.onMessage)
      if (found) this.#restore(found.folder, found.manifest)
    }
    if (o.out) this.#saver = new Saver(checkpointFolder(o.out), o.keep, o.onMessage)
    this.#resumed = this.#done
    await this.#source.open?.(this.#done)
    if (o.out) {
      fs.mkdirSync(o.out, { recursive: true })
      const log = { out: o.out, phase: o.name, tell: o.onMessage }
      this.#sinks.push(new StepLog(log, this.#done, o.evaluation?.evaluated))
    }
    if (o.sinks) this.#sinks.push(...(await o.sinks(this.#done)))
  }

  #restore(checkpoint: string, { step, state }: Manifest): void {
    const { optimizerStep, outliers } = state as unknown as LoopState
    readCheckpoint(checkpoint, this.#tensors())
    this.#optimizer.resume(optimizerStep)
    if (outliers) this.#outliers?.restore(outliers)
    this.#o.restore?.(state, checkpoint)
    this.#done = step
  }

  /** Steps until the end or the signal. */
  async go(): Promise<void> {
    const o = this.#o
    await this.#evaluate() // a signal may have come in the middle of it
    for (const start = this.#done; this.#done < o.steps && !o.signal?.aborted; ) {
      const { info, seconds } = await this.#step()
      this.#losses.push(info.loss)
      for (const sink of this.#sinks) sink.step(info)
      o.onStep?.(info)
      if (this.#done === start + 2) this.#schedule.measured(seconds)
      await this.#evaluate()
      if (this.#done < o.steps && this.#schedule.due(this.#done)) await this.#save()
      this.#saver?.check()
      await turn() // signals and decoding get their turn
    }
    const stopped = this.#unfinished && this.#done > this.#resumed
    if (stopped && this.#saver?.last !== this.#done) await this.#save()
    await this.#saver?.settled()
    o.finish?.()
  }

  /** Whether steps or the last evaluation are missing. */
  get #unfinished(): boolean {
    return this.#done < this.#o.steps || !!this.#o.evaluation?.due(this.#done)
  }

  /** The evaluation, when it is due. */
  async #evaluate(): Promise<void> {
    const evaluation = await this.#o.evaluation?.evaluate(this.#done)
    if (!evaluation) return
    for (const sink of this.#sinks) sink.evaluation?.(evaluation)
    this.#o.onEvaluation?.(evaluation)
  }

  async #step(): Promise<{ info: Info<X>; seconds: number }> {
    const o = this.#o
    const step = this.#done
    const from = performance.now()
    const batches = await this.#source.next(step)
    this.#batches = batches
    const lr = cosineRate(step, { lr: o.lr, totalSteps: o.steps, warmupRatio: o.warmupRatio })
    try {
      const { loss, losses, ran } = await this.#micro.accumulate(batches)
      const culprits = ran.filter((_, i) => !Number.isFinite(losses[i]))
      const { gradNorm, skipped } = this.#update({ loss, lr, losses }, culprits.length ? culprits : batches)
      this.#done++
      const seconds = (performance.now() - from) / 1000
      const more = o.info?.({ batches, results: this.#micro.results, seconds }) ?? ({} as X)
      return { info: { step, steps: o.steps, loss, lr, gradNorm, ...more, skipped }, seconds }
    } finally {
      this.#micro.clear()
    }
  }

  /**
   * The optimizer step.
   * @param suspects micro-batches that are named when something is not finite
   * @throws ERR_NOT_FINITE, with the weights as they were
   */
  #update(
    { loss, lr, losses }: { loss: number; lr: number; losses: number[] },
    suspects: readonly B[],
  ): { gradNorm: number; skipped: boolean } {
    const [optimizer, outliers, o] = [this.#optimizer, this.#outliers, this.#o]
    try {
      if (!Number.isFinite(loss))
        throw new AlignGPTError('ERR_NOT_FINITE', `[train] loss: expected a finite number, got ${loss}`)
      const norm = outliers ? optimizer.gradientNorm() : 0
      if (outliers && Number.isFinite(norm) && outliers.isOutlier(loss, norm)) {
        optimizer.zeroGrad()
        return { gradNorm: norm, skipped: true }
      }
      this.#updating = true
      const gradNorm = optimizer.update(lr, o.clipGradNorm)
      this.#updating = false
      return { gradNorm, skipped: false }
    } catch (e) {
      if (!(e instanceof AlignGPTError) || e.code !== 'ERR_NOT_FINITE') {
        optimizer.zeroGrad()
        throw e
      }
      this.#updating = false
      const names = o.describe ? `, records of the step: ${o.describe(suspects)}` : ''
      const dump = this.#dump({ step: this.#done, loss, lr, losses: losses.map(String) })
      optimizer.zeroGrad()
      throw new AlignGPTError(e.code, `${e.message}; weights unchanged${names}${dump}`, { cause: e })
    }
  }

  /** Where the step can be looked at, for the message. */
  #dump(numbers: Record<string, unknown>): string {
    const { out, dump } = this.#o
    if (!out) return ''
    const folder = path.join(out, 'dumps', `step-${this.#done}`)
    try {
      dumpStep(folder, numbers, this.#model.parameters, dump && ((to) => dump(to, this.#batches)))
      return `; to look at: ${folder}`
    } catch (e) {
      return `; it could not be written to ${folder}: ${(e as Error).message}`
    }
  }

  async #save(): Promise<void> {
    if (!this.#saver || !this.#origin) return
    const step = this.#done
    const state: LoopState = {
      optimizerStep: this.#optimizer.step,
      random: { generator: 'philox4x32-10', seed: this.#o.seed, step },
      outliers: this.#outliers?.state ?? null,
    }
    const content = { step, ...this.#origin, state: { ...state, ...this.#o.state?.(step) } }
    await this.#saver.save(content, this.#tensors())
  }

  /**
   * Saves the steps that are done, because an error ends the run.
   * @returns the checkpoint; null without one: nothing new to save, or it could not be done, which was told
   */
  async rescue(): Promise<string | null> {
    const saver = this.#saver
    if (!saver || this.#updating || this.#done === this.#resumed) return null
    this.#micro.clear()
    try {
      if (saver.last !== this.#done) await this.#save()
      await saver.settled()
    } catch (e) {
      this.#o.onMessage(`step ${this.#done} was not saved: ${(e as Error).message}`)
    }
    return saver.last === this.#done ? path.join(saver.folder, `step-${this.#done}`) : null
  }

  /** The error that ends the run, with the place to go on from. */
  withPlace(e: unknown, saved: string | null): unknown {
    if (saved === null) return e
    const place = `the ${this.#done} steps before it are saved in ${saved} (resume)`
    if (e instanceof AlignGPTError)
      return new AlignGPTError(e.code, `${e.message}${e.message.includes('\n') ? '\n' : '; '}${place}`, { cause: e })
    this.#o.onMessage(`an error ends the run; ${place}`)
    return e
  }

  /** The error of a step that found no memory: what the caller's hook makes of it, with the place to go on from. */
  async outOfMemory(cause: AlignGPTError): Promise<AlignGPTError> {
    const saver = this.#saver
    await saver?.settled().catch(() => {}) // what it could not save it has told
    const saved = saver ? listCheckpoints(saver.folder).at(0) : undefined
    const place = saved === undefined ? '' : ` (step-${saved} in ${saver?.folder} is whole: resume)`
    return this.#o.outOfMemory?.(cause, `in step ${this.#done + 1}${place}`, this.#batches) ?? cause
  }

  /** Frees what the run has, whatever came of it. */
  async close(): Promise<void> {
    const device = this.#device
    for (const sink of this.#sinks) sink.end()
    await this.#saver?.close()
    this.#micro.clear()
    this.#optimizer.dispose()
    native.trim(device) // what lay idle between the steps
  }

  result(seconds: number): LoopResult & { settings: Record<string, unknown> | null } {
    return {
      steps: this.#done,
      resumed: this.#resumed,
      loss: this.#losses,
      seconds,
      outliers: this.#outliers?.skipped ?? 0,
      aborted: this.#unfinished,
      settings: this.#origin?.config ?? null,
    }
  }
}

const hasCode = (e: unknown, code: string): boolean => (e as { code?: unknown } | null)?.code === code
const isMemory = (e: unknown): e is AlignGPTError => hasCode(e, 'ERR_MEMORY')

/**
 * Trains any model: AdamW with warm-up and half a cosine, gradients accumulated over the micro-batches of a step and clipped, checkpoints
 * that a later call continues bit for bit (`resume`), log.jsonl in `out`.
 *
 * ```ts
 * import { backward, nn, ops, tensor } from 'aligngpt/core'
 * import { shuffled, train } from 'aligngpt/train'
 *
 * // y = W x, eight points of the plane a step
 * const points = Array.from({ length: 100 }, (_, i) => [Math.sin(i), Math.cos(3 * i)])
 * const data = points.map(([a, b]) => ({ x: [a, b], y: [b, a + 2 * b] }))
 * const weight = nn.initialize('weight', [2, 2], { kind: 'normal', std: 0.1 }, 1, 'f32')
 * const model = {
 *   parameters: [{ name: 'weight', tensor: weight }],
 *   terms: (batch) => batch.length,
 *   lossAndGradients(batch, { denominator }) {
 *     const x = tensor(batch.flatMap((p) => p.x), [batch.length, 2])
 *     const y = tensor(batch.flatMap((p) => p.y), [batch.length, 2])
 *     const miss = ops.sub(ops.linear(x, weight), y)
 *     const loss = ops.scale(ops.sum(ops.mul(miss, miss)), 1 / denominator)
 *     backward(loss)
 *     return { loss }
 *   },
 * }
 * const order = shuffled(data.length, 8, 1)
 * const batches = (step) => [Array.from(order(step), (i) => data[i])]
 * await train(model, batches, { steps: 200, lr: 0.05, out: 'runs/plane', saveEvery: 50 })
 * console.log(weight.toArray()) // 0, 1, 1, 2
 * ```
 * @param model its parameters and their gradients
 * @param batches the micro-batches of a step, as a function of its number
 * @param options the run, and hooks into it
 * @returns what came of it; `settings` is what a checkpoint says the numbers depend on, null without `out`
 * @throws AlignGPTError ERR_ARGUMENT; ERR_CHECKPOINT: nothing to continue from; ERR_NOT_FINITE: a loss or gradient, with the weights as
 *   they were; ERR_SAVE: three checkpoints in a row; ERR_MEMORY; what the model, the batches and the hooks throw. With `out` the steps
 *   that are done are saved first, and the message says where
 */
export async function train<B, R extends MicroResult = MicroResult, X extends object = object, V = unknown>(
  model: TrainableModel<B, R>,
  batches: BatchSource<B> | BatchSource<B>['next'],
  options: TrainOptions<B, R, X, V>,
): Promise<LoopResult & { settings: Record<string, unknown> | null }> {
  checkOptions(options)
  const source = typeof batches === 'function' ? { next: batches } : batches
  let run: Run<B, R, X, V>
  try {
    run = new Run(model, source, options)
  } catch (e) {
    // the optimizer's state may already find no memory
    throw isMemory(e) ? (options.outOfMemory?.(e, 'before the first step', []) ?? e) : e
  }
  const began = performance.now()
  try {
    await run.open()
    await run.go()
  } catch (e) {
    const saved = hasCode(e, 'ERR_SAVE') ? null : await run.rescue()
    throw isMemory(e) ? await run.outOfMemory(e) : run.withPlace(e, saved)
  } finally {
    await run.close()
  }
  return run.result((performance.now() - began) / 1000)
}

/**
 * Batches of a data set in memory, shuffled anew in each epoch; what does not fill a batch is left out of the epoch.
 * @param count records
 * @param batch records of a batch, at most `count`
 * @returns the places of a step's records, a function of (count, batch, seed, step)
 */
export function shuffled(count: number, batch: number, seed = 0): (step: number) => Int32Array {
  const perEpoch = Math.max(1, Math.floor(count / batch))
  let epoch = -1
  let order: Int32Array
  return (step) => {
    if (Math.floor(step / perEpoch) !== epoch) {
      epoch = Math.floor(step / perEpoch)
      order = permutation(count, seed, epoch)
    }
    const at = (step % perEpoch) * batch
    return order.slice(at, at + batch)
  }
}

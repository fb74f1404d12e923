/** What the training loop, its log and the two phases say to each other and to their callers. Types alone. */
import type { Tensor } from '../core/tensor.js'
import type { Dropped } from '../data/drop-log.js'
import type { Best } from '../evaluation/held-out.js'
import type { Parameter } from '../nn/adamw.js'
import type { AlignGPTError } from '../util/errors.js'
import type { RunSettings } from './run-settings.js'

/** What a micro-batch gives; a model may add tensors of its own, which `LoopHooks.info` reads. */
export interface MicroResult {
  /** one element: its share of the step's loss, as it is reported */
  loss: Tensor
}

export interface MicroOptions {
  /** the loss is the sum over the micro-batch's terms divided by this number, so that the shares of a step add up to its mean */
  denominator: number
  /** place of the micro-batch in its step, from 0 */
  micro: number
}

/** What the loop asks of a model. */
export interface TrainableModel<B, R extends MicroResult = MicroResult> {
  /** the tensors that learn, with the names they have in a checkpoint */
  readonly parameters: readonly Parameter[]
  /** terms that the loss of a micro-batch is a mean of, such as labelled tokens; 0 leaves it out. Default: 1 for each */
  terms?(batch: B): number
  /**
   * Forward and backward; gradients are added to those of the parameters. It need not read a value, so that a GPU is not waited for.
   * Tensors made in it are freed by the loop.
   */
  lossAndGradients(batch: B, o: MicroOptions): R
}

/** Where a run's micro-batches come from. */
export interface BatchSource<B> {
  /** called once, before the first step of this process: `start` steps are done, more than 0 in a run that goes on */
  open?(start: number): void | Promise<void>
  /** the micro-batches of a step: a function of the step's number alone, so that a continued run sees what the first one would */
  next(step: number): readonly B[] | Promise<readonly B[]>
}

/** A step that is done. */
export interface LoopStep {
  /** from 0 */
  step: number
  steps: number
  loss: number
  lr: number
  /** before clipping */
  gradNorm: number
  /** an outlier: the weights stayed as they were */
  skipped: boolean
}

/** Takes note of what happens in a run: a log, a bar on a terminal. */
export interface RunSink<S extends LoopStep = LoopStep, V = unknown> {
  step(step: S): void
  evaluation?(evaluation: V): void
  end(): void
}

/** An evaluation between the steps. */
export interface Evaluator<V> {
  /** steps that were done at the last one */
  readonly evaluated: number
  /** whether one is missing after so many steps */
  due(done: number): boolean
  /** the evaluation that is due after so many steps, else null; null too when it was broken off: it is still due then */
  evaluate(done: number): Promise<V | null>
}

/** What a caller of the loop adds to it. `B`: micro-batch, `R`: its result, `X`: what it adds to a step's info, `V`: evaluation. */
export interface LoopHooks<B, R extends MicroResult, X extends object, V> {
  /** adds to what is told of a step; `results` are of the micro-batches that were run */
  info?(step: { batches: readonly B[]; results: readonly R[]; seconds: number }): X
  /** what the run's numbers depend on besides the loop's own settings; a run with others is not continued. Asked for where it is saved */
  settings?(): Record<string, unknown>
  /** weights that a checkpoint holds besides the parameters */
  weights?: readonly { name: string; tensor: Tensor }[]
  /** what else a checkpoint holds after so many steps; plain JSON */
  state?(done: number): Record<string, unknown>
  /** goes on from it; `checkpoint` is its folder */
  restore?(state: Record<string, unknown>, checkpoint: string): void
  evaluation?: Evaluator<V>
  /** further logs, opened when it is known how many steps are done */
  sinks?(start: number): readonly RunSink<LoopStep & X, V>[] | Promise<readonly RunSink<LoopStep & X, V>[]>
  /** called after the last step, while an error still leaves a checkpoint: saves the model */
  finish?(): void
  /** names what some micro-batches consist of, for the error of a step that is not finite */
  describe?(batches: readonly B[]): string
  /** writes such a step's micro-batches into a folder; what it returns goes into the folder's step.json */
  dump?(folder: string, batches: readonly B[]): Record<string, unknown>
  /** makes the error of a run that found no memory; `where` says when, `batches` are those of the step, none before the first */
  outOfMemory?(cause: AlignGPTError, where: string, batches: readonly B[]): AlignGPTError
}

/** Settings of a run that the loop itself follows; the table says what each is and what holds without it (docs/config.md). */
export type LoopSetting =
  | 'warmupRatio'
  | 'weightDecay'
  | 'clipGradNorm'
  | 'lossNorm'
  | 'optimizerState'
  | 'offloadOptimizer'
  | 'seed'
  | 'skipOutliers'
  | 'out'
  | 'saveEvery'
  | 'keep'
  | 'allowLongInterval'
  | 'resume'

/** How a run goes, whatever it trains. Without `out` nothing is written. */
export interface LoopOptions extends Pick<RunSettings, LoopSetting> {
  steps: number
  /** peak learning rate: a linear rise over `warmupRatio` of the steps, then half a cosine to 0 */
  lr: number
  /** of AdamW, default 0.9 */
  beta1?: number
  /** of AdamW, default 0.999 */
  beta2?: number
  /** of the run in its log, default `train` */
  name?: string
  /** takes what a person should know, such as a checkpoint that could not be saved; default: a line on standard error */
  onMessage?: (text: string) => void
  /** the step under way is finished, and in `out` saved */
  signal?: AbortSignal
}

export interface LoopResult {
  /** done, those before a resume included */
  steps: number
  /** steps that were there already */
  resumed: number
  /** of the steps since */
  loss: number[]
  seconds: number
  /** steps without an update (skipOutliers) */
  outliers: number
  /** stopped by the signal: steps or the last evaluation are missing */
  aborted: boolean
}

/** A step of a phase. */
export interface StepInfo extends LoopStep {
  tokens: number
  tokensPerSecond: number
  samplesPerSecond: number
  /** share of the step's time spent waiting for pictures to be decoded, 0 to 1 */
  waited: number
  /** mean weight of each row of the alignment table over the step's pictures */
  coefficients: number[]
}

/** What comes out of a phase. */
export interface TrainResult extends LoopResult {
  /** records that could not be used, each named once */
  bad: Dropped[]
  /** records that do not fit into the longest sequence */
  skipped: Dropped[]
  /** the evaluation with the lowest loss, null without evalShare or evalData; its model is in `out/best` */
  best: Best | null
}

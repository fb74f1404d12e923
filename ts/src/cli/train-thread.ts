/**
 * A training run as a command makes it: in a thread of its own, so that this one hears signals and shows progress while kernels
 * run. The first SIGINT, SIGTERM or SIGHUP lets the step finish and saves; the second ends the process at once, whatever its threads do,
 * and the checkpoint before it stays.
 */
import type { Worker } from 'node:worker_threads'
import type { EvaluationInfo } from '../evaluation/held-out.js'
import { Bar } from '../train/progress-bar.js'
import type { StepInfo, TrainResult } from '../train/types.js'
import { AlignGPTError } from '../util/errors.js'
import { startThread } from '../util/worker.js'
import { Signals } from './signals.js'
import type { StopRequest, TrainJob, TrainNews } from './train-worker.js'

export interface RunOutcome {
  result: TrainResult
  /** 0, or 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM */
  status: number
}

/** Plain lines where there is no terminal, else a bar. */
class Progress {
  #bar: Bar | undefined
  #opening: Promise<void> | undefined
  constructor(private readonly name: string) {}
  step(s: StepInfo): void {
    if (!process.stderr.isTTY) {
      console.log(stepLine(s))
      return
    }
    this.#opening ??= Bar.open(this.name, s.steps, s.step).then((bar) => {
      this.#bar = bar
    })
    this.#bar?.step(s)
  }
  evaluation({ step, loss, best }: EvaluationInfo): void {
    if (process.stderr.isTTY) this.#bar?.evaluation({ loss })
    else console.log(`step ${step + 1}: held-out loss ${loss.toFixed(4)}${best ? ', the best so far' : ''}`)
  }
  async end(): Promise<void> {
    await this.#opening
    this.#bar?.end()
  }
}

function stepLine(s: StepInfo): string {
  const numbers = `loss ${s.loss.toFixed(4)} lr ${s.lr.toExponential(2)} ${s.tokensPerSecond.toFixed(0)} tokens/s`
  const waited = `waited ${(100 * s.waited).toFixed(0)} %`
  return `step ${s.step + 1}/${s.steps} ${numbers}, ${waited}${s.skipped ? ', an outlier: not used' : ''}`
}

/** Hands the thread's news on; resolves with its result. */
function listen(worker: Worker, progress: Progress): Promise<TrainResult> {
  return new Promise((resolve, reject) => {
    worker.on('message', (news: TrainNews) => {
      if ('step' in news) progress.step(news.step)
      else if ('evaluation' in news) progress.evaluation(news.evaluation)
      else if ('text' in news) console.error(news.text)
      else if ('figures' in news) console.log(news.figures)
      else if ('result' in news) resolve(news.result)
      else reject(rebuilt(news.error))
    })
    worker.once('error', reject)
    worker.once('exit', () => reject(new Error('the training thread ended without a result')))
  })
}

function rebuilt({ code, message, stack }: Extract<TrainNews, { error: unknown }>['error']): Error {
  const error = code === undefined ? new Error(message) : new AlignGPTError(code, message)
  error.stack = stack
  return error
}

/**
 * Trains in a thread of its own.
 * @returns the result and the process's exit status
 * @throws what the run throws
 */
export async function runTraining(job: TrainJob): Promise<RunOutcome> {
  const worker = startThread(import.meta.url, 'cli/train-worker', { trainJob: job })
  const signals = new Signals('finishing the step and saving')
  signals.signal.addEventListener('abort', () => worker.postMessage('stop' satisfies StopRequest))
  const progress = new Progress(job.phase)
  try {
    const result = await listen(worker, progress)
    return { result, status: result.aborted ? signals.status : 0 }
  } finally {
    await progress.end()
    signals.end()
  }
}

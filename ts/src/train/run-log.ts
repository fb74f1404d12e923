/** What a run writes of each step and evaluation: log.jsonl, and TensorBoard's event files where asked for. */
import fs from 'node:fs'
import path from 'node:path'
import type { EvaluationInfo } from '../evaluation/held-out.js'
import { EventFile } from '../formats/tfevents.js'
import { writeAtomicText } from '../util/files.js'
import type { LoopStep, RunSink, StepInfo } from './types.js'

/** The numbers of a step that TensorBoard draws. */
function scalars(s: StepInfo): Record<string, number> {
  const { loss, lr, gradNorm, tokensPerSecond, waited, coefficients } = s
  const train = Object.entries({ loss, lr, gradNorm, tokensPerSecond, waited }).map(([k, v]) => [`train/${k}`, v])
  return Object.fromEntries([...train, ...coefficients.map((c, level) => [`coefficients/level_${level}`, c])])
}

/** Those of an evaluation. */
function evaluationScalars({ loss, levels = [], tasks = {} }: EvaluationInfo): Record<string, number> {
  const named = Object.entries(tasks)
  const groups = [
    ...levels.map((g, level) => [`level_${level}`, g] as const),
    ...named.map(([t, g]) => [`task_${t}`, g] as const),
  ]
  const losses = groups.flatMap(([name, g]) => (g.loss === null ? [] : [[`eval/${name}`, g.loss]]))
  const gate = named.flatMap(([t, g]) => g.coefficients?.map((c, level) => [`gate/${t}/level_${level}`, c]) ?? [])
  return Object.fromEntries([['eval/loss', loss], ...losses, ...gate])
}

/** Says once that writing fails, until it works again: a full disk is no reason to stop training. */
class Careful {
  readonly #file: string
  readonly #tell: (text: string) => void
  /** whether the last attempt failed */
  broken = false

  constructor(file: string, tell: (text: string) => void) {
    this.#file = file
    this.#tell = tell
  }
  try(write: () => void): void {
    try {
      write()
      this.broken = false
    } catch (e) {
      if (!this.broken) this.#tell(`${this.#file}: ${(e as Error).message}; training goes on`)
      this.broken = true
    }
  }
}

interface LogOptions {
  /** folder of the run */
  out: string
  tell: (text: string) => void
}

/** log.jsonl: a line of JSON for each step and each evaluation. */
export class StepLog implements RunSink {
  readonly #file: string
  readonly #phase: string
  readonly #careful: Careful

  /**
   * @param start steps a continued run has done: what the log says of them stays, what a killed run did beyond them goes
   * @param evaluated of those, at the last evaluation
   */
  constructor(o: LogOptions & { phase: string }, start: number, evaluated = 0) {
    this.#file = path.join(o.out, 'log.jsonl')
    this.#phase = o.phase
    this.#careful = new Careful(this.#file, o.tell)
    const kept = start > 0 && fs.existsSync(this.#file) ? linesBefore(this.#file, start, evaluated) : ''
    writeAtomicText(this.#file, kept)
  }
  step(s: LoopStep): void {
    this.#append({ phase: this.#phase, ...s })
  }
  /** @param info with the step it came after, which a continued run looks for */
  evaluation(info: unknown): void {
    const { step, steps, ...evaluation } = info as Record<string, unknown>
    this.#append({ phase: this.#phase, step, steps, evaluation })
  }
  end(): void {}

  #append(line: Record<string, unknown>): void {
    const text = JSON.stringify({ ...line, time: new Date().toISOString() })
    const careful = this.#careful
    careful.try(() => fs.appendFileSync(this.#file, `${careful.broken ? '\n' : ''}${text}\n`))
  }
}

/** TensorBoard's event files of a phase. */
export class EventLog implements RunSink<StepInfo, EvaluationInfo> {
  readonly #events: EventFile
  readonly #careful: Careful

  /** @param start steps a continued run has done */
  constructor({ out, tell }: LogOptions, start: number) {
    this.#events = new EventFile(out, start)
    this.#careful = new Careful(this.#events.file, tell)
  }
  step(s: StepInfo): void {
    this.#careful.try(() => this.#events.step(s.step, scalars(s)))
  }
  evaluation(e: EvaluationInfo): void {
    this.#careful.try(() => this.#events.step(e.step, evaluationScalars(e)))
  }
  end(): void {
    this.#events.close()
  }
}

/** The lines of a log that are whole and of steps before `start`, or of evaluations after those before `evaluated`. */
function linesBefore(file: string, start: number, evaluated: number): string {
  const before = (line: string): boolean => {
    try {
      const { step, evaluation } = JSON.parse(line)
      return step < (evaluation ? evaluated : start)
    } catch {
      return false
    }
  }
  return fs
    .readFileSync(file, 'utf8')
    .split('\n')
    .filter(before)
    .map((line) => `${line}\n`)
    .join('')
}

/** What a run says of each step: log.jsonl always, TensorBoard's event files where asked for, a bar on a terminal. */
import fs from 'node:fs'
import path from 'node:path'
import { Bar } from '../cli/progress.js'
import type { EvaluationInfo } from '../evaluation/held-out.js'
import { EventFile } from '../formats/tfevents.js'
import { writeAtomicText } from '../util/files.js'
import type { StepInfo } from './trainer.js'

interface LogOptions {
  out?: string
  tensorboard?: boolean
  progress?: boolean
  steps: number
  onMessage: (text: string) => void
}

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

export class Log {
  #bar: Bar | undefined
  #events: EventFile | undefined
  #broken = false
  #eventsBroken = false
  private constructor(
    private readonly phase: string,
    private readonly file: string | undefined,
    private readonly tell: (text: string) => void,
  ) {}

  /**
   * @param start steps a continued run has done: what the log says of them stays, what a killed run did beyond them goes
   * @param evaluated of those, at the last evaluation
   */
  static async open(phase: string, o: LogOptions, start: number, evaluated = 0): Promise<Log> {
    const log = new Log(phase, o.out && path.join(o.out, 'log.jsonl'), o.onMessage)
    if (o.out && log.file) {
      fs.mkdirSync(o.out, { recursive: true })
      writeAtomicText(log.file, start > 0 && fs.existsSync(log.file) ? linesBefore(log.file, start, evaluated) : '')
      if (o.tensorboard) log.#events = new EventFile(o.out, start)
    }
    if (o.progress ?? process.stderr.isTTY) log.#bar = await Bar.open(phase, o.steps, start)
    return log
  }
  step(s: StepInfo): void {
    if (this.file) this.#append(this.file, JSON.stringify({ phase: this.phase, ...s, time: new Date().toISOString() }))
    if (this.#events) this.#addEvent(this.#events, s.step, scalars(s))
    this.#bar?.step(s)
  }
  evaluation({ step, steps, ...evaluation }: EvaluationInfo): void {
    const line = { phase: this.phase, step, steps, evaluation, time: new Date().toISOString() }
    if (this.file) this.#append(this.file, JSON.stringify(line))
    if (this.#events) this.#addEvent(this.#events, step, evaluationScalars({ step, steps, ...evaluation }))
    this.#bar?.evaluation(evaluation.loss)
  }
  /** A full disk is no reason to stop training. */
  #append(file: string, line: string): void {
    try {
      fs.appendFileSync(file, `${this.#broken ? '\n' : ''}${line}\n`)
      this.#broken = false
    } catch (e) {
      if (!this.#broken) this.tell(`${file}: ${(e as Error).message}; training goes on`)
      this.#broken = true
    }
  }
  #addEvent(events: EventFile, step: number, values: Record<string, number>): void {
    try {
      events.step(step, values)
      this.#eventsBroken = false
    } catch (e) {
      if (!this.#eventsBroken) this.tell(`${events.file}: ${(e as Error).message}; training goes on`)
      this.#eventsBroken = true
    }
  }
  end(): void {
    this.#events?.close()
    this.#bar?.end()
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

/** A bar on the terminal, for a run in this thread and for one whose news come from another. */
import type { SingleBar } from 'cli-progress'
import type { RunSink, StepInfo } from './types.js'

export class Bar implements RunSink<StepInfo, { loss: number }> {
  readonly #bar: SingleBar
  /** Use open. */
  constructor(bar: SingleBar) {
    this.#bar = bar
  }

  /** @param start steps that are done already */
  static async open(name: string, steps: number, start: number): Promise<Bar> {
    const { SingleBar } = await import('cli-progress') // where nobody looks it need not be loaded
    const format = `${name} [{bar}] {value}/{total} loss {loss}{heldOut} {rate} tokens/s, {eta_formatted} left`
    const bar = new SingleBar({ format, stream: process.stderr, hideCursor: true })
    bar.start(steps, start, { loss: '-', heldOut: '', rate: '-' })
    return new Bar(bar)
  }
  step(s: StepInfo): void {
    this.#bar.update(s.step + 1, { loss: s.loss.toFixed(4), rate: s.tokensPerSecond.toFixed(0) })
  }
  /** @param e loss on held-out records */
  evaluation(e: { loss: number }): void {
    this.#bar.update({ heldOut: ` (held out ${e.loss.toFixed(4)})` })
  }
  end(): void {
    this.#bar.stop()
  }
}

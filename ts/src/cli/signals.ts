/** SIGINT, SIGTERM and SIGHUP of a command: the first one asks for an end in good order, the second ends the process. */
import { native } from '../core/native.js'

/** Exit status of a process that a signal ended, as shells give it. */
const STATUS = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const
type Signal = keyof typeof STATUS

/**
 * Hears signals until `end`. The second one ends the process at once, also while a kernel keeps the event loop waiting
 * (native.secondSignalEnds); what was written before it stays. SIGHUP is no second one: a terminal that closes may send several.
 */
export class Signals {
  heard: Signal | null = null
  readonly #controller = new AbortController()
  readonly #handlers = (Object.keys(STATUS) as Signal[]).map((name) => [name, () => this.#hear(name)] as const)
  /** @param promise what is going to be done after the first: 'finishing the step and saving' */
  constructor(private readonly promise: string) {
    for (const [name, handler] of this.#handlers) process.on(name, handler)
    native.secondSignalEnds(true)
  }
  #hear(name: Signal): void {
    if (this.heard && name === 'SIGHUP') return
    if (this.heard) native.exit(STATUS[name]) // where the native core does not
    this.heard = name
    console.error(`\n${name}: ${this.promise} (once more to stop at once)`)
    this.#controller.abort()
  }
  /** aborted by the first */
  get signal(): AbortSignal {
    return this.#controller.signal
  }
  /** 0, or 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM */
  get status(): number {
    return this.heard ? STATUS[this.heard] : 0
  }
  end(): void {
    native.secondSignalEnds(false)
    for (const [name, handler] of this.#handlers) process.off(name, handler)
  }
}

/** Runs the work of a command while signals are heard. After one the process's exit status is the signal's. */
export async function hearing<T>(promise: string, work: (signals: Signals) => Promise<T>): Promise<T> {
  const signals = new Signals(promise)
  try {
    return await work(signals)
  } finally {
    signals.end()
    if (signals.heard) process.exitCode = signals.status
  }
}

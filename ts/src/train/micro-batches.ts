/** Forward and backward of the micro-batches of a step. */
import { setImmediate as turn } from 'node:timers/promises'
import { scope, Tensor } from '../core/tensor.js'
import type { MicroResult, TrainableModel } from './types.js'

/** What a step's micro-batches gave. */
export interface Accumulated<B> {
  /** of the step */
  loss: number
  /** the shares of those that were run */
  losses: number[]
  /** those that were run: the others have no term of the loss */
  ran: B[]
}

const tensorsOf = (result: MicroResult): Tensor[] =>
  Object.values(result).filter((value): value is Tensor => value instanceof Tensor)

/** Runs micro-batches one step after the other; gradients are collected in the parameters. */
export class MicroSteps<B, R extends MicroResult> {
  readonly #model: TrainableModel<B, R>
  readonly #lossNorm: 'batch' | 'micro'
  #results: R[] = []

  /** @param lossNorm mean over the terms of the step, or mean of the micro-batches' means */
  constructor(model: TrainableModel<B, R>, lossNorm: 'batch' | 'micro' = 'batch') {
    this.#model = model
    this.#lossNorm = lossNorm
  }

  /** What the micro-batches since `clear` gave; their tensors live until the next one. */
  get results(): readonly R[] {
    return this.#results
  }

  /** All of a step; others get their turn in between. */
  async accumulate(batches: readonly B[]): Promise<Accumulated<B>> {
    const model = this.#model
    const counted = batches.map((batch) => ({ batch, terms: model.terms ? model.terms(batch) : 1 }))
    const ran = counted.filter(({ terms }) => terms > 0)
    const total = ran.reduce((n, { terms }) => n + terms, 0)
    for (const [i, { batch, terms }] of ran.entries()) {
      if (i) await turn()
      this.run(batch, this.#lossNorm === 'micro' ? ran.length * terms : total)
    }
    // a GPU is waited for here, when all of the step is under way
    const losses = this.#results.map((r) => r.loss.item())
    return { loss: losses.reduce((a, b) => a + b, 0), losses, ran: ran.map(({ batch }) => batch) }
  }

  /** Enqueues one micro-batch. */
  run(batch: B, denominator: number): void {
    const micro = this.#results.length
    const one = (): R => {
      const result = this.#model.lossAndGradients(batch, { denominator, micro })
      for (const t of tensorsOf(result)) t.persist()
      return result
    }
    this.#results.push(scope(one))
  }

  /** Frees the results of a step. */
  clear(): void {
    for (const result of this.#results) for (const t of tensorsOf(result)) t.dispose()
    this.#results = []
  }
}

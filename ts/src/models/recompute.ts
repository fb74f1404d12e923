/** Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): layers run again on the way back. */
import { backward, noGrad, scope, type Tensor } from '../core/tensor.js'
import type { LanguageModel, Packing } from './language-model.js'

/**
 * Forward and backward of a language model of which only the layers' inputs are kept. Backward never crosses a layer that runs
 * again: each one is walked by itself and hands the gradient of its input to the one below.
 * @param embeds [T, H] the packed input; the gradient flows into what it was made of
 * @param head last hidden state after the final norm [T, H] -> the loss []
 * @returns the loss, in the scope of the call
 */
export function backwardByLayer(
  language: LanguageModel,
  embeds: Tensor,
  p: Packing,
  head: (hidden: Tensor) => Tensor,
): Tensor {
  const inputs = [embeds.detach()]
  noGrad(() => {
    for (let i = 0; i < language.depth; i++) inputs.push(scope(() => language.layer(i, inputs[i], p)))
  })
  const top = (inputs.pop() as Tensor).detach().requiresGrad()
  const loss = head(language.norm(top))
  backward(loss)
  let gradient = top.grad() as Tensor
  for (let i = language.depth - 1; i >= 0; i--) {
    const above = gradient
    gradient = scope(() => {
      const x = inputs[i].detach().requiresGrad()
      const y = scope(() => language.layer(i, x, p)) // the rest lives where the tape saved it
      backward(y, above)
      return x.grad() as Tensor
    })
    above.dispose()
    inputs[i].dispose()
  }
  backward(embeds, gradient)
  return loss
}

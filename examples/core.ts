/** Three layers learn on which of two spirals a point lies: `npx tsx examples/core.ts`. */
import { AdamW, backward, cosineRate, nn, noGrad, ops, scope, type Tensor, tensor } from 'aligngpt/core'

const SIZE = 400
const STEPS = 300

// Points of two arms, one turned against the other by half a circle, and the arm of each.
const at = (i: number): number[] => {
  const [arm, t] = [i % 2, (i + 1) / SIZE]
  return [t * Math.cos(9 * t + Math.PI * arm), t * Math.sin(9 * t + Math.PI * arm)]
}
const points = tensor(Array.from({ length: SIZE }, (_, i) => at(i)).flat(), [SIZE, 2])
const arms = tensor(Int32Array.from({ length: SIZE }, (_, i) => i % 2))

// A layer takes its parameters from a source: here new ones, decided by their names and the seed 0.
class Network extends nn.Module {
  readonly first: nn.Linear
  readonly second: nn.Linear
  readonly last: nn.Linear
  constructor(s: nn.ParameterSource) {
    super()
    this.first = new nn.Linear(s.at('first'), 2, 32, { bias: true })
    this.second = new nn.Linear(s.at('second'), 32, 32, { bias: true })
    this.last = new nn.Linear(s.at('last'), 32, 2, { bias: true })
  }
  forward(x: Tensor): Tensor {
    return this.last.forward(this.second.forward(this.first.forward(x, 'gelu'), 'gelu'))
  }
}
const network = new Network(new nn.ParameterSource((name, shape, init) => nn.initialize(name, shape, init, 0, 'f32')))
const optimizer = new AdamW([...network.namedParameters()].map(([name, t]) => ({ name, tensor: t })))

for (let step = 0; step < STEPS; step++) {
  // What is made in a scope is freed at its end; what backward needs, the tape keeps until then.
  const loss = scope(() => {
    const mean = ops.crossEntropy(network.forward(points), arms)
    backward(mean)
    return mean.item()
  })
  optimizer.update(cosineRate(step, { lr: 0.02, totalSteps: STEPS, warmupRatio: 0.03 }))
  if (step % 50 === 0) console.log(`step ${step} loss ${loss.toFixed(4)}`)
}

const scores = scope(() => noGrad(() => network.forward(points).toFloats()))
const right = Array.from({ length: SIZE }, (_, i) => (scores[2 * i + 1] > scores[2 * i] ? 1 : 0) === i % 2)
console.log(`${right.filter(Boolean).length} of ${SIZE} points right`)
optimizer.dispose()
network.dispose()

/** Layers with parameters, and their initialisation (PyTorch's). */
import { type Activation, add, layerNorm, linear, rmsNorm, scale } from '../core/ops.js'
import { scope, type Tensor } from '../core/tensor.js'
import { AlignGPTError } from '../util/errors.js'
import { type Init, Module, type ParameterSource } from './module.js'

/** y = act(x W^T + b). PyTorch's default initialisation: uniform within 1 / sqrt(fan in), weight and bias. */
export class Linear extends Module {
  readonly weight: Tensor
  readonly bias?: Tensor
  /** a low-rank adapter beside the weight (lora.ts): A [r, inputs] and B [outputs, r], named as PEFT does */
  lora_A?: Linear
  lora_B?: Linear
  /** alpha / r of the adapter */
  scaling = 1
  constructor(s: ParameterSource, inputs: number, outputs: number, o: { bias: boolean; init?: Init; biasInit?: Init }) {
    super()
    const usual: Init = { kind: 'uniform', bound: 1 / Math.sqrt(inputs) }
    this.weight = s.tensor('weight', [outputs, inputs], o.init ?? usual)
    if (o.bias) this.bias = s.tensor('bias', [outputs], o.biasInit ?? usual)
  }
  forward(x: Tensor, activation: Activation = 'none'): Tensor {
    if (!this.lora_A) return linear(x, this.weight, this.bias, activation)
    return scope(() => this.adapted(linear(x, this.weight, this.bias, activation), (a) => linear(x, a)))
  }
  /** y + (alpha / r) (x A^T) B^T where there is an adapter, else y; `project` multiplies the layer's input x by A^T. */
  adapted(y: Tensor, project: (a: Tensor) => Tensor): Tensor {
    const update = this.update(project)
    return update ? add(y, update) : y
  }
  /** What the adapter adds, if there is one. */
  update(project: (a: Tensor) => Tensor): Tensor | null {
    if (!this.lora_A || !this.lora_B) return null
    return this.lora_B.forward(scale(project(this.lora_A.weight), this.scaling))
  }
}

export class LayerNorm extends Module {
  readonly weight: Tensor
  readonly bias: Tensor
  #eps: number
  constructor(s: ParameterSource, width: number, eps: number) {
    super()
    this.weight = s.tensor('weight', [width], { kind: 'constant', value: 1 })
    this.bias = s.tensor('bias', [width], { kind: 'constant', value: 0 })
    this.#eps = eps
  }
  forward(x: Tensor): Tensor {
    return layerNorm(x, this.weight, this.bias, this.#eps)
  }
}

export class RMSNorm extends Module {
  readonly weight: Tensor
  #eps: number
  constructor(s: ParameterSource, width: number, eps: number) {
    super()
    this.weight = s.tensor('weight', [width], { kind: 'constant', value: 1 })
    this.#eps = eps
  }
  forward(x: Tensor): Tensor {
    return rmsNorm(x, this.weight, this.#eps)
  }
}

/** A table of rows, e.g. token or position embeddings. */
export class Embedding extends Module {
  readonly weight: Tensor
  constructor(s: ParameterSource, rows: number, width: number, init: Init) {
    super()
    this.weight = s.tensor('weight', [rows, width], init)
  }
}

/** Modules under numeric names, as torch.nn.Sequential writes them ("0", "2", ...). */
export class Sequential extends Module {
  [index: string]: unknown
  constructor(layers: Record<string, Module>) {
    super()
    Object.assign(this, layers)
  }
}

/** Hugging Face name of an activation -> ours. */
export function activationOf(name: string): Activation {
  const known: Record<string, Activation> = {
    gelu: 'gelu',
    gelu_new: 'gelu_tanh',
    gelu_pytorch_tanh: 'gelu_tanh',
    quick_gelu: 'quick_gelu',
    silu: 'silu',
    swish: 'silu',
  }
  const found = known[name]
  if (!found) {
    const expected = Object.keys(known).join(', ')
    throw new AlignGPTError('ERR_CONFIG', `[config] hidden_act: expected one of ${expected}, got ${name}`)
  }
  return found
}

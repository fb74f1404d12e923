/** Modules: a tree of objects whose property names are the Hugging Face parameter names. */

import { native } from '../core/native.js'
import {
  type Activation,
  add,
  cast,
  concat,
  layerNorm,
  linear,
  type QkvArgs,
  qkvLinear,
  rmsNorm,
  scale,
  slice,
  to,
} from '../core/ops.js'
import { type Device, type Dtype, scope, Tensor, zeros } from '../core/tensor.js'
import { AlignGPTError } from '../util/errors.js'

/** How a new parameter is filled; `seed` and the parameter's name decide the values. */
export type Init =
  | { kind: 'uniform'; bound: number }
  | { kind: 'normal'; std: number }
  | { kind: 'constant'; value: number }

/** Where parameters come from: a checkpoint, or initialisation. Prefixes are joined by dots. */
export class Source {
  constructor(
    private readonly make: (name: string, shape: number[], init: Init) => Tensor,
    private readonly has: (name: string) => boolean = () => true,
    readonly prefix = '',
  ) {}
  at(name: string): Source {
    return new Source(this.make, this.has, `${this.prefix}${name}.`)
  }
  tensor(name: string, shape: number[], init: Init): Tensor {
    return this.make(this.prefix + name, shape, init)
  }
  /** Whether the checkpoint holds this tensor (always true for initialisation). */
  holds(name: string): boolean {
    return this.has(this.prefix + name)
  }
}

/** 53-bit hash of a parameter's name and the seed (cyrb53): each parameter has its own random stream. */
function streamOf(name: string, seed: number): number {
  let a = 0xdeadbeef ^ seed
  let b = 0x41c6ce57 ^ Math.floor(seed / 0x100000000)
  for (let i = 0; i < name.length; i++) {
    const c = name.charCodeAt(i)
    a = Math.imul(a ^ c, 2654435761)
    b = Math.imul(b ^ c, 1597334677)
  }
  a = Math.imul(a ^ (a >>> 16), 2246822507) ^ Math.imul(b ^ (b >>> 13), 3266489909)
  b = Math.imul(b ^ (b >>> 16), 2246822507) ^ Math.imul(a ^ (a >>> 13), 3266489909)
  return 4294967296 * (2097151 & b) + (a >>> 0)
}

/** A persistent tensor filled as `init` says. Initialised in f32 on the CPU, so every dtype and device starts equal. */
export function initialize(
  name: string,
  shape: number[],
  init: Init,
  seed: number,
  dtype: Dtype,
  device: Device = 'cpu',
): Tensor {
  return scope(() => {
    const t = new Tensor(native.zeros(shape, 'f32'))
    const stream = streamOf(name, seed)
    if (init.kind === 'constant') native.fill(t.h, init.value)
    else if (init.kind === 'uniform') native.random(t.h, 'uniform', -init.bound, init.bound, stream, 0)
    else native.random(t.h, 'normal', 0, init.std, stream, 0)
    return to(cast(t, dtype), device).persist()
  })
}

export abstract class Module {
  /** [name, tensor] of every parameter below, depth first, in the order of construction. */
  *namedParameters(prefix = ''): Generator<[string, Tensor]> {
    for (const [key, value] of Object.entries(this)) {
      if (value instanceof Tensor) yield [prefix + key, value]
      else if (value instanceof Module) yield* value.namedParameters(`${prefix}${key}.`)
      else if (Array.isArray(value))
        for (const [i, item] of value.entries())
          if (item instanceof Module) yield* item.namedParameters(`${prefix}${key}.${i}.`)
    }
  }
  /** [name, module] of this module (named '') and every one below. */
  *namedModules(prefix = ''): Generator<[string, Module]> {
    yield [prefix, this]
    const at = prefix && `${prefix}.`
    for (const [key, value] of Object.entries(this)) {
      if (value instanceof Module) yield* value.namedModules(at + key)
      else if (Array.isArray(value))
        for (const [i, item] of value.entries())
          if (item instanceof Module) yield* item.namedModules(`${at}${key}.${i}`)
    }
  }
  /** Frees every parameter. */
  dispose(): void {
    for (const [, t] of this.namedParameters()) if (t.live) t.dispose()
  }
}

/** y = act(x W^T + b). PyTorch's default initialisation: uniform within 1 / sqrt(fan in), weight and bias. */
export class Linear extends Module {
  readonly weight: Tensor
  readonly bias?: Tensor
  /** a low-rank adapter beside the weight (lora.ts): A [r, inputs] and B [outputs, r], named as PEFT does */
  lora_A?: Linear
  lora_B?: Linear
  /** alpha / r of the adapter */
  scaling = 1
  constructor(s: Source, inputs: number, outputs: number, o: { bias: boolean; init?: Init; biasInit?: Init }) {
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

type Three = readonly [Linear, Linear, Linear]

/** Puts the values of layers with one input behind each other in memory, so that their products can be one (`qkvLinear`). */
export function adjoin(layers: readonly Linear[]): void {
  for (const key of ['weight', 'bias'] as const) {
    const parts = layers.flatMap((l) => l[key] ?? [])
    if (parts.length < layers.length) continue
    const whole = scope(() => concat(parts, 0).persist())
    let at = 0
    for (const [i, l] of layers.entries()) {
      const end = at + parts[i].shape[0]
      Object.assign(l, { [key]: scope(() => slice(whole, 0, at, end).persist()) })
      parts[i].dispose()
      at = end
    }
    whole.dispose() // the views keep its memory
  }
}

/** `qkvLinear` with the layers of queries, keys and values, their adapters included. */
export function projectQkv(x: Tensor, layers: Three, o: Omit<QkvArgs, 'weights' | 'biases' | 'plus'>): Tensor {
  return scope(() => {
    const updates = layers.map((l) => l.update((a) => linear(x, a)))
    const part = (u: Tensor | null, i: number): Tensor =>
      u ?? zeros([x.shape[0], layers[i].weight.shape[0]], x.dtype, x.device)
    return qkvLinear(x, {
      ...o,
      weights: [layers[0].weight, layers[1].weight, layers[2].weight],
      biases: layers.flatMap((l) => l.bias ?? []),
      plus: updates.some(Boolean) ? concat(updates.map(part), 1) : null,
    })
  })
}

export class LayerNorm extends Module {
  readonly weight: Tensor
  readonly bias: Tensor
  #eps: number
  constructor(s: Source, width: number, eps: number) {
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
  constructor(s: Source, width: number, eps: number) {
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
  constructor(s: Source, rows: number, width: number, init: Init) {
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

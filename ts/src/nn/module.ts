/**
 * Layers and optimizers on tensors; nothing here knows a model. models/ builds networks of these, train/ steps them.
 *
 * This file: modules, trees of objects whose property names are the Hugging Face parameter names.
 */
import { native } from '../core/native.js'
import { cast, to } from '../core/ops.js'
import { type Device, type Dtype, scope, Tensor } from '../core/tensor.js'
import { hash53 } from '../util/hash.js'

/** How a new parameter is filled; `seed` and the parameter's name decide the values. */
export type Init =
  | { kind: 'uniform'; bound: number }
  | { kind: 'normal'; std: number }
  | { kind: 'constant'; value: number }

/** Where parameters come from: a checkpoint, or initialisation. Prefixes are joined by dots. */
export class ParameterSource {
  readonly #make: (name: string, shape: number[], init: Init) => Tensor
  readonly #has: (name: string) => boolean
  /** @param has whether the checkpoint holds a tensor of this name; default: every one */
  constructor(
    make: (name: string, shape: number[], init: Init) => Tensor,
    has: (name: string) => boolean = () => true,
    readonly prefix = '',
  ) {
    this.#make = make
    this.#has = has
  }
  at(name: string): ParameterSource {
    return new ParameterSource(this.#make, this.#has, `${this.prefix}${name}.`)
  }
  tensor(name: string, shape: number[], init: Init): Tensor {
    return this.#make(this.prefix + name, shape, init)
  }
  /** Whether the checkpoint holds this tensor. New parameters are in no checkpoint (initSource). */
  holds(name: string): boolean {
    return this.#has(this.prefix + name)
  }
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
    const stream = hash53(name, seed)
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

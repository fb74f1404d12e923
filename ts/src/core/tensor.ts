/**
 * Tensors live in the native core; a `Tensor` here is a handle. Memory belongs to scopes, never to the garbage
 * collector: what is made inside `scope()` is freed at its end, except what it returns.
 */
import { AlignGPTError } from '../util/errors.js'
import { type Device, type Dtype, native, type TensorData } from './native.js'

export type { Device, Dtype, TensorData } from './native.js'

export class Tensor {
  #shape: readonly number[] | undefined
  #dtype: Dtype | undefined
  /** @param h handle given by the native core */
  constructor(readonly h: number) {}

  get shape(): readonly number[] {
    this.#shape ??= Object.freeze(native.shape(this.h))
    return this.#shape
  }
  get dtype(): Dtype {
    this.#dtype ??= native.dtype(this.h)
    return this.#dtype
  }
  get device(): Device {
    return native.device(this.h)
  }
  get numel(): number {
    return this.shape.reduce((n, d) => n * d, 1)
  }
  /** False once disposed or freed by its scope. */
  get live(): boolean {
    return native.isLive(this.h)
  }
  /** A copy of the values; bf16 comes as Float32Array. */
  toArray(): TensorData {
    return native.read(this.h)
  }
  /** The values of a float tensor. @throws ERR_DTYPE for integers */
  toFloats(): Float32Array | Float64Array {
    const a = native.read(this.h)
    if (a instanceof Float32Array || a instanceof Float64Array) return a
    throw new AlignGPTError('ERR_DTYPE', `[toFloats] dtype: expected a float tensor, got ${this.dtype}`)
  }
  /** The value of a tensor with one element. */
  item(): number {
    if (this.numel !== 1) throw new AlignGPTError('ERR_SHAPE', `[item] expected one element, got shape [${this.shape}]`)
    return Number(native.read(this.h)[0])
  }
  /** Overwrites the values; the number of elements must fit, float dtypes are converted. */
  write(data: TensorData): void {
    native.write(this.h, data)
  }
  /** Writes the values' bytes, row-major and little-endian, into a file that is there. @throws ERR_FILE */
  writeFile(file: string, offset: number): void {
    native.writeFile(this.h, file, offset)
  }
  /** The same values outside the tape. */
  detach(): Tensor {
    return new Tensor(native.detach(this.h))
  }
  /** Marks a leaf as a parameter (gradients are collected for it), or not. */
  requiresGrad(on = true): this {
    native.requiresGrad(this.h, on)
    return this
  }
  /** The gradient collected so far, or null. */
  grad(): Tensor | null {
    const g = native.grad(this.h)
    return g === null ? null : new Tensor(g)
  }
  /** Takes the tensor out of every scope: it lives until `dispose()`. */
  persist(): this {
    native.persist(this.h)
    return this
  }
  dispose(): void {
    native.dispose(this.h)
  }
}

function each(value: unknown, visit: (t: Tensor) => void): void {
  if (value instanceof Tensor) visit(value)
  else if (Array.isArray(value)) for (const v of value) each(v, visit)
  else if (value !== null && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype)
    for (const v of Object.values(value)) each(v, visit)
}

/**
 * Runs `fn` and frees every tensor made in it, except those in its result (a tensor, or arrays and plain objects of
 * tensors), which pass to the enclosing scope. `fn` must be synchronous.
 */
export function scope<T>(fn: () => T): T {
  const depth = native.scopeBegin()
  try {
    const result = fn()
    if (result instanceof Promise)
      throw new AlignGPTError('ERR_ARGUMENT', '[scope] function: expected a synchronous one, got a promise')
    each(result, (t) => native.keep(t.h))
    return result
  } finally {
    native.scopeEnd(depth)
  }
}

/** Runs `fn` without recording anything for backward. */
export function noGrad<T>(fn: () => T): T {
  const before = native.setGradEnabled(false)
  try {
    return fn()
  } finally {
    native.setGradEnabled(before)
  }
}

/**
 * Work on a device that is recorded once and launched as often as wanted (CUDA graphs): one launch in place of hundreds. It reads and
 * writes the same memory each time: inputs must be persistent tensors, indices may be written to between launches, and nothing
 * in `fn` may read a value. @throws ERR_UNSUPPORTED on the CPU
 * @param beside works in the same memory as this graph: only results that are held outlive a launch of the other one
 */
export class Graph<T> {
  /** what `fn` returned; its tensors have values after a launch */
  readonly result: T
  readonly #number: number
  constructor(device: Device, fn: () => T, beside?: Graph<unknown>) {
    this.#number = native.graphBegin(device, beside ? beside.#number : null)
    try {
      this.result = fn()
      native.graphEnd(this.#number)
    } catch (e) {
      native.graphDispose(this.#number)
      throw e
    }
  }
  launch(): void {
    native.graphLaunch(this.#number)
  }
  dispose(): void {
    native.graphDispose(this.#number)
  }
}

/** On a GPU a step can be launched as one graph: no measurement has shown yet that it helps, so it is asked for. */
export const wantsGraphs = (device: Device): boolean => device === 'cuda' && process.env.ALIGNGPT_CUDA_GRAPHS === '1'

/** A list of i32 indices that changes while its tensor stays, as long as its length does. */
export class Indices {
  #tensor: Tensor | undefined
  set(values: readonly number[]): Tensor {
    const list = Int32Array.from(values)
    if (this.#tensor?.numel === list.length) this.#tensor.write(list)
    else {
      this.dispose()
      this.#tensor = tensor(list).persist()
    }
    return this.#tensor
  }
  get tensor(): Tensor {
    if (!this.#tensor) throw new AlignGPTError('ERR_ARGUMENT', '[Indices] tensor: expected set() before it')
    return this.#tensor
  }
  dispose(): void {
    this.#tensor?.dispose()
    this.#tensor = undefined
  }
}

/** Goes back from `root`; `seed` is its gradient (default 1, for a single element). */
export function backward(root: Tensor, seed?: Tensor): void {
  native.backward(root.h, seed?.h ?? null)
}

/**
 * A tensor with the given values.
 * @param dtype default: that of the data (Float32Array f32, Float64Array f64, Int32Array i32, BigInt64Array i64; numbers f32)
 * @param device indices, offsets and ids stay on the CPU, where ops check them
 */
export function tensor(
  data: TensorData | readonly number[],
  shape?: readonly number[],
  dtype?: Dtype,
  device: Device = 'cpu',
): Tensor {
  const plain = Array.isArray(data)
  const values = plain
    ? dtype === 'i32'
      ? Int32Array.from(data)
      : dtype === 'f64'
        ? Float64Array.from(data)
        : Float32Array.from(data)
    : (data as TensorData)
  const natural: Dtype =
    values instanceof Float32Array
      ? 'f32'
      : values instanceof Float64Array
        ? 'f64'
        : values instanceof Int32Array
          ? 'i32'
          : 'i64'
  return new Tensor(native.tensor(values, [...(shape ?? [values.length])], dtype ?? natural, device))
}

export function zeros(shape: readonly number[], dtype: Dtype = 'f32', device: Device = 'cpu'): Tensor {
  return new Tensor(native.zeros([...shape], dtype, device))
}

/** Bytes held by the native core on a device in this process, and live handles of this thread. */
export function memory(device: Device = 'cpu'): ReturnType<typeof native.memory> {
  return native.memory(device)
}

/**
 * aligngpt/core: a tensor library with automatic differentiation on the CPU and on CUDA; layers and an optimizer on
 * top.
 */
export { cpuInfo, resolveDevice } from '../core/device.js'
export * as ops from '../core/ops.js'
export {
  backward,
  type Device,
  type Dtype,
  memory,
  noGrad,
  scope,
  Tensor,
  type TensorData,
  tensor,
  zeros,
} from '../core/tensor.js'
export { AdamW, type AdamWOptions, type OptimizerState, type Parameter } from '../nn/adamw.js'
export { cosineRate } from '../nn/schedule.js'
export { permutation, Rng } from '../util/rng.js'
export * as nn from './nn.js'

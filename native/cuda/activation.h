// The activations, for the elementwise kernels and for the end of a matrix product.
#pragma once
#include "gpu.h"

namespace gpu {

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <AgUnaryOp op>
struct Activation {
  float alpha;
  __device__ float value(float x) const {
    if constexpr (op == AG_GELU) return x * (erff(x * 0.70710678118654752440f) + 1) * 0.5f;
    if constexpr (op == AG_GELU_TANH)
      return x * (tanhf((x + x * x * x * 0.044715f) * 0.79788456080286535588f) + 1) * 0.5f;
    if constexpr (op == AG_QUICK_GELU) return x * sigmoid(x * 1.702f);
    if constexpr (op == AG_SILU) return x * sigmoid(x);
    if constexpr (op == AG_SCALE) return x * alpha;
    if constexpr (op == AG_EXP) return expf(x);
    return x;
  }
  __device__ void operator()(const float (&x)[1], float (&y)[1]) const { y[0] = value(x[0]); }
};

__device__ __forceinline__ float gelu_slope(float x) {
  return (erff(x * 0.70710678118654752440f) + 1) * 0.5f + x * expf(-x * x * 0.5f) * 0.39894228040143267794f;
}

// The one `op` names, where the choice cannot be a constant.
__device__ __forceinline__ float activate(AgUnaryOp op, float x) {
  switch (op) {
    case AG_GELU: return Activation<AG_GELU>{1}.value(x);
    case AG_GELU_TANH: return Activation<AG_GELU_TANH>{1}.value(x);
    case AG_QUICK_GELU: return Activation<AG_QUICK_GELU>{1}.value(x);
    case AG_SILU: return Activation<AG_SILU>{1}.value(x);
    default: return x;
  }
}

}  // namespace gpu

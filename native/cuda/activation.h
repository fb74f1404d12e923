// The activations and their slopes, for the elementwise kernels, the end of a matrix product and alignMix's gate.
#pragma once
#include "gpu.h"

namespace gpu {

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <AgUnaryOp op>
struct Activation {
  float alpha;
  __device__ float value(float x) const {
    if constexpr (op == AG_GELU) return x * (erff(x * 0.70710678118654752440f) + 1) * 0.5f;
    if constexpr (op == AG_GELU_TANH) return x * (tanhf((x + x * x * x * 0.044715f) * 0.79788456080286535588f) + 1) * 0.5f;
    if constexpr (op == AG_QUICK_GELU) return x * sigmoid(x * 1.702f);
    if constexpr (op == AG_SILU) return x * sigmoid(x);
    if constexpr (op == AG_SCALE) return x * alpha;
    if constexpr (op == AG_EXP) return expf(x);
    return x;
  }
  __device__ void operator()(const float (&x)[1], float (&y)[1]) const { y[0] = value(x[0]); }
};

template <AgUnaryOp op>
struct ActivationGrad {
  float alpha;
  __device__ float slope(float x) const {
    if constexpr (op == AG_GELU)
      return (erff(x * 0.70710678118654752440f) + 1) * 0.5f + x * expf(-x * x * 0.5f) * 0.39894228040143267794f;
    if constexpr (op == AG_GELU_TANH) {
      const float c = 0.79788456080286535588f, t = tanhf((x + x * x * x * 0.044715f) * c);
      return (t + 1) * 0.5f + x * 0.5f * (1 - t * t) * c * (1 + 3 * 0.044715f * x * x);
    }
    if constexpr (op == AG_QUICK_GELU || op == AG_SILU) {
      const float k = op == AG_SILU ? 1.0f : 1.702f, s = sigmoid(x * k);
      return s + x * s * (1 - s) * k;
    }
    if constexpr (op == AG_SCALE) return alpha;
    if constexpr (op == AG_EXP) return expf(x);
    return x * 0 + 1;  // a NaN stays
  }
  __device__ void operator()(const float (&x)[2], float (&dx)[1]) const { dx[0] = x[0] * slope(x[1]); }
};

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

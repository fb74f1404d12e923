// Elementwise kernels, random numbers, rotary embedding, patches.
#include "gpu.h"

namespace gpu {
namespace {

constexpr int kThreads = 256;

// Blocks for n pieces of work, one for each thread, in a loop over the grid: enough to fill the device, no more.
dim3 grid_for(int64_t n) {
  int64_t most = int64_t(device().processors) * (2048 / kThreads);
  int64_t blocks = div_up(n, kThreads);
  return dim3(unsigned(blocks < most ? blocks : most));
}

// ---- y[i] = f(inputs[i]) ----------------------------------------------------------------------------
// kVector: all pointers are aligned to 16 bytes; the rest of n that fills no pack goes one by one.
template <class T, bool kVector, class F>
__global__ void __launch_bounds__(kThreads) map1(T* y, const T* x, int64_t n, F f) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  int64_t done = 0;
  if constexpr (kVector) {
    constexpr int W = Pack<T>::n;
    for (int64_t i = first; i < n / W; i += step) {
      Pack<T> a = load_pack(x + i * W), out;
#pragma unroll
      for (int j = 0; j < W; j++) out.v[j] = from_float<T>(f(to_float(a.v[j])));
      store_pack(y + i * W, out);
    }
    done = n / W * W;
  }
  for (int64_t i = done + first; i < n; i += step) y[i] = from_float<T>(f(to_float(x[i])));
}

template <class T, class F>
AgStatus map(AgCtx* ctx, const char* op, void* y, const void* x, int64_t n, const F& f) {
  const bool vector = aligned16(y) && aligned16(x);
  return launch(ctx, op, vector ? map1<T, true, F> : map1<T, false, F>, grid_for(vector ? div_up(n, Pack<T>::n) : n), kThreads, 0,
                static_cast<T*>(y), static_cast<const T*>(x), n, f);
}

// ---- activations ------------------------------------------------------------------------------------
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <AgUnaryOp op>
struct Activation {
  float alpha;
  __device__ float operator()(float x) const {
    if constexpr (op == AG_GELU) return x * (erff(x * 0.70710678118654752440f) + 1) * 0.5f;
    if constexpr (op == AG_GELU_TANH) return x * (tanhf((x + x * x * x * 0.044715f) * 0.79788456080286535588f) + 1) * 0.5f;
    if constexpr (op == AG_QUICK_GELU) return x * sigmoid(x * 1.702f);
    if constexpr (op == AG_SILU) return x * sigmoid(x);
    if constexpr (op == AG_SCALE) return x * alpha;
    if constexpr (op == AG_EXP) return expf(x);
    return x;
  }
};

template <AgUnaryOp op>
struct OpTag {
  static constexpr AgUnaryOp value = op;
};
template <class F>
AgStatus with_op(AgCtx* ctx, const char* kernel, AgUnaryOp op, const F& f) {
  switch (op) {
    case AG_NONE: return f(OpTag<AG_NONE>());
    case AG_GELU: return f(OpTag<AG_GELU>());
    case AG_GELU_TANH: return f(OpTag<AG_GELU_TANH>());
    case AG_QUICK_GELU: return f(OpTag<AG_QUICK_GELU>());
    case AG_SILU: return f(OpTag<AG_SILU>());
    case AG_SCALE: return f(OpTag<AG_SCALE>());
    case AG_EXP: return f(OpTag<AG_EXP>());
  }
  return fail(ctx, AG_INVALID, "[%s] op: unknown number %d", kernel, int(op));
}

}  // namespace

AgStatus unary(AgCtx* ctx, const AgUnary* a) {
  return with_float(ctx, "unary", a->dt, [&](auto tag) {
    return with_op(ctx, "unary", a->op, [&](auto op) {
      return map<typename decltype(tag)::type>(ctx, "unary", a->y, a->x, a->n, Activation<decltype(op)::value>{float(a->alpha)});
    });
  });
}

AgStatus fill(AgCtx* ctx, const AgFill*) { return unsupported(ctx, "fill"); }
AgStatus copy2d(AgCtx* ctx, const AgCopy2d*) { return unsupported(ctx, "copy2d"); }
AgStatus cast(AgCtx* ctx, const AgCast*) { return unsupported(ctx, "cast"); }
AgStatus random(AgCtx* ctx, const AgRandom*) { return unsupported(ctx, "random"); }
AgStatus unary_grad(AgCtx* ctx, const AgUnaryGrad*) { return unsupported(ctx, "unary_grad"); }
AgStatus binary(AgCtx* ctx, const AgBinary*) { return unsupported(ctx, "binary"); }
AgStatus silu_mul(AgCtx* ctx, const AgSiluMul*) { return unsupported(ctx, "silu_mul"); }
AgStatus silu_mul_grad(AgCtx* ctx, const AgSiluMulGrad*) { return unsupported(ctx, "silu_mul_grad"); }
AgStatus rope(AgCtx* ctx, const AgRope*) { return unsupported(ctx, "rope"); }
AgStatus patchify(AgCtx* ctx, const AgPatchify*) { return unsupported(ctx, "patchify"); }

}  // namespace gpu

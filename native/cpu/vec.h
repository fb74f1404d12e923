// What a kernel source needs, at the CPU level it is compiled for: vectors of the level's width built on the compiler's
// vector extensions, storage types, exp and erf of our own, loops over the pool.
//
// Everything is in an anonymous namespace and nothing of the standard library's templates is used: an inline function
// compiled with AVX-512 must never be the copy the linker picks for every CPU (scripts/check-levels.mjs).
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "../backend.h"
#include "level.h"
#include "pool.h"

#if defined(AG_LEVEL_AVX512)
#define AG_VECTOR_BYTES 64
#elif defined(AG_LEVEL_AVX2)
#define AG_VECTOR_BYTES 32
#else
#define AG_VECTOR_BYTES 16
#endif

namespace AG_LEVEL {
namespace {

struct bf16 {
  uint16_t bits;
};

typedef float vf __attribute__((vector_size(AG_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(AG_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(AG_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(AG_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(AG_VECTOR_BYTES / 2)));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef vf type;
};
template <>
struct VecOf<double> {
  typedef vd type;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
constexpr int kWidth = AG_VECTOR_BYTES / int(sizeof(C));

// Storage -> compute type ("acc" in backend.h).
template <class S>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class S>
using Acc = typename AccOf<S>::type;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- scalars ----------------------------------------------------------------------------------------
inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline void put(float* p, double x) { *p = float(x); }
inline void put(double* p, double x) { *p = x; }
inline void put(bf16* p, double x) {
  float f = float(x);
  uint32_t u;
  memcpy(&u, &f, 4);
  p->bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// ---- vectors ----------------------------------------------------------------------------------------
inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vd load(const double* p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  vu u = __builtin_convertvector(h, vu) << 16;
  return (vf)u;
}
inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, vd v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {  // round to nearest even, NaN stays NaN
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (u >> 16) | 0x40;
  vu r = (u & 0x7fffffff) > 0x7f800000 ? nan : rounded;
  vh h = __builtin_convertvector(r, vh);
  memcpy(p, &h, sizeof h);
}
// The first n lanes; the others read as zero and are not written.
template <class S>
inline Vec<Acc<S>> load_n(const S* p, int64_t n) {
  S t[kWidth<Acc<S>>];
  memset(t, 0, sizeof t);
  memcpy(t, p, size_t(n) * sizeof(S));
  return load(t);
}
template <class S>
inline void store_n(S* p, Vec<Acc<S>> v, int64_t n) {
  S t[kWidth<Acc<S>>];
  store(t, v);
  memcpy(p, t, size_t(n) * sizeof(S));
}
inline vf splat(float x) { return vf{} + x; }
inline vd splat(double x) { return vd{} + x; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vd vmax(vd a, vd b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }

template <class V>
inline auto lane_sum(V v) {
  auto s = v[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v[0]); i++) s += v[i];
  return s;
}
template <class V>
inline auto lane_max(V v) {
  auto s = v[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v[0]); i++) s = v[i] > s ? v[i] : s;
  return s;
}

// ---- functions --------------------------------------------------------------------------------------
// exp to about 1 ulp: 2^n * polynomial (Cephes' minimax) on [-ln2/2, ln2/2].
inline vf vexp(vf x) {
  const vf over = splat(88.722839f), under = splat(-87.336544f);
  vf c = vmin(vmax(x, under), splat(88.3762626647950f));
  vf n = (c * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  vf r = c - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * (vf)e;
  y = x < under ? splat(0.0f) : y;
  y = x > over ? splat(INFINITY) : y;
  return x == x ? y : x;
}
inline vd vexp(vd x) {
  vd y = {};
  for (int i = 0; i < kWidth<double>; i++) y[i] = exp(x[i]);
  return y;
}

// erf as an odd rational minimax function on [-4, 4]; relative error below 4e-7.
inline vf verf(vf x) {
  x = vmin(vmax(x, splat(-4.0f)), splat(4.0f));
  vf z = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * z - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  return x * p / q;
}
inline vd verf(vd x) {
  vd y = {};
  for (int i = 0; i < kWidth<double>; i++) y[i] = erf(x[i]);
  return y;
}

template <class V>
inline V vsigmoid(V x) {
  return 1 / (1 + vexp(-x));
}
template <class V>
inline V vtanh(V x) {
  return 1 - 2 / (vexp(2 * x) + 1);
}

// y = f(x) and dy/dx of the activations.
template <class V>
inline V activate(AgUnaryOp op, V x, V alpha) {
  switch (op) {
    case AG_GELU: return x * (verf(x * 0.70710678118654752440f) + 1) * 0.5f;
    case AG_GELU_TANH: return x * (vtanh((x + x * x * x * 0.044715f) * 0.79788456080286535588f) + 1) * 0.5f;
    case AG_QUICK_GELU: return x * vsigmoid(x * 1.702f);
    case AG_SILU: return x * vsigmoid(x);
    case AG_SCALE: return x * alpha;
    case AG_EXP: return vexp(x);
    default: return x;
  }
}
template <>
inline vd activate<vd>(AgUnaryOp op, vd x, vd alpha) {
  switch (op) {
    case AG_GELU: return x * (verf(x * 0.70710678118654752440) + 1) * 0.5;
    case AG_GELU_TANH: return x * (vtanh((x + x * x * x * 0.044715) * 0.79788456080286535588) + 1) * 0.5;
    case AG_QUICK_GELU: return x * vsigmoid(x * 1.702);
    case AG_SILU: return x * vsigmoid(x);
    case AG_SCALE: return x * alpha;
    case AG_EXP: return vexp(x);
    default: return x;
  }
}
template <class V, class C>
inline V slope_of(AgUnaryOp op, V x, V alpha, C) {
  const C r2 = C(0.70710678118654752440), c = C(0.79788456080286535588), cubic = C(0.044715), inv = C(0.39894228040143267794);
  switch (op) {
    case AG_GELU: return (verf(x * r2) + 1) * C(0.5) + x * vexp(-x * x * C(0.5)) * inv;
    case AG_GELU_TANH: {
      V t = vtanh((x + x * x * x * cubic) * c);
      return (t + 1) * C(0.5) + x * C(0.5) * (1 - t * t) * c * (1 + 3 * cubic * x * x);
    }
    case AG_QUICK_GELU: {
      V s = vsigmoid(x * C(1.702));
      return s + x * s * (1 - s) * C(1.702);
    }
    case AG_SILU: {
      V s = vsigmoid(x);
      return s + x * s * (1 - s);
    }
    case AG_SCALE: return alpha;
    case AG_EXP: return vexp(x);
    default: return x * 0 + 1;
  }
}

// ---- dispatch and loops -----------------------------------------------------------------------------
template <class S>
struct Tag {
  typedef S type;
};
// Calls f(Tag<storage type>) for a float dtype.
template <class F>
inline AgStatus with_float(AgCtx* ctx, const char* kernel, AgDtype dt, const F& f) {
  switch (dt) {
    case AG_F32: f(Tag<float>()); return AG_OK;
    case AG_BF16: f(Tag<bf16>()); return AG_OK;
    case AG_F64: f(Tag<double>()); return AG_OK;
    default: snprintf(ctx->error, sizeof ctx->error, "%s: dtype must be f32, bf16 or f64", kernel); return AG_INVALID;
  }
}

template <class F>
inline void parallel_for(int64_t n, const F& f) {
  ag_parallel(n, n, [](void* a, int64_t i, int64_t) { (*static_cast<const F*>(a))(i); }, const_cast<F*>(&f));
}
template <class F>
inline void parallel_workers(int64_t n, int64_t workers, const F& f) {
  ag_parallel(n, workers, [](void* a, int64_t i, int64_t w) { (*static_cast<const F*>(a))(i, w); }, const_cast<F*>(&f));
}
// f(begin, end) over pieces of `grain`.
template <class F>
inline void parallel_range(int64_t n, int64_t grain, const F& f) {
  parallel_for(div_up(n, grain), [&](int64_t i) { f(i * grain, min_of(n, (i + 1) * grain)); });
}

constexpr int64_t kGrain = 16384;  // elements of a piece of elementwise work
inline int64_t row_grain(int64_t cols) { return max_of(1, kGrain / max_of(cols, 1)); }

// Adds v to, or puts it at, element i of a gradient buffer.
inline void grad_put(const AgGrad& g, int64_t i, double v) {
  if (g.dt == AG_F32) {
    float* p = static_cast<float*>(g.p) + i;
    *p = g.accumulate ? float(*p + v) : float(v);
  } else if (g.dt == AG_F64) {
    double* p = static_cast<double*>(g.p) + i;
    *p = g.accumulate ? *p + v : v;
  } else {
    bf16* p = static_cast<bf16*>(g.p) + i;
    put(p, g.accumulate ? to_acc(*p) + v : v);
  }
}

}  // namespace
}  // namespace AG_LEVEL

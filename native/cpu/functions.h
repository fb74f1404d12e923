// exp and erf of our own, and the activations, on vectors of the level's width (vec.h).
#pragma once
#include "vec.h"

namespace AG_LEVEL {
namespace {

// exp to about 1 ulp: 2^n * polynomial (Cephes' minimax) on [-ln2/2, ln2/2]. `whole` range: the power of two is applied
// so that infinity, subnormal numbers and zero come out by themselves, and NaN passes through. Otherwise |x| < 80.
inline vf times_power(vf p, vf n) {  // p * 2^n, n whole and -300 < n < 300
#if defined(AG_LEVEL_AVX512)
  return (vf)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)p, (__m512)n);
#else
  vi e = __builtin_convertvector(n, vi), half = e >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
#endif
}
template <bool whole>
inline vf exp_of(vf x) {
  vf c = whole ? vmax(splat(-104.0f), vmin(splat(89.0f), x)) : x;
  vf n = (c * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  vf r = c - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if !defined(AG_LEVEL_AVX512)
  if (!whole) return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
  return times_power(p, n);
}
inline vf vexp(vf x) { return exp_of<true>(x); }
inline vd vexp(vd x) {
  vd y = {};
  for (int i = 0; i < kWidth<double>; i++) y[i] = exp(x[i]);
  return y;
}

// erf to about 1 ulp: x * polynomial below 0.93, 1 - exp(polynomial) above.
inline vf verf(vf x) {
  vf t = vmin(splat(4.0f), (vf)((vu)x & 0x7fffffffu)), s = t * t;
  vf far = splat(-1.72853470e-5f) * t + 3.83197126e-4f;
  far = far * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = 1.0f - exp_of<false>(far * t - t);
  vf near = splat(-5.96761703e-4f);
  near = near * s + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * t + t;
  vf y = t > 0.927734375f ? far : near;
  return (vf)((vu)y | ((vu)x & 0x80000000u));
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
  const C r2 = C(0.70710678118654752440), c = C(0.79788456080286535588), cubic = C(0.044715),
          inv = C(0.39894228040143267794);
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

// Density and share below x of the normal distribution to a relative 1e-5: enough for GELU and its slope where they are
// rounded to bf16. Both come from exp(-x^2/2), a power of two whose fraction is a polynomial; the share beyond |x| is
// that times a polynomial in 1 / (1 + 0.31 |x|). Polynomials by weighted least squares.
struct Normal {
  vf density, below;
};
inline Normal normal_of(vf x) {
  vf t = (vf)((vu)x & 0x7fffffffu), k = 1.0f / (t * 0.31f + 1.0f);
  vf y = vmax(splat(-150.0f), x * x * -0.72134752f), n = (y + 12582912.0f) - 12582912.0f, r = y - n;
  vf e = r * 0.00958285287f + 0.0559064249f;
  e = e * r + 0.240240986f;
  e = e * r + 0.693124193f;
  e = times_power(e * r + 1.0f, n);
  vf p = k * -0.0739293585f + 0.180450984f;
  p = p * k + 0.0157440118f;
  p = p * k + 0.133430134f;
  p = p * k + 0.120441199f;
  p = (p * k + 0.123860708f) * k * e;
  return {e * 0.39894228040143267794f, x > 0 ? 1.0f - p : p};
}

}  // namespace
}  // namespace AG_LEVEL

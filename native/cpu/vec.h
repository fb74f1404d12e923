// What a kernel source needs, at the CPU level it is compiled for: vectors of the level's width built on the compiler's
// vector extensions, storage types, loops over the pool; functions.h has exp, erf and the activations.
//
// Everything is in an anonymous namespace and nothing of the standard library's templates is used: an inline function
// compiled with AVX-512 must never be the copy the linker picks for every CPU (scripts/build/check-levels.mjs).
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "../backend.h"
#include "level.h"
#include "pool.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(AG_LEVEL_NEON)
#include <arm_neon.h>
#endif

// AG_BF16_DOT: an AVX-512 level whose instructions multiply bf16.
#if defined(AG_LEVEL_AMX_EMULATED)
#define AG_AMX_EMULATED 1
#endif
#if defined(AG_LEVEL_AMX) || defined(AG_AMX_EMULATED)
#define AG_AMX 1
#endif
#if defined(AG_LEVEL_AVX512BF16) || defined(AG_AMX)
#define AG_BF16_DOT 1
#define AG_LEVEL_AVX512 1
#endif
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
typedef float vf_half __attribute__((vector_size(AG_VECTOR_BYTES / 2)));
typedef uint32_t vu_half __attribute__((vector_size(AG_VECTOR_BYTES / 2)));
typedef uint16_t vh_half __attribute__((vector_size(AG_VECTOR_BYTES / 4)));

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

// Storage -> compute type ("acc" in arguments.h).
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
// The compiler's own conversions between 16 and 32 bits take several shuffles where the CPU has one instruction.
inline vf load(const bf16* p) {
#if defined(AG_LEVEL_AVX512)
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), h) << 16);
#elif defined(AG_LEVEL_AVX2)
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#elif defined(__x86_64__)
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(AG_LEVEL_NEON)
  return (vf)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16);
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, vd v) { memcpy(p, &v, sizeof v); }
// To bf16 in the low half of each lane: round to nearest even, NaN stays NaN.
inline vu bf16_bits(vf v) {
  vu u = (vu)v, high = u >> 16;
  return v == v ? (u + 0x7fff + (high & 1)) >> 16 : high | 0x40;
}
inline void store(bf16* p, vf v) {
#if defined(AG_BF16_DOT)  // the same but for subnormal numbers, which become zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(AG_LEVEL_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)bf16_bits(v)));
#elif defined(AG_LEVEL_AVX2)
  __m256i u = (__m256i)bf16_bits(v);
  u = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(u));
#else
  vh h = __builtin_convertvector(bf16_bits(v), vh);
  memcpy(p, &h, sizeof h);
#endif
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
#if defined(AG_LEVEL_AVX512)
inline uint32_t lanes(int64_t n) { return _bzhi_u32(~0u, uint32_t(n)); }
inline vf load_n(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(__mmask16(lanes(n)), p); }
inline vd load_n(const double* p, int64_t n) { return (vd)_mm512_maskz_loadu_pd(__mmask8(lanes(n)), p); }
inline vf load_n(const bf16* p, int64_t n) {
  __m256i h = _mm256_maskz_loadu_epi16(__mmask16(lanes(n)), p);
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), h) << 16);
}
inline void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16(lanes(n)), (__m512)v); }
inline void store_n(double* p, vd v, int64_t n) { _mm512_mask_storeu_pd(p, __mmask8(lanes(n)), (__m512d)v); }
inline void store_n(bf16* p, vf v, int64_t n) {
  __m256i h = _mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)bf16_bits(v));
  _mm256_mask_storeu_epi16(p, __mmask16(lanes(n)), h);
}
#elif defined(AG_LEVEL_AVX2)
inline __m256i lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes64(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline vf load_n(const float* p, int64_t n) { return (vf)_mm256_maskload_ps(p, lanes32(n)); }
inline vd load_n(const double* p, int64_t n) { return (vd)_mm256_maskload_pd(p, lanes64(n)); }
inline void store_n(float* p, vf v, int64_t n) { _mm256_maskstore_ps(p, lanes32(n), (__m256)v); }
inline void store_n(double* p, vd v, int64_t n) { _mm256_maskstore_pd(p, lanes64(n), (__m256d)v); }
#endif
inline vf splat(float x) { return x - vf{}; }  // not x + 0: that would lose the sign of -0
inline vd splat(double x) { return x - vd{}; }
// A vector of doubles from any storage.
inline vd load_wide(const double* p) { return load(p); }
inline vd load_wide(const float* p) {
  vf_half h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vd);
}
inline vd load_wide(const bf16* p) {
  vh_half h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector((vf_half)(__builtin_convertvector(h, vu_half) << 16), vd);
}
inline vf vsqrt(vf x) {
#if defined(AG_LEVEL_AVX512)
  return (vf)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x);
#elif defined(AG_LEVEL_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(AG_LEVEL_NEON)
  return (vf)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kWidth<float>; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
// vmin and vmax return the second argument when one is NaN.
#if defined(AG_LEVEL_AVX512)
inline vf vmax(vf a, vf b) { return (vf)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b); }
inline vf vmin(vf a, vf b) { return (vf)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b); }
#elif defined(AG_LEVEL_AVX2)
inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
inline vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
inline vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif
inline vd vmax(vd a, vd b) { return a > b ? a : b; }

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

// ---- dispatch and loops -----------------------------------------------------------------------------
template <class S>
struct Tag {
  typedef S type;
};
inline AgStatus bad_dtype(AgCtx* ctx, const char* kernel, AgDtype dt, const char* expected) {
  static const char* const names[] = {"f32", "bf16", "f64", "i32", "i64"};
  bool known = dt >= AG_F32 && dt <= AG_I64;
  snprintf(ctx->error, sizeof ctx->error, "[%s] dtype: expected %s, got %s", kernel, expected,
           known ? names[dt] : "an unknown one");
  return AG_INVALID;
}
// Calls f(Tag<storage type>) for a float dtype.
template <class F>
inline AgStatus with_float(AgCtx* ctx, const char* kernel, AgDtype dt, const F& f) {
  switch (dt) {
    case AG_F32: f(Tag<float>()); return AG_OK;
    case AG_BF16: f(Tag<bf16>()); return AG_OK;
    case AG_F64: f(Tag<double>()); return AG_OK;
    default: return bad_dtype(ctx, kernel, dt, "f32, bf16 or f64");
  }
}
// The same with the first result that is not AG_OK: f returns a status.
template <class F>
inline AgStatus with_float_status(AgCtx* ctx, const char* kernel, AgDtype dt, const F& f) {
  AgStatus status = AG_OK;
  AgStatus outer = with_float(ctx, kernel, dt, [&](auto tag) { status = f(tag); });
  return outer == AG_OK ? status : outer;
}

// Which dtypes this level has code for: f64 is for checking gradients and is at one level only, and a level that
// differs from another in its bf16 products has nothing else. The `other` level has the rest.
#if defined(AG_BF16_DOT)
namespace other = ::avx512;
inline bool elsewhere(AgDtype dt) { return dt != AG_BF16; }
#elif defined(AG_LEVEL_PORTABLE)
namespace other = ::portable;
inline bool elsewhere(AgDtype) { return false; }
#else
namespace other = ::portable;
inline bool elsewhere(AgDtype dt) { return dt == AG_F64; }
#endif
// f(Tag<storage type>) for a dtype that is here.
template <class F>
inline auto with_here(AgDtype dt, const F& f) {
  (void)dt;
#if defined(AG_LEVEL_PORTABLE)
  if (dt == AG_F64) return f(Tag<double>());
#endif
#if !defined(AG_BF16_DOT)
  if (dt == AG_F32) return f(Tag<float>());
#endif
  return f(Tag<bf16>());
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

// f(i, lanes) over vectors of 0..n-1; only the last may have fewer than all lanes.
template <class C, class F>
inline __attribute__((always_inline)) void each_vector(int64_t n, const F& f) {
  constexpr int64_t W = kWidth<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}
// n lanes at p, and their way back; free when n is the constant width.
template <class S>
inline __attribute__((always_inline)) Vec<Acc<S>> get(const S* p, int64_t n) {
  return n == kWidth<Acc<S>> ? load(p) : load_n(p, n);
}
template <class S>
inline __attribute__((always_inline)) void set(S* p, Vec<Acc<S>> v, int64_t n) {
  n == kWidth<Acc<S>> ? store(p, v) : store_n(p, v, n);
}
// Zero outside the first n lanes.
template <class C>
inline Vec<C> first(Vec<C> v, int64_t n) {
  for (int64_t i = n; i < kWidth<C>; i++) v[i] = 0;
  return v;
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

// The same for n lanes, where the buffer's dtype D has the compute type C; scalar otherwise.
template <class D, class C>
inline __attribute__((always_inline)) void grad_set(const AgGrad& g, int64_t i, Vec<C> v, int64_t n) {
  if constexpr (sizeof(Acc<D>) == sizeof(C)) {
    D* p = static_cast<D*>(g.p) + i;
    set(p, g.accumulate ? get(p, n) + v : v, n);
  } else {
    for (int64_t j = 0; j < n; j++) grad_put(g, i + j, double(v[j]));
  }
}

}  // namespace
}  // namespace AG_LEVEL

// bf16 operands for instructions that multiply pairs of bf16 and add both products to an f32 sum (vdpbf16ps,
// tdpbf16ps). A slot of a panel, as large as a float, holds two neighbours along k; an odd k gets a zero. The sums are
// f32; within a pair the order of rounding is the instruction's, and it takes subnormal numbers for zero and gives zero
// for them.
//
// Included by microkernel.h at the levels that have such an instruction; all of them have AVX-512 besides.
#pragma once

namespace AG_LEVEL {
namespace {

struct Pair {
  uint32_t bits;
};
struct PairVec {
  vf v;
};
template <class S>
constexpr int64_t kStep = 2;
template <class S>
using Slot = Pair;
template <class S>
using Blob = Pair;

inline PairVec load(const Pair* p) { return PairVec{load(reinterpret_cast<const float*>(p))}; }
inline __attribute__((always_inline)) void multiply_add(vf& x, float a, PairVec b) {
  x = (vf)_mm512_dpbf16_ps((__m512)x, (__m512bh)_mm512_set1_ps(a), (__m512bh)b.v);
}

// Up to 16 pairs along a row that has n more elements.
inline vf load_pairs(const bf16* p, int64_t n) {
  if (n >= 32) return (vf)_mm512_loadu_ps(p);
  return (vf)_mm512_maskz_loadu_epi16(__mmask32(n > 0 ? lanes(n) : 0), p);
}
// 16 columns of two rows as pairs; n: columns that are there. y may be NULL: zeros.
inline vf interleave(const bf16* x, const bf16* y, int64_t n) {
  __mmask16 mask = __mmask16(n >= 16 ? 0xffff : n > 0 ? lanes(n) : 0);
  __m512i low = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_maskz_loadu_epi16(mask, x));
  if (!y) return (vf)low;
  __m512i high = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_maskz_loadu_epi16(mask, y));
  return (vf)((vu)low | ((vu)high << 16));
}

// Lane by lane, rounded: x in the low half.
inline vf make_pairs(vf x, vf y) {
  __m512i low = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  __m512i high = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)_mm512_cvtneps_pbh((__m512)y));
  return (vf)((vu)low | ((vu)high << 16));
}

// dst[step][width] from rows along k, and from rows across it.
template <int width, class F>
inline void pairs_of_rows(const F& at, int64_t count, int64_t k, float* dst) {
  const bf16* row[width + 16];
  for (int64_t i = 0; i < count; i++) row[i] = at(i);
  auto get = [&](int64_t i, int64_t s, int64_t)
                 __attribute__((always_inline)) { return load_pairs(row[i] + 2 * s, k - 2 * s); };
  pack_rows<width, float>(get, count, div_up(k, 2), dst);
}
template <int width, class F>
inline void pairs_of_columns(const F& at, int64_t count, int64_t k, float* dst) {
  int64_t steps = div_up(k, 2);
  for (int64_t s = 0; s < steps; s++) {
    const bf16 *x = at(2 * s), *y = 2 * s + 1 < k ? at(2 * s + 1) : nullptr;
#pragma GCC unroll 2
    for (int g = 0; g < width; g += 16)
      put_row<width>(dst + s * width, g, interleave(x + g, y ? y + g : nullptr, count - g), s + 1 == steps);
  }
}

// Dot products of rows: 32 elements at a time.
template <class S>
constexpr int kDotWidth = 32;
inline PairVec dot_load(const bf16* p) { return PairVec{load_pairs(p, 32)}; }
inline PairVec dot_load_n(const bf16* p, int64_t n) { return PairVec{load_pairs(p, n)}; }
inline __attribute__((always_inline)) void dot_add(vf& x, PairVec a, PairVec b) {
  x = (vf)_mm512_dpbf16_ps((__m512)x, (__m512bh)a.v, (__m512bh)b.v);
}

#ifndef AG_AMX
template <class S>
inline int64_t steps_of(int64_t k) {
  return div_up(k, 2);
}
template <class S, class F>
inline void a_of_rows(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_rows<kMR<float>>(at, count, k, to);
}
template <class S, class F>
inline void a_of_columns(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_columns<kMR<float>>(at, count, k, to);
}
template <class S, class F>
inline void b_of_rows(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_rows<kNR<float>>(at, count, k, to);
}
template <class S, class F>
inline void b_of_columns(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_columns<kNR<float>>(at, count, k, to);
}
#endif

}  // namespace
}  // namespace AG_LEVEL
#ifdef AG_AMX
#include "amx.h"
#endif

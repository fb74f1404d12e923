// The block of a matrix product that lives in registers, and how operands are laid out for it. The matrix product and
// attention are built on it. A panel of A holds kMR rows, a panel of B kNR columns, both k-major, zero beyond the edge.
#pragma once
#include "vec.h"

namespace AG_LEVEL {
namespace {

#if defined(AG_AMX)
template <class C>
constexpr int kMR = 32;  // two tiles
#elif defined(AG_LEVEL_AVX512)
template <class C>
constexpr int kMR = 14;
#elif defined(AG_LEVEL_AVX2)
template <class C>
constexpr int kMR = 6;
#elif defined(AG_LEVEL_NEON)
template <class C>
constexpr int kMR = 12;  // 24 of the 32 registers hold sums
#else
template <class C>
constexpr int kMR = 4;
#endif
template <class C>
constexpr int kNR = 2 * kWidth<C>;

inline int64_t round_up(int64_t n, int64_t to) { return div_up(n, to) * to; }

// Hands out 64-byte aligned pieces of the workspace; without a base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  explicit Arena(void* p) : base(static_cast<char*>(p)) {}
  char* here() const { return base ? base + used : nullptr; }
  template <class T>
  T* take(int64_t n) {
    T* r = reinterpret_cast<T*>(here());
    used += round_up(n * int64_t(sizeof(T)), 64);
    return r;
  }
};
inline int64_t arena_bytes(int64_t n, int64_t size) { return round_up(n * size, 64); }

// ---- packing ----------------------------------------------------------------------------------------
#if defined(AG_LEVEL_AVX512)
constexpr vi kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(AG_LEVEL_AVX2)
constexpr vi kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi kLane = {0, 1, 2, 3};
#endif

// Transposes W vectors of W lanes: step s exchanges bit s of the row number with bit s of the lane number.
inline __attribute__((always_inline)) void transpose(vf* r) {
  constexpr int W = kWidth<float>;
#pragma GCC unroll 4
  for (int s = 1; s < W; s *= 2) {
    vi moved = kLane & s;
    vi low = moved == 0 ? kLane : kLane + (W - s), high = moved == 0 ? kLane + s : kLane + W;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & s) continue;
      vf a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}
inline void transpose(vd* r) {
  constexpr int W = kWidth<double>;
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      double t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}

// The sum of the lanes as a tree, on vectors.
inline float sum_lanes(vf v) {
#pragma GCC unroll 4
  for (int s = kWidth<float> / 2; s >= 1; s /= 2) v += __builtin_shuffle(v, kLane ^ s);
  return v[0];
}
inline double sum_lanes(vd v) { return lane_sum(v); }

// Writes one row of a panel. A row narrower than its vectors may spill into the next row, which is written later;
// the last row must not.
template <int width, class C>
inline __attribute__((always_inline)) void put_row(C* to, int g, Vec<C> v, bool last) {
  constexpr int W = kWidth<C>, rest = width % W;
  if (g + W <= width || !last)
    store(to + g, v);
  else
    store_n(to + g, v, rest);
}

// dst[kk][width]: get(i, k0, kn) gives elements k0 .. k0 + kn of row i; rows from count on are zero.
template <int width, class C, class F>
inline __attribute__((always_inline)) void pack_rows(const F& get, int64_t count, int64_t k, C* dst) {
  constexpr int W = kWidth<C>;
#pragma GCC unroll 1
  for (int64_t k0 = 0; k0 < k; k0 += W) {
    int64_t kn = min_of(W, k - k0);
#pragma GCC unroll 1
    for (int g = 0; g < width; g += W) {
      Vec<C> r[W];
      int64_t here = min_of(W, count - g);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) r[i] = i >= here ? Vec<C>{} : get(g + i, k0, kn);
      transpose(r);
      C* to = dst + k0 * width;
      if (kn == W && k0 + W < k) {
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) put_row<width>(to + j * width, g, r[j], false);
      } else {
        for (int64_t j = 0; j < kn; j++) put_row<width>(to + j * width, g, r[j], k0 + j + 1 == k);
      }
    }
  }
}
template <int width, class C, class S>
inline void pack_across(const S* const* row, int64_t count, int64_t k, C* dst) {
  auto get = [&](int64_t i, int64_t k0, int64_t kn) __attribute__((always_inline)) {
    return kn == kWidth<C> ? load(row[i] + k0) : load_n(row[i] + k0, kn);
  };
  pack_rows<width, C>(get, count, k, dst);
}

// dst[kk][width]: element (i, kk) is row kk's i-th; columns from count on are zero. `at(kk)` gives row kk.
template <int width, class C, class F>
inline void pack_along(const F& at, int64_t count, int64_t k, C* dst) {
  constexpr int W = kWidth<C>, rest = width % W;
  if (count >= width) {
    for (int64_t kk = 0; kk < k; kk++) {
      auto from = at(kk);
#pragma GCC unroll 2
      for (int g = 0; g < width; g += W)
        put_row<width>(dst + kk * width, g, g + W <= width ? load(from + g) : load_n(from + g, rest), kk + 1 == k);
    }
    return;
  }
  for (int64_t kk = 0; kk < k; kk++) {
    auto from = at(kk);
    C* to = dst + kk * width;
    for (int64_t i = 0; i < width; i++) to[i] = i < count ? C(to_acc(from[i])) : C(0);
  }
}

// ---- the product ------------------------------------------------------------------------------------
inline __attribute__((always_inline)) void multiply_add(vf& x, float a, vf b) { x += splat(a) * b; }
inline __attribute__((always_inline)) void multiply_add(vd& x, double a, vd b) { x += splat(a) * b; }

// x += A B for R rows and two vectors of columns. Element (i, kk) of A is a[i * row + kk * step], row kk of B is at
// b + kk * ldb: packed panels have row 1, step kMR, ldb kNR.
template <int R, class C, class B>
inline __attribute__((always_inline)) void multiply(Vec<C> (&x)[R][2], int64_t k, const C* a, int64_t row, int64_t step,
                                                    const B* b, int64_t ldb) {
  constexpr int W = kWidth<C>;
#pragma GCC unroll 2
  for (int64_t kk = 0; kk < k; kk++) {
    auto b0 = load(b), b1 = load(b + W);
    __builtin_prefetch(a + 16 * step);
    if (R <= 8) __builtin_prefetch(b + 40 * ldb), __builtin_prefetch(b + 40 * ldb + W);  // so few rows wait for B
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      multiply_add(x[i][0], a[i * row], b0);
      multiply_add(x[i][1], a[i * row], b1);
    }
    a += step;
    b += ldb;
  }
}

template <int R, class C>
inline __attribute__((always_inline)) void clear(Vec<C> (&x)[R][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) x[i][0] = x[i][1] = Vec<C>{};
}
template <int R, class C>
inline __attribute__((always_inline)) void write(const Vec<C> (&x)[R][2], C* c, int64_t ldc, bool add) {
  constexpr int W = kWidth<C>;
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
    C* p = c + i * ldc;
    store(p, add ? load(p) + x[i][0] : x[i][0]);
    store(p + W, add ? load(p + W) + x[i][1] : x[i][1]);
  }
}

// c[R][kNR] = or += A B with A[i][kk] at a[i + kk * step]: a packed panel, or a matrix stored k-major.
template <int R, class C, class B>
__attribute__((noinline)) void micro(int64_t k, const C* a, int64_t step, const B* b, int64_t ldb, C* c, int64_t ldc,
                                     bool add) {
  Vec<C> x[R][2];
  clear<R, C>(x);
  for (int i = 0; i < R; i++) __builtin_prefetch(c + i * ldc);
  multiply<R, C, B>(x, k, a, 1, step, b, ldb);
  write<R, C>(x, c, ldc, add);
}
// The same with a row-major A of a fixed leading dimension (a tile of scores).
template <int R, int lda, class C, class B>
__attribute__((noinline)) void micro_rows(int64_t k, const C* a, const B* b, C* c, int64_t ldc, bool add) {
  Vec<C> x[R][2];
  clear<R, C>(x);
  multiply<R, C, B>(x, k, a, lda, 1, b, kNR<C>);
  write<R, C>(x, c, ldc, add);
}

// Fewer rows than kMR at an edge: the narrowest kernel that has them all.
#ifdef AG_AMX
template <class C>
constexpr int kHalf = 16;
template <class C>
constexpr int kQuarter = 16;
#else
template <class C>
constexpr int kHalf = kMR<C> > 8   ? 8
                      : kMR<C> > 4 ? 4
                                   : 2;
template <class C>
constexpr int kQuarter = kMR<C> > 4 ? kHalf<C> / 2 : 1;
#endif
template <class C>
inline int64_t rows_computed(int64_t rows) {
  return rows > kHalf<C> ? kMR<C> : rows > kQuarter<C> ? kHalf<C> : kQuarter<C>;
}
#ifndef AG_AMX
template <class C, class B>
inline void micro_edge(int64_t rows, int64_t k, const C* a, int64_t step, const B* b, int64_t ldb, C* c, int64_t ldc,
                       bool add) {
  if (rows > kHalf<C>)
    micro<kMR<C>, C, B>(k, a, step, b, ldb, c, ldc, add);
  else if (rows > kQuarter<C>)
    micro<kHalf<C>, C, B>(k, a, step, b, ldb, c, ldc, add);
  else
    micro<kQuarter<C>, C, B>(k, a, step, b, ldb, c, ldc, add);
}
#endif

#ifndef AG_AMX
// What a task of the pool holds while it multiplies: nothing here, see amx.h.
struct Tiles {
  Tiles() {}
};
#endif

// ---- operands of this level -------------------------------------------------------------------------
// A panel is cut along k into steps of one slot each, a slot being a number of the sums' type. Here a step is one k;
// dot.h, for levels whose instructions multiply bf16, has two k in a slot.
#ifndef AG_BF16_DOT
template <class S>
constexpr int64_t kStep = 1;  // k in a step
template <class S>
inline int64_t steps_of(int64_t k) {
  return k;
}
// Panels from rows along k (at(i) is row i) and from rows across it (at(kk) is row kk, count elements of it).
template <class S, class F>
inline void a_of_rows(const F& at, int64_t count, int64_t k, Acc<S>* to) {
  const S* row[kMR<Acc<S>> + kWidth<Acc<S>>];
  for (int64_t i = 0; i < count; i++) row[i] = at(i);
  pack_across<kMR<Acc<S>>, Acc<S>, S>(row, count, k, to);
}
template <class S, class F>
inline void a_of_columns(const F& at, int64_t count, int64_t k, Acc<S>* to) {
  pack_along<kMR<Acc<S>>, Acc<S>>(at, count, k, to);
}
template <class S, class F>
inline void b_of_rows(const F& at, int64_t count, int64_t k, Acc<S>* to) {
  const S* row[kNR<Acc<S>> + kWidth<Acc<S>>];
  for (int64_t i = 0; i < count; i++) row[i] = at(i);
  pack_across<kNR<Acc<S>>, Acc<S>, S>(row, count, k, to);
}
template <class S, class F>
inline void b_of_columns(const F& at, int64_t count, int64_t k, Acc<S>* to) {
  pack_along<kNR<Acc<S>>, Acc<S>>(at, count, k, to);
}
// What a slot of B is to the kernel, and what the blob of `pack` is made of.
template <class S>
using Slot = Acc<S>;
template <class S>
using Blob = S;

// Dot products of rows: kDotWidth elements at a time.
template <class S>
constexpr int kDotWidth = kWidth<Acc<S>>;
template <class S>
inline Vec<Acc<S>> dot_load(const S* p) {
  return load(p);
}
template <class S>
inline Vec<Acc<S>> dot_load_n(const S* p, int64_t n) {
  return load_n(p, n);
}
template <class V>
inline __attribute__((always_inline)) void dot_add(V& x, V a, V b) {
  x += a * b;
}
#endif

}  // namespace
}  // namespace AG_LEVEL
#ifdef AG_BF16_DOT
#include "dot.h"
#endif

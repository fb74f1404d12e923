// The block of a matrix product that lives in registers, and how operands are packed for it. Used by the matrix product
// and by attention. A panel of A holds MR rows, a panel of B holds NR columns, both k-major.
#pragma once
#include "vec.h"

namespace AG_LEVEL {
namespace {

#if defined(AG_LEVEL_AVX512)
template <class C>
constexpr int kMR = 14;
#elif defined(AG_LEVEL_AVX2)
template <class C>
constexpr int kMR = 6;
#else
template <class C>
constexpr int kMR = 4;
#endif
template <class C>
constexpr int kNR = 2 * kWidth<C>;

template <class C>
inline int64_t panel_a_elements(int64_t rows, int64_t k) {
  return div_up(rows, kMR<C>) * kMR<C> * k;
}
template <class C>
inline int64_t panel_b_elements(int64_t cols, int64_t k) {
  return div_up(cols, kNR<C>) * kNR<C> * k;
}

// One panel: dst[kk][width] = src element (i, kk), i < count <= width, zero beyond. along_k: element (i, kk) is at
// src[i*ld + kk], else at src[kk*ld + i].
template <int width, class S, class C>
inline void pack_panel(bool along_k, const S* src, int64_t ld, int64_t count, int64_t k, C* dst) {
  if (!along_k) {
    for (int64_t kk = 0; kk < k; kk++) {
      const S* from = src + kk * ld;
      C* to = dst + kk * width;
      if (count == width) {
        for (int i = 0; i < width; i++) to[i] = C(to_acc(from[i]));
      } else {
        for (int i = 0; i < width; i++) to[i] = i < count ? C(to_acc(from[i])) : C(0);
      }
    }
    return;
  }
  constexpr int block = 16;  // rows are read along k in cache lines, written into a block that stays in L1
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    int64_t kn = min_of(block, k - k0);
    for (int64_t i = 0; i < width; i++) {
      C* to = dst + k0 * width + i;
      if (i < count) {
        const S* from = src + i * ld + k0;
        for (int64_t kk = 0; kk < kn; kk++) to[kk * width] = C(to_acc(from[kk]));
      } else {
        for (int64_t kk = 0; kk < kn; kk++) to[kk * width] = C(0);
      }
    }
  }
}

// A [rows, k]: stored [rows, k], or [k, rows] when trans.
template <class C, class S>
inline void pack_a(bool trans, const S* src, int64_t ld, int64_t rows, int64_t k, C* dst) {
  for (int64_t i = 0; i < rows; i += kMR<C>, dst += kMR<C> * k)
    pack_panel<kMR<C>>(!trans, trans ? src + i : src + i * ld, ld, min_of(kMR<C>, rows - i), k, dst);
}
// B [k, cols]: stored [k, cols], or [cols, k] when trans.
template <class C, class S>
inline void pack_b(bool trans, const S* src, int64_t ld, int64_t k, int64_t cols, C* dst) {
  for (int64_t j = 0; j < cols; j += kNR<C>, dst += kNR<C> * k)
    pack_panel<kNR<C>>(trans, trans ? src + j * ld : src + j, ld, min_of(kNR<C>, cols - j), k, dst);
}

// c[MR][NR] (leading dimension ldc) = or += A panel * B panel.
template <class C>
__attribute__((noinline)) void micro(int64_t k, const C* a, const C* b, C* c, int64_t ldc, bool add) {
  constexpr int MR = kMR<C>, W = kWidth<C>;
  Vec<C> x[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) x[i][0] = x[i][1] = Vec<C>{};
  for (int64_t kk = 0; kk < k; kk++) {
    Vec<C> b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      Vec<C> v = splat(a[i]);
      x[i][0] += v * b0;
      x[i][1] += v * b1;
    }
    a += MR;
    b += 2 * W;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    C* p = c + i * ldc;
    store(p, add ? load(p) + x[i][0] : x[i][0]);
    store(p + W, add ? load(p + W) + x[i][1] : x[i][1]);
  }
}

// C [rows, cols] = or += packed A * packed B; the edges go through a tile on the stack.
template <class C>
inline void tile_product(int64_t rows, int64_t cols, int64_t k, const C* a, const C* b, C* c, int64_t ldc, bool add) {
  constexpr int MR = kMR<C>, NR = kNR<C>;
  alignas(64) C t[MR * NR];
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0; i < rows; i += MR) {
      const C *pa = a + i * k, *pb = b + j * k;
      int64_t m = min_of(MR, rows - i), n = min_of(NR, cols - j);
      if (m == MR && n == NR) {
        micro<C>(k, pa, pb, c + i * ldc + j, ldc, add);
        continue;
      }
      micro<C>(k, pa, pb, t, NR, false);
      for (int64_t r = 0; r < m; r++)
        for (int64_t q = 0; q < n; q++) {
          C* p = c + (i + r) * ldc + j + q;
          *p = add ? *p + t[r * NR + q] : t[r * NR + q];
        }
    }
}

// Hands out 64-byte aligned pieces of the workspace.
struct Arena {
  char* p;
  explicit Arena(void* base) : p(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    T* r = reinterpret_cast<T*>(p);
    p += div_up(n * int64_t(sizeof(T)), 64) * 64;
    return r;
  }
};
inline int64_t arena_bytes(int64_t n, int64_t size) { return div_up(n * size, 64) * 64; }

}  // namespace
}  // namespace AG_LEVEL

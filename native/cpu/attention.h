// What attention with and without a cache share: products of tiles, keys and values as panels, and a tile of queries
// against them with an online softmax. For the layouts of operands see microkernel.h and dot.h.
//
// A tile of scores becomes weights where it lies. At levels that multiply bf16 in pairs the weights are rounded to bf16
// and a row of them takes the first half of the row of f32 scores; sums, maxima and exponentials stay f32.
#pragma once
#include "functions.h"
#include "microkernel.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kBQ = 64;   // queries of a tile
constexpr int64_t kBK = 128;  // keys of a tile

// ---- tiles ------------------------------------------------------------------------------------------
#ifdef AG_BF16_DOT
template <class S>
using Weight = bf16;
constexpr int64_t kAcross = 2 * kBK;  // from one step to the next in a transposed tile: it has two rows in a step
#else
template <class S>
using Weight = Acc<S>;
constexpr int64_t kAcross = kBK;
#endif

// c = or += A B for packed A (panels of pack_a) and packed B. Whole panels of columns and whole kernels of rows are
// written: tiles have room for them.
template <class S>
void product(int64_t rows, int64_t cols, int64_t steps, const Acc<S>* a, const Acc<S>* b, Acc<S>* c, int64_t ldc) {
  constexpr int64_t MR = kMR<Acc<S>>, NR = kNR<Acc<S>>;
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0; i < rows; i += MR)
      micro_edge<Acc<S>, Slot<S>>(min_of(MR, rows - i), steps, a + i * steps, MR,
                                  reinterpret_cast<const Slot<S>*>(b + j * steps), NR, c + i * ldc + j, ldc, false);
}

#ifndef AG_AMX
// How many rows the next kernel takes: such that a multiple of the smallest kernel is covered without overshoot.
template <class C>
inline int64_t next_rows(int64_t left) {
  constexpr int64_t MR = kMR<C>, Q = kQuarter<C>;
  if (left > MR && left < 2 * MR && (left - MR) % Q != 0 && left % Q == 0) return kHalf<C>;
  if (left >= MR) return MR;
  if (left > kQuarter<C> && (left < kHalf<C> || left % Q == 0)) return kHalf<C>;
  return rows_computed<C>(left);
}
// c += A B. A is a tile of weights [rows, kBK]; panels of B are b_step apart.
template <class S>
void product_weights(int64_t rows, int64_t cols, int64_t steps, const Acc<S>* a, const Acc<S>* panels, int64_t b_step,
                     Acc<S>* c, int64_t ldc) {
  typedef Acc<S> C;
  constexpr int64_t NR = kNR<C>;
  for (int64_t j = 0; j < cols; j += NR, panels += b_step) {
    const Slot<S>* b = reinterpret_cast<const Slot<S>*>(panels);
    for (int64_t i = 0, r; i < rows; i += r) {
      r = next_rows<C>(rows - i);
      if (r == kMR<C>)
        micro_rows<kMR<C>, kBK, C>(steps, a + i * kBK, b, c + i * ldc + j, ldc, true);
      else if (r == kHalf<C>)
        micro_rows<kHalf<C>, kBK, C>(steps, a + i * kBK, b, c + i * ldc + j, ldc, true);
      else
        micro_rows<kQuarter<C>, kBK, C>(steps, a + i * kBK, b, c + i * ldc + j, ldc, true);
    }
  }
}
// c += A B. A is the transpose of a tile of weights: a step of its rows is kAcross further on.
template <class S>
void product_transposed(int64_t rows, int64_t cols, int64_t steps, const Acc<S>* a, const Acc<S>* b, Acc<S>* c,
                        int64_t ldc) {
  typedef Acc<S> C;
  constexpr int64_t NR = kNR<C>;
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0, r; i < rows; i += r) {
      r = next_rows<C>(rows - i);
      micro_edge<C, Slot<S>>(r, steps, a + i, kAcross, reinterpret_cast<const Slot<S>*>(b + j * steps), NR,
                             c + i * ldc + j, ldc, true);
    }
}
#else
template <class S>
void product_weights(int64_t rows, int64_t cols, int64_t steps, const float* a, const float* panels, int64_t b_step,
                     float* c, int64_t ldc) {
  for (int64_t j = 0; j < cols; j += kNR<float>, panels += b_step)
    for (int64_t i = 0; i < rows; i += kMR<float>)
      multiply_tiles(min_of(kMR<float>, rows - i), steps, TilesA{a + i * kBK, kBK, 16 * kBK, 16}, panels,
                     c + i * ldc + j, ldc, true);
}
// tile_grads has transposed its blocks of 16 keys and 16 steps already, each where it lies.
template <class S>
void product_transposed(int64_t rows, int64_t cols, int64_t steps, const float* a, const float* b, float* c,
                        int64_t ldc) {
  for (int64_t j = 0; j < cols; j += kNR<float>)
    for (int64_t i = 0; i < rows; i += kMR<float>)
      multiply_tiles(min_of(kMR<float>, rows - i), steps, TilesA{a + i, kAcross, 16, 16 * kAcross}, b + j * steps,
                     c + i * ldc + j, ldc, true);
}
#endif

// Rows 0..rows of a matrix as panels of A.
template <class S>
void pack_a(const S* src, int64_t ld, int64_t rows, int64_t k, Acc<S>* dst) {
  constexpr int64_t MR = kMR<Acc<S>>;
  for (int64_t i = 0; i < rows; i += MR)
    a_of_rows<S>([&](int64_t r) { return src + (i + r) * ld; }, min_of(MR, rows - i), k, dst + i * steps_of<S>(k));
}
// Rows 0..k as a B operand [k, dim]. `at(j)` gives row j.
template <class S, class F>
void pack_b(const F& at, int64_t k, int64_t dim, Acc<S>* dst) {
  constexpr int64_t NR = kNR<Acc<S>>;
  for (int64_t d = 0; d < dim; d += NR)
    b_of_columns<S>([&](int64_t j) { return at(j) + d; }, min_of(NR, dim - d), k, dst + d * steps_of<S>(k));
}
// Rows 0..n as a B operand [dim, n]. `at(j)` gives row j.
template <class S, class F>
void pack_b_transposed(const F& at, int64_t n, int64_t dim, Acc<S>* dst) {
  constexpr int64_t NR = kNR<Acc<S>>;
  for (int64_t j = 0; j < n; j += NR)
    b_of_rows<S>([&](int64_t i) { return at(j + i); }, min_of(NR, n - j), dim, dst + j * steps_of<S>(dim));
}

// Lanes from n - i on are replaced.
inline vf keep_below(vf v, int64_t i, int64_t n, float other) { return kLane < int32_t(n - i) ? v : splat(other); }
inline vd keep_below(vd v, int64_t i, int64_t n, double other) {
  for (int64_t l = max_of(0, n - i); l < kWidth<double>; l++) v[l] = other;
  return v;
}
inline float max_lanes(vf v) {
#pragma GCC unroll 4
  for (int s = kWidth<float> / 2; s >= 1; s /= 2) v = vmax(v, __builtin_shuffle(v, kLane ^ s));
  return v[0];
}
inline double max_lanes(vd v) { return lane_max(v); }
template <class C>
inline C exp_of(C x) {
  return vexp(splat(x))[0];
}

// Writes x * by to n elements of storage.
template <class S, class C>
inline void put_scaled(S* to, const C* x, C by, int64_t n) {
  constexpr int W = kWidth<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(x + i) * by);
  if (i < n) store_n(to + i, load_n(x + i, n - i) * by, n - i);
}

// ---- sequences --------------------------------------------------------------------------------------
inline int64_t length(const int32_t* offsets, int64_t s) { return int64_t(offsets[s + 1]) - offsets[s]; }

// Running counts of tiles: sequence s has tiles first[s] .. first[s + 1].
template <class F>
int64_t count_tiles(int64_t batch, int64_t* first, const F& tiles) {
  int64_t n = 0;
  for (int64_t s = 0; s < batch; s++) {
    if (first) first[s] = n;
    n += tiles(s);
  }
  if (first) first[batch] = n;
  return n;
}
inline int64_t find_tile(const int64_t* first, int64_t batch, int64_t tile) {
  int64_t lo = 0, hi = batch - 1;
  while (lo < hi) {
    int64_t mid = (lo + hi + 1) / 2;
    if (first[mid] <= tile)
      lo = mid;
    else
      hi = mid - 1;
  }
  return lo;
}

// Rows of keys or values: neighbours, or in the pages of a cache.
template <class S>
struct Rows {
  const S* base;
  int64_t ld;
  const int32_t* pages;  // NULL: neighbours
  int64_t page_rows;
  const S* at(int64_t j) const { return base + (pages ? pages[j / page_rows] * page_rows + j % page_rows : j) * ld; }
};

inline int64_t workers_for(int64_t tasks) { return max_of(1, min_of(ag_threads(), tasks)); }

// ---- a tile of queries ------------------------------------------------------------------------------
// One query head of one sequence with its keys and values as panels, tile after tile.
template <class S>
struct Head {
  typedef Acc<S> C;
  const S* q;
  S* o;
  C* lse;  // NULL: not wanted
  const C *keys, *values;
  int64_t ldq, ldo, ldl, nq, nk, dim;
  C scale;
  bool causal;
  // keys query i may see
  int64_t visible(int64_t i) const { return causal ? max_of(0, min_of(nk, i + nk - nq + 1)) : nk; }
};

template <class S>
struct ForwardScratch {
  typedef Acc<S> C;
  C *q, *s, *o, *top, *total;
  int64_t size;
  static int64_t rows() { return kBQ + kMR<C>; }
  static int64_t bytes(int64_t dim) { return ForwardScratch(nullptr, dim).size; }
  ForwardScratch(void* base, int64_t dim) {
    Arena a(base);
    q = a.take<C>(rows() * steps_of<S>(dim));
    s = a.take<C>(rows() * kBK + kNR<C>);
    o = a.take<C>(rows() * round_up(dim, kNR<C>));
    top = a.take<C>(kBQ);
    total = a.take<C>(kBQ);
    size = a.used;
  }
};

// n products of a row become weights exp(scale * product - maximum so far), zero up to `padded`; what the row has so
// far is rescaled. The weights may lie where the products are.
template <class C, class T>
void online_row(const C* s, T* weight, int64_t n, int64_t padded, C scale, C* top, C* total, C* o, int64_t dim_padded) {
  constexpr int W = kWidth<C>;
  Vec<C> best = splat(*top), sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) best = vmax(best, load(s + i) * scale);
  if (i < n) best = vmax(best, keep_below(load(s + i) * scale, i, n, C(-INFINITY)));
  C now = max_lanes(best);
  if (n > 0 && now != *top) {
    C shrink = exp_of<C>(*top - now);
    *total *= shrink;
    if (*top != C(-INFINITY))
      for (int64_t d = 0; d < dim_padded; d += W) store(o + d, load(o + d) * shrink);
    *top = now;
  }
  for (i = 0; i + W <= n; i += W) {
    Vec<C> e = vexp(load(s + i) * scale - now);
    sum += e;
    store(weight + i, e);
  }
  if (i < n) {
    Vec<C> e = vexp(keep_below(load(s + i) * scale - now, i, n, C(-INFINITY)));
    sum += e;
    store(weight + i, e);
    i += W;
  }
  for (; i < padded; i += W) store(weight + i, Vec<C>{});
  *total += sum_lanes(sum);
}

// Queries qb .. of a head.
template <class S>
void attend_tile(const Head<S>& h, int64_t qb, const ForwardScratch<S>& f) {
  typedef Acc<S> C;
  int64_t rows = min_of(kBQ, h.nq - qb), dim = h.dim, wide = round_up(dim, kNR<C>), keys = h.visible(qb + rows - 1);
  int64_t deep = steps_of<S>(dim);
  pack_a<S>(h.q + qb * h.ldq, h.ldq, rows, dim, f.q);
  memset(f.o, 0, size_t(rows * wide) * sizeof(C));
  for (int64_t r = 0; r < rows; r++) f.top[r] = C(-INFINITY), f.total[r] = 0;
  for (int64_t kb = 0; kb < keys; kb += kBK) {
    int64_t tile = min_of(kBK, h.nk - kb), kn = min_of(tile, keys - kb), padded = round_up(kn, kNR<C>);
    product<S>(rows, kn, deep, f.q, h.keys + kb * deep, f.s, kBK);
    for (int64_t r = 0; r < rows; r++) {
      C* s = f.s + r * kBK;
      online_row<C>(s, reinterpret_cast<Weight<S>*>(s), max_of(0, min_of(kn, h.visible(qb + r) - kb)), padded, h.scale,
                    f.top + r, f.total + r, f.o + r * wide, wide);
    }
    product_weights<S>(rows, dim, steps_of<S>(kn), f.s, h.values + kb / kBK * steps_of<S>(kBK) * wide,
                       steps_of<S>(tile) * kNR<C>, f.o, wide);
  }
  for (int64_t r = 0; r < rows; r++) {
    C total = f.total[r], inverse = total == 0 ? C(0) : 1 / total;
    put_scaled(h.o + (qb + r) * h.ldo, f.o + r * wide, inverse, dim);
    if (h.lse) h.lse[(qb + r) * h.ldl] = f.top[r] + C(log(double(total)));
  }
}

// Keys and values of `batch` sequences as panels: where they are in the workspace, and the phase that fills them.
template <class S>
struct Panels {
  typedef Acc<S> C;
  int64_t batch, kv_heads, dim, tiles, q_tiles;
  int64_t *first, *first_q;  // running counts of key tiles and query tiles
  C *keys, *values;

  int64_t key_slots() const { return kBK * steps_of<S>(dim); }
  int64_t value_slots() const { return steps_of<S>(kBK) * round_up(dim, kNR<C>); }
  int64_t bytes() const {
    Arena a(nullptr);
    Panels(*this).place(a);
    return a.used;
  }
  void place(Arena& a) {
    first = a.take<int64_t>(batch + 1);
    first_q = a.take<int64_t>(batch + 1);
    keys = a.take<C>(tiles * kv_heads * key_slots());
    values = a.take<C>(tiles * kv_heads * value_slots());
  }
  // Panels of a sequence and head follow each other tile by tile.
  int64_t index(int64_t s, int64_t kv, int64_t tile) const {
    return first[s] * kv_heads + kv * (first[s + 1] - first[s]) + tile;
  }
  // rows(s, kv, values) gives the Rows of keys or values, keys_of(s) their number
  template <class R, class N>
  void fill(const R& rows, const N& keys_of) {
    parallel_for(tiles * kv_heads, [&](int64_t task) {
      int64_t s = find_tile(first, batch, task / kv_heads), kv = task % kv_heads, tile = task / kv_heads - first[s];
      int64_t k0 = tile * kBK, kn = min_of(kBK, keys_of(s) - k0), at = index(s, kv, tile);
      Rows<S> k = rows(s, kv, false), v = rows(s, kv, true);
      pack_b_transposed<S>([&](int64_t j) { return k.at(k0 + j); }, kn, dim, keys + at * key_slots());
      pack_b<S>([&](int64_t j) { return v.at(k0 + j); }, kn, dim, values + at * value_slots());
    });
  }
};

}  // namespace
}  // namespace AG_LEVEL

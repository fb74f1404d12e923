// Attention over packed sequences without a score matrix (Dao et al. 2022): scores exist for one tile of queries and
// keys at a time; the backward pass computes them again from the kept log-sum-exp. Keys and values are laid out as
// panels once, in a phase of their own, also from the pages of a cache. Tasks are cut by shape; every sum runs in the
// order of the keys (dQ) or of the queries (dK, dV).
#include "microkernel.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kBQ = 64;            // queries of a tile
constexpr int64_t kBK = 128;           // keys of a tile
constexpr int64_t kStreamQueries = 4;  // so few queries against a cache stream it instead of packing it
constexpr int64_t kStreamKeys = 1024;  // keys of such a task
constexpr int64_t kStreamBlock = 64;
constexpr int64_t kWantedTasks = 16;  // the backward pass splits keys until there are so many

// ---- tiles ------------------------------------------------------------------------------------------
// How many rows the next kernel takes: such that a multiple of the smallest kernel is covered without overshoot.
template <class C>
inline int64_t next_rows(int64_t left) {
  constexpr int64_t MR = kMR<C>, Q = kQuarter<C>;
  if (left > MR && left < 2 * MR && (left - MR) % Q != 0 && left % Q == 0) return kHalf<C>;
  if (left >= MR) return MR;
  if (left > kQuarter<C> && (left < kHalf<C> || left % Q == 0)) return kHalf<C>;
  return rows_computed<C>(left);
}

// c = or += A B for packed A (panels by pack_a) and packed B. Whole panels of columns and whole kernels of rows are
// written: tiles have room for them.
template <class C>
void product(int64_t rows, int64_t cols, int64_t k, const C* a, const C* b, C* c, int64_t ldc, bool add) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0; i < rows; i += MR)
      micro_edge<C, C>(min_of(MR, rows - i), k, a + i * k, MR, b + j * k, NR, c + i * ldc + j, ldc, add);
}
// A is a tile of scores [rows, kBK]. Panels of B are b_step apart.
template <class C>
void product_scores(int64_t rows, int64_t cols, int64_t k, const C* a, const C* b, int64_t b_step, C* c, int64_t ldc,
                    bool add) {
  constexpr int64_t NR = kNR<C>;
  for (int64_t j = 0; j < cols; j += NR, b += b_step)
    for (int64_t i = 0, r; i < rows; i += r) {
      r = next_rows<C>(rows - i);
      if (r == kMR<C>)
        micro_rows<kMR<C>, kBK, C>(k, a + i * kBK, b, c + i * ldc + j, ldc, add);
      else if (r == kHalf<C>)
        micro_rows<kHalf<C>, kBK, C>(k, a + i * kBK, b, c + i * ldc + j, ldc, add);
      else
        micro_rows<kQuarter<C>, kBK, C>(k, a + i * kBK, b, c + i * ldc + j, ldc, add);
    }
}
// A is the transpose of a tile of scores [k, kBK].
template <class C>
void product_scores_t(int64_t rows, int64_t cols, int64_t k, const C* a, const C* b, C* c, int64_t ldc) {
  constexpr int64_t NR = kNR<C>;
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0, r; i < rows; i += r) {
      r = next_rows<C>(rows - i);
      micro_edge<C, C>(r, k, a + i, kBK, b + j * k, NR, c + i * ldc + j, ldc, true);
    }
}

// Rows i0.. of a matrix as panels of A, times scale.
template <class C, class S>
void pack_a(const S* src, int64_t ld, int64_t rows, int64_t k, C scale, C* dst) {
  constexpr int64_t MR = kMR<C>;
  for (int64_t i = 0; i < rows; i += MR) {
    const S* row[MR + kWidth<C>];
    int64_t count = min_of(MR, rows - i);
    for (int64_t r = 0; r < count; r++) row[r] = src + (i + r) * ld;
    pack_across<MR, C, S>(row, count, k, dst + i * k);
  }
  if (scale != 1)
    for (int64_t i = 0; i < round_up(rows, MR) * k; i++) dst[i] *= scale;
}
// Rows 0..k as a B operand [k, dim], times scale. `at(j)` gives row j.
template <class C, class F>
void pack_b(const F& at, int64_t k, int64_t dim, C scale, C* dst) {
  constexpr int64_t NR = kNR<C>;
  for (int64_t d = 0; d < dim; d += NR)
    pack_along<NR, C>([&](int64_t j) { return at(j) + d; }, min_of(NR, dim - d), k, dst + d * k);
  if (scale != 1)
    for (int64_t i = 0; i < round_up(dim, NR) * k; i++) dst[i] *= scale;
}
// Rows 0..n as a B operand [dim, n]. `at(j)` gives row j.
template <class C, class S, class F>
void pack_b_transposed(const F& at, int64_t n, int64_t dim, C* dst) {
  constexpr int64_t NR = kNR<C>;
  for (int64_t j = 0; j < n; j += NR) {
    const S* row[NR + kWidth<C>];
    int64_t count = min_of(NR, n - j);
    for (int64_t i = 0; i < count; i++) row[i] = at(j + i);
    pack_across<NR, C, S>(row, count, dim, dst + j * dim);
  }
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
int64_t length(const int32_t* offsets, int64_t s) { return int64_t(offsets[s + 1]) - offsets[s]; }

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
int64_t find_tile(const int64_t* first, int64_t batch, int64_t tile) {
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

int64_t workers_for(int64_t tasks) { return max_of(1, min_of(ag_threads(), tasks)); }

// ---- forward ----------------------------------------------------------------------------------------
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

template <class C>
struct ForwardScratch {
  C *q, *s, *o, *top, *total;
  int64_t size;
  static int64_t rows() { return kBQ + kMR<C>; }
  static int64_t bytes(int64_t dim) { return ForwardScratch(nullptr, dim).size; }
  ForwardScratch(void* base, int64_t dim) {
    Arena a(base);
    q = a.take<C>(rows() * dim);
    s = a.take<C>(rows() * kBK + kNR<C>);
    o = a.take<C>(rows() * round_up(dim, kNR<C>));
    top = a.take<C>(kBQ);
    total = a.take<C>(kBQ);
    size = a.used;
  }
};

// n scores of a row become exp(score - maximum so far), zero up to `padded`; what the row has so far is rescaled.
template <class C>
void online_row(C* s, int64_t n, int64_t padded, C* top, C* total, C* o, int64_t dim_padded) {
  constexpr int W = kWidth<C>;
  Vec<C> best = splat(*top), sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) best = vmax(best, load(s + i));
  if (i < n) best = vmax(best, keep_below(load(s + i), i, n, C(-INFINITY)));
  C now = max_lanes(best);
  if (n > 0 && now != *top) {
    C shrink = exp_of<C>(*top - now);
    *total *= shrink;
    if (*top != C(-INFINITY))
      for (int64_t d = 0; d < dim_padded; d += W) store(o + d, load(o + d) * shrink);
    *top = now;
  }
  for (i = 0; i + W <= n; i += W) {
    Vec<C> e = vexp(load(s + i) - now);
    sum += e;
    store(s + i, e);
  }
  if (i < n) {
    Vec<C> e = vexp(keep_below(load(s + i) - now, i, n, C(-INFINITY)));
    sum += e;
    store(s + i, e);
    i += W;
  }
  for (; i < padded; i += W) store(s + i, Vec<C>{});
  *total += sum_lanes(sum);
}

// Queries qb .. of a head.
template <class S>
void attend_tile(const Head<S>& h, int64_t qb, const ForwardScratch<Acc<S>>& f) {
  typedef Acc<S> C;
  int64_t rows = min_of(kBQ, h.nq - qb), dim = h.dim, wide = round_up(dim, kNR<C>), keys = h.visible(qb + rows - 1);
  pack_a<C>(h.q + qb * h.ldq, h.ldq, rows, dim, h.scale, f.q);
  memset(f.o, 0, size_t(rows * wide) * sizeof(C));
  for (int64_t r = 0; r < rows; r++) f.top[r] = C(-INFINITY), f.total[r] = 0;
  for (int64_t kb = 0; kb < keys; kb += kBK) {
    int64_t tile = min_of(kBK, h.nk - kb), kn = min_of(tile, keys - kb), padded = round_up(kn, kNR<C>);
    product<C>(rows, kn, dim, f.q, h.keys + kb * dim, f.s, kBK, false);
    for (int64_t r = 0; r < rows; r++)
      online_row<C>(f.s + r * kBK, max_of(0, min_of(kn, h.visible(qb + r) - kb)), padded, f.top + r, f.total + r,
                    f.o + r * wide, wide);
    product_scores<C>(rows, dim, kn, f.s, h.values + kb * wide, tile * kNR<C>, f.o, wide, true);
  }
  for (int64_t r = 0; r < rows; r++) {
    C total = f.total[r], inverse = total == 0 ? C(0) : 1 / total;
    put_scaled(h.o + (qb + r) * h.ldo, f.o + r * wide, inverse, dim);
    if (h.lse) h.lse[(qb + r) * h.ldl] = f.top[r] + C(log(double(total)));
  }
}

// Keys and values of `batch` sequences as panels: where they are in the workspace, and the phase that fills them.
template <class C>
struct Panels {
  int64_t batch, kv_heads, dim, tiles, q_tiles;
  int64_t *first, *first_q;  // running counts of key tiles and query tiles
  C *keys, *values;

  int64_t key_elements() const { return kBK * dim; }
  int64_t value_elements() const { return kBK * round_up(dim, kNR<C>); }
  int64_t bytes() const {
    Arena a(nullptr);
    Panels(*this).place(a);
    return a.used;
  }
  void place(Arena& a) {
    first = a.take<int64_t>(batch + 1);
    first_q = a.take<int64_t>(batch + 1);
    keys = a.take<C>(tiles * kv_heads * key_elements());
    values = a.take<C>(tiles * kv_heads * value_elements());
  }
  // Panels of a sequence and head follow each other tile by tile.
  int64_t index(int64_t s, int64_t kv, int64_t tile) const {
    return first[s] * kv_heads + kv * (first[s + 1] - first[s]) + tile;
  }
  // rows(s, kv, values) gives the Rows of keys or values, keys_of(s) their number
  template <class S, class R, class N>
  void fill(const R& rows, const N& keys_of) {
    parallel_for(tiles * kv_heads, [&](int64_t task) {
      int64_t s = find_tile(first, batch, task / kv_heads), kv = task % kv_heads, tile = task / kv_heads - first[s];
      int64_t k0 = tile * kBK, kn = min_of(kBK, keys_of(s) - k0), at = index(s, kv, tile);
      Rows<S> k = rows(s, kv, false), v = rows(s, kv, true);
      pack_b_transposed<C, S>([&](int64_t j) { return k.at(k0 + j); }, kn, dim, keys + at * key_elements());
      pack_b<C>([&](int64_t j) { return v.at(k0 + j); }, kn, dim, C(1), values + at * value_elements());
    });
  }
};

template <class C>
Panels<C> panels_of(const AgAttention* a) {
  Panels<C> p{};
  p.batch = a->batch, p.kv_heads = a->kv_heads, p.dim = a->dim;
  p.tiles = count_tiles(a->batch, nullptr, [&](int64_t s) { return div_up(length(a->k_offsets, s), kBK); });
  p.q_tiles = count_tiles(a->batch, nullptr, [&](int64_t s) { return div_up(length(a->q_offsets, s), kBQ); });
  return p;
}
template <class S>
Rows<S> rows_of(const AgAttention* a, int64_t s, int64_t kv, bool values) {
  int64_t ld = values ? a->ldv : a->ldk;
  return Rows<S>{static_cast<const S*>(values ? a->v : a->k) + a->k_offsets[s] * ld + kv * a->dim, ld, nullptr, 1};
}

template <class C>
int64_t forward_bytes(const AgAttention* a) {
  Panels<C> p = panels_of<C>(a);
  return p.bytes() + workers_for(p.q_tiles * a->heads) * ForwardScratch<C>::bytes(a->dim);
}

template <class S>
void forward_all(AgCtx* ctx, const AgAttention* a) {
  typedef Acc<S> C;
  Panels<C> p = panels_of<C>(a);
  Arena arena(ctx->workspace);
  p.place(arena);
  count_tiles(a->batch, p.first, [&](int64_t s) { return div_up(length(a->k_offsets, s), kBK); });
  count_tiles(a->batch, p.first_q, [&](int64_t s) { return div_up(length(a->q_offsets, s), kBQ); });
  p.template fill<S>([&](int64_t s, int64_t kv, bool v) { return rows_of<S>(a, s, kv, v); },
                     [&](int64_t s) { return length(a->k_offsets, s); });
  int64_t per = ForwardScratch<C>::bytes(a->dim), workers = (ctx->workspace_bytes - arena.used) / per;
  parallel_workers(p.q_tiles * a->heads, max_of(1, workers), [&](int64_t task, int64_t worker) {
    int64_t s = find_tile(p.first_q, a->batch, task / a->heads), tiles = p.first_q[s + 1] - p.first_q[s];
    int64_t rest = task - p.first_q[s] * a->heads, head = rest / tiles,
            tile = tiles - 1 - rest % tiles;  // long ones first
    int64_t kv = head / (a->heads / a->kv_heads), q0 = a->q_offsets[s];
    Head<S> h{};
    h.q = static_cast<const S*>(a->q) + q0 * a->ldq + head * a->dim;
    h.o = static_cast<S*>(a->o) + q0 * a->ldo + head * a->dim;
    h.lse = a->lse ? static_cast<C*>(a->lse) + q0 * a->heads + head : nullptr;
    h.keys = p.keys + p.index(s, kv, 0) * p.key_elements();
    h.values = p.values + p.index(s, kv, 0) * p.value_elements();
    h.ldq = a->ldq, h.ldo = a->ldo, h.ldl = a->heads;
    h.nq = length(a->q_offsets, s), h.nk = length(a->k_offsets, s), h.dim = a->dim;
    h.scale = C(a->scale), h.causal = a->causal;
    attend_tile<S>(h, tile * kBQ, ForwardScratch<C>(arena.here() + worker * per, a->dim));
  });
}

// ---- backward ---------------------------------------------------------------------------------------
// A task owns dK and dV of some keys of a sequence and key head and walks through the queries of its heads. dQ is
// finished by a task that has all keys; where keys are split, each task leaves its share and a second phase adds them.
struct Split {
  int64_t chunks;  // tasks per sequence and key head
  explicit Split(const AgAttention* a) {
    int64_t longest = 0, pairs = a->batch * a->kv_heads;
    for (int64_t s = 0; s < a->batch; s++) longest = max_of(longest, length(a->k_offsets, s));
    chunks =
        pairs >= kWantedTasks || pairs == 0 ? 1 : max_of(1, min_of(div_up(kWantedTasks, pairs), longest / (2 * kBK)));
    keys = round_up(div_up(longest, chunks), kBK);
    longest_keys = longest;
  }
  int64_t keys, longest_keys;  // keys of a task at most
  int64_t keys_of(int64_t nk) const { return max_of(kBK, round_up(div_up(nk, chunks), kBK)); }
};

template <class C>
struct BackwardScratch {
  C *keys, *values, *keys_along;             // panels of the task's keys
  C *q, *d_o, *q_along, *d_o_along, *delta;  // of a tile of queries
  C *s, *dp, *dq, *dk, *dv;
  BackwardScratch(void* base, int64_t nk, int64_t dim) {
    Arena a(base);
    int64_t rows = kBQ + kMR<C>, wide = round_up(dim, kNR<C>), padded = round_up(nk, kBK) + kMR<C>;
    keys = a.take<C>(padded * dim);
    values = a.take<C>(padded * dim);
    keys_along = a.take<C>(padded * wide);
    q = a.take<C>(rows * dim);
    d_o = a.take<C>(rows * dim);
    q_along = a.take<C>(kBQ * wide);
    d_o_along = a.take<C>(kBQ * wide);
    delta = a.take<C>(kBQ);
    s = a.take<C>(rows * kBK + kNR<C>);
    dp = a.take<C>(rows * kBK + kNR<C>);
    dq = a.take<C>(rows * wide);
    dk = a.take<C>(padded * wide);
    dv = a.take<C>(padded * wide);
    size = a.used;
  }
  int64_t size;
  static int64_t bytes(int64_t nk, int64_t dim) { return BackwardScratch(nullptr, nk, dim).size; }
};

// s: scores -> probabilities; dp: dO V^T -> gradient of the scores. n keys are visible.
template <class C>
void score_grads(C* s, C* dp, int64_t n, int64_t padded, C lse, C delta) {
  constexpr int W = kWidth<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec<C> p = vexp(load(s + i) - lse);
    store(s + i, p);
    store(dp + i, p * (load(dp + i) - delta));
  }
  if (i < n) {
    Vec<C> p = vexp(keep_below(load(s + i) - lse, i, n, C(-INFINITY)));
    store(s + i, p);
    store(dp + i, keep_below(p * (load(dp + i) - delta), i, n, C(0)));
    i += W;
  }
  for (; i < padded; i += W) {
    store(s + i, Vec<C>{});
    store(dp + i, Vec<C>{});
  }
}

template <class S>
struct Backward {
  typedef Acc<S> C;
  const AgAttention* a;
  Split split;
  C* partial;  // [chunks, tokens, heads * dim] when keys are split

  int64_t dim() const { return a->dim; }
  int64_t wide() const { return round_up(a->dim, kNR<C>); }

  // The tile of queries in every form the products want it.
  void load_queries(int64_t row, int64_t head, int64_t rows, const BackwardScratch<C>& f) const {
    const S* q = static_cast<const S*>(a->q) + row * a->ldq + head * dim();
    const S* d_o = static_cast<const S*>(a->d_o) + row * a->ldo + head * dim();
    const S* o = static_cast<const S*>(a->o) + row * a->ldo + head * dim();
    pack_a<C>(q, a->ldq, rows, dim(), C(a->scale), f.q);
    pack_a<C>(d_o, a->ldo, rows, dim(), C(1), f.d_o);
    pack_b<C>([&](int64_t r) { return q + r * a->ldq; }, rows, dim(), C(a->scale), f.q_along);
    pack_b<C>([&](int64_t r) { return d_o + r * a->ldo; }, rows, dim(), C(1), f.d_o_along);
    for (int64_t r = 0; r < rows; r++) {
      constexpr int W = kWidth<C>;
      Vec<C> s = {};
      for (int64_t i = 0; i < dim(); i += W) {
        int64_t n = min_of(W, dim() - i);
        const S *x = o + r * a->ldo + i, *y = d_o + r * a->ldo + i;
        s += n == W ? load(x) * load(y) : load_n(x, n) * load_n(y, n);
      }
      f.delta[r] = sum_lanes(s);
    }
  }

  // kb: key of the sequence, kl: of the task. kn keys are visible to some query of the tile.
  void tile(int64_t row, int64_t head, int64_t qb, int64_t rows, int64_t nq, int64_t nk, int64_t kb, int64_t kl,
            int64_t kn, int64_t packed, const BackwardScratch<C>& f) const {
    int64_t padded = round_up(kn, kNR<C>), w = wide();
    product<C>(rows, kn, dim(), f.q, f.keys + kl * dim(), f.s, kBK, false);
    product<C>(rows, kn, dim(), f.d_o, f.values + kl * dim(), f.dp, kBK, false);
    for (int64_t r = 0; r < rows; r++) {
      C lse = static_cast<const C*>(a->lse)[(row + r) * a->heads + head];
      int64_t n = a->causal ? max_of(0, min_of(kn, qb + r + nk - nq + 1 - kb)) : kn;
      score_grads<C>(f.s + r * kBK, f.dp + r * kBK, n, padded, lse, f.delta[r]);
    }
    product_scores<C>(rows, dim(), kn, f.dp, f.keys_along + kl * w, packed * kNR<C>, f.dq, w, true);
    product_scores_t<C>(padded, dim(), rows, f.dp, f.q_along, f.dk + kl * w, w);
    product_scores_t<C>(padded, dim(), rows, f.s, f.d_o_along, f.dv + kl * w, w);
  }

  void load_keys(int64_t s, int64_t kv, int64_t k_begin, int64_t n, const BackwardScratch<C>& f) const {
    Rows<S> k = rows_of<S>(a, s, kv, false), v = rows_of<S>(a, s, kv, true);
    for (int64_t kl = 0; kl < n; kl += kBK) {
      int64_t kn = min_of(kBK, n - kl);
      auto key = [&](int64_t j) { return k.at(k_begin + kl + j); };
      pack_b_transposed<C, S>(key, kn, dim(), f.keys + kl * dim());
      pack_b_transposed<C, S>([&](int64_t j) { return v.at(k_begin + kl + j); }, kn, dim(), f.values + kl * dim());
      pack_b<C>(key, kn, dim(), C(1), f.keys_along + kl * wide());
    }
    memset(f.dk, 0, size_t(round_up(n, kBK) * wide()) * sizeof(C));
    memset(f.dv, 0, size_t(round_up(n, kBK) * wide()) * sizeof(C));
  }

  void put_dq(int64_t chunk, int64_t row, int64_t head, int64_t rows, const C* dq) const {
    int64_t tokens = a->q_offsets[a->batch], cols = a->heads * dim();
    for (int64_t r = 0; r < rows; r++) {
      const C* from = dq + r * wide();
      if (split.chunks == 1)
        put_scaled(static_cast<S*>(a->dq) + (row + r) * a->ldq + head * dim(), from, C(a->scale), dim());
      else
        memcpy(partial + (chunk * tokens + row + r) * cols + head * dim(), from, size_t(dim()) * sizeof(C));
    }
  }

  void task(int64_t s, int64_t kv, int64_t chunk, const BackwardScratch<C>& f) const {
    int64_t q0 = a->q_offsets[s], k0 = a->k_offsets[s], nq = length(a->q_offsets, s), nk = length(a->k_offsets, s);
    int64_t group = a->heads / a->kv_heads, k_begin = chunk * split.keys_of(nk),
            k_end = min_of(nk, k_begin + split.keys_of(nk));
    if (k_begin >= nk && chunk > 0) return;
    int64_t n = max_of(0, k_end - k_begin);
    load_keys(s, kv, k_begin, n, f);
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
      for (int64_t qb = 0; qb < nq; qb += kBQ) {
        int64_t rows = min_of(kBQ, nq - qb), seen = a->causal ? min_of(nk, qb + rows - 1 + nk - nq + 1) : nk;
        memset(f.dq, 0, size_t(rows * wide()) * sizeof(C));
        int64_t end = min_of(k_end, seen);
        if (end > k_begin) load_queries(q0 + qb, head, rows, f);
        for (int64_t kb = k_begin; kb < end; kb += kBK)
          tile(q0 + qb, head, qb, rows, nq, nk, kb, kb - k_begin, min_of(kBK, end - kb), min_of(kBK, k_end - kb), f);
        put_dq(chunk, q0 + qb, head, rows, f.dq);
      }
    for (int64_t j = 0; j < n; j++) {
      put_scaled(static_cast<S*>(a->dk) + (k0 + k_begin + j) * a->ldk + kv * dim(), f.dk + j * wide(), C(1), dim());
      put_scaled(static_cast<S*>(a->dv) + (k0 + k_begin + j) * a->ldv + kv * dim(), f.dv + j * wide(), C(1), dim());
    }
  }

  // Adds the shares of dQ in the order of the keys.
  void reduce() const {
    int64_t tokens = a->q_offsets[a->batch], cols = a->heads * dim();
    parallel_for(a->batch * a->heads, [&](int64_t task) {
      int64_t s = task / a->heads, head = task % a->heads, nk = length(a->k_offsets, s);
      int64_t used = max_of(1, div_up(nk, split.keys_of(nk)));
      for (int64_t t = a->q_offsets[s]; t < a->q_offsets[s + 1]; t++) {
        C* sum = partial + t * cols + head * dim();
        for (int64_t c = 1; c < used; c++)
          for (int64_t i = 0; i < dim(); i++) sum[i] += sum[c * tokens * cols + i];
        put_scaled(static_cast<S*>(a->dq) + t * a->ldq + head * dim(), sum, C(a->scale), dim());
      }
    });
  }
};

template <class C>
int64_t partial_elements(const AgAttention* a, const Split& split) {
  return split.chunks == 1 ? 0 : split.chunks * a->q_offsets[a->batch] * a->heads * a->dim;
}
template <class C>
int64_t backward_bytes(const AgAttention* a) {
  Split split(a);
  return arena_bytes(partial_elements<C>(a, split), sizeof(C)) +
         workers_for(a->batch * a->kv_heads * split.chunks) * BackwardScratch<C>::bytes(split.keys, a->dim);
}

template <class S>
void backward_all(AgCtx* ctx, const AgAttention* a) {
  typedef Acc<S> C;
  Split split(a);
  Arena arena(ctx->workspace);
  int64_t shares = partial_elements<C>(a, split), per = BackwardScratch<C>::bytes(split.keys, a->dim);
  Backward<S> b{a, split, arena.take<C>(shares)};
  int64_t workers = (ctx->workspace_bytes - arena.used) / per;
  parallel_workers(a->batch * a->kv_heads * split.chunks, max_of(1, workers), [&](int64_t task, int64_t worker) {
    int64_t pair = task / split.chunks;
    b.task(pair / a->kv_heads, pair % a->kv_heads, task % split.chunks,
           BackwardScratch<C>(arena.here() + worker * per, split.keys, a->dim));
  });
  if (split.chunks > 1) b.reduce();
}

// ---- with a cache -----------------------------------------------------------------------------------
bool streams(const AgAttentionCached* a, int64_t s) { return length(a->q_offsets, s) <= kStreamQueries; }

template <class S>
Rows<S> rows_of(const AgAttentionCached* a, int64_t s, int64_t kv, bool values) {
  int64_t ld = a->kv_heads * a->dim;
  return Rows<S>{static_cast<const S*>(values ? a->v_cache : a->k_cache) + kv * a->dim, ld,
                 a->block_table + s * a->max_blocks, a->block_size};
}

// A share of the keys of a sequence and key head against its few queries: what the online softmax has so far.
template <class C>
struct Share {
  C *top, *total, *o;  // per query row of the group; o [rows, dim padded]
  Share(C* base, int64_t rows) : top(base), total(base + rows), o(base + round_up(2 * rows, kWidth<C>)) {}
  static int64_t elements(int64_t rows, int64_t wide) { return round_up(2 * rows, kWidth<C>) + rows * wide; }
};

template <class S>
struct Streaming {
  typedef Acc<S> C;
  static constexpr int W = kWidth<C>;
  const AgAttentionCached* a;
  int64_t group, wide, rows, chunks, per;  // rows: most query rows of a key head; per: elements of a share

  explicit Streaming(const AgAttentionCached* args) : a(args) {
    group = a->heads / a->kv_heads;
    wide = round_up(a->dim, W);
    rows = group * kStreamQueries;
    int64_t longest = 1;
    for (int64_t s = 0; s < a->batch; s++)
      if (streams(a, s)) longest = max_of(longest, a->kv_len[s]);
    chunks = div_up(longest, kStreamKeys);
    per = Share<C>::elements(rows, wide);
  }
  int64_t shares() const { return a->batch * a->kv_heads * chunks; }
  int64_t scratch_elements() const { return rows * wide + rows * kStreamBlock; }

  // Scores of kn keys from kb on, kStreamBlock apart.
  void scores(const Rows<S>& keys, int64_t kb, int64_t kn, const C* q, int64_t nrows, C* s) const {
    for (int64_t j = 0; j < kn; j++) {
      const S* k = keys.at(kb + j);
      for (int64_t r = 0; r < nrows; r++) {
        Vec<C> x = {}, y = {};
        int64_t i = 0;
        for (; i + 2 * W <= a->dim; i += 2 * W) {
          x += load(q + r * wide + i) * load(k + i);
          y += load(q + r * wide + i + W) * load(k + i + W);
        }
        for (; i < a->dim; i += W)
          x += load(q + r * wide + i) * (i + W <= a->dim ? load(k + i) : load_n(k + i, a->dim - i));
        s[r * kStreamBlock + j] = sum_lanes(x + y);
      }
    }
  }
  // o += p V for one row: columns i.. of `vectors` vectors at a time.
  template <int vectors>
  void weigh(const Rows<S>& values, int64_t kb, int64_t kn, const C* p, int64_t i, C* o) const {
    Vec<C> x[vectors];
    for (int v = 0; v < vectors; v++) x[v] = load(o + i + v * W);
    for (int64_t j = 0; j < kn; j++) {
      const S* row = values.at(kb + j) + i;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++)
        x[v] += p[j] * (vectors > 1 || i + W <= a->dim ? load(row + v * W) : load_n(row, a->dim - i));
    }
    for (int v = 0; v < vectors; v++) store(o + i + v * W, x[v]);
  }

  void task(int64_t s, int64_t kv, int64_t chunk, const Share<C>& f, C* scratch) const {
    int64_t nq = length(a->q_offsets, s), nk = a->kv_len[s], nrows = nq * group;
    Rows<S> keys = rows_of<S>(a, s, kv, false), values = rows_of<S>(a, s, kv, true);
    C *q = scratch, *score = scratch + rows * wide;
    for (int64_t r = 0; r < nrows; r++) {
      const S* from =
          static_cast<const S*>(a->q) + (a->q_offsets[s] + r / group) * a->ldq + (kv * group + r % group) * a->dim;
      for (int64_t i = 0; i < wide; i++) q[r * wide + i] = i < a->dim ? C(to_acc(from[i])) * C(a->scale) : C(0);
      f.top[r] = C(-INFINITY), f.total[r] = 0;
    }
    memset(f.o, 0, size_t(nrows * wide) * sizeof(C));
    for (int64_t kb = chunk * kStreamKeys, end = min_of(nk, kb + kStreamKeys); kb < end; kb += kStreamBlock) {
      int64_t kn = min_of(kStreamBlock, end - kb);
      scores(keys, kb, kn, q, nrows, score);
      for (int64_t r = 0; r < nrows; r++) {
        int64_t seen = max_of(0, min_of(kn, nk - nq + r / group + 1 - kb));
        C *p = score + r * kStreamBlock, *o = f.o + r * wide;
        online_row<C>(p, seen, kStreamBlock, f.top + r, f.total + r, o, wide);
        int64_t i = 0;
        for (; i + 4 * W <= a->dim; i += 4 * W) weigh<4>(values, kb, seen, p, i, o);
        for (; i < a->dim; i += W) weigh<1>(values, kb, seen, p, i, o);
      }
    }
  }

  // Puts the shares of a sequence and key head together, in the order of the keys.
  void combine(int64_t s, int64_t kv, C* all) const {
    int64_t nq = length(a->q_offsets, s), used = max_of(1, div_up(a->kv_len[s], kStreamKeys));
    C* mine = all + (s * a->kv_heads + kv) * chunks * per;
    Share<C> first(mine, rows);
    for (int64_t r = 0; r < nq * group; r++) {
      C top = C(-INFINITY), total = 0, *o = first.o + r * wide;
      for (int64_t c = 0; c < used; c++)
        top = Share<C>(mine + c * per, rows).top[r] > top ? Share<C>(mine + c * per, rows).top[r] : top;
      for (int64_t c = 0; c < used; c++) {
        Share<C> f(mine + c * per, rows);
        C weight = f.total[r] == 0 ? C(0) : exp_of<C>(f.top[r] - top);
        total += weight * f.total[r];
        for (int64_t i = 0; i < wide; i++) o[i] = c == 0 ? o[i] * weight : o[i] + weight * f.o[r * wide + i];
      }
      S* to = static_cast<S*>(a->o) + (a->q_offsets[s] + r / group) * a->ldo + (kv * group + r % group) * a->dim;
      put_scaled(to, o, total == 0 ? C(0) : 1 / total, a->dim);
    }
  }
};

template <class C>
Panels<C> panels_of(const AgAttentionCached* a) {
  Panels<C> p{};
  p.batch = a->batch, p.kv_heads = a->kv_heads, p.dim = a->dim;
  p.tiles = count_tiles(a->batch, nullptr, [&](int64_t s) { return streams(a, s) ? 0 : div_up(a->kv_len[s], kBK); });
  p.q_tiles = count_tiles(a->batch, nullptr,
                          [&](int64_t s) { return streams(a, s) ? 0 : div_up(length(a->q_offsets, s), kBQ); });
  return p;
}
template <class S>
int64_t cached_scratch_bytes(const AgAttentionCached* a) {
  typedef Acc<S> C;
  return max_of(ForwardScratch<C>::bytes(a->dim), arena_bytes(Streaming<S>(a).scratch_elements(), sizeof(C)));
}
template <class S>
int64_t cached_bytes(const AgAttentionCached* a) {
  typedef Acc<S> C;
  Panels<C> p = panels_of<C>(a);
  Streaming<S> st(a);
  return p.bytes() + arena_bytes(st.shares() * st.per, sizeof(C)) +
         workers_for(max_of(st.shares(), p.q_tiles * a->heads)) * cached_scratch_bytes<S>(a);
}

// Many queries against a cache: its keys become panels, then as above.
template <class S>
void prefill(const AgAttentionCached* a, Panels<Acc<S>>& p, char* scratch, int64_t per, int64_t workers) {
  typedef Acc<S> C;
  count_tiles(a->batch, p.first, [&](int64_t s) { return streams(a, s) ? 0 : div_up(a->kv_len[s], kBK); });
  count_tiles(a->batch, p.first_q, [&](int64_t s) { return streams(a, s) ? 0 : div_up(length(a->q_offsets, s), kBQ); });
  p.template fill<S>([&](int64_t s, int64_t kv, bool v) { return rows_of<S>(a, s, kv, v); },
                     [&](int64_t s) { return int64_t(a->kv_len[s]); });
  parallel_workers(p.q_tiles * a->heads, workers, [&](int64_t task, int64_t worker) {
    int64_t s = find_tile(p.first_q, a->batch, task / a->heads), tile = task / a->heads - p.first_q[s],
            head = task % a->heads;
    int64_t kv = head / (a->heads / a->kv_heads), q0 = a->q_offsets[s];
    Head<S> h{};
    h.q = static_cast<const S*>(a->q) + q0 * a->ldq + head * a->dim;
    h.o = static_cast<S*>(a->o) + q0 * a->ldo + head * a->dim;
    h.keys = p.keys + p.index(s, kv, 0) * p.key_elements();
    h.values = p.values + p.index(s, kv, 0) * p.value_elements();
    h.ldq = a->ldq, h.ldo = a->ldo, h.nq = length(a->q_offsets, s), h.nk = a->kv_len[s], h.dim = a->dim;
    h.scale = C(a->scale), h.causal = true;
    attend_tile<S>(h, tile * kBQ, ForwardScratch<C>(scratch + worker * per, a->dim));
  });
}

template <class S>
void cached_all(AgCtx* ctx, const AgAttentionCached* a) {
  typedef Acc<S> C;
  Panels<C> p = panels_of<C>(a);
  Streaming<S> st(a);
  Arena arena(ctx->workspace);
  p.place(arena);
  C* all = arena.take<C>(st.shares() * st.per);
  int64_t per = cached_scratch_bytes<S>(a), workers = max_of(1, (ctx->workspace_bytes - arena.used) / per);
  if (p.q_tiles) prefill<S>(a, p, arena.here(), per, workers);
  parallel_workers(st.shares(), workers, [&](int64_t task, int64_t worker) {
    int64_t chunk = task % st.chunks, kv = task / st.chunks % a->kv_heads, s = task / (st.chunks * a->kv_heads);
    if (!streams(a, s) || chunk >= max_of(1, div_up(a->kv_len[s], kStreamKeys))) return;
    st.task(s, kv, chunk, Share<C>(all + task * st.per, st.rows), reinterpret_cast<C*>(arena.here() + worker * per));
  });
  parallel_for(a->batch * a->kv_heads, [&](int64_t i) {
    if (streams(a, i / a->kv_heads)) st.combine(i / a->kv_heads, i % a->kv_heads, all);
  });
}

}  // namespace

// f64 is for checking gradients: one level has it.
#ifdef AG_LEVEL_PORTABLE
#define AG_F64_HERE 1
#else
#define AG_F64_HERE 0
#endif

int64_t attention_workspace(const AgAttention* a) {
  if (a->dt != AG_F64) return forward_bytes<float>(a);
#if AG_F64_HERE
  return forward_bytes<double>(a);
#else
  return portable::attention_workspace(a);
#endif
}
AgStatus attention(AgCtx* ctx, const AgAttention* a) {
  if (a->dt == AG_F32)
    forward_all<float>(ctx, a);
  else if (a->dt == AG_BF16)
    forward_all<bf16>(ctx, a);
#if AG_F64_HERE
  else
    forward_all<double>(ctx, a);
#else
  else
    return portable::attention(ctx, a);
#endif
  return AG_OK;
}

int64_t attention_grad_workspace(const AgAttention* a) {
  if (a->dt != AG_F64) return backward_bytes<float>(a);
#if AG_F64_HERE
  return backward_bytes<double>(a);
#else
  return portable::attention_grad_workspace(a);
#endif
}
AgStatus attention_grad(AgCtx* ctx, const AgAttention* a) {
  if (a->dt == AG_F32)
    backward_all<float>(ctx, a);
  else if (a->dt == AG_BF16)
    backward_all<bf16>(ctx, a);
#if AG_F64_HERE
  else
    backward_all<double>(ctx, a);
#else
  else
    return portable::attention_grad(ctx, a);
#endif
  return AG_OK;
}

int64_t attention_cached_workspace(const AgAttentionCached* a) {
  if (a->dt != AG_F64) return cached_bytes<float>(a);
#if AG_F64_HERE
  return cached_bytes<double>(a);
#else
  return portable::attention_cached_workspace(a);
#endif
}
AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached* a) {
  if (a->dt == AG_F32)
    cached_all<float>(ctx, a);
  else if (a->dt == AG_BF16)
    cached_all<bf16>(ctx, a);
#if AG_F64_HERE
  else
    cached_all<double>(ctx, a);
#else
  else
    return portable::attention_cached(ctx, a);
#endif
  return AG_OK;
}

}  // namespace AG_LEVEL

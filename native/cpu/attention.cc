// Attention over packed sequences without a score matrix (Dao et al. 2022): scores exist for one tile of queries and
// keys at a time; the backward pass computes them again from the kept log-sum-exp.
#include "tile.h"

namespace AG_LEVEL {
namespace {

template <class C>
constexpr int64_t kBQ = kMR<C> * (64 / kMR<C>);  // queries of a tile
constexpr int64_t kBK = 128;                     // keys of a tile
constexpr int64_t kChunk = 256;                  // queries of a forward task

int64_t longest(const int32_t* offsets, int64_t batch) {
  int64_t n = 0;
  for (int64_t s = 0; s < batch; s++) n = max_of(n, offsets[s + 1] - offsets[s]);
  return n;
}
int64_t workers_for(int64_t tasks) { return max_of(1, min_of(ag_threads(), tasks)); }

// How many of the keys k0.. of a tile query i may see.
inline int64_t visible(const AgAttention* a, int64_t i, int64_t nq, int64_t nk, int64_t k0, int64_t kn) {
  if (!a->causal) return kn;
  return max_of(0, min_of(kn, i + nk - nq + 1 - k0));
}

// Keys as [dim x keys] panels tile by tile, and values (or keys) as [keys x dim] panels tile by tile.
template <class C>
int64_t across_elements(int64_t keys, int64_t dim) {
  return div_up(keys, kBK) * panel_b_elements<C>(kBK, dim);
}
template <class C>
int64_t along_elements(int64_t keys, int64_t dim) {
  return div_up(keys, kBK) * panel_b_elements<C>(dim, kBK);
}
template <class C, class S>
void pack_across(const S* x, int64_t ld, int64_t keys, int64_t dim, C* dst) {
  for (int64_t k0 = 0; k0 < keys; k0 += kBK, dst += panel_b_elements<C>(kBK, dim))
    pack_b<C>(true, x + k0 * ld, ld, dim, min_of(kBK, keys - k0), dst);
}
template <class C, class S>
void pack_along(const S* x, int64_t ld, int64_t keys, int64_t dim, C* dst) {
  for (int64_t k0 = 0; k0 < keys; k0 += kBK, dst += panel_b_elements<C>(dim, kBK))
    pack_b<C>(false, x + k0 * ld, ld, min_of(kBK, keys - k0), dim, dst);
}

// ---- forward ----------------------------------------------------------------------------------------
template <class C>
struct ForwardScratch {
  C *keys, *values, *q, *s, *p, *o, *top, *total;
  static int64_t bytes(int64_t nk, int64_t dim) {
    return arena_bytes(across_elements<C>(nk, dim), sizeof(C)) + arena_bytes(along_elements<C>(nk, dim), sizeof(C)) +
           arena_bytes(panel_a_elements<C>(kBQ<C>, dim), sizeof(C)) + arena_bytes(kBQ<C> * kBK, sizeof(C)) +
           arena_bytes(panel_a_elements<C>(kBQ<C>, kBK), sizeof(C)) + arena_bytes(kBQ<C> * dim, sizeof(C)) +
           2 * arena_bytes(kBQ<C>, sizeof(C));
  }
  ForwardScratch(void* base, int64_t nk, int64_t dim) {
    Arena a(base);
    keys = a.take<C>(across_elements<C>(nk, dim));
    values = a.take<C>(along_elements<C>(nk, dim));
    q = a.take<C>(panel_a_elements<C>(kBQ<C>, dim));
    s = a.take<C>(kBQ<C> * kBK);
    p = a.take<C>(panel_a_elements<C>(kBQ<C>, kBK));
    o = a.take<C>(kBQ<C> * dim);
    top = a.take<C>(kBQ<C>);
    total = a.take<C>(kBQ<C>);
  }
};

// Turns n scores of a row into exp(score - new maximum), zero beyond; rescales what the row has so far.
template <class C>
void online_row(C* s, int64_t n, int64_t kn, C scale, C* top, C* total, C* o, int64_t dim) {
  constexpr int W = kWidth<C>;
  if (n == 0) {
    memset(s, 0, size_t(kn) * sizeof(C));
    return;
  }
  C best = s[0];
  for (int64_t i = 1; i < n; i++) best = s[i] > best ? s[i] : best;
  best *= scale;
  if (best > *top) {
    C shrink = *total > 0 ? C(exp(double(*top - best))) : C(0);
    *total *= shrink;
    for (int64_t i = 0; i < dim; i++) o[i] *= shrink;
    *top = best;
  }
  Vec<C> sum = {};
  for (int64_t i = 0; i < kn; i += W) {
    int64_t m = min_of(W, kn - i);
    Vec<C> e = vexp(load_n(s + i, m) * scale - *top);
    if (i + W > n)
      for (int64_t j = max_of(0, n - i); j < W; j++) e[j] = 0;
    sum += e;
    store_n(s + i, e, m);
  }
  *total += lane_sum(sum);
}

template <class S>
void forward_task(const AgAttention* a, int64_t seq, int64_t head, int64_t q_begin, ForwardScratch<Acc<S>>& f) {
  typedef Acc<S> C;
  int64_t dim = a->dim, q0 = a->q_offsets[seq], k0 = a->k_offsets[seq];
  int64_t nq = a->q_offsets[seq + 1] - q0, nk = a->k_offsets[seq + 1] - k0, kv = head / (a->heads / a->kv_heads);
  int64_t q_end = min_of(nq, q_begin + kChunk);
  int64_t keys = a->causal ? max_of(0, min_of(nk, q_end + nk - nq)) : nk;
  pack_across(static_cast<const S*>(a->k) + k0 * a->ldk + kv * dim, a->ldk, keys, dim, f.keys);
  pack_along(static_cast<const S*>(a->v) + k0 * a->ldv + kv * dim, a->ldv, keys, dim, f.values);
  for (int64_t qb = q_begin; qb < q_end; qb += kBQ<C>) {
    int64_t rows = min_of(kBQ<C>, q_end - qb);
    pack_a<C>(false, static_cast<const S*>(a->q) + (q0 + qb) * a->ldq + head * dim, a->ldq, rows, dim, f.q);
    memset(f.o, 0, size_t(rows * dim) * sizeof(C));
    for (int64_t r = 0; r < rows; r++) f.top[r] = C(-INFINITY), f.total[r] = 0;
    for (int64_t kb = 0; kb < keys; kb += kBK) {
      int64_t kn = min_of(kBK, keys - kb);
      if (visible(a, qb + rows - 1, nq, nk, kb, kn) == 0) break;
      tile_product<C>(rows, kn, dim, f.q, f.keys + kb / kBK * panel_b_elements<C>(kBK, dim), f.s, kBK, false);
      for (int64_t r = 0; r < rows; r++)
        online_row<C>(f.s + r * kBK, visible(a, qb + r, nq, nk, kb, kn), kn, C(a->scale), f.top + r, f.total + r, f.o + r * dim, dim);
      pack_a<C>(false, f.s, kBK, rows, kn, f.p);
      tile_product<C>(rows, dim, kn, f.p, f.values + kb / kBK * panel_b_elements<C>(dim, kBK), f.o, dim, true);
    }
    for (int64_t r = 0; r < rows; r++) {
      S* o = static_cast<S*>(a->o) + (q0 + qb + r) * a->ldo + head * dim;
      C inverse = f.total[r] > 0 ? 1 / f.total[r] : f.total[r] == 0 ? C(0) : f.total[r];
      for (int64_t i = 0; i < dim; i++) put(o + i, double(f.o[r * dim + i] * inverse));
      static_cast<C*>(a->lse)[(q0 + qb + r) * a->heads + head] = f.top[r] + C(log(double(f.total[r])));
    }
  }
}

int64_t forward_chunks(const AgAttention* a) { return max_of(1, div_up(longest(a->q_offsets, a->batch), kChunk)); }

template <class S>
void forward_all(AgCtx* ctx, const AgAttention* a) {
  typedef Acc<S> C;
  int64_t nk = longest(a->k_offsets, a->batch), chunks = forward_chunks(a), tasks = a->batch * a->heads * chunks;
  int64_t per = ForwardScratch<C>::bytes(nk, a->dim);
  parallel_workers(tasks, ctx->workspace_bytes / per, [&](int64_t task, int64_t worker) {
    int64_t seq = task / (a->heads * chunks), head = task / chunks % a->heads, begin = task % chunks * kChunk;
    if (begin >= a->q_offsets[seq + 1] - a->q_offsets[seq]) return;
    ForwardScratch<C> f(static_cast<char*>(ctx->workspace) + worker * per, nk, a->dim);
    forward_task<S>(a, seq, head, begin, f);
  });
}

// ---- backward ---------------------------------------------------------------------------------------
template <class C>
struct BackwardScratch {
  C *keys, *values, *keys_along, *qa, *da, *qb, *db, *s, *dp, *pack, *dq, *dk, *dv, *delta;
  static int64_t bytes(int64_t nk, int64_t dim) {
    return 2 * arena_bytes(across_elements<C>(nk, dim), sizeof(C)) + arena_bytes(along_elements<C>(nk, dim), sizeof(C)) +
           2 * arena_bytes(panel_a_elements<C>(kBQ<C>, dim), sizeof(C)) + 2 * arena_bytes(panel_b_elements<C>(dim, kBQ<C>), sizeof(C)) +
           2 * arena_bytes(kBQ<C> * kBK, sizeof(C)) + arena_bytes(pack_elements(), sizeof(C)) +
           arena_bytes(kBQ<C> * dim, sizeof(C)) + 2 * arena_bytes(nk * dim, sizeof(C)) + arena_bytes(kBQ<C>, sizeof(C));
  }
  static int64_t pack_elements() { return max_of(panel_a_elements<C>(kBQ<C>, kBK), panel_a_elements<C>(kBK, kBQ<C>)); }
  BackwardScratch(void* base, int64_t nk, int64_t dim) {
    Arena a(base);
    keys = a.take<C>(across_elements<C>(nk, dim));
    values = a.take<C>(across_elements<C>(nk, dim));
    keys_along = a.take<C>(along_elements<C>(nk, dim));
    qa = a.take<C>(panel_a_elements<C>(kBQ<C>, dim));
    da = a.take<C>(panel_a_elements<C>(kBQ<C>, dim));
    qb = a.take<C>(panel_b_elements<C>(dim, kBQ<C>));
    db = a.take<C>(panel_b_elements<C>(dim, kBQ<C>));
    s = a.take<C>(kBQ<C> * kBK);
    dp = a.take<C>(kBQ<C> * kBK);
    pack = a.take<C>(pack_elements());
    dq = a.take<C>(kBQ<C> * dim);
    dk = a.take<C>(nk * dim);
    dv = a.take<C>(nk * dim);
    delta = a.take<C>(kBQ<C>);
  }
};

// s: scores -> probabilities; dp: dO V^T -> gradient of the scores.
template <class C>
void score_grads(C* s, C* dp, int64_t n, int64_t kn, C scale, C lse, C delta) {
  constexpr int W = kWidth<C>;
  for (int64_t i = 0; i < kn; i += W) {
    int64_t m = min_of(W, kn - i);
    Vec<C> p = vexp(load_n(s + i, m) * scale - lse);
    if (i + W > n)
      for (int64_t j = max_of(0, n - i); j < W; j++) p[j] = 0;
    store_n(s + i, p, m);
    store_n(dp + i, p * (load_n(dp + i, m) - delta) * scale, m);
  }
}

template <class S>
void backward_tile(const AgAttention* a, BackwardScratch<Acc<S>>& f, int64_t seq, int64_t head, int64_t qb, int64_t rows,
                   int64_t kb, int64_t kn) {
  typedef Acc<S> C;
  int64_t dim = a->dim, q0 = a->q_offsets[seq], nq = a->q_offsets[seq + 1] - q0;
  int64_t nk = a->k_offsets[seq + 1] - a->k_offsets[seq], tile = kb / kBK;
  tile_product<C>(rows, kn, dim, f.qa, f.keys + tile * panel_b_elements<C>(kBK, dim), f.s, kBK, false);
  tile_product<C>(rows, kn, dim, f.da, f.values + tile * panel_b_elements<C>(kBK, dim), f.dp, kBK, false);
  for (int64_t r = 0; r < rows; r++) {
    C lse = static_cast<const C*>(a->lse)[(q0 + qb + r) * a->heads + head];
    score_grads<C>(f.s + r * kBK, f.dp + r * kBK, visible(a, qb + r, nq, nk, kb, kn), kn, C(a->scale), lse, f.delta[r]);
  }
  pack_a<C>(false, f.dp, kBK, rows, kn, f.pack);
  tile_product<C>(rows, dim, kn, f.pack, f.keys_along + tile * panel_b_elements<C>(dim, kBK), f.dq, dim, true);
  pack_a<C>(true, f.dp, kBK, kn, rows, f.pack);
  tile_product<C>(kn, dim, rows, f.pack, f.qb, f.dk + kb * dim, dim, true);
  pack_a<C>(true, f.s, kBK, kn, rows, f.pack);
  tile_product<C>(kn, dim, rows, f.pack, f.db, f.dv + kb * dim, dim, true);
}

template <class S>
void backward_task(const AgAttention* a, int64_t seq, int64_t kv, BackwardScratch<Acc<S>>& f) {
  typedef Acc<S> C;
  int64_t dim = a->dim, q0 = a->q_offsets[seq], k0 = a->k_offsets[seq], group = a->heads / a->kv_heads;
  int64_t nq = a->q_offsets[seq + 1] - q0, nk = a->k_offsets[seq + 1] - k0;
  const S* k = static_cast<const S*>(a->k) + k0 * a->ldk + kv * dim;
  pack_across(k, a->ldk, nk, dim, f.keys);
  pack_along(k, a->ldk, nk, dim, f.keys_along);
  pack_across(static_cast<const S*>(a->v) + k0 * a->ldv + kv * dim, a->ldv, nk, dim, f.values);
  memset(f.dk, 0, size_t(nk * dim) * sizeof(C));
  memset(f.dv, 0, size_t(nk * dim) * sizeof(C));
  for (int64_t head = kv * group; head < (kv + 1) * group; head++)
    for (int64_t qb = 0; qb < nq; qb += kBQ<C>) {
      int64_t rows = min_of(kBQ<C>, nq - qb);
      const S* q = static_cast<const S*>(a->q) + (q0 + qb) * a->ldq + head * dim;
      const S* d_o = static_cast<const S*>(a->d_o) + (q0 + qb) * a->ldo + head * dim;
      const S* o = static_cast<const S*>(a->o) + (q0 + qb) * a->ldo + head * dim;
      pack_a<C>(false, q, a->ldq, rows, dim, f.qa);
      pack_a<C>(false, d_o, a->ldo, rows, dim, f.da);
      pack_b<C>(false, q, a->ldq, rows, dim, f.qb);
      pack_b<C>(false, d_o, a->ldo, rows, dim, f.db);
      for (int64_t r = 0; r < rows; r++) {
        C s = 0;
        for (int64_t i = 0; i < dim; i++) s += C(to_acc(o[r * a->ldo + i])) * C(to_acc(d_o[r * a->ldo + i]));
        f.delta[r] = s;
      }
      memset(f.dq, 0, size_t(rows * dim) * sizeof(C));
      for (int64_t kb = 0; kb < nk; kb += kBK) {
        int64_t kn = min_of(kBK, nk - kb);
        if (visible(a, qb + rows - 1, nq, nk, kb, kn) == 0) break;
        backward_tile<S>(a, f, seq, head, qb, rows, kb, kn);
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < dim; i++)
          put(static_cast<S*>(a->dq) + (q0 + qb + r) * a->ldq + head * dim + i, double(f.dq[r * dim + i]));
    }
  for (int64_t j = 0; j < nk; j++)
    for (int64_t i = 0; i < dim; i++) {
      put(static_cast<S*>(a->dk) + (k0 + j) * a->ldk + kv * dim + i, double(f.dk[j * dim + i]));
      put(static_cast<S*>(a->dv) + (k0 + j) * a->ldv + kv * dim + i, double(f.dv[j * dim + i]));
    }
}

template <class S>
void backward_all(AgCtx* ctx, const AgAttention* a) {
  typedef Acc<S> C;
  int64_t nk = longest(a->k_offsets, a->batch), per = BackwardScratch<C>::bytes(nk, a->dim);
  parallel_workers(a->batch * a->kv_heads, ctx->workspace_bytes / per, [&](int64_t task, int64_t worker) {
    BackwardScratch<C> f(static_cast<char*>(ctx->workspace) + worker * per, nk, a->dim);
    backward_task<S>(a, task / a->kv_heads, task % a->kv_heads, f);
  });
}

// ---- with a cache -----------------------------------------------------------------------------------
template <class S>
Acc<S> dot(const S* a, const S* b, int64_t n) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> s = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) s += load(a + i) * load(b + i);
  if (i < n) s += load_n(a + i, n - i) * load_n(b + i, n - i);
  return lane_sum(s);
}

template <class S>
void cached_row(const AgAttentionCached* a, int64_t seq, int64_t row, int64_t head, int64_t keys, Acc<S>* score) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  int64_t dim = a->dim, kv = head / (a->heads / a->kv_heads), ld = a->kv_heads * dim;
  const S* q = static_cast<const S*>(a->q) + row * a->ldq + head * dim;
  S* o = static_cast<S*>(a->o) + row * a->ldo + head * dim;
  auto place = [&](const void* cache, int64_t j) {
    int64_t block = a->block_table[seq * a->max_blocks + j / a->block_size];
    return static_cast<const S*>(cache) + (block * a->block_size + j % a->block_size) * ld + kv * dim;
  };
  C top = C(-INFINITY), total = 0;
  for (int64_t j = 0; j < keys; j++) {
    score[j] = dot(q, place(a->k_cache, j), dim) * C(a->scale);
    top = score[j] > top ? score[j] : top;
  }
  for (int64_t j = 0; j < keys; j += W) {
    int64_t n = min_of(W, keys - j);
    store_n(score + j, vexp(load_n(score + j, n) - top), n);
  }
  for (int64_t j = 0; j < keys; j++) total += score[j];
  for (int64_t i = 0; i < dim; i += W) {
    int64_t n = min_of(W, dim - i);
    Vec<C> s = {};
    for (int64_t j = 0; j < keys; j++) {
      const S* v = place(a->v_cache, j) + i;
      s += (n == W ? load(v) : load_n(v, n)) * score[j];
    }
    store_n(o + i, keys ? s / total : s, n);
  }
}

int64_t longest_cache(const AgAttentionCached* a) {
  int64_t n = 1;
  for (int64_t s = 0; s < a->batch; s++) n = max_of(n, a->kv_len[s]);
  return n;
}

}  // namespace

int64_t attention_workspace(const AgAttention* a) {
  int64_t nk = longest(a->k_offsets, a->batch), tasks = a->batch * a->heads * forward_chunks(a);
  int64_t per = a->dt == AG_F64 ? ForwardScratch<double>::bytes(nk, a->dim) : ForwardScratch<float>::bytes(nk, a->dim);
  return workers_for(tasks) * per;
}
AgStatus attention(AgCtx* ctx, const AgAttention* a) {
  return with_float(ctx, "attention", a->dt, [&](auto tag) { forward_all<typename decltype(tag)::type>(ctx, a); });
}

int64_t attention_grad_workspace(const AgAttention* a) {
  int64_t nk = longest(a->k_offsets, a->batch);
  int64_t per = a->dt == AG_F64 ? BackwardScratch<double>::bytes(nk, a->dim) : BackwardScratch<float>::bytes(nk, a->dim);
  return workers_for(a->batch * a->kv_heads) * per;
}
AgStatus attention_grad(AgCtx* ctx, const AgAttention* a) {
  return with_float(ctx, "attention_grad", a->dt, [&](auto tag) { backward_all<typename decltype(tag)::type>(ctx, a); });
}

int64_t attention_cached_workspace(const AgAttentionCached* a) {
  int64_t rows = a->q_offsets[a->batch];
  return workers_for(rows * a->heads) * arena_bytes(longest_cache(a), a->dt == AG_F64 ? 8 : 4);
}
AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached* a) {
  return with_float(ctx, "attention_cached", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    int64_t rows = a->q_offsets[a->batch], per = arena_bytes(longest_cache(a), sizeof(C));
    parallel_workers(rows * a->heads, ctx->workspace_bytes / per, [&](int64_t task, int64_t worker) {
      int64_t row = task / a->heads, seq = 0;
      while (row >= a->q_offsets[seq + 1]) seq++;
      int64_t keys = a->kv_len[seq] - (a->q_offsets[seq + 1] - row) + 1;
      C* score = reinterpret_cast<C*>(static_cast<char*>(ctx->workspace) + worker * per);
      cached_row<S>(a, seq, row, task % a->heads, keys, score);
    });
  });
}

}  // namespace AG_LEVEL

// Attention over packed sequences without a score matrix (Dao et al. 2022): scores exist for one tile of queries and
// keys at a time; the backward pass computes them again from the kept log-sum-exp. Keys and values are laid out as
// panels once, in a phase of their own. Tasks are cut by shape; every sum runs in the order of the keys (dQ) or of the
// queries (dK, dV).
#include "attention.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kWantedTasks = 16;  // the backward pass splits keys until there are so many

// ---- forward ----------------------------------------------------------------------------------------
template <class S>
Panels<S> panels_of(const AgAttention* a) {
  Panels<S> p{};
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

template <class S>
int64_t forward_bytes(const AgAttention* a) {
  Panels<S> p = panels_of<S>(a);
  return p.bytes() + workers_for(p.q_tiles * a->heads) * ForwardScratch<S>::bytes(a->dim);
}

template <class S>
void forward_all(AgCtx* ctx, const AgAttention* a) {
  typedef Acc<S> C;
  Panels<S> p = panels_of<S>(a);
  Arena arena(ctx->workspace);
  p.place(arena);
  count_tiles(a->batch, p.first, [&](int64_t s) { return div_up(length(a->k_offsets, s), kBK); });
  count_tiles(a->batch, p.first_q, [&](int64_t s) { return div_up(length(a->q_offsets, s), kBQ); });
  p.fill([&](int64_t s, int64_t kv, bool v) { return rows_of<S>(a, s, kv, v); },
         [&](int64_t s) { return length(a->k_offsets, s); });
  int64_t per = ForwardScratch<S>::bytes(a->dim), workers = (ctx->workspace_bytes - arena.used) / per;
  parallel_workers(p.q_tiles * a->heads, max_of(1, workers), [&](int64_t task, int64_t worker) {
    int64_t s = find_tile(p.first_q, a->batch, task / a->heads), tiles = p.first_q[s + 1] - p.first_q[s];
    int64_t rest = task - p.first_q[s] * a->heads, head = rest / tiles,
            tile = tiles - 1 - rest % tiles;  // long ones first
    int64_t kv = head / (a->heads / a->kv_heads), q0 = a->q_offsets[s];
    Tiles tiles_of_thread;
    Head<S> h{};
    h.q = static_cast<const S*>(a->q) + q0 * a->ldq + head * a->dim;
    h.o = static_cast<S*>(a->o) + q0 * a->ldo + head * a->dim;
    h.lse = a->lse ? static_cast<C*>(a->lse) + q0 * a->heads + head : nullptr;
    h.keys = p.keys + p.index(s, kv, 0) * p.key_slots();
    h.values = p.values + p.index(s, kv, 0) * p.value_slots();
    h.ldq = a->ldq, h.ldo = a->ldo, h.ldl = a->heads;
    h.nq = length(a->q_offsets, s), h.nk = length(a->k_offsets, s), h.dim = a->dim;
    h.scale = C(a->scale), h.causal = a->causal;
    attend_tile<S>(h, tile * kBQ, ForwardScratch<S>(arena.here() + worker * per, a->dim));
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

template <class S>
struct BackwardScratch {
  typedef Acc<S> C;
  C *keys, *values, *keys_along;             // panels of the task's keys
  C *q, *d_o, *q_along, *d_o_along, *delta;  // of a tile of queries
  C *s, *dp, *dq, *dk, *dv;
  BackwardScratch(void* base, int64_t nk, int64_t dim) {
    Arena a(base);
    int64_t rows = kBQ + kMR<C>, wide = round_up(dim, kNR<C>), padded = round_up(nk, kBK) + kMR<C>;
    int64_t deep = steps_of<S>(dim);
    keys = a.take<C>(padded * deep);
    values = a.take<C>(padded * deep);
    keys_along = a.take<C>(round_up(nk, kBK) / kBK * steps_of<S>(kBK) * wide);
    q = a.take<C>(rows * deep);
    d_o = a.take<C>(rows * deep);
    q_along = a.take<C>(steps_of<S>(kBQ) * wide);
    d_o_along = a.take<C>(steps_of<S>(kBQ) * wide);
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

// What a row of a tile needs to become weights again; keys: how many are visible to it.
template <class C>
struct Row {
  int64_t keys;
  C lse, delta;
};

// One vector of weights p and gradients of scores d, from i on: s holds q k, dp holds dO v.
template <class C>
inline __attribute__((always_inline)) void score_grads(const C* s, const C* dp, int64_t i, const Row<C>& row, C scale,
                                                       Vec<C>& p, Vec<C>& d) {
  if (i + kWidth<C> <= row.keys) {
    p = vexp(load(s + i) * scale - row.lse);
    d = p * (load(dp + i) - row.delta);
  } else if (i < row.keys) {
    p = vexp(keep_below(load(s + i) * scale - row.lse, i, row.keys, C(-INFINITY)));
    d = keep_below(p * (load(dp + i) - row.delta), i, row.keys, C(0));
  } else {
    p = d = Vec<C>{};
  }
}

// Turns the tiles s and dp into operands of the three products that follow; row(r) says what row r needs.
#ifndef AG_BF16_DOT
// s becomes the weights, dp the gradients of the scores; both are read along and across.
template <class S, class F>
void tile_grads(Acc<S>* s, Acc<S>* dp, int64_t rows, int64_t padded, Acc<S> scale, const F& row) {
  typedef Acc<S> C;
  for (int64_t r = 0; r < rows; r++) {
    Row<C> w = row(r);
    for (int64_t i = 0; i < padded; i += kWidth<C>) {
      Vec<C> p, d;
      score_grads<C>(s + r * kBK, dp + r * kBK, i, w, scale, p, d);
      store(s + r * kBK + i, p);
      store(dp + r * kBK + i, d);
    }
  }
}
template <class C>
const C* across_weights(const C* s, const C*) {
  return s;
}
template <class C>
const C* across_grads(const C*, const C* dp) {
  return dp;
}
#else
// dp becomes the gradients of the scores in bf16, row by row. Of two rows of s the first becomes the pairs of weights,
// the second the pairs of gradients, each pair made of those two rows: the operands across.
template <class S, class F>
void tile_grads(float* s, float* dp, int64_t rows, int64_t padded, float scale, const F& row) {
  for (int64_t r = 0; r < 2 * steps_of<S>(rows); r += 2) {
    Row<float> none{0, 0, 0}, w0 = r < rows ? row(r) : none, w1 = r + 1 < rows ? row(r + 1) : none;
    float *s0 = s + r * kBK, *s1 = s0 + kBK, *dp0 = dp + r * kBK, *dp1 = dp0 + kBK;
    for (int64_t i = 0; i < padded; i += 16) {
      vf p0, d0, p1, d1;
      score_grads<float>(s0, dp0, i, w0, scale, p0, d0);
      score_grads<float>(s1, dp1, i, w1, scale, p1, d1);
      store(reinterpret_cast<bf16*>(dp0) + i, d0);
      store(reinterpret_cast<bf16*>(dp1) + i, d1);
      store(s0 + i, make_pairs(p0, p1));
      store(s1 + i, make_pairs(d0, d1));
    }
  }
#ifdef AG_AMX
  for (int64_t step = 0; step < steps_of<S>(rows); step += 16)
    for (int64_t i = 0; i < padded; i += 16)
      for (int64_t second = 0; second <= kBK; second += kBK) transpose_block(s + step * kAcross + second + i, kAcross);
#endif
}
inline const float* across_weights(const float* s, const float*) { return s; }
inline const float* across_grads(const float* s, const float*) { return s + kBK; }
#endif

template <class S>
struct Backward {
  typedef Acc<S> C;
  const AgAttentionGrad* grad;
  const AgAttention* a;  // its forward pass
  Split split;
  C* partial;  // [chunks, tokens, heads * dim] when keys are split

  int64_t dim() const { return a->dim; }
  int64_t wide() const { return round_up(a->dim, kNR<C>); }
  int64_t deep() const { return steps_of<S>(a->dim); }

  // The tile of queries in every form the products want it.
  void load_queries(int64_t row, int64_t head, int64_t rows, const BackwardScratch<S>& f) const {
    const S* q = static_cast<const S*>(a->q) + row * a->ldq + head * dim();
    const S* d_o = static_cast<const S*>(grad->d_o) + row * a->ldo + head * dim();
    const S* o = static_cast<const S*>(a->o) + row * a->ldo + head * dim();
    pack_a<S>(q, a->ldq, rows, dim(), f.q);
    pack_a<S>(d_o, a->ldo, rows, dim(), f.d_o);
    pack_b<S>([&](int64_t r) { return q + r * a->ldq; }, rows, dim(), f.q_along);
    pack_b<S>([&](int64_t r) { return d_o + r * a->ldo; }, rows, dim(), f.d_o_along);
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
            int64_t kn, int64_t packed, const BackwardScratch<S>& f) const {
    int64_t padded = round_up(kn, kNR<C>), w = wide(), along = kl / kBK * steps_of<S>(kBK) * w;
    product<S>(rows, kn, deep(), f.q, f.keys + kl * deep(), f.s, kBK);
    product<S>(rows, kn, deep(), f.d_o, f.values + kl * deep(), f.dp, kBK);
    tile_grads<S>(f.s, f.dp, rows, padded, C(a->scale), [&](int64_t r) {
      int64_t n = a->causal ? max_of(0, min_of(kn, qb + r + nk - nq + 1 - kb)) : kn;
      return Row<C>{n, static_cast<const C*>(a->lse)[(row + r) * a->heads + head], f.delta[r]};
    });
    const C *p = across_weights(f.s, f.dp), *d = across_grads(f.s, f.dp);
    product_weights<S>(rows, dim(), steps_of<S>(kn), f.dp, f.keys_along + along, steps_of<S>(packed) * kNR<C>, f.dq, w);
    product_transposed<S>(padded, dim(), steps_of<S>(rows), d, f.q_along, f.dk + kl * w, w);
    product_transposed<S>(padded, dim(), steps_of<S>(rows), p, f.d_o_along, f.dv + kl * w, w);
  }

  void load_keys(int64_t s, int64_t kv, int64_t k_begin, int64_t n, const BackwardScratch<S>& f) const {
    Rows<S> k = rows_of<S>(a, s, kv, false), v = rows_of<S>(a, s, kv, true);
    for (int64_t kl = 0; kl < n; kl += kBK) {
      int64_t kn = min_of(kBK, n - kl);
      auto key = [&](int64_t j) { return k.at(k_begin + kl + j); };
      pack_b_transposed<S>(key, kn, dim(), f.keys + kl * deep());
      pack_b_transposed<S>([&](int64_t j) { return v.at(k_begin + kl + j); }, kn, dim(), f.values + kl * deep());
      pack_b<S>(key, kn, dim(), f.keys_along + kl / kBK * steps_of<S>(kBK) * wide());
    }
    memset(f.dk, 0, size_t(round_up(n, kBK) * wide()) * sizeof(C));
    memset(f.dv, 0, size_t(round_up(n, kBK) * wide()) * sizeof(C));
  }

  void put_dq(int64_t chunk, int64_t row, int64_t head, int64_t rows, const C* dq) const {
    int64_t tokens = a->q_offsets[a->batch], cols = a->heads * dim();
    for (int64_t r = 0; r < rows; r++) {
      const C* from = dq + r * wide();
      if (split.chunks == 1)
        put_scaled(static_cast<S*>(grad->dq) + (row + r) * a->ldq + head * dim(), from, C(a->scale), dim());
      else
        memcpy(partial + (chunk * tokens + row + r) * cols + head * dim(), from, size_t(dim()) * sizeof(C));
    }
  }

  void task(int64_t s, int64_t kv, int64_t chunk, const BackwardScratch<S>& f) const {
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
      put_scaled(static_cast<S*>(grad->dk) + (k0 + k_begin + j) * a->ldk + kv * dim(), f.dk + j * wide(), C(a->scale),
                 dim());
      put_scaled(static_cast<S*>(grad->dv) + (k0 + k_begin + j) * a->ldv + kv * dim(), f.dv + j * wide(), C(1), dim());
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
        put_scaled(static_cast<S*>(grad->dq) + t * a->ldq + head * dim(), sum, C(a->scale), dim());
      }
    });
  }
};

int64_t partial_elements(const AgAttention* a, const Split& split) {
  return split.chunks == 1 ? 0 : split.chunks * a->q_offsets[a->batch] * a->heads * a->dim;
}
template <class S>
int64_t backward_bytes(const AgAttention* a) {
  typedef Acc<S> C;
  Split split(a);
  return arena_bytes(partial_elements(a, split), sizeof(C)) +
         workers_for(a->batch * a->kv_heads * split.chunks) * BackwardScratch<S>::bytes(split.keys, a->dim);
}

template <class S>
void backward_all(AgCtx* ctx, const AgAttentionGrad* grad) {
  typedef Acc<S> C;
  const AgAttention* a = &grad->forward;
  Split split(a);
  Arena arena(ctx->workspace);
  int64_t shares = partial_elements(a, split), per = BackwardScratch<S>::bytes(split.keys, a->dim);
  Backward<S> b{grad, a, split, arena.take<C>(shares)};
  int64_t workers = (ctx->workspace_bytes - arena.used) / per;
  parallel_workers(a->batch * a->kv_heads * split.chunks, max_of(1, workers), [&](int64_t task, int64_t worker) {
    int64_t pair = task / split.chunks;
    Tiles tiles_of_thread;
    b.task(pair / a->kv_heads, pair % a->kv_heads, task % split.chunks,
           BackwardScratch<S>(arena.here() + worker * per, split.keys, a->dim));
  });
  if (split.chunks > 1) b.reduce();
}

}  // namespace

int64_t attention_workspace(const AgAttention* a) {
  if (elsewhere(a->dt)) return other::attention_workspace(a);
  return with_here(a->dt, [&](auto tag) { return forward_bytes<typename decltype(tag)::type>(a); });
}
AgStatus attention(AgCtx* ctx, const AgAttention* a) {
  if (elsewhere(a->dt)) return other::attention(ctx, a);
  with_here(a->dt, [&](auto tag) { forward_all<typename decltype(tag)::type>(ctx, a); });
  return AG_OK;
}

int64_t attention_grad_workspace(const AgAttentionGrad* grad) {
  const AgAttention* a = &grad->forward;
  if (elsewhere(a->dt)) return other::attention_grad_workspace(grad);
  return with_here(a->dt, [&](auto tag) { return backward_bytes<typename decltype(tag)::type>(a); });
}
AgStatus attention_grad(AgCtx* ctx, const AgAttentionGrad* grad) {
  AgDtype dt = grad->forward.dt;
  if (elsewhere(dt)) return other::attention_grad(ctx, grad);
  with_here(dt, [&](auto tag) { backward_all<typename decltype(tag)::type>(ctx, grad); });
  return AG_OK;
}

}  // namespace AG_LEVEL

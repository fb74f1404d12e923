// Attention of a sequence's last queries against a paged cache: many queries as in attention.cc, the pages laid out as
// panels first; a few stream the cache once, as it lies, in shares of keys that are put together afterwards.
#include "attention.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kStreamQueries = 4;  // so few queries against a cache stream it instead of packing it
constexpr int64_t kStreamKeys = 1024;  // keys of such a task
constexpr int64_t kStreamBlock = 64;

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
        online_row<C>(p, p, seen, kStreamBlock, C(1), f.top + r, f.total + r, o, wide);
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

template <class S>
Panels<S> panels_of(const AgAttentionCached* a) {
  Panels<S> p{};
  p.batch = a->batch, p.kv_heads = a->kv_heads, p.dim = a->dim;
  p.tiles = count_tiles(a->batch, nullptr, [&](int64_t s) { return streams(a, s) ? 0 : div_up(a->kv_len[s], kBK); });
  p.q_tiles = count_tiles(a->batch, nullptr,
                          [&](int64_t s) { return streams(a, s) ? 0 : div_up(length(a->q_offsets, s), kBQ); });
  return p;
}
template <class S>
int64_t cached_scratch_bytes(const AgAttentionCached* a) {
  typedef Acc<S> C;
  return max_of(ForwardScratch<S>::bytes(a->dim), arena_bytes(Streaming<S>(a).scratch_elements(), sizeof(C)));
}
template <class S>
int64_t cached_bytes(const AgAttentionCached* a) {
  typedef Acc<S> C;
  Panels<S> p = panels_of<S>(a);
  Streaming<S> st(a);
  return p.bytes() + arena_bytes(st.shares() * st.per, sizeof(C)) +
         workers_for(max_of(st.shares(), p.q_tiles * a->heads)) * cached_scratch_bytes<S>(a);
}

// Many queries against a cache: its keys become panels, then as above.
template <class S>
void prefill(const AgAttentionCached* a, Panels<S>& p, char* scratch, int64_t per, int64_t workers) {
  typedef Acc<S> C;
  count_tiles(a->batch, p.first, [&](int64_t s) { return streams(a, s) ? 0 : div_up(a->kv_len[s], kBK); });
  count_tiles(a->batch, p.first_q, [&](int64_t s) { return streams(a, s) ? 0 : div_up(length(a->q_offsets, s), kBQ); });
  p.fill([&](int64_t s, int64_t kv, bool v) { return rows_of<S>(a, s, kv, v); },
         [&](int64_t s) { return int64_t(a->kv_len[s]); });
  parallel_workers(p.q_tiles * a->heads, workers, [&](int64_t task, int64_t worker) {
    int64_t s = find_tile(p.first_q, a->batch, task / a->heads), tile = task / a->heads - p.first_q[s],
            head = task % a->heads;
    int64_t kv = head / (a->heads / a->kv_heads), q0 = a->q_offsets[s];
    Tiles tiles_of_thread;
    Head<S> h{};
    h.q = static_cast<const S*>(a->q) + q0 * a->ldq + head * a->dim;
    h.o = static_cast<S*>(a->o) + q0 * a->ldo + head * a->dim;
    h.keys = p.keys + p.index(s, kv, 0) * p.key_slots();
    h.values = p.values + p.index(s, kv, 0) * p.value_slots();
    h.ldq = a->ldq, h.ldo = a->ldo, h.nq = length(a->q_offsets, s), h.nk = a->kv_len[s], h.dim = a->dim;
    h.scale = C(a->scale), h.causal = true;
    attend_tile<S>(h, tile * kBQ, ForwardScratch<S>(scratch + worker * per, a->dim));
  });
}

template <class S>
void cached_all(AgCtx* ctx, const AgAttentionCached* a) {
  typedef Acc<S> C;
  Panels<S> p = panels_of<S>(a);
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

int64_t attention_cached_workspace(const AgAttentionCached* a) {
  if (elsewhere(a->dt)) return other::attention_cached_workspace(a);
  return with_here(a->dt, [&](auto tag) { return cached_bytes<typename decltype(tag)::type>(a); });
}
AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached* a) {
  if (elsewhere(a->dt)) return other::attention_cached(ctx, a);
  with_here(a->dt, [&](auto tag) { cached_all<typename decltype(tag)::type>(ctx, a); });
  return AG_OK;
}

}  // namespace AG_LEVEL

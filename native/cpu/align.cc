// alignMix: last projector layer, mix of the alignment levels and splice in one kernel. The definition stands at
// AgAlignMix in backend.h; names below follow it.
#include "microkernel.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kGroupRows = 512;  // pictures are projected together until there are so many rows
constexpr int64_t kStripe = 256;     // columns of a task where columns are shared out

template <class C>
C gelu(C x) {
  return activate(AG_GELU, splat(x), Vec<C>{})[0];
}
template <class C>
C gelu_slope(C x) {
  return slope_of(AG_GELU, splat(x), Vec<C>{}, C())[0];
}

template <class A, class B>
Acc<A> dot(const A* a, const B* b, int64_t n) {
  constexpr int W = kWidth<Acc<A>>;
  Vec<Acc<A>> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + W) * load(b + i + W);
  }
  for (; i < n; i += W) {
    int64_t k = min_of(W, n - i);
    s0 += load_n(a + i, k) * load_n(b + i, k);
  }
  return sum_lanes(s0 + s1);
}

// t += by * x
template <class S, class C>
void add_scaled(C* t, C by, const S* x, int64_t n) {
  constexpr int W = kWidth<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(t + i, load(t + i) + load(x + i) * by);
  for (; i < n; i++) t[i] += by * C(to_acc(x[i]));
}

// n finished sums go to, or are added to, elements from `at` on of a gradient.
template <class D, class C>
void put_sums(const AgGrad& g, int64_t at, const C* t, int64_t n) {
  D* to = static_cast<D*>(g.p) + at;
  for (int64_t i = 0; i < n; i++) put(to + i, g.accumulate ? double(to_acc(to[i]) + t[i]) : double(t[i]));
}
template <class C>
void put_grads(const AgGrad& g, int64_t at, const C* t, int64_t n) {
  if (g.dt == AG_F32)
    put_sums<float>(g, at, t, n);
  else if (g.dt == AG_BF16)
    put_sums<bf16>(g, at, t, n);
  else
    put_sums<double>(g, at, t, n);
}

// ---- forward ----------------------------------------------------------------------------------------
int64_t group_of(const AgAlignMix* a) {
  return max_of(1, min_of(a->images, div_up(kGroupRows, max_of(a->patches, 1))));
}

// rows_m = x_m W^T + b of n pictures from m on; c_rows says where they belong in the sequence.
AgGemm projection(const AgAlignMix* a, int64_t m, int64_t n, const int32_t* c_rows) {
  int64_t size = a->dt == AG_BF16 ? 2 : a->dt == AG_F64 ? 8 : 4;
  AgGemm g{};
  g.m = n * a->patches, g.n = a->hidden, g.k = a->features;
  g.a = static_cast<const char*>(a->x) + m * a->patches * a->features * size;
  g.lda = a->features;
  g.b = a->w, g.ldb = a->features, g.b_packed = a->w_packed, g.trans_b = 1;
  g.bias = a->b;
  g.c = a->out, g.ldc = a->hidden, g.c_rows = c_rows;
  if (n == 1) {  // rows of one picture are neighbours
    g.c = static_cast<char*>(a->out) + int64_t(a->image_row[m]) * a->hidden * size;
    g.c_rows = nullptr;
  }
  g.dt = g.dt_c = a->dt;
  return g;
}

template <class C>
struct ForwardScratch {
  C* activated;  // [images, gate_hidden]
  int32_t* c_rows;
  int64_t used;
  ForwardScratch(void* base, const AgAlignMix* a) {
    Arena arena(base);
    activated = arena.take<C>(a->mode == AG_MIX_GATE ? a->images * a->gate_hidden : 0);
    c_rows = arena.take<int32_t>(group_of(a) * a->patches);
    used = arena.used;
  }
};

template <class S>
void text_means(const AgAlignMix* a) {
  typedef Acc<S> C;
  int64_t H = a->hidden, stripes = div_up(H, kStripe);
  parallel_for(a->images * stripes, [&](int64_t task) {
    int64_t m = task / stripes, i0 = task % stripes * kStripe, width = min_of(kStripe, H - i0);
    int64_t from = a->gate_offsets[m], n = a->gate_offsets[m + 1] - from;
    C* mean = static_cast<C*>(a->mean) + m * H + i0;
    memset(mean, 0, size_t(width) * sizeof(C));
    for (int64_t j = 0; j < n; j++)
      add_scaled(mean, C(1), static_cast<const S*>(a->embed) + int64_t(a->gate_ids[from + j]) * H + i0, width);
    for (int64_t i = 0; i < width && n > 0; i++) mean[i] /= C(n);
  });
}

template <class S>
AgStatus project(AgCtx* ctx, const AgAlignMix* a, const ForwardScratch<Acc<S>>& f, int64_t m0, int64_t n) {
  int64_t P = a->patches, H = a->hidden;
  if (!a->w && !a->w_packed) {
    parallel_range(n * P, row_grain(H), [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++)
        memcpy(static_cast<S*>(a->out) + (a->image_row[m0 + r / P] + r % P) * H,
               static_cast<const S*>(a->x) + (m0 * P + r) * H, size_t(H) * sizeof(S));
    });
    return AG_OK;
  }
  for (int64_t r = 0; r < n * P; r++) f.c_rows[r] = int32_t(a->image_row[m0 + r / P] + r % P);
  AgGemm g = projection(a, m0, n, f.c_rows);
  AgCtx inner = *ctx;
  inner.workspace = static_cast<char*>(ctx->workspace) + f.used;
  inner.workspace_bytes = ctx->workspace_bytes - f.used;
  AgStatus s = gemm(&inner, &g);
  if (s != AG_OK) memcpy(ctx->error, inner.error, sizeof ctx->error);
  return s;
}

template <class S>
void gate_forward(const AgAlignMix* a, int64_t m, Acc<S>* activated) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches;
  const C* dots = static_cast<const C*>(a->dots) + m * P;
  C* pre = static_cast<C*>(a->gate_pre) + m * G;
  C* logits = static_cast<C*>(a->logits) + m * L;
  C* coef = static_cast<C*>(a->coef) + m * a->levels;
  for (int64_t g = 0; g < G; g++) {
    pre[g] = dot(static_cast<const S*>(a->gw0) + g * P, dots, P) + C(to_acc(static_cast<const S*>(a->gb0)[g]));
    activated[g] = gelu(pre[g]);
  }
  C top = C(-INFINITY), total = 0;
  for (int64_t l = 0; l < L; l++) {
    logits[l] = dot(static_cast<const S*>(a->gw1) + l * G, activated, G) + C(to_acc(static_cast<const S*>(a->gb1)[l]));
    top = logits[l] > top ? logits[l] : top;
  }
  for (int64_t l = 0; l < L; l++) total += coef[l] = vexp(splat(logits[l] - top))[0];
  for (int64_t l = 0; l < L; l++) coef[l] /= total;
  coef[L] = C(a->global);
}

template <class S>
void mix_row(const AgAlignMix* a, int64_t m) {
  typedef Acc<S> C;
  int64_t H = a->hidden;
  C* coef = static_cast<C*>(a->coef) + m * a->levels;
  if (a->mode == AG_MIX_LEVEL)
    for (int64_t l = 0; l < a->levels; l++) coef[l] = l == a->level[m] ? C(1) : C(0);
  S* row = static_cast<S*>(a->out) + int64_t(a->align_row[m]) * H;
  C t[kStripe];
  for (int64_t i0 = 0; i0 < H; i0 += kStripe) {
    int64_t n = min_of(kStripe, H - i0);
    memset(t, 0, sizeof t);
    for (int64_t l = 0; l < a->levels; l++) add_scaled(t, coef[l], static_cast<const S*>(a->table) + l * H + i0, n);
    for (int64_t i = 0; i < n; i++) put(row + i0 + i, double(t[i]));
  }
}

template <class S>
AgStatus forward(AgCtx* ctx, const AgAlignMix* a) {
  typedef Acc<S> C;
  int64_t H = a->hidden, P = a->patches, group = group_of(a);
  bool gate = a->mode == AG_MIX_GATE;
  ForwardScratch<C> f(ctx->workspace, a);
  if (gate) text_means<S>(a);
  for (int64_t m0 = 0; m0 < a->images; m0 += group) {
    int64_t n = min_of(group, a->images - m0);
    AgStatus s = project<S>(ctx, a, f, m0, n);
    if (s != AG_OK) return s;
    if (!gate) continue;
    parallel_range(n * P, row_grain(H), [&](int64_t lo, int64_t hi) {  // the rows are still in cache
      for (int64_t r = lo; r < hi; r++)
        static_cast<C*>(a->dots)[m0 * P + r] =
            dot(static_cast<const S*>(a->out) + (a->image_row[m0 + r / P] + r % P) * H,
                static_cast<const C*>(a->mean) + (m0 + r / P) * H, H);
    });
  }
  parallel_for(a->images, [&](int64_t m) {
    if (gate) gate_forward<S>(a, m, f.activated + m * a->gate_hidden);
    mix_row<S>(a, m);
  });
  parallel_range(a->tokens, row_grain(H), [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; t++)
      if (a->token[t] >= 0)
        memcpy(static_cast<S*>(a->out) + t * H, static_cast<const S*>(a->embed) + int64_t(a->token[t]) * H,
               size_t(H) * sizeof(S));
  });
  return AG_OK;
}

// ---- gradient ---------------------------------------------------------------------------------------
bool has_projector(const AgAlignMix* a) { return a->w || a->w_packed; }
bool wants_rows(const AgAlignMix* a) { return has_projector(a) && (a->dw.p || a->db.p || a->dx); }
bool wants_embed(const AgAlignMix* a) { return a->d_embed.p != nullptr; }
int64_t gate_entries(const AgAlignMix* a) { return a->mode == AG_MIX_GATE ? a->gate_offsets[a->images] : 0; }

template <class S>
struct GradScratch {
  typedef Acc<S> C;
  C *d_coef, *d_logits, *d_pre, *activated, *d_dots, *d_mean;
  S* d_rows;
  int32_t *start, *entry;  // what adds to each row of the embedding table: a token's place, or tokens + picture
  int64_t used;
  GradScratch(void* base, const AgAlignMix* a) {
    Arena arena(base);
    int64_t gate = a->mode == AG_MIX_GATE ? a->images : 0;
    d_coef = arena.take<C>(gate * a->levels);
    d_logits = arena.take<C>(gate * a->levels);
    d_pre = arena.take<C>(gate * a->gate_hidden);
    activated = arena.take<C>(gate * a->gate_hidden);
    d_dots = arena.take<C>(gate * a->patches);
    d_mean = arena.take<C>(wants_embed(a) ? gate * a->hidden : 0);
    d_rows = arena.take<S>(wants_rows(a) ? a->images * a->patches * a->hidden : 0);
    start = arena.take<int32_t>(wants_embed(a) ? a->vocab + 1 : 0);
    entry = arena.take<int32_t>(wants_embed(a) ? a->tokens + gate_entries(a) : 0);
    used = arena.used;
  }
};

// From the gradient of the ALIGN row back to the dot products.
template <class S>
void gate_backward(const AgAlignMix* a, const GradScratch<S>& f, int64_t m) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  const S* d_align = static_cast<const S*>(a->d_out) + int64_t(a->align_row[m]) * H;
  const C *coef = static_cast<const C*>(a->coef) + m * a->levels, *pre = static_cast<const C*>(a->gate_pre) + m * G;
  C *d_coef = f.d_coef + m * a->levels, *d_logits = f.d_logits + m * a->levels, *d_pre = f.d_pre + m * G;
  C* d_dots = f.d_dots + m * P;
  C inner = 0;
  for (int64_t l = 0; l < L; l++) {
    d_coef[l] = dot(d_align, static_cast<const S*>(a->table) + l * H, H);
    inner += d_coef[l] * coef[l];
  }
  for (int64_t l = 0; l < L; l++) d_logits[l] = coef[l] * (d_coef[l] - inner);
  memset(d_pre, 0, size_t(G) * sizeof(C));
  for (int64_t l = 0; l < L; l++) add_scaled(d_pre, d_logits[l], static_cast<const S*>(a->gw1) + l * G, G);
  memset(d_dots, 0, size_t(P) * sizeof(C));
  for (int64_t g = 0; g < G; g++) {
    d_pre[g] *= gelu_slope(pre[g]);
    f.activated[m * G + g] = gelu(pre[g]);
    add_scaled(d_dots, d_pre[g], static_cast<const S*>(a->gw0) + g * P, P);
  }
}

// d_rows = d_out rows + d_dots (outer) mean
template <class S>
void rows_backward(const AgAlignMix* a, const GradScratch<S>& f, S* d_rows) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  int64_t P = a->patches, H = a->hidden;
  parallel_range(a->images * P, row_grain(H), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* d = static_cast<const S*>(a->d_out) + (a->image_row[r / P] + r % P) * H;
      S* to = d_rows + r * H;
      if (a->mode != AG_MIX_GATE) {
        memcpy(to, d, size_t(H) * sizeof(S));
        continue;
      }
      C by = f.d_dots[r];
      const C* mean = static_cast<const C*>(a->mean) + r / P * H;
      int64_t i = 0;
      for (; i + W <= H; i += W) store(to + i, load(d + i) + load(mean + i) * by);
      for (; i < H; i++) put(to + i, double(C(to_acc(d[i])) + by * mean[i]));
    }
  });
}

// d_mean = sum_p d_dots[p] rows[p], divided by the number of text tokens: what each of them gets.
template <class S>
void mean_backward(const AgAlignMix* a, const GradScratch<S>& f) {
  typedef Acc<S> C;
  int64_t P = a->patches, H = a->hidden, stripes = div_up(H, kStripe);
  parallel_for(a->images * stripes, [&](int64_t task) {
    int64_t m = task / stripes, i0 = task % stripes * kStripe, width = min_of(kStripe, H - i0);
    int64_t n = a->gate_offsets[m + 1] - a->gate_offsets[m];
    C* d_mean = f.d_mean + m * H + i0;
    memset(d_mean, 0, size_t(width) * sizeof(C));
    for (int64_t p = 0; p < P; p++)
      add_scaled(d_mean, f.d_dots[m * P + p], static_cast<const S*>(a->out) + (a->image_row[m] + p) * H + i0, width);
    for (int64_t i = 0; i < width && n > 0; i++) d_mean[i] /= C(n);
  });
}

// to[r, c] = sum over the pictures, in order, of left(m, r) * right(m)[c]
template <class C, class A, class B>
void outer_sum(const AgAlignMix* a, const AgGrad& to, int64_t rows, int64_t cols, const A& left, const B& right) {
  if (!to.p) return;
  int64_t stripes = div_up(cols, kStripe);
  parallel_range(rows * stripes, max_of(1, row_grain(min_of(cols, kStripe) * max_of(a->images, 1))),
                 [&](int64_t lo, int64_t hi) {
                   for (int64_t task = lo; task < hi; task++) {
                     int64_t r = task / stripes, c0 = task % stripes * kStripe, n = min_of(kStripe, cols - c0);
                     C t[kStripe] = {};
                     for (int64_t m = 0; m < a->images; m++) add_scaled(t, left(m, r), right(m) + c0, n);
                     put_grads(to, r * cols + c0, t, n);
                   }
                 });
}

// The small parameters: table and gate.
template <class S>
void small_grads(const AgAlignMix* a, const GradScratch<S>& f) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  const C *coef = static_cast<const C*>(a->coef), *dots = static_cast<const C*>(a->dots), one = 1;
  outer_sum<C>(
      a, a->d_table, a->levels, H, [&](int64_t m, int64_t l) { return coef[m * a->levels + l]; },
      [&](int64_t m) { return static_cast<const S*>(a->d_out) + int64_t(a->align_row[m]) * H; });
  if (a->mode != AG_MIX_GATE) return;
  auto d_pre = [&](int64_t m, int64_t g) { return f.d_pre[m * G + g]; };
  auto d_logit = [&](int64_t m, int64_t l) { return f.d_logits[m * a->levels + l]; };
  auto ones = [&](int64_t) { return &one; };
  outer_sum<C>(a, a->d_gw0, G, P, d_pre, [&](int64_t m) { return dots + m * P; });
  outer_sum<C>(a, a->d_gb0, G, 1, d_pre, ones);
  outer_sum<C>(a, a->d_gw1, L, G, d_logit, [&](int64_t m) { return f.activated + m * G; });
  outer_sum<C>(a, a->d_gb1, L, 1, d_logit, ones);
}

// Sorts what adds to the embedding table by row, keeping the order of the sequence: tokens first, then text means.
template <class S>
void sort_entries(const AgAlignMix* a, const GradScratch<S>& f) {
  int64_t images = a->mode == AG_MIX_GATE ? a->images : 0;
  auto each = [&](auto&& take) {
    for (int64_t t = 0; t < a->tokens; t++)
      if (a->token[t] >= 0) take(a->token[t], int32_t(t));
    for (int64_t m = 0; m < images; m++)
      for (int64_t j = a->gate_offsets[m]; j < a->gate_offsets[m + 1]; j++)
        take(a->gate_ids[j], int32_t(a->tokens + m));
  };
  memset(f.start, 0, size_t(a->vocab + 1) * sizeof(int32_t));
  each([&](int32_t id, int32_t) { f.start[id]++; });
  for (int64_t v = 0, sum = 0; v <= a->vocab; v++) {
    int32_t n = f.start[v];
    f.start[v] = int32_t(sum);
    sum += n;
  }
  each([&](int32_t id, int32_t what) { f.entry[f.start[id]++] = what; });  // start[id] is now the end of id
}

// Each touched row is summed in acc and written once.
template <class S>
void embed_grad(const AgAlignMix* a, const GradScratch<S>& f) {
  typedef Acc<S> C;
  int64_t H = a->hidden, size = a->d_embed.dt == AG_BF16 ? 2 : a->d_embed.dt == AG_F64 ? 8 : 4;
  parallel_range(a->vocab, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t v = lo; v < hi; v++) {
      int64_t begin = v ? f.start[v - 1] : 0, end = f.start[v];
      if (begin == end) {
        if (!a->d_embed.accumulate) memset(static_cast<char*>(a->d_embed.p) + v * H * size, 0, size_t(H * size));
        continue;
      }
      for (int64_t i0 = 0; i0 < H; i0 += kStripe) {
        int64_t n = min_of(kStripe, H - i0);
        C t[kStripe] = {};
        for (int64_t e = begin; e < end; e++) {
          int64_t what = f.entry[e];
          if (what < a->tokens)
            add_scaled(t, C(1), static_cast<const S*>(a->d_out) + what * H + i0, n);
          else
            add_scaled(t, C(1), f.d_mean + (what - a->tokens) * H + i0, n);
        }
        put_grads(a->d_embed, v * H + i0, t, n);
      }
    }
  });
}

// The projector's gradients are products with d_rows.
AgGemm weight_grad(const AgAlignMix* a, const void* d_rows) {
  AgGemm g{};
  g.m = a->hidden, g.n = a->features, g.k = a->images * a->patches;
  g.a = d_rows, g.lda = a->hidden, g.trans_a = 1;
  g.b = a->x, g.ldb = a->features;
  g.c = a->dw.p, g.ldc = a->features, g.accumulate = a->dw.accumulate;
  g.dt = a->dt, g.dt_c = a->dw.dt;
  return g;
}
AgGemm input_grad(const AgAlignMix* a, const void* d_rows) {
  AgGemm g{};
  g.m = a->images * a->patches, g.n = a->features, g.k = a->hidden;
  g.a = d_rows, g.lda = a->hidden;
  g.b = a->w, g.ldb = a->features;
  g.c = a->dx, g.ldc = a->features;
  g.dt = g.dt_c = a->dt;
  return g;
}
AgColSum bias_grad(const AgAlignMix* a, const void* d_rows) {
  return AgColSum{a->db, d_rows, a->images * a->patches, a->hidden, a->hidden, a->dt, 1.0, nullptr};
}

template <class S>
AgStatus projector_grads(AgCtx* ctx, const AgAlignMix* a, const GradScratch<S>& f) {
  AgCtx inner = *ctx;
  inner.workspace = static_cast<char*>(ctx->workspace) + f.used;
  inner.workspace_bytes = ctx->workspace_bytes - f.used;
  AgStatus status = AG_OK;
  if (a->dw.p) {
    AgGemm g = weight_grad(a, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status == AG_OK && a->db.p) {
    AgColSum s = bias_grad(a, f.d_rows);
    status = col_sum(&inner, &s);
  }
  if (status == AG_OK && a->dx) {
    AgGemm g = input_grad(a, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status != AG_OK) memcpy(ctx->error, inner.error, sizeof ctx->error);
  return status;
}

template <class S>
AgStatus backward(AgCtx* ctx, const AgAlignMix* a) {
  GradScratch<S> f(ctx->workspace, a);
  bool gate = a->mode == AG_MIX_GATE;
  if (gate) parallel_for(a->images, [&](int64_t m) { gate_backward<S>(a, f, m); });
  small_grads<S>(a, f);
  if (wants_embed(a)) {
    if (gate) mean_backward<S>(a, f);
    sort_entries<S>(a, f);
    embed_grad<S>(a, f);
  }
  if (!has_projector(a) && a->dx) rows_backward<S>(a, f, static_cast<S*>(a->dx));
  if (!wants_rows(a)) return AG_OK;
  rows_backward<S>(a, f, f.d_rows);
  return projector_grads<S>(ctx, a, f);
}

template <class S>
int64_t forward_bytes(const AgAlignMix* a) {
  ForwardScratch<Acc<S>> f(nullptr, a);
  int64_t inner = 0, group = group_of(a);
  if (has_projector(a) && a->images)
    for (int64_t n = group; n > 0; n = n == group ? a->images % group : 0) {  // the last group may be smaller
      int32_t row = 0;  // that there are such rows is all that counts
      AgGemm g = projection(a, 0, n, &row);
      inner = max_of(inner, gemm_workspace(&g));
    }
  return f.used + inner;
}
template <class S>
int64_t backward_bytes(const AgAlignMix* a) {
  AgGemm w = weight_grad(a, nullptr), x = input_grad(a, nullptr);
  AgColSum b = bias_grad(a, nullptr);
  int64_t inner = 0;
  if (has_projector(a)) {
    if (a->dw.p) inner = max_of(inner, gemm_workspace(&w));
    if (a->dx) inner = max_of(inner, gemm_workspace(&x));
    if (a->db.p) inner = max_of(inner, col_sum_workspace(&b));
  }
  return GradScratch<S>(nullptr, a).used + inner;
}

}  // namespace

int64_t align_mix_workspace(const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix_workspace(a);
  return with_here(a->dt, [&](auto tag) { return forward_bytes<typename decltype(tag)::type>(a); });
}
AgStatus align_mix(AgCtx* ctx, const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix(ctx, a);
  return with_here(a->dt, [&](auto tag) { return forward<typename decltype(tag)::type>(ctx, a); });
}

int64_t align_mix_grad_workspace(const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix_grad_workspace(a);
  return with_here(a->dt, [&](auto tag) { return backward_bytes<typename decltype(tag)::type>(a); });
}
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix_grad(ctx, a);
  return with_here(a->dt, [&](auto tag) { return backward<typename decltype(tag)::type>(ctx, a); });
}

}  // namespace AG_LEVEL

// The gradient of alignMix (AgAlignMixGrad in arguments.h; names follow it).
#include "align.h"

namespace AG_LEVEL {
namespace {

template <class C>
C gelu_slope(C x) {
  return slope_of(AG_GELU, splat(x), Vec<C>{}, C())[0];
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

bool wants_rows(const AgAlignMixGrad* grad) {
  return has_projector(&grad->forward) && (grad->dw.p || grad->db.p || grad->dx);
}
bool wants_embed(const AgAlignMixGrad* grad) { return grad->d_embed.p != nullptr; }
int64_t gate_entries(const AgAlignMix* a) { return a->mode == AG_MIX_GATE ? a->gate_offsets[a->images] : 0; }

template <class S>
struct GradScratch {
  typedef Acc<S> C;
  C *d_coef, *d_logits, *d_pre, *activated, *d_dots, *d_mean;
  S* d_rows;
  int32_t *start, *entry;  // what adds to each row of the embedding table: a token's place, or tokens + picture
  int64_t used;
  GradScratch(void* base, const AgAlignMixGrad* grad) {
    const AgAlignMix* a = &grad->forward;
    Arena arena(base);
    int64_t gate = a->mode == AG_MIX_GATE ? a->images : 0;
    d_coef = arena.take<C>(gate * a->levels);
    d_logits = arena.take<C>(gate * a->levels);
    d_pre = arena.take<C>(gate * a->gate_hidden);
    activated = arena.take<C>(gate * a->gate_hidden);
    d_dots = arena.take<C>(gate * a->patches);
    d_mean = arena.take<C>(wants_embed(grad) ? gate * a->hidden : 0);
    d_rows = arena.take<S>(wants_rows(grad) ? a->images * a->patches * a->hidden : 0);
    start = arena.take<int32_t>(wants_embed(grad) ? a->vocab + 1 : 0);
    entry = arena.take<int32_t>(wants_embed(grad) ? a->tokens + gate_entries(a) : 0);
    used = arena.used;
  }
};

// From the gradient of the ALIGN row back to the dot products.
template <class S>
void gate_backward(const AgAlignMixGrad* grad, const GradScratch<S>& f, int64_t m) {
  const AgAlignMix* a = &grad->forward;
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  const S* d_align = static_cast<const S*>(grad->d_out) + int64_t(a->align_row[m]) * H;
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
void rows_backward(const AgAlignMixGrad* grad, const GradScratch<S>& f, S* d_rows) {
  const AgAlignMix* a = &grad->forward;
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  int64_t P = a->patches, H = a->hidden;
  parallel_range(a->images * P, row_grain(H), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* d = static_cast<const S*>(grad->d_out) + (a->image_row[r / P] + r % P) * H;
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
void small_grads(const AgAlignMixGrad* grad, const GradScratch<S>& f) {
  const AgAlignMix* a = &grad->forward;
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  const C *coef = static_cast<const C*>(a->coef), *dots = static_cast<const C*>(a->dots), one = 1;
  outer_sum<C>(
      a, grad->d_table, a->levels, H, [&](int64_t m, int64_t l) { return coef[m * a->levels + l]; },
      [&](int64_t m) { return static_cast<const S*>(grad->d_out) + int64_t(a->align_row[m]) * H; });
  if (a->mode != AG_MIX_GATE) return;
  auto d_pre = [&](int64_t m, int64_t g) { return f.d_pre[m * G + g]; };
  auto d_logit = [&](int64_t m, int64_t l) { return f.d_logits[m * a->levels + l]; };
  auto ones = [&](int64_t) { return &one; };
  outer_sum<C>(a, grad->d_gw0, G, P, d_pre, [&](int64_t m) { return dots + m * P; });
  outer_sum<C>(a, grad->d_gb0, G, 1, d_pre, ones);
  outer_sum<C>(a, grad->d_gw1, L, G, d_logit, [&](int64_t m) { return f.activated + m * G; });
  outer_sum<C>(a, grad->d_gb1, L, 1, d_logit, ones);
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
void embed_grad(const AgAlignMixGrad* grad, const GradScratch<S>& f) {
  const AgAlignMix* a = &grad->forward;
  typedef Acc<S> C;
  int64_t H = a->hidden, size = grad->d_embed.dt == AG_BF16 ? 2 : grad->d_embed.dt == AG_F64 ? 8 : 4;
  parallel_range(a->vocab, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t v = lo; v < hi; v++) {
      int64_t begin = v ? f.start[v - 1] : 0, end = f.start[v];
      if (begin == end) {
        if (!grad->d_embed.accumulate) memset(static_cast<char*>(grad->d_embed.p) + v * H * size, 0, size_t(H * size));
        continue;
      }
      for (int64_t i0 = 0; i0 < H; i0 += kStripe) {
        int64_t n = min_of(kStripe, H - i0);
        C t[kStripe] = {};
        for (int64_t e = begin; e < end; e++) {
          int64_t what = f.entry[e];
          if (what < a->tokens)
            add_scaled(t, C(1), static_cast<const S*>(grad->d_out) + what * H + i0, n);
          else
            add_scaled(t, C(1), f.d_mean + (what - a->tokens) * H + i0, n);
        }
        put_grads(grad->d_embed, v * H + i0, t, n);
      }
    }
  });
}

// The projector's gradients are products with d_rows.
AgGemm weight_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  AgGemm g{};
  g.m = a->hidden, g.n = a->features, g.k = a->images * a->patches;
  g.a = d_rows, g.lda = a->hidden, g.trans_a = 1;
  g.b = a->x, g.ldb = a->features;
  g.c = grad->dw.p, g.ldc = a->features, g.accumulate = grad->dw.accumulate;
  g.dt = a->dt, g.dt_c = grad->dw.dt;
  return g;
}
AgGemm input_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  AgGemm g{};
  g.m = a->images * a->patches, g.n = a->features, g.k = a->hidden;
  g.a = d_rows, g.lda = a->hidden;
  g.b = a->w, g.ldb = a->features;
  g.c = grad->dx, g.ldc = a->features;
  g.dt = g.dt_c = a->dt;
  return g;
}
AgColSum bias_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  return AgColSum{grad->db, d_rows, a->images * a->patches, a->hidden, a->hidden, a->dt, 1.0, nullptr};
}

template <class S>
AgStatus projector_grads(AgCtx* ctx, const AgAlignMixGrad* grad, const GradScratch<S>& f) {
  AgCtx inner = *ctx;
  inner.workspace = static_cast<char*>(ctx->workspace) + f.used;
  inner.workspace_bytes = ctx->workspace_bytes - f.used;
  AgStatus status = AG_OK;
  if (grad->dw.p) {
    AgGemm g = weight_grad(grad, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status == AG_OK && grad->db.p) {
    AgColSum s = bias_grad(grad, f.d_rows);
    status = col_sum(&inner, &s);
  }
  if (status == AG_OK && grad->dx) {
    AgGemm g = input_grad(grad, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status != AG_OK) memcpy(ctx->error, inner.error, sizeof ctx->error);
  return status;
}

template <class S>
AgStatus backward(AgCtx* ctx, const AgAlignMixGrad* grad) {
  const AgAlignMix* a = &grad->forward;
  GradScratch<S> f(ctx->workspace, grad);
  bool gate = a->mode == AG_MIX_GATE;
  if (gate) parallel_for(a->images, [&](int64_t m) { gate_backward<S>(grad, f, m); });
  small_grads<S>(grad, f);
  if (wants_embed(grad)) {
    if (gate) mean_backward<S>(a, f);
    sort_entries<S>(a, f);
    embed_grad<S>(grad, f);
  }
  if (!has_projector(a) && grad->dx) rows_backward<S>(grad, f, static_cast<S*>(grad->dx));
  if (!wants_rows(grad)) return AG_OK;
  rows_backward<S>(grad, f, f.d_rows);
  return projector_grads<S>(ctx, grad, f);
}

template <class S>
int64_t backward_bytes(const AgAlignMixGrad* grad) {
  const AgAlignMix* a = &grad->forward;
  AgGemm w = weight_grad(grad, nullptr), x = input_grad(grad, nullptr);
  AgColSum b = bias_grad(grad, nullptr);
  int64_t inner = 0;
  if (has_projector(a)) {
    if (grad->dw.p) inner = max_of(inner, gemm_workspace(&w));
    if (grad->dx) inner = max_of(inner, gemm_workspace(&x));
    if (grad->db.p) inner = max_of(inner, col_sum_workspace(&b));
  }
  return GradScratch<S>(nullptr, grad).used + inner;
}

}  // namespace

int64_t align_mix_grad_workspace(const AgAlignMixGrad* grad) {
  AgDtype dt = grad->forward.dt;
  if (elsewhere(dt)) return other::align_mix_grad_workspace(grad);
  return with_here(dt, [&](auto tag) { return backward_bytes<typename decltype(tag)::type>(grad); });
}
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMixGrad* grad) {
  AgDtype dt = grad->forward.dt;
  if (elsewhere(dt)) return other::align_mix_grad(ctx, grad);
  return with_here(dt, [&](auto tag) { return backward<typename decltype(tag)::type>(ctx, grad); });
}

}  // namespace AG_LEVEL

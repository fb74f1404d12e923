// alignMix: last projector layer, mix of the alignment levels and splice in one kernel. The definition stands at
// AgAlignMix in backend.h; names below follow it.
#include "tile.h"

namespace AG_LEVEL {
namespace {

template <class C>
C gelu(C x) {
  return activate(AG_GELU, splat(x), Vec<C>{})[0];
}
template <class C>
C gelu_slope(C x) {
  return slope_of(AG_GELU, splat(x), Vec<C>{}, C())[0];
}

template <class S>
Acc<S> dot_mean(const S* row, const Acc<S>* mean, int64_t n) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += load(row + i) * load(mean + i);
    s1 += load(row + i + W) * load(mean + i + W);
  }
  for (; i < n; i += W) {
    int64_t k = min_of(W, n - i);
    s0 += load_n(row + i, k) * load_n(mean + i, k);
  }
  return lane_sum(s0 + s1);
}

// rows_m = x_m W^T + b, written to their places: one product per picture, whose rows are neighbours in the sequence.
AgGemm projection(const AgAlignMix* a, int64_t m, int64_t size) {
  AgGemm g{};
  g.m = a->patches;
  g.n = a->hidden;
  g.k = a->features;
  g.a = static_cast<const char*>(a->x) + m * a->patches * a->features * size;
  g.lda = a->features;
  g.b = a->w;
  g.ldb = a->features;
  g.trans_b = 1;
  g.bias = a->b;
  g.c = static_cast<char*>(a->out) + int64_t(a->image_row[m]) * a->hidden * size;
  g.ldc = a->hidden;
  g.dt = g.dt_c = a->dt;
  return g;
}

template <class S>
void text_mean(const AgAlignMix* a, int64_t m) {
  typedef Acc<S> C;
  C* mean = static_cast<C*>(a->mean) + m * a->hidden;
  int64_t from = a->gate_offsets[m], n = a->gate_offsets[m + 1] - from;
  for (int64_t i = 0; i < a->hidden; i++) mean[i] = 0;
  for (int64_t j = 0; j < n; j++) {
    const S* e = static_cast<const S*>(a->embed) + int64_t(a->gate_ids[from + j]) * a->hidden;
    for (int64_t i = 0; i < a->hidden; i++) mean[i] += C(to_acc(e[i]));
  }
  if (n)
    for (int64_t i = 0; i < a->hidden; i++) mean[i] /= C(n);
}

template <class S>
void gate_forward(const AgAlignMix* a, int64_t m) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches;
  const C* dots = static_cast<const C*>(a->dots) + m * P;
  C* pre = static_cast<C*>(a->gate_pre) + m * G;
  C* logits = static_cast<C*>(a->logits) + m * L;
  C* coef = static_cast<C*>(a->coef) + m * a->levels;
  for (int64_t g = 0; g < G; g++)
    pre[g] = dot_mean(static_cast<const S*>(a->gw0) + g * P, dots, P) + C(to_acc(static_cast<const S*>(a->gb0)[g]));
  C top = C(-INFINITY), total = 0;
  for (int64_t l = 0; l < L; l++) {
    C s = 0;
    for (int64_t g = 0; g < G; g++) s += C(to_acc(static_cast<const S*>(a->gw1)[l * G + g])) * gelu(pre[g]);
    logits[l] = s + C(to_acc(static_cast<const S*>(a->gb1)[l]));
    top = logits[l] > top ? logits[l] : top;
  }
  for (int64_t l = 0; l < L; l++) total += coef[l] = C(exp(double(logits[l] - top)));
  for (int64_t l = 0; l < L; l++) coef[l] /= total;
  coef[L] = C(a->global);
}

template <class S>
void mix_row(const AgAlignMix* a, int64_t m) {
  typedef Acc<S> C;
  C* coef = static_cast<C*>(a->coef) + m * a->levels;
  if (a->mode == AG_MIX_LEVEL)
    for (int64_t l = 0; l < a->levels; l++) coef[l] = l == a->level[m] ? C(1) : C(0);
  S* row = static_cast<S*>(a->out) + int64_t(a->align_row[m]) * a->hidden;
  for (int64_t i = 0; i < a->hidden; i++) {
    C s = 0;
    for (int64_t l = 0; l < a->levels; l++) s += coef[l] * C(to_acc(static_cast<const S*>(a->table)[l * a->hidden + i]));
    put(row + i, double(s));
  }
}

template <class S>
AgStatus forward(AgCtx* ctx, const AgAlignMix* a) {
  typedef Acc<S> C;
  int64_t H = a->hidden, P = a->patches;
  for (int64_t m = 0; m < a->images; m++) {
    if (a->w) {
      AgGemm g = projection(a, m, sizeof(S));
      AgStatus s = gemm(ctx, &g);
      if (s != AG_OK) return s;
    } else {
      memcpy(static_cast<S*>(a->out) + int64_t(a->image_row[m]) * H, static_cast<const S*>(a->x) + m * P * H,
             size_t(P * H) * sizeof(S));
    }
    if (a->mode != AG_MIX_GATE) continue;
    text_mean<S>(a, m);  // the picture's rows are still in cache
    parallel_range(P, row_grain(H), [&](int64_t lo, int64_t hi) {
      for (int64_t p = lo; p < hi; p++)
        static_cast<C*>(a->dots)[m * P + p] =
            dot_mean(static_cast<const S*>(a->out) + (a->image_row[m] + p) * H, static_cast<const C*>(a->mean) + m * H, H);
    });
  }
  parallel_for(a->images, [&](int64_t m) {
    if (a->mode == AG_MIX_GATE) gate_forward<S>(a, m);
    mix_row<S>(a, m);
  });
  parallel_range(a->tokens, row_grain(H), [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; t++)
      if (a->token[t] >= 0)
        memcpy(static_cast<S*>(a->out) + t * H, static_cast<const S*>(a->embed) + int64_t(a->token[t]) * H, size_t(H) * sizeof(S));
  });
  return AG_OK;
}

// ---- gradient ---------------------------------------------------------------------------------------
template <class C>
struct GradScratch {
  C *d_coef, *d_logits, *d_pre, *d_dots, *d_mean, *sum;
  char *d_rows, *inner;
  static int64_t bytes(const AgAlignMix* a, int64_t size) {
    return arena_bytes(a->images * a->levels, sizeof(C)) * 2 + arena_bytes(a->images * a->gate_hidden, sizeof(C)) +
           arena_bytes(a->images * a->patches, sizeof(C)) + arena_bytes(a->images * a->hidden, sizeof(C)) +
           arena_bytes(a->hidden, sizeof(C)) + arena_bytes(a->images * a->patches * a->hidden, size);
  }
  GradScratch(void* base, const AgAlignMix* a, int64_t size) {
    Arena arena(base);
    d_coef = arena.take<C>(a->images * a->levels);
    d_logits = arena.take<C>(a->images * a->levels);
    d_pre = arena.take<C>(a->images * a->gate_hidden);
    d_dots = arena.take<C>(a->images * a->patches);
    d_mean = arena.take<C>(a->images * a->hidden);
    sum = arena.take<C>(a->hidden);
    d_rows = arena.take<char>(a->images * a->patches * a->hidden * size);
    inner = arena.p;  // scratch of the products
  }
};

// From the gradient of the ALIGN row back to the dot products.
template <class S>
void gate_backward(const AgAlignMix* a, const GradScratch<Acc<S>>& f, int64_t m) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  const S* d_align = static_cast<const S*>(a->d_out) + int64_t(a->align_row[m]) * H;
  const C *coef = static_cast<const C*>(a->coef) + m * a->levels, *pre = static_cast<const C*>(a->gate_pre) + m * G;
  C *d_coef = f.d_coef + m * a->levels, *d_logits = f.d_logits + m * a->levels, *d_pre = f.d_pre + m * G;
  C dot = 0;
  for (int64_t l = 0; l < L; l++) {
    C s = 0;
    for (int64_t i = 0; i < H; i++) s += C(to_acc(d_align[i])) * C(to_acc(static_cast<const S*>(a->table)[l * H + i]));
    d_coef[l] = s;
    dot += s * coef[l];
  }
  for (int64_t l = 0; l < L; l++) d_logits[l] = coef[l] * (d_coef[l] - dot);
  for (int64_t g = 0; g < G; g++) {
    C s = 0;
    for (int64_t l = 0; l < L; l++) s += d_logits[l] * C(to_acc(static_cast<const S*>(a->gw1)[l * G + g]));
    d_pre[g] = s * gelu_slope(pre[g]);
  }
  C* d_dots = f.d_dots + m * P;
  for (int64_t p = 0; p < P; p++) d_dots[p] = 0;
  for (int64_t g = 0; g < G; g++)
    for (int64_t p = 0; p < P; p++) d_dots[p] += d_pre[g] * C(to_acc(static_cast<const S*>(a->gw0)[g * P + p]));
}

// d_rows = d_out rows + d_dots (outer) mean; d_mean = sum_p d_dots[p] rows[p].
template <class S>
void rows_backward(const AgAlignMix* a, const GradScratch<Acc<S>>& f) {
  typedef Acc<S> C;
  int64_t P = a->patches, H = a->hidden;
  bool gate = a->mode == AG_MIX_GATE;
  parallel_range(a->images * P, row_grain(H), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      int64_t m = r / P, p = r % P;
      const S* d = static_cast<const S*>(a->d_out) + (a->image_row[m] + p) * H;
      S* to = reinterpret_cast<S*>(f.d_rows) + r * H;
      if (!gate) {
        memcpy(to, d, size_t(H) * sizeof(S));
        continue;
      }
      C by = f.d_dots[r];
      const C* mean = static_cast<const C*>(a->mean) + m * H;
      for (int64_t i = 0; i < H; i++) put(to + i, double(C(to_acc(d[i])) + by * mean[i]));
    }
  });
  if (!gate || !a->d_embed.p) return;
  constexpr int64_t stripe = 64;
  parallel_for(a->images * div_up(H, stripe), [&](int64_t task) {
    int64_t m = task / div_up(H, stripe), i0 = task % div_up(H, stripe) * stripe, i1 = min_of(H, i0 + stripe);
    C* d_mean = f.d_mean + m * H;
    for (int64_t i = i0; i < i1; i++) d_mean[i] = 0;
    for (int64_t p = 0; p < P; p++) {
      const S* row = static_cast<const S*>(a->out) + (a->image_row[m] + p) * H;
      for (int64_t i = i0; i < i1; i++) d_mean[i] += f.d_dots[m * P + p] * C(to_acc(row[i]));
    }
  });
}

// The small parameters: table and gate. Sums run over the pictures in order.
template <class S>
void small_grads(const AgAlignMix* a, const GradScratch<Acc<S>>& f) {
  typedef Acc<S> C;
  int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, H = a->hidden;
  if (a->d_table.p)
    for (int64_t l = 0; l < a->levels; l++)
      for (int64_t i = 0; i < H; i++) {
        C s = 0;
        for (int64_t m = 0; m < a->images; m++)
          s += static_cast<const C*>(a->coef)[m * a->levels + l] * C(to_acc(static_cast<const S*>(a->d_out)[int64_t(a->align_row[m]) * H + i]));
        grad_put(a->d_table, l * H + i, double(s));
      }
  if (a->mode != AG_MIX_GATE) return;
  const C *dots = static_cast<const C*>(a->dots), *pre = static_cast<const C*>(a->gate_pre);
  auto outer = [&](const AgGrad& to, int64_t rows, int64_t cols, auto left, auto right) {
    if (!to.p) return;
    parallel_range(rows, row_grain(cols * max_of(a->images, 1)), [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++)
        for (int64_t c = 0; c < cols; c++) {
          C s = 0;
          for (int64_t m = 0; m < a->images; m++) s += left(m, r) * right(m, c);
          grad_put(to, r * cols + c, double(s));
        }
    });
  };
  auto one = [](int64_t, int64_t) { return C(1); };
  auto d_pre = [&](int64_t m, int64_t g) { return f.d_pre[m * G + g]; };
  auto d_logit = [&](int64_t m, int64_t l) { return f.d_logits[m * a->levels + l]; };
  outer(a->d_gw0, G, P, d_pre, [&](int64_t m, int64_t p) { return dots[m * P + p]; });
  outer(a->d_gb0, G, 1, d_pre, one);
  outer(a->d_gw1, L, G, d_logit, [&](int64_t m, int64_t g) { return gelu(pre[m * G + g]); });
  outer(a->d_gb1, L, 1, d_logit, one);
}

// Token rows, then the text means' share, each in order of the sequence; columns are shared out.
template <class S, class D>
void embed_grad(const AgAlignMix* a, const GradScratch<Acc<S>>& f) {
  int64_t H = a->hidden;
  constexpr int64_t stripe = 64;
  D* to = static_cast<D*>(a->d_embed.p);
  parallel_for(div_up(H, stripe), [&](int64_t task) {
    int64_t i0 = task * stripe, i1 = min_of(H, i0 + stripe);
    if (!a->d_embed.accumulate)
      for (int64_t v = 0; v < a->vocab; v++) memset(to + v * H + i0, 0, size_t(i1 - i0) * sizeof(D));
    for (int64_t t = 0; t < a->tokens; t++) {
      if (a->token[t] < 0) continue;
      D* row = to + int64_t(a->token[t]) * H;
      const S* d = static_cast<const S*>(a->d_out) + t * H;
      for (int64_t i = i0; i < i1; i++) put(row + i, double(to_acc(row[i])) + double(to_acc(d[i])));
    }
    if (a->mode != AG_MIX_GATE) return;
    for (int64_t m = 0; m < a->images; m++) {
      int64_t from = a->gate_offsets[m], n = a->gate_offsets[m + 1] - from;
      for (int64_t j = 0; j < n; j++) {
        D* row = to + int64_t(a->gate_ids[from + j]) * H;
        for (int64_t i = i0; i < i1; i++) put(row + i, double(to_acc(row[i])) + double(f.d_mean[m * H + i]) / double(n));
      }
    }
  });
}

// Products of the projector's gradients.
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
  return AgColSum{a->db, d_rows, a->images * a->patches, a->hidden, a->hidden, a->dt, 1.0};
}

template <class S>
AgStatus backward(AgCtx* ctx, const AgAlignMix* a) {
  typedef Acc<S> C;
  GradScratch<C> f(ctx->workspace, a, sizeof(S));
  if (a->mode == AG_MIX_GATE) parallel_for(a->images, [&](int64_t m) { gate_backward<S>(a, f, m); });
  rows_backward<S>(a, f);
  small_grads<S>(a, f);
  if (a->d_embed.p) {
    if (a->d_embed.dt == AG_F32) embed_grad<S, float>(a, f);
    else if (a->d_embed.dt == AG_F64) embed_grad<S, double>(a, f);
    else embed_grad<S, bf16>(a, f);
  }
  AgCtx inner = *ctx;
  inner.workspace = f.inner;
  inner.workspace_bytes = ctx->workspace_bytes - (f.inner - static_cast<char*>(ctx->workspace));
  AgStatus status = AG_OK;
  if (a->w && a->dw.p) {
    AgGemm g = weight_grad(a, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status == AG_OK && a->w && a->db.p) {
    AgColSum s = bias_grad(a, f.d_rows);
    status = col_sum(&inner, &s);
  }
  if (status == AG_OK && a->dx && a->w) {
    AgGemm g = input_grad(a, f.d_rows);
    status = gemm(&inner, &g);
  }
  if (status == AG_OK && a->dx && !a->w) memcpy(a->dx, f.d_rows, size_t(a->images * a->patches * a->hidden) * sizeof(S));
  memcpy(ctx->error, inner.error, sizeof ctx->error);
  return status;
}

}  // namespace

int64_t align_mix_workspace(const AgAlignMix* a) {
  if (!a->w || !a->images) return 0;
  AgGemm g{};
  g.m = a->patches, g.n = a->hidden, g.k = a->features;
  g.b = a->w, g.trans_b = 1, g.dt = g.dt_c = a->dt;
  return gemm_workspace(&g);
}
AgStatus align_mix(AgCtx* ctx, const AgAlignMix* a) {
  AgStatus status = AG_OK;
  AgStatus known = with_float(ctx, "align_mix", a->dt, [&](auto tag) { status = forward<typename decltype(tag)::type>(ctx, a); });
  return known != AG_OK ? known : status;
}

int64_t align_mix_grad_workspace(const AgAlignMix* a) {
  int64_t size = a->dt == AG_BF16 ? 2 : a->dt == AG_F64 ? 8 : 4, inner = 0;
  AgGemm w = weight_grad(a, nullptr), x = input_grad(a, nullptr);
  AgColSum b = bias_grad(a, nullptr);
  if (a->w && a->dw.p) inner = max_of(inner, gemm_workspace(&w));
  if (a->w && a->dx) inner = max_of(inner, gemm_workspace(&x));
  if (a->w && a->db.p) inner = max_of(inner, col_sum_workspace(&b));
  return (a->dt == AG_F64 ? GradScratch<double>::bytes(a, size) : GradScratch<float>::bytes(a, size)) + inner + 64;
}
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMix* a) {
  AgStatus status = AG_OK;
  AgStatus known = with_float(ctx, "align_mix_grad", a->dt, [&](auto tag) { status = backward<typename decltype(tag)::type>(ctx, a); });
  return known != AG_OK ? known : status;
}

}  // namespace AG_LEVEL

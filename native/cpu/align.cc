// alignMix: last projector layer, mix of the alignment levels and splice in one kernel. The definition stands at
// AgAlignMix in arguments.h; names below follow it.
#include "align.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kGroupRows = 512;  // pictures are projected together until there are so many rows

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

}  // namespace

int64_t align_mix_workspace(const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix_workspace(a);
  return with_here(a->dt, [&](auto tag) { return forward_bytes<typename decltype(tag)::type>(a); });
}
AgStatus align_mix(AgCtx* ctx, const AgAlignMix* a) {
  if (elsewhere(a->dt)) return other::align_mix(ctx, a);
  return with_here(a->dt, [&](auto tag) { return forward<typename decltype(tag)::type>(ctx, a); });
}

}  // namespace AG_LEVEL

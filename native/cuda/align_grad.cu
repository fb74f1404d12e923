// The gradient of alignMix (AgAlignMixGrad in arguments.h; names follow it).
#include "activation.h"
#include "align.h"
#include "rows.h"

namespace gpu {
namespace {

struct GateGrad {
  const void *d_out, *table, *w0, *w1;
  const float *coef, *pre;
  float *d_logits, *d_pre, *activated, *d_dots;
  const int32_t* align_row;
  int64_t hidden, gate_hidden, patches, locals;
};
// One block for each picture: from the gradient of the ALIGN row back to the dot products.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) gate_grad(GateGrad g) {
  SMEM(raw);
  float *d_coef = reinterpret_cast<float*>(raw), *d_logits = d_coef + g.locals, *d_pre = d_logits + g.locals;
  const int64_t m = blockIdx.x, warp = threadIdx.x / 32;
  const float* coef = g.coef + m * (g.locals + 1);
  const T* d_align = static_cast<const T*>(g.d_out) + g.align_row[m] * g.hidden;
  for (int64_t l = warp; l < g.locals; l += kWarps) {
    const float x = warp_dot<W>(d_align, static_cast<const T*>(g.table) + l * g.hidden, g.hidden);
    if (threadIdx.x % 32 == 0) d_coef[l] = x;
  }
  __syncthreads();
  float inner = 0;
  for (int64_t l = 0; l < g.locals; l++) inner += d_coef[l] * coef[l];
  for (int64_t l = threadIdx.x; l < g.locals; l += kThreads)
    g.d_logits[m * g.locals + l] = d_logits[l] = coef[l] * (d_coef[l] - inner);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < g.gate_hidden; j += kThreads) {
    float sum = 0;
    for (int64_t l = 0; l < g.locals; l++)
      sum += d_logits[l] * to_float(static_cast<const T*>(g.w1)[l * g.gate_hidden + j]);
    const float x = g.pre[m * g.gate_hidden + j];
    g.d_pre[m * g.gate_hidden + j] = d_pre[j] = sum * gelu_slope(x);
    g.activated[m * g.gate_hidden + j] = activate(AG_GELU, x);
  }
  __syncthreads();
  for (int64_t p = threadIdx.x; p < g.patches; p += kThreads) {
    float sum = 0;
    for (int64_t j = 0; j < g.gate_hidden; j++)
      sum += d_pre[j] * to_float(static_cast<const T*>(g.w0)[j * g.patches + p]);
    g.d_dots[m * g.patches + p] = sum;
  }
}

// d_rows = d_out rows + d_dots (outer) mean; without a gate the first alone
template <int W, class T>
__global__ void __launch_bounds__(kThreads) rows_grad(T* d_rows, const T* d_out, const float* d_dots, const float* mean,
                                                      Places places, int64_t rows, int64_t hidden) {
  const int64_t units = hidden / W;
  for (int64_t i = grid_thread(); i < rows * units; i += grid_threads()) {
    const Split at = split(i, units);
    const int64_t c = at.rest * W;
    float x[W], y[W] = {};
    load_lanes<W>(x, d_out + places.of(at.quotient) * hidden + c);
    if (d_dots) load_lanes<W>(y, mean + split(at.quotient, places.patches).quotient * hidden + c);
    const float by = d_dots ? d_dots[at.quotient] : 0;
#pragma unroll
    for (int k = 0; k < W; k++) x[k] += by * y[k];
    store_lanes<W>(d_rows + i * W, x);
  }
}

// What each text token of a picture gets through the mean: sum_p d_dots[p] rows[p], divided by their number.
template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    mean_grad(float* d_mean, const float* d_dots, const T* out, Places places, const int32_t* offsets, int64_t hidden) {
  const int64_t m = blockIdx.y, c = column<W>();
  if (c >= hidden) return;
  const int64_t n = offsets[m + 1] - offsets[m];
  const T* row = out + places.image_row[m] * hidden + c;
  float sum[W] = {};
#pragma unroll 4
  for (int64_t p = 0; p < places.patches; p++) {
    const float by = d_dots[m * places.patches + p];
    float x[W];
    load_lanes<W>(x, row + p * hidden);
#pragma unroll
    for (int k = 0; k < W; k++) sum[k] += by * x[k];
  }
#pragma unroll
  for (int k = 0; k < W; k++) sum[k] /= n > 0 ? float(n) : 1;
  store_lanes<W>(d_mean + m * hidden + c, sum);
}

// to[r, c] = sum over the pictures, in order, of left[m, r] * right(m)[c]; right is one where there is none.
template <class R>
struct Outer {
  GradTarget to;
  const float* left;
  int64_t ld_left;
  const R* right;
  int64_t ld_right;
  const int32_t* right_row;  // of picture m; NULL: m
  int64_t images, rows, cols;
};
template <class R>
__global__ void __launch_bounds__(kThreads) outer_sum(Outer<R> o) {
  for (int64_t i = grid_thread(); i < o.rows * o.cols; i += grid_threads()) {
    const Split at = split(i, o.cols);
    float sum = 0;
    for (int64_t m = 0; m < o.images; m++) {
      const int64_t row = o.right_row ? o.right_row[m] : m;
      sum += o.left[m * o.ld_left + at.quotient] * (o.right ? to_float(o.right[row * o.ld_right + at.rest]) : 1);
    }
    grad_put(o.to, i, sum);
  }
}
template <class R>
AgStatus sum_outer(AgCtx* ctx, const AgGrad& to, Outer<R> o) {
  if (!to.p) return AG_OK;
  o.to = grad_target(to);
  return launch(ctx, "align_mix_grad", outer_sum<R>, grid_for(o.rows * o.cols, kThreads), kThreads, 0, o);
}

// What adds to the embedding table: the tokens of the sequence, then the text tokens of the means.
__global__ void __launch_bounds__(kThreads)
    list_entries(int32_t* index, const int32_t* token, int64_t tokens, const int32_t* gate_ids, int64_t entries) {
  for (int64_t i = grid_thread(); i < tokens + entries; i += grid_threads())
    index[i] = i < tokens ? token[i] : gate_ids[i - tokens];
}
struct Entries {
  const uint64_t* keys;
  int64_t n, tokens;
  const int32_t* offsets;
  int64_t images;
  // The picture an entry behind the tokens belongs to: the last that does not begin behind it.
  __device__ int64_t picture(int64_t entry) const {
    int64_t low = 0, high = images;
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (offsets[mid] <= entry - tokens ? low : high) = mid;
    }
    return low;
  }
};
// One block for each sorted entry and tile of columns; the first of a table's row sums them all, in order, and rounds
// once.
template <int W, class T, class D>
__global__ void __launch_bounds__(kThreads)
    embed_grad(D* to, const T* d_out, const float* d_mean, Entries e, int64_t hidden, bool accumulate) {
  const int64_t at = blockIdx.x, row = key_row(e.keys[at]), c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * W;
  if (row < 0 || c >= hidden || (at && key_row(e.keys[at - 1]) == row)) return;
  float sum[W] = {}, x[W];
  for (int64_t i = at; i < e.n && key_row(e.keys[i]) == row; i++) {
    const int64_t source = key_source(e.keys[i]);
    if (source < e.tokens)
      load_lanes<W>(x, d_out + source * hidden + c);
    else
      load_lanes<W>(x, d_mean + e.picture(source) * hidden + c);
#pragma unroll
    for (int k = 0; k < W; k++) sum[k] += x[k];
  }
  if (accumulate) {
    load_lanes<W>(x, to + row * hidden + c);
#pragma unroll
    for (int k = 0; k < W; k++) sum[k] += x[k];
  }
  store_lanes<W>(to + row * hidden + c, sum);
}

bool wants_rows(const AgAlignMixGrad* grad) { return grad->forward.w && (grad->dw.p || grad->db.p || grad->dx); }
int64_t entries(const AgAlignMix* a) { return a->tokens + (is_gate(a) ? a->gate_entries : 0); }

struct Scratch {
  float *d_logits, *d_pre, *activated, *d_dots, *d_mean;
  char* d_rows;
  int32_t* index;
  int64_t used;
  Scratch(void* base, const AgAlignMixGrad* grad) {
    const AgAlignMix* a = &grad->forward;
    Arena arena{static_cast<char*>(base)};
    const int64_t gate = is_gate(a) ? a->images : 0;
    d_logits = arena.take<float>(gate * a->levels);
    d_pre = arena.take<float>(gate * a->gate_hidden);
    activated = arena.take<float>(gate * a->gate_hidden);
    d_dots = arena.take<float>(gate * a->patches);
    d_mean = arena.take<float>(grad->d_embed.p ? gate * a->hidden : 0);
    d_rows = arena.take<char>(wants_rows(grad) ? image_rows(a) * a->hidden * (a->dt == AG_BF16 ? 2 : 4) : 0);
    index = arena.take<int32_t>(grad->d_embed.p ? entries(a) : 0);
    used = arena.used;
  }
};

template <class T>
AgStatus small_grads(AgCtx* ctx, const AgAlignMixGrad* grad, const Scratch& f) {
  const AgAlignMix* a = &grad->forward;
  const int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, M = a->images;
  const float *coef = static_cast<const float*>(a->coef), *dots = static_cast<const float*>(a->dots);
  const Outer<T> table{{}, coef,      a->levels, static_cast<const T*>(grad->d_out), a->hidden, a->align_row,
                       M,  a->levels, a->hidden};
  AgStatus s = sum_outer(ctx, grad->d_table, table);
  if (!is_gate(a)) return s;
  if (s == AG_OK) s = sum_outer(ctx, grad->d_gw0, Outer<float>{{}, f.d_pre, G, dots, P, nullptr, M, G, P});
  if (s == AG_OK) s = sum_outer(ctx, grad->d_gb0, Outer<float>{{}, f.d_pre, G, nullptr, 0, nullptr, M, G, 1});
  if (s == AG_OK) s = sum_outer(ctx, grad->d_gw1, Outer<float>{{}, f.d_logits, L, f.activated, G, nullptr, M, L, G});
  if (s == AG_OK) s = sum_outer(ctx, grad->d_gb1, Outer<float>{{}, f.d_logits, L, nullptr, 0, nullptr, M, L, 1});
  return s;
}

template <class T, int W>
AgStatus table_of_tokens(AgCtx* ctx, const AgAlignMixGrad* grad, const Scratch& f) {
  const AgAlignMix* a = &grad->forward;
  const int64_t n = entries(a);
  if (!grad->d_embed.accumulate) {
    const AgFill zero{grad->d_embed.p, grad->d_embed.dt, a->vocab * a->hidden, 0.0};
    if (AgStatus s = fill(ctx, &zero)) return s;
  }
  if (n == 0) return AG_OK;
  AgStatus s = launch(ctx, "align_mix_grad", list_entries, grid_for(n, kThreads), kThreads, 0, f.index, a->token,
                      a->tokens, a->gate_ids, n - a->tokens);
  AgCtx inner = behind(ctx, f.used);
  const uint64_t* keys = nullptr;
  if (s == AG_OK) s = sort_rows(&inner, "align_mix_grad", f.index, n, &keys);
  if (s != AG_OK) return memcpy(ctx->error, inner.error, sizeof ctx->error), s;
  const Entries e{keys, n, a->tokens, a->gate_offsets, a->images};
  const dim3 grid(unsigned(n), unsigned(div_up(a->hidden, kThreads * W)));
  return with_float(ctx, "align_mix_grad", grad->d_embed.dt, [&](auto tag) {
    typedef typename decltype(tag)::type D;
    return launch(ctx, "align_mix_grad", embed_grad<W, T, D>, grid, kThreads, 0, static_cast<D*>(grad->d_embed.p),
                  static_cast<const T*>(grad->d_out), f.d_mean, e, a->hidden, grad->d_embed.accumulate != 0);
  });
}

// The projector's gradients are products with d_rows.
AgGemm weight_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  AgGemm g{};
  g.m = a->hidden, g.n = a->features, g.k = image_rows(a);
  g.a = d_rows, g.lda = a->hidden, g.trans_a = 1;
  g.b = a->x, g.ldb = a->features;
  g.c = grad->dw.p, g.ldc = a->features, g.accumulate = grad->dw.accumulate;
  g.dt = a->dt, g.dt_c = grad->dw.dt;
  return g;
}
AgGemm input_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  AgGemm g{};
  g.m = image_rows(a), g.n = a->features, g.k = a->hidden;
  g.a = d_rows, g.lda = a->hidden;
  g.b = a->w, g.ldb = a->features;
  g.c = grad->dx, g.ldc = a->features;
  g.dt = g.dt_c = a->dt;
  return g;
}
AgColSum bias_grad(const AgAlignMixGrad* grad, const void* d_rows) {
  const AgAlignMix* a = &grad->forward;
  return AgColSum{grad->db, d_rows, image_rows(a), a->hidden, a->hidden, a->dt, 1.0, nullptr};
}

template <class T, int W>
AgStatus rows_and_projector(AgCtx* ctx, const AgAlignMixGrad* grad, const Scratch& f) {
  const AgAlignMix* a = &grad->forward;
  T* d_rows = a->w ? reinterpret_cast<T*>(f.d_rows) : static_cast<T*>(grad->dx);
  const int64_t rows = image_rows(a);
  AgStatus s = launch(ctx, "align_mix_grad", rows_grad<W, T>, grid_for(rows * a->hidden / W, kThreads), kThreads, 0,
                      d_rows, static_cast<const T*>(grad->d_out), is_gate(a) ? f.d_dots : nullptr,
                      static_cast<const float*>(a->mean), places_of(a), rows, a->hidden);
  if (!a->w) return s;
  if (s == AG_OK && grad->dw.p) s = call(ctx, f.used, gemm, weight_grad(grad, d_rows));
  if (s == AG_OK && grad->db.p) s = call(ctx, f.used, col_sum, bias_grad(grad, d_rows));
  if (s == AG_OK && grad->dx) s = call(ctx, f.used, gemm, input_grad(grad, d_rows));
  return s;
}

template <class T, int W>
AgStatus backward(AgCtx* ctx, const AgAlignMixGrad* grad) {
  const AgAlignMix* a = &grad->forward;
  const Scratch f(ctx->workspace, grad);
  AgStatus s = AG_OK;
  if (is_gate(a)) {
    const GateGrad g{grad->d_out,
                     a->table,
                     a->gw0,
                     a->gw1,
                     static_cast<const float*>(a->coef),
                     static_cast<const float*>(a->gate_pre),
                     f.d_logits,
                     f.d_pre,
                     f.activated,
                     f.d_dots,
                     a->align_row,
                     a->hidden,
                     a->gate_hidden,
                     a->patches,
                     a->levels - 1};
    const size_t bytes = size_t(2 * a->levels + a->gate_hidden) * sizeof(float);
    s = launch(ctx, "align_mix_grad", gate_grad<T, W>, dim3(unsigned(a->images)), kThreads, bytes, g);
    constexpr int V = W > 1 ? 2 : 1;  // narrow: the pictures of a batch are few, and threads are wanted
    if (s == AG_OK && grad->d_embed.p)
      s = launch(ctx, "align_mix_grad", mean_grad<V, T>, columns(a->hidden, V, a->images), kThreads, 0, f.d_mean,
                 f.d_dots, static_cast<const T*>(a->out), places_of(a), a->gate_offsets, a->hidden);
  }
  if (s == AG_OK) s = small_grads<T>(ctx, grad, f);
  if (s == AG_OK && grad->d_embed.p) s = table_of_tokens<T, W>(ctx, grad, f);
  if (s == AG_OK && (wants_rows(grad) || (!a->w && grad->dx))) s = rows_and_projector<T, W>(ctx, grad, f);
  return s;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t align_mix_grad_workspace(const AgAlignMixGrad* grad) {
  const AgAlignMix* a = &grad->forward;
  int64_t inner = grad->d_embed.p ? sort_workspace(entries(a)) : 0;
  const AgGemm w = weight_grad(grad, nullptr), x = input_grad(grad, nullptr);
  const AgColSum b = bias_grad(grad, nullptr);
  if (a->w && grad->dw.p) inner = most(inner, gemm_workspace(&w));
  if (a->w && grad->dx) inner = most(inner, gemm_workspace(&x));
  if (a->w && grad->db.p) inner = most(inner, col_sum_workspace(&b));
  return Scratch(nullptr, grad).used + inner;
}
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMixGrad* grad) {
  const AgAlignMix* a = &grad->forward;
  return with_float(ctx, "align_mix_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const bool vector = vectors(a) && aligned16(grad->d_out) && aligned16(grad->dx) && aligned16(grad->d_embed.p);
    return with_width<T>(vector, [&](auto width) { return backward<T, decltype(width)::value>(ctx, grad); });
  });
}

}  // namespace gpu

// alignMix: the last projector layer, the mix of the alignment levels and the splice into the packed sequence (AgAlignMix in
// backend.h; names follow it). The projector's product writes image rows straight to their places and, in bf16, takes their dot
// products with the text while they are in registers. What belongs where is in device
// memory, so launches depend on sizes alone.
#include "activation.h"
#include "rows.h"

namespace gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Pieces of scratch at multiples of 256 bytes; without memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += div_up(n * int64_t(sizeof(T)), 256) * 256;
    return p;
  }
};
// The same call with what is left of the scratch.
AgCtx behind(const AgCtx* ctx, int64_t used) {
  AgCtx inner = *ctx;
  inner.workspace = static_cast<char*>(ctx->workspace) + used;
  inner.workspace_bytes = ctx->workspace_bytes - used;
  return inner;
}
template <class Args>
AgStatus call(AgCtx* ctx, int64_t used, AgStatus (*op)(AgCtx*, const Args*), const Args& args) {
  AgCtx inner = behind(ctx, used);
  const AgStatus status = op(&inner, &args);
  if (status != AG_OK) memcpy(ctx->error, inner.error, sizeof ctx->error);
  return status;
}

// A grid of a column for each thread, W of them, and `rows` in y.
dim3 columns(int64_t cols, int width, int64_t rows) { return dim3(unsigned(div_up(cols, kThreads * width)), unsigned(rows)); }
template <int W>
__device__ __forceinline__ int64_t column() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
}

// Where image rows belong, as rows of the sequence.
struct Places {
  const int32_t* image_row;
  int64_t patches;
  __device__ int64_t of(int64_t r) const {
    const Split at = split(r, patches);
    return image_row[at.quotient] + at.rest;
  }
};

// One warp's dot product; every lane gets it.
template <int W, class A, class B>
__device__ __forceinline__ float warp_dot(const A* a, const B* b, int64_t n) {
  float sum = 0;
  for (int64_t i = int64_t(threadIdx.x % 32) * W; i < n; i += 32 * W) {
    float x[W], y[W];
    load_lanes<W>(x, a + i);
    load_lanes<W>(y, b + i);
#pragma unroll
    for (int j = 0; j < W; j++) sum += x[j] * y[j];
  }
  return warp_reduce<Add>(sum);
}

// ---- forward ----------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) list_places(int32_t* to, Places places, int64_t rows) {
  for (int64_t r = grid_thread(); r < rows; r += grid_threads()) to[r] = int32_t(places.of(r));
}

template <class U>
__global__ void __launch_bounds__(kThreads) place_rows(U* out, const U* x, Places places, int64_t rows, int64_t units) {
  for (int64_t i = grid_thread(); i < rows * units; i += grid_threads()) {
    const Split at = split(i, units);
    out[places.of(at.quotient) * units + at.rest] = x[i];
  }
}

template <class U>
__global__ void __launch_bounds__(kThreads) token_rows(U* out, const U* embed, const int32_t* token, int64_t tokens, int64_t units) {
  for (int64_t i = grid_thread(); i < tokens * units; i += grid_threads()) {
    const Split at = split(i, units);
    const int32_t id = token[at.quotient];
    if (id >= 0) out[i] = embed[id * units + at.rest];
  }
}

template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    text_means(float* mean, const T* embed, const int32_t* ids, const int32_t* offsets, int64_t hidden) {
  const int64_t m = blockIdx.y, c = column<W>();
  if (c >= hidden) return;
  const int64_t from = offsets[m], n = offsets[m + 1] - from;
  float sum[W] = {};
  for (int64_t j = 0; j < n; j++) {
    float x[W];
    load_lanes<W>(x, embed + ids[from + j] * hidden + c);
#pragma unroll
    for (int k = 0; k < W; k++) sum[k] += x[k];
  }
#pragma unroll
  for (int k = 0; k < W; k++) sum[k] /= n > 0 ? float(n) : 1;
  store_lanes<W>(mean + m * hidden + c, sum);
}

template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    row_dots(float* dots, const T* out, const float* mean, Places places, int64_t rows, int64_t hidden) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, mine = r < rows ? r : rows - 1;
  const float x = warp_dot<W>(out + places.of(mine) * hidden, mean + mine / places.patches * hidden, hidden);
  if (threadIdx.x % 32 == 0 && r < rows) dots[r] = x;
}

// The dot products from what the product has left of each.
__global__ void __launch_bounds__(kThreads) add_parts(float* dots, const float* parts, int64_t count, int64_t rows) {
  for (int64_t r = grid_thread(); r < rows; r += grid_threads()) {
    float sum = 0;
    for (int64_t t = 0; t < count; t++) sum += parts[t * rows + r];
    dots[r] = sum;
  }
}

// What the gate reads and leaves behind.
struct Gate {
  const void *w0, *b0, *w1, *b1;
  const float* dots;
  float *pre, *logits, *coef;
  int64_t hidden, patches, locals;  // gate_hidden, patches, levels - 1
  float global;
};
// One block for each picture.
template <class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(Gate g) {
  SMEM(raw);
  float *dots = reinterpret_cast<float*>(raw), *activated = dots + g.patches, *logits = activated + g.hidden;
  const int64_t m = blockIdx.x, warp = threadIdx.x / 32, levels = g.locals + 1;
  const bool first = threadIdx.x % 32 == 0;
  for (int64_t p = threadIdx.x; p < g.patches; p += kThreads) dots[p] = g.dots[m * g.patches + p];
  __syncthreads();
  for (int64_t j = warp; j < g.hidden; j += kWarps) {
    const float x = warp_dot<1>(static_cast<const T*>(g.w0) + j * g.patches, dots, g.patches) + to_float(static_cast<const T*>(g.b0)[j]);
    if (first) g.pre[m * g.hidden + j] = x;
    if (first) activated[j] = activate(AG_GELU, x);
  }
  __syncthreads();
  for (int64_t l = warp; l < g.locals; l += kWarps) {
    const float x = warp_dot<1>(static_cast<const T*>(g.w1) + l * g.hidden, activated, g.hidden) + to_float(static_cast<const T*>(g.b1)[l]);
    if (first) g.logits[m * g.locals + l] = logits[l] = x;
  }
  __syncthreads();
  float top = -INFINITY, total = 0;
  for (int64_t l = 0; l < g.locals; l++) top = Max::of(top, logits[l]);
  for (int64_t l = 0; l < g.locals; l++) total += expf(logits[l] - top);
  for (int64_t l = threadIdx.x; l < g.locals; l += kThreads) g.coef[m * levels + l] = expf(logits[l] - top) / total;
  if (threadIdx.x == 0) g.coef[m * levels + g.locals] = g.global;
}

__global__ void __launch_bounds__(kThreads) one_hot(float* coef, const int32_t* level, int64_t images, int64_t levels) {
  for (int64_t i = grid_thread(); i < images * levels; i += grid_threads()) coef[i] = i % levels == level[i / levels];
}

template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    mix_rows(T* out, const float* coef, const T* table, const int32_t* align_row, int64_t levels, int64_t hidden) {
  const int64_t m = blockIdx.y, c = column<W>();
  if (c >= hidden) return;
  float sum[W] = {};
  for (int64_t l = 0; l < levels; l++) {
    const float by = coef[m * levels + l];
    float x[W];
    load_lanes<W>(x, table + l * hidden + c);
#pragma unroll
    for (int k = 0; k < W; k++) sum[k] += by * x[k];
  }
  store_lanes<W>(out + align_row[m] * hidden + c, sum);
}

bool is_gate(const AgAlignMix* a) { return a->mode == AG_MIX_GATE; }
Places places_of(const AgAlignMix* a) { return {a->image_row, a->patches}; }
int64_t image_rows(const AgAlignMix* a) { return a->images * a->patches; }

AgGemm projection(const AgAlignMix* a, const int32_t* c_rows) {
  AgGemm g{};
  g.m = image_rows(a), g.n = a->hidden, g.k = a->features;
  g.a = a->x, g.lda = a->features;
  g.b = a->w, g.ldb = a->features, g.trans_b = 1;
  g.bias = a->b;
  g.c = a->out, g.ldc = a->hidden, g.c_rows = c_rows;
  g.dt = g.dt_c = a->dt;
  return g;
}

// Rows are whole packs at every place.
bool vectors(const AgAlignMix* a) {
  bool all = a->hidden % 8 == 0;
  for (const void* p : {a->embed, a->table, static_cast<const void*>(a->out), static_cast<const void*>(a->mean), a->d_out})
    all = all && aligned16(p);
  return all;
}

// Calls f with the unsigned type that rows of T are copied as.
template <class T, class F>
AgStatus with_copies(bool vector, const F& f) {
  if (vector) return f(Tag<uint4>());
  if (sizeof(T) == 2) return f(Tag<uint16_t>());
  return f(Tag<uint32_t>());
}

// Of the forward pass with a projector.
struct Projected {
  int32_t* c_rows;
  int64_t count;  // parts the product leaves of each dot product; 0: they are taken from the stored rows
  float* parts;   // [count, image rows]
  int64_t used;
  Projected(void* base, const AgAlignMix* a) {
    Arena arena{static_cast<char*>(base)};
    const AgGemm g = projection(a, nullptr);
    c_rows = arena.take<int32_t>(a->w ? image_rows(a) : 0);
    count = a->w && is_gate(a) ? gemm_dot_parts(&g) : 0;
    parts = arena.take<float>(count * image_rows(a));
    used = arena.used;
  }
};

template <class T>
AgStatus project(AgCtx* ctx, const AgAlignMix* a, const Projected& f, bool vector) {
  const int64_t rows = image_rows(a);
  if (a->w) {
    if (AgStatus s = launch(ctx, "align_mix", list_places, grid_for(rows, kThreads), kThreads, 0, f.c_rows, places_of(a), rows)) return s;
    const AgGemm g = projection(a, f.c_rows);
    return f.count ? gemm_with_dots(ctx, &g, {static_cast<const float*>(a->mean), a->patches, f.parts}) : call(ctx, f.used, gemm, g);
  }
  return with_copies<T>(vector && aligned16(a->x), [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = a->hidden * int64_t(sizeof(T)) / int64_t(sizeof(U));
    return launch(ctx, "align_mix", place_rows<U>, grid_for(rows * units, kThreads), kThreads, 0, static_cast<U*>(a->out),
                  static_cast<const U*>(a->x), places_of(a), rows, units);
  });
}

template <class T, int W>
AgStatus gate_forward(AgCtx* ctx, const AgAlignMix* a, const Projected& f) {
  const T* out = static_cast<const T*>(a->out);
  float *mean = static_cast<float*>(a->mean), *dots = static_cast<float*>(a->dots);
  const int64_t rows = image_rows(a);
  AgStatus s = AG_OK;
  if (f.count)
    s = launch(ctx, "align_mix", add_parts, grid_for(rows, kThreads), kThreads, 0, dots, f.parts, f.count, rows);
  else
    s = launch(ctx, "align_mix", row_dots<W, T>, dim3(unsigned(div_up(rows, kWarps))), kThreads, 0, dots, out, mean, places_of(a), rows,
               a->hidden);
  if (s != AG_OK) return s;
  const Gate g{a->gw0, a->gb0, a->gw1, a->gb1, dots, static_cast<float*>(a->gate_pre), static_cast<float*>(a->logits),
               static_cast<float*>(a->coef), a->gate_hidden, a->patches, a->levels - 1, float(a->global)};
  const size_t bytes = size_t(a->patches + a->gate_hidden + a->levels) * sizeof(float);
  return launch(ctx, "align_mix", gate_kernel<T>, dim3(unsigned(a->images)), kThreads, bytes, g);
}

template <class T, int W>
AgStatus forward(AgCtx* ctx, const AgAlignMix* a) {
  T* out = static_cast<T*>(a->out);
  const T *embed = static_cast<const T*>(a->embed), *table = static_cast<const T*>(a->table);
  float *mean = static_cast<float*>(a->mean), *coef = static_cast<float*>(a->coef);
  const dim3 grid = columns(a->hidden, W, a->images);
  const Projected f(ctx->workspace, a);
  AgStatus s = AG_OK;
  if (is_gate(a)) s = launch(ctx, "align_mix", text_means<W, T>, grid, kThreads, 0, mean, embed, a->gate_ids, a->gate_offsets, a->hidden);
  if (s == AG_OK) s = project<T>(ctx, a, f, W > 1);
  if (s == AG_OK && is_gate(a)) s = gate_forward<T, W>(ctx, a, f);
  if (s == AG_OK && a->mode == AG_MIX_LEVEL)
    s = launch(ctx, "align_mix", one_hot, grid_for(a->images * a->levels, kThreads), kThreads, 0, coef, a->level, a->images, a->levels);
  if (s == AG_OK) s = launch(ctx, "align_mix", mix_rows<W, T>, grid, kThreads, 0, out, coef, table, a->align_row, a->levels, a->hidden);
  if (s != AG_OK) return s;
  return with_copies<T>(W > 1, [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = a->hidden * int64_t(sizeof(T)) / int64_t(sizeof(U));
    return launch(ctx, "align_mix", token_rows<U>, grid_for(a->tokens * units, kThreads), kThreads, 0, static_cast<U*>(a->out),
                  static_cast<const U*>(a->embed), a->token, a->tokens, units);
  });
}

// ---- gradient ---------------------------------------------------------------------------------------
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
  for (int64_t l = threadIdx.x; l < g.locals; l += kThreads) g.d_logits[m * g.locals + l] = d_logits[l] = coef[l] * (d_coef[l] - inner);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < g.gate_hidden; j += kThreads) {
    float sum = 0;
    for (int64_t l = 0; l < g.locals; l++) sum += d_logits[l] * to_float(static_cast<const T*>(g.w1)[l * g.gate_hidden + j]);
    const float x = g.pre[m * g.gate_hidden + j];
    g.d_pre[m * g.gate_hidden + j] = d_pre[j] = sum * gelu_slope(x);
    g.activated[m * g.gate_hidden + j] = activate(AG_GELU, x);
  }
  __syncthreads();
  for (int64_t p = threadIdx.x; p < g.patches; p += kThreads) {
    float sum = 0;
    for (int64_t j = 0; j < g.gate_hidden; j++) sum += d_pre[j] * to_float(static_cast<const T*>(g.w0)[j * g.patches + p]);
    g.d_dots[m * g.patches + p] = sum;
  }
}

// d_rows = d_out rows + d_dots (outer) mean; without a gate the first alone
template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    rows_grad(T* d_rows, const T* d_out, const float* d_dots, const float* mean, Places places, int64_t rows, int64_t hidden) {
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
  for (int64_t i = grid_thread(); i < tokens + entries; i += grid_threads()) index[i] = i < tokens ? token[i] : gate_ids[i - tokens];
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
// One block for each sorted entry and tile of columns; the first of a table's row sums them all, in order, and rounds once.
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

bool wants_rows(const AgAlignMix* a) { return a->w && (a->dw.p || a->db.p || a->dx); }
int64_t entries(const AgAlignMix* a) { return a->tokens + (is_gate(a) ? a->gate_entries : 0); }

struct Scratch {
  float *d_logits, *d_pre, *activated, *d_dots, *d_mean;
  char* d_rows;
  int32_t* index;
  int64_t used;
  Scratch(void* base, const AgAlignMix* a) {
    Arena arena{static_cast<char*>(base)};
    const int64_t gate = is_gate(a) ? a->images : 0;
    d_logits = arena.take<float>(gate * a->levels);
    d_pre = arena.take<float>(gate * a->gate_hidden);
    activated = arena.take<float>(gate * a->gate_hidden);
    d_dots = arena.take<float>(gate * a->patches);
    d_mean = arena.take<float>(a->d_embed.p ? gate * a->hidden : 0);
    d_rows = arena.take<char>(wants_rows(a) ? image_rows(a) * a->hidden * (a->dt == AG_BF16 ? 2 : 4) : 0);
    index = arena.take<int32_t>(a->d_embed.p ? entries(a) : 0);
    used = arena.used;
  }
};

template <class T>
AgStatus small_grads(AgCtx* ctx, const AgAlignMix* a, const Scratch& f) {
  const int64_t G = a->gate_hidden, L = a->levels - 1, P = a->patches, M = a->images;
  const float *coef = static_cast<const float*>(a->coef), *dots = static_cast<const float*>(a->dots);
  const Outer<T> table{{}, coef, a->levels, static_cast<const T*>(a->d_out), a->hidden, a->align_row, M, a->levels, a->hidden};
  AgStatus s = sum_outer(ctx, a->d_table, table);
  if (!is_gate(a)) return s;
  if (s == AG_OK) s = sum_outer(ctx, a->d_gw0, Outer<float>{{}, f.d_pre, G, dots, P, nullptr, M, G, P});
  if (s == AG_OK) s = sum_outer(ctx, a->d_gb0, Outer<float>{{}, f.d_pre, G, nullptr, 0, nullptr, M, G, 1});
  if (s == AG_OK) s = sum_outer(ctx, a->d_gw1, Outer<float>{{}, f.d_logits, L, f.activated, G, nullptr, M, L, G});
  if (s == AG_OK) s = sum_outer(ctx, a->d_gb1, Outer<float>{{}, f.d_logits, L, nullptr, 0, nullptr, M, L, 1});
  return s;
}

template <class T, int W>
AgStatus table_of_tokens(AgCtx* ctx, const AgAlignMix* a, const Scratch& f) {
  const int64_t n = entries(a);
  if (!a->d_embed.accumulate) {
    const AgFill zero{a->d_embed.p, a->d_embed.dt, a->vocab * a->hidden, 0.0};
    if (AgStatus s = fill(ctx, &zero)) return s;
  }
  if (n == 0) return AG_OK;
  AgStatus s = launch(ctx, "align_mix_grad", list_entries, grid_for(n, kThreads), kThreads, 0, f.index, a->token, a->tokens, a->gate_ids,
                      n - a->tokens);
  AgCtx inner = behind(ctx, f.used);
  const uint64_t* keys = nullptr;
  if (s == AG_OK) s = sort_rows(&inner, "align_mix_grad", f.index, n, &keys);
  if (s != AG_OK) return memcpy(ctx->error, inner.error, sizeof ctx->error), s;
  const Entries e{keys, n, a->tokens, a->gate_offsets, a->images};
  const dim3 grid(unsigned(n), unsigned(div_up(a->hidden, kThreads * W)));
  return with_float(ctx, "align_mix_grad", a->d_embed.dt, [&](auto tag) {
    typedef typename decltype(tag)::type D;
    return launch(ctx, "align_mix_grad", embed_grad<W, T, D>, grid, kThreads, 0, static_cast<D*>(a->d_embed.p),
                  static_cast<const T*>(a->d_out), f.d_mean, e, a->hidden, a->d_embed.accumulate != 0);
  });
}

// The projector's gradients are products with d_rows.
AgGemm weight_grad(const AgAlignMix* a, const void* d_rows) {
  AgGemm g{};
  g.m = a->hidden, g.n = a->features, g.k = image_rows(a);
  g.a = d_rows, g.lda = a->hidden, g.trans_a = 1;
  g.b = a->x, g.ldb = a->features;
  g.c = a->dw.p, g.ldc = a->features, g.accumulate = a->dw.accumulate;
  g.dt = a->dt, g.dt_c = a->dw.dt;
  return g;
}
AgGemm input_grad(const AgAlignMix* a, const void* d_rows) {
  AgGemm g{};
  g.m = image_rows(a), g.n = a->features, g.k = a->hidden;
  g.a = d_rows, g.lda = a->hidden;
  g.b = a->w, g.ldb = a->features;
  g.c = a->dx, g.ldc = a->features;
  g.dt = g.dt_c = a->dt;
  return g;
}
AgColSum bias_grad(const AgAlignMix* a, const void* d_rows) {
  return AgColSum{a->db, d_rows, image_rows(a), a->hidden, a->hidden, a->dt, 1.0, nullptr};
}

template <class T, int W>
AgStatus rows_and_projector(AgCtx* ctx, const AgAlignMix* a, const Scratch& f) {
  T* d_rows = a->w ? reinterpret_cast<T*>(f.d_rows) : static_cast<T*>(a->dx);
  const int64_t rows = image_rows(a);
  AgStatus s = launch(ctx, "align_mix_grad", rows_grad<W, T>, grid_for(rows * a->hidden / W, kThreads), kThreads, 0, d_rows,
                      static_cast<const T*>(a->d_out), is_gate(a) ? f.d_dots : nullptr, static_cast<const float*>(a->mean), places_of(a), rows,
                      a->hidden);
  if (!a->w) return s;
  if (s == AG_OK && a->dw.p) s = call(ctx, f.used, gemm, weight_grad(a, d_rows));
  if (s == AG_OK && a->db.p) s = call(ctx, f.used, col_sum, bias_grad(a, d_rows));
  if (s == AG_OK && a->dx) s = call(ctx, f.used, gemm, input_grad(a, d_rows));
  return s;
}

template <class T, int W>
AgStatus backward(AgCtx* ctx, const AgAlignMix* a) {
  const Scratch f(ctx->workspace, a);
  AgStatus s = AG_OK;
  if (is_gate(a)) {
    const GateGrad g{a->d_out, a->table, a->gw0, a->gw1, static_cast<const float*>(a->coef), static_cast<const float*>(a->gate_pre),
                     f.d_logits, f.d_pre, f.activated, f.d_dots, a->align_row, a->hidden, a->gate_hidden, a->patches, a->levels - 1};
    const size_t bytes = size_t(2 * a->levels + a->gate_hidden) * sizeof(float);
    s = launch(ctx, "align_mix_grad", gate_grad<T, W>, dim3(unsigned(a->images)), kThreads, bytes, g);
    constexpr int V = W > 1 ? 2 : 1;  // narrow: the pictures of a batch are few, and threads are wanted
    if (s == AG_OK && a->d_embed.p)
      s = launch(ctx, "align_mix_grad", mean_grad<V, T>, columns(a->hidden, V, a->images), kThreads, 0, f.d_mean, f.d_dots,
                 static_cast<const T*>(a->out), places_of(a), a->gate_offsets, a->hidden);
  }
  if (s == AG_OK) s = small_grads<T>(ctx, a, f);
  if (s == AG_OK && a->d_embed.p) s = table_of_tokens<T, W>(ctx, a, f);
  if (s == AG_OK && (wants_rows(a) || (!a->w && a->dx))) s = rows_and_projector<T, W>(ctx, a, f);
  return s;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t align_mix_workspace(const AgAlignMix* a) {
  if (!a->w || !a->images) return 0;
  const AgGemm g = projection(a, nullptr);
  return Projected(nullptr, a).used + gemm_workspace(&g);
}
AgStatus align_mix(AgCtx* ctx, const AgAlignMix* a) {
  if (!a->w && a->w_packed) return fail(ctx, AG_INVALID, "[align_mix] w: expected the matrix itself, got a packed one");
  return with_float(ctx, "align_mix", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return with_width<T>(vectors(a), [&](auto width) { return forward<T, decltype(width)::value>(ctx, a); });
  });
}

int64_t align_mix_grad_workspace(const AgAlignMix* a) {
  int64_t inner = a->d_embed.p ? sort_workspace(entries(a)) : 0;
  const AgGemm w = weight_grad(a, nullptr), x = input_grad(a, nullptr);
  const AgColSum b = bias_grad(a, nullptr);
  if (a->w && a->dw.p) inner = most(inner, gemm_workspace(&w));
  if (a->w && a->dx) inner = most(inner, gemm_workspace(&x));
  if (a->w && a->db.p) inner = most(inner, col_sum_workspace(&b));
  return Scratch(nullptr, a).used + inner;
}
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMix* a) {
  return with_float(ctx, "align_mix_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const bool vector = vectors(a) && aligned16(a->dx) && aligned16(a->d_embed.p);
    return with_width<T>(vector, [&](auto width) { return backward<T, decltype(width)::value>(ctx, a); });
  });
}

}  // namespace gpu

// alignMix: the last projector layer, the mix of the alignment levels and the splice into the packed sequence
// (AgAlignMix in arguments.h; names follow it). The projector's product writes image rows straight to their places and,
// in bf16, takes their dot products with the text while they are in registers. What belongs where is in device memory,
// so launches depend on sizes alone.
#include "activation.h"
#include "align.h"

namespace gpu {
namespace {

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
__global__ void __launch_bounds__(kThreads)
    token_rows(U* out, const U* embed, const int32_t* token, int64_t tokens, int64_t units) {
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
// One block for each picture: they are few, so registers are not what limits them.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) gate_kernel(Gate g) {
  SMEM(raw);
  float *dots = reinterpret_cast<float*>(raw), *activated = dots + g.patches, *logits = activated + g.hidden;
  const int64_t m = blockIdx.x, warp = threadIdx.x / 32, levels = g.locals + 1;
  const bool first = threadIdx.x % 32 == 0;
  for (int64_t p = threadIdx.x; p < g.patches; p += kThreads) dots[p] = g.dots[m * g.patches + p];
  __syncthreads();
  for (int64_t j = warp; j < g.hidden; j += kWarps) {
    const float x = warp_dot<1>(static_cast<const T*>(g.w0) + j * g.patches, dots, g.patches) +
                    to_float(static_cast<const T*>(g.b0)[j]);
    if (first) g.pre[m * g.hidden + j] = x;
    if (first) activated[j] = activate(AG_GELU, x);
  }
  __syncthreads();
  for (int64_t l = warp; l < g.locals; l += kWarps) {
    const float x = warp_dot<1>(static_cast<const T*>(g.w1) + l * g.hidden, activated, g.hidden) +
                    to_float(static_cast<const T*>(g.b1)[l]);
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
    if (AgStatus s =
            launch(ctx, "align_mix", list_places, grid_for(rows, kThreads), kThreads, 0, f.c_rows, places_of(a), rows))
      return s;
    const AgGemm g = projection(a, f.c_rows);
    return f.count ? gemm_with_dots(ctx, &g, {static_cast<const float*>(a->mean), a->patches, f.parts})
                   : call(ctx, f.used, gemm, g);
  }
  return with_copies<T>(vector && aligned16(a->x), [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = a->hidden * int64_t(sizeof(T)) / int64_t(sizeof(U));
    return launch(ctx, "align_mix", place_rows<U>, grid_for(rows * units, kThreads), kThreads, 0,
                  static_cast<U*>(a->out), static_cast<const U*>(a->x), places_of(a), rows, units);
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
    s = launch(ctx, "align_mix", row_dots<W, T>, dim3(unsigned(div_up(rows, kWarps))), kThreads, 0, dots, out, mean,
               places_of(a), rows, a->hidden);
  if (s != AG_OK) return s;
  const Gate g{a->gw0,
               a->gb0,
               a->gw1,
               a->gb1,
               dots,
               static_cast<float*>(a->gate_pre),
               static_cast<float*>(a->logits),
               static_cast<float*>(a->coef),
               a->gate_hidden,
               a->patches,
               a->levels - 1,
               float(a->global)};
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
  if (is_gate(a))
    s = launch(ctx, "align_mix", text_means<W, T>, grid, kThreads, 0, mean, embed, a->gate_ids, a->gate_offsets,
               a->hidden);
  if (s == AG_OK) s = project<T>(ctx, a, f, W > 1);
  if (s == AG_OK && is_gate(a)) s = gate_forward<T, W>(ctx, a, f);
  if (s == AG_OK && a->mode == AG_MIX_LEVEL)
    s = launch(ctx, "align_mix", one_hot, grid_for(a->images * a->levels, kThreads), kThreads, 0, coef, a->level,
               a->images, a->levels);
  if (s == AG_OK)
    s = launch(ctx, "align_mix", mix_rows<W, T>, grid, kThreads, 0, out, coef, table, a->align_row, a->levels,
               a->hidden);
  if (s != AG_OK) return s;
  return with_copies<T>(W > 1, [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = a->hidden * int64_t(sizeof(T)) / int64_t(sizeof(U));
    return launch(ctx, "align_mix", token_rows<U>, grid_for(a->tokens * units, kThreads), kThreads, 0,
                  static_cast<U*>(a->out), static_cast<const U*>(a->embed), a->token, a->tokens, units);
  });
}

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

}  // namespace gpu

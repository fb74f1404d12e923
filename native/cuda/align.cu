// alignMix. The definition stands at AgAlignMix in backend.h; names below follow it. The projector is a matrix product that
// writes its rows straight into the sequence (c_rows) and, in bf16, takes their dot products with the text while they are in
// registers.
#include "align.h"

namespace gpu {
namespace {

// ---- what is multiplied, what is added -----------------------------------------------------------------
template <class T>
struct TextDots {  // dots_m[p] = <rows_m[p], mean_m>
  ImageRows rows;
  const T* out;
  const float* mean;
  int64_t hidden;
  float* dots;
  __device__ const T* left(int64_t i) const { return out + rows.of(i) * hidden; }
  __device__ const float* right(int64_t i) const { return mean + split(i, rows.patches).quotient * hidden; }
  __device__ void put(int64_t i, float x) const { dots[i] = x; }
};
template <class T>
struct GateLayer {  // y = W x + b of each picture, and gelu(y) where `activated` is given
  const T *w, *b;
  const float* x;
  int64_t outs, ins;
  float *y, *activated;
  __device__ const T* left(int64_t i) const { return w + split(i, outs).rest * ins; }
  __device__ const float* right(int64_t i) const { return x + split(i, outs).quotient * ins; }
  __device__ void put(int64_t i, float sum) const {
    const float value = sum + to_float(b[split(i, outs).rest]);
    y[i] = value;
    if (activated) activated[i] = activate(AG_GELU, value);
  }
};
template <class T>
struct TextMean {
  const T* embed;
  const int32_t *ids, *offsets;
  int64_t hidden;
  float* mean;
  __device__ int64_t count(int64_t m) const { return offsets[m + 1] - offsets[m]; }
  __device__ const T* row(int64_t m, int64_t r) const { return embed + ids[offsets[m] + r] * hidden; }
  __device__ float weight(int64_t, int64_t) const { return 1; }
  __device__ void put(int64_t m, int64_t c, float x) const { mean[m * hidden + c] = count(m) ? x / float(count(m)) : 0; }
};
template <class T>
struct Mix {  // out[align_row[m]] = coef_m . table
  const T* table;
  const float* coef;
  const int32_t* align_row;
  int64_t levels, hidden;
  T* out;
  __device__ int64_t count(int64_t) const { return levels; }
  __device__ const T* row(int64_t, int64_t l) const { return table + l * hidden; }
  __device__ float weight(int64_t m, int64_t l) const { return coef[m * levels + l]; }
  __device__ void put(int64_t m, int64_t c, float x) const { out[align_row[m] * hidden + c] = from_float<T>(x); }
};
// ---- coefficients: one warp for each picture -----------------------------------------------------------
__global__ void __launch_bounds__(32) one_hot(float* coef, const int32_t* level, int64_t levels) {
  const int64_t m = blockIdx.x;
  for (int64_t l = threadIdx.x; l < levels; l += 32) coef[m * levels + l] = l == level[m];
}
__global__ void __launch_bounds__(32) softmax_global(float* coef, const float* logits, int64_t levels, float global) {
  const int64_t m = blockIdx.x, n = levels - 1;
  coef += m * levels, logits += m * n;
  float top = -INFINITY, total = 0;
  for (int64_t l = threadIdx.x; l < n; l += 32) top = Max::of(top, logits[l]);
  top = warp_reduce<Max>(top);
  for (int64_t l = threadIdx.x; l < n; l += 32) total += expf(logits[l] - top);
  total = warp_reduce<Add>(total);
  for (int64_t l = threadIdx.x; l < n; l += 32) coef[l] = expf(logits[l] - top) / total;
  if (threadIdx.x == 0) coef[n] = global;
}
// ---- rows ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) list_rows(int32_t* c_rows, ImageRows rows, int64_t n) {
  for (int64_t r = grid_thread(); r < n; r += grid_threads()) c_rows[r] = int32_t(rows.of(r));
}

// What the product has left of the dot products of each row.
__global__ void __launch_bounds__(kThreads) add_parts(float* dots, const float* parts, int64_t count, int64_t n) {
  for (int64_t i = grid_thread(); i < n; i += grid_threads()) {
    float sum = 0;
    for (int64_t t = 0; t < count; t++) sum += parts[t * n + i];
    dots[i] = sum;
  }
}

struct TextTokens {  // out[t] = embed[token[t]]
  const int32_t* token;
  __device__ int64_t from(int64_t t) const { return token[t]; }
  __device__ int64_t to(int64_t t) const { return t; }
};
struct WithoutProjector {  // out[image_row[m] + p] = x_m[p]
  ImageRows rows;
  __device__ int64_t from(int64_t r) const { return r; }
  __device__ int64_t to(int64_t r) const { return rows.of(r); }
};
template <int W, class T, class Places>
__global__ void __launch_bounds__(kThreads) place_rows(T* dst, const T* src, Places places, int64_t n, int64_t cols) {
  for (int64_t i = grid_thread(); i < n * (cols / W); i += grid_threads()) {
    const Split at = split(i, cols / W);
    const int64_t from = places.from(at.quotient), c = at.rest * W;
    if (from < 0) continue;
    float v[W];
    load_lanes<W>(v, src + from * cols + c);
    store_lanes<W>(dst + places.to(at.quotient) * cols + c, v);
  }
}

// ---- the op --------------------------------------------------------------------------------------------
template <class T, class Places>
AgStatus place(AgCtx* ctx, const void* dst, const void* src, const Places& places, int64_t n, int64_t cols) {
  return with_width<T>(packs<T>(cols, dst, src), [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(ctx, "align_mix", place_rows<W, T, Places>, grid_for(n * (cols / W), kThreads), kThreads, 0,
                  static_cast<T*>(const_cast<void*>(dst)), as<T>(src), places, n, cols);
  });
}

// rows = x W^T + b, each row where c_rows says.
AgGemm projection(const AgAlignMix* a, const int32_t* c_rows) {
  AgGemm g{};
  g.m = a->images * a->patches, g.n = a->hidden, g.k = a->features;
  g.a = a->x, g.lda = a->features;
  g.b = a->w, g.ldb = a->features, g.b_packed = a->w_packed, g.trans_b = 1;
  g.bias = a->b;
  g.c = a->out, g.ldc = a->hidden, g.c_rows = c_rows;
  g.dt = g.dt_c = a->dt;
  return g;
}

struct ForwardScratch {
  int32_t* c_rows;
  float* activated;   // [images, gate_hidden]
  int64_t dot_parts;  // that the product leaves of each dot product; 0: they are taken from the stored rows
  float* parts;       // [dot_parts, images * patches]
  int64_t bytes;
  ForwardScratch(void* base, const AgAlignMix* a) {
    const AgGemm g = projection(a, nullptr);
    Arena arena{base, has_projector(a) ? larger(gemm_workspace(&g), 0) : 0};
    c_rows = arena.take<int32_t>(has_projector(a) ? a->images * a->patches : 0);
    activated = arena.take<float>(has_gate(a) ? a->images * a->gate_hidden : 0);
    dot_parts = has_projector(a) && has_gate(a) ? gemm_dot_parts(&g) : 0;
    parts = arena.take<float>(dot_parts * a->images * a->patches);
    bytes = arena.used;
  }
};

template <class T>
AgStatus project(AgCtx* ctx, const AgAlignMix* a, const ForwardScratch& f) {
  const int64_t n = a->images * a->patches;
  if (!has_projector(a)) return place<T>(ctx, a->out, a->x, WithoutProjector{image_rows(a)}, n, a->hidden);
  const AgStatus listed = launch(ctx, "align_mix", list_rows, grid_for(n, kThreads), kThreads, 0, f.c_rows, image_rows(a), n);
  if (listed) return listed;
  const AgGemm g = projection(a, f.c_rows);
  return f.dot_parts ? gemm_with_dots(ctx, &g, {floats(a->mean), a->patches, f.parts}) : gemm(ctx, &g);
}

template <class T>
AgStatus gate_forward(AgCtx* ctx, const AgAlignMix* a, const ForwardScratch& f) {
  const int64_t P = a->patches, G = a->gate_hidden, L = a->levels - 1, H = a->hidden;
  const TextDots<T> rows{image_rows(a), as<T>(a->out), floats(a->mean), H, floats(a->dots)};
  const GateLayer<T> first{as<T>(a->gw0), as<T>(a->gb0), floats(a->dots), G, P, floats(a->gate_pre), f.activated};
  const GateLayer<T> second{as<T>(a->gw1), as<T>(a->gb1), f.activated, L, G, floats(a->logits), nullptr};
  const int64_t n = a->images * P;
  AgStatus status = AG_OK;
  if (f.dot_parts)
    status = launch(ctx, "align_mix", add_parts, grid_for(n, kThreads), kThreads, 0, rows.dots, f.parts, f.dot_parts, n);
  else
    status = dots<T>(ctx, packs<T>(H, a->out, a->mean), rows, n, H);
  if (!status) status = dots<T>(ctx, packs<T>(P, a->gw0, a->dots), first, a->images * G, P);
  if (!status) status = dots<T>(ctx, packs<T>(G, a->gw1), second, a->images * L, G);
  if (status) return status;
  return launch(ctx, "align_mix", softmax_global, dim3(unsigned(a->images)), 32, 0, floats(a->coef), floats(a->logits), a->levels,
                float(a->global));
}

template <class T>
AgStatus forward(AgCtx* ctx, const AgAlignMix* a) {
  const int64_t H = a->hidden;
  const ForwardScratch f(ctx->workspace, a);
  AgStatus status = AG_OK;
  if (has_gate(a)) {
    const TextMean<T> means{as<T>(a->embed), a->gate_ids, a->gate_offsets, H, floats(a->mean)};
    status = sums<T>(ctx, packs<T>(H, a->embed), means, a->images, H);
  }
  if (!status) status = project<T>(ctx, a, f);
  if (!status && has_gate(a)) status = gate_forward<T>(ctx, a, f);
  if (!status && a->mode == AG_MIX_LEVEL)
    status = launch(ctx, "align_mix", one_hot, dim3(unsigned(a->images)), 32, 0, floats(a->coef), a->level, a->levels);
  const Mix<T> mix{as<T>(a->table), floats(a->coef), a->align_row, a->levels, H, static_cast<T*>(a->out)};
  if (!status) status = sums<T>(ctx, packs<T>(H, a->table), mix, a->images, H);
  return status ? status : place<T>(ctx, a->out, a->embed, TextTokens{a->token}, a->tokens, H);
}

}  // namespace

int64_t align_mix_workspace(const AgAlignMix* a) { return ForwardScratch(nullptr, a).bytes; }
AgStatus align_mix(AgCtx* ctx, const AgAlignMix* a) {
  return with_float(ctx, "align_mix", a->dt, [&](auto tag) { return forward<typename decltype(tag)::type>(ctx, a); });
}

}  // namespace gpu

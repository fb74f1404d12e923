// The gradient of alignMix (align.cu), back through the mix, the gate and the dot products into the projector and the embedding.
#include "align.h"

namespace gpu {
namespace {

// ---- what is multiplied, what is added -----------------------------------------------------------------
template <class T>
struct CoefGrad {  // <d_out[align_row[m]], table[l]>, the constant level left out
  const T *d_out, *table;
  const int32_t* align_row;
  int64_t levels, hidden;
  float* d_coef;  // [images, levels - 1]
  __device__ const T* left(int64_t i) const { return d_out + align_row[split(i, levels - 1).quotient] * hidden; }
  __device__ const T* right(int64_t i) const { return table + split(i, levels - 1).rest * hidden; }
  __device__ void put(int64_t i, float x) const { d_coef[i] = x; }
};

template <class T>
struct GateLayerGrad {  // dx = W^T dy of each picture, times the slope of gelu where the layer before has one
  const T* w;
  const float* dy;
  int64_t outs, ins;
  const float* pre;
  float *dx, *activated;
  __device__ int64_t count(int64_t) const { return outs; }
  __device__ const T* row(int64_t, int64_t r) const { return w + r * ins; }
  __device__ float weight(int64_t m, int64_t r) const { return dy[m * outs + r]; }
  __device__ void put(int64_t m, int64_t c, float x) const {
    const int64_t i = m * ins + c;
    dx[i] = pre ? x * ActivationGrad<AG_GELU>{1}.slope(pre[i]) : x;
    if (pre) activated[i] = activate(AG_GELU, pre[i]);
  }
};
template <class T>
struct MeanGrad {  // sum_p d_dots[p] rows[p], divided by the number of text tokens: what each of them gets
  const T* out;
  const float* d_dots;
  const int32_t *image_row, *offsets;
  int64_t patches, hidden;
  float* d_mean;
  __device__ int64_t count(int64_t) const { return patches; }
  __device__ const T* row(int64_t m, int64_t p) const { return out + (image_row[m] + p) * hidden; }
  __device__ float weight(int64_t m, int64_t p) const { return d_dots[m * patches + p]; }
  __device__ void put(int64_t m, int64_t c, float x) const {
    const int32_t n = offsets[m + 1] - offsets[m];
    d_mean[m * hidden + c] = n ? x / float(n) : 0;
  }
};
template <class T>
struct Outer {  // to[i] = sum over the pictures of left(m, i) * right(m)
  GradTarget to;
  const float* left;     // [images, rows]; NULL: ones
  const T* right;        // [.., cols]
  const int32_t* index;  // of a picture's row in `right`; NULL: the picture's number
  int64_t images, rows, cols;
  __device__ int64_t count(int64_t) const { return images; }
  __device__ const T* row(int64_t, int64_t m) const { return right + (index ? index[m] : m) * cols; }
  __device__ float weight(int64_t i, int64_t m) const { return left ? left[m * rows + i] : 1; }
  __device__ void put(int64_t i, int64_t c, float x) const { grad_put(to, i * cols + c, x); }
};

// ---- coefficients and rows -----------------------------------------------------------------------------
// d_logits in place of d_coef
__global__ void __launch_bounds__(32) softmax_global_grad(float* d_coef, const float* coef, int64_t levels) {
  const int64_t m = blockIdx.x, n = levels - 1;
  coef += m * levels, d_coef += m * n;
  float inner = 0;
  for (int64_t l = threadIdx.x; l < n; l += 32) inner += d_coef[l] * coef[l];
  inner = warp_reduce<Add>(inner);
  for (int64_t l = threadIdx.x; l < n; l += 32) d_coef[l] = coef[l] * (d_coef[l] - inner);
}

// d_rows = rows of d_out + d_dots (outer) mean; d_dots NULL: without the second term
template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    rows_grad(T* d_rows, const T* d_out, ImageRows rows, const float* d_dots, const float* mean, int64_t n, int64_t cols) {
  for (int64_t i = grid_thread(); i < n * (cols / W); i += grid_threads()) {
    const Split at = split(i, cols / W);
    const int64_t r = at.quotient, c = at.rest * W;
    float v[W], t[W];
    load_lanes<W>(v, d_out + rows.of(r) * cols + c);
    if (d_dots) {
      load_lanes<W>(t, mean + split(r, rows.patches).quotient * cols + c);
#pragma unroll
      for (int j = 0; j < W; j++) v[j] += d_dots[r] * t[j];
    }
    store_lanes<W>(d_rows + r * cols + c, v);
  }
}

// ---- the embedding's gradient: one row of the table, kThreads * W columns for each block -----------------
// What adds to rows of the table: the tokens of the sequence, then those of the text means.
template <class T>
struct Entries {
  const T* d_out;
  const float* d_mean;
  const int32_t *token, *gate_ids, *gate_offsets;  // the last two NULL without a gate
  int64_t tokens, images;
  __device__ int64_t count() const { return tokens + (gate_offsets ? gate_offsets[images] : 0); }
  __device__ int32_t id(int64_t i) const { return i < tokens ? token[i] : gate_ids[i - tokens]; }
  __device__ int64_t image(int64_t i) const {  // the last one whose list does not begin behind the entry
    int64_t low = 0, high = images;
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (gate_offsets[mid] <= i - tokens ? low : high) = mid;
    }
    return low;
  }
  template <int W>
  __device__ void add(float (&sum)[W], int64_t i, int64_t cols, int64_t c) const {
    float v[W];
    if (i < tokens)
      load_lanes<W>(v, d_out + i * cols + c);
    else
      load_lanes<W>(v, d_mean + image(i) * cols + c);
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] += v[j];
  }
};
// The block looks through all entries, kThreads at a time, writes down the matches and adds them in order.
template <int W, class T>
__global__ void __launch_bounds__(kThreads) embed_grad(GradTarget to, Entries<T> entries, int64_t cols) {
  SMEM(raw);
  uint32_t* matches = reinterpret_cast<uint32_t*>(raw);  // a bit for each entry of the chunk
  const int64_t row = blockIdx.x, c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * W, n = entries.count();
  bool touched = false;
  float sum[W] = {};
  for (int64_t chunk = 0; chunk < n; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    const uint32_t vote = __ballot_sync(~0u, i < n && entries.id(i) == row);
    __syncthreads();  // the chunk before is done with
    if (threadIdx.x % 32 == 0) matches[threadIdx.x / 32] = vote;
    __syncthreads();
    for (int w = 0; w < kWarps; w++)
      for (uint32_t left = matches[w]; left; left &= left - 1) {
        touched = true;
        if (c < cols) entries.template add<W>(sum, chunk + w * 32 + __ffs(int(left)) - 1, cols, c);
      }
  }
  if (c >= cols || (!touched && to.accumulate)) return;
#pragma unroll
  for (int j = 0; j < W; j++) grad_put(to, row * cols + c + j, sum[j]);
}

// ---- the op --------------------------------------------------------------------------------------------
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
bool wants_projector(const AgAlignMix* a) { return has_projector(a) && (a->dw.p || a->db.p || a->dx); }
int64_t products_bytes(const AgAlignMix* a) {
  if (!has_projector(a)) return 0;
  const AgGemm w = weight_grad(a, nullptr), x = input_grad(a, nullptr);
  const AgColSum b = bias_grad(a, nullptr);
  return larger(larger(a->dw.p ? gemm_workspace(&w) : 0, a->dx ? gemm_workspace(&x) : 0), a->db.p ? col_sum_workspace(&b) : 0);
}

struct GradScratch {
  float *d_logits, *d_pre, *activated, *d_dots, *d_mean;
  void* d_rows;
  int64_t bytes;
  GradScratch(void* base, const AgAlignMix* a) {
    Arena arena{base, products_bytes(a)};
    const int64_t images = has_gate(a) ? a->images : 0, rows = wants_projector(a) ? a->images * a->patches * a->hidden : 0;
    d_logits = arena.take<float>(images * (a->levels - 1));
    d_pre = arena.take<float>(images * a->gate_hidden);
    activated = arena.take<float>(images * a->gate_hidden);
    d_dots = arena.take<float>(images * a->patches);
    d_mean = arena.take<float>(a->d_embed.p ? images * a->hidden : 0);
    d_rows = arena.take<char>(rows * (a->dt == AG_BF16 ? 2 : 4));
    bytes = arena.used;
  }
};

// From the gradient of the ALIGN row back to the dot products.
template <class T>
AgStatus gate_backward(AgCtx* ctx, const AgAlignMix* a, const GradScratch& f) {
  const int64_t P = a->patches, G = a->gate_hidden, L = a->levels - 1, H = a->hidden;
  const CoefGrad<T> coef{as<T>(a->d_out), as<T>(a->table), a->align_row, a->levels, H, f.d_logits};
  const GateLayerGrad<T> second{as<T>(a->gw1), f.d_logits, L, G, floats(a->gate_pre), f.d_pre, f.activated};
  const GateLayerGrad<T> first{as<T>(a->gw0), f.d_pre, G, P, nullptr, f.d_dots, nullptr};
  AgStatus status = dots<T>(ctx, packs<T>(H, a->d_out, a->table), coef, a->images * L, H);
  if (!status)
    status = launch(ctx, "align_mix_grad", softmax_global_grad, dim3(unsigned(a->images)), 32, 0, f.d_logits, floats(a->coef),
                    a->levels);
  if (!status) status = sums<T>(ctx, packs<T>(G, a->gw1), second, a->images, G);
  return status ? status : sums<T>(ctx, packs<T>(P, a->gw0), first, a->images, P);
}

template <class T>
AgStatus outer(AgCtx* ctx, const AgAlignMix* a, const AgGrad& to, const float* left, const T* right, const int32_t* index,
               int64_t rows, int64_t cols) {
  if (!to.p) return AG_OK;
  return sums<T>(ctx, packs<T>(cols, right), Outer<T>{grad_target(to), left, right, index, a->images, rows, cols}, rows, cols);
}
// The small parameters: table and gate.
template <class T>
AgStatus small_grads(AgCtx* ctx, const AgAlignMix* a, const GradScratch& f) {
  const int64_t P = a->patches, G = a->gate_hidden, L = a->levels - 1;
  AgStatus status = outer<T>(ctx, a, a->d_table, floats(a->coef), as<T>(a->d_out), a->align_row, a->levels, a->hidden);
  if (!has_gate(a)) return status;
  if (!status) status = outer<float>(ctx, a, a->d_gw0, f.d_pre, floats(a->dots), nullptr, G, P);
  if (!status) status = outer<float>(ctx, a, a->d_gb0, nullptr, f.d_pre, nullptr, 1, G);
  if (!status) status = outer<float>(ctx, a, a->d_gw1, f.d_logits, f.activated, nullptr, L, G);
  return status ? status : outer<float>(ctx, a, a->d_gb1, nullptr, f.d_logits, nullptr, 1, L);
}

template <class T>
AgStatus table_grad(AgCtx* ctx, const AgAlignMix* a, const GradScratch& f) {
  const int64_t H = a->hidden;
  const bool gate = has_gate(a);
  AgStatus status = AG_OK;
  if (gate) {
    const MeanGrad<T> means{as<T>(a->out), f.d_dots, a->image_row, a->gate_offsets, a->patches, H, f.d_mean};
    status = sums<T>(ctx, packs<T>(H, a->out), means, a->images, H);
  }
  if (status) return status;
  const Entries<T> entries{as<T>(a->d_out), f.d_mean, a->token, gate ? a->gate_ids : nullptr, gate ? a->gate_offsets : nullptr,
                           a->tokens, a->images};
  return with_width<T>(packs<T>(H, a->d_out), [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(unsigned(a->vocab), unsigned(div_up(H, kThreads * W)));
    return launch(ctx, "align_mix_grad", embed_grad<W, T>, grid, kThreads, kWarps * sizeof(uint32_t), grad_target(a->d_embed),
                  entries, H);
  });
}

template <class T>
AgStatus projector_grads(AgCtx* ctx, const AgAlignMix* a, const GradScratch& f) {
  const int64_t n = a->images * a->patches, H = a->hidden;
  void* d_rows = has_projector(a) ? f.d_rows : a->dx;
  AgStatus status = with_width<T>(packs<T>(H, a->d_out, d_rows) && aligned16(a->mean), [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(ctx, "align_mix_grad", rows_grad<W, T>, grid_for(n * (H / W), kThreads), kThreads, 0, static_cast<T*>(d_rows),
                  as<T>(a->d_out), image_rows(a), has_gate(a) ? f.d_dots : nullptr, floats(a->mean), n, H);
  });
  if (!has_projector(a)) return status;
  const AgGemm dw = weight_grad(a, d_rows), dx = input_grad(a, d_rows);
  const AgColSum db = bias_grad(a, d_rows);
  if (!status && a->dw.p) status = gemm(ctx, &dw);
  if (!status && a->db.p) status = col_sum(ctx, &db);
  return status || !a->dx ? status : gemm(ctx, &dx);
}

template <class T>
AgStatus backward(AgCtx* ctx, const AgAlignMix* a) {
  const GradScratch f(ctx->workspace, a);
  AgStatus status = has_gate(a) ? gate_backward<T>(ctx, a, f) : AG_OK;
  if (!status) status = small_grads<T>(ctx, a, f);
  if (!status && a->d_embed.p) status = table_grad<T>(ctx, a, f);
  return status || !(wants_projector(a) || a->dx) ? status : projector_grads<T>(ctx, a, f);
}

}  // namespace

int64_t align_mix_grad_workspace(const AgAlignMix* a) { return GradScratch(nullptr, a).bytes; }
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMix* a) {
  for (const AgGrad* g : {&a->dw, &a->db, &a->d_embed, &a->d_table, &a->d_gw0, &a->d_gb0, &a->d_gw1, &a->d_gb1})
    if (g->p && g->dt != AG_F32 && g->dt != AG_BF16) return bad_dtype(ctx, "align_mix_grad", g->dt);
  return with_float(ctx, "align_mix_grad", a->dt, [&](auto tag) { return backward<typename decltype(tag)::type>(ctx, a); });
}

}  // namespace gpu

// LayerNorm, RMSNorm, softmax, L2 normalisation: rows. A row belongs to a warp when it is short, else to a block; its
// second and third reading find it in L1.
#include "gpu.h"

namespace gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kShortRow = 1024;

// G threads share a row: 32 or kThreads. `scratch`: kWarps floats for each reduction of the kernel.
template <int G>
struct Row {
  int64_t r;
  int lane;
  bool inside;
  __device__ explicit Row(int64_t rows)
      : r(int64_t(blockIdx.x) * (kThreads / G) + threadIdx.x / G), lane(int(threadIdx.x) % G), inside(r < rows) {}
};
template <class Op, int G>
__device__ __forceinline__ float row_reduce(float x, float* scratch) {
  return block_reduce<Op, G>(x, scratch);
}
// f(i) for the first of W elements that this thread has, one after the other.
template <int W, int G, class F>
__device__ __forceinline__ void each(int64_t cols, int lane, const F& f) {
  for (int64_t i = lane * W; i < cols; i += G * W) f(i);
}
// Sum over the row of f(element values of up to two arrays).
template <int W, int G, class T, class F>
__device__ __forceinline__ float row_sum(const T* x, int64_t cols, int lane, float* scratch, const F& f) {
  float sum = 0;
  each<W, G>(cols, lane, [&](int64_t i) {
    float v[W];
    load_lanes<W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; j++) sum += f(v[j]);
  });
  return row_reduce<Add, G>(sum, scratch);
}
template <int W, int G, class T>
__device__ __forceinline__ float row_dot(const T* x, const T* y, int64_t cols, int lane, float* scratch) {
  float sum = 0;
  each<W, G>(cols, lane, [&](int64_t i) {
    float v[W], w[W];
    load_lanes<W>(v, x + i);
    load_lanes<W>(w, y + i);
#pragma unroll
    for (int j = 0; j < W; j++) sum += v[j] * w[j];
  });
  return row_reduce<Add, G>(sum, scratch);
}

// Runs f with the width of an access and the threads of a row as constants. `aligned`: all addresses are.
template <class T, class F>
AgStatus with_row(bool aligned, int64_t cols, const F& f) {
  return with_width<T>(aligned && cols % Pack<T>::n == 0, [&](auto width) {
    if (cols <= kShortRow) return f(width, Width<32>());
    return f(width, Width<kThreads>());
  });
}
dim3 row_grid(int64_t rows, int group) { return dim3(unsigned(div_up(rows, kThreads / group))); }

// ---- LayerNorm, RMSNorm -----------------------------------------------------------------------------
template <int W, int G, bool layer, class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(T* y, const T* x, const T* w, const T* b, float* mean,
                                                        float* rstd, int64_t rows, int64_t cols, float eps) {
  SMEM(raw);
  float* scratch = reinterpret_cast<float*>(raw);
  const Row<G> row(rows);
  if (!row.inside) return;  // whole warps: a block of one row has no rest
  x += row.r * cols;
  float m = 0;
  if (layer) m = row_sum<W, G>(x, cols, row.lane, scratch, [](float v) { return v; }) / float(cols);
  const float var =
      row_sum<W, G>(x, cols, row.lane, scratch + kWarps, [=](float v) { return (v - m) * (v - m); }) / float(cols);
  const float r = 1 / sqrtf(var + eps);
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float v[W], scale[W], shift[W] = {};
    load_lanes<W>(v, x + i);
    load_lanes<W>(scale, w + i);
    if (layer && b) load_lanes<W>(shift, b + i);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = (v[j] - m) * r * scale[j] + shift[j];
    store_lanes<W>(y + row.r * cols + i, v);
  });
  if (row.lane == 0) {
    if (layer) mean[row.r] = m;
    rstd[row.r] = r;
  }
}

template <int W, int G, bool layer, class T>
__global__ void __launch_bounds__(kThreads)
    norm_dx_kernel(T* dx, const T* dy, const T* x, const T* w, const float* mean, const float* rstd, int64_t rows,
                   int64_t cols) {
  SMEM(raw);
  float* scratch = reinterpret_cast<float*>(raw);
  const Row<G> row(rows);
  if (!row.inside) return;
  x += row.r * cols;
  dy += row.r * cols;
  const float m = layer ? mean[row.r] : 0, r = rstd[row.r];
  float s0 = 0, s1 = 0;  // means of dy w and of dy w hat
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float d[W], v[W], scale[W];
    load_lanes<W>(d, dy + i);
    load_lanes<W>(v, x + i);
    load_lanes<W>(scale, w + i);
#pragma unroll
    for (int j = 0; j < W; j++) {
      s0 += d[j] * scale[j];
      s1 += d[j] * scale[j] * ((v[j] - m) * r);
    }
  });
  s0 = layer ? row_reduce<Add, G>(s0, scratch) / float(cols) : 0;
  s1 = row_reduce<Add, G>(s1, scratch + kWarps) / float(cols);
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float d[W], v[W], scale[W];
    load_lanes<W>(d, dy + i);
    load_lanes<W>(v, x + i);
    load_lanes<W>(scale, w + i);
#pragma unroll
    for (int j = 0; j < W; j++) d[j] = (d[j] * scale[j] - (v[j] - m) * r * s1 - s0) * r;
    store_lanes<W>(dx + row.r * cols + i, d);
  });
}

// A block sums dy hat (and dy) of a tile of 32 * W columns over its share of the rows; then the blocks in order.
template <int W, bool layer, class T>
__global__ void __launch_bounds__(kThreads) norm_dw_kernel(float* partial, const T* dy, const T* x, const float* mean,
                                                           const float* rstd, int64_t rows, int64_t cols, int64_t per) {
  SMEM(raw);
  float* shared = reinterpret_cast<float*>(raw);  // [2][kWarps][32 * W]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t c0 = int64_t(blockIdx.x) * 32 * W, c = c0 + lane * W, lo = blockIdx.y * per, hi = min(rows, lo + per);
  float dw[W] = {}, db[W] = {};
  if (c < cols)
    for (int64_t r = lo + warp; r < hi; r += kWarps) {
      float d[W], v[W];
      load_lanes<W>(d, dy + r * cols + c);
      load_lanes<W>(v, x + r * cols + c);
      const float m = layer ? mean[r] : 0, s = rstd[r];
#pragma unroll
      for (int j = 0; j < W; j++) {
        dw[j] += d[j] * ((v[j] - m) * s);
        db[j] += d[j];
      }
    }
#pragma unroll
  for (int j = 0; j < W; j++) {
    shared[warp * 32 * W + lane * W + j] = dw[j];
    shared[(kWarps + warp) * 32 * W + lane * W + j] = db[j];
  }
  __syncthreads();
  for (int k = int(threadIdx.x); k < 2 * 32 * W; k += kThreads) {
    const int which = k / (32 * W), e = k % (32 * W);
    if (c0 + e >= cols) continue;
    float total = 0;
    for (int w = 0; w < kWarps; w++) total += shared[(which * kWarps + w) * 32 * W + e];
    partial[(blockIdx.y * 2 + which) * cols + c0 + e] = total;
  }
}
__global__ void __launch_bounds__(kThreads)
    norm_dw_finish(GradTarget dw, GradTarget db, const float* partial, int64_t blocks, int64_t cols) {
  for (int64_t i = grid_thread(); i < 2 * cols; i += grid_threads()) {
    const int64_t which = i / cols, c = i % cols;
    if (!(which ? db.p : dw.p)) continue;
    float sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partial[(b * 2 + which) * cols + c];
    if (which)
      grad_put(db, c, sum);
    else
      grad_put(dw, c, sum);
  }
}
int64_t dw_blocks(int64_t rows) { return rows < 32 ? 1 : rows / 32 < 128 ? rows / 32 : 128; }

template <bool layer, class T>
AgStatus norm_dw(AgCtx* ctx, const AgNormGrad* a) {
  const int64_t blocks = dw_blocks(a->rows);
  float* partial = static_cast<float*>(ctx->workspace);
  const bool vector = aligned16(a->dy) && aligned16(a->x) && a->cols % Pack<T>::n == 0;
  const AgStatus status = with_width<T>(vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(unsigned(div_up(a->cols, 32 * W)), unsigned(blocks));
    return launch(ctx, "norm_grad", norm_dw_kernel<W, layer, T>, grid, kThreads, 2 * kThreads * W * sizeof(float),
                  partial, static_cast<const T*>(a->dy), static_cast<const T*>(a->x),
                  static_cast<const float*>(a->mean), static_cast<const float*>(a->rstd), a->rows, a->cols,
                  div_up(a->rows, blocks));
  });
  if (status) return status;
  return launch(ctx, "norm_grad", norm_dw_finish, grid_for(2 * a->cols, kThreads), kThreads, 0, grad_target(a->dw),
                grad_target(a->db), partial, blocks, a->cols);
}
template <bool layer, class T>
AgStatus norm_dx(AgCtx* ctx, const AgNormGrad* a) {
  return with_row<T>(
      aligned16(a->dx) && aligned16(a->dy) && aligned16(a->x) && aligned16(a->w), a->cols, [&](auto width, auto group) {
        constexpr int W = decltype(width)::value, G = decltype(group)::value;
        return launch(ctx, "norm_grad", norm_dx_kernel<W, G, layer, T>, row_grid(a->rows, G), kThreads,
                      2 * kWarps * sizeof(float), static_cast<T*>(a->dx), static_cast<const T*>(a->dy),
                      static_cast<const T*>(a->x), static_cast<const T*>(a->w), static_cast<const float*>(a->mean),
                      static_cast<const float*>(a->rstd), a->rows, a->cols);
      });
}
template <bool layer, class T>
AgStatus norm_grad_of(AgCtx* ctx, const AgNormGrad* a) {
  if (a->dx)
    if (AgStatus status = norm_dx<layer, T>(ctx, a)) return status;
  return a->dw.p || a->db.p ? norm_dw<layer, T>(ctx, a) : AG_OK;
}

template <bool layer, class T>
AgStatus norm_of(AgCtx* ctx, const AgNorm* a) {
  const bool aligned = aligned16(a->y) && aligned16(a->x) && aligned16(a->w) && aligned16(a->b);
  return with_row<T>(aligned, a->cols, [&](auto width, auto group) {
    constexpr int W = decltype(width)::value, G = decltype(group)::value;
    return launch(ctx, "norm", norm_kernel<W, G, layer, T>, row_grid(a->rows, G), kThreads, 2 * kWarps * sizeof(float),
                  static_cast<T*>(a->y), static_cast<const T*>(a->x), static_cast<const T*>(a->w),
                  static_cast<const T*>(a->b), static_cast<float*>(a->mean), static_cast<float*>(a->rstd), a->rows,
                  a->cols, float(a->eps));
  });
}

// ---- softmax ----------------------------------------------------------------------------------------
template <int W, int G, class T>
__global__ void __launch_bounds__(kThreads) softmax_kernel(T* y, const T* x, int64_t rows, int64_t cols) {
  SMEM(raw);
  float* scratch = reinterpret_cast<float*>(raw);
  const Row<G> row(rows);
  if (!row.inside) return;
  x += row.r * cols;
  float top = -INFINITY;
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float v[W];
    load_lanes<W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; j++) top = Max::of(top, v[j]);
  });
  top = row_reduce<Max, G>(top, scratch);
  const float factor = 1 / row_sum<W, G>(x, cols, row.lane, scratch + kWarps, [=](float v) { return expf(v - top); });
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float v[W];
    load_lanes<W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = expf(v[j] - top) * factor;
    store_lanes<W>(y + row.r * cols + i, v);
  });
}

// The gradients of softmax and of the L2 norm: dx = f(dy, y, sum of dy y over the row).
struct SoftmaxSlope {
  __device__ float operator()(float dy, float y, float dot, float) const { return y * (dy - dot); }
};
struct L2Slope {
  __device__ float operator()(float dy, float y, float dot, float length) const { return (dy - y * dot) / length; }
};
template <int W, int G, class T, class F>
__global__ void __launch_bounds__(kThreads)
    row_grad_kernel(T* dx, const T* dy, const T* y, const float* norm, int64_t rows, int64_t cols, F f) {
  SMEM(raw);
  const Row<G> row(rows);
  if (!row.inside) return;
  dy += row.r * cols;
  y += row.r * cols;
  const float dot = row_dot<W, G>(dy, y, cols, row.lane, reinterpret_cast<float*>(raw)),
              length = norm ? norm[row.r] : 1;
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float d[W], v[W];
    load_lanes<W>(d, dy + i);
    load_lanes<W>(v, y + i);
#pragma unroll
    for (int j = 0; j < W; j++) d[j] = f(d[j], v[j], dot, length);
    store_lanes<W>(dx + row.r * cols + i, d);
  });
}
template <class F>
AgStatus row_grad(AgCtx* ctx, const char* op, void* dx, const void* dy, const void* y, const void* norm, int64_t rows,
                  int64_t cols, AgDtype dt, const F& f) {
  return with_float(ctx, op, dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return with_row<T>(aligned16(dx) && aligned16(dy) && aligned16(y), cols, [&](auto width, auto group) {
      constexpr int W = decltype(width)::value, G = decltype(group)::value;
      return launch(ctx, op, row_grad_kernel<W, G, T, F>, row_grid(rows, G), kThreads, kWarps * sizeof(float),
                    static_cast<T*>(dx), static_cast<const T*>(dy), static_cast<const T*>(y),
                    static_cast<const float*>(norm), rows, cols, f);
    });
  });
}

// ---- L2 normalisation -------------------------------------------------------------------------------
template <int W, int G, class T>
__global__ void __launch_bounds__(kThreads) l2norm_kernel(T* y, const T* x, float* norm, int64_t rows, int64_t cols) {
  SMEM(raw);
  const Row<G> row(rows);
  if (!row.inside) return;
  x += row.r * cols;
  const float length =
      sqrtf(row_sum<W, G>(x, cols, row.lane, reinterpret_cast<float*>(raw), [](float v) { return v * v; }));
  const float inverse = 1 / length;
  each<W, G>(cols, row.lane, [&](int64_t i) {
    float v[W];
    load_lanes<W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] *= inverse;
    store_lanes<W>(y + row.r * cols + i, v);
  });
  if (row.lane == 0) norm[row.r] = length;
}

}  // namespace

// ---- the table's entries ----------------------------------------------------------------------------
AgStatus norm(AgCtx* ctx, const AgNorm* a) {
  return with_float(ctx, "norm", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return a->mean ? norm_of<true, T>(ctx, a) : norm_of<false, T>(ctx, a);
  });
}

int64_t norm_grad_workspace(const AgNormGrad* a) {
  return a->dw.p || a->db.p ? dw_blocks(a->rows) * 2 * a->cols * int64_t(sizeof(float)) : 0;
}
AgStatus norm_grad(AgCtx* ctx, const AgNormGrad* a) {
  for (const AgGrad* g : {&a->dw, &a->db})
    if (g->p && g->dt != AG_F32 && g->dt != AG_BF16) return bad_dtype(ctx, "norm_grad", g->dt);
  return with_float(ctx, "norm_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return a->mean ? norm_grad_of<true, T>(ctx, a) : norm_grad_of<false, T>(ctx, a);
  });
}

AgStatus softmax(AgCtx* ctx, const AgSoftmax* a) {
  return with_float(ctx, "softmax", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return with_row<T>(aligned16(a->x) && aligned16(a->y), a->cols, [&](auto width, auto group) {
      constexpr int W = decltype(width)::value, G = decltype(group)::value;
      return launch(ctx, "softmax", softmax_kernel<W, G, T>, row_grid(a->rows, G), kThreads, 2 * kWarps * sizeof(float),
                    static_cast<T*>(a->y), static_cast<const T*>(a->x), a->rows, a->cols);
    });
  });
}
AgStatus softmax_grad(AgCtx* ctx, const AgSoftmaxGrad* a) {
  return row_grad(ctx, "softmax_grad", a->dx, a->dy, a->y, nullptr, a->rows, a->cols, a->dt, SoftmaxSlope());
}

AgStatus l2norm(AgCtx* ctx, const AgL2Norm* a) {
  return with_float(ctx, "l2norm", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return with_row<T>(aligned16(a->x) && aligned16(a->y), a->cols, [&](auto width, auto group) {
      constexpr int W = decltype(width)::value, G = decltype(group)::value;
      return launch(ctx, "l2norm", l2norm_kernel<W, G, T>, row_grid(a->rows, G), kThreads, kWarps * sizeof(float),
                    static_cast<T*>(a->y), static_cast<const T*>(a->x), static_cast<float*>(a->norm), a->rows, a->cols);
    });
  });
}
AgStatus l2norm_grad(AgCtx* ctx, const AgL2NormGrad* a) {
  return row_grad(ctx, "l2norm_grad", a->dx, a->dy, a->y, a->norm, a->rows, a->cols, a->dt, L2Slope());
}

}  // namespace gpu

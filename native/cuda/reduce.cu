// Sums in a fixed order, and rows by index.
#include "gpu.h"

namespace gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- sums of everything: pieces in the order of the data, then the pieces -----------------------------
constexpr int64_t kPiece = 16384;

template <class T, class F>
__device__ double piece_sum(const T* p, int64_t n, const F& f) {
  constexpr int W = Pack<T>::n;
  double sum = 0;
  const int64_t groups = reinterpret_cast<uintptr_t>(p) % 16 == 0 ? n / W : 0;
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
    float x[W];
    load_lanes<W>(x, p + i * W);
#pragma unroll
    for (int j = 0; j < W; j++) sum += f(x[j]);
  }
  for (int64_t i = groups * W + threadIdx.x; i < n; i += kThreads) sum += f(to_float(p[i]));
  return sum;
}
struct Itself {
  __device__ double operator()(float x) const { return x; }
};
struct Square {
  __device__ double operator()(float x) const { return double(x) * x; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_pieces(double* partial, const T* x, int64_t n) {
  SMEM(raw);
  const int64_t from = int64_t(blockIdx.x) * kPiece;
  const double sum = block_reduce<Add, kThreads>(piece_sum(x + from, min(kPiece, n - from), Itself()), reinterpret_cast<double*>(raw));
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The spans of one launch lie in the kernel's arguments: a captured graph keeps them.
constexpr int kMaxSpans = 256;
struct Spans {
  int count;
  struct {
    const void* p;
    int64_t n, first_piece;
    int32_t is_bf16;
  } at[kMaxSpans];
};
__global__ void __launch_bounds__(kThreads) square_pieces(double* partial, const __grid_constant__ Spans spans) {
  SMEM(raw);
  int low = 0, high = spans.count;  // the last span whose first piece is not behind this one
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (spans.at[mid].first_piece <= int64_t(blockIdx.x) ? low : high) = mid;
  }
  const int64_t from = (int64_t(blockIdx.x) - spans.at[low].first_piece) * kPiece, n = min(kPiece, spans.at[low].n - from);
  const double own = spans.at[low].is_bf16 ? piece_sum(static_cast<const bf16*>(spans.at[low].p) + from, n, Square())
                                           : piece_sum(static_cast<const float*>(spans.at[low].p) + from, n, Square());
  const double sum = block_reduce<Add, kThreads>(own, reinterpret_cast<double*>(raw));
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

constexpr int kFinal = 1024;
template <class T>
__global__ void __launch_bounds__(kFinal) sum_partials(T* y, const double* partial, int64_t n, double scale) {
  SMEM(raw);
  double own = 0;
  for (int64_t i = threadIdx.x; i < n; i += kFinal) own += partial[i];
  const double sum = block_reduce<Add, kFinal>(own, reinterpret_cast<double*>(raw)) * scale;
  if (threadIdx.x) return;
  if constexpr (sizeof(T) == 8)
    *y = sum;
  else
    *y = from_float<T>(float(sum));
}
template <class T>
AgStatus finish_sum(AgCtx* ctx, const char* op, T* y, int64_t pieces, double scale) {
  return launch(ctx, op, sum_partials<T>, dim3(1), kFinal, kFinal / 32 * sizeof(double), y,
                static_cast<const double*>(ctx->workspace), pieces, scale);
}

// ---- sums of columns --------------------------------------------------------------------------------
// A block sums a tile of 32 * W columns over its share of the rows: each warp takes every eighth row, then the warps in order.
int64_t row_blocks(int64_t rows) { return rows < 64 ? 1 : rows / 64 < 64 ? rows / 64 : 64; }

template <int W, class T>
__global__ void __launch_bounds__(kThreads) col_sum_kernel(float* partial, const T* x, int64_t rows, int64_t cols, int64_t ld, int64_t per) {
  SMEM(raw);
  float* shared = reinterpret_cast<float*>(raw);  // [kWarps][32 * W]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t c0 = int64_t(blockIdx.x) * 32 * W, c = c0 + lane * W;
  const int64_t lo = blockIdx.y * per, hi = min(rows, lo + per);
  float sum[W] = {};
  if (c < cols)
    for (int64_t r = lo + warp; r < hi; r += kWarps) {
      float v[W];
      load_lanes<W>(v, x + r * ld + c);
#pragma unroll
      for (int j = 0; j < W; j++) sum[j] += v[j];
    }
#pragma unroll
  for (int j = 0; j < W; j++) shared[warp * 32 * W + lane * W + j] = sum[j];
  __syncthreads();
  for (int k = int(threadIdx.x); k < 32 * W; k += kThreads) {
    if (c0 + k >= cols) continue;
    float total = 0;
    for (int w = 0; w < kWarps; w++) total += shared[w * 32 * W + k];
    partial[blockIdx.y * cols + c0 + k] = total;
  }
}
__global__ void __launch_bounds__(kThreads)
    col_sum_finish(GradTarget y, const float* partial, int64_t blocks, int64_t cols, float scale, const float* by) {
  const float factor = by ? scale * *by : scale;
  for (int64_t c = grid_thread(); c < cols; c += grid_threads()) {
    float sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partial[b * cols + c];
    grad_put(y, c, sum * factor);
  }
}

// ---- rows by index ----------------------------------------------------------------------------------
template <class U>
__global__ void __launch_bounds__(kThreads) gather_kernel(U* dst, const U* src, const int32_t* index, int64_t n, int64_t units) {
  for (int64_t i = grid_thread(); i < n * units; i += grid_threads()) {
    const Split at = split(i, units);
    dst[i] = src[index[at.quotient] * units + at.rest];
  }
}

// Whether any thread of the block has seen something; `flag` is a word of shared memory that nobody else uses.
__device__ __forceinline__ bool any_of_block(bool seen, int* flag) {
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  if (__any_sync(~0u, seen) && threadIdx.x % 32 == 0) atomicOr(flag, 1);
  __syncthreads();
  return *flag != 0;
}

// One block for each source row; of equal indices only the last one writes.
template <class U>
__global__ void __launch_bounds__(kThreads) scatter_kernel(U* dst, const U* src, const int32_t* index, int64_t n, int64_t units) {
  SMEM(raw);
  const int64_t i = blockIdx.x;
  const int32_t row = index[i];
  bool later = false;
  for (int64_t j = i + 1 + threadIdx.x; j < n; j += kThreads) later = later || index[j] == row;
  if (any_of_block(later, reinterpret_cast<int*>(raw))) return;
  for (int64_t u = threadIdx.x; u < units; u += kThreads) dst[row * units + u] = src[i * units + u];
}

// Calls f with the widest unsigned type that divides rows of `bytes` at both addresses.
template <class F>
AgStatus with_unit(const void* dst, const void* src, int64_t bytes, const F& f) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | uintptr_t(bytes);
  if (all % 16 == 0) return f(Tag<uint4>());
  if (all % 4 == 0) return f(Tag<uint32_t>());
  return f(Tag<uint16_t>());
}
int64_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }

// One block for each source row and tile of columns. The first of equal indices sums them all, in order: it looks through
// the indices behind it, kThreads at a time, and writes down the matches.
template <int W, class S, class D>
__global__ void __launch_bounds__(kThreads)
    scatter_add_kernel(D* dst, const S* src, const int32_t* index, int64_t n, int64_t cols, float scale, bool accumulate) {
  SMEM(raw);
  int* flag = reinterpret_cast<int*>(raw);
  uint32_t* matches = reinterpret_cast<uint32_t*>(raw) + 1;  // a bit for each index of the chunk
  const int64_t i = blockIdx.x, c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * W;
  const int32_t row = index[i];
  bool earlier = row < 0;
  for (int64_t j = threadIdx.x; j < i; j += kThreads) earlier = earlier || index[j] == row;
  if (any_of_block(earlier, flag)) return;
  const bool mine = c < cols;
  float sum[W] = {};
  if (mine && accumulate) load_lanes<W>(sum, dst + row * cols + c);
  for (int64_t chunk = i; chunk < n; chunk += kThreads) {
    const int64_t j = chunk + threadIdx.x;
    const uint32_t vote = __ballot_sync(~0u, j < n && index[j] == row);
    __syncthreads();
    if (threadIdx.x % 32 == 0) matches[threadIdx.x / 32] = vote;
    __syncthreads();
    for (int w = 0; mine && w < kWarps; w++)
      for (uint32_t left = matches[w]; left; left &= left - 1) {
        float v[W];
        load_lanes<W>(v, src + (chunk + w * 32 + __ffs(int(left)) - 1) * cols + c);
#pragma unroll
        for (int k = 0; k < W; k++) sum[k] += v[k] * scale;
      }
  }
  if (mine) store_lanes<W>(dst + row * cols + c, sum);
}

template <class S, class D>
AgStatus scatter_add_of(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.accumulate) {
    const AgFill zero{a->dst.p, a->dst.dt, a->dst_rows * a->cols, 0.0};
    if (AgStatus status = fill(ctx, &zero)) return status;
  }
  const bool vector = a->cols % 4 == 0 && aligned16(a->src) && aligned16(a->dst.p);
  auto run = [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(unsigned(a->n), unsigned(div_up(a->cols, kThreads * W)));
    return launch(ctx, "scatter_add", scatter_add_kernel<W, S, D>, grid, kThreads, (1 + kWarps) * sizeof(int),
                  static_cast<D*>(a->dst.p), static_cast<const S*>(a->src), a->index, a->n, a->cols, float(a->scale),
                  a->dst.accumulate != 0);
  };
  return vector ? run(Width<4>()) : run(Width<1>());
}

}  // namespace

// ---- the table's entries ----------------------------------------------------------------------------
int64_t sum_workspace(const AgSum* a) { return div_up(a->n, kPiece) * int64_t(sizeof(double)); }
AgStatus sum(AgCtx* ctx, const AgSum* a) {
  return with_float(ctx, "sum", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t pieces = div_up(a->n, kPiece);
    const AgStatus status = launch(ctx, "sum", sum_pieces<T>, dim3(unsigned(pieces)), kThreads, kWarps * sizeof(double),
                                   static_cast<double*>(ctx->workspace), static_cast<const T*>(a->x), a->n);
    return status ? status : finish_sum(ctx, "sum", static_cast<T*>(a->y), pieces, a->scale);
  });
}

int64_t sum_squares_workspace(const AgSumSquares* a) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < a->count; i++) pieces += div_up(a->spans[i].n, kPiece);
  return pieces * int64_t(sizeof(double));
}
AgStatus sum_squares(AgCtx* ctx, const AgSumSquares* a) {
  double* partial = static_cast<double*>(ctx->workspace);
  int64_t total = 0;
  for (int64_t i = 0; i < a->count; i++)
    if (a->spans[i].dt != AG_F32 && a->spans[i].dt != AG_BF16) return bad_dtype(ctx, "sum_squares", a->spans[i].dt);
  for (int64_t first = 0; first < a->count; first += kMaxSpans) {
    Spans spans{};
    int64_t pieces = 0;
    for (int64_t i = first; i < a->count && spans.count < kMaxSpans; i++) {
      const AgSpan& s = a->spans[i];
      spans.at[spans.count++] = {s.p, s.n, pieces, s.dt == AG_BF16};
      pieces += div_up(s.n, kPiece);
    }
    const AgStatus status = launch(ctx, "sum_squares", square_pieces, dim3(unsigned(pieces)), kThreads, kWarps * sizeof(double),
                                   partial + total, spans);
    if (status) return status;
    total += pieces;
  }
  return finish_sum(ctx, "sum_squares", a->out, total, 1.0);
}

int64_t col_sum_workspace(const AgColSum* a) { return row_blocks(a->rows) * a->cols * int64_t(sizeof(float)); }
AgStatus col_sum(AgCtx* ctx, const AgColSum* a) {
  if (!a->y.p) return AG_OK;
  if (a->y.dt != AG_F32 && a->y.dt != AG_BF16) return bad_dtype(ctx, "col_sum", a->y.dt);
  return with_float(ctx, "col_sum", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t blocks = row_blocks(a->rows);
    const bool vector = aligned16(a->x) && a->ld % Pack<T>::n == 0 && a->cols % Pack<T>::n == 0;
    float* partial = static_cast<float*>(ctx->workspace);
    const AgStatus status = with_width<T>(vector, [&](auto width) {
      constexpr int W = decltype(width)::value;
      const dim3 grid(unsigned(div_up(a->cols, 32 * W)), unsigned(blocks));
      return launch(ctx, "col_sum", col_sum_kernel<W, T>, grid, kThreads, kThreads * W * sizeof(float), partial,
                    static_cast<const T*>(a->x), a->rows, a->cols, a->ld, div_up(a->rows, blocks));
    });
    if (status) return status;
    return launch(ctx, "col_sum", col_sum_finish, grid_for(a->cols, kThreads), kThreads, 0, grad_target(a->y), partial, blocks, a->cols,
                  float(a->scale), static_cast<const float*>(a->by));
  });
}

AgStatus gather_rows(AgCtx* ctx, const AgGatherRows* a) {
  const int64_t bytes = a->cols * size_of(a->dt);
  return with_unit(a->dst, a->src, bytes, [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = bytes / int64_t(sizeof(U));
    return launch(ctx, "gather_rows", gather_kernel<U>, grid_for(a->n * units, kThreads), kThreads, 0, static_cast<U*>(a->dst),
                  static_cast<const U*>(a->src), a->index, a->n, units);
  });
}

AgStatus scatter_rows(AgCtx* ctx, const AgScatterRows* a) {
  const int64_t bytes = a->cols * size_of(a->dt);
  return with_unit(a->dst, a->src, bytes, [&](auto tag) {
    typedef typename decltype(tag)::type U;
    return launch(ctx, "scatter_rows", scatter_kernel<U>, dim3(unsigned(a->n)), kThreads, sizeof(int), static_cast<U*>(a->dst),
                  static_cast<const U*>(a->src), a->index, a->n, bytes / int64_t(sizeof(U)));
  });
}

int64_t scatter_add_workspace(const AgScatterAdd*) { return 0; }
AgStatus scatter_add(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.p) return AG_OK;
  return with_float(ctx, "scatter_add", a->dt, [&](auto src) {
    return with_float(ctx, "scatter_add", a->dst.dt, [&](auto dst) {
      return scatter_add_of<typename decltype(src)::type, typename decltype(dst)::type>(ctx, a);
    });
  });
}

}  // namespace gpu

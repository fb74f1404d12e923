// Sums in a fixed order, and rows by index.
#include <utility>

#include "rows.h"

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
  const double sum =
      block_reduce<Add, kThreads>(piece_sum(x + from, min(kPiece, n - from), Itself()), reinterpret_cast<double*>(raw));
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
  const int64_t from = (int64_t(blockIdx.x) - spans.at[low].first_piece) * kPiece,
                n = min(kPiece, spans.at[low].n - from);
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
// A block sums a tile of 32 * W columns over its share of the rows: each warp takes every eighth row, then the warps in
// order.
int64_t row_blocks(int64_t rows) { return rows < 64 ? 1 : rows / 64 < 64 ? rows / 64 : 64; }

template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    col_sum_kernel(float* partial, const T* x, int64_t rows, int64_t cols, int64_t ld, int64_t per) {
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
__global__ void __launch_bounds__(kThreads)
    gather_kernel(U* dst, const U* src, const int32_t* index, int64_t n, int64_t units) {
  for (int64_t i = grid_thread(); i < n * units; i += grid_threads()) {
    const Split at = split(i, units);
    dst[i] = src[index[at.quotient] * units + at.rest];
  }
}

// Where key i goes when its run of sorted keys is merged with the run beside it; runs are `run` long, the last ones
// shorter.
__device__ __forceinline__ int64_t merged_place(const uint64_t* keys, int64_t i, int64_t run, int64_t n) {
  const int64_t both = i / (2 * run) * (2 * run);
  const bool second = i - both >= run;
  const int64_t first = second ? both : min(both + run, n), end = second ? both + run : min(both + 2 * run, n);
  int64_t low = first, high = end;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (keys[mid] < keys[i])
      low = mid + 1;
    else
      high = mid;
  }
  return i + (low - first) - (second ? run : 0);
}

constexpr int64_t kRun = 1024;  // keys a block sorts in shared memory
__global__ void __launch_bounds__(kThreads) sort_runs(uint64_t* keys, const int32_t* index, int64_t n) {
  SMEM(raw);
  uint64_t *from = reinterpret_cast<uint64_t*>(raw), *to = from + kRun;
  const int64_t begin = int64_t(blockIdx.x) * kRun, count = min(kRun, n - begin);
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    from[i] = uint64_t(uint32_t(index[begin + i])) << 32 | uint64_t(begin + i);
  __syncthreads();
  for (int64_t run = 1; run < count; run *= 2) {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) to[merged_place(from, i, run, count)] = from[i];
    __syncthreads();
    uint64_t* other = from;
    from = to;
    to = other;
  }
  for (int64_t i = threadIdx.x; i < count; i += kThreads) keys[begin + i] = from[i];
}
__global__ void __launch_bounds__(kThreads) merge_runs(uint64_t* to, const uint64_t* from, int64_t run, int64_t n) {
  for (int64_t i = grid_thread(); i < n; i += grid_threads()) to[merged_place(from, i, run, n)] = from[i];
}

}  // namespace

int64_t sort_workspace(int64_t n) { return 2 * n * int64_t(sizeof(uint64_t)); }
AgStatus sort_rows(AgCtx* ctx, const char* op, const int32_t* index, int64_t n, const uint64_t** keys) {
  uint64_t *from = static_cast<uint64_t*>(ctx->workspace), *to = from + n;
  AgStatus status = launch(ctx, op, sort_runs, dim3(unsigned(div_up(n, kRun))), kThreads, 2 * kRun * sizeof(uint64_t),
                           from, index, n);
  for (int64_t run = kRun; status == AG_OK && run < n; run *= 2) {
    status = launch(ctx, op, merge_runs, grid_for(n, kThreads), kThreads, 0, to, from, run, n);
    std::swap(from, to);
  }
  *keys = from;
  return status;
}

namespace {

// Calls f with the widest unsigned type that divides rows of `bytes` at both addresses.
template <class F>
AgStatus with_unit(const void* dst, const void* src, int64_t bytes, const F& f) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | uintptr_t(bytes);
  if (all % 16 == 0) return f(Tag<uint4>());
  if (all % 4 == 0) return f(Tag<uint32_t>());
  return f(Tag<uint16_t>());
}
int64_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }

// One block for each sorted row and tile of columns. The first of equal indices sums them all, in order, kAhead rows in
// flight.
constexpr int kAddThreads = 128, kAhead = 4;
template <int W, class S, class D>
__global__ void __launch_bounds__(kAddThreads) scatter_add_kernel(D* dst, const S* src, const uint64_t* keys, int64_t n,
                                                                  int64_t cols, float scale, bool accumulate) {
  const int64_t at = blockIdx.x, row = key_row(keys[at]), c = (int64_t(blockIdx.y) * kAddThreads + threadIdx.x) * W;
  if (row < 0 || c >= cols || (at && key_row(keys[at - 1]) == row)) return;
  float sum[W] = {};
  if (accumulate) load_lanes<W>(sum, dst + row * cols + c);
  for (int64_t first = at; first < n && key_row(keys[first]) == row; first += kAhead) {
    float v[kAhead][W];
    bool equal[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int64_t last = min(first + j, n - 1);
      equal[j] = first + j < n && key_row(keys[last]) == row;
      if (equal[j]) load_lanes<W>(v[j], src + key_source(keys[last]) * cols + c);
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++)
#pragma unroll
      for (int k = 0; k < W; k++)
        if (equal[j]) sum[k] += v[j][k] * scale;
  }
  store_lanes<W>(dst + row * cols + c, sum);
}

template <class S, class D>
AgStatus scatter_add_of(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.accumulate) {
    const AgFill zero{a->dst.p, a->dst.dt, a->dst_rows * a->cols, 0.0};
    if (AgStatus status = fill(ctx, &zero)) return status;
  }
  const uint64_t* keys = nullptr;
  if (AgStatus status = sort_rows(ctx, "scatter_add", a->index, a->n, &keys)) return status;
  const bool vector = a->cols % Pack<S>::n == 0 && aligned16(a->src) && aligned16(a->dst.p);
  return with_width<S>(vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(unsigned(a->n), unsigned(div_up(a->cols, kAddThreads * W)));
    return launch(ctx, "scatter_add", scatter_add_kernel<W, S, D>, grid, kAddThreads, 0, static_cast<D*>(a->dst.p),
                  static_cast<const S*>(a->src), keys, a->n, a->cols, float(a->scale), a->dst.accumulate != 0);
  });
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
    const AgStatus status = launch(ctx, "sum_squares", square_pieces, dim3(unsigned(pieces)), kThreads,
                                   kWarps * sizeof(double), partial + total, spans);
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
    return launch(ctx, "col_sum", col_sum_finish, grid_for(a->cols, kThreads), kThreads, 0, grad_target(a->y), partial,
                  blocks, a->cols, float(a->scale), static_cast<const float*>(a->by));
  });
}

AgStatus gather_rows(AgCtx* ctx, const AgGatherRows* a) {
  const int64_t bytes = a->cols * size_of(a->dt);
  return with_unit(a->dst, a->src, bytes, [&](auto tag) {
    typedef typename decltype(tag)::type U;
    const int64_t units = bytes / int64_t(sizeof(U));
    return launch(ctx, "gather_rows", gather_kernel<U>, grid_for(a->n * units, kThreads), kThreads, 0,
                  static_cast<U*>(a->dst), static_cast<const U*>(a->src), a->index, a->n, units);
  });
}

int64_t scatter_add_workspace(const AgScatterAdd* a) { return a->dst.p ? sort_workspace(a->n) : 0; }
AgStatus scatter_add(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.p) return AG_OK;
  return with_float(ctx, "scatter_add", a->dt, [&](auto src) {
    return with_float(ctx, "scatter_add", a->dst.dt, [&](auto dst) {
      return scatter_add_of<typename decltype(src)::type, typename decltype(dst)::type>(ctx, a);
    });
  });
}

}  // namespace gpu

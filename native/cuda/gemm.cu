// Matrix product. By cublasLt where it is (cublas.h), else by three kernels of our own: tiles on the tensor cores
// (bf16), tiles with f32 arithmetic (f32), and a few rows against a Linear's weight, which is as fast as the weight can
// be read and never goes to cublasLt. Where tiles would not fill the device the sum over k is cut into parts, whose
// number depends on the shape and the device; they are added in order.
#include "activation.h"
#include "cublas.h"

namespace gpu {
namespace {

// ---- where results go -------------------------------------------------------------------------------
struct Product {
  const void *a, *b, *bias;
  int64_t lda, ldb, ldc, m, n, k;
  GradTarget c;
  void* pre;
  const int32_t* c_rows;
  AgUnaryOp act;
  int32_t bf16_in, bf16_out, vector;  // vector: rows of a and b begin at multiples of 16 bytes, and are whole packs
  int32_t pairs;                      // two numbers of a result's row from an even column on are one access
  float* parts;                       // [gridDim.z, m, n] when the sum is cut
  int64_t part;                       // of k
  RowDots dots;                       // of the tiles with kDots
};

// The first `left` of W neighbours in a row; with whole pairs in one access.
template <int W, class T>
__device__ __forceinline__ void store(T* to, const float (&x)[W], int64_t left, bool pairs, bool accumulate = false) {
  if (W > 1 && pairs) {
    float y[W] = {};
    if (accumulate) load_lanes<W>(y, to);
#pragma unroll
    for (int j = 0; j < W; j++) y[j] += x[j];
    return store_lanes<W>(to, y);
  }
#pragma unroll
  for (int j = 0; j < W; j++)
    if (j < left) grad_put(to + j, accumulate, x[j]);
}
// W neighbours of the result, once their sums are complete. Leaves in x what they are before they are rounded.
template <int W>
__device__ __forceinline__ void finish(const Product& p, int64_t row, int64_t col, float (&x)[W]) {
  const int64_t left = p.n - col, at = row * p.n + col;
#pragma unroll
  for (int j = 0; j < W; j++)
    if (p.bias && j < left)
      x[j] +=
          p.bf16_in ? to_float(static_cast<const bf16*>(p.bias)[col + j]) : static_cast<const float*>(p.bias)[col + j];
  if (p.pre && p.bf16_out) {
    store<W>(static_cast<bf16*>(p.pre) + at, x, left, p.pairs);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = to_float(from_float<bf16>(x[j]));  // what backward will see
  } else if (p.pre) {
    store<W>(static_cast<float*>(p.pre) + at, x, left, p.pairs);
  }
#pragma unroll
  for (int j = 0; j < W; j++) x[j] = activate(p.act, x[j]);
  const int64_t to = (p.c_rows ? p.c_rows[row] : row) * p.ldc + col;
  if (p.c.bf16)
    store<W>(static_cast<bf16*>(p.c.p) + to, x, left, p.pairs, p.c.accumulate);
  else
    store<W>(static_cast<float*>(p.c.p) + to, x, left, p.pairs, p.c.accumulate);
}
template <int W>
__device__ __forceinline__ void put(const Product& p, int64_t row, int64_t col, float (&x)[W]) {
  if (row >= p.m || col >= p.n) return;
  if (p.parts)
    store<W>(p.parts + (int64_t(blockIdx.z) * p.m + row) * p.n + col, x, p.n - col, p.pairs);
  else
    finish<W>(p, row, col, x);
}
__global__ void __launch_bounds__(256) finish_parts(Product p, int64_t parts) {
  for (int64_t i = grid_thread(); i < p.m * p.n; i += grid_threads()) {
    float x[1] = {p.parts[i]};
    for (int64_t z = 1; z < parts; z++) x[0] += p.parts[z * p.m * p.n + i];
    const Split at = split(i, p.n);
    finish<1>(p, at.quotient, at.rest, x);
  }
}

// ---- bf16: 128 x 128 of the result for each block, 64 x 32 for each of its 8 warps --------------------
constexpr int kThreads = 256, kTileM = 128, kTileN = 128, kTileK = 32, kStages = 3;

// A tile in shared memory as it is stored: kRows rows of kCols numbers and 16 bytes more, so that the 8 rows of an
// ldmatrix lie in different banks.
template <int kRows, int kCols>
struct Stage {
  static constexpr int kPitch = kCols + 8, kSize = kRows * kPitch;
  // Rows row.. and columns col.. of a matrix of rows x cols; zeros outside.
  __device__ static void load(bf16* to, const bf16* from, int64_t ld, int64_t row, int64_t col, int64_t rows,
                              int64_t cols, bool vector) {
    for (int i = int(threadIdx.x); i < kRows * (kCols / 8); i += kThreads) {
      const int r = i / (kCols / 8), c = i % (kCols / 8) * 8;
      const bool inside = row + r < rows && col + c < cols;
      const bf16* at = from + (inside ? (row + r) * ld + col + c : 0);
      if (vector) {
        cp_async16(to + r * kPitch + c, at, inside);
        continue;
      }
      for (int j = 0; j < 8; j++) to[r * kPitch + c + j] = inside && col + c + j < cols ? at[j] : from_float<bf16>(0);
    }
  }
};

// Left operand, 16 rows of the result x 16 of k, from A stored [m, k] or [k, m].
template <bool kTrans, int kPitch>
__device__ __forceinline__ void left(uint32_t* a, const bf16* tile, int row, int k) {
  const int lane = int(threadIdx.x) % 32;
  if (kTrans)
    ldsm_x4_t(a, tile + (k + lane / 16 * 8 + lane % 8) * kPitch + row + lane / 8 % 2 * 8);
  else
    ldsm_x4(a, tile + (row + lane % 16) * kPitch + k + lane / 16 * 8);
}
// Two right operands, 16 of k x 8 columns each, from B stored [n, k] or [k, n].
template <bool kTrans, int kPitch>
__device__ __forceinline__ void right(uint32_t* b, const bf16* tile, int col, int k) {
  const int lane = int(threadIdx.x) % 32;
  if (kTrans)
    ldsm_x4(b, tile + (col + lane % 8 + lane / 16 * 8) * kPitch + k + lane / 8 % 2 * 8);
  else
    ldsm_x4_t(b, tile + (k + lane % 16) * kPitch + col + lane / 16 * 8);
}

template <bool kTransA, bool kTransB>
struct Tiles {
  typedef Stage<kTransA ? kTileK : kTileM, kTransA ? kTileM : kTileK> A;
  typedef Stage<kTransB ? kTileN : kTileK, kTransB ? kTileK : kTileN> B;
  static constexpr size_t kBytes = size_t(kStages) * (A::kSize + B::kSize) * sizeof(bf16);
  bf16 *a, *b;
  const Product& p;
  int64_t row, col, first;  // of the result; of this part of k
  __device__ void load(int64_t t) const {
    const int64_t k = first + t * kTileK;
    const int stage = int(t % kStages);
    A::load(a + stage * A::kSize, static_cast<const bf16*>(p.a), p.lda, kTransA ? k : row, kTransA ? row : k,
            kTransA ? p.k : p.m, kTransA ? p.m : p.k, p.vector);
    B::load(b + stage * B::kSize, static_cast<const bf16*>(p.b), p.ldb, kTransB ? col : k, kTransB ? k : col,
            kTransB ? p.n : p.k, kTransB ? p.k : p.n, p.vector);
  }
  __device__ void multiply(float (&c)[4][4][4], int64_t t, int warp_row, int warp_col) const {
    const bf16 *ta = a + t % kStages * A::kSize, *tb = b + t % kStages * B::kSize;
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t x[4][4], y[2][4];
#pragma unroll
      for (int i = 0; i < 4; i++) left<kTransA, A::kPitch>(x[i], ta, warp_row + i * 16, k);
#pragma unroll
      for (int j = 0; j < 2; j++) right<kTransB, B::kPitch>(y[j], tb, warp_col + j * 16, k);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_bf16_16816(c[i][j], x[i], y[j / 2] + j % 2 * 2);
    }
  }
};

// Finishes a warp's share of the tile and multiplies the rows as they were stored with their vectors, over the tile's
// columns: each thread its own ones, then the four lanes that share a row, then the four warps. `shared` holds 4 *
// kTileM numbers.
__device__ __forceinline__ void finish_with_dots(const Product& p, const float (&c)[4][4][4], int64_t row0,
                                                 int64_t col0, int warp_row, int warp_col, float* shared) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 8; i++) {  // the thread's rows
    const int line = warp_row + i * 8 + lane / 4;
    const int64_t row = row0 + line, known = row < p.m ? row : p.m - 1;
    const float* with = p.dots.with + split(known, p.dots.group).quotient * p.n;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {  // its columns
      const int64_t col = col0 + warp_col + j * 8 + lane % 4 * 2;
      if (row >= p.m || col >= p.n) continue;
      float x[2] = {c[i / 2][j][i % 2 * 2], c[i / 2][j][i % 2 * 2 + 1]};
      finish<2>(p, row, col, x);
      sum += to_float(from_float<bf16>(x[0])) * with[col];
      if (col + 1 < p.n) sum += to_float(from_float<bf16>(x[1])) * with[col + 1];
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0) shared[warp_col / 32 * kTileM + line] = sum;
  }
  __syncthreads();
  const int line = int(threadIdx.x);
  if (line >= kTileM || row0 + line >= p.m) return;
  float sum = 0;
  for (int w = 0; w < 4; w++) sum += shared[w * kTileM + line];
  p.dots.parts[blockIdx.x * p.m + row0 + line] = sum;
}

template <bool kTransA, bool kTransB, bool kDots>
__global__ void __launch_bounds__(kThreads) tensor_product(Product p) {
  SMEM(raw);
  typedef Tiles<kTransA, kTransB> T;
  bf16* memory = reinterpret_cast<bf16*>(raw);
  const T tiles{memory,
                memory + kStages * T::A::kSize,
                p,
                int64_t(blockIdx.y) * kTileM,
                int64_t(blockIdx.x) * kTileN,
                int64_t(blockIdx.z) * p.part};
  const int64_t left_over = p.k - tiles.first, turns = div_up(left_over < p.part ? left_over : p.part, kTileK);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warp_row = warp / 4 * 64,
            warp_col = warp % 4 * 32;
  float c[4][4][4] = {};
#pragma unroll
  for (int t = 0; t < kStages - 1; t++) {
    if (t < turns) tiles.load(t);
    cp_commit();
  }
  for (int64_t t = 0; t < turns; t++) {
    cp_wait<kStages - 2>();
    __syncthreads();  // the tile is there, and the one before it is done with
    if (t + kStages - 1 < turns) tiles.load(t + kStages - 1);
    cp_commit();
    tiles.multiply(c, t, warp_row, warp_col);
  }
  cp_wait<0>();
  if constexpr (kDots) {
    __syncthreads();  // the last tile is done with
    finish_with_dots(p, c, tiles.row, tiles.col, warp_row, warp_col, reinterpret_cast<float*>(raw));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x[2] = {c[i][j][half * 2], c[i][j][half * 2 + 1]};
        put<2>(p, tiles.row + warp_row + i * 16 + lane / 4 + half * 8, tiles.col + warp_col + j * 8 + lane % 4 * 2, x);
      }
}

// ---- f32: 64 x 64 of the result for each block, 4 x 4 for each thread ----------------------------------
constexpr int kSide = 64, kDepth = 16, kPitch32 = kSide + 4;

// to[k][i] = element (i, k) of a matrix stored [.., k], or [k, ..] when `across`; neighbouring threads read neighbours.
__device__ __forceinline__ void load_depth(float* to, const float* from, int64_t ld, bool across, int64_t at, int64_t k,
                                           int64_t most, int64_t k_most) {
  for (int i = int(threadIdx.x); i < kSide * kDepth; i += kThreads) {
    const int line = across ? i % kSide : i / kDepth, d = across ? i / kSide : i % kDepth;
    const bool inside = at + line < most && k + d < k_most;
    to[d * kPitch32 + line] = inside ? from[across ? (k + d) * ld + at + line : (at + line) * ld + k + d] : 0;
  }
}

__global__ void __launch_bounds__(kThreads, 2) f32_product(Product p, int32_t trans_a, int32_t trans_b) {
  SMEM(raw);
  float *a = reinterpret_cast<float*>(raw), *b = a + kDepth * kPitch32;
  const int64_t row = int64_t(blockIdx.y) * kSide, col = int64_t(blockIdx.x) * kSide,
                first = int64_t(blockIdx.z) * p.part;
  const int64_t last = first + p.part < p.k ? first + p.part : p.k;
  const int r = int(threadIdx.x) / 16 * 4, q = int(threadIdx.x) % 16 * 4;
  float c[4][4] = {};
  for (int64_t k = first; k < last; k += kDepth) {
    load_depth(a, static_cast<const float*>(p.a), p.lda, trans_a, row, k, p.m, last);
    load_depth(b, static_cast<const float*>(p.b), p.ldb, !trans_b, col, k, p.n, last);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; d++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) c[i][j] += a[d * kPitch32 + r + i] * b[d * kPitch32 + q + j];
    __syncthreads();  // before the next tile overwrites this one
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      float x[2] = {c[i][j], c[i][j + 1]};
      put<2>(p, row + r + i, col + q + j, x);
    }
}

// ---- up to 8 rows x W^T: one column of the result for each warp ----------------------------------------
constexpr int kFew = 8, kFewThreads = 128;

template <class T, int W>
__global__ void __launch_bounds__(kFewThreads) few_rows(Product p) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t mine = int64_t(blockIdx.x) * (kFewThreads / 32) + threadIdx.x / 32, col = mine < p.n ? mine : p.n - 1;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b) + col * p.ldb;
  float sum[kFew] = {};
  for (int64_t k = int64_t(lane) * W; k < p.k; k += 32 * W) {
    float x[W], y[W];
    load_lanes<W>(y, b + k);
#pragma unroll
    for (int i = 0; i < kFew; i++) {
      if (i >= p.m) break;
      load_lanes<W>(x, a + i * p.lda + k);
#pragma unroll
      for (int j = 0; j < W; j++) sum[i] += x[j] * y[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kFew; i++) {
    float x[1] = {warp_reduce<Add>(sum[i])};
    if (lane == 0 && mine < p.n && i < p.m) finish<1>(p, i, mine, x);
  }
}

// ---- the choice -------------------------------------------------------------------------------------
bool is_few(const AgGemm* g) { return g->m <= kFew && !g->trans_a && g->trans_b; }

// Parts of k: as many as it takes to give every processor a block, each of at least 256.
int64_t parts_of(const AgGemm* g) {
  const int side = g->dt == AG_BF16 ? kTileM : kSide;
  const int64_t blocks = div_up(g->m, side) * div_up(g->n, side), most = g->k / 256;
  if (is_few(g) || blocks == 0) return 1;
  const int64_t wanted = device().processors / blocks;
  return wanted < most ? (wanted > 1 ? wanted : 1) : (most > 1 ? most : 1);
}

bool vectors(const AgGemm* g) {
  const int64_t pack = 16 / (g->dt == AG_BF16 ? 2 : 4);
  const int64_t a_cols = g->trans_a ? g->m : g->k, b_cols = g->trans_b ? g->k : g->n;
  return aligned16(g->a) && aligned16(g->b) && g->lda % pack == 0 && g->ldb % pack == 0 && a_cols % pack == 0 &&
         b_cols % pack == 0;
}

bool pairs(const AgGemm* g) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(g->c) | reinterpret_cast<uintptr_t>(g->pre);
  return g->n % 2 == 0 && g->ldc % 2 == 0 && all % (g->dt_c == AG_BF16 ? 4 : 8) == 0;
}

AgStatus tensor(AgCtx* ctx, const AgGemm* g, const Product& p, dim3 grid) {
  const auto start = [&](auto kernel, size_t bytes) {
    return launch(ctx, "gemm", kernel, grid, dim3(kThreads), bytes, p);
  };
  if (p.dots.with) return start(tensor_product<false, true, true>, Tiles<false, true>::kBytes);
  if (g->trans_a && g->trans_b) return start(tensor_product<true, true, false>, Tiles<true, true>::kBytes);
  if (g->trans_a) return start(tensor_product<true, false, false>, Tiles<true, false>::kBytes);
  if (g->trans_b) return start(tensor_product<false, true, false>, Tiles<false, true>::kBytes);
  return start(tensor_product<false, false, false>, Tiles<false, false>::kBytes);
}

AgStatus few(AgCtx* ctx, const AgGemm* g, const Product& p) {
  return with_float(ctx, "gemm", g->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return with_width<T>(p.vector, [&](auto width) {
      const dim3 grid(unsigned(div_up(g->n, kFewThreads / 32)));
      return launch(ctx, "gemm", few_rows<T, decltype(width)::value>, grid, dim3(kFewThreads), 0, p);
    });
  });
}

}  // namespace

int64_t gemm_workspace(const AgGemm* g) {
  const int64_t parts = parts_of(g);
  return parts > 1 ? parts * g->m * g->n * int64_t(sizeof(float)) : 0;
}

int64_t gemm_dot_parts(const AgGemm* g) {
  const bool tiles =
      g->dt == AG_BF16 && g->dt_c == AG_BF16 && !g->trans_a && g->trans_b && !is_few(g) && parts_of(g) == 1;
  return tiles ? div_up(g->n, kTileN) : 0;
}

AgStatus gemm(AgCtx* ctx, const AgGemm* g) {
  if (g->dt > AG_BF16) return bad_dtype(ctx, "gemm", g->dt);
  if (g->dt_c > AG_BF16 || (g->dt == AG_F32 && g->dt_c == AG_BF16)) return bad_dtype(ctx, "gemm", g->dt_c);
  if (!g->b)
    return fail(ctx, AG_INVALID,
                "[gemm] b: expected the matrix itself, got a packed one, which this backend does not make");
  if (g->m == 0 || g->n == 0) return AG_OK;
  const AgStatus elsewhere = is_few(g) ? AG_UNSUPPORTED : cublaslt_gemm(ctx, g);
  return elsewhere == AG_UNSUPPORTED ? gemm_with_dots(ctx, g, {}) : elsewhere;
}
AgStatus gemm_with_dots(AgCtx* ctx, const AgGemm* g, const RowDots& dots) {
  const int64_t parts = parts_of(g);
  const int32_t in = g->dt == AG_BF16, out = g->dt_c == AG_BF16;
  Product p{g->a,   g->b,      g->bias, g->lda, g->ldb, g->ldc,     g->m,     g->n,    g->k, {g->c, out, g->accumulate},
            g->pre, g->c_rows, g->act,  in,     out,    vectors(g), pairs(g), nullptr, g->k, dots};
  if (is_few(g)) return few(ctx, g, p);
  if (parts > 1) {
    p.parts = static_cast<float*>(ctx->workspace);
    p.part = div_up(div_up(g->k, parts), kTileK) * kTileK;
  }
  const int side = in ? kTileM : kSide;
  const int64_t used = parts > 1 ? div_up(g->k, p.part) : 1;  // the last ones may have nothing left
  const dim3 grid(unsigned(div_up(g->n, side)), unsigned(div_up(g->m, side)), unsigned(used));
  const size_t bytes = 2 * kDepth * kPitch32 * sizeof(float);
  const AgStatus status = in ? tensor(ctx, g, p, grid)
                             : launch(ctx, "gemm", f32_product, grid, dim3(kThreads), bytes, p, g->trans_a, g->trans_b);
  if (status != AG_OK || parts <= 1) return status;
  return launch(ctx, "gemm", finish_parts, grid_for(g->m * g->n, 256), dim3(256), 0, p, used);
}

// Nothing to gain: the tensor cores read both operands through shared memory anyway.
AgStatus pack(AgCtx* ctx, const AgPack*) { return unsupported(ctx, "pack"); }
int64_t pack_bytes(const AgPack*) { return 0; }

}  // namespace gpu

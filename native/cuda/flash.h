// What the bf16 attention kernels share: tiles of rows in shared memory, their products on the tensor cores, the online
// softmax. A warp has 16 rows of its own, as the left operand; the other side's rows are the right one.
#pragma once
#include "attention.h"

namespace gpu {
namespace {

constexpr int kThreads = 128, kOwn = 64;  // of a block: threads, and rows when every warp has its own

struct Flash {
  const bf16 *q, *k, *v, *d_o;
  bf16 *o, *dq, *dk, *dv;
  float *lse, *delta;
  int64_t ldq, ldk, ldv, ldo;
  const int32_t *q_offsets, *k_offsets;
  int64_t batch, heads, kv_heads, dim;
  float scale, scale_log2;
  int32_t causal, vector;  // vector: every row begins at a multiple of 16 bytes
};

// A tile in shared memory: rows of kDim numbers and 16 bytes more, so that the 8 rows of an ldmatrix lie in different
// banks.
template <int kDim>
struct Tile {
  static constexpr int kPitch = kDim + 8;
  static constexpr int bytes(int rows) { return rows * kPitch * 2; }
  // Rows of `dim` numbers, zeros behind them; row(r) is where row r begins, NULL for zeros. `any`: an address when
  // nothing is read.
  template <int kRows, class Row>
  __device__ static void load_rows(bf16* to, const bf16* any, int dim, bool vector, const Row& row) {
    for (int i = int(threadIdx.x); i < kRows * (kDim / 8); i += kThreads) {
      const int r = i / (kDim / 8), c = i % (kDim / 8) * 8;
      const bf16* from = row(r);
      if (vector) {
        cp_async16(to + r * kPitch + c, from && c < dim ? from + c : any, from && c < dim);
        continue;
      }
      for (int j = 0; j < 8; j++) to[r * kPitch + c + j] = from && c + j < dim ? from[c + j] : from_float<bf16>(0);
    }
  }
  // Rows first.. of a matrix with n rows.
  template <int kRows>
  __device__ static void load(bf16* to, const bf16* from, int64_t ld, int64_t first, int64_t n, int dim, bool vector) {
    load_rows<kRows>(to, from, dim, vector, [&](int r) { return first + r < n ? from + (first + r) * ld : nullptr; });
  }
  // 16 rows x 16 numbers as the left operand.
  __device__ static void left(uint32_t* a, const bf16* tile, int row, int col) {
    const int lane = int(threadIdx.x) % 32;
    ldsm_x4(a, tile + (row + lane % 16) * kPitch + col + lane / 16 * 8);
  }
  // The same of a tile that holds the transpose.
  __device__ static void left_rows(uint32_t* a, const bf16* tile, int row, int col) {
    const int lane = int(threadIdx.x) % 32;
    ldsm_x4_t(a, tile + (col + lane % 8 + lane / 16 * 8) * kPitch + row + lane / 8 % 2 * 8);
  }
  // 16 rows x 16 numbers as two right operands: each row a column of the product.
  __device__ static void right(uint32_t* b, const bf16* tile, int row, int col) {
    const int lane = int(threadIdx.x) % 32;
    ldsm_x4(b, tile + (row + lane % 8 + lane / 16 * 8) * kPitch + col + lane / 8 % 2 * 8);
  }
  // The same, each number of a row in a column of its own.
  __device__ static void right_rows(uint32_t* b, const bf16* tile, int row, int col) {
    const int lane = int(threadIdx.x) % 32;
    ldsm_x4_t(b, tile + (row + lane % 16) * kPitch + col + lane / 16 * 8);
  }
};

// The 16 rows of the running warp in a tile of the block's rows.
template <int kDim>
__device__ __forceinline__ const bf16* own_rows(const bf16* tile) {
  return tile + int(threadIdx.x) / 32 * 16 * Tile<kDim>::kPitch;
}

// c[16][kCols] = own 16 rows x other rows^T over kDim.
template <int kDim, int kCols>
__device__ __forceinline__ void scores(float (&c)[kCols / 8][4], const bf16* own, const bf16* other) {
#pragma unroll
  for (int j = 0; j < kCols / 8; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a[4], b[4];
    Tile<kDim>::left(a, own, 0, k);
#pragma unroll
    for (int j = 0; j < kCols / 16; j++) {
      Tile<kDim>::right(b, other, j * 16, k);
      mma_bf16_16816(c[2 * j], a, b);
      mma_bf16_16816(c[2 * j + 1], a, b + 2);
    }
  }
}

// sum[16][kDim] += w[16][kCols] x other rows; the accumulators of w are the left operand as they lie.
template <int kDim, int kCols>
__device__ __forceinline__ void add_rows(float (&sum)[kDim / 8][4], const float (&w)[kCols / 8][4], const bf16* other) {
#pragma unroll
  for (int k = 0; k < kCols / 16; k++) {
    const float *x = w[2 * k], *y = w[2 * k + 1];
    const uint32_t a[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
#pragma unroll
    for (int d = 0; d < kDim / 16; d++) {
      uint32_t b[4];
      Tile<kDim>::right_rows(b, other, k * 16, d * 16);
      mma_bf16_16816(sum[2 * d], a, b);
      mma_bf16_16816(sum[2 * d + 1], a, b + 2);
    }
  }
}

// Row of the accumulator's element i in the block, and its column in block j of 8.
__device__ __forceinline__ int row_of(int i) {
  return int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + i / 2 * 8;
}
__device__ __forceinline__ int col_of(int j, int i) { return j * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }

// The block's rows times `factor` to rows first.. of a matrix of n rows. Through `stage`, a tile of the block's rows
// that only the warp of a row still uses, they leave 16 bytes at a time; without one (NULL) 4, which takes fewer
// registers.
template <int kDim>
__device__ __forceinline__ void store_rows(bf16* to, int64_t ld, int64_t first, int64_t n, int dim, bool vector,
                                           const float (&x)[kDim / 8][4], const float (&factor)[2], bf16* stage) {
  constexpr int kPitch = Tile<kDim>::kPitch;
  const bool staged = stage && vector;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = first + row_of(half * 2);
    if (!staged && row >= n) continue;
#pragma unroll
    for (int j = 0; j < kDim / 8; j++) {
      const int c = col_of(j, 0);
      const float low = x[j][half * 2] * factor[half], high = x[j][half * 2 + 1] * factor[half];
      if (staged) {
        *reinterpret_cast<uint32_t*>(stage + row_of(half * 2) * kPitch + c) = pack_bf16(low, high);
      } else if (vector && c < dim) {
        *reinterpret_cast<uint32_t*>(to + row * ld + c) = pack_bf16(low, high);
      } else {
        if (c < dim) to[row * ld + c] = from_float<bf16>(low);
        if (c + 1 < dim) to[row * ld + c + 1] = from_float<bf16>(high);
      }
    }
  }
  if (!staged) return;
  __syncwarp();
  for (int i = int(threadIdx.x) % 32; i < 16 * (kDim / 8); i += 32) {
    const int row = int(threadIdx.x) / 32 * 16 + i / (kDim / 8), c = i % (kDim / 8) * 8;
    if (first + row < n && c < dim) store_pack(to + (first + row) * ld + c, load_pack(stage + row * kPitch + c));
  }
}

template <int kCols>
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // total: of this lane's columns

  // s becomes weights; keep: what sums so far are worth.
  __device__ __forceinline__ void next(float (&s)[kCols / 8][4], float scale_log2, float (&keep)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float now = top[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; j++) now = fmaxf(now, fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      const float base = now == -INFINITY ? 0 : now * scale_log2;
      keep[half] = fast_exp2(top[half] * scale_log2 - base);
      top[half] = now;
      total[half] *= keep[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; j++)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; i++) {
          s[j][i] = fast_exp2(s[j][i] * scale_log2 - base);
          total[half] += s[j][i];
        }
    }
  }
  // Of all columns; the same in the four lanes of a row.
  __device__ __forceinline__ float sum(int half) const {
    const float pair = total[half] + __shfl_xor_sync(~0u, total[half], 1);
    return pair + __shfl_xor_sync(~0u, pair, 2);
  }
};

// Calls f with the head dim the kernels are compiled for.
template <class F>
AgStatus with_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(Width<64>());
  if (dim <= 80) return f(Width<80>());
  if (dim <= 96) return f(Width<96>());
  return f(Width<128>());
}

// ---- the host's side --------------------------------------------------------------------------------
inline Flash flash_of(const AgAttention* a) {
  Flash f{};
  auto in = [](const void* p) { return static_cast<const bf16*>(p); };
  auto out = [](void* p) { return static_cast<bf16*>(p); };
  f.q = in(a->q), f.k = in(a->k), f.v = in(a->v), f.o = out(a->o), f.lse = static_cast<float*>(a->lse);
  f.ldq = a->ldq, f.ldk = a->ldk, f.ldv = a->ldv, f.ldo = a->ldo;
  f.q_offsets = a->q_offsets, f.k_offsets = a->k_offsets;
  f.batch = a->batch, f.heads = a->heads, f.kv_heads = a->kv_heads, f.dim = a->dim;
  f.scale = float(a->scale), f.scale_log2 = float(a->scale) * kLog2e, f.causal = a->causal;
  f.vector = (a->dim | a->ldq | a->ldk | a->ldv | a->ldo) % 8 == 0;
  for (const void* p : {a->q, a->k, a->v, static_cast<const void*>(a->o)}) f.vector = f.vector && aligned16(p);
  return f;
}
inline Flash flash_of(const AgAttentionGrad* grad, float* delta) {
  Flash f = flash_of(&grad->forward);
  auto out = [](void* p) { return static_cast<bf16*>(p); };
  f.d_o = static_cast<const bf16*>(grad->d_o), f.delta = delta;
  f.dq = out(grad->dq), f.dk = out(grad->dk), f.dv = out(grad->dv);
  for (const void* p : {grad->d_o, static_cast<const void*>(grad->dq), static_cast<const void*>(grad->dk),
                        static_cast<const void*>(grad->dv)})
    f.vector = f.vector && aligned16(p);
  return f;
}
inline dim3 tile_grid(int64_t rows, int64_t batch, int64_t heads) {
  return dim3(unsigned(tile_slots(rows, batch, kOwn)), unsigned(heads));
}

}  // namespace
}  // namespace gpu

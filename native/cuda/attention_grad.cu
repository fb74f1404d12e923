// Gradient of attention over packed sequences in bf16 on the tensor cores. f32: attention_f32.cu.
//
// dQ owns queries, dK and dV own keys, then with transposed scores: nothing is ever added by two blocks. Blocks and
// tiles are those of attention.cu. When the sums need not be deterministic, the blocks that own keys add their share of
// dQ with atomics, which spares two of seven products.
#include "flash.h"

namespace gpu {
namespace {

// delta = rowsum(dO * O), a warp for each token and head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(float* delta, const T* o, const T* d_o, int64_t ld, int64_t rows, int64_t heads, int64_t dim) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t at = row / heads * ld + row % heads * dim;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32) sum += to_float(o[at + i]) * to_float(d_o[at + i]);
  sum = warp_reduce<Add>(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// s: scores, dp: dO V^T. They become weights and gradients of the scores without the scale, which the sum receives at
// the end.
__device__ __forceinline__ void weigh(float& s, float& dp, bool visible, float scale_log2, float lse, float delta) {
  s = visible ? fast_exp2(s * scale_log2 - lse * kLog2e) : 0;
  dp = visible ? s * (dp - delta) : 0;
}

template <int kDim>
constexpr int kOtherRows = kDim <= 64 ? 64 : 32;  // of a tile of keys in flash_dq: registers
template <int kDim>
constexpr int kQueryRows = kDim <= 80 ? 32 : 16;  // of a tile of queries in flash_dkv: two sums lie in registers

// dQ: owns queries, walks over keys.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) flash_dq(Flash a) {
  constexpr int kOther = kOtherRows<kDim>, kTile = kOther * Tile<kDim>::kPitch;
  SMEM(raw);
  bf16* q = reinterpret_cast<bf16*>(raw);
  bf16 *d_o = q + kOwn * Tile<kDim>::kPitch, *k = d_o + kOwn * Tile<kDim>::kPitch, *v = k + 2 * kTile;
  const Span span = find_tile(a.q_offsets, a.batch, blockIdx.x, kOwn, 1);
  if (span.first >= span.n) return;
  const int64_t head = blockIdx.y, kv = head / (a.heads / a.kv_heads), k_begin = a.k_offsets[span.s];
  const int64_t nk = a.k_offsets[span.s + 1] - k_begin, shift = nk - span.n;
  const int64_t seen = a.causal ? min(nk, span.first + kOwn + shift) : nk;
  const int tiles = seen > 0 ? int(div_up(seen, kOther)) : 0, dim = int(a.dim);
  auto load = [&](int t) {
    Tile<kDim>::template load<kOther>(k + t % 2 * kTile, a.k + k_begin * a.ldk + kv * dim, a.ldk, t * kOther, nk, dim,
                                      a.vector);
    Tile<kDim>::template load<kOther>(v + t % 2 * kTile, a.v + k_begin * a.ldv + kv * dim, a.ldv, t * kOther, nk, dim,
                                      a.vector);
  };
  Tile<kDim>::template load<kOwn>(q, a.q + span.begin * a.ldq + head * dim, a.ldq, span.first, span.n, dim, a.vector);
  Tile<kDim>::template load<kOwn>(d_o, a.d_o + span.begin * a.ldo + head * dim, a.ldo, span.first, span.n, dim,
                                  a.vector);
  if (tiles) load(0);
  cp_commit();
  float lse[2], delta[2], sum[kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = span.first + row_of(half * 2), at = (span.begin + row) * a.heads + head;
    lse[half] = row < span.n ? a.lse[at] : 0;
    delta[half] = row < span.n ? a.delta[at] : 0;
  }
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load(t + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    float s[kOther / 8][4], dp[kOther / 8][4];
    scores<kDim, kOther>(s, own_rows<kDim>(q), k + t % 2 * kTile);
    scores<kDim, kOther>(dp, own_rows<kDim>(d_o), v + t % 2 * kTile);
#pragma unroll
    for (int j = 0; j < kOther / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int64_t key = int64_t(t) * kOther + col_of(j, i), row = span.first + row_of(i);
        weigh(s[j][i], dp[j][i], key < nk && (!a.causal || key <= row + shift), a.scale_log2, lse[i / 2], delta[i / 2]);
      }
    add_rows<kDim, kOther>(sum, dp, k + t % 2 * kTile);
    __syncthreads();
  }
  cp_wait<0>();
  __syncthreads();
  const float factor[2] = {a.scale, a.scale};
  store_rows<kDim>(a.dq + span.begin * a.ldq + head * dim, a.ldq, span.first, span.n, dim, a.vector, sum, factor, q);
}

template <int kCols>
__device__ __forceinline__ void put_tile(bf16* tile, const float (&x)[kCols / 8][4]) {
#pragma unroll
  for (int j = 0; j < kCols / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      *reinterpret_cast<uint32_t*>(tile + row_of(i) * Tile<kCols>::kPitch + col_of(j, i)) =
          pack_bf16(x[j][i], x[j][i + 1]);
}
// dq[kOther][kDim] += d^T k over the block's keys, d [keys][kOther] and k being tiles. dq is in device memory, the
// first `rows` of its rows `ld` apart; the warps share the blocks of 16 x 16.
template <int kDim, int kOther>
__device__ __forceinline__ void add_dq(float* dq, int ld, int rows, int dim, const bf16* d, const bf16* k) {
  constexpr int kBlocks = kOther / 16, kWarps = kThreads / 32;
  const int warp = int(threadIdx.x) / 32, row = warp % kBlocks * 16, lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int col = warp / kBlocks * 16; col < kDim; col += kWarps / kBlocks * 16) {
    float sum[2][4] = {};
#pragma unroll
    for (int j = 0; j < kOwn / 16; j++) {
      uint32_t left[4], right[4];
      Tile<kOther>::left_rows(left, d, row, j * 16);
      Tile<kDim>::right_rows(right, k, j * 16, col);
      mma_bf16_16816(sum[0], left, right);
      mma_bf16_16816(sum[1], left, right + 2);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + lane / 4 + half * 8, c = col + lane % 4 * 2;
      float* to = dq + r * ld + c;
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (r < rows && c + i / 2 * 8 + i % 2 < dim) atomicAdd(to + i / 2 * 8 + i % 2, sum[i / 2][half * 2 + i % 2]);
    }
  }
}
__global__ void __launch_bounds__(kThreads)
    finish_dq(bf16* dq, const float* sum, int64_t tokens, int64_t width, int64_t ld, float scale) {
  for (int64_t i = grid_thread(); i < tokens * width; i += grid_threads()) {
    const Split at = split(i, width);
    dq[at.quotient * ld + at.rest] = from_float<bf16>(sum[i] * scale);
  }
}

// dK and dV: owns keys, walks over the queries of every head of the group. kAddsQ: and adds to dq_sum [q_tokens, heads,
// dim].
template <int kDim, bool kAddsQ>
__device__ __forceinline__ void own_keys(const Flash& a, float* dq_sum) {
  constexpr int kOther = kQueryRows<kDim>, kTile = kOther * Tile<kDim>::kPitch;
  SMEM(raw);
  bf16* k = reinterpret_cast<bf16*>(raw);
  bf16 *v = k + kOwn * Tile<kDim>::kPitch, *q = v + kOwn * Tile<kDim>::kPitch, *d_o = q + 2 * kTile;
  float* stats = reinterpret_cast<float*>(d_o + 2 * kTile);  // two stages of lse and delta
  bf16* ds = reinterpret_cast<bf16*>(stats + 4 * kOther);    // [keys][queries], when dQ is added to
  const Span span = find_tile(a.k_offsets, a.batch, blockIdx.x, kOwn, 1);
  if (span.first >= span.n) return;
  const int64_t q_begin = a.q_offsets[span.s];
  const int kv = int(blockIdx.y), group = int(a.heads / a.kv_heads), dim = int(a.dim), own = int(span.first),
            nk = int(span.n);
  const int nq = int(a.q_offsets[span.s + 1] - q_begin),
            shift = nk - nq;                                     // 64 bits would take registers that are needed
  const int from = a.causal ? max(own - shift, 0) / kOther : 0;  // the first tile that sees a key of the block
  const int tiles = max((nq + kOther - 1) / kOther - from, 0), turns = tiles * group;
  auto load = [&](int t) {
    const int head = kv * group + t / tiles, first = (from + t % tiles) * kOther;
    const bf16 *queries = a.q + q_begin * a.ldq + head * dim, *grads = a.d_o + q_begin * a.ldo + head * dim;
    Tile<kDim>::template load<kOther>(q + t % 2 * kTile, queries, a.ldq, first, nq, dim, a.vector);
    Tile<kDim>::template load<kOther>(d_o + t % 2 * kTile, grads, a.ldo, first, nq, dim, a.vector);
    if (threadIdx.x < kOther) {
      const int row = first + int(threadIdx.x);
      const int64_t at = (q_begin + row) * a.heads + head;
      stats[t % 2 * 2 * kOther + threadIdx.x] = row < nq ? a.lse[at] : 0;
      stats[t % 2 * 2 * kOther + kOther + threadIdx.x] = row < nq ? a.delta[at] : 0;
    }
  };
  Tile<kDim>::template load<kOwn>(k, a.k + span.begin * a.ldk + kv * dim, a.ldk, span.first, span.n, dim, a.vector);
  Tile<kDim>::template load<kOwn>(v, a.v + span.begin * a.ldv + kv * dim, a.ldv, span.first, span.n, dim, a.vector);
  if (turns) load(0);
  cp_commit();
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  for (int t = 0; t < turns; t++) {
    if (t + 1 < turns) load(t + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    const float* stat = stats + t % 2 * 2 * kOther;
    float s[kOther / 8][4], dp[kOther / 8][4];
    scores<kDim, kOther>(s, own_rows<kDim>(k), q + t % 2 * kTile);
    scores<kDim, kOther>(dp, own_rows<kDim>(v), d_o + t % 2 * kTile);
#pragma unroll
    for (int j = 0; j < kOther / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = col_of(j, i);
        const int row = (from + t % tiles) * kOther + c, key = own + row_of(i);
        const bool visible = row < nq && key < nk && (!a.causal || key <= row + shift);
        weigh(s[j][i], dp[j][i], visible, a.scale_log2, stat[c], stat[kOther + c]);
      }
    if constexpr (kAddsQ) put_tile<kOther>(ds, dp);
    add_rows<kDim, kOther>(dv, s, d_o + t % 2 * kTile);
    add_rows<kDim, kOther>(dk, dp, q + t % 2 * kTile);
    if constexpr (kAddsQ) {
      __syncthreads();
      const int first = (from + t % tiles) * kOther, head = kv * group + t / tiles;
      add_dq<kDim, kOther>(dq_sum + ((q_begin + first) * a.heads + head) * dim, int(a.heads) * dim, nq - first, dim, ds,
                           k);
    }
    __syncthreads();
  }
  cp_wait<0>();
  __syncthreads();
  const float factor[2] = {a.scale, a.scale}, one[2] = {1, 1};
  store_rows<kDim>(a.dk + span.begin * a.ldk + kv * dim, a.ldk, span.first, span.n, dim, a.vector, dk, factor, nullptr);
  store_rows<kDim>(a.dv + span.begin * a.ldv + kv * dim, a.ldv, span.first, span.n, dim, a.vector, dv, one, nullptr);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) flash_dkv(Flash a) {
  own_keys<kDim, false>(a, nullptr);
}
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) flash_dkv_dq(Flash a, float* dq_sum) {
  own_keys<kDim, true>(a, dq_sum);
}

// ---- the host's side --------------------------------------------------------------------------------
int64_t delta_bytes(const AgAttention* a) { return div_up(a->q_tokens * a->heads * int64_t(sizeof(float)), 64) * 64; }
bool adds_dq(const AgAttention* a) { return a->dt == AG_BF16 && !deterministic(); }

template <int kDim, bool kAddsQ>
AgStatus run_dkv(AgCtx* ctx, const AgAttention* a, const Flash& f, float* dq_sum) {
  constexpr int kOther = kQueryRows<kDim>;
  const size_t ds = kAddsQ ? size_t(Tile<kOther>::bytes(kOwn)) : 0;
  const size_t shared = size_t(Tile<kDim>::bytes(2 * kOwn + 4 * kOther)) + 4 * kOther * sizeof(float) + ds;
  const dim3 keys = a->k_tokens ? tile_grid(a->k_tokens, a->batch, a->kv_heads) : dim3(0);
  if constexpr (kAddsQ)
    return launch(ctx, "attention", flash_dkv_dq<kDim>, keys, kThreads, shared, f, dq_sum);
  else
    return launch(ctx, "attention", flash_dkv<kDim>, keys, kThreads, shared, f);
}

AgStatus grad_in_order(AgCtx* ctx, const AgAttention* a, const Flash& f) {
  return with_dim(a->dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    const dim3 queries = a->q_tokens ? tile_grid(a->q_tokens, a->batch, a->heads) : dim3(0);
    const size_t shared = size_t(Tile<kDim>::bytes(2 * kOwn + 4 * kOtherRows<kDim>));
    const AgStatus status = launch(ctx, "attention", flash_dq<kDim>, queries, kThreads, shared, f);
    return status == AG_OK ? run_dkv<kDim, false>(ctx, a, f, nullptr) : status;
  });
}

AgStatus grad_with_atomics(AgCtx* ctx, const AgAttention* a, const Flash& f) {
  float* sum = reinterpret_cast<float*>(static_cast<char*>(ctx->workspace) + delta_bytes(a));
  const int64_t width = a->heads * a->dim, n = a->q_tokens * width;
  const AgFill zero{sum, AG_F32, n, 0};
  AgStatus status = fill(ctx, &zero);
  if (status != AG_OK) return status;
  status = with_dim(a->dim, [&](auto columns) { return run_dkv<decltype(columns)::value, true>(ctx, a, f, sum); });
  if (status != AG_OK) return status;
  return launch(ctx, "attention", finish_dq, grid_for(n, kThreads), kThreads, 0, f.dq, sum, a->q_tokens, width, a->ldq,
                f.scale);
}

}  // namespace

AgStatus attention_grad(AgCtx* ctx, const AgAttentionGrad* grad) {
  const AgAttention* a = &grad->forward;
  AgStatus status = check_arguments(ctx, "attention", a->dim, a->scale);
  if (status != AG_OK) return status;
  float* delta = static_cast<float*>(ctx->workspace);
  status = with_float(ctx, "attention", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t rows = a->q_tokens * a->heads;
    return launch(ctx, "attention", delta_kernel<T>, dim3(unsigned(div_up(rows, kThreads / 32))), kThreads, 0, delta,
                  static_cast<const T*>(a->o), static_cast<const T*>(grad->d_o), a->ldo, rows, a->heads, a->dim);
  });
  if (status != AG_OK) return status;
  if (a->dt == AG_F32) return attention_grad_f32(ctx, grad, delta);
  const Flash f = flash_of(grad, delta);
  return adds_dq(a) ? grad_with_atomics(ctx, a, f) : grad_in_order(ctx, a, f);
}
int64_t attention_grad_workspace(const AgAttentionGrad* grad) {
  const AgAttention* a = &grad->forward;
  return delta_bytes(a) + (adds_dq(a) ? a->q_tokens * a->heads * a->dim * int64_t(sizeof(float)) : 0);
}

}  // namespace gpu

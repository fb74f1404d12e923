// Attention over packed sequences in bf16 on the tensor cores, without a matrix of scores. f32: attention_cached.cu forward,
// attention_f32.cu backward.
//
// A block owns 64 rows, 16 for each of its 4 warps, and walks over the rows of the other side in tiles that cp.async brings in
// two stages. Forward and dQ own queries, dK and dV own keys: then scores are transposed, and nothing is ever added by two blocks.
#include "attention.h"

namespace gpu {
namespace {

constexpr int kThreads = 128, kOwn = 64;

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

// A tile in shared memory: rows of kDim numbers and 16 bytes more, so that the 8 rows of an ldmatrix lie in different banks.
template <int kDim>
struct Tile {
  static constexpr int kPitch = kDim + 8;
  static constexpr int bytes(int rows) { return rows * kPitch * 2; }
  // Rows first.. of a matrix with `n` rows of `dim` numbers; zeros behind both ends.
  template <int kRows>
  __device__ static void load(bf16* to, const bf16* from, int64_t ld, int64_t first, int64_t n, int dim, bool vector) {
    for (int i = int(threadIdx.x); i < kRows * (kDim / 8); i += kThreads) {
      const int r = i / (kDim / 8), c = i % (kDim / 8) * 8;
      const bool inside = first + r < n;
      const bf16* row = from + (inside ? first + r : 0) * ld;
      if (vector) {
        cp_async16(to + r * kPitch + c, row + (c < dim ? c : 0), inside && c < dim);
        continue;
      }
      for (int j = 0; j < 8; j++) to[r * kPitch + c + j] = inside && c + j < dim ? row[c + j] : from_float<bf16>(0);
    }
  }
  // 16 rows x 16 numbers as the left operand.
  __device__ static void left(uint32_t* a, const bf16* tile, int row, int col) {
    const int lane = int(threadIdx.x) % 32;
    ldsm_x4(a, tile + (row + lane % 16) * kPitch + col + lane / 16 * 8);
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

// c[16][kCols] = own rows x other rows^T over kDim.
template <int kDim, int kCols>
__device__ __forceinline__ void scores(float (&c)[kCols / 8][4], const bf16* own, const bf16* other) {
  const int row = int(threadIdx.x) / 32 * 16;
#pragma unroll
  for (int j = 0; j < kCols / 8; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a[4], b[4];
    Tile<kDim>::left(a, own, row, k);
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
__device__ __forceinline__ int row_of(int i) { return int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int col_of(int j, int i) { return j * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }

// The block's rows times `factor` to rows first.. of a matrix of n rows.
template <int kDim>
__device__ __forceinline__ void store_rows(bf16* to, int64_t ld, int64_t first, int64_t n, int dim, bool vector,
                                           const float (&x)[kDim / 8][4], const float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = first + row_of(half * 2);
    if (row >= n) continue;
#pragma unroll
    for (int j = 0; j < kDim / 8; j++) {
      const int c = col_of(j, 0);
      const float low = x[j][half * 2] * factor[half], high = x[j][half * 2 + 1] * factor[half];
      if (vector && c < dim) {
        *reinterpret_cast<uint32_t*>(to + row * ld + c) = pack_bf16(low, high);
      } else {
        if (c < dim) to[row * ld + c] = from_float<bf16>(low);
        if (c + 1 < dim) to[row * ld + c + 1] = from_float<bf16>(high);
      }
    }
  }
}

// ---- forward ----------------------------------------------------------------------------------------
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
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 96 ? 3 : 2) flash_forward(Flash a) {
  constexpr int kOther = 64, kTile = kOther * Tile<kDim>::kPitch;
  SMEM(raw);
  bf16* q = reinterpret_cast<bf16*>(raw);
  bf16 *k = q + kOwn * Tile<kDim>::kPitch, *v = k + 2 * kTile;  // two stages each
  const Span span = find_tile(a.q_offsets, a.batch, blockIdx.x, kOwn, 1);
  if (span.first >= span.n) return;
  const int64_t head = blockIdx.y, kv = head / (a.heads / a.kv_heads), k_begin = a.k_offsets[span.s];
  const int64_t nk = a.k_offsets[span.s + 1] - k_begin, shift = nk - span.n;
  const int64_t seen = a.causal ? min(nk, span.first + kOwn + shift) : nk;
  const int tiles = seen > 0 ? int(div_up(seen, kOther)) : 0, dim = int(a.dim);
  const bf16 *keys = a.k + k_begin * a.ldk + kv * dim, *values = a.v + k_begin * a.ldv + kv * dim;
  auto load = [&](int t) {
    Tile<kDim>::template load<kOther>(k + t % 2 * kTile, keys, a.ldk, t * kOther, nk, dim, a.vector);
    Tile<kDim>::template load<kOther>(v + t % 2 * kTile, values, a.ldv, t * kOther, nk, dim, a.vector);
  };
  Tile<kDim>::template load<kOwn>(q, a.q + span.begin * a.ldq + head * dim, a.ldq, span.first, span.n, dim, a.vector);
  if (tiles) load(0);
  cp_commit();
  Softmax<kOther> softmax;
  float o[kDim / 8][4] = {};
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load(t + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    float s[kOther / 8][4], keep[2];
    scores<kDim, kOther>(s, q, k + t % 2 * kTile);
    const int64_t first = int64_t(t) * kOther;
    if (first + kOther > nk || (a.causal && first + kOther > span.first + shift + 1)) {
#pragma unroll
      for (int j = 0; j < kOther / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int64_t key = first + col_of(j, i);
          if (key >= nk || (a.causal && key > span.first + row_of(i) + shift)) s[j][i] = -INFINITY;
        }
    }
    softmax.next(s, a.scale_log2, keep);
#pragma unroll
    for (int j = 0; j < kDim / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[j][i] *= keep[i / 2];
    add_rows<kDim, kOther>(o, s, v + t % 2 * kTile);
    __syncthreads();  // the stage is free for the load of the next turn
  }
  cp_wait<0>();
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    inverse[half] = total == 0 ? 0 : 1 / total;
    const int64_t row = span.first + row_of(half * 2);
    if (a.lse && threadIdx.x % 4 == 0 && row < span.n)
      a.lse[(span.begin + row) * a.heads + head] =
          total == 0 ? -INFINITY : (softmax.top[half] * a.scale_log2 + log2f(total)) * kLn2;
  }
  store_rows<kDim>(a.o + span.begin * a.ldo + head * dim, a.ldo, span.first, span.n, dim, a.vector, o, inverse);
}

// ---- backward ---------------------------------------------------------------------------------------
// delta = rowsum(dO * O), a warp for each token and head.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(float* delta, const T* o, const T* d_o, int64_t ld, int64_t rows, int64_t heads,
                                                         int64_t dim) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t at = row / heads * ld + row % heads * dim;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32) sum += to_float(o[at + i]) * to_float(d_o[at + i]);
  sum = warp_reduce<Add>(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// s: scores, dp: dO V^T. They become weights and gradients of the scores without the scale, which the sum receives at the end.
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
    Tile<kDim>::template load<kOther>(k + t % 2 * kTile, a.k + k_begin * a.ldk + kv * dim, a.ldk, t * kOther, nk, dim, a.vector);
    Tile<kDim>::template load<kOther>(v + t % 2 * kTile, a.v + k_begin * a.ldv + kv * dim, a.ldv, t * kOther, nk, dim, a.vector);
  };
  Tile<kDim>::template load<kOwn>(q, a.q + span.begin * a.ldq + head * dim, a.ldq, span.first, span.n, dim, a.vector);
  Tile<kDim>::template load<kOwn>(d_o, a.d_o + span.begin * a.ldo + head * dim, a.ldo, span.first, span.n, dim, a.vector);
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
    scores<kDim, kOther>(s, q, k + t % 2 * kTile);
    scores<kDim, kOther>(dp, d_o, v + t % 2 * kTile);
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
  const float factor[2] = {a.scale, a.scale};
  store_rows<kDim>(a.dq + span.begin * a.ldq + head * dim, a.ldq, span.first, span.n, dim, a.vector, sum, factor);
}

// dK and dV: owns keys, walks over the queries of every head of the group.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) flash_dkv(Flash a) {
  constexpr int kOther = kQueryRows<kDim>, kTile = kOther * Tile<kDim>::kPitch;
  SMEM(raw);
  bf16* k = reinterpret_cast<bf16*>(raw);
  bf16 *v = k + kOwn * Tile<kDim>::kPitch, *q = v + kOwn * Tile<kDim>::kPitch, *d_o = q + 2 * kTile;
  float* stats = reinterpret_cast<float*>(d_o + 2 * kTile);  // two stages of lse and delta
  const Span span = find_tile(a.k_offsets, a.batch, blockIdx.x, kOwn, 1);
  if (span.first >= span.n) return;
  const int64_t kv = blockIdx.y, group = a.heads / a.kv_heads, q_begin = a.q_offsets[span.s];
  const int64_t nq = a.q_offsets[span.s + 1] - q_begin, shift = span.n - nq;
  const int64_t from = a.causal ? max(span.first - shift, int64_t(0)) / kOther : 0;  // the first tile that sees a key of the block
  const int tiles = int(max(div_up(nq, kOther) - from, int64_t(0))), turns = tiles * int(group), dim = int(a.dim);
  auto load = [&](int t) {
    const int64_t head = kv * group + t / tiles, first = (from + t % tiles) * kOther;
    const bf16 *queries = a.q + q_begin * a.ldq + head * dim, *grads = a.d_o + q_begin * a.ldo + head * dim;
    Tile<kDim>::template load<kOther>(q + t % 2 * kTile, queries, a.ldq, first, nq, dim, a.vector);
    Tile<kDim>::template load<kOther>(d_o + t % 2 * kTile, grads, a.ldo, first, nq, dim, a.vector);
    if (threadIdx.x < kOther) {
      const int64_t row = first + threadIdx.x, at = (q_begin + row) * a.heads + head;
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
    scores<kDim, kOther>(s, k, q + t % 2 * kTile);
    scores<kDim, kOther>(dp, v, d_o + t % 2 * kTile);
#pragma unroll
    for (int j = 0; j < kOther / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = col_of(j, i);
        const int64_t row = (from + t % tiles) * kOther + c, key = span.first + row_of(i);
        const bool visible = row < nq && key < span.n && (!a.causal || key <= row + shift);
        weigh(s[j][i], dp[j][i], visible, a.scale_log2, stat[c], stat[kOther + c]);
      }
    add_rows<kDim, kOther>(dv, s, d_o + t % 2 * kTile);
    add_rows<kDim, kOther>(dk, dp, q + t % 2 * kTile);
    __syncthreads();
  }
  cp_wait<0>();
  const float factor[2] = {a.scale, a.scale}, one[2] = {1, 1};
  store_rows<kDim>(a.dk + span.begin * a.ldk + kv * dim, a.ldk, span.first, span.n, dim, a.vector, dk, factor);
  store_rows<kDim>(a.dv + span.begin * a.ldv + kv * dim, a.ldv, span.first, span.n, dim, a.vector, dv, one);
}

// ---- the host's side --------------------------------------------------------------------------------
Flash flash_of(const AgAttention* a, float* delta) {
  Flash f{};
  auto in = [](const void* p) { return static_cast<const bf16*>(p); };
  auto out = [](void* p) { return static_cast<bf16*>(p); };
  f.q = in(a->q), f.k = in(a->k), f.v = in(a->v), f.d_o = in(a->d_o);
  f.o = out(a->o), f.dq = out(a->dq), f.dk = out(a->dk), f.dv = out(a->dv);
  f.lse = static_cast<float*>(a->lse), f.delta = delta;
  f.ldq = a->ldq, f.ldk = a->ldk, f.ldv = a->ldv, f.ldo = a->ldo;
  f.q_offsets = a->q_offsets, f.k_offsets = a->k_offsets;
  f.batch = a->batch, f.heads = a->heads, f.kv_heads = a->kv_heads, f.dim = a->dim;
  f.scale = float(a->scale), f.scale_log2 = float(a->scale) * kLog2e, f.causal = a->causal;
  f.vector = (a->dim | a->ldq | a->ldk | a->ldv | a->ldo) % 8 == 0;
  for (const void* p : {a->q, a->k, a->v, a->d_o, static_cast<const void*>(a->o), static_cast<const void*>(a->dq),
                        static_cast<const void*>(a->dk), static_cast<const void*>(a->dv)})
    f.vector = f.vector && aligned16(p);
  return f;
}
// Calls f with the head dim the kernels are compiled for.
template <class F>
AgStatus with_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(Width<64>());
  if (dim <= 80) return f(Width<80>());
  if (dim <= 96) return f(Width<96>());
  return f(Width<128>());
}
dim3 tile_grid(int64_t rows, int64_t batch, int64_t heads) {
  return dim3(unsigned(tile_slots(rows, batch, kOwn)), unsigned(heads));
}

AgStatus forward_f32(AgCtx* ctx, const AgAttention* a) {
  Scan s{};
  s.q = a->q, s.k = a->k, s.v = a->v, s.o = a->o, s.lse = static_cast<float*>(a->lse);
  s.ldq = a->ldq, s.ldk = a->ldk, s.ldv = a->ldv, s.ldo = a->ldo;
  s.q_offsets = a->q_offsets, s.k_offsets = a->k_offsets;
  s.batch = a->batch, s.q_tokens = a->q_tokens, s.heads = a->heads, s.kv_heads = a->kv_heads, s.dim = a->dim;
  s.chunks = 1, s.chunk = a->k_tokens;
  s.scale_log2 = float(a->scale) * kLog2e, s.causal = a->causal;
  return scan(ctx, "attention", AG_F32, s);
}

}  // namespace

AgStatus attention(AgCtx* ctx, const AgAttention* a) {
  AgStatus status = check_arguments(ctx, "attention", a->dim, a->scale);
  if (status != AG_OK) return status;
  if (a->dt == AG_F32) return forward_f32(ctx, a);
  if (a->dt != AG_BF16) return bad_dtype(ctx, "attention", a->dt);
  if (!a->q_tokens) return AG_OK;
  return with_dim(a->dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    return launch(ctx, "attention", flash_forward<kDim>, tile_grid(a->q_tokens, a->batch, a->heads), kThreads,
                  size_t(Tile<kDim>::bytes(kOwn + 4 * 64)), flash_of(a, nullptr));
  });
}
int64_t attention_workspace(const AgAttention*) { return 0; }

AgStatus attention_grad(AgCtx* ctx, const AgAttention* a) {
  AgStatus status = check_arguments(ctx, "attention", a->dim, a->scale);
  if (status != AG_OK) return status;
  float* delta = static_cast<float*>(ctx->workspace);
  status = with_float(ctx, "attention", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t rows = a->q_tokens * a->heads;
    return launch(ctx, "attention", delta_kernel<T>, dim3(unsigned(div_up(rows, kThreads / 32))), kThreads, 0, delta,
                  static_cast<const T*>(a->o), static_cast<const T*>(a->d_o), a->ldo, rows, a->heads, a->dim);
  });
  if (status != AG_OK) return status;
  if (a->dt == AG_F32) return attention_grad_f32(ctx, a, delta);
  const Flash f = flash_of(a, delta);
  return with_dim(a->dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    const size_t shared_dq = size_t(Tile<kDim>::bytes(2 * kOwn + 4 * kOtherRows<kDim>));
    const size_t shared_dkv = size_t(Tile<kDim>::bytes(2 * kOwn + 4 * kQueryRows<kDim>)) + 4 * kQueryRows<kDim> * sizeof(float);
    const dim3 queries = a->q_tokens ? tile_grid(a->q_tokens, a->batch, a->heads) : dim3(0);
    const dim3 keys = a->k_tokens ? tile_grid(a->k_tokens, a->batch, a->kv_heads) : dim3(0);
    const AgStatus done = launch(ctx, "attention", flash_dq<kDim>, queries, kThreads, shared_dq, f);
    return done == AG_OK ? launch(ctx, "attention", flash_dkv<kDim>, keys, kThreads, shared_dkv, f) : done;
  });
}
int64_t attention_grad_workspace(const AgAttention* a) { return a->q_tokens * a->heads * int64_t(sizeof(float)); }

}  // namespace gpu

// Attention in f32, without tensor cores: over packed sequences or the paged cache, and the gradient over packed
// sequences, which has the plan of attention_grad.cu with 32 rows a block and 4 threads a row.
#include "attention.h"

namespace gpu {
namespace {

constexpr int kThreads = 128, kRows = 32, kLanes = kThreads / kRows, kPitch = int(kMaxHeadDim) + 1,
              kEach = kRows / kLanes, kKeys = 32;
constexpr int kCols = int(kMaxHeadDim) / kLanes, kTile = kRows * kPitch, kWeights = kRows * (kRows + 1);

// ---- forward ----------------------------------------------------------------------------------------
// Row `key` of K or V of one sequence and key head.
__device__ __forceinline__ const float* key_row(const Scan& a, const void* base, int64_t ld, int64_t s, int64_t begin,
                                                int64_t kv, int64_t key) {
  const int64_t row = a.block_table ? cache_row(a, s, key) : begin + key;
  return static_cast<const float*>(base) + row * ld + kv * a.dim;
}

// Row r of a sequence and key head is query r / group, head kv * group + r % group, so that a group reads its keys
// once. kRows rows a block, kThreads / kRows threads a row.
template <int kRows>
__global__ void __launch_bounds__(kThreads) scan_kernel(Scan a) {
  constexpr int kLanes = kThreads / kRows, kEach = kKeys / kLanes, kCols = int(kMaxHeadDim) / kLanes;
  SMEM(raw);
  float* q = reinterpret_cast<float*>(raw);
  float *k = q + kRows * kPitch, *v = k + kKeys * kPitch, *p = v + kKeys * kPitch;
  const int64_t group = a.heads / a.kv_heads, kv = blockIdx.y;
  const Span span = find_tile(a.q_offsets, a.batch, blockIdx.x, kRows, group);
  if (span.first >= span.n) return;
  const int r = int(threadIdx.x) / kLanes, c = int(threadIdx.x) % kLanes, dim = int(a.dim);
  const int64_t nq = span.n / group, k_begin = a.kv_len ? 0 : a.k_offsets[span.s];
  const int64_t nk = a.kv_len ? a.kv_len[span.s] : a.k_offsets[span.s + 1] - k_begin;
  const int64_t row = span.first + r, query = row / group, head = kv * group + row % group, token = span.begin + query;
  const int64_t seen = row < span.n ? (a.causal ? query + nk - nq + 1 : nk) : 0;
  const int64_t last_query = min(span.first + kRows, span.n) / group + 1;
  const int64_t size = chunk_size(nk, a.chunks), from = int64_t(blockIdx.z) * size;
  const int64_t to = min(min(nk, from + size), a.causal ? last_query + nk - nq + 1 : nk);
  for (int i = c; i < dim; i += kLanes)
    q[r * kPitch + i] =
        row < span.n ? static_cast<const float*>(a.q)[token * a.ldq + head * dim + i] * a.scale_log2 : 0;
  float top = -INFINITY, total = 0, o[kCols] = {};
  for (int64_t first = from; first < to; first += kKeys) {
    const int n = int(min(to - first, int64_t(kKeys)));
    __syncthreads();  // the tile before is done with
    for (int j = int(threadIdx.x) / 32; j < n; j += kThreads / 32) {
      const float *kr = key_row(a, a.k, a.ldk, span.s, k_begin, kv, first + j),
                  *vr = key_row(a, a.v, a.ldv, span.s, k_begin, kv, first + j);
      for (int i = int(threadIdx.x) % 32; i < dim; i += 32) k[j * kPitch + i] = kr[i], v[j * kPitch + i] = vr[i];
    }
    __syncthreads();
    float s[kEach], tile_top = top;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int j = c + e * kLanes;
      s[e] = -INFINITY;
      if (j < n && first + j < seen) {
        float sum = 0;
        for (int i = 0; i < dim; i++) sum += q[r * kPitch + i] * k[j * kPitch + i];
        s[e] = sum;
      }
      tile_top = fmaxf(tile_top, s[e]);
    }
#pragma unroll
    for (int bits = kLanes / 2; bits; bits >>= 1) tile_top = fmaxf(tile_top, __shfl_xor_sync(~0u, tile_top, bits));
    const float base = tile_top == -INFINITY ? 0 : tile_top, keep = exp2f(top - base);
    top = tile_top;
    total *= keep;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const float x = exp2f(s[e] - base);
      total += x;
      p[r * (kKeys + 1) + c + e * kLanes] = x;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCols; i++) o[i] *= keep;
    for (int j = 0; j < n; j++) {
      const float x = p[r * (kKeys + 1) + j];
#pragma unroll
      for (int i = 0; i < kCols; i++)
        if (c + i * kLanes < dim) o[i] += x * v[j * kPitch + c + i * kLanes];
    }
  }
#pragma unroll
  for (int bits = kLanes / 2; bits; bits >>= 1) total += __shfl_xor_sync(~0u, total, bits);
  if (row >= span.n) return;
  if (a.chunks > 1) {
    const Part part = part_of(a, token, head);
    if (c == 0) part.stats[0] = top, part.stats[1] = total;
#pragma unroll
    for (int i = 0; i < kCols; i++)
      if (c + i * kLanes < dim) part.sum[c + i * kLanes] = o[i];
    return;
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  if (a.lse && c == 0) a.lse[token * a.heads + head] = total == 0 ? -INFINITY : (top + log2f(total)) * kLn2;
#pragma unroll
  for (int i = 0; i < kCols; i++)
    if (c + i * kLanes < dim) static_cast<float*>(a.o)[token * a.ldo + head * dim + c + i * kLanes] = o[i] * inverse;
}

template <int kRows>
AgStatus scan_rows(AgCtx* ctx, const char* op, const Scan& a) {
  const size_t shared = sizeof(float) * (kRows * (kPitch + kKeys + 1) + 2 * kKeys * kPitch);
  const int64_t slots = tile_slots(a.q_tokens * (a.heads / a.kv_heads), a.batch, kRows);
  return launch(ctx, op, scan_kernel<kRows>, dim3(unsigned(slots), unsigned(a.kv_heads), unsigned(a.chunks)), kThreads,
                shared, a);
}

// ---- gradient ---------------------------------------------------------------------------------------
struct Grad {
  const float *q, *k, *v, *d_o, *lse, *delta;
  float *dq, *dk, *dv;
  int64_t ldq, ldk, ldv, ldo;
  const int32_t *q_offsets, *k_offsets;
  int64_t batch, heads, kv_heads, dim;
  float scale;
  int32_t causal;
};

__device__ void load_rows(float* to, const float* from, int64_t ld, int64_t first, int64_t n, int dim) {
  for (int r = int(threadIdx.x) / 32; r < kRows; r += kThreads / 32)
    for (int i = int(threadIdx.x) % 32; i < dim; i += 32)
      to[r * kPitch + i] = first + r < n ? from[(first + r) * ld + i] : 0;
}
__device__ float dot(const float* x, const float* y, int dim) {
  float sum = 0;
  for (int i = 0; i < dim; i++) sum += x[i] * y[i];
  return sum;
}
__device__ void put_row(float* to, const float (&x)[kCols], float factor, int lane, int dim) {
#pragma unroll
  for (int i = 0; i < kCols; i++)
    if (lane + i * kLanes < dim) to[lane + i * kLanes] = x[i] * factor;
}

// own_keys: the block owns keys and walks over the queries of a group, for dK and dV; else the reverse, for dQ.
template <bool own_keys>
__global__ void __launch_bounds__(kThreads) grad_kernel(Grad a) {
  SMEM(raw);
  float* own_first = reinterpret_cast<float*>(raw);  // k or q, then v or dO; q or k, then dO or v
  float *own_second = own_first + kTile, *first = own_second + kTile, *second = first + kTile;
  float *weights = second + kTile, *grads = weights + kWeights;
  const Span span = find_tile(own_keys ? a.k_offsets : a.q_offsets, a.batch, blockIdx.x, kRows, 1);
  if (span.first >= span.n) return;
  const int r = int(threadIdx.x) / kLanes, c = int(threadIdx.x) % kLanes, dim = int(a.dim);
  const int64_t group = a.heads / a.kv_heads, kv = own_keys ? blockIdx.y : blockIdx.y / group;
  const int64_t q0 = a.q_offsets[span.s], k0 = a.k_offsets[span.s], nq = a.q_offsets[span.s + 1] - q0,
                nk = a.k_offsets[span.s + 1] - k0;
  const float *k = a.k + k0 * a.ldk + kv * dim, *v = a.v + k0 * a.ldv + kv * dim;
  const int64_t others = own_keys ? nq : nk, own = span.first + r;
  float sum_first[kCols] = {}, sum_second[kCols] = {};
  for (int64_t head = own_keys ? kv * group : blockIdx.y, end = own_keys ? head + group : head + 1; head < end;
       head++) {
    const float *q = a.q + q0 * a.ldq + head * dim, *d_o = a.d_o + q0 * a.ldo + head * dim;
    for (int64_t at = 0; at < others; at += kRows) {
      __syncthreads();  // the tile before is done with
      load_rows(own_first, own_keys ? k : q, own_keys ? a.ldk : a.ldq, span.first, span.n, dim);
      load_rows(own_second, own_keys ? v : d_o, own_keys ? a.ldv : a.ldo, span.first, span.n, dim);
      load_rows(first, own_keys ? q : k, own_keys ? a.ldq : a.ldk, at, others, dim);
      load_rows(second, own_keys ? d_o : v, own_keys ? a.ldo : a.ldv, at, others, dim);
      __syncthreads();
      for (int e = 0; e < kEach; e++) {
        const int j = c + e * kLanes;
        const int64_t query = own_keys ? at + j : own, key = own_keys ? own : at + j;
        float w = 0, d = 0;
        if (query < nq && key < nk && (!a.causal || key <= query + nk - nq)) {
          const int64_t stat = (q0 + query) * a.heads + head;
          w = expf(dot(own_first + r * kPitch, first + j * kPitch, dim) * a.scale - a.lse[stat]);
          d = w * (dot(own_second + r * kPitch, second + j * kPitch, dim) - a.delta[stat]);
        }
        weights[r * (kRows + 1) + j] = w;
        grads[r * (kRows + 1) + j] = d;
      }
      __syncwarp();
      for (int j = 0; j < kRows; j++) {
        const float w = weights[r * (kRows + 1) + j], d = grads[r * (kRows + 1) + j];
#pragma unroll
        for (int i = 0; i < kCols; i++) {
          if (c + i * kLanes >= dim) continue;
          sum_first[i] += d * first[j * kPitch + c + i * kLanes];
          if (own_keys) sum_second[i] += w * second[j * kPitch + c + i * kLanes];
        }
      }
    }
  }
  if (own >= span.n) return;
  if (own_keys) {
    put_row(a.dk + (k0 + own) * a.ldk + kv * dim, sum_first, a.scale, c, dim);
    put_row(a.dv + (k0 + own) * a.ldv + kv * dim, sum_second, 1, c, dim);
  } else {
    put_row(a.dq + (q0 + own) * a.ldq + int64_t(blockIdx.y) * dim, sum_first, a.scale, c, dim);
  }
}

}  // namespace

AgStatus scan_f32(AgCtx* ctx, const char* op, const Scan& a) {
  if (!a.q_tokens) return AG_OK;
  const bool few = a.q_tokens * (a.heads / a.kv_heads) <= 8 * a.batch;
  return few ? scan_rows<4>(ctx, op, a) : scan_rows<32>(ctx, op, a);
}

AgStatus attention_grad_f32(AgCtx* ctx, const AgAttentionGrad* grad, const float* delta) {
  const AgAttention* a = &grad->forward;
  auto in = [](const void* p) { return static_cast<const float*>(p); };
  auto out = [](void* p) { return static_cast<float*>(p); };
  const Grad g{in(a->q),      in(a->k),      in(a->v), in(grad->d_o), in(a->lse), delta,           out(grad->dq),
               out(grad->dk), out(grad->dv), a->ldq,   a->ldk,        a->ldv,     a->ldo,          a->q_offsets,
               a->k_offsets,  a->batch,      a->heads, a->kv_heads,   a->dim,     float(a->scale), a->causal};
  const size_t shared = sizeof(float) * (4 * kTile + 2 * kWeights);
  auto grid = [&](int64_t rows, int64_t heads) {
    return rows ? dim3(unsigned(tile_slots(rows, a->batch, kRows)), unsigned(heads)) : dim3(0);
  };
  const AgStatus status =
      launch(ctx, "attention", grad_kernel<false>, grid(a->q_tokens, a->heads), kThreads, shared, g);
  if (status != AG_OK) return status;
  return launch(ctx, "attention", grad_kernel<true>, grid(a->k_tokens, a->kv_heads), kThreads, shared, g);
}

}  // namespace gpu

// Attention in f32 arithmetic: against the paged cache, split over the keys, and for f32 tensors.
#include "attention.h"

namespace gpu {
namespace {

constexpr int kThreads = 128, kKeys = 32, kPitch = int(kMaxHeadDim) + 1;  // odd: rows lie in different banks

// Row `key` of K or V of one sequence and key head.
template <class T>
__device__ __forceinline__ const T* key_row(const Scan& a, const void* base, int64_t ld, int64_t s, int64_t begin, int64_t kv, int64_t key) {
  int64_t row = begin + key;
  if (a.block_table) row = int64_t(a.block_table[s * a.max_blocks + key / a.block_size]) * a.block_size + key % a.block_size;
  return static_cast<const T*>(base) + row * ld + kv * a.dim;
}

// Row r of a sequence and key head is query r / group, head kv * group + r % group, so that a group reads its keys once.
// kRows rows a block, kThreads / kRows threads a row.
template <class T, int kRows>
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
  const int64_t from = int64_t(blockIdx.z) * a.chunk;
  const int64_t to = min(min(nk, from + a.chunk), a.causal ? last_query + nk - nq + 1 : nk);
  for (int i = c; i < dim; i += kLanes)
    q[r * kPitch + i] = row < span.n ? to_float(static_cast<const T*>(a.q)[token * a.ldq + head * dim + i]) * a.scale_log2 : 0;
  float top = -INFINITY, total = 0, o[kCols] = {};
  for (int64_t first = from; first < to; first += kKeys) {
    const int n = int(min(to - first, int64_t(kKeys)));
    __syncthreads();  // the tile before is done with
    for (int j = int(threadIdx.x) / 32; j < n; j += kThreads / 32) {
      const T *kr = key_row<T>(a, a.k, a.ldk, span.s, k_begin, kv, first + j), *vr = key_row<T>(a, a.v, a.ldv, span.s, k_begin, kv, first + j);
      for (int i = int(threadIdx.x) % 32; i < dim; i += 32) k[j * kPitch + i] = to_float(kr[i]), v[j * kPitch + i] = to_float(vr[i]);
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
    float* part = a.part + ((blockIdx.z * a.q_tokens + token) * a.heads + head) * (dim + 2);
    if (c == 0) part[0] = top, part[1] = total;
#pragma unroll
    for (int i = 0; i < kCols; i++)
      if (c + i * kLanes < dim) part[2 + c + i * kLanes] = o[i];
    return;
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  if (a.lse && c == 0) a.lse[token * a.heads + head] = total == 0 ? -INFINITY : (top + log2f(total)) * kLn2;
#pragma unroll
  for (int i = 0; i < kCols; i++)
    if (c + i * kLanes < dim) static_cast<T*>(a.o)[token * a.ldo + head * dim + c + i * kLanes] = from_float<T>(o[i] * inverse);
}

// Puts the chunks of a token and head together in the order of the keys; a warp for each.
template <class T>
__global__ void __launch_bounds__(kThreads) scan_combine(Scan a) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t per = a.dim + 2, rows = a.q_tokens * a.heads;
  if (row >= rows) return;
  float top = -INFINITY, total = 0, o[kMaxHeadDim / 32] = {};
  for (int64_t c = 0; c < a.chunks; c++) top = fmaxf(top, a.part[(c * rows + row) * per]);
  for (int64_t c = 0; c < a.chunks; c++) {
    const float* part = a.part + (c * rows + row) * per;
    if (part[1] == 0) continue;
    const float weight = exp2f(part[0] - top);
    total += weight * part[1];
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 32; i++)
      if (lane + i * 32 < a.dim) o[i] += weight * part[2 + lane + i * 32];
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  T* to = static_cast<T*>(a.o) + row / a.heads * a.ldo + row % a.heads * a.dim;
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / 32; i++)
    if (lane + i * 32 < a.dim) to[lane + i * 32] = from_float<T>(o[i] * inverse);
}

template <class T, int kRows>
AgStatus scan_rows(AgCtx* ctx, const char* op, const Scan& a) {
  const size_t shared = sizeof(float) * (kRows * (kPitch + kKeys + 1) + 2 * kKeys * kPitch);
  const int64_t slots = tile_slots(a.q_tokens * (a.heads / a.kv_heads), a.batch, kRows);
  return launch(ctx, op, scan_kernel<T, kRows>, dim3(unsigned(slots), unsigned(a.kv_heads), unsigned(a.chunks)), kThreads, shared, a);
}

// Chunks of the keys, by the shape alone: enough blocks for the device, and at least 128 keys each.
int64_t chunk_count(const AgAttentionCached* a) {
  const int64_t longest = a->max_blocks * a->block_size, pairs = a->kv_heads * (a->batch > 0 ? a->batch : 1);
  const int64_t wanted = div_up(4 * int64_t(device().processors), pairs), most = div_up(longest, 128);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace

AgStatus scan(AgCtx* ctx, const char* op, AgDtype dt, const Scan& a) {
  if (!a.q_tokens) return AG_OK;
  return with_float(ctx, op, dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const bool few = a.q_tokens * (a.heads / a.kv_heads) <= 8 * a.batch;
    AgStatus status = few ? scan_rows<T, 4>(ctx, op, a) : scan_rows<T, 32>(ctx, op, a);
    if (status != AG_OK || a.chunks == 1) return status;
    return launch(ctx, op, scan_combine<T>, dim3(unsigned(div_up(a.q_tokens * a.heads, kThreads / 32))), kThreads, 0, a);
  });
}

AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached* a) {
  const AgStatus status = check_arguments(ctx, "attention_cached", a->dim, a->scale);
  if (status != AG_OK) return status;
  const int64_t chunks = chunk_count(a), ld = a->kv_heads * a->dim;
  Scan s{};
  s.q = a->q, s.k = a->k_cache, s.v = a->v_cache, s.o = a->o;
  s.ldq = a->ldq, s.ldk = s.ldv = ld, s.ldo = a->ldo;
  s.q_offsets = a->q_offsets, s.block_table = a->block_table, s.kv_len = a->kv_len;
  s.max_blocks = a->max_blocks, s.block_size = a->block_size;
  s.batch = a->batch, s.q_tokens = a->q_tokens, s.heads = a->heads, s.kv_heads = a->kv_heads, s.dim = a->dim;
  s.chunks = chunks, s.chunk = div_up(a->max_blocks * a->block_size, chunks);
  s.part = static_cast<float*>(ctx->workspace);
  s.scale_log2 = float(a->scale) * kLog2e;
  s.causal = 1;
  return scan(ctx, "attention_cached", a->dt, s);
}
int64_t attention_cached_workspace(const AgAttentionCached* a) {
  const int64_t chunks = chunk_count(a);
  return chunks == 1 ? 0 : chunks * a->q_tokens * a->heads * (a->dim + 2) * int64_t(sizeof(float));
}

}  // namespace gpu

// Attention against the paged cache. bf16 runs here on the tensor cores, f32 in attention_f32.cu; the keys of a
// sequence are shared out to as many blocks as fill the device, and what they find is put together in the order of the
// keys.
#include "flash.h"

namespace gpu {
namespace {

// Row r of a sequence and key head is query r / group, head kv * group + r % group, so that a group reads its keys
// once.
//
// kSplit of the block's 4 warps share 16 rows, each with its part of every tile of keys: 4 where a sequence has a few
// rows, as in decoding, else 1. With one row fifteen sixteenths of a product are wasted; the keys still arrive no
// faster than they are used.
template <int kDim, int kSplit>
struct Cached {
  static constexpr int kRows = kOwn / kSplit, kMine = int(kKeyTile) / kSplit,
                       kTile = int(kKeyTile) * Tile<kDim>::kPitch;
  static constexpr int kSumPitch =
      kDim + 8;  // of the warps' sums, which take the place of the tiles: rows in different banks
  static constexpr int kBytes = Tile<kDim>::bytes(kRows + 4 * int(kKeyTile)) + kOwn * 2 * int(sizeof(float));

  struct Row {
    int64_t token, head;
  };
  __device__ static Row row(const Scan& a, const Span& span, int64_t r) {
    const Split at = split(span.first + r, a.heads / a.kv_heads);
    return {span.begin + at.quotient, int64_t(blockIdx.y) * (a.heads / a.kv_heads) + at.rest};
  }
  __device__ static void load_queries(bf16* to, const Scan& a, const Span& span) {
    const bf16* q = static_cast<const bf16*>(a.q);
    Tile<kDim>::template load_rows<kRows>(to, q, int(a.dim), a.vector, [&](int r) -> const bf16* {
      const Row at = row(a, span, r);
      return span.first + r < span.n ? q + at.token * a.ldq + at.head * a.dim : nullptr;
    });
  }
  // Keys first..to of K or V; pages behind `to` are not looked up.
  __device__ static void load_keys(bf16* tile, const void* cache, int64_t ld, const Scan& a, int64_t s, int64_t first,
                                   int64_t to) {
    const bf16* base = static_cast<const bf16*>(cache) + int64_t(blockIdx.y) * a.dim;
    Tile<kDim>::template load_rows<int(kKeyTile)>(
        tile, static_cast<const bf16*>(cache), int(a.dim), a.vector,
        [&](int r) -> const bf16* { return first + r < to ? base + cache_row(a, s, first + r) * ld : nullptr; });
  }
  // The warps' sums o of a block's rows lie in `sums` [kSplit][kRows], with two numbers of each in `stats`: together
  // they are the result, or the chunk's part of it.
  __device__ static void finish(const Scan& a, const Span& span, const float* sums, const float* stats) {
    for (int i = int(threadIdx.x); i < kRows * (kDim / 8); i += kThreads) {
      const int r = i / (kDim / 8), c = i % (kDim / 8) * 8, n = min(int(a.dim) - c, 8);
      if (span.first + r >= span.n || n <= 0) continue;
      float top = -INFINITY, total = 0, sum[8] = {};
      for (int w = 0; w < kSplit; w++) top = fmaxf(top, stats[(w * kRows + r) * 2]);
      for (int w = 0; w < kSplit; w++) {
        const float weight = top == -INFINITY ? 0 : exp2f(stats[(w * kRows + r) * 2] - top);
        total += weight * stats[(w * kRows + r) * 2 + 1];
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += weight * sums[(w * kRows + r) * kSumPitch + c + j];
      }
      const Row at = row(a, span, r);
      if (a.chunks > 1) {
        const Part part = part_of(a, at.token, at.head);
        if (c == 0) part.stats[0] = top, part.stats[1] = total;
        put(part.sum + c, sum, n, a.vector);
      } else {
        const float inverse = total == 0 ? 0 : 1 / total;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] *= inverse;
        put(static_cast<bf16*>(a.o) + at.token * a.ldo + at.head * a.dim + c, sum, n, a.vector);
      }
    }
  }
  template <class T>
  __device__ static void put(T* to, const float (&x)[8], int n, bool vector) {
    if (vector) return store_lanes<8>(to, x);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < n) to[j] = from_float<T>(x[j]);
  }
};

template <int kDim, int kSplit>
__global__ void __launch_bounds__(kThreads, kSplit > 1 || kDim <= 96 ? 3 : 2) cached_kernel(Scan a) {
  typedef Cached<kDim, kSplit> C;
  constexpr int kPitch = Tile<kDim>::kPitch;
  SMEM(raw);
  bf16* q = reinterpret_cast<bf16*>(raw);
  bf16 *k = q + C::kRows * kPitch, *v = k + 2 * C::kTile;  // two stages each
  float *sums = reinterpret_cast<float*>(k), *stats = reinterpret_cast<float*>(v + 2 * C::kTile);
  const int64_t group = a.heads / a.kv_heads;
  const Span span = find_tile(a.q_offsets, a.batch, blockIdx.x, C::kRows, group);
  if (span.first >= span.n) return;
  const int64_t nk = a.kv_len[span.s], shift = nk - span.n / group;
  const int64_t size = chunk_size(nk, a.chunks), from = int64_t(blockIdx.z) * size;
  const int64_t last_query = (min(span.first + C::kRows, span.n) - 1) / group,
                to = min(min(nk, from + size), last_query + shift + 1);
  const int tiles = to > from ? int(div_up(to - from, kKeyTile)) : 0;
  const int warp = int(threadIdx.x) / 32, row0 = warp / kSplit * 16, mine = warp % kSplit * C::kMine;
  auto load = [&](int t) {
    C::load_keys(k + t % 2 * C::kTile, a.k, a.ldk, a, span.s, from + t * kKeyTile, to);
    C::load_keys(v + t % 2 * C::kTile, a.v, a.ldv, a, span.s, from + t * kKeyTile, to);
  };
  C::load_queries(q, a, span);
  if (tiles) load(0);
  cp_commit();
  int64_t seen[2];  // keys that the lane's two rows see
#pragma unroll
  for (int half = 0; half < 2; half++)
    seen[half] = min(to, split(span.first + row0 + int(threadIdx.x) % 32 / 4 + half * 8, group).quotient + shift + 1);
  Softmax<C::kMine> softmax;
  float o[kDim / 8][4] = {};
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load(t + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    float s[C::kMine / 8][4], keep[2];
    scores<kDim, C::kMine>(s, q + row0 * kPitch, k + t % 2 * C::kTile + mine * kPitch);
#pragma unroll
    for (int j = 0; j < C::kMine / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (from + t * kKeyTile + mine + col_of(j, i) >= seen[i / 2]) s[j][i] = -INFINITY;
    softmax.next(s, a.scale_log2, keep);
#pragma unroll
    for (int j = 0; j < kDim / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[j][i] *= keep[i / 2];
    add_rows<kDim, C::kMine>(o, s, v + t % 2 * C::kTile + mine * kPitch);
    __syncthreads();  // the stage is free for the load of the next turn, or all tiles for the sums
  }
  cp_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = warp % kSplit * C::kRows + row0 + int(threadIdx.x) % 32 / 4 + half * 8;
    const float total = softmax.sum(half);
    if (threadIdx.x % 4 == 0) stats[row * 2] = softmax.top[half] * a.scale_log2, stats[row * 2 + 1] = total;
#pragma unroll
    for (int j = 0; j < kDim / 8; j++)
      store_lanes<2>(sums + row * C::kSumPitch + col_of(j, 0), {o[j][half * 2], o[j][half * 2 + 1]});
  }
  __syncthreads();
  C::finish(a, span, sums, stats);
}

// Puts the chunks of a token and head together; a warp for each.
template <class T>
__global__ void __launch_bounds__(kThreads) cached_combine(Scan a) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32,
                rows = a.q_tokens * a.heads;
  if (row >= rows) return;
  const float* stats = a.part + a.chunks * rows * a.dim;
  float top = -INFINITY, total = 0, o[kMaxHeadDim / 32] = {};
  for (int64_t c = 0; c < a.chunks; c++) top = fmaxf(top, stats[(c * rows + row) * 2]);
  for (int64_t c = 0; c < a.chunks; c++) {
    const float *stat = stats + (c * rows + row) * 2, *sum = a.part + (c * rows + row) * a.dim;
    if (stat[1] == 0) continue;
    const float weight = exp2f(stat[0] - top);
    total += weight * stat[1];
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 32; i++)
      if (lane + i * 32 < a.dim) o[i] += weight * sum[lane + i * 32];
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  T* to = static_cast<T*>(a.o) + row / a.heads * a.ldo + row % a.heads * a.dim;
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / 32; i++)
    if (lane + i * 32 < a.dim) to[lane + i * 32] = from_float<T>(o[i] * inverse);
}

// ---- the host's side --------------------------------------------------------------------------------
bool few_rows(const AgAttentionCached* a) { return a->q_tokens * (a->heads / a->kv_heads) <= 16 * a->batch; }

// Chunks of the keys, by the shape alone: at most three blocks for each processor, so that all run at once where three
// fit, and at least one tile each when the cache is full.
int64_t chunk_count(const AgAttentionCached* a) {
  const int64_t slots = few_rows(a) ? a->batch : tile_slots(a->q_tokens * (a->heads / a->kv_heads), a->batch, kOwn);
  const int64_t wanted = 3 * int64_t(device().processors) / (a->kv_heads * (slots > 0 ? slots : 1));
  const int64_t most = div_up(a->max_blocks * a->block_size, kKeyTile);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

template <int kDim, int kSplit>
AgStatus cached_bf16(AgCtx* ctx, const Scan& a) {
  typedef Cached<kDim, kSplit> C;
  const int64_t slots = tile_slots(a.q_tokens * (a.heads / a.kv_heads), a.batch, C::kRows);
  const dim3 grid(unsigned(slots), unsigned(a.kv_heads), unsigned(a.chunks));
  return launch(ctx, "attention_cached", cached_kernel<kDim, kSplit>, grid, kThreads, size_t(C::kBytes), a);
}

Scan scan_of(AgCtx* ctx, const AgAttentionCached* a) {
  Scan s{};
  s.q = a->q, s.k = a->k_cache, s.v = a->v_cache, s.o = a->o;
  s.ldq = a->ldq, s.ldk = s.ldv = a->kv_heads * a->dim, s.ldo = a->ldo;
  s.q_offsets = a->q_offsets, s.block_table = a->block_table, s.kv_len = a->kv_len;
  s.max_blocks = a->max_blocks, s.block_size = a->block_size;
  s.batch = a->batch, s.q_tokens = a->q_tokens, s.heads = a->heads, s.kv_heads = a->kv_heads, s.dim = a->dim;
  s.chunks = chunk_count(a), s.part = static_cast<float*>(ctx->workspace);
  s.scale_log2 = float(a->scale) * kLog2e, s.causal = 1;
  s.vector = (a->dim | a->ldq | a->ldo) % 8 == 0 && aligned16(a->q) && aligned16(a->k_cache) && aligned16(a->v_cache) &&
             aligned16(a->o);
  return s;
}

}  // namespace

AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached* a) {
  AgStatus status = check_arguments(ctx, "attention_cached", a->dim, a->scale);
  if (status != AG_OK || !a->q_tokens) return status;
  if (a->dt != AG_F32 && a->dt != AG_BF16) return bad_dtype(ctx, "attention_cached", a->dt);
  const Scan s = scan_of(ctx, a);
  if (a->dt == AG_F32)
    status = scan_f32(ctx, "attention_cached", s);
  else
    status = with_dim(a->dim, [&](auto width) {
      constexpr int kDim = decltype(width)::value;
      return few_rows(a) ? cached_bf16<kDim, 4>(ctx, s) : cached_bf16<kDim, 1>(ctx, s);
    });
  if (status != AG_OK || s.chunks == 1) return status;
  return with_float(ctx, "attention_cached", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const dim3 grid(unsigned(div_up(a->q_tokens * a->heads, kThreads / 32)));
    return launch(ctx, "attention_cached", cached_combine<T>, grid, kThreads, 0, s);
  });
}
int64_t attention_cached_workspace(const AgAttentionCached* a) {
  const int64_t chunks = chunk_count(a);
  return chunks == 1 ? 0 : chunks * a->q_tokens * a->heads * (a->dim + 2) * int64_t(sizeof(float));
}

}  // namespace gpu

// What the attention kernels share: how a block finds its sequence, what a query sees, the check of the arguments.
#pragma once
#include "gpu.h"

namespace gpu {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr int64_t kMaxHeadDim = 128;

// Tiles of packed sequences without a host that knows the offsets: sequence s, whose rows begin at a, owns the slots
// from a / size + s on. They are at least as many as its tiles, and rows / size + batch slots are enough for all.
inline int64_t tile_slots(int64_t rows, int64_t batch, int64_t size) { return rows / size + batch; }

struct Span {
  int64_t s, begin, n,
      first;  // sequence, its rows in the packed tensor, first row of the tile; first >= n: an idle slot
};
// `times`: rows for each entry of the packed tensor. The last tile of a sequence comes first: with a causal mask it has
// most to do.
__device__ __forceinline__ Span find_tile(const int32_t* offsets, int64_t batch, int64_t slot, int64_t size,
                                          int64_t times) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t mid = (low + high) / 2;
    (offsets[mid] * times / size + mid <= slot ? low : high) = mid;
  }
  const int64_t begin = offsets[low], n = (offsets[low + 1] - begin) * times, tiles = div_up(n, size);
  const int64_t tile = slot - (begin * times / size + low);
  return {low, begin, n, tile < tiles ? (tiles - 1 - tile) * size : n};
}

// Attention over packed sequences or a paged cache, over all keys or over chunks of them, which are put together
// afterwards.
struct Scan {
  const void *q, *k, *v;
  void* o;
  float* lse;  // or NULL
  int64_t ldq, ldk, ldv, ldo;
  const int32_t *q_offsets, *k_offsets;
  const int32_t *block_table, *kv_len;  // NULL: packed keys
  int64_t max_blocks, block_size;
  int64_t batch, q_tokens, heads, kv_heads, dim;
  int64_t chunks;  // of the keys of a sequence; several go through `part`
  float* part;     // [chunks, q_tokens, heads, dim] sums, then [chunks, q_tokens, heads, 2]: largest score to base 2,
                   // weight of all
  float scale_log2;
  int32_t causal, vector;  // vector: every row begins at a multiple of 16 bytes
};
AgStatus scan_f32(AgCtx* ctx, const char* op, const Scan& a);

// Keys of a chunk when a sequence has nk, in whole tiles of the kernels.
constexpr int64_t kKeyTile = 64;
__device__ __forceinline__ int64_t chunk_size(int64_t nk, int64_t chunks) {
  return max(div_up(div_up(nk, chunks), kKeyTile), int64_t(1)) * kKeyTile;
}
__device__ __forceinline__ int64_t cache_row(const Scan& a, int64_t s, int64_t key) {
  const uint32_t block = uint32_t(key) / uint32_t(a.block_size), rest = uint32_t(key) % uint32_t(a.block_size);
  return int64_t(a.block_table[s * a.max_blocks + block]) * a.block_size + rest;
}
struct Part {
  float *sum, *stats;
};
// Of this block's chunk.
__device__ __forceinline__ Part part_of(const Scan& a, int64_t token, int64_t head) {
  const int64_t rows = a.q_tokens * a.heads, row = blockIdx.z * rows + token * a.heads + head;
  return {a.part + row * a.dim, a.part + a.chunks * rows * a.dim + row * 2};
}

// attention_sm90.cu: attention in bf16 on the warpgroup products of capability 9.0, when ALIGNGPT_ATTENTION=wgmma (read
// once) and the arguments are such that it can.
bool attention_sm90_takes(const AgAttention* a);
AgStatus attention_sm90(AgCtx* ctx, const AgAttention* a);

AgStatus attention_grad_f32(AgCtx* ctx, const AgAttentionGrad* grad, const float* delta);

// The scale is positive: the largest score is then the largest scaled score, so that the kernels scale once, in the
// exponent.
inline AgStatus check_arguments(AgCtx* ctx, const char* op, int64_t dim, double scale) {
  if (!(scale > 0))
    return fail(ctx, AG_UNSUPPORTED, "[%s] scale on a CUDA device: expected a positive number, got %g", op, scale);
  if (dim >= 1 && dim <= kMaxHeadDim) return AG_OK;
  return fail(ctx, AG_UNSUPPORTED, "[%s] head dim on a CUDA device: expected 1 to %lld, got %lld", op,
              (long long)kMaxHeadDim, (long long)dim);
}

}  // namespace gpu

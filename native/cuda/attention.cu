// Attention over packed sequences in bf16 on the tensor cores, without a matrix of scores. f32: attention_f32.cu.
//
// A block owns 64 queries, 16 for each of its 4 warps, and walks over the keys in tiles that cp.async brings in two
// stages.
#include "flash.h"

namespace gpu {
namespace {

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
    scores<kDim, kOther>(s, own_rows<kDim>(q), k + t % 2 * kTile);
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
  __syncthreads();  // without a tile the queries have not been waited for
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = softmax.sum(half);
    inverse[half] = total == 0 ? 0 : 1 / total;
    const int64_t row = span.first + row_of(half * 2);
    if (a.lse && threadIdx.x % 4 == 0 && row < span.n)
      a.lse[(span.begin + row) * a.heads + head] =
          total == 0 ? -INFINITY : (softmax.top[half] * a.scale_log2 + log2f(total)) * kLn2;
  }
  store_rows<kDim>(a.o + span.begin * a.ldo + head * dim, a.ldo, span.first, span.n, dim, a.vector, o, inverse, q);
}

AgStatus forward_f32(AgCtx* ctx, const AgAttention* a) {
  Scan s{};
  s.q = a->q, s.k = a->k, s.v = a->v, s.o = a->o, s.lse = static_cast<float*>(a->lse);
  s.ldq = a->ldq, s.ldk = a->ldk, s.ldv = a->ldv, s.ldo = a->ldo;
  s.q_offsets = a->q_offsets, s.k_offsets = a->k_offsets;
  s.batch = a->batch, s.q_tokens = a->q_tokens, s.heads = a->heads, s.kv_heads = a->kv_heads, s.dim = a->dim;
  s.chunks = 1;
  s.scale_log2 = float(a->scale) * kLog2e, s.causal = a->causal;
  return scan_f32(ctx, "attention", s);
}

}  // namespace

AgStatus attention(AgCtx* ctx, const AgAttention* a) {
  AgStatus status = check_arguments(ctx, "attention", a->dim, a->scale);
  if (status != AG_OK) return status;
  if (a->dt == AG_F32) return forward_f32(ctx, a);
  if (a->dt != AG_BF16) return bad_dtype(ctx, "attention", a->dt);
  if (!a->q_tokens) return AG_OK;
  if (attention_sm90_takes(a)) return attention_sm90(ctx, a);
  return with_dim(a->dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    return launch(ctx, "attention", flash_forward<kDim>, tile_grid(a->q_tokens, a->batch, a->heads), kThreads,
                  size_t(Tile<kDim>::bytes(kOwn + 4 * 64)), flash_of(a));
  });
}
int64_t attention_workspace(const AgAttention*) { return 0; }

}  // namespace gpu

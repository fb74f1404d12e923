// Attention forward for compute capability 9.0: warpgroup products (wgmma) from tiles that the tensor memory
// accelerator (TMA) brings. Compiled for sm_90a only, and off unless ALIGNGPT_ATTENTION=wgmma: no GPU has run it yet.
// The numbers are those of attention.cu.
//
// A block owns 128 queries, 64 for each of two warpgroups that compute; one thread of a third one loads keys and values
// in two stages each. The product of scores of a tile runs while the one of weights and values of the tile before does,
// and the softmax beside that. The plan is FlashAttention-3's (arXiv 2407.08608, algorithm 2) without its barriers
// between the warpgroups.
//
// TMA and not cp.async: one thread gives the addresses, so that the loads take neither registers nor instructions from
// the softmax. It does not see where a sequence ends: rows behind the end are the next sequence's, which the mask gives
// a weight of exactly 0, or zeros behind the tensor. A number that is not finite there would reach this sequence too.
#include <cstdlib>
#include <cstring>

#include "flash.h"
#include "sm90.h"

namespace gpu {
namespace {

constexpr int kQueries = 128, kKeys = 128, kStages = 2, kConsumers = 256, kBlock = kConsumers + 128;

template <int kDim, int kRows>
__device__ __forceinline__ void load_tile(char* to, const CUtensorMap* map, uint64_t* barrier, int head, int row) {
  barrier_expect(barrier, kRows * kDim * 2);
#pragma unroll
  for (int col = 0; col < kDim; col += kPanel)
    tma_load(to + col / kPanel * kRows * kPanelRow, map, barrier, col, head, row);
}

// ---- the kernel -------------------------------------------------------------------------------------
struct Maps {
  CUtensorMap q, k, v;
};

// What a block keeps in shared memory. Tiles are panels of 64 columns, each with all rows.
template <int kDim>
struct Shared {
  char q[kQueries * kDim * 2], k[kStages][kKeys * kDim * 2], v[kStages][kKeys * kDim * 2];
  uint64_t q_full, k_full[kStages], v_full[kStages], k_free[kStages], v_free[kStages], q_free[2];  // of each warpgroup
};

// What a block has to do.
struct Work {
  int head, kv_head, q_row, k_row;  // rows of its first query and of its sequence's first key
  int first, nq, nk, shift, tiles;  // first query within the sequence
};
__device__ __forceinline__ Work work_of(const Flash& a) {
  const Span span = find_tile(a.q_offsets, a.batch, blockIdx.x, kQueries, 1);
  Work w{};
  w.head = int(blockIdx.y), w.kv_head = w.head / int(a.heads / a.kv_heads);
  w.k_row = a.k_offsets[span.s], w.q_row = int(span.begin + span.first);
  w.first = int(span.first), w.nq = int(span.n), w.nk = a.k_offsets[span.s + 1] - w.k_row, w.shift = w.nk - w.nq;
  const int seen = a.causal ? min(w.nk, w.first + kQueries + w.shift) : w.nk;
  w.tiles = seen > 0 ? (seen + kKeys - 1) / kKeys : 0;
  return w;
}

template <int kDim>
__device__ __forceinline__ void produce(Shared<kDim>& s, const Maps& maps, const Work& w) {
  if (w.tiles) load_tile<kDim, kQueries>(s.q, &maps.q, &s.q_full, w.head, w.q_row);
  for (int t = 0; t < w.tiles; t++) {
    const int stage = t % kStages, parity = (t / kStages + 1) % 2, row = w.k_row + t * kKeys;
    barrier_wait(&s.k_free[stage], parity);
    load_tile<kDim, kKeys>(s.k[stage], &maps.k, &s.k_full[stage], w.kv_head, row);
    barrier_wait(&s.v_free[stage], parity);
    load_tile<kDim, kKeys>(s.v[stage], &maps.v, &s.v_full[stage], w.kv_head, row);
  }
}

template <int kDim>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 8][4], Shared<kDim>& shared, int t) {
  const char *q = shared.q + int(threadIdx.x) / 128 * 64 * kPanelRow, *k = shared.k[t % kStages];
  barrier_wait(&shared.k_full[t % kStages], t / kStages % 2);
  hold(s);
  wgmma_begin();
#pragma unroll
  for (int c = 0; c < kDim; c += 16) {
    const int panel = c / kPanel, byte = c % kPanel * 2;
    wgmma_scores(s, matrix(q + panel * kQueries * kPanelRow + byte, 16),
                 matrix(k + panel * kKeys * kPanelRow + byte, 16), c > 0);
  }
  wgmma_commit();
}
template <int kDim>
__device__ __forceinline__ void start_values(float (&o)[kDim / 8][4], uint32_t (&p)[kKeys / 16][4],
                                             Shared<kDim>& shared, int t) {
  barrier_wait(&shared.v_full[t % kStages], t / kStages % 2);
  hold(o);
  hold(p);
  wgmma_begin();
#pragma unroll
  for (int j = 0; j < kKeys / 16; j++)
    wgmma_values(o, p[j], matrix(shared.v[t % kStages] + j * 16 * kPanelRow, kKeys * kPanelRow));
  wgmma_commit();
}
// This warp does not read the stage any more.
__device__ __forceinline__ void give_back(uint64_t* free) {
  if (threadIdx.x % 32 == 0) barrier_arrive(free);
}

// Scores of tile t become weights, and the left operand of the product with the values.
__device__ __forceinline__ void weigh_tile(float (&s)[kKeys / 8][4], Softmax<kKeys>& softmax, float (&keep)[2],
                                           const Flash& a, const Work& w, int t) {
  const int key0 = t * kKeys;
  if (key0 + kKeys > w.nk || (a.causal && key0 + kKeys > w.first + w.shift + 1)) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = key0 + col_of(j, i);
        if (key >= w.nk || (a.causal && key > w.first + row_of(i) + w.shift)) s[j][i] = -INFINITY;
      }
  }
  softmax.next(s, a.scale_log2, keep);
}
__device__ __forceinline__ void pack_weights(uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 8][4]) {
#pragma unroll
  for (int j = 0; j < kKeys / 16; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[j][i] = pack_bf16(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
}

// Sums and log-sum-exps to device memory; the numbers pass through the rows of the queries, which the warpgroup has
// done with.
template <int kDim>
__device__ __forceinline__ void finish(const Flash& a, const Work& w, Shared<kDim>& shared,
                                       const float (&o)[kDim / 8][4], const Softmax<kKeys>& softmax) {
  auto place = [&](int row, int col) {  // swizzled, so that rows lie in different banks
    return shared.q + col / kPanel * kQueries * kPanelRow + row * kPanelRow + (col % kPanel / 8 ^ row % 8) * 16 +
           col % 8 * 2;
  };
  uint64_t* q_free = &shared.q_free[threadIdx.x / 128];
  give_back(q_free);
  barrier_wait(q_free, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row_of(half * 2);
    const float total = softmax.sum(half), inverse = total == 0 ? 0 : 1 / total;
    if (a.lse && threadIdx.x % 4 == 0 && w.first + row < w.nq)
      a.lse[int64_t(w.q_row + row) * a.heads + w.head] =
          total == 0 ? -INFINITY : (softmax.top[half] * a.scale_log2 + log2f(total)) * kLn2;
#pragma unroll
    for (int j = 0; j < kDim / 8; j++)
      *reinterpret_cast<uint32_t*>(place(row, col_of(j, 0))) =
          pack_bf16(o[j][half * 2] * inverse, o[j][half * 2 + 1] * inverse);
  }
  __syncwarp();
  for (int i = int(threadIdx.x) % 32; i < 16 * (kDim / 8); i += 32) {
    const int row = int(threadIdx.x) / 32 * 16 + i / (kDim / 8), col = i % (kDim / 8) * 8;
    if (w.first + row < w.nq)
      store_pack(a.o + int64_t(w.q_row + row) * a.ldo + w.head * kDim + col,
                 load_pack(reinterpret_cast<const bf16*>(place(row, col))));
  }
}

template <int kDim>
__device__ __forceinline__ void consume(const Flash& a, const Work& w, Shared<kDim>& shared) {
  Softmax<kKeys> softmax;
  float o[kDim / 8][4] = {}, s[kKeys / 8][4] = {}, keep[2];
  uint32_t p[kKeys / 16][4];
  if (w.tiles) {
    barrier_wait(&shared.q_full, 0);
    start_scores<kDim>(s, shared, 0);
    wgmma_wait<0>();
    hold(s);
    give_back(&shared.k_free[0]);
    weigh_tile(s, softmax, keep, a, w, 0);
    pack_weights(p, s);
    for (int t = 1; t < w.tiles; t++) {
      start_scores<kDim>(s, shared, t);
      start_values<kDim>(o, p, shared, t - 1);
      wgmma_wait<1>();
      hold(s);
      give_back(&shared.k_free[t % kStages]);
      weigh_tile(s, softmax, keep, a, w, t);
      wgmma_wait<0>();
      hold(o);
      hold(p);
      give_back(&shared.v_free[(t - 1) % kStages]);
#pragma unroll
      for (int j = 0; j < kDim / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[j][i] *= keep[i / 2];
      pack_weights(p, s);
    }
    start_values<kDim>(o, p, shared, w.tiles - 1);
    wgmma_wait<0>();
    hold(o);
  }
  finish<kDim>(a, w, shared, o, softmax);
}

template <int kDim>
__global__ void __launch_bounds__(kBlock, 1) wgmma_forward(Flash a, const __grid_constant__ Maps maps) {
  SMEM(raw);
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(raw);
  const Work w = work_of(a);
  if (w.first >= w.nq) return;
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int i = 0; i < kStages; i++) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.k_free[i], kConsumers / 32);
      barrier_init(&shared.v_free[i], kConsumers / 32);
    }
    for (uint64_t& free : shared.q_free) barrier_init(&free, 4);
    barrier_publish();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x == kConsumers) produce<kDim>(shared, maps, w);
  } else {
    take_registers<240>();
    consume<kDim>(a, w, shared);
  }
}

}  // namespace

bool attention_sm90_takes(const AgAttention* a) {
  static const char* const value = std::getenv("ALIGNGPT_ATTENTION");
  static const bool wanted = value && !std::strcmp(value, "wgmma");
  return wanted && device().architecture == 90 && a->dt == AG_BF16 && (a->dim == 64 || a->dim == 128) && a->q_tokens &&
         a->k_tokens && flash_of(a).vector;
}

AgStatus attention_sm90(AgCtx* ctx, const AgAttention* a) {
  Maps maps;
  if (!encode(&maps.q, a->q, a->q_tokens, a->heads, a->dim, a->ldq, kQueries) ||
      !encode(&maps.k, a->k, a->k_tokens, a->kv_heads, a->dim, a->ldk, kKeys) ||
      !encode(&maps.v, a->v, a->k_tokens, a->kv_heads, a->dim, a->ldv, kKeys))
    return fail(ctx, AG_DEVICE_ERROR,
                "[attention] cuTensorMapEncodeTiled: expected tensor maps of q, k and v, the driver gave none");
  const dim3 grid(unsigned(tile_slots(a->q_tokens, a->batch, kQueries)), unsigned(a->heads));
  const Flash f = flash_of(a);
  if (a->dim == 64) return launch(ctx, "attention", wgmma_forward<64>, grid, kBlock, sizeof(Shared<64>), f, maps);
  return launch(ctx, "attention", wgmma_forward<128>, grid, kBlock, sizeof(Shared<128>), f, maps);
}

}  // namespace gpu

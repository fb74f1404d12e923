// What both directions of alignMix share.
#pragma once
#include "gpu.h"

namespace gpu {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Pieces of scratch at multiples of 256 bytes; without memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += div_up(n * int64_t(sizeof(T)), 256) * 256;
    return p;
  }
};
// The same call with what is left of the scratch.
inline AgCtx behind(const AgCtx* ctx, int64_t used) {
  AgCtx inner = *ctx;
  inner.workspace = static_cast<char*>(ctx->workspace) + used;
  inner.workspace_bytes = ctx->workspace_bytes - used;
  return inner;
}
template <class Args>
AgStatus call(AgCtx* ctx, int64_t used, AgStatus (*op)(AgCtx*, const Args*), const Args& args) {
  AgCtx inner = behind(ctx, used);
  const AgStatus status = op(&inner, &args);
  if (status != AG_OK) memcpy(ctx->error, inner.error, sizeof ctx->error);
  return status;
}

// A grid of a column for each thread, W of them, and `rows` in y.
inline dim3 columns(int64_t cols, int width, int64_t rows) {
  return dim3(unsigned(div_up(cols, kThreads * width)), unsigned(rows));
}
template <int W>
__device__ __forceinline__ int64_t column() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
}

// Where image rows belong, as rows of the sequence.
struct Places {
  const int32_t* image_row;
  int64_t patches;
  __device__ int64_t of(int64_t r) const {
    const Split at = split(r, patches);
    return image_row[at.quotient] + at.rest;
  }
};

// One warp's dot product; every lane gets it.
template <int W, class A, class B>
__device__ __forceinline__ float warp_dot(const A* a, const B* b, int64_t n) {
  float sum = 0;
  for (int64_t i = int64_t(threadIdx.x % 32) * W; i < n; i += 32 * W) {
    float x[W], y[W];
    load_lanes<W>(x, a + i);
    load_lanes<W>(y, b + i);
#pragma unroll
    for (int j = 0; j < W; j++) sum += x[j] * y[j];
  }
  return warp_reduce<Add>(sum);
}

inline bool is_gate(const AgAlignMix* a) { return a->mode == AG_MIX_GATE; }
inline Places places_of(const AgAlignMix* a) { return {a->image_row, a->patches}; }
inline int64_t image_rows(const AgAlignMix* a) { return a->images * a->patches; }

// Rows are whole packs at every place.
inline bool vectors(const AgAlignMix* a) {
  bool all = a->hidden % 8 == 0;
  for (const void* p : {a->embed, a->table, static_cast<const void*>(a->out), static_cast<const void*>(a->mean)})
    all = all && aligned16(p);
  return all;
}

}  // namespace gpu

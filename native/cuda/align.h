// What alignMix and its gradient share: dot products of rows and weighted sums of rows, each with a struct that says which rows;
// where a picture's rows stand; parts of the workspace. Index lists are read on the device: launches depend on sizes only.
#pragma once
#include "activation.h"

namespace gpu {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Where row r of all pictures' rows stands in the sequence.
struct ImageRows {
  const int32_t* first;
  int64_t patches;
  __device__ int64_t of(int64_t r) const {
    const Split at = split(r, patches);
    return first[at.quotient] + at.rest;
  }
};

// ---- dot products: one for each warp ------------------------------------------------------------------
template <int W, class Pairs>
__global__ void __launch_bounds__(kThreads) dot_rows(Pairs pairs, int64_t n, int64_t length) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t mine = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, i = mine < n ? mine : n - 1;
  const auto* a = pairs.left(i);
  const auto* b = pairs.right(i);
  float sum = 0;
  for (int64_t k = int64_t(lane) * W; k < length; k += 32 * W) {
    float x[W], y[W];
    load_lanes<W>(x, a + k);
    load_lanes<W>(y, b + k);
#pragma unroll
    for (int j = 0; j < W; j++) sum += x[j] * y[j];
  }
  sum = warp_reduce<Add>(sum);
  if (lane == 0 && mine < n) pairs.put(i, sum);
}

// ---- weighted sums of rows: sum i, 32 * W columns for each block ---------------------------------------
// Each warp takes every eighth row, then the warps are added in order.
template <int W, class Terms>
__global__ void __launch_bounds__(kThreads) sum_rows(Terms terms, int64_t cols) {
  SMEM(raw);
  float* shared = reinterpret_cast<float*>(raw);  // [kWarps][32 * W]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, k = int(threadIdx.x);
  const int64_t i = blockIdx.y, c0 = int64_t(blockIdx.x) * 32 * W, c = c0 + lane * W, n = terms.count(i);
  float sum[W] = {};
  if (c < cols)
    for (int64_t r = warp; r < n; r += kWarps) {
      float v[W];
      load_lanes<W>(v, terms.row(i, r) + c);
      const float by = terms.weight(i, r);
#pragma unroll
      for (int j = 0; j < W; j++) sum[j] += v[j] * by;
    }
#pragma unroll
  for (int j = 0; j < W; j++) shared[(warp * 32 + lane) * W + j] = sum[j];
  __syncthreads();
  if (k >= 32 * W || c0 + k >= cols) return;
  float total = 0;
  for (int w = 0; w < kWarps; w++) total += shared[w * 32 * W + k];
  terms.put(i, c0 + k, total);
}

// ---- on the host ---------------------------------------------------------------------------------------
template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
inline float* floats(const void* p) { return static_cast<float*>(const_cast<void*>(p)); }  // acc, which is f32 here
template <class T>
bool packs(int64_t cols, const void* a, const void* b = nullptr) {
  return cols % Pack<T>::n == 0 && aligned16(a) && aligned16(b);
}

template <class T, class Pairs>
AgStatus dots(AgCtx* ctx, bool vector, const Pairs& pairs, int64_t n, int64_t length) {
  return with_width<T>(vector, [&](auto width) {
    const dim3 grid(unsigned(div_up(n, kWarps)));
    return launch(ctx, "align_mix", dot_rows<decltype(width)::value, Pairs>, grid, kThreads, 0, pairs, n, length);
  });
}
template <class T, class Terms>
AgStatus sums(AgCtx* ctx, bool vector, const Terms& terms, int64_t n, int64_t cols) {
  return with_width<T>(vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(unsigned(div_up(cols, 32 * W)), unsigned(n));
    return launch(ctx, "align_mix", sum_rows<W, Terms>, grid, kThreads, kThreads * W * sizeof(float), terms, cols);
  });
}
// Parts of the workspace, behind the piece that the products and column sums use.
struct Arena {
  void* base;  // NULL: only the size is wanted
  int64_t used;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(used));
    used += div_up(n * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
};
inline int64_t larger(int64_t a, int64_t b) { return div_up(a > b ? a : b, 64) * 64; }

inline bool has_gate(const AgAlignMix* a) { return a->mode == AG_MIX_GATE; }
inline bool has_projector(const AgAlignMix* a) { return a->w || a->w_packed; }
inline ImageRows image_rows(const AgAlignMix* a) { return {a->image_row, a->patches}; }

}  // namespace gpu

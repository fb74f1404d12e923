// Rows in the order of their indices, for sums that have one order (reduce.cu, align_grad.cu).
#pragma once
#include "gpu.h"

namespace gpu {

// Row i's place among all by (index, i), as one number: numbers are all different, so their order is that of i for
// equal indices. A negative index comes last.
__device__ __forceinline__ int32_t key_row(uint64_t key) { return int32_t(key >> 32); }
__device__ __forceinline__ int64_t key_source(uint64_t key) { return int64_t(uint32_t(key)); }

// Scratch for n keys, twice.
int64_t sort_workspace(int64_t n);
// Sorts rows by (index, i) in the workspace; *keys is where they are then.
AgStatus sort_rows(AgCtx* ctx, const char* op, const int32_t* index, int64_t n, const uint64_t** keys);

}  // namespace gpu

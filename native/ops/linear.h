// Matrix products for ops that are made of them.
#pragma once
#include "ops.h"

namespace ag::ops {

// op(A)[m,k] op(B)[k,n] with the dtype of A; where the result goes is filled in by the caller.
AgGemm product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b, int64_t m, int64_t n, int64_t k);
inline void gemm(const char* op, Device* device, const AgGemm& g) { run(op, device, &AgBackend::gemm, g); }
// The result is a gradient.
void into(AgGemm& g, const AgGrad& slot);

}  // namespace ag::ops

// What the sources of this folder offer each other on the host side: every kernel of the table (backend.h), how much scratch it
// wants, the device it runs on.
#pragma once
#include <stdint.h>

#include "../backend.h"

namespace gpu {

struct DeviceInfo {
  int processors = 0;    // streaming multiprocessors
  int architecture = 0;  // 90 for 9.0
};
const DeviceInfo& device();  // valid once the backend has been opened
bool deterministic();        // not with ALIGNGPT_DETERMINISTIC=0, which is read once: then sums may depend on timing where that is faster

// Each writes ctx->error and returns the status.
AgStatus fail(AgCtx* ctx, AgStatus status, const char* format, ...) __attribute__((format(printf, 3, 4)));
AgStatus bad_dtype(AgCtx* ctx, const char* op, AgDtype dt);  // AG_INVALID: this backend computes in f32 and bf16
AgStatus unsupported(AgCtx* ctx, const char* op);

AgStatus fill(AgCtx*, const AgFill*);
AgStatus copy2d(AgCtx*, const AgCopy2d*);
AgStatus cast(AgCtx*, const AgCast*);
AgStatus random(AgCtx*, const AgRandom*);
AgStatus unary(AgCtx*, const AgUnary*);
AgStatus unary_grad(AgCtx*, const AgUnaryGrad*);
AgStatus binary(AgCtx*, const AgBinary*);
AgStatus silu_mul(AgCtx*, const AgSiluMul*);
AgStatus silu_mul_grad(AgCtx*, const AgSiluMulGrad*);
AgStatus rope(AgCtx*, const AgRope*);
AgStatus patchify(AgCtx*, const AgPatchify*);

AgStatus col_sum(AgCtx*, const AgColSum*);
AgStatus sum(AgCtx*, const AgSum*);
AgStatus sum_squares(AgCtx*, const AgSumSquares*);
AgStatus gather_rows(AgCtx*, const AgGatherRows*);
AgStatus scatter_add(AgCtx*, const AgScatterAdd*);
int64_t col_sum_workspace(const AgColSum*);
int64_t sum_workspace(const AgSum*);
int64_t sum_squares_workspace(const AgSumSquares*);
int64_t scatter_add_workspace(const AgScatterAdd*);

AgStatus norm(AgCtx*, const AgNorm*);
AgStatus norm_grad(AgCtx*, const AgNormGrad*);
AgStatus softmax(AgCtx*, const AgSoftmax*);
AgStatus softmax_grad(AgCtx*, const AgSoftmaxGrad*);
AgStatus l2norm(AgCtx*, const AgL2Norm*);
AgStatus l2norm_grad(AgCtx*, const AgL2NormGrad*);
int64_t norm_grad_workspace(const AgNormGrad*);

AgStatus cross_entropy(AgCtx*, const AgCrossEntropy*);
AgStatus sample(AgCtx*, const AgSample*);
int64_t sample_workspace(const AgSample*);

AgStatus adamw(AgCtx*, const AgAdamW*);

AgStatus gemm(AgCtx*, const AgGemm*);
AgStatus pack(AgCtx*, const AgPack*);
int64_t pack_bytes(const AgPack*);
int64_t gemm_workspace(const AgGemm*);
// Dot products of the rows of a product with vectors, taken while the rows are in registers: the sum over t of parts[t * m + i] is
// that of row i, as it was stored, with with[i / group]. t counts to gemm_dot_parts(), which is 0 where this cannot be had. Without
// `with` it is the product by our own kernels.
struct RowDots {
  const float* with;  // [.., n]
  int64_t group;
  float* parts;  // [gemm_dot_parts(), m]
};
int64_t gemm_dot_parts(const AgGemm*);
AgStatus gemm_with_dots(AgCtx*, const AgGemm*, const RowDots&);

AgStatus attention(AgCtx*, const AgAttention*);
AgStatus attention_grad(AgCtx*, const AgAttention*);
int64_t attention_workspace(const AgAttention*);
int64_t attention_grad_workspace(const AgAttention*);
AgStatus attention_cached(AgCtx*, const AgAttentionCached*);
int64_t attention_cached_workspace(const AgAttentionCached*);

AgStatus align_mix(AgCtx*, const AgAlignMix*);
AgStatus align_mix_grad(AgCtx*, const AgAlignMix*);
int64_t align_mix_workspace(const AgAlignMix*);
int64_t align_mix_grad_workspace(const AgAlignMix*);

// ---- services: device.cc on a GPU, emulated.cc on the host ------------------------------------------
void* stream_of(const AgCtx* ctx);  // the one its work goes to
// Fills in part (a) of the table; false and a line in `message` when there is no device to use.
bool open_services(AgBackend& table, char* message, int64_t message_bytes);

}  // namespace gpu

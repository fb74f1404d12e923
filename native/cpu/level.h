// What each CPU level exports: every kernel of the table (backend.h), or those in which it differs from another level.
// backend.cc puts them together.
#pragma once
#include "../backend.h"

#define AG_DECLARE_LEVEL(level)                                 \
  namespace level {                                             \
  AgStatus fill(AgCtx*, const AgFill*);                         \
  AgStatus copy2d(AgCtx*, const AgCopy2d*);                     \
  AgStatus cast(AgCtx*, const AgCast*);                         \
  AgStatus random(AgCtx*, const AgRandom*);                     \
  AgStatus unary(AgCtx*, const AgUnary*);                       \
  AgStatus unary_grad(AgCtx*, const AgUnaryGrad*);              \
  AgStatus binary(AgCtx*, const AgBinary*);                     \
  AgStatus silu_mul(AgCtx*, const AgSiluMul*);                  \
  AgStatus silu_mul_grad(AgCtx*, const AgSiluMulGrad*);         \
  AgStatus col_sum(AgCtx*, const AgColSum*);                    \
  AgStatus sum(AgCtx*, const AgSum*);                           \
  AgStatus sum_squares(AgCtx*, const AgSumSquares*);            \
  AgStatus gather_rows(AgCtx*, const AgGatherRows*);            \
  AgStatus scatter_add(AgCtx*, const AgScatterAdd*);            \
  AgStatus gemm(AgCtx*, const AgGemm*);                         \
  AgStatus pack(AgCtx*, const AgPack*);                         \
  int64_t pack_bytes(const AgPack*);                            \
  AgStatus norm(AgCtx*, const AgNorm*);                         \
  AgStatus norm_grad(AgCtx*, const AgNormGrad*);                \
  AgStatus softmax(AgCtx*, const AgSoftmax*);                   \
  AgStatus softmax_grad(AgCtx*, const AgSoftmaxGrad*);          \
  AgStatus l2norm(AgCtx*, const AgL2Norm*);                     \
  AgStatus l2norm_grad(AgCtx*, const AgL2NormGrad*);            \
  AgStatus rope(AgCtx*, const AgRope*);                         \
  AgStatus attention(AgCtx*, const AgAttention*);               \
  AgStatus attention_grad(AgCtx*, const AgAttention*);          \
  AgStatus attention_cached(AgCtx*, const AgAttentionCached*);  \
  AgStatus align_mix(AgCtx*, const AgAlignMix*);                \
  AgStatus align_mix_grad(AgCtx*, const AgAlignMix*);           \
  AgStatus cross_entropy(AgCtx*, const AgCrossEntropy*);        \
  AgStatus patchify(AgCtx*, const AgPatchify*);                 \
  AgStatus adamw(AgCtx*, const AgAdamW*);                       \
  AgStatus sample(AgCtx*, const AgSample*);                     \
  int64_t gemm_workspace(const AgGemm*);                        \
  int64_t norm_grad_workspace(const AgNormGrad*);               \
  int64_t col_sum_workspace(const AgColSum*);                   \
  int64_t sum_workspace(const AgSum*);                          \
  int64_t sum_squares_workspace(const AgSumSquares*);           \
  int64_t attention_workspace(const AgAttention*);              \
  int64_t attention_grad_workspace(const AgAttention*);         \
  int64_t attention_cached_workspace(const AgAttentionCached*); \
  int64_t align_mix_workspace(const AgAlignMix*);               \
  int64_t align_mix_grad_workspace(const AgAlignMix*);          \
  int64_t scatter_add_workspace(const AgScatterAdd*);           \
  int64_t sample_workspace(const AgSample*);                    \
  }

// A level that differs from avx512 in the products of bf16 only: the rest, f32 included, is avx512's own code.
#define AG_DECLARE_DOT_LEVEL(level)                             \
  namespace level {                                             \
  using avx512::col_sum;                                        \
  using avx512::col_sum_workspace;                              \
  AgStatus gemm(AgCtx*, const AgGemm*);                         \
  AgStatus pack(AgCtx*, const AgPack*);                         \
  int64_t pack_bytes(const AgPack*);                            \
  AgStatus attention(AgCtx*, const AgAttention*);               \
  AgStatus attention_grad(AgCtx*, const AgAttention*);          \
  AgStatus attention_cached(AgCtx*, const AgAttentionCached*);  \
  AgStatus align_mix(AgCtx*, const AgAlignMix*);                \
  AgStatus align_mix_grad(AgCtx*, const AgAlignMix*);           \
  int64_t gemm_workspace(const AgGemm*);                        \
  int64_t attention_workspace(const AgAttention*);              \
  int64_t attention_grad_workspace(const AgAttention*);         \
  int64_t attention_cached_workspace(const AgAttentionCached*); \
  int64_t align_mix_workspace(const AgAlignMix*);               \
  int64_t align_mix_grad_workspace(const AgAlignMix*);          \
  }

AG_DECLARE_LEVEL(portable)
AG_DECLARE_LEVEL(avx2)
AG_DECLARE_LEVEL(avx512)
AG_DECLARE_LEVEL(neon)
AG_DECLARE_DOT_LEVEL(avx512bf16)
AG_DECLARE_DOT_LEVEL(amx)
AG_DECLARE_DOT_LEVEL(amx_emulated)  // in test builds only

// The table of one level, or NULL where this machine cannot run it. For tests; everyone else asks ag_cpu_backend.
const AgBackend* ag_cpu_level(const char* name);
// NULL, or why ALIGNGPT_CPU_LEVEL cannot be honoured.
extern "C" const char* ag_cpu_level_error(void);

// The CUDA backend's table. Compiled twice: into libaligngpt_cuda.so, and with the emulation into the native tests.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace gpu {

AgStatus fail(AgCtx* ctx, AgStatus status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(ctx->error, sizeof ctx->error, format, arguments);
  va_end(arguments);
  return status;
}
bool deterministic() {
  static const char* const value = std::getenv("ALIGNGPT_DETERMINISTIC");
  static const bool wanted = !value || std::strcmp(value, "0");
  return wanted;
}
AgStatus bad_dtype(AgCtx* ctx, const char* op, AgDtype dt) {
  static const char* const names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return fail(ctx, AG_INVALID, "[%s] dtype on a CUDA device: expected f32 or bf16, got %s", op, unsigned(dt) < 5 ? names[dt] : "?");
}
AgStatus unsupported(AgCtx* ctx, const char* op) { return fail(ctx, AG_UNSUPPORTED, "[%s] not there on a CUDA device", op); }

namespace {

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
int64_t workspace(AgKernel kernel, const void* a) {
  switch (kernel) {
    case AG_K_GEMM: return gemm_workspace(as<AgGemm>(a));
    case AG_K_NORM_GRAD: return norm_grad_workspace(as<AgNormGrad>(a));
    case AG_K_ATTENTION: return attention_workspace(as<AgAttention>(a));
    case AG_K_ATTENTION_GRAD: return attention_grad_workspace(as<AgAttention>(a));
    case AG_K_ATTENTION_CACHED: return attention_cached_workspace(as<AgAttentionCached>(a));
    case AG_K_ALIGN_MIX: return align_mix_workspace(as<AgAlignMix>(a));
    case AG_K_ALIGN_MIX_GRAD: return align_mix_grad_workspace(as<AgAlignMix>(a));
    case AG_K_COL_SUM: return col_sum_workspace(as<AgColSum>(a));
    case AG_K_SUM: return sum_workspace(as<AgSum>(a));
    case AG_K_SUM_SQUARES: return sum_squares_workspace(as<AgSumSquares>(a));
    case AG_K_SCATTER_ADD: return scatter_add_workspace(as<AgScatterAdd>(a));
    case AG_K_SAMPLE: return sample_workspace(as<AgSample>(a));
    case AG_K_CROSS_ENTROPY: return 0;
  }
  return 0;
}

void fill_kernels(AgBackend& b) {
  b.workspace = workspace;
  b.pack_bytes = pack_bytes;
  b.pack = pack;
  b.fill = fill;
  b.copy2d = copy2d;
  b.cast = cast;
  b.random = random;
  b.unary = unary;
  b.unary_grad = unary_grad;
  b.binary = binary;
  b.silu_mul = silu_mul;
  b.silu_mul_grad = silu_mul_grad;
  b.col_sum = col_sum;
  b.sum = sum;
  b.sum_squares = sum_squares;
  b.gather_rows = gather_rows;
  b.scatter_add = scatter_add;
  b.gemm = gemm;
  b.norm = norm;
  b.norm_grad = norm_grad;
  b.softmax = softmax;
  b.softmax_grad = softmax_grad;
  b.l2norm = l2norm;
  b.l2norm_grad = l2norm_grad;
  b.rope = rope;
  b.attention = attention;
  b.attention_grad = attention_grad;
  b.attention_cached = attention_cached;
  b.align_mix = align_mix;
  b.align_mix_grad = align_mix_grad;
  b.cross_entropy = cross_entropy;
  b.patchify = patchify;
  b.adamw = adamw;
  b.sample = sample;
}

}  // namespace
}  // namespace gpu

extern "C" __attribute__((visibility("default"))) const AgBackend* ag_cuda_backend(char* message, int64_t message_bytes) {
  static AgBackend table;
  static bool opened = false;  // a failure is tried again: the caller may have changed the environment
  if (!opened) {
    table = AgBackend{};
    table.version = AG_BACKEND_VERSION;
    table.struct_size = int32_t(sizeof(AgBackend));
    gpu::fill_kernels(table);
    opened = gpu::open_services(table, message, message_bytes);
  }
  return opened ? &table : nullptr;
}

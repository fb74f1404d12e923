// Matrix product.
#include "gpu.h"

namespace gpu {

AgStatus gemm(AgCtx* ctx, const AgGemm*) { return unsupported(ctx, "gemm"); }
AgStatus pack(AgCtx* ctx, const AgPack*) { return unsupported(ctx, "pack"); }
int64_t pack_bytes(const AgPack*) { return 0; }
int64_t gemm_workspace(const AgGemm*) { return 0; }

}  // namespace gpu

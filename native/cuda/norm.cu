// LayerNorm, RMSNorm, softmax, L2 normalisation: rows.
#include "gpu.h"

namespace gpu {

AgStatus norm(AgCtx* ctx, const AgNorm*) { return unsupported(ctx, "norm"); }
AgStatus norm_grad(AgCtx* ctx, const AgNormGrad*) { return unsupported(ctx, "norm_grad"); }
AgStatus softmax(AgCtx* ctx, const AgSoftmax*) { return unsupported(ctx, "softmax"); }
AgStatus softmax_grad(AgCtx* ctx, const AgSoftmaxGrad*) { return unsupported(ctx, "softmax_grad"); }
AgStatus l2norm(AgCtx* ctx, const AgL2Norm*) { return unsupported(ctx, "l2norm"); }
AgStatus l2norm_grad(AgCtx* ctx, const AgL2NormGrad*) { return unsupported(ctx, "l2norm_grad"); }
int64_t norm_grad_workspace(const AgNormGrad*) { return 0; }

}  // namespace gpu

// Cross entropy and sampling.
#include "gpu.h"

namespace gpu {

AgStatus cross_entropy(AgCtx* ctx, const AgCrossEntropy*) { return unsupported(ctx, "cross_entropy"); }
AgStatus sample(AgCtx* ctx, const AgSample*) { return unsupported(ctx, "sample"); }
int64_t sample_workspace(const AgSample*) { return 0; }

}  // namespace gpu

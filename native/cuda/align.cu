// alignMix.
#include "gpu.h"

namespace gpu {

AgStatus align_mix(AgCtx* ctx, const AgAlignMix*) { return unsupported(ctx, "align_mix"); }
AgStatus align_mix_grad(AgCtx* ctx, const AgAlignMix*) { return unsupported(ctx, "align_mix_grad"); }
int64_t align_mix_workspace(const AgAlignMix*) { return 0; }
int64_t align_mix_grad_workspace(const AgAlignMix*) { return 0; }

}  // namespace gpu

// AdamW.
#include "gpu.h"

namespace gpu {

AgStatus adamw(AgCtx* ctx, const AgAdamW*) { return unsupported(ctx, "adamw"); }

}  // namespace gpu

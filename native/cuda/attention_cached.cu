// Attention against the paged cache.
#include "gpu.h"

namespace gpu {

AgStatus attention_cached(AgCtx* ctx, const AgAttentionCached*) { return unsupported(ctx, "attention_cached"); }
int64_t attention_cached_workspace(const AgAttentionCached*) { return 0; }

}  // namespace gpu

// Attention over packed sequences.
#include "gpu.h"

namespace gpu {

AgStatus attention(AgCtx* ctx, const AgAttention*) { return unsupported(ctx, "attention"); }
AgStatus attention_grad(AgCtx* ctx, const AgAttention*) { return unsupported(ctx, "attention_grad"); }
int64_t attention_workspace(const AgAttention*) { return 0; }
int64_t attention_grad_workspace(const AgAttention*) { return 0; }

}  // namespace gpu

// Sums in a fixed order, and rows by index.
#include "gpu.h"

namespace gpu {

AgStatus col_sum(AgCtx* ctx, const AgColSum*) { return unsupported(ctx, "col_sum"); }
AgStatus sum(AgCtx* ctx, const AgSum*) { return unsupported(ctx, "sum"); }
AgStatus sum_squares(AgCtx* ctx, const AgSumSquares*) { return unsupported(ctx, "sum_squares"); }
AgStatus gather_rows(AgCtx* ctx, const AgGatherRows*) { return unsupported(ctx, "gather_rows"); }
AgStatus scatter_rows(AgCtx* ctx, const AgScatterRows*) { return unsupported(ctx, "scatter_rows"); }
AgStatus scatter_add(AgCtx* ctx, const AgScatterAdd*) { return unsupported(ctx, "scatter_add"); }
int64_t col_sum_workspace(const AgColSum*) { return 0; }
int64_t sum_workspace(const AgSum*) { return 0; }
int64_t sum_squares_workspace(const AgSumSquares*) { return 0; }
int64_t scatter_add_workspace(const AgScatterAdd*) { return 0; }

}  // namespace gpu

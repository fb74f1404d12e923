#include "error.h"

namespace ag {

void check_status(const char* op, AgStatus status, const AgCtx& ctx) {
  if (status == AG_OK) return;
  const char* code = status == AG_OUT_OF_MEMORY ? "ERR_MEMORY"
                     : status == AG_INVALID     ? "ERR_ARGUMENT"
                     : status == AG_UNSUPPORTED ? "ERR_UNSUPPORTED"
                                                : "ERR_DEVICE";
  fail(code, "[", op, "] ", ctx.error[0] ? ctx.error : "kernel failed", " (status ", int(status), ")");
}

}  // namespace ag

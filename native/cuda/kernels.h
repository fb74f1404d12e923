// What the sources of this folder offer each other on the host side: every kernel of the table (backend.h), how much
// scratch it wants, the device it runs on.
#pragma once
#include <stdint.h>

#include "../backend.h"

namespace gpu {

struct DeviceInfo {
  int processors = 0;    // streaming multiprocessors
  int architecture = 0;  // 90 for 9.0
};
const DeviceInfo& device();  // valid once the backend has been opened
bool deterministic();  // not with ALIGNGPT_DETERMINISTIC=0, which is read once: then sums may depend on timing where
                       // that is faster

// Each writes ctx->error and returns the status.
AgStatus fail(AgCtx* ctx, AgStatus status, const char* format, ...) __attribute__((format(printf, 3, 4)));
AgStatus bad_dtype(AgCtx* ctx, const char* op, AgDtype dt);  // AG_INVALID: this backend computes in f32 and bf16
AgStatus unsupported(AgCtx* ctx, const char* op);

AG_KERNELS(AG_DECLARE)
AG_DECLARE_PLAIN(pack, AgPack)
int64_t pack_bytes(const AgPack*);

// Dot products of the rows of a product with vectors, taken while the rows are in registers: the sum over t of parts[t
// * m + i] is that of row i, as it was stored, with with[i / group]. t counts to gemm_dot_parts(), which is 0 where
// this cannot be had. Without `with` it is the product by our own kernels.
struct RowDots {
  const float* with;  // [.., n]
  int64_t group;
  float* parts;  // [gemm_dot_parts(), m]
};
int64_t gemm_dot_parts(const AgGemm*);
AgStatus gemm_with_dots(AgCtx*, const AgGemm*, const RowDots&);

// ---- services: device.cc on a GPU, emulator/emulated.cc on the host ------------------------------------------
void* stream_of(const AgCtx* ctx);  // the one its work goes to
// Fills in part (a) of the table; false and a line in `message` when there is no device to use.
bool open_services(AgBackend& table, char* message, int64_t message_bytes);

}  // namespace gpu

// native/cuda: the kernels on an NVIDIA GPU and nothing else, a library of its own that core/device.cc opens. A file
// here sees backend.h and its own folder; the emulator (cuda/emulator) is for tests. This file is the table. Compiled
// twice: into libaligngpt_cuda.so, and with the emulation into the native tests.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace gpu {

AgStatus fail(AgCtx* ctx, AgStatus status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(ctx->error, sizeof ctx->error, format, arguments);
  va_end(arguments);
  return status;
}
bool deterministic() {
  static const char* const value = std::getenv("ALIGNGPT_DETERMINISTIC");
  static const bool wanted = !value || std::strcmp(value, "0");
  return wanted;
}
AgStatus bad_dtype(AgCtx* ctx, const char* op, AgDtype dt) {
  static const char* const names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return fail(ctx, AG_INVALID, "[%s] dtype on a CUDA device: expected f32 or bf16, got %s", op,
              unsigned(dt) < 5 ? names[dt] : "?");
}
AgStatus unsupported(AgCtx* ctx, const char* op) {
  return fail(ctx, AG_UNSUPPORTED, "[%s] not there on a CUDA device", op);
}

namespace {

void fill_kernels(AgBackend& b) {
  AG_KERNELS(AG_FILL)
  b.pack_bytes = pack_bytes;
  b.pack = pack;
}

}  // namespace
}  // namespace gpu

extern "C" __attribute__((visibility("default"))) const AgBackend* ag_cuda_backend(char* message,
                                                                                   int64_t message_bytes) {
  static AgBackend table;
  static bool opened = false;  // a failure is tried again: the caller may have changed the environment
  if (!opened) {
    table = AgBackend{};
    table.version = AG_BACKEND_VERSION;
    table.struct_size = int32_t(sizeof(AgBackend));
    gpu::fill_kernels(table);
    opened = gpu::open_services(table, message, message_bytes);
  }
  return opened ? &table : nullptr;
}

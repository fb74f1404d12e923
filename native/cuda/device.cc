// Part (a) of the table on a GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "kernels.h"

namespace gpu {
namespace {

DeviceInfo info;
cudaStream_t compute;

AgStatus answer(AgCtx* ctx, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return AG_OK;
  cudaGetLastError();  // this one is reported here and must not come back from the next call
  return fail(ctx, AG_DEVICE_ERROR, "[%s] %s", what, cudaGetErrorString(error));
}

}  // namespace

const DeviceInfo& device() { return info; }
void* stream_of(const AgCtx* ctx);
void* stream_of(const AgCtx* ctx) { return ctx->stream ? ctx->stream : compute; }

namespace {

void capabilities(AgCapabilities* c) {
  std::memset(c, 0, sizeof *c);
  std::snprintf(c->name, sizeof c->name, "cuda");
  std::snprintf(c->level, sizeof c->level, "sm_%d", info.architecture);
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) == cudaSuccess) {
    std::snprintf(c->device, sizeof c->device, "%s", properties.name);
    c->memory_bytes = int64_t(properties.totalGlobalMem);
  }
  c->threads = info.processors;
}
AgStatus alloc(void*, int64_t bytes, void** out) {
  if (cudaMalloc(out, bytes > 0 ? size_t(bytes) : 1) == cudaSuccess) return AG_OK;
  cudaGetLastError();
  return AG_OUT_OF_MEMORY;
}
void release(void*, void* p) { cudaFree(p); }
AgStatus copy(AgCtx* ctx, void* dst, const void* src, int64_t bytes) {
  return answer(ctx, "copy", cudaMemcpyAsync(dst, src, size_t(bytes), cudaMemcpyDefault, static_cast<cudaStream_t>(stream_of(ctx))));
}
AgStatus synchronize(AgCtx* ctx) {
  return answer(ctx, "synchronize", cudaStreamSynchronize(static_cast<cudaStream_t>(stream_of(ctx))));
}

}  // namespace

bool open_services(AgBackend& b, char* message, int64_t message_bytes) {
  cudaError_t error = cudaGetDeviceProperties(new cudaDeviceProp, 0);
  if (error != cudaSuccess) {
    std::snprintf(message, size_t(message_bytes), "%s", cudaGetErrorString(error));
    return false;
  }
  b.capabilities = capabilities;
  b.alloc = alloc;
  b.free = release;
  b.copy = copy;
  b.synchronize = synchronize;
  return true;
}

}  // namespace gpu

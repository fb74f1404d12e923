// Part (a) of the table on a GPU: the driver, memory, copies through pinned memory, three streams, events, graphs. Every error is
// taken off the runtime where it is reported: none comes back from a later call.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <mutex>

#include "cublas.h"
#include "kernels.h"
#include "probe.h"

namespace gpu {
namespace {

DeviceInfo info;
cudaDeviceProp properties;
cudaStream_t streams[3];

AgStatus answer(AgCtx* ctx, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return AG_OK;
  cudaGetLastError();
  return fail(ctx, error == cudaErrorMemoryAllocation ? AG_OUT_OF_MEMORY : AG_DEVICE_ERROR, "[%s] %s", what, cudaGetErrorString(error));
}
cudaStream_t own_stream(const AgCtx* ctx) { return static_cast<cudaStream_t>(stream_of(ctx)); }

// ---- the driver -------------------------------------------------------------------------------------
Probe look() {
  Probe p;
  p.runtime_version = CUDART_VERSION;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays open: the runtime needs it
  if (!driver) return p;
  p.driver = true;
  auto version = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  if (version) version(&p.driver_version);
  p.init_error = init ? init(0) : -1;
  if (p.init_error || p.driver_version / 1000 < p.runtime_version / 1000) return p;
  if (cudaGetDeviceCount(&p.devices) != cudaSuccess || p.devices == 0 || cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    cudaGetLastError();
    p.devices = 0;
    return p;
  }
  p.major = properties.major;
  p.minor = properties.minor;
  std::snprintf(p.name, sizeof p.name, "%s", properties.name);
  return p;
}

void capabilities(AgCapabilities* c) {
  std::memset(c, 0, sizeof *c);
  std::snprintf(c->name, sizeof c->name, "cuda");
  std::snprintf(c->level, sizeof c->level, "sm_%d", info.architecture);
  std::snprintf(c->device, sizeof c->device, "%.127s", properties.name);
  c->threads = info.processors;
  c->memory_bytes = int64_t(properties.totalGlobalMem);
  std::snprintf(c->products, sizeof c->products, "%s", cublaslt_line().c_str());
}

// ---- memory -----------------------------------------------------------------------------------------
// Uncached: the caching allocator is native/tensor.cc's. It hands blocks on in the order of the compute stream; cudaFree waits for
// the device, so a block may be given back while a kernel still uses it.
AgStatus alloc(void*, int64_t bytes, void** out) {
  const cudaError_t error = cudaMalloc(out, bytes > 0 ? size_t(bytes) : 1);
  if (error == cudaSuccess) return AG_OK;
  cudaGetLastError();
  return error == cudaErrorMemoryAllocation ? AG_OUT_OF_MEMORY : AG_DEVICE_ERROR;
}
void release(void*, void* p) {
  if (cudaFree(p) != cudaSuccess) cudaGetLastError();
}

AgStatus alloc_host(int64_t bytes, void** out) {
  AgCtx ctx{};
  return answer(&ctx, "alloc_host", cudaMallocHost(out, bytes > 0 ? size_t(bytes) : 1));
}
void free_host(void* p) {
  if (cudaFreeHost(p) != cudaSuccess) cudaGetLastError();
}

// ---- copies -----------------------------------------------------------------------------------------
// Ordinary host memory goes through two pinned pieces, one of which is filled while the other is on its way.
constexpr size_t kStage = size_t(8) << 20;
constexpr size_t kSmall = size_t(64) << 10;  // to this size the runtime keeps the bytes itself and nobody waits for a piece
struct Staging {
  std::mutex mutex;
  char* piece[2] = {};
  cudaEvent_t done[2] = {};
  int next = 0;

  cudaError_t open() {
    for (int i = 0; i < 2; i++) {
      if (piece[i]) continue;
      if (cudaError_t error = cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming)) return error;
      if (cudaError_t error = cudaMallocHost(reinterpret_cast<void**>(&piece[i]), kStage)) return error;
    }
    return cudaSuccess;
  }
};
Staging& staging() {
  static Staging* only = new Staging();  // never destroyed: other threads may copy until the process ends
  return *only;
}

cudaError_t upload(char* dst, const char* src, size_t bytes, cudaStream_t stream) {
  if (bytes <= kSmall) return cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, stream);
  Staging& s = staging();
  std::lock_guard<std::mutex> lock(s.mutex);
  cudaError_t error = s.open();
  for (size_t at = 0; at < bytes && !error; at += kStage, s.next ^= 1) {
    const size_t n = bytes - at < kStage ? bytes - at : kStage;
    if ((error = cudaEventSynchronize(s.done[s.next]))) break;
    std::memcpy(s.piece[s.next], src + at, n);
    error = cudaMemcpyAsync(dst + at, s.piece[s.next], n, cudaMemcpyHostToDevice, stream);
    if (!error) error = cudaEventRecord(s.done[s.next], stream);
  }
  return error;
}

cudaError_t download(char* dst, const char* src, size_t bytes, cudaStream_t stream) {
  Staging& s = staging();
  std::lock_guard<std::mutex> lock(s.mutex);
  cudaError_t error = s.open();
  size_t sent = 0, size[2] = {0, 0};
  for (size_t at = 0; at < bytes && !error;) {
    while (sent < bytes && sent - at < 2 * kStage && !error) {  // keep both pieces on their way
      const int piece = int(sent / kStage % 2);
      size[piece] = bytes - sent < kStage ? bytes - sent : kStage;
      if ((error = cudaEventSynchronize(s.done[piece]))) break;  // an upload may still read it
      error = cudaMemcpyAsync(s.piece[piece], src + sent, size[piece], cudaMemcpyDeviceToHost, stream);
      if (!error) error = cudaEventRecord(s.done[piece], stream);
      sent += size[piece];
    }
    if (error) break;
    const int piece = int(at / kStage % 2);
    if ((error = cudaEventSynchronize(s.done[piece]))) break;
    std::memcpy(dst + at, s.piece[piece], size[piece]);
    at += size[piece];
  }
  return error;
}

bool ordinary_host_memory(const void* p) {
  cudaPointerAttributes a{};
  if (cudaPointerGetAttributes(&a, p) != cudaSuccess) cudaGetLastError();
  return a.type == cudaMemoryTypeUnregistered;
}

AgStatus copy(AgCtx* ctx, void* dst, const void* src, int64_t bytes) {
  if (bytes <= 0) return AG_OK;
  const cudaStream_t stream = own_stream(ctx);
  const bool from_host = ordinary_host_memory(src), to_host = ordinary_host_memory(dst);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capturing);
  if ((from_host || to_host) && capturing != cudaStreamCaptureStatusNone)
    return fail(ctx, AG_UNSUPPORTED, "[copy] ordinary host memory cannot be part of a graph");
  if (from_host && to_host) {
    std::memmove(dst, src, size_t(bytes));
    return AG_OK;
  }
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (from_host) return answer(ctx, "copy", upload(to, from, size_t(bytes), stream));
  if (to_host) return answer(ctx, "copy", download(to, from, size_t(bytes), stream));
  return answer(ctx, "copy", cudaMemcpyAsync(dst, src, size_t(bytes), cudaMemcpyDefault, stream));
}

// ---- streams, events, graphs ------------------------------------------------------------------------
void* stream(AgStream which) { return streams[which]; }
AgStatus synchronize(AgCtx* ctx) { return answer(ctx, "synchronize", cudaStreamSynchronize(own_stream(ctx))); }

AgStatus event_create(void** out) {
  AgCtx ctx{};
  return answer(&ctx, "event", cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(out), cudaEventDisableTiming));
}
AgStatus event_record(AgCtx* ctx, void* event) {
  return answer(ctx, "event", cudaEventRecord(static_cast<cudaEvent_t>(event), own_stream(ctx)));
}
AgStatus event_wait(AgCtx* ctx, void* event) {
  return answer(ctx, "event", cudaStreamWaitEvent(own_stream(ctx), static_cast<cudaEvent_t>(event), 0));
}
void event_destroy(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

AgStatus graph_begin(AgCtx* ctx) {
  // relaxed: memory that is needed meanwhile may be allocated
  return answer(ctx, "graph", cudaStreamBeginCapture(own_stream(ctx), cudaStreamCaptureModeRelaxed));
}
AgStatus graph_end(AgCtx* ctx, void** out) {
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamEndCapture(own_stream(ctx), &graph);
  if (!error) error = cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(out), graph, 0);
  if (graph) cudaGraphDestroy(graph);
  return answer(ctx, "graph", error);
}
AgStatus graph_launch(AgCtx* ctx, void* graph) {
  return answer(ctx, "graph", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), own_stream(ctx)));
}
void graph_destroy(void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

}  // namespace

const DeviceInfo& device() { return info; }
void* stream_of(const AgCtx* ctx) { return ctx->stream ? ctx->stream : streams[AG_STREAM_COMPUTE]; }

// The device is the first one the driver shows; CUDA_VISIBLE_DEVICES chooses.
bool open_services(AgBackend& b, char* message, int64_t message_bytes) {
  if (!judge(look(), message, message_bytes)) return false;
  for (cudaStream_t& s : streams) {
    if (s) continue;
    if (cudaError_t error = cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)) {
      cudaGetLastError();
      std::snprintf(message, size_t(message_bytes), "[cuda] stream: %s", cudaGetErrorString(error));
      return false;
    }
  }
  info.processors = properties.multiProcessorCount;
  info.architecture = properties.major * 10 + properties.minor;
  b.capabilities = capabilities;
  b.stream = stream;
  b.alloc = alloc;
  b.free = release;
  b.alloc_host = alloc_host;
  b.free_host = free_host;
  b.copy = copy;
  b.synchronize = synchronize;
  b.event_create = event_create;
  b.event_record = event_record;
  b.event_wait = event_wait;
  b.event_destroy = event_destroy;
  b.graph_begin = graph_begin;
  b.graph_end = graph_end;
  b.graph_launch = graph_launch;
  b.graph_destroy = graph_destroy;
  return cublaslt_open(b, message, message_bytes);
}

}  // namespace gpu

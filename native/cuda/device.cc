// Part (a) of the table on a GPU: the driver, memory, copies through pinned memory, three streams, events, graphs.
// Every error is taken off the runtime where it is reported: none comes back from a later call.
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
  return fail(ctx, error == cudaErrorMemoryAllocation ? AG_OUT_OF_MEMORY : AG_DEVICE_ERROR, "[%s] %s", what,
              cudaGetErrorString(error));
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
  cudaError_t error = cudaGetDeviceCount(&p.devices);
  if (!error && p.devices) error = cudaGetDeviceProperties(&properties, 0);
  if (error) {
    cudaGetLastError();
    p.devices = 0;
    p.runtime_error = error == cudaErrorNoDevice ? nullptr : cudaGetErrorString(error);
  }
  if (!p.devices) return p;
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
// Uncached: the caching allocator is native/tensor.cc's. It hands blocks on in the order of the compute stream;
// cudaFree waits for the device, so a block may be given back while a kernel still uses it.
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
// Ordinary host memory goes through pinned memory: the source may change once `copy` has returned, and nothing promises
// that the runtime has read it by then. Large copies take two pieces, one of which is filled while the other is on its
// way; for small ones there are so many places that nobody waits for the one before.
constexpr size_t kStage = size_t(8) << 20, kSmall = size_t(64) << 10;
constexpr int kStages = 2, kPlaces = 64;
struct Place {
  char* p = nullptr;
  cudaEvent_t done = nullptr;

  cudaError_t open(size_t bytes) {
    if (p) return cudaSuccess;
    if (!done)
      if (const cudaError_t error = cudaEventCreateWithFlags(&done, cudaEventDisableTiming)) return error;
    return cudaMallocHost(reinterpret_cast<void**>(&p), bytes);
  }
  cudaError_t send(char* dst, const char* src, size_t bytes, cudaStream_t stream) {
    if (const cudaError_t error = cudaEventSynchronize(done)) return error;
    std::memcpy(p, src, bytes);
    if (const cudaError_t error = cudaMemcpyAsync(dst, p, bytes, cudaMemcpyHostToDevice, stream)) return error;
    return cudaEventRecord(done, stream);
  }
};
struct Staging {
  std::mutex mutex;
  Place stage[kStages], place[kPlaces];
  unsigned next_stage = 0, next_place = 0;

  cudaError_t open() {
    for (Place& s : stage)
      if (const cudaError_t error = s.open(kStage)) return error;
    return cudaSuccess;
  }
};
Staging& staging() {
  static Staging* only = new Staging();  // never destroyed: other threads may copy until the process ends
  return *only;
}

cudaError_t upload(char* dst, const char* src, size_t bytes, cudaStream_t stream) {
  Staging& s = staging();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (bytes <= kSmall) {
    Place& place = s.place[s.next_place++ % kPlaces];
    const cudaError_t error = place.open(kSmall);
    return error ? error : place.send(dst, src, bytes, stream);
  }
  cudaError_t error = s.open();
  for (size_t at = 0; at < bytes && !error; at += kStage)
    error =
        s.stage[s.next_stage++ % kStages].send(dst + at, src + at, bytes - at < kStage ? bytes - at : kStage, stream);
  return error;
}

cudaError_t download(char* dst, const char* src, size_t bytes, cudaStream_t stream) {
  Staging& s = staging();
  std::lock_guard<std::mutex> lock(s.mutex);
  cudaError_t error = s.open();
  size_t sent = 0, size[kStages] = {};
  for (size_t at = 0; at < bytes && !error;) {
    while (sent < bytes && sent - at < kStages * kStage && !error) {  // keep all pieces on their way
      const size_t i = sent / kStage % kStages, n = bytes - sent < kStage ? bytes - sent : kStage;
      Place& stage = s.stage[i];
      if ((error = cudaEventSynchronize(stage.done))) break;  // an upload may still read it
      error = cudaMemcpyAsync(stage.p, src + sent, size[i] = n, cudaMemcpyDeviceToHost, stream);
      if (!error) error = cudaEventRecord(stage.done, stream);
      sent += n;
    }
    if (error) break;
    const size_t i = at / kStage % kStages;
    if ((error = cudaEventSynchronize(s.stage[i].done))) break;
    std::memcpy(dst + at, s.stage[i].p, size[i]);
    at += size[i];
  }
  return error;
}

// After a kernel that failed every question is answered with its error: nobody knows then whose memory this is.
cudaError_t is_ordinary_host_memory(const void* p, bool* ordinary) {
  cudaPointerAttributes a{};
  const cudaError_t error = cudaPointerGetAttributes(&a, p);
  *ordinary = a.type == cudaMemoryTypeUnregistered;
  return error;
}

AgStatus copy(AgCtx* ctx, void* dst, const void* src, int64_t bytes) {
  if (bytes <= 0) return AG_OK;
  const cudaStream_t stream = own_stream(ctx);
  bool from_host = false, to_host = false;
  for (const cudaError_t error : {is_ordinary_host_memory(src, &from_host), is_ordinary_host_memory(dst, &to_host)})
    if (error) return answer(ctx, "copy", error);
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
void* stream_of(const AgCtx* ctx) {
  static thread_local const cudaError_t bound =
      cudaSetDevice(0);  // cublasLt takes the context of its thread and does not ask for one
  (void)bound;
  return ctx->stream ? ctx->stream : streams[AG_STREAM_COMPUTE];
}

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

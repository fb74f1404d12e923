// Part (a) of the table on the host, for the emulation: memory of the host, launches that run at once, graphs that keep
// launches and run them again.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../cublas.h"
#include "../kernels.h"
#include "shim.h"

namespace {

typedef std::vector<std::function<void()>> Graph;
std::unique_ptr<Graph> recording;
std::mutex mutex;
std::map<const char*, int64_t> blocks;  // the device's memory, and pinned memory of the host

bool known(const void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  const char* at = static_cast<const char*>(p);
  auto it = blocks.upper_bound(at);
  return it != blocks.begin() && at < std::prev(it)->first + std::prev(it)->second;
}

// ALIGNGPT_EMULATED_FAULT=N: the N-th launch fails. As on a GPU nobody hears of it before the next question, and
// nothing works from then on.
const char* const fault = std::getenv("ALIGNGPT_EMULATED_FAULT");
int64_t begun = 0;
bool broken() { return fault && begun >= std::atoll(fault); }
AgStatus working(AgCtx* ctx, const char* what) {
  return broken() ? gpu::fail(ctx, AG_DEVICE_ERROR, "[%s] an illegal memory access was encountered (emulated)", what)
                  : AG_OK;
}

void enqueue(std::function<void()> work) {
  if (recording)
    recording->push_back(std::move(work));
  else
    work();
}

void capabilities(AgCapabilities* c) {
  std::memset(c, 0, sizeof *c);
  std::snprintf(c->name, sizeof c->name, "cuda");
  std::snprintf(c->level, sizeof c->level, "emulated");
  std::snprintf(c->device, sizeof c->device, "emulation on the host");
  c->threads = gpu::device().processors;
  std::snprintf(c->products, sizeof c->products, "%s", gpu::cublaslt_line().c_str());
}
// Of exactly this size: AddressSanitizer sees an access behind it.
AgStatus alloc(void*, int64_t bytes, void** out) {
  if (broken()) return AG_DEVICE_ERROR;
  if (posix_memalign(out, 256, bytes > 0 ? size_t(bytes) : 1)) return AG_OUT_OF_MEMORY;
  std::memset(*out, 0xff, size_t(bytes));
  std::lock_guard<std::mutex> lock(mutex);
  blocks[static_cast<const char*>(*out)] = bytes > 0 ? bytes : 1;
  return AG_OK;
}
void free_host(void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  blocks.erase(static_cast<const char*>(p));
  std::free(p);
}
void release(void*, void* p) { free_host(p); }
AgStatus alloc_host(int64_t bytes, void** out) { return alloc(nullptr, bytes, out); }
void* stream(AgStream) { return nullptr; }
// What a GPU refuses while work is recorded is refused here too.
AgStatus copy(AgCtx* ctx, void* dst, const void* src, int64_t bytes) {
  if (recording && !(known(dst) && known(src)))
    return gpu::fail(ctx, AG_UNSUPPORTED, "[copy] ordinary host memory cannot be part of a graph");
  if (const AgStatus status = working(ctx, "copy")) return status;
  enqueue([=] { std::memmove(dst, src, size_t(bytes)); });
  return AG_OK;
}
AgStatus synchronize(AgCtx* ctx) {
  return recording ? gpu::fail(ctx, AG_DEVICE_ERROR, "[synchronize] not while work is recorded")
                   : working(ctx, "synchronize");
}
AgStatus event_create(void** out) {
  *out = nullptr;
  return AG_OK;
}
AgStatus event_nothing(AgCtx*, void*) { return AG_OK; }
void event_destroy(void*) {}

AgStatus graph_begin(AgCtx*) {
  recording.reset(new Graph());
  return AG_OK;
}
AgStatus graph_end(AgCtx*, void** out) {
  *out = recording.release();
  return AG_OK;
}
AgStatus graph_launch(AgCtx* ctx, void* graph) {
  if (const AgStatus status = working(ctx, "graph")) return status;
  for (const std::function<void()>& work : *static_cast<Graph*>(graph)) work();
  return AG_OK;
}
void graph_destroy(void* graph) { delete static_cast<Graph*>(graph); }

}  // namespace

namespace shim {
void submit(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  enqueue([=] {
    begun++;
    if (!broken()) run_grid(grid, block, shared_bytes, body);
  });
}
}  // namespace shim

namespace gpu {

const DeviceInfo& device() {
  static const DeviceInfo info{3, 90};  // few and odd: loops over the grid get several turns and an end
  return info;
}

void* stream_of(const AgCtx* ctx) { return ctx->stream; }

bool open_services(AgBackend& b, char* message, int64_t message_bytes) {
  b.capabilities = capabilities;
  b.stream = stream;
  b.alloc = alloc;
  b.free = release;
  b.alloc_host = alloc_host;
  b.free_host = free_host;
  b.copy = copy;
  b.synchronize = synchronize;
  b.event_create = event_create;
  b.event_record = event_nothing;
  b.event_wait = event_nothing;
  b.event_destroy = event_destroy;
  b.graph_begin = graph_begin;
  b.graph_end = graph_end;
  b.graph_launch = graph_launch;
  b.graph_destroy = graph_destroy;
  // Only what somebody names: the real one would take this memory for a device's. Its products run at once, in a graph
  // too.
  return !std::getenv("ALIGNGPT_CUBLASLT") || cublaslt_open(b, message, message_bytes);
}

}  // namespace gpu

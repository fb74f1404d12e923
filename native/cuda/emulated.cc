// Part (a) of the table on the host, for the emulation: memory of the host, launches that run at once, graphs that keep launches
// and run them again.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cublas.h"
#include "kernels.h"
#include "shim.h"

namespace {

typedef std::vector<std::function<void()>> Graph;
std::unique_ptr<Graph> recording;

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
  if (posix_memalign(out, 256, bytes > 0 ? size_t(bytes) : 1)) return AG_OUT_OF_MEMORY;
  std::memset(*out, 0xff, size_t(bytes));
  return AG_OK;
}
void release(void*, void* p) { std::free(p); }
AgStatus alloc_host(int64_t bytes, void** out) { return alloc(nullptr, bytes, out); }
void* stream(AgStream) { return nullptr; }
AgStatus copy(AgCtx*, void* dst, const void* src, int64_t bytes) {
  enqueue([=] { std::memmove(dst, src, size_t(bytes)); });
  return AG_OK;
}
AgStatus synchronize(AgCtx*) { return AG_OK; }
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
AgStatus graph_launch(AgCtx*, void* graph) {
  for (const std::function<void()>& work : *static_cast<Graph*>(graph)) work();
  return AG_OK;
}
void graph_destroy(void* graph) { delete static_cast<Graph*>(graph); }

}  // namespace

namespace shim {
void submit(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  enqueue([=] { run_grid(grid, block, shared_bytes, body); });
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
  b.free_host = std::free;
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
  // Only what somebody names: the real one would take this memory for a device's. Its products run at once, in a graph too.
  return !std::getenv("ALIGNGPT_CUBLASLT") || cublaslt_open(b, message, message_bytes);
}

}  // namespace gpu

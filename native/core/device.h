// Devices: a backend with its memory and its queue, how kernels are called on it, and how it is found.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "allocator.h"

namespace ag {

struct Storage;  // tensor.h

// What recorded work (graph.h) needs besides the device: its memory, and the indices that are brought before each
// launch.
struct Recording {
  std::shared_ptr<Allocator::Pool> pool;
  std::vector<std::shared_ptr<Storage>> indices;
};

class Device {
 public:
  explicit Device(const AgBackend* backend) : backend(backend), memory(backend, stream) {}
  const AgBackend* const backend;
  void* const stream = nullptr;    // the compute stream
  Recording* recording = nullptr;  // what is being recorded; to be looked at in one's turn
  Allocator memory;
  std::atomic<int64_t> kernel_nanoseconds{0};  // spent inside calls of kernels so far (a GPU's: in launching them)

  // Held while something is enqueued: a graph that is being recorded keeps it, and other threads wait. The CPU has no
  // queue.
  std::unique_lock<std::recursive_mutex> turn();
  // Memory of the device, or of what is being recorded on it; goes back by memory.release. `ahead`: written before
  // recorded work is launched, so that none of it may use the memory, even before it was wanted. Throws ERR_MEMORY.
  void* allocate(int64_t bytes, int64_t* actual, bool ahead = false);
  AgCtx context() const;  // of a call without scratch

 private:
  std::recursive_mutex turn_;
};

Device& cpu();
// NULL without a CUDA device; *why then says in one line what is missing, else what was found.
Device* cuda(std::string* why);
Device& device_named(const std::string& name);  // cpu, cuda; throws ERR_DEVICE when it is not there
const char* device_name(const Device* device);
// The table of a backend's library, or NULL and the reason.
const AgBackend* open_backend(const std::string& file, std::string* why);
// The first kernel of AG_KERNELS that a table lacks, or NULL.
const char* missing_kernel(const AgBackend& backend);

// ---- calling kernels --------------------------------------------------------------------------------
// Scratch of one call; none for 0 bytes.
class Scratch {
 public:
  Scratch(Device* device, int64_t bytes)
      : device_(device), p_(bytes > 0 ? device->allocate(bytes, &actual_) : nullptr) {}
  ~Scratch() {
    if (p_) device_->memory.release(p_, actual_);
  }
  Scratch(const Scratch&) = delete;
  void* p() const { return p_; }

 private:
  Device* device_;
  int64_t actual_ = 0;
  void* p_;
};

// Calls an entry of the device's table in the device's turn. Throws when it does not answer AG_OK.
template <class Args>
void call(const char* op, Device* device, AgStatus (*kernel)(AgCtx*, const Args*), const Args& args, AgCtx& ctx) {
  auto turn = device->turn();
  const auto from = std::chrono::steady_clock::now();
  const AgStatus status = kernel(&ctx, &args);
  device->kernel_nanoseconds += std::chrono::nanoseconds(std::chrono::steady_clock::now() - from).count();
  check_status(op, status, ctx);
}

// Runs a kernel of AG_KERNELS, &AgBackend::name, with the scratch it asks for.
template <class Entry, class Args>
void run(const char* op, Device* device, Entry AgBackend::* kernel, const Args& args) {
  const Entry& entry = device->backend->*kernel;
  AgCtx ctx = device->context();
  ctx.workspace_bytes = entry.workspace ? entry.workspace(&args) : 0;
  const Scratch scratch(device, ctx.workspace_bytes);
  ctx.workspace = scratch.p();
  call(op, device, entry.run, args, ctx);
}

// Between host memory and `device`, or within it; the host sees what came from a device after synchronize.
void copy_bytes(Device* device, void* dst, const void* src, int64_t bytes);
void synchronize(Device* device);  // until everything enqueued so far is done, copies to the host included

}  // namespace ag

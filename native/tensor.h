// Tensors: a dtype, a shape and a piece of shared storage on one device. Always contiguous, row major.
//
// Storage is process-wide with atomic counts; everything that refers to it (handles, tape) belongs to one thread.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"

namespace ag {

// ---- errors: "[op] what, expected, got", with a code JavaScript sees as error.code -------------------
struct Error : std::runtime_error {
  const char* code;
  Error(const char* code, const std::string& message) : std::runtime_error(message), code(code) {}
};

template <class... A>
std::string cat(const A&... a) {
  std::ostringstream s;
  (s << ... << a);
  return s.str();
}

template <class... A>
[[noreturn]] void fail(const char* code, const A&... a) {
  throw Error(code, cat(a...));
}

template <class... A>
void check(bool ok, const char* code, const A&... a) {
  if (!ok) fail(code, a...);
}

// ---- dtype and shape --------------------------------------------------------------------------------
int64_t dtype_size(AgDtype dt);
const char* dtype_name(AgDtype dt);
AgDtype parse_dtype(const std::string& name);
inline bool is_float(AgDtype dt) { return dt == AG_F32 || dt == AG_BF16 || dt == AG_F64; }
// The type sums are kept in (backend.h): f64 for f64, f32 for f32 and bf16.
inline AgDtype acc_dtype(AgDtype dt) { return dt == AG_F64 ? AG_F64 : AG_F32; }

struct Shape {
  static constexpr int kMaxRank = 6;
  int rank = 0;
  int64_t d[kMaxRank] = {0, 0, 0, 0, 0, 0};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(dims.begin(), dims.size()) {}
  explicit Shape(const std::vector<int64_t>& dims) : Shape(dims.data(), dims.size()) {}
  Shape(const int64_t* dims, size_t n);  // checks rank, signs and overflow of the product

  int64_t operator[](int i) const { return d[i < 0 ? i + rank : i]; }
  int64_t numel() const;
  int64_t rows() const { return rank == 0 ? 1 : d[rank - 1] == 0 ? leading() : numel() / d[rank - 1]; }
  int64_t cols() const { return rank == 0 ? 1 : d[rank - 1]; }
  Shape with_last(int64_t n) const;
  bool operator==(const Shape& o) const;
  bool operator!=(const Shape& o) const { return !(*this == o); }
  std::string str() const;

 private:
  int64_t leading() const;
};
inline std::ostream& operator<<(std::ostream& s, const Shape& x) { return s << x.str(); }

// ---- device: a backend, its stream, its caching allocator -------------------------------------------
struct MemoryCounters {
  int64_t in_use = 0;    // bytes of live storages
  int64_t peak = 0;      // highest in_use since the last reset
  int64_t reserved = 0;  // in_use + idle blocks kept for reuse
  int64_t blocks = 0;    // live storages
};

class Graph;  // graph.h
struct GraphPool;

class Device {
 public:
  explicit Device(const AgBackend* backend);
  const AgBackend* const backend;
  void* stream = nullptr;
  Graph* recording = nullptr;  // to be looked at in one's turn
  // Held while something is enqueued: a graph that is being recorded keeps it, and other threads wait. The CPU has no queue.
  std::unique_lock<std::recursive_mutex> turn();
  void forget(GraphPool* pool);  // its blocks are everybody's again

  // Throws ERR_MEMORY; actual is what to give back to release. `ahead`: written before recorded work is launched, so that none of it
  // may use the memory, even before it was wanted.
  void* allocate(int64_t bytes, int64_t* actual, bool ahead = false);
  void release(void* p, int64_t actual);
  MemoryCounters counters();
  void reset_peak();
  void trim();                          // gives idle blocks back to the system
  void fail_after(int64_t allocations);  // test hook: the n-th allocation from now fails; negative: off
  std::atomic<int64_t> kernel_nanoseconds{0};  // spent inside calls of kernels so far (a GPU's: in launching them)

 private:
  void drop_idle(int64_t reserved);
  void* take(std::multimap<int64_t, void*>& idle, int64_t* bytes, int64_t most);
  std::mutex mutex_;
  std::recursive_mutex turn_;
  std::multimap<int64_t, void*> idle_;
  std::map<void*, GraphPool*> owners_;  // of blocks that recorded work uses
  int64_t fail_after_ = -1;
  MemoryCounters c_;
};
Device& cpu();
// NULL without a CUDA device; *why then says in one line what is missing, else what was found.
Device* cuda(std::string* why);
Device& device_named(const std::string& name);  // cpu, cuda; throws ERR_DEVICE when it is not there
const char* device_name(const Device* device);
// The table of a backend's library, or NULL and the reason.
const AgBackend* open_backend(const std::string& file, std::string* why);

struct Storage;

// A matrix [rows, cols] once more, in the layout the backend's products want it as right-hand side (AgPack). It belongs
// to the storage of its values: it goes with them, and is dropped when somebody writes into them.
struct Packed {
  int64_t offset;
  AgDtype dt;
  int64_t rows, cols;
  bool trans_b;
  std::shared_ptr<Storage> blob;
};

struct Storage {
  Device* device;
  void* p = nullptr;
  int64_t bytes = 0;   // asked for
  int64_t actual = 0;  // got
  std::vector<Packed> packed;
  // The same bytes on another device, for indices, which ops check and keep on the CPU (device_i32). Its memory stays when it is
  // stale, so that what was captured with it finds the new values.
  std::shared_ptr<Storage> mirror;
  bool mirror_stale = false;
  int64_t version = 0;  // how often it was written into: what the tape kept of it must have the same (Saved in tape.h)
  void written();       // whoever writes into it says so
  Storage(Device* device, int64_t bytes, bool ahead = false);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
};

// ---- tensor -----------------------------------------------------------------------------------------
struct Var;    // the tape's view of a tensor (tape.h)
struct Again;  // how to compute a tensor again (tape.h)

struct Tensor {
  std::shared_ptr<Storage> storage;
  int64_t offset = 0;  // bytes
  AgDtype dt = AG_F32;
  Shape shape;
  std::shared_ptr<Var> var;      // null: no gradient wanted
  std::shared_ptr<Again> again;  // null: backward must keep the values

  bool defined() const { return storage != nullptr; }
  Device* device() const { return storage->device; }
  void* data() const { return static_cast<char*>(storage->p) + offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  int64_t numel() const { return shape.numel(); }
  int64_t bytes() const { return numel() * dtype_size(dt); }
  const void* packed(int64_t rows, int64_t cols, bool trans_b) const;  // the blob of `pack` for this matrix, or null
  Tensor detached() const;                // same storage, no tape and no way to compute it again
  Tensor view(const Shape& shape) const;  // same storage and number of elements, no tape
};

// The storage's bytes on another device: brought when they changed, or, while a graph is being recorded, by its launch.
void* mirror_of(const std::shared_ptr<Storage>& storage, Device* device);
void refresh_mirror(Storage& storage);

Tensor empty(Device* device, const Shape& shape, AgDtype dt);
inline Tensor empty_like(const Tensor& x) { return empty(x.device(), x.shape, x.dt); }
Tensor zeros(Device* device, const Shape& shape, AgDtype dt);

// ---- calling kernels --------------------------------------------------------------------------------
// Throws when a kernel does not answer AG_OK.
void check_status(const char* op, AgStatus status, const AgCtx& ctx);

// Runs one kernel of the device's table, with scratch of `scratch_bytes`.
template <class Args>
void run_with(const char* op, Device* device, AgStatus (*kernel)(AgCtx*, const Args*), const Args& args, int64_t scratch_bytes) {
  AgCtx ctx{};
  ctx.stream = device->stream;
  std::shared_ptr<Storage> scratch;
  if (scratch_bytes > 0) {
    scratch = std::make_shared<Storage>(device, scratch_bytes);
    ctx.workspace = scratch->p;
    ctx.workspace_bytes = scratch_bytes;
  }
  auto turn = device->turn();
  const auto from = std::chrono::steady_clock::now();
  const AgStatus status = kernel(&ctx, &args);
  device->kernel_nanoseconds += std::chrono::nanoseconds(std::chrono::steady_clock::now() - from).count();
  check_status(op, status, ctx);
}
// Kernels that take no scratch pass no id.
template <class Args>
void run(const char* op, Device* device, AgStatus (*kernel)(AgCtx*, const Args*), const Args& args) {
  run_with(op, device, kernel, args, 0);
}
template <class Args>
void run(const char* op, Device* device, AgStatus (*kernel)(AgCtx*, const Args*), const Args& args, AgKernel id) {
  run_with(op, device, kernel, args, device->backend->workspace(id, &args));
}

// Between host memory and `device`, or within it; the host sees what came from a device after synchronize.
void copy_bytes(Device* device, void* dst, const void* src, int64_t bytes);
void synchronize(Device* device);  // until everything enqueued so far is done, copies to the host included

}  // namespace ag

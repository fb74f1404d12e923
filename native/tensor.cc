#include "tensor.h"

#include "graph.h"

#include <algorithm>
#include <cstring>

namespace ag {

// ---- dtype and shape --------------------------------------------------------------------------------
int64_t dtype_size(AgDtype dt) {
  switch (dt) {
    case AG_F32: return 4;
    case AG_BF16: return 2;
    case AG_F64: return 8;
    case AG_I32: return 4;
    case AG_I64: return 8;
  }
  fail("ERR_DTYPE", "[tensor] dtype: expected 0..4, got ", int(dt));
}

const char* dtype_name(AgDtype dt) {
  static const char* names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return names[dt];
}

AgDtype parse_dtype(const std::string& name) {
  for (int i = 0; i < 5; i++)
    if (name == dtype_name(AgDtype(i))) return AgDtype(i);
  fail("ERR_DTYPE", "[tensor] dtype: expected f32, bf16, f64, i32 or i64, got '", name, "'");
}

Shape::Shape(const int64_t* dims, size_t n) {
  check(n <= size_t(kMaxRank), "ERR_SHAPE", "[tensor] rank: expected at most ", int(kMaxRank), ", got ", n);
  rank = int(n);
  // 2^47 elements of 8 bytes stay below 2^50 bytes, so no later size computation can overflow.
  int64_t total = 1;
  for (int i = 0; i < rank; i++) {
    check(dims[i] >= 0, "ERR_SHAPE", "[tensor] dimension ", i, ": expected >= 0, got ", dims[i]);
    d[i] = dims[i];
    int64_t m = std::max<int64_t>(dims[i], 1);
    check(m <= (int64_t(1) << 47) / total, "ERR_SHAPE", "[tensor] shape: too many elements (over 2^47)");
    total *= m;
  }
}

int64_t Shape::numel() const {
  int64_t n = 1;
  for (int i = 0; i < rank; i++) n *= d[i];
  return n;
}

int64_t Shape::leading() const {
  int64_t n = 1;
  for (int i = 0; i + 1 < rank; i++) n *= d[i];
  return n;
}

Shape Shape::with_last(int64_t n) const {
  std::vector<int64_t> dims(d, d + rank);
  check(rank > 0, "ERR_SHAPE", "[tensor] rank: expected at least 1, got 0");
  dims.back() = n;
  return Shape(dims);
}

bool Shape::operator==(const Shape& o) const { return rank == o.rank && std::equal(d, d + rank, o.d); }

std::string Shape::str() const {
  std::string s = "[";
  for (int i = 0; i < rank; i++) s += (i ? ", " : "") + std::to_string(d[i]);
  return s + "]";
}

// ---- device -----------------------------------------------------------------------------------------
Device::Device(const AgBackend* backend) : backend(backend) {}

// Sizes are rounded so that a block fits its successor: to 64 bytes below 4 KiB, to 1/8 of the power of two below 1 MiB, and to
// 64 KiB above, where what is lost counts and a block may serve requests up to 1/8 smaller anyway.
static int64_t rounded(int64_t bytes) {
  int64_t step = 64;
  if (bytes > int64_t(1) << 20) {
    step = int64_t(64) << 10;
  } else if (bytes > 4096) {
    int64_t power = 4096;
    while (power * 2 <= bytes) power *= 2;
    step = power / 8;
  }
  return std::max<int64_t>(64, (bytes + step - 1) / step * step);
}

constexpr int64_t kSlack = int64_t(4) << 20;

// Gives idle blocks back, the largest first, until at most `reserved` bytes are held.
void Device::drop_idle(int64_t reserved) {
  while (!idle_.empty() && c_.reserved > reserved) {
    auto largest = std::prev(idle_.end());
    backend->free(stream, largest->second);
    c_.reserved -= largest->first;
    idle_.erase(largest);
  }
}

// A block of `idle` for *bytes, which become its size, of at most `most`; or null.
void* Device::take(std::multimap<int64_t, void*>& idle, int64_t* bytes, int64_t most) {
  auto it = idle.lower_bound(*bytes);
  if (it == idle.end() || it->first > most) return nullptr;
  void* p = it->second;
  *bytes = it->first;
  idle.erase(it);
  return p;
}

void* Device::allocate(int64_t bytes, int64_t* actual, bool ahead) {
  int64_t want = rounded(bytes);
  auto turn = this->turn();
  std::lock_guard<std::mutex> lock(mutex_);
  if (fail_after_ >= 0 && fail_after_-- == 0)
    fail("ERR_MEMORY", "[memory] allocation of ", bytes, " bytes failed (test hook)");
  // Graphs that share a pool are recorded with other sizes each, and nothing is given back meanwhile.
  GraphPool* pool = recording && !ahead ? recording->pool_.get() : nullptr;
  void* p = pool ? take(pool->idle, &want, 2 * want) : nullptr;
  if (!p) p = take(idle_, &want, want + want / 8);
  if (!p) {
    // While work is recorded nothing may be given back.
    const int64_t most = recording ? INT64_MAX : std::max(c_.peak, c_.in_use + want) + kSlack - want;
    // Idle blocks of other sizes make room: what is reserved stays near the most that was ever in use.
    drop_idle(most);
    AgStatus status = backend->alloc(stream, want, &p);
    if (status == AG_OUT_OF_MEMORY && !recording) {
      drop_idle(0);
      status = backend->alloc(stream, want, &p);
    }
    if (status == AG_OUT_OF_MEMORY)
      fail("ERR_MEMORY", "[memory] out of memory: ", bytes, " bytes wanted, ", c_.in_use, " in use");
    if (status != AG_OK) {  // work before this failed, and the device answers nothing else from then on
      AgCtx ctx{};
      ctx.stream = stream;
      if (!recording) backend->synchronize(&ctx);
      check_status("memory", status, ctx);
    }
    c_.reserved += want;
  }
  if (pool) owners_[p] = pool;
  *actual = want;
  c_.in_use += want;
  c_.blocks++;
  c_.peak = std::max(c_.peak, c_.in_use);
  return p;
}

// Kept for the next step, which wants the same sizes again; allocate() bounds what lies idle, trim() gives it back.
void Device::release(void* p, int64_t actual) {
  std::lock_guard<std::mutex> lock(mutex_);
  c_.in_use -= actual;
  c_.blocks--;
  const auto owner = owners_.find(p);
  (owner == owners_.end() ? idle_ : owner->second->idle).emplace(actual, p);
}

std::unique_lock<std::recursive_mutex> Device::turn() {
  return this == &cpu() ? std::unique_lock<std::recursive_mutex>() : std::unique_lock<std::recursive_mutex>(turn_);
}

void Device::forget(GraphPool* pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.insert(pool->idle.begin(), pool->idle.end());
  for (auto it = owners_.begin(); it != owners_.end();) it = it->second == pool ? owners_.erase(it) : std::next(it);
}

MemoryCounters Device::counters() {
  std::lock_guard<std::mutex> lock(mutex_);
  return c_;
}

void Device::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  c_.peak = c_.in_use;
}

void Device::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  drop_idle(0);
}

void Device::fail_after(int64_t allocations) {
  std::lock_guard<std::mutex> lock(mutex_);
  fail_after_ = allocations;
}

Storage::Storage(Device* device, int64_t bytes, bool ahead) : device(device), bytes(bytes) {
  p = device->allocate(bytes, &actual, ahead);
}
Storage::~Storage() { device->release(p, actual); }

void Storage::written() {
  packed.clear();
  mirror_stale = true;
  version++;
}

// ---- tensor -----------------------------------------------------------------------------------------
Tensor Tensor::detached() const {
  Tensor t = *this;
  t.var = nullptr;
  t.again = nullptr;
  return t;
}

Tensor Tensor::view(const Shape& s) const {
  check(s.numel() == numel(), "ERR_SHAPE", "[reshape] expected ", numel(), " elements, got shape ", s);
  Tensor t = detached();
  t.shape = s;
  return t;
}

const void* Tensor::packed(int64_t rows, int64_t cols, bool trans_b) const {
  for (const Packed& p : storage->packed)
    if (p.offset == offset && p.dt == dt && p.rows == rows && p.cols == cols && p.trans_b == trans_b) return p.blob->p;
  return nullptr;
}

Tensor empty(Device* device, const Shape& shape, AgDtype dt) {
  Tensor t;
  t.shape = shape;
  t.dt = dt;
  t.storage = std::make_shared<Storage>(device, shape.numel() * dtype_size(dt));
  return t;
}

Tensor zeros(Device* device, const Shape& shape, AgDtype dt) {
  Tensor t = empty(device, shape, dt);
  run("zeros", device, device->backend->fill, AgFill{t.data(), dt, t.numel(), 0.0});
  return t;
}

void check_status(const char* op, AgStatus status, const AgCtx& ctx) {
  if (status == AG_OK) return;
  const char* code = status == AG_OUT_OF_MEMORY  ? "ERR_MEMORY"
                     : status == AG_INVALID      ? "ERR_ARGUMENT"
                     : status == AG_UNSUPPORTED  ? "ERR_UNSUPPORTED"
                                                 : "ERR_DEVICE";
  fail(code, "[", op, "] ", ctx.error[0] ? ctx.error : "kernel failed", " (status ", int(status), ")");
}

void refresh_mirror(Storage& s) {
  if (!s.mirror_stale) return;
  copy_bytes(s.mirror->device, s.mirror->p, s.p, s.bytes);
  s.mirror_stale = false;
}
void* mirror_of(const std::shared_ptr<Storage>& storage, Device* device) {
  auto turn = device->turn();
  Storage& s = *storage;
  if (!s.mirror || s.mirror->device != device) {
    s.mirror = std::make_shared<Storage>(device, s.bytes, true);
    s.mirror_stale = true;
  }
  if (device->recording)
    device->recording->reads(storage);
  else
    refresh_mirror(s);
  return s.mirror->p;
}

void copy_bytes(Device* device, void* dst, const void* src, int64_t bytes) {
  if (bytes == 0) return;
  auto turn = device->turn();
  AgCtx ctx{};
  ctx.stream = device->stream;
  check_status("copy", device->backend->copy(&ctx, dst, src, bytes), ctx);
}

void synchronize(Device* device) {
  auto turn = device->turn();
  AgCtx ctx{};
  ctx.stream = device->stream;
  check_status("synchronize", device->backend->synchronize(&ctx), ctx);
}

}  // namespace ag

#include "allocator.h"

#include <algorithm>

namespace ag {

// Sizes are rounded so that a block fits its successor: to 64 bytes below 4 KiB, to 1/8 of the power of two below 1
// MiB, and to 64 KiB above, where what is lost counts and a block may serve requests up to 1/8 smaller anyway.
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
void Allocator::drop_idle(int64_t reserved) {
  while (!idle_.empty() && c_.reserved > reserved) {
    auto largest = std::prev(idle_.end());
    backend_->free(stream_, largest->second);
    c_.reserved -= largest->first;
    idle_.erase(largest);
  }
}

// A block of `idle` for *bytes, which become its size, of at most `most`; or null.
void* Allocator::take(std::multimap<int64_t, void*>& idle, int64_t* bytes, int64_t most) {
  auto it = idle.lower_bound(*bytes);
  if (it == idle.end() || it->first > most) return nullptr;
  void* p = it->second;
  *bytes = it->first;
  idle.erase(it);
  return p;
}

// A new block of the system's; `wanted` is what a message names.
void* Allocator::reserve(int64_t wanted, int64_t size, bool recording) {
  // While work is recorded nothing may be given back.
  const int64_t most = recording ? INT64_MAX : std::max(c_.peak, c_.in_use + size) + kSlack - size;
  // Idle blocks of other sizes make room: what is reserved stays near the most that was ever in use.
  drop_idle(most);
  void* p = nullptr;
  AgStatus status = backend_->alloc(stream_, size, &p);
  if (status == AG_OUT_OF_MEMORY && !recording) {
    drop_idle(0);
    status = backend_->alloc(stream_, size, &p);
  }
  if (status == AG_OUT_OF_MEMORY)
    fail("ERR_MEMORY", "[memory] out of memory: ", wanted, " bytes wanted, ", c_.in_use, " in use");
  if (status != AG_OK) {  // work before this failed, and the device answers nothing else from then on
    AgCtx ctx{};
    ctx.stream = stream_;
    if (!recording) backend_->synchronize(&ctx);
    check_status("memory", status, ctx);
  }
  c_.reserved += size;
  return p;
}

void* Allocator::allocate(int64_t bytes, int64_t* actual, bool recording, Pool* pool) {
  int64_t size = rounded(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  // A tensor without elements asks nobody for memory, so it cannot fail.
  if (bytes > 0 && fail_after_ >= 0 && fail_after_-- == 0)
    fail("ERR_MEMORY", "[memory] allocation of ", bytes, " bytes failed (test hook)");
  // Graphs that share a pool are recorded with other sizes each, and nothing is given back meanwhile.
  void* p = pool ? take(pool->idle, &size, 2 * size) : nullptr;
  if (!p) p = take(idle_, &size, size + size / 8);
  if (!p) p = reserve(bytes, size, recording);
  if (pool) owners_[p] = pool;
  *actual = size;
  c_.in_use += size;
  c_.blocks++;
  c_.peak = std::max(c_.peak, c_.in_use);
  return p;
}

// Kept for the next step, which wants the same sizes again; allocate() bounds what lies idle, trim() gives it back.
void Allocator::release(void* p, int64_t actual) {
  std::lock_guard<std::mutex> lock(mutex_);
  c_.in_use -= actual;
  c_.blocks--;
  const auto owner = owners_.find(p);
  (owner == owners_.end() ? idle_ : owner->second->idle).emplace(actual, p);
}

std::shared_ptr<Allocator::Pool> Allocator::open_pool() {
  std::lock_guard<std::mutex> lock(mutex_);
  Pool* pool = &pools_.emplace_back();
  return std::shared_ptr<Pool>(pool, [this](Pool* p) { close(p); });
}

void Allocator::close(const Pool* pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.insert(pool->idle.begin(), pool->idle.end());
  for (auto it = owners_.begin(); it != owners_.end();) it = it->second == pool ? owners_.erase(it) : std::next(it);
  pools_.remove_if([pool](const Pool& p) { return &p == pool; });
}

MemoryCounters Allocator::counters() {
  std::lock_guard<std::mutex> lock(mutex_);
  return c_;
}

void Allocator::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  c_.peak = c_.in_use;
}

void Allocator::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  drop_idle(0);
}

void Allocator::fail_after(int64_t allocations) {
  std::lock_guard<std::mutex> lock(mutex_);
  fail_after_ = allocations;
}

}  // namespace ag

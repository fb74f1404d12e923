// The caching allocator of a device: blocks that are given back wait for the next step, which wants the same sizes
// again.
#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "error.h"

namespace ag {

struct MemoryCounters {
  int64_t in_use = 0;    // bytes of live storages
  int64_t peak = 0;      // highest in_use since the last reset
  int64_t reserved = 0;  // in_use + idle blocks kept for reuse
  int64_t blocks = 0;    // live storages
};

class Allocator {
 public:
  // Blocks that recorded work (graph.h) uses between its own steps: nobody else may have them while it can be launched.
  class Pool {
    friend class Allocator;
    std::multimap<int64_t, void*> idle;
  };

  // The backend's memory is that of its compute stream, `stream`.
  Allocator(const AgBackend* backend, void* stream) : backend_(backend), stream_(stream) {}

  // Throws ERR_MEMORY; actual is what to give back to release. `recording`: work is being recorded, and nothing may be
  // given back to the system. With a pool the block belongs to it from then on.
  void* allocate(int64_t bytes, int64_t* actual, bool recording, Pool* pool);
  void release(void* p, int64_t actual);
  // A pool; its blocks are everybody's again when the last copy of the pointer goes.
  std::shared_ptr<Pool> open_pool();

  MemoryCounters counters();
  void reset_peak();
  void trim();                           // gives idle blocks back to the system
  void fail_after(int64_t allocations);  // test hook: the n-th allocation from now fails; negative: off

 private:
  void* reserve(int64_t wanted, int64_t size, bool recording);
  void drop_idle(int64_t reserved);
  static void* take(std::multimap<int64_t, void*>& idle, int64_t* bytes, int64_t most);
  void close(const Pool* pool);

  const AgBackend* const backend_;
  void* const stream_;
  std::mutex mutex_;
  std::multimap<int64_t, void*> idle_;
  std::list<Pool> pools_;
  std::map<void*, Pool*> owners_;  // of blocks that belong to a pool
  int64_t fail_after_ = -1;
  MemoryCounters c_;
};

}  // namespace ag

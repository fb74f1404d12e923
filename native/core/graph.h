// Recorded work (CUDA graphs): what a thread enqueues on a device's compute stream between begin and end is not done
// but kept, and launched as a whole as often as wanted. Launching reads and writes the memory that was there when it
// was recorded.
#pragma once
#include <mutex>

#include "tensor.h"

namespace ag {

class Graph {
 public:
  // Other threads' work on the device waits until end(). Throws ERR_UNSUPPORTED on a device without graphs. `beside`:
  // works in the same memory as that one, so that what it leaves there besides its results is gone once the other one
  // is launched.
  explicit Graph(Device* device, const Graph* beside = nullptr);
  ~Graph();
  Graph(const Graph&) = delete;
  void end();
  void launch();  // indices that were written to since the last time are brought first

 private:
  Device* const device_;
  void* work_ = nullptr;
  bool recording_ = true;
  std::unique_lock<std::recursive_mutex> turn_;
  Recording kept_;
};

}  // namespace ag

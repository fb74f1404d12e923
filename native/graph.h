// Recorded work (CUDA graphs): what a thread enqueues on a device's compute stream between begin and end is not done but kept, and
// launched as a whole as often as wanted. Launching reads and writes the memory that was there when it was recorded.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "tensor.h"

namespace ag {

class Graph {
 public:
  // Other threads' work on the device waits until end(). Throws ERR_UNSUPPORTED on a device without graphs.
  explicit Graph(Device* device);
  ~Graph();
  Graph(const Graph&) = delete;
  void end();
  void launch();  // indices that were written to since the last time are brought first
  void reads(const std::shared_ptr<Storage>& indices);

 private:
  friend class Device;
  Device* const device_;
  void* work_ = nullptr;
  bool recording_ = true;
  std::unique_lock<std::recursive_mutex> turn_;
  // Blocks that the recorded work uses between its own steps: nobody else may have them while it can be launched.
  std::multimap<int64_t, void*> idle_;
  std::vector<std::shared_ptr<Storage>> indices_;
};

}  // namespace ag

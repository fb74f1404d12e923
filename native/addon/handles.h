// Handles: how JavaScript names tensors and graphs.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/graph.h"
#include "core/tape.h"

namespace ag {

// One per environment (main thread or worker). A handle is an integer: slot index in the low 24 bits, generation above
// (environment number and reuse count), so a stale handle or one of another environment is found out. The garbage
// collector owns nothing.
class State {
 public:
  State();

  double put(Tensor t);
  // Throws ERR_HANDLE, in the name of `op`.
  Tensor& get(const char* op, double handle);
  bool live(double handle) { return find(handle) != nullptr; }
  void dispose(double handle);
  int64_t handles() const { return live_; }

  // Scopes: what a scope's end finds in it goes.
  double scope_begin();
  void scope_end(double depth);
  void keep(double handle);     // hands a tensor of the current scope to the enclosing one
  void persist(double handle);  // takes a tensor out of every scope

  // Graphs have numbers of their own, which are not used again.
  double put(std::unique_ptr<Graph> graph);
  Graph& graph(const char* op, double number);
  void drop_graph(double number);

 private:
  static constexpr int kIndexBits = 24;
  struct Slot {
    Tensor t;
    uint32_t generation;
    int scope;
  };
  struct Entry {
    uint32_t index, generation;
  };

  Slot* find(double handle);
  Slot& found(const char* op, double handle);  // throws ERR_HANDLE
  void release(uint32_t index);

  uint32_t generation_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<std::vector<Entry>> scopes_;
  int64_t live_ = 0;
  std::map<double, std::unique_ptr<Graph>> graphs_;
  double last_graph_ = 0;
};

}  // namespace ag

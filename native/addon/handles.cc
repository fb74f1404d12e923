#include "handles.h"

#include <cmath>

namespace ag {

static std::atomic<uint32_t> environments{0};

State::State() : generation_(uint32_t(++environments % 255 + 1) << 21) {}

double State::put(Tensor t) {
  uint32_t index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    check(slots_.size() < (size_t(1) << kIndexBits), "ERR_MEMORY", "[handle] too many live tensors");
    index = uint32_t(slots_.size());
    slots_.push_back(Slot{Tensor(), generation_, 0});
  }
  Slot& s = slots_[index];
  s.t = std::move(t);
  s.scope = int(scopes_.size());
  live_++;
  if (!scopes_.empty()) scopes_.back().push_back({index, s.generation});
  return double((uint64_t(s.generation) << kIndexBits) | index);
}

State::Slot* State::find(double handle) {
  if (!(handle >= 0) || handle >= 9007199254740992.0 || std::floor(handle) != handle) return nullptr;
  uint64_t h = uint64_t(handle);
  uint32_t index = uint32_t(h & ((1u << kIndexBits) - 1));
  if (index >= slots_.size()) return nullptr;
  Slot& s = slots_[index];
  return s.generation == (h >> kIndexBits) && s.t.defined() ? &s : nullptr;
}

State::Slot& State::found(const char* op, double handle) {
  Slot* s = find(handle);
  check(s != nullptr, "ERR_HANDLE", "[", op, "] tensor: expected a live handle of this thread, got ", handle,
        " (disposed, from another thread, or never one)");
  return *s;
}

Tensor& State::get(const char* op, double handle) { return found(op, handle).t; }

void State::dispose(double handle) { release(uint32_t(&found("dispose", handle) - slots_.data())); }

void State::release(uint32_t index) {
  Slot& s = slots_[index];
  s.t = Tensor();
  live_--;
  // After 2^21 reuses the slot is retired, so no generation ever comes back.
  if ((++s.generation & ((1u << 21) - 1)) != 0) free_.push_back(index);
}

// ---- scopes -----------------------------------------------------------------------------------------
double State::scope_begin() {
  scopes_.emplace_back();
  return double(scopes_.size());
}

void State::scope_end(double depth) {
  check(!scopes_.empty() && depth == double(scopes_.size()), "ERR_ARGUMENT", "[scopeEnd] depth: expected ",
        scopes_.size(), ", got ", depth);
  std::vector<Entry> entries = std::move(scopes_.back());
  int level = int(scopes_.size());
  scopes_.pop_back();
  for (const Entry& e : entries) {
    Slot& s = slots_[e.index];
    if (s.generation == e.generation && s.t.defined() && s.scope == level) release(e.index);
  }
}

void State::keep(double handle) {
  Slot& s = found("keep", handle);
  if (s.scope == 0 || s.scope != int(scopes_.size())) return;  // already outside this scope
  s.scope--;
  if (s.scope > 0) scopes_[s.scope - 1].push_back({uint32_t(&s - slots_.data()), s.generation});
}

void State::persist(double handle) { found("persist", handle).scope = 0; }

// ---- graphs -----------------------------------------------------------------------------------------
double State::put(std::unique_ptr<Graph> graph) {
  graphs_[++last_graph_] = std::move(graph);
  return last_graph_;
}

Graph& State::graph(const char* op, double number) {
  auto it = graphs_.find(number);
  check(it != graphs_.end(), "ERR_HANDLE", "[", op, "] graph: expected a live one of this thread, got ", number);
  return *it->second;
}

void State::drop_graph(double number) {
  graph("graphDispose", number);
  graphs_.erase(number);
}

}  // namespace ag

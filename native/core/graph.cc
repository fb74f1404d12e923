#include "graph.h"

namespace ag {

Graph::Graph(Device* device, const Graph* beside) : device_(device), turn_(device->turn()) {
  check(!beside || beside->device_ == device, "ERR_DEVICE",
        "[graph] beside: expected a graph of the same device, got one of another");
  kept_.pool = beside ? beside->kept_.pool : device->memory.open_pool();
  check(!device->recording, "ERR_ARGUMENT", "[graph] begin: expected no other graph being recorded, got one");
  AgCtx ctx = device->context();
  check_status("graph", device->backend->graph_begin(&ctx), ctx);
  device->recording = &kept_;
}

Graph::~Graph() {
  if (recording_) {
    try {
      end();
    } catch (const Error&) {  // what was recorded is not wanted
    }
  }
  auto turn = device_->turn();
  if (work_) {
    AgCtx ctx = device_->context();
    device_->backend->synchronize(&ctx);  // its last launch may still run
    device_->backend->graph_destroy(work_);
  }
}

void Graph::end() {
  check(recording_, "ERR_ARGUMENT", "[graph] end: expected a graph being recorded, got one that has ended");
  recording_ = false;
  device_->recording = nullptr;
  AgCtx ctx = device_->context();
  const AgStatus status = device_->backend->graph_end(&ctx, &work_);
  turn_.unlock();
  check_status("graph", status, ctx);
}

void Graph::launch() {
  check(work_ != nullptr, "ERR_ARGUMENT", "[graph] launch: expected a graph that was recorded to its end");
  auto turn = device_->turn();
  for (const auto& storage : kept_.indices) refresh_mirror(*storage);
  AgCtx ctx = device_->context();
  check_status("graph", device_->backend->graph_launch(&ctx, work_), ctx);
}

}  // namespace ag

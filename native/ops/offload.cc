#include "offload.h"

#include <algorithm>
#include <vector>

#include "core/shape.h"

namespace ag::ops {

namespace {

struct HostBlock {
  const AgBackend* backend;
  void* p = nullptr;
  HostBlock(Device* device, int64_t bytes) : backend(device->backend) {
    check(backend->alloc_host(bytes, &p) == AG_OK, "ERR_MEMORY", "[adamw] out of host memory: ", bytes,
          " bytes wanted");
  }
  ~HostBlock() { backend->free_host(p); }
  HostBlock(const HostBlock&) = delete;
};
struct Event {
  const AgBackend* backend;
  void* p = nullptr;
  explicit Event(Device* device) : backend(device->backend) {
    check(backend->event_create(&p) == AG_OK, "ERR_DEVICE", "[adamw] no event to be had from the device");
  }
  ~Event() { backend->event_destroy(p); }
  Event(const Event&) = delete;
};

constexpr int64_t kPiece = int64_t(1) << 20;  // elements

// Where a piece of a tensor is while the CPU works on it, and the moment from which the next one may come there.
struct Slot {
  HostBlock p, g;
  Event gone;
  bool used = false;
  explicit Slot(Device* device) : p(device, kPiece * 4), g(device, kPiece * 4), gone(device) {}
};
struct Piece {
  const AgAdamWTensor* tensor;
  int64_t at, n;
  void* device_p() const { return static_cast<char*>(tensor->p) + at * dtype_size(tensor->dt_p); }
  const void* device_g() const { return static_cast<const char*>(tensor->g) + at * dtype_size(tensor->dt_g); }
};

// Parameters and gradients are on a device, the state is in host memory and the CPU works on it (ZeRO-Offload, Ren et
// al. 2021): while one piece is updated the next is on its way here and the last on its way back. The bits are those of
// an update on the CPU.
class Offloaded {
 public:
  explicit Offloaded(Device* device)
      : device_(device), b_(*device->backend), slots_{Slot(device), Slot(device), Slot(device)} {
    for (int i = 0; i < 3; i++) ctx_[i].stream = b_.stream(AgStream(i));
  }
  ~Offloaded() {  // before the slots go
    for (AgCtx& ctx : ctx_) b_.synchronize(&ctx);
  }

  void update(AgAdamW a) {
    const auto turn = device_->turn();  // what another thread records must not take these streams in
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < a.count; i++)
      for (int64_t at = 0; at < a.tensors[i].n; at += kPiece)
        pieces.push_back({&a.tensors[i], at, std::min(kPiece, a.tensors[i].n - at)});
    Event ready(device_);
    on(AG_STREAM_COMPUTE, b_.event_record, ready.p);
    for (AgStream s : {AG_STREAM_UPLOAD, AG_STREAM_DOWNLOAD}) on(s, b_.event_wait, ready.p);
    for (size_t i = 0; i < pieces.size(); i++) {
      if (i == 0) bring(pieces[0], slots_[0]);
      ask(b_.synchronize(&ctx_[AG_STREAM_DOWNLOAD]), AG_STREAM_DOWNLOAD);
      if (i + 1 < pieces.size()) bring(pieces[i + 1], slots_[(i + 1) % 3]);
      work(a, pieces[i], slots_[i % 3]);
    }
    for (Slot& slot : slots_)
      if (slot.used) on(AG_STREAM_COMPUTE, b_.event_wait, slot.gone.p);
  }

 private:
  void ask(AgStatus status, AgStream s) { check_status("adamw", status, ctx_[s]); }
  void on(AgStream s, AgStatus (*f)(AgCtx*, void*), void* event) { ask(f(&ctx_[s], event), s); }

  void bring(const Piece& piece, Slot& slot) {
    if (slot.used) on(AG_STREAM_DOWNLOAD, b_.event_wait, slot.gone.p);
    AgCtx* ctx = &ctx_[AG_STREAM_DOWNLOAD];
    ask(b_.copy(ctx, slot.p.p, piece.device_p(), piece.n * dtype_size(piece.tensor->dt_p)), AG_STREAM_DOWNLOAD);
    ask(b_.copy(ctx, slot.g.p, piece.device_g(), piece.n * dtype_size(piece.tensor->dt_g)), AG_STREAM_DOWNLOAD);
  }

  void work(AgAdamW a, const Piece& piece, Slot& slot) {
    AgAdamWTensor t = *piece.tensor;
    const int64_t size = t.state == AG_STATE_COMPACT ? 2 : 4;
    auto behind = [&](void* p) { return p ? static_cast<char*>(p) + piece.at * size : nullptr; };
    t.p = slot.p.p;
    t.g = slot.g.p;
    t.master = behind(t.master);
    t.m = behind(t.m);
    t.v = behind(t.v);
    t.n = piece.n;
    t.first += piece.at;
    a.tensors = &t;
    a.count = 1;
    run("adamw", &cpu(), &AgBackend::adamw, a);
    ask(b_.copy(&ctx_[AG_STREAM_UPLOAD], piece.device_p(), slot.p.p, piece.n * dtype_size(t.dt_p)), AG_STREAM_UPLOAD);
    on(AG_STREAM_UPLOAD, b_.event_record, slot.gone.p);
    slot.used = true;
  }

  Device* device_;
  const AgBackend& b_;
  AgCtx ctx_[3] = {};
  Slot slots_[3];
};

}  // namespace

void update_offloaded(Device* device, const AgAdamW& a) { Offloaded(device).update(a); }

}  // namespace ag::ops

// Everything that happens to parameters after backward. Nothing here is recorded.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace ag::ops {

Tensor sum_squares(const std::vector<Tensor>& xs) {
  check(!xs.empty(), "ERR_ARGUMENT", "[sumSquares] tensors: expected at least one, got none");
  std::vector<AgSpan> spans;
  for (const Tensor& x : xs) {
    want_float("sumSquares", "tensor", x);
    want_same_device("sumSquares", {&xs[0], &x});
    spans.push_back(AgSpan{x.data(), x.dt, x.numel()});
  }
  Device* device = xs[0].device();
  Tensor out = empty(device, Shape{}, AG_F64);
  run("sumSquares", device, device->backend->sum_squares, AgSumSquares{spans.data(), int64_t(spans.size()), out.as<double>()},
      AG_K_SUM_SQUARES);
  return out;
}

namespace {

void check_numbers(const AdamWIn& in) {
  size_t n = in.params.size();
  for (size_t got : {in.grads.size(), in.masters.size(), in.m.size(), in.v.size(), in.lr_scale.size(), in.weight_decay.size()})
    check(got == n, "ERR_ARGUMENT", "[adamw] lists: expected ", n, " entries each, got ", got);
  check(in.step >= 1 && std::floor(in.step) == in.step, "ERR_ARGUMENT", "[adamw] step: expected an integer >= 1, got ", in.step);
  check(in.seed >= 0 && std::floor(in.seed) == in.seed, "ERR_ARGUMENT", "[adamw] seed: expected an integer >= 0, got ", in.seed);
  check(in.beta1 >= 0 && in.beta1 < 1 && in.beta2 >= 0 && in.beta2 < 1, "ERR_ARGUMENT", "[adamw] betas: expected in [0, 1), got ",
        in.beta1, ", ", in.beta2);
  check(std::isfinite(in.eps) && std::isfinite(in.lr), "ERR_ARGUMENT", "[adamw] lr, eps: expected finite numbers, got ", in.lr, ", ", in.eps);
  check(in.max_norm >= 0 && std::isfinite(in.max_norm), "ERR_ARGUMENT", "[adamw] maxNorm: expected a finite number >= 0, got ", in.max_norm);
  for (const auto* list : {&in.lr_scale, &in.weight_decay})
    for (double x : *list) check(std::isfinite(x), "ERR_ARGUMENT", "[adamw] lrScale, weightDecay: expected finite numbers, got ", x);
}

// The moments' dtype says which state it is (backend.h): f32 the full one, bf16 the compact one.
AgAdamWTensor checked(const AdamWIn& in, size_t i, int64_t first) {
  const char* op = "adamw";
  const Tensor &p = in.params[i], &g = in.grads[i], master = in.masters[i].value_or(Tensor());
  const bool bf16 = p.dt == AG_BF16, compact = bf16 && in.m[i].dt == AG_BF16;
  check(p.dt == AG_F32 || bf16, "ERR_DTYPE", "[adamw] parameter ", i, ": expected f32 or bf16, got ", dtype_name(p.dt));
  check(g.dt == AG_F32 || g.dt == AG_BF16, "ERR_DTYPE", "[adamw] gradient ", i, ": expected f32 or bf16, got ", dtype_name(g.dt));
  check(master.defined() == bf16, "ERR_ARGUMENT", "[adamw] master ", i, ": a bf16 parameter has one, an f32 one has none");
  for (const Tensor* t : {&g, &in.m[i], &in.v[i]}) want_shape(op, "state", *t, p.shape);
  for (const Tensor* t : {&in.m[i], &in.v[i]}) want_dtype(op, "moment", *t, compact ? AG_BF16 : AG_F32);
  if (bf16) {
    want_shape(op, "master", master, p.shape);
    want_dtype(op, "master", master, compact ? AG_BF16 : AG_F32);  // compact: 16 bits, no number of its own
  }
  want_same_device(op, {&in.params[0], &p, &g});
  want_same_device(op, {&in.m[0], &in.m[i], &in.v[i], &master});
  return AgAdamWTensor{p.data(), p.dt, g.data(), g.dt, compact ? AG_STATE_COMPACT : AG_STATE_FULL, bf16 ? master.data() : nullptr,
                       in.m[i].data(), in.v[i].data(), p.numel(), first, in.lr_scale[i], in.weight_decay[i]};
}

// ---- state in host memory ---------------------------------------------------------------------------
struct HostBlock {
  const AgBackend* backend;
  void* p = nullptr;
  HostBlock(Device* device, int64_t bytes) : backend(device->backend) {
    check(backend->alloc_host(bytes, &p) == AG_OK, "ERR_MEMORY", "[adamw] out of host memory: ", bytes, " bytes wanted");
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

// Parameters and gradients are on a device, the state is in host memory and the CPU works on it (ZeRO-Offload, Ren et al. 2021): while
// one piece is updated the next is on its way here and the last on its way back. The bits are those of an update on the CPU.
class Offloaded {
 public:
  explicit Offloaded(Device* device) : device_(device), b_(*device->backend), slots_{Slot(device), Slot(device), Slot(device)} {
    for (int i = 0; i < 3; i++) ctx_[i].stream = b_.stream(AgStream(i));
  }
  ~Offloaded() {  // before the slots go
    for (AgCtx& ctx : ctx_) b_.synchronize(&ctx);
  }

  void update(AgAdamW a) {
    const auto turn = device_->turn();  // what another thread records must not take these streams in
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < a.count; i++)
      for (int64_t at = 0; at < a.tensors[i].n; at += kPiece) pieces.push_back({&a.tensors[i], at, std::min(kPiece, a.tensors[i].n - at)});
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
    run("adamw", &cpu(), cpu().backend->adamw, a);
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

void adamw(const AdamWIn& in) {
  check_numbers(in);
  if (in.params.empty()) return;
  Device* device = in.params[0].device();
  std::vector<AgAdamWTensor> list;
  int64_t first = 0;
  for (size_t i = 0; i < in.params.size(); i++) {
    list.push_back(checked(in, i, first));
    first += in.params[i].numel();
    for (const Tensor& t : {in.params[i], in.m[i], in.v[i]}) t.storage->written();
    if (in.masters[i]) in.masters[i]->storage->written();
  }
  if (in.norm_squared) {
    want_shape("adamw", "normSquared", *in.norm_squared, Shape{});
    want_dtype("adamw", "normSquared", *in.norm_squared, AG_F64);
    want_same_device("adamw", {&in.params[0], &*in.norm_squared});
  }
  check(in.norm_squared || in.max_norm == 0, "ERR_ARGUMENT", "[adamw] maxNorm: expected 0 without normSquared, got ", in.max_norm);
  const AgAdamWStep now{in.lr, int64_t(in.step)};
  AgAdamW a{list.data(), int64_t(list.size()), in.beta1, in.beta2, in.eps, &now, nullptr, in.max_norm, uint64_t(in.seed)};
  if (in.m[0].device() != device) {
    check(in.m[0].device() == &cpu(), "ERR_DEVICE", "[adamw] moments: expected on ", device_name(device), " or cpu, got ",
          device_name(in.m[0].device()));
    double norm_squared = 0;
    if (in.norm_squared) {
      copy_bytes(device, &norm_squared, in.norm_squared->data(), sizeof norm_squared);
      synchronize(device);
      a.norm_squared = &norm_squared;
    }
    return Offloaded(device).update(a);
  }
  Storage on_device(device, sizeof now);
  copy_bytes(device, on_device.p, &now, sizeof now);
  a.now = static_cast<const AgAdamWStep*>(on_device.p);
  a.norm_squared = in.norm_squared ? in.norm_squared->as<double>() : nullptr;
  run("adamw", device, device->backend->adamw, a);
}

}  // namespace ag::ops

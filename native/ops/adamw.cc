// Everything that happens to parameters after backward. Nothing here is recorded.
#include <cmath>

#include "offload.h"
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
  run("sumSquares", device, &AgBackend::sum_squares,
      AgSumSquares{spans.data(), int64_t(spans.size()), out.as<double>()});
  return out;
}

namespace {

void check_numbers(const AdamWIn& in) {
  size_t n = in.params.size();
  for (size_t got :
       {in.grads.size(), in.masters.size(), in.m.size(), in.v.size(), in.lr_scale.size(), in.weight_decay.size()})
    check(got == n, "ERR_ARGUMENT", "[adamw] lists: expected ", n, " entries each, got ", got);
  check(in.step >= 1 && std::floor(in.step) == in.step, "ERR_ARGUMENT", "[adamw] step: expected an integer >= 1, got ",
        in.step);
  check(in.seed >= 0 && std::floor(in.seed) == in.seed, "ERR_ARGUMENT", "[adamw] seed: expected an integer >= 0, got ",
        in.seed);
  check(in.beta1 >= 0 && in.beta1 < 1 && in.beta2 >= 0 && in.beta2 < 1, "ERR_ARGUMENT",
        "[adamw] betas: expected in [0, 1), got ", in.beta1, ", ", in.beta2);
  check(std::isfinite(in.eps) && std::isfinite(in.lr), "ERR_ARGUMENT", "[adamw] lr, eps: expected finite numbers, got ",
        in.lr, ", ", in.eps);
  check(in.max_norm >= 0 && std::isfinite(in.max_norm), "ERR_ARGUMENT",
        "[adamw] maxNorm: expected a finite number >= 0, got ", in.max_norm);
  for (const auto* list : {&in.lr_scale, &in.weight_decay})
    for (double x : *list)
      check(std::isfinite(x), "ERR_ARGUMENT", "[adamw] lrScale, weightDecay: expected finite numbers, got ", x);
}

// The moments' dtype says which state it is (AgAdamWTensor): f32 the full one, bf16 the compact one.
AgAdamWTensor checked(const AdamWIn& in, size_t i, int64_t first) {
  const char* op = "adamw";
  const Tensor &p = in.params[i], &g = in.grads[i], master = in.masters[i].value_or(Tensor());
  const bool bf16 = p.dt == AG_BF16, compact = bf16 && in.m[i].dt == AG_BF16;
  check(p.dt == AG_F32 || bf16, "ERR_DTYPE", "[adamw] parameter ", i, ": expected f32 or bf16, got ", dtype_name(p.dt));
  check(g.dt == AG_F32 || g.dt == AG_BF16, "ERR_DTYPE", "[adamw] gradient ", i, ": expected f32 or bf16, got ",
        dtype_name(g.dt));
  check(master.defined() == bf16, "ERR_ARGUMENT", "[adamw] master ", i,
        ": a bf16 parameter has one, an f32 one has none");
  for (const Tensor* t : {&g, &in.m[i], &in.v[i]}) want_shape(op, "state", *t, p.shape);
  for (const Tensor* t : {&in.m[i], &in.v[i]}) want_dtype(op, "moment", *t, compact ? AG_BF16 : AG_F32);
  if (bf16) {
    want_shape(op, "master", master, p.shape);
    want_dtype(op, "master", master, compact ? AG_BF16 : AG_F32);  // compact: 16 bits, no number of its own
  }
  want_same_device(op, {&in.params[0], &p, &g});
  want_same_device(op, {&in.m[0], &in.m[i], &in.v[i], &master});
  return AgAdamWTensor{p.data(),
                       p.dt,
                       g.data(),
                       g.dt,
                       compact ? AG_STATE_COMPACT : AG_STATE_FULL,
                       bf16 ? master.data() : nullptr,
                       in.m[i].data(),
                       in.v[i].data(),
                       p.numel(),
                       first,
                       in.lr_scale[i],
                       in.weight_decay[i]};
}

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
  check(in.norm_squared || in.max_norm == 0, "ERR_ARGUMENT", "[adamw] maxNorm: expected 0 without normSquared, got ",
        in.max_norm);
  const AgAdamWStep now{in.lr, int64_t(in.step)};
  AgAdamW a{list.data(), int64_t(list.size()), in.beta1,         in.beta2, in.eps, &now,
            nullptr,     in.max_norm,          uint64_t(in.seed)};
  if (in.m[0].device() != device) {
    check(in.m[0].device() == &cpu(), "ERR_DEVICE", "[adamw] moments: expected on ", device_name(device),
          " or cpu, got ", device_name(in.m[0].device()));
    double norm_squared = 0;
    if (in.norm_squared) {
      copy_bytes(device, &norm_squared, in.norm_squared->data(), sizeof norm_squared);
      synchronize(device);
      a.norm_squared = &norm_squared;
    }
    return update_offloaded(device, a);
  }
  Storage on_device(device, sizeof now);
  copy_bytes(device, on_device.p, &now, sizeof now);
  a.now = static_cast<const AgAdamWStep*>(on_device.p);
  a.norm_squared = in.norm_squared ? in.norm_squared->as<double>() : nullptr;
  run("adamw", device, &AgBackend::adamw, a);
}

}  // namespace ag::ops

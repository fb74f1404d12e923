// Everything that happens to parameters after backward. Nothing here is recorded.
#include <cmath>

#include "ops.h"

namespace ag::ops {

double sum_squares(const std::vector<Tensor>& xs) {
  if (xs.empty()) return 0.0;
  std::vector<AgSpan> spans;
  for (const Tensor& x : xs) {
    want_float("sumSquares", "tensor", x);
    want_same_device("sumSquares", {&xs[0], &x});
    spans.push_back(AgSpan{x.data(), x.dt, x.numel()});
  }
  double out = 0;
  Device* device = xs[0].device();
  run("sumSquares", device, device->backend->sum_squares, AgSumSquares{spans.data(), int64_t(spans.size()), &out}, AG_K_SUM_SQUARES);
  return out;
}

void adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Opt>& masters,
           const std::vector<Tensor>& m, const std::vector<Tensor>& v, const std::vector<double>& lr,
           const std::vector<double>& weight_decay, double beta1, double beta2, double eps, double step, double grad_scale) {
  const char* op = "adamw";
  size_t n = params.size();
  for (size_t got : {grads.size(), masters.size(), m.size(), v.size(), lr.size(), weight_decay.size()})
    check(got == n, "ERR_ARGUMENT", "[adamw] lists: expected ", n, " entries each, got ", got);
  check(step >= 1 && std::floor(step) == step, "ERR_ARGUMENT", "[adamw] step: expected an integer >= 1, got ", step);
  check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "ERR_ARGUMENT", "[adamw] betas: expected in [0, 1), got ", beta1, ", ", beta2);
  check(std::isfinite(eps) && std::isfinite(grad_scale), "ERR_ARGUMENT", "[adamw] eps, gradScale: expected finite numbers");
  if (n == 0) return;
  std::vector<AgAdamWTensor> list;
  for (size_t i = 0; i < n; i++) {
    const Tensor& p = params[i];
    bool bf16 = p.dt == AG_BF16;
    check(p.dt == AG_F32 || bf16, "ERR_DTYPE", "[adamw] parameter ", i, ": expected f32 or bf16, got ", dtype_name(p.dt));
    check(grads[i].dt == AG_F32 || grads[i].dt == AG_BF16, "ERR_DTYPE", "[adamw] gradient ", i, ": expected f32 or bf16, got ", dtype_name(grads[i].dt));
    const Tensor master = masters[i].value_or(Tensor());
    check(master.defined() == bf16, "ERR_ARGUMENT", "[adamw] master ", i, ": a bf16 parameter has an f32 master, an f32 one has none");
    check(std::isfinite(lr[i]) && std::isfinite(weight_decay[i]), "ERR_ARGUMENT", "[adamw] lr and weightDecay ", i, ": expected finite numbers");
    for (const Tensor* t : {&grads[i], &m[i], &v[i]}) want_shape(op, "state", *t, p.shape);
    for (const Tensor* t : {&m[i], &v[i]}) want_dtype(op, "moment", *t, AG_F32);
    if (bf16) {
      want_shape(op, "master", master, p.shape);
      want_dtype(op, "master", master, AG_F32);
    }
    want_same_device(op, {&params[0], &p, &grads[i], &master, &m[i], &v[i]});
    list.push_back(AgAdamWTensor{p.data(), p.dt, grads[i].data(), grads[i].dt, bf16 ? master.as<float>() : nullptr,
                                 m[i].as<float>(), v[i].as<float>(), p.numel(), lr[i], weight_decay[i]});
  }
  AgAdamW a{list.data(), int64_t(n), beta1, beta2, eps, grad_scale, int64_t(step)};
  run(op, params[0].device(), params[0].device()->backend->adamw, a);
}

}  // namespace ag::ops

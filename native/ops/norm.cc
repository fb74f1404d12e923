// Normalisations over the last dimension.
#include "ops.h"

namespace ag::ops {

static Tensor norm(const char* op, const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  bool layer = b.defined();
  want_float(op, "x", x);
  want_dtype(op, "weight", w, x.dt);
  check(x.shape.rank >= 1, "ERR_SHAPE", "[", op, "] x: expected rank >= 1, got ", x.shape);
  want_shape(op, "weight", w, Shape{x.shape.cols()});
  if (layer) {
    want_dtype(op, "bias", b, x.dt);
    want_shape(op, "bias", b, Shape{x.shape.cols()});
  }
  check(eps >= 0, "ERR_ARGUMENT", "[", op, "] eps: expected >= 0, got ", eps);
  want_same_device(op, {&x, &w, &b});
  int64_t rows = x.shape.rows(), cols = x.shape.cols();
  Tensor rstd = empty(x.device(), Shape{rows}, acc_dtype(x.dt)), mean;
  if (layer) mean = empty_like(rstd);
  Saved kept_x(x), kept_w(w), kept_b(b);
  auto forward = [=] {
    const Tensor sx = kept_x.get(), sw = kept_w.get(), sb = kept_b.get();
    Tensor y = empty_like(sx);
    AgNorm a{};
    a.y = y.data();
    a.x = sx.data();
    a.w = sw.data();
    a.b = layer ? sb.data() : nullptr;
    a.mean = layer ? mean.data() : nullptr;
    a.rstd = rstd.data();
    a.rows = rows;
    a.cols = cols;
    a.eps = eps;
    a.dt = sx.dt;
    run(op, sx.device(), &AgBackend::norm, a);
    return y;
  };
  Tensor y = forward();
  if (!recording({&x, &w, &b})) return y;
  y.again = std::make_shared<Again>(Again{forward, Tensor()});
  record(op, {&y}, {x, w, b}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    const Tensor sx = kept_x.get(), sw = kept_w.get();
    AgNormGrad g{};
    Tensor dx = grads.needs(0) ? empty_like(dy) : Tensor();
    g.dx = dx.defined() ? dx.data() : nullptr;
    g.dw = grads.slot(1);
    if (layer) g.db = grads.slot(2);
    g.dy = dy.data();
    g.x = sx.data();
    g.w = sw.data();
    g.mean = layer ? mean.data() : nullptr;
    g.rstd = rstd.data();
    g.rows = rows;
    g.cols = cols;
    g.dt = dy.dt;
    run(op, dy.device(), &AgBackend::norm_grad, g);
    if (dx.defined()) grads.add(0, std::move(dx));
  });
  return y;
}

Tensor layer_norm(const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  return norm("layerNorm", x, w, b, eps);
}
Tensor rms_norm(const Tensor& x, const Tensor& w, double eps) { return norm("rmsNorm", x, w, Tensor(), eps); }

Tensor softmax(const Tensor& x) {
  want_float("softmax", "x", x);
  check(x.shape.rank >= 1, "ERR_SHAPE", "[softmax] x: expected rank >= 1, got ", x.shape);
  int64_t rows = x.shape.rows(), cols = x.shape.cols();
  Tensor y = empty_like(x);
  run("softmax", x.device(), &AgBackend::softmax, AgSoftmax{y.data(), x.data(), rows, cols, x.dt});
  Saved saved(y);
  record("softmax", {&y}, {x}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    Tensor dx = empty_like(dy);
    run("softmax", dy.device(), &AgBackend::softmax_grad,
        AgSoftmaxGrad{dx.data(), dy.data(), saved.get().data(), rows, cols, dy.dt});
    grads.add(0, std::move(dx));
  });
  return y;
}

Tensor l2_normalize(const Tensor& x) {
  want_float("l2Normalize", "x", x);
  check(x.shape.rank >= 1, "ERR_SHAPE", "[l2Normalize] x: expected rank >= 1, got ", x.shape);
  int64_t rows = x.shape.rows(), cols = x.shape.cols();
  Tensor y = empty_like(x), length = empty(x.device(), Shape{rows}, acc_dtype(x.dt));
  run("l2Normalize", x.device(), &AgBackend::l2norm, AgL2Norm{y.data(), x.data(), length.data(), rows, cols, x.dt});
  Saved saved(y);
  record("l2Normalize", {&y}, {x}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    Tensor dx = empty_like(dy);
    run("l2Normalize", dy.device(), &AgBackend::l2norm_grad,
        AgL2NormGrad{dx.data(), dy.data(), saved.get().data(), length.data(), rows, cols, dy.dt});
    grads.add(0, std::move(dx));
  });
  return y;
}

}  // namespace ag::ops

// Elementwise ops and sums over all elements.
#include "ops.h"

namespace ag::ops {

static void check_suffix(const char* op, const Tensor& a, const Tensor& b) {
  want_float(op, "a", a);
  want_dtype(op, "b", b, a.dt);
  want_same_device(op, {&a, &b});
  bool ok = b.shape.rank <= a.shape.rank;
  for (int i = 1; ok && i <= b.shape.rank; i++) ok = b.shape[-i] == a.shape[-i];
  check(ok || b.numel() == 1, "ERR_SHAPE", "[", op, "] b: expected a suffix of ", a.shape, " or one element, got ",
        b.shape);
}

static Tensor binary_raw(const char* op, AgBinaryOp kind, const Tensor& a, const Tensor& b) {
  Tensor y = empty_like(a);
  if (a.numel())
    run(op, a.device(), &AgBackend::binary, AgBinary{kind, y.data(), a.data(), b.data(), a.numel(), b.numel(), a.dt});
  return y;
}

static Tensor scale_raw(const Tensor& x, double alpha) {
  Tensor y = empty_like(x);
  run("scale", x.device(), &AgBackend::unary, AgUnary{AG_SCALE, y.data(), x.data(), x.numel(), x.dt, alpha});
  return y;
}

// Gradient of a broadcast operand: the sum over the leading part it was repeated on.
static void add_broadcast(Grads& g, int input, const Tensor& dy, const Shape& shape, double alpha) {
  if (!g.needs(input)) return;
  if (shape.numel() == dy.numel()) {
    Tensor d = alpha == 1.0 ? dy.view(shape) : scale_raw(dy, alpha).view(shape);
    g.add(input, std::move(d));
    return;
  }
  int64_t cols = shape.numel();
  run("add", dy.device(), &AgBackend::col_sum,
      AgColSum{g.slot(input), dy.data(), cols ? dy.numel() / cols : 0, cols, cols, dy.dt, alpha, nullptr});
}

static Tensor add_sub(const char* op, AgBinaryOp kind, double sign, const Tensor& a, const Tensor& b) {
  check_suffix(op, a, b);
  Tensor y = binary_raw(op, kind, a, b);
  Shape shape_b = b.shape;
  record(op, {&y}, {a, b}, [=](Grads& g) {
    if (g.needs(0)) g.add(0, g.out());
    add_broadcast(g, 1, g.out(), shape_b, sign);
  });
  return y;
}

Tensor add(const Tensor& a, const Tensor& b) { return add_sub("add", AG_ADD, 1.0, a, b); }
Tensor sub(const Tensor& a, const Tensor& b) { return add_sub("sub", AG_SUB, -1.0, a, b); }

Tensor mul(const Tensor& a, const Tensor& b) {
  check_suffix("mul", a, b);
  Tensor y = binary_raw("mul", AG_MUL, a, b);
  Saved sa(a), sb(b);
  Shape shape_b = b.shape;
  record("mul", {&y}, {a, b}, [=](Grads& g) {
    if (g.needs(0)) g.add(0, binary_raw("mul", AG_MUL, g.out(), sb.get()));
    if (g.needs(1)) add_broadcast(g, 1, binary_raw("mul", AG_MUL, g.out(), sa.get()), shape_b, 1.0);
  });
  return y;
}

Tensor scale(const Tensor& x, double alpha) {
  want_float("scale", "x", x);
  Tensor y = scale_raw(x, alpha);
  record("scale", {&y}, {x}, [alpha](Grads& g) { g.add(0, scale_raw(g.out(), alpha)); });
  return y;
}

Tensor unary(const Tensor& x, const std::string& name) {
  AgUnaryOp kind = parse_activation("unary", name);
  want_float(name.c_str(), "x", x);
  Tensor y = empty_like(x);
  Saved saved(x);
  run("unary", x.device(), &AgBackend::unary, AgUnary{kind, y.data(), x.data(), x.numel(), x.dt, 1.0});
  record("unary", {&y}, {x}, [kind, saved](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dx = empty_like(dy);
    run("unary", dy.device(), &AgBackend::unary_grad,
        AgUnaryGrad{kind, dx.data(), dy.data(), saved.get().data(), dy.numel(), dy.dt, 1.0});
    g.add(0, std::move(dx));
  });
  return y;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  want_float("siluMul", "gate", gate);
  want_dtype("siluMul", "up", up, gate.dt);
  want_shape("siluMul", "up", up, gate.shape);
  want_same_device("siluMul", {&gate, &up});
  Tensor y = empty_like(gate);
  Saved sg(gate), su(up);
  run("siluMul", y.device(), &AgBackend::silu_mul, AgSiluMul{y.data(), gate.data(), up.data(), y.numel(), y.dt});
  record("siluMul", {&y}, {gate, up}, [sg, su](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dg = empty_like(dy), du = empty_like(dy);
    run("siluMul", dy.device(), &AgBackend::silu_mul_grad,
        AgSiluMulGrad{dg.data(), du.data(), dy.data(), sg.get().data(), su.get().data(), dy.numel(), dy.dt});
    g.add(0, std::move(dg));
    g.add(1, std::move(du));
  });
  return y;
}

// ---- sums -------------------------------------------------------------------------------------------
static Tensor sum_scaled(const char* op, const Tensor& x, double alpha) {
  want_float(op, "x", x);
  Tensor y = empty(x.device(), Shape{}, x.dt);
  run(op, x.device(), &AgBackend::sum, AgSum{y.data(), x.data(), x.numel(), x.dt, alpha});
  Shape shape = x.shape;
  record(op, {&y}, {x}, [shape, alpha](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dx = zeros(dy.device(), shape, dy.dt);
    if (dx.numel())
      run("sum", dx.device(), &AgBackend::binary,
          AgBinary{AG_ADD, dx.data(), dx.data(), dy.data(), dx.numel(), 1, dx.dt});
    g.add(0, alpha == 1.0 ? dx : scale_raw(dx, alpha));
  });
  return y;
}

Tensor sum(const Tensor& x) { return sum_scaled("sum", x, 1.0); }
Tensor mean(const Tensor& x) {
  check(x.numel() > 0, "ERR_SHAPE", "[mean] expected at least one element, got ", x.shape);
  return sum_scaled("mean", x, 1.0 / double(x.numel()));
}

}  // namespace ag::ops

// Matrix products.
#include "linear.h"

namespace ag::ops {

AgGemm product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b, int64_t m, int64_t n, int64_t k) {
  AgGemm g{};
  g.m = m;
  g.n = n;
  g.k = k;
  g.a = a.data();
  g.lda = trans_a ? m : k;
  g.trans_a = trans_a;
  g.b = b.data();
  g.ldb = trans_b ? k : n;
  g.b_packed = trans_b ? b.packed(n, k, true) : b.packed(k, n, false);
  g.trans_b = trans_b;
  g.dt = a.dt;
  g.ldc = n;
  g.dt_c = a.dt;
  return g;
}

void into(AgGemm& g, const AgGrad& slot) {
  g.c = slot.p;
  g.dt_c = slot.dt;
  g.accumulate = slot.accumulate;
}

// Results are the same bits with and without: kernels sum in one order.
int64_t pack(const Tensor& w, bool trans_b) {
  want_float("pack", "weight", w);
  want_rank("pack", "weight", w, 2);
  check(!wants_grad(w), "ERR_ARGUMENT", "[pack] weight: expected one that wants no gradient, got one that does");
  int64_t rows = w.shape[0], cols = w.shape[1];
  AgPack p{w.data(), trans_b ? rows : cols, trans_b ? cols : rows, cols, trans_b, w.dt, nullptr};
  const AgBackend& backend = *w.device()->backend;
  int64_t bytes = backend.pack_bytes(&p);
  if (bytes == 0 || w.packed(rows, cols, trans_b)) return bytes;
  auto blob = std::make_shared<Storage>(w.device(), bytes);
  p.blob = blob->p;
  AgCtx ctx = w.device()->context();
  call("pack", w.device(), backend.pack, p, ctx);
  w.storage->packed.push_back(Packed{w.offset, w.dt, rows, cols, trans_b, std::move(blob)});
  return bytes;
}

void unpack(const Tensor& w) { w.storage->packed.clear(); }

// The kernel writes a C of the inputs' dtype or f32; an f32 gradient of f64 does not exist, and a bf16 gradient of
// f32 inputs neither: leaves have their own dtype or f32.
Tensor linear(const Tensor& x, const Tensor& w, const Opt& bias, const std::string& activation) {
  AgUnaryOp act = parse_activation("linear", activation);
  check(act != AG_EXP, "ERR_ARGUMENT",
        "[linear] activation: expected none, gelu, gelu_tanh, quick_gelu or silu, got 'exp'");
  want_float("linear", "x", x);
  want_dtype("linear", "weight", w, x.dt);
  want_rank("linear", "weight", w, 2);
  check(x.shape.rank >= 1 && x.shape.cols() == w.shape[1], "ERR_SHAPE", "[linear] x: expected [..., ", w.shape[1],
        "], got ", x.shape);
  Tensor b = bias ? *bias : Tensor();
  want_same_device("linear", {&x, &w, &b});
  int64_t m = x.shape.rows(), k = w.shape[1], n = w.shape[0];
  if (b.defined()) {
    want_dtype("linear", "bias", b, x.dt);
    want_shape("linear", "bias", b, Shape{n});
  }
  Tensor y = empty(x.device(), x.shape.with_last(n), x.dt), pre;
  bool rec = recording({&x, &w, &b});
  AgGemm g = product(x, false, w, true, m, n, k);
  g.c = y.data();
  g.bias = b.defined() ? b.data() : nullptr;
  g.act = act;
  if (rec && act != AG_NONE) {
    pre = empty_like(y);
    g.pre = pre.data();
  }
  gemm("linear", x.device(), g);
  if (!rec) return y;
  Saved sx = wants_grad(w) ? Saved(x) : Saved();
  Saved sw = wants_grad(x) ? Saved(w) : Saved();
  record("linear", {&y}, {x, w, b}, [=](Grads& grads) {
    Tensor dy = grads.out();
    if (act != AG_NONE) {
      Tensor d = empty_like(dy);
      run("linear", dy.device(), &AgBackend::unary_grad,
          AgUnaryGrad{act, d.data(), dy.data(), pre.data(), dy.numel(), dy.dt, 1.0});
      dy = d;
    }
    if (grads.needs(1)) {
      Tensor input = sx.get();
      AgGemm gw = product(dy, true, input, false, n, k, m);
      into(gw, grads.slot(1));
      gemm("linear", dy.device(), gw);
    }
    if (grads.needs(2))
      run("linear", dy.device(), &AgBackend::col_sum, AgColSum{grads.slot(2), dy.data(), m, n, n, dy.dt, 1.0, nullptr});
    if (grads.needs(0)) {
      AgGemm gx = product(dy, false, sw.get(), false, m, k, n);
      into(gx, grads.slot(0));
      gemm("linear", dy.device(), gx);
    }
  });
  return y;
}

// The product is not kept for backward but computed again from gate and up: elementwise work against the largest
// activation of a layer.
Tensor silu_mul_linear(const Tensor& gate, const Tensor& up, const Tensor& w, const Opt& bias) {
  const char* op = "siluMulLinear";
  want_float(op, "gate", gate);
  want_dtype(op, "up", up, gate.dt);
  want_shape(op, "up", up, gate.shape);
  want_dtype(op, "weight", w, gate.dt);
  want_rank(op, "weight", w, 2);
  check(gate.shape.rank >= 1 && gate.shape.cols() == w.shape[1], "ERR_SHAPE", "[siluMulLinear] gate: expected [..., ",
        w.shape[1], "], got ", gate.shape);
  Tensor b = bias ? *bias : Tensor();
  want_same_device(op, {&gate, &up, &w, &b});
  int64_t m = gate.shape.rows(), k = w.shape[1], n = w.shape[0];
  if (b.defined()) {
    want_dtype(op, "bias", b, gate.dt);
    want_shape(op, "bias", b, Shape{n});
  }
  auto activated = [op](const Tensor& g, const Tensor& u) {
    Tensor y = empty_like(g);
    run(op, y.device(), &AgBackend::silu_mul, AgSiluMul{y.data(), g.data(), u.data(), y.numel(), y.dt});
    return y;
  };
  Tensor h = activated(gate, up), y = empty(gate.device(), gate.shape.with_last(n), gate.dt);
  AgGemm g = product(h, false, w, true, m, n, k);
  g.c = y.data();
  g.bias = b.defined() ? b.data() : nullptr;
  gemm(op, gate.device(), g);
  Saved kept_gate(gate), kept_up(up), sw(w);
  record(op, {&y}, {gate, up, w, b}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    const Tensor sg = kept_gate.get(), su = kept_up.get();
    if (grads.needs(2)) {
      Tensor again = activated(sg, su);
      AgGemm gw = product(dy, true, again, false, n, k, m);
      into(gw, grads.slot(2));
      gemm(op, dy.device(), gw);
    }
    if (grads.needs(3))
      run(op, dy.device(), &AgBackend::col_sum, AgColSum{grads.slot(3), dy.data(), m, n, n, dy.dt, 1.0, nullptr});
    if (!grads.needs(0) && !grads.needs(1)) return;
    Tensor dh = empty(dy.device(), sg.shape, dy.dt), dg = empty_like(dh);
    AgGemm gh = product(dy, false, sw.get(), false, m, k, n);
    gh.c = dh.data();
    gemm(op, dy.device(), gh);
    run(op, dy.device(), &AgBackend::silu_mul_grad,
        AgSiluMulGrad{dg.data(), dh.data(), dh.data(), sg.data(), su.data(), dh.numel(), dh.dt});
    grads.add(0, std::move(dg));
    grads.add(1, std::move(dh));
  });
  return y;
}

Tensor matmul(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b) {
  want_float("matmul", "a", a);
  want_dtype("matmul", "b", b, a.dt);
  want_rank("matmul", "a", a, 2);
  want_rank("matmul", "b", b, 2);
  want_same_device("matmul", {&a, &b});
  int64_t m = a.shape[trans_a ? 1 : 0], k = a.shape[trans_a ? 0 : 1], n = b.shape[trans_b ? 0 : 1];
  check(b.shape[trans_b ? 1 : 0] == k, "ERR_SHAPE", "[matmul] inner dimension: expected ", k, ", got ", b.shape);
  Tensor y = empty(a.device(), Shape{m, n}, a.dt);
  Saved sa(a), sb(b);
  AgGemm g = product(a, trans_a, b, trans_b, m, n, k);
  g.c = y.data();
  gemm("matmul", a.device(), g);
  record("matmul", {&y}, {a, b}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    if (grads.needs(0)) {  // dA = dY op(B)^T, stored transposed when A is
      AgGemm ga =
          trans_a ? product(sb.get(), trans_b, dy, true, k, m, n) : product(dy, false, sb.get(), !trans_b, m, k, n);
      into(ga, grads.slot(0));
      gemm("matmul", dy.device(), ga);
    }
    if (grads.needs(1)) {
      AgGemm gb =
          trans_b ? product(dy, true, sa.get(), trans_a, n, k, m) : product(sa.get(), !trans_a, dy, false, k, n, m);
      into(gb, grads.slot(1));
      gemm("matmul", dy.device(), gb);
    }
  });
  return y;
}

}  // namespace ag::ops

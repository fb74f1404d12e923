// Losses. Full logits are never stored: the LM head runs on labelled rows only, chunk by chunk, and the chunk's
// gradient is taken while its logits are there.
#include <algorithm>

#include "ops.h"

namespace ag::ops {

static Tensor scaled(const Tensor& x, const Tensor& by) {
  Tensor y = empty_like(x);
  if (x.numel())
    run("loss", x.device(), &AgBackend::binary, AgBinary{AG_MUL, y.data(), x.data(), by.data(), x.numel(), 1, x.dt});
  return y;
}

static Tensor as_dtype(const Tensor& x, AgDtype dt) {
  if (x.dt == dt) return x;
  Tensor y = empty(x.device(), x.shape, dt);
  run("cast", x.device(), &AgBackend::cast, AgCast{y.data(), dt, x.data(), x.dt, x.numel()});
  return y;
}

// [rows] acc -> [] of dtype acc, times scale
static Tensor sum_rows(const Tensor& nll, double scale) {
  Tensor y = empty(nll.device(), Shape{}, nll.dt);
  run("loss", nll.device(), &AgBackend::sum, AgSum{y.data(), nll.data(), nll.numel(), nll.dt, scale});
  return y;
}

struct HeadGrads {
  Tensor d_rows;    // [R, H] dt: gradient of hidden[rows]
  Tensor d_weight;  // [V, H] acc
};

// One pass over the chunks: nll of every row and, when wanted, the gradients for a loss gradient of 1.
static void head_chunks(const Tensor& rows_RH, const Tensor& weight, const int32_t* targets, double grad_scale,
                        const Opt& scale, int64_t chunk, Tensor& nll, HeadGrads& want) {
  Device* device = rows_RH.device();
  AgDtype dt = rows_RH.dt, acc = acc_dtype(dt);
  int64_t R = rows_RH.shape[0], H = rows_RH.shape[1], V = weight.shape[0], size = dtype_size(dt);
  bool grads = want.d_rows.defined() || want.d_weight.defined();
  Tensor logits = empty(device, Shape{std::min(chunk, R), V}, acc);
  Tensor d_logits = !grads || acc == dt ? logits : empty(device, logits.shape, dt);
  for (int64_t at = 0; at < R; at += chunk) {
    int64_t n = std::min(chunk, R - at);
    AgGemm g{};
    g.m = n, g.n = V, g.k = H;
    g.a = rows_RH.as<char>() + at * H * size, g.lda = H;
    g.b = weight.data(), g.ldb = H, g.trans_b = 1, g.b_packed = weight.packed(V, H, true);
    g.c = logits.data(), g.ldc = V, g.dt = dt, g.dt_c = acc;
    run("lmHeadLoss", device, &AgBackend::gemm, g);
    AgCrossEntropy ce{};
    ce.logits = logits.data();
    ce.rows = n, ce.cols = V;
    ce.target = targets + at;
    ce.nll = nll.as<char>() + at * dtype_size(acc);
    ce.dlogits = grads ? d_logits.data() : nullptr;
    ce.grad_scale = grad_scale;
    ce.scale = scale ? scale->data() : nullptr;
    ce.dt = acc, ce.dt_d = dt;
    run("lmHeadLoss", device, &AgBackend::cross_entropy, ce);
    if (want.d_rows.defined()) {  // [n, V] x [V, H]
      AgGemm d{};
      d.m = n, d.n = H, d.k = V;
      d.a = d_logits.data(), d.lda = V;
      d.b = weight.data(), d.ldb = H, d.b_packed = weight.packed(V, H, false);
      d.c = want.d_rows.as<char>() + at * H * size, d.ldc = H, d.dt = d.dt_c = dt;
      run("lmHeadLoss", device, &AgBackend::gemm, d);
    }
    if (want.d_weight.defined()) {  // [n, V]^T x [n, H]
      AgGemm d{};
      d.m = V, d.n = H, d.k = n;
      d.a = d_logits.data(), d.lda = V, d.trans_a = 1;
      d.b = rows_RH.as<char>() + at * H * size, d.ldb = H;
      d.c = want.d_weight.data(), d.ldc = H, d.dt = dt, d.dt_c = acc, d.accumulate = at > 0;
      run("lmHeadLoss", device, &AgBackend::gemm, d);
    }
  }
}

std::vector<Tensor> lm_head_loss(const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets,
                                 double denominator, int64_t chunk, const Opt& scale) {
  const char* op = "lmHeadLoss";
  want_float(op, "hidden", hidden);
  want_rank(op, "hidden", hidden, 2);
  want_rank(op, "weight", weight, 2);
  want_dtype(op, "weight", weight, hidden.dt);
  int64_t T = hidden.shape[0], H = hidden.shape[1], V = weight.shape[0], R = rows.numel();
  want_shape(op, "weight", weight, Shape{V, H});
  want_rank(op, "rows", rows, 1);
  want_shape(op, "targets", targets, Shape{R});
  want_index(op, "rows", rows, 0, T);
  want_index(op, "targets", targets, AG_IGNORE, V);
  check(denominator > 0, "ERR_ARGUMENT", "[lmHeadLoss] denominator: expected > 0, got ", denominator);
  check(chunk > 0, "ERR_ARGUMENT", "[lmHeadLoss] chunk: expected > 0, got ", chunk);
  want_same_device(op, {&hidden, &weight});
  Device* device = hidden.device();
  AgDtype dt = hidden.dt, acc = acc_dtype(dt);
  if (scale) {
    want_dtype(op, "scale", *scale, acc);
    check(scale->numel() == 1, "ERR_SHAPE", "[lmHeadLoss] scale: expected one element, got ", scale->shape);
    want_same_device(op, {&hidden, &*scale});
  }
  Tensor rows_RH = empty(device, Shape{R, H}, dt), nll = empty(device, Shape{R}, acc);
  run(op, device, &AgBackend::gather_rows,
      AgGatherRows{rows_RH.data(), hidden.data(), device_i32(rows, device), R, H, T, dt});
  HeadGrads want;
  bool rec = recording({&hidden, &weight});
  if (rec && wants_grad(hidden)) want.d_rows = empty_like(rows_RH);
  if (rec && wants_grad(weight))
    want.d_weight = R ? empty(device, weight.shape, acc) : zeros(device, weight.shape, acc);
  if (R) head_chunks(rows_RH, weight, device_i32(targets, device), 1.0 / denominator, scale, chunk, nll, want);
  Tensor loss = sum_rows(nll, 1.0 / denominator);
  if (scale) loss = scaled(loss, *scale);
  Saved saved_rows(rows);
  record(op, {&loss}, {hidden, weight}, [=](Grads& grads) {
    Tensor by = grads.out();
    if (grads.needs(0)) {
      Tensor d = scaled(want.d_rows, as_dtype(by, dt));
      run("lmHeadLoss", device, &AgBackend::scatter_add,
          AgScatterAdd{grads.slot(0), d.data(), device_i32(saved_rows.get(), device), R, H, T, dt, 1.0});
    }
    if (grads.needs(1)) {  // through col_sum of one "row": scales and lands in the slot, whatever its dtype
      const Tensor& d = want.d_weight;
      run("lmHeadLoss", device, &AgBackend::col_sum,
          AgColSum{grads.slot(1), d.data(), 1, V * H, V * H, acc, 1.0, by.data()});
    }
  });
  return {loss, nll};
}

// ---- plain cross entropy ----------------------------------------------------------------------------
static void xent(const Tensor& logits, const int32_t* targets, Tensor& nll, Tensor* d_logits, double grad_scale) {
  AgCrossEntropy ce{};
  ce.logits = logits.data();
  ce.rows = logits.shape[0], ce.cols = logits.shape[1];
  ce.target = targets;
  ce.nll = nll.data();
  ce.dlogits = d_logits ? d_logits->data() : nullptr;
  ce.grad_scale = grad_scale;
  ce.dt = logits.dt, ce.dt_d = logits.dt;
  run("crossEntropy", logits.device(), &AgBackend::cross_entropy, ce);
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets) {
  want_float("crossEntropy", "logits", logits);
  want_rank("crossEntropy", "logits", logits, 2);
  int64_t n = logits.shape[0];
  check(n > 0, "ERR_SHAPE", "[crossEntropy] logits: expected at least one row, got ", logits.shape);
  want_shape("crossEntropy", "targets", targets, Shape{n});
  want_index("crossEntropy", "targets", targets, 0, logits.shape[1]);
  Tensor nll = empty(logits.device(), Shape{n}, acc_dtype(logits.dt));
  Tensor d = recording({&logits}) ? empty_like(logits) : Tensor();
  xent(logits, device_i32(targets, logits.device()), nll, d.defined() ? &d : nullptr, 1.0 / double(n));
  Tensor loss = sum_rows(nll, 1.0 / double(n));
  record("crossEntropy", {&loss}, {logits}, [d](Grads& g) { g.add(0, scaled(d, as_dtype(g.out(), d.dt))); });
  return loss;
}

// ---- contrastive (CLIP) -----------------------------------------------------------------------------
// Radford et al. 2021: (CE(S) + CE(S^T)) / 2 with S = exp(log_scale) * image text^T. S is B x B: small enough to keep.
Tensor contrastive_loss(const Tensor& image, const Tensor& text, const Tensor& log_scale) {
  const char* op = "contrastiveLoss";
  want_float(op, "image", image);
  want_rank(op, "image", image, 2);
  want_dtype(op, "text", text, image.dt);
  want_shape(op, "text", text, image.shape);
  want_dtype(op, "logScale", log_scale, image.dt);
  check(log_scale.numel() == 1, "ERR_SHAPE", "[contrastiveLoss] logScale: expected one element, got ", log_scale.shape);
  check(image.shape[0] > 0, "ERR_SHAPE", "[contrastiveLoss] image: expected at least one row, got ", image.shape);
  int64_t n = image.shape[0];
  Tensor targets = empty(&cpu(), Shape{n}, AG_I32);
  for (int64_t i = 0; i < n; i++) targets.as<int32_t>()[i] = int32_t(i);
  Tensor factor = unary(log_scale, "exp");
  Tensor rows = mul(matmul(image, text, false, true), factor), cols = mul(matmul(text, image, false, true), factor);
  return scale(add(cross_entropy(rows, targets), cross_entropy(cols, targets)), 0.5);
}

}  // namespace ag::ops

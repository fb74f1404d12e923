// Matrix products.
#include "ops.h"

namespace ag::ops {

static const AgBackend& table(const Tensor& t) { return *t.device()->backend; }

static AgGemm product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b, int64_t m, int64_t n, int64_t k) {
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

static void gemm(const char* op, Device* device, const AgGemm& g) { run(op, device, device->backend->gemm, g, AG_K_GEMM); }

static void into(AgGemm& g, const AgGrad& slot) {
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
  int64_t bytes = table(w).pack_bytes(&p);
  if (bytes == 0 || w.packed(rows, cols, trans_b)) return bytes;
  auto blob = std::make_shared<Storage>(w.device(), bytes);
  p.blob = blob->p;
  run("pack", w.device(), table(w).pack, p);
  w.storage->packed.push_back(Packed{w.offset, w.dt, rows, cols, trans_b, std::move(blob)});
  return bytes;
}

void unpack(const Tensor& w) { w.storage->packed.clear(); }

// The kernel writes a C of the inputs' dtype or f32; an f32 gradient of f64 does not exist, and a bf16 gradient of
// f32 inputs neither: leaves have their own dtype or f32.
Tensor linear(const Tensor& x, const Tensor& w, const Opt& bias, const std::string& activation) {
  AgUnaryOp act = parse_activation("linear", activation);
  check(act != AG_EXP, "ERR_ARGUMENT", "[linear] activation: expected none, gelu, gelu_tanh, quick_gelu or silu, got 'exp'");
  want_float("linear", "x", x);
  want_dtype("linear", "weight", w, x.dt);
  want_rank("linear", "weight", w, 2);
  check(x.shape.rank >= 1 && x.shape.cols() == w.shape[1], "ERR_SHAPE", "[linear] x: expected [..., ", w.shape[1], "], got ", x.shape);
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
      run("linear", dy.device(), table(dy).unary_grad, AgUnaryGrad{act, d.data(), dy.data(), pre.data(), dy.numel(), dy.dt, 1.0});
      dy = d;
    }
    if (grads.needs(1)) {
      Tensor input = sx.get();
      AgGemm gw = product(dy, true, input, false, n, k, m);
      into(gw, grads.slot(1));
      gemm("linear", dy.device(), gw);
    }
    if (grads.needs(2))
      run("linear", dy.device(), table(dy).col_sum, AgColSum{grads.slot(2), dy.data(), m, n, n, dy.dt, 1.0, nullptr}, AG_K_COL_SUM);
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
  check(gate.shape.rank >= 1 && gate.shape.cols() == w.shape[1], "ERR_SHAPE", "[siluMulLinear] gate: expected [..., ", w.shape[1], "], got ", gate.shape);
  Tensor b = bias ? *bias : Tensor();
  want_same_device(op, {&gate, &up, &w, &b});
  int64_t m = gate.shape.rows(), k = w.shape[1], n = w.shape[0];
  if (b.defined()) {
    want_dtype(op, "bias", b, gate.dt);
    want_shape(op, "bias", b, Shape{n});
  }
  auto activated = [op](const Tensor& g, const Tensor& u) {
    Tensor y = empty_like(g);
    run(op, y.device(), table(y).silu_mul, AgSiluMul{y.data(), g.data(), u.data(), y.numel(), y.dt});
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
      run(op, dy.device(), table(dy).col_sum, AgColSum{grads.slot(3), dy.data(), m, n, n, dy.dt, 1.0, nullptr}, AG_K_COL_SUM);
    if (!grads.needs(0) && !grads.needs(1)) return;
    Tensor dh = empty(dy.device(), sg.shape, dy.dt), dg = empty_like(dh);
    AgGemm gh = product(dy, false, sw.get(), false, m, k, n);
    gh.c = dh.data();
    gemm(op, dy.device(), gh);
    run(op, dy.device(), table(dy).silu_mul_grad,
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
      AgGemm ga = trans_a ? product(sb.get(), trans_b, dy, true, k, m, n) : product(dy, false, sb.get(), !trans_b, m, k, n);
      into(ga, grads.slot(0));
      gemm("matmul", dy.device(), ga);
    }
    if (grads.needs(1)) {
      AgGemm gb = trans_b ? product(dy, true, sa.get(), trans_a, n, k, m) : product(sa.get(), !trans_a, dy, false, k, n, m);
      into(gb, grads.slot(1));
      gemm("matmul", dy.device(), gb);
    }
  });
  return y;
}

// ---- queries, keys and values -----------------------------------------------------------------------
// Matrices that lie behind each other in memory are one matrix to a product, and so are their gradients.
struct QkvColumns {
  int64_t dim, at[4];  // where queries, keys and values begin, and the end
  int64_t width(int first, int end) const { return at[end] - at[first]; }
};

// Calls f(first, end) for each longest run of the three in which `adjoins(i)` says that i follows i - 1.
template <class A, class F>
static void each_run(const A& adjoins, const F& f) {
  for (int first = 0, end; first < 3; first = end) {
    for (end = first + 1; end < 3 && adjoins(end);) end++;
    f(first, end);
  }
}
static bool adjoins(const std::vector<Tensor>& list, int i) {
  return list[i].storage == list[i - 1].storage && list[i].offset == list[i - 1].offset + list[i - 1].bytes();
}

static QkvColumns check_qkv(const char* op, const QkvIn& in) {
  const int64_t heads = in.heads, kv = in.kv_heads;
  want_float(op, "x", in.x);
  want_rank(op, "x", in.x, 2);
  check_heads(op, heads, kv);
  check(in.weights.size() == 3, "ERR_ARGUMENT", "[qkvLinear] weights: expected those of queries, keys and values, got ", in.weights.size());
  check(in.biases.empty() || in.biases.size() == 3, "ERR_ARGUMENT", "[qkvLinear] biases: expected 3 or none, got ", in.biases.size());
  const Tensor& q = in.weights[0];
  want_rank(op, "weights[0]", q, 2);
  check(q.shape[0] > 0 && q.shape[0] % heads == 0, "ERR_SHAPE", "[qkvLinear] weights[0]: expected rows divisible by ", heads, " heads, got ",
        q.shape);
  const int64_t dim = q.shape[0] / heads;
  const QkvColumns c{dim, {0, heads * dim, (heads + kv) * dim, (heads + 2 * kv) * dim}};
  for (int i = 0; i < 3; i++) {
    want_dtype(op, "weights", in.weights[i], in.x.dt);
    want_shape(op, "weights", in.weights[i], Shape{c.width(i, i + 1), in.x.shape[1]});
    want_same_device(op, {&in.x, &in.weights[i]});
    if (in.biases.empty()) continue;
    want_dtype(op, "biases", in.biases[i], in.x.dt);
    want_shape(op, "biases", in.biases[i], Shape{c.width(i, i + 1)});
    want_same_device(op, {&in.x, &in.biases[i]});
  }
  if (in.plus) {
    want_dtype(op, "plus", *in.plus, in.x.dt);
    want_shape(op, "plus", *in.plus, Shape{in.x.shape[0], c.at[3]});
    want_same_device(op, {&in.x, &*in.plus});
  }
  return c;
}

static void check_rotation(const char* op, const QkvIn& in, int64_t dim) {
  const Shape rows{in.x.shape[0]};
  check(in.cos && in.sin && in.position, "ERR_ARGUMENT", "[qkvLinear] position, cos, sin: expected all or none, got some");
  check(dim % 2 == 0, "ERR_SHAPE", "[qkvLinear] head dim: expected an even number, got ", dim);
  want_rank(op, "cos", *in.cos, 2);
  want_shape(op, "cos", *in.cos, Shape{in.cos->shape[0], dim / 2});
  want_shape(op, "sin", *in.sin, in.cos->shape);
  for (const Opt* t : {&in.cos, &in.sin}) want_dtype(op, "cos and sin", **t, acc_dtype(in.x.dt));
  want_same_device(op, {&in.x, &*in.cos, &*in.sin});
  want_shape(op, "position", *in.position, rows);
  want_index(op, "position", *in.position, 0, in.cos->shape[0]);
  if (!in.k_cache) return;
  check(in.v_cache && in.slots, "ERR_ARGUMENT", "[qkvLinear] kCache, vCache, slots: expected all or none, got some");
  want_rank(op, "kCache", *in.k_cache, 3);
  want_shape(op, "kCache", *in.k_cache, Shape{in.k_cache->shape[0], in.k_cache->shape[1], in.kv_heads * dim});
  want_shape(op, "vCache", *in.v_cache, in.k_cache->shape);
  for (const Opt* t : {&in.k_cache, &in.v_cache}) want_dtype(op, "caches", **t, in.x.dt);
  want_same_device(op, {&in.x, &*in.k_cache, &*in.v_cache});
  want_shape(op, "slots", *in.slots, rows);
  want_index(op, "slots", *in.slots, 0, in.k_cache->shape[0] * in.k_cache->shape[1]);
  const int32_t* slot = host_i32(*in.slots);
  for (int64_t t = 1; t < rows[0]; t++)
    check(slot[t] > slot[t - 1], "ERR_RANGE", "[qkvLinear] slots[", t, "]: expected more than ", slot[t - 1], ", got ", slot[t]);
}

static AgRope rotation(const Tensor& rows, const QkvIn& in, int64_t dim, double sign) {
  AgRope r{};
  r.x = rows.data();
  r.position = device_i32(*in.position, rows.device());
  r.cos = in.cos->data();
  r.sin = in.sin->data();
  r.tokens = rows.shape[0];
  r.heads = in.heads;
  r.kv_heads = in.kv_heads;
  r.dim = dim;
  r.sign = sign;
  r.dt = rows.dt;
  return r;
}

// Gradients of weights, biases and x from d, that of the products.
static void qkv_grad(Grads& grads, const QkvColumns& c, const Tensor& d, const Saved& sx, const std::vector<Tensor>& weights) {
  const char* op = "qkvLinear";
  const int64_t m = d.shape[0], k = weights[0].shape[1], n = c.at[3];
  AgGrad dw[3];
  for (int i = 0; i < 3; i++) dw[i] = grads.slot(1 + i);
  const auto one_gradient = [&](int i) {
    const AgGrad &before = dw[i - 1], &after = dw[i];
    return before.p && before.dt == after.dt && before.accumulate == after.accumulate &&
           after.p == static_cast<char*>(before.p) + c.width(i - 1, i) * k * dtype_size(before.dt);
  };
  each_run(one_gradient, [&](int first, int end) {
    if (!dw[first].p) return;
    AgGemm g = product(d, true, sx.get(), false, c.width(first, end), k, m);
    g.a = column(d, c.at[first]);
    g.lda = n;
    into(g, dw[first]);
    gemm(op, d.device(), g);
  });
  for (int i = 0; i < 3; i++)
    if (grads.needs(4 + i))
      run(op, d.device(), table(d).col_sum,
          AgColSum{grads.slot(4 + i), column(d, c.at[i]), m, c.width(i, i + 1), n, d.dt, 1.0, nullptr}, AG_K_COL_SUM);
  if (!grads.needs(0)) return;
  each_run([&](int i) { return adjoins(weights, i); }, [&](int first, int end) {
    AgGemm g = product(d, false, weights[first], false, m, k, c.width(first, end));
    g.a = column(d, c.at[first]);
    g.lda = n;
    into(g, grads.slot(0));
    gemm(op, d.device(), g);
  });
}

Tensor qkv_linear(const QkvIn& in) {
  const char* op = "qkvLinear";
  const QkvColumns c = check_qkv(op, in);
  const Tensor& x = in.x;
  Device* device = x.device();
  const int64_t m = x.shape[0], n = c.at[3];
  if (in.position) check_rotation(op, in, c.dim);
  check(in.position || (!in.cos && !in.sin && !in.k_cache), "ERR_ARGUMENT", "[qkvLinear] position: expected one with cos, sin or a cache, got none");
  std::vector<Tensor> inputs{x, in.weights[0], in.weights[1], in.weights[2]};
  for (int i = 0; i < 3; i++) inputs.push_back(in.biases.empty() ? Tensor() : in.biases[i]);
  inputs.push_back(in.plus ? *in.plus : Tensor());
  check(!in.k_cache || !recording(inputs), "ERR_AUTOGRAD", "[qkvLinear] kCache: expected to record nothing, got inputs with gradients");
  Tensor y = empty(device, Shape{m, n}, x.dt);
  const auto one_product = [&](int i) { return adjoins(in.weights, i) && (in.biases.empty() || adjoins(in.biases, i)); };
  each_run(one_product, [&](int first, int end) {
    AgGemm g = product(x, false, in.weights[first], true, m, c.width(first, end), x.shape[1]);
    g.c = column(y, c.at[first]);
    g.ldc = n;
    g.bias = in.biases.empty() ? nullptr : in.biases[first].data();
    gemm(op, device, g);
  });
  if (in.plus) run(op, device, table(x).binary, AgBinary{AG_ADD, y.data(), y.data(), in.plus->data(), y.numel(), y.numel(), y.dt});
  if (in.position) {
    AgRope r = rotation(y, in, c.dim, 1.0);
    if (in.k_cache) {
      r.k_cache = in.k_cache->data();
      r.v_cache = in.v_cache->data();
      r.slot = device_i32(*in.slots, device);
      for (const Opt* t : {&in.k_cache, &in.v_cache}) (*t)->storage->written();
    }
    run(op, device, table(x).rope, r);
  }
  if (!recording(inputs)) return y;
  bool trained = false;
  for (const Tensor& w : in.weights) trained = trained || wants_grad(w);
  const Saved sx = trained ? Saved(x) : Saved();
  const QkvIn rotating{{}, in.heads, in.kv_heads, {}, {}, {}, in.position, in.cos, in.sin, {}, {}, {}};
  std::vector<Saved> kept_weights(in.weights.begin(), in.weights.end()), tables;
  if (in.position)
    for (const Opt* t : {&in.position, &in.cos, &in.sin}) tables.emplace_back(**t);
  record(op, {&y}, inputs, [=](Grads& grads) {
    std::vector<Tensor> weights;
    for (const Saved& w : kept_weights) weights.push_back(w.get());
    for (const Saved& t : tables) t.get();  // as they were
    const Tensor& dy = grads.out();
    Tensor d = dy;
    if (rotating.position) {
      if (dy.storage.use_count() > 2) {  // besides dy and d somebody has it
        d = empty_like(dy);
        copy_bytes(dy.device(), d.data(), dy.data(), d.bytes());
      }
      run("qkvLinear", d.device(), table(d).rope, rotation(d, rotating, c.dim, -1.0));
    }
    if (grads.needs(7)) grads.add(7, d);
    qkv_grad(grads, c, d, sx, weights);
  });
  return y;
}

// ---- CLIP's patch embedding -------------------------------------------------------------------------
struct PatchShape {
  int64_t images, channels, height, width, patch, patches, depth, dim;
};

static PatchShape patch_shape(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position) {
  const char* op = "patchEmbedding";
  want_float(op, "pixels", pixels);
  want_rank(op, "pixels", pixels, 4);
  want_rank(op, "weight", weight, 4);
  for (const Tensor* t : {&weight, &cls, &position}) want_dtype(op, "weights", *t, pixels.dt);
  want_same_device(op, {&pixels, &weight, &cls, &position});
  PatchShape s;
  s.images = pixels.shape[0];
  s.channels = pixels.shape[1];
  s.height = pixels.shape[2];
  s.width = pixels.shape[3];
  s.dim = weight.shape[0];
  s.patch = weight.shape[2];
  want_shape(op, "weight", weight, Shape{s.dim, s.channels, s.patch, s.patch});
  check(s.patch > 0 && s.height % s.patch == 0 && s.width % s.patch == 0, "ERR_SHAPE",
        "[patchEmbedding] pixels: expected a multiple of the patch size ", s.patch, ", got ", pixels.shape);
  s.patches = (s.height / s.patch) * (s.width / s.patch);
  s.depth = s.channels * s.patch * s.patch;
  want_shape(op, "class", cls, Shape{s.dim});
  want_shape(op, "position", position, Shape{s.patches + 1, s.dim});
  return s;
}

Tensor patch_embedding(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position) {
  PatchShape s = patch_shape(pixels, weight, cls, position);
  Device* device = pixels.device();
  const AgBackend& t = *device->backend;
  const char* op = "patchEmbedding";
  int64_t rows = s.patches + 1, size = dtype_size(pixels.dt);
  Tensor cols = empty(device, Shape{s.images * s.patches, s.depth}, pixels.dt);
  run(op, device, t.patchify, AgPatchify{cols.data(), pixels.data(), s.images, s.channels, s.height, s.width, s.patch, pixels.dt});
  Tensor y = empty(device, Shape{s.images, rows, s.dim}, pixels.dt);
  for (int64_t i = 0; i < s.images; i++) {  // each image's patches go straight behind its class row
    AgGemm g = product(cols, false, weight, true, s.patches, s.dim, s.depth);
    g.a = cols.as<char>() + i * s.patches * s.depth * size;
    g.c = y.as<char>() + (i * rows + 1) * s.dim * size;
    gemm(op, device, g);
  }
  if (s.images) {
    run(op, device, t.copy2d, AgCopy2d{y.data(), rows * s.dim * size, cls.data(), 0, s.images, s.dim * size});
    run(op, device, t.binary, AgBinary{AG_ADD, y.data(), y.data(), position.data(), y.numel(), rows * s.dim, y.dt});
  }
  Tensor saved = wants_grad(weight) ? cols : Tensor();
  record(op, {&y}, {weight, cls, position}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    Device* d = dy.device();
    const AgBackend& t = *d->backend;
    if (grads.needs(2))
      run(op, d, t.col_sum, AgColSum{grads.slot(2), dy.data(), s.images, rows * s.dim, rows * s.dim, dy.dt, 1.0, nullptr}, AG_K_COL_SUM);
    if (grads.needs(1))
      run(op, d, t.col_sum, AgColSum{grads.slot(1), dy.data(), s.images, s.dim, rows * s.dim, dy.dt, 1.0, nullptr}, AG_K_COL_SUM);
    if (grads.needs(0)) {
      Tensor dp = empty(d, Shape{s.images * s.patches, s.dim}, dy.dt);
      int64_t bytes = s.patches * s.dim * size;
      if (bytes && s.images)
        run(op, d, t.copy2d, AgCopy2d{dp.data(), bytes, dy.as<char>() + s.dim * size, bytes + s.dim * size, s.images, bytes});
      AgGemm g = product(dp, true, saved, false, s.dim, s.depth, s.images * s.patches);
      into(g, grads.slot(0));
      gemm(op, d, g);
    }
  });
  return y;
}

}  // namespace ag::ops

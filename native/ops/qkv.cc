// Queries, keys and values as one product. Three matrices that lie behind each other in memory (fuseQkv of
// nn/attention.ts) are one to a product, forward and on both ways back, and so are their gradients in the optimizer's
// buffer. The op finds that out from the addresses; matrices that lie apart are three products. The rows
// [queries | keys | values] are never split: RoPE turns them in place and writes keys and values to the cache in the
// same pass, attention reads columns of them and leaves its gradients as such columns. An adapter's update is added
// before the rotation.
#include "linear.h"

namespace ag::ops {

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
  check(in.weights.size() == 3, "ERR_ARGUMENT", "[qkvLinear] weights: expected those of queries, keys and values, got ",
        in.weights.size());
  check(in.biases.empty() || in.biases.size() == 3, "ERR_ARGUMENT", "[qkvLinear] biases: expected 3 or none, got ",
        in.biases.size());
  const Tensor& q = in.weights[0];
  want_rank(op, "weights[0]", q, 2);
  check(q.shape[0] > 0 && q.shape[0] % heads == 0, "ERR_SHAPE", "[qkvLinear] weights[0]: expected rows divisible by ",
        heads, " heads, got ", q.shape);
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
  check(in.cos && in.sin && in.position, "ERR_ARGUMENT",
        "[qkvLinear] position, cos, sin: expected all or none, got some");
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
    check(slot[t] > slot[t - 1], "ERR_RANGE", "[qkvLinear] slots[", t, "]: expected more than ", slot[t - 1], ", got ",
          slot[t]);
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
static void qkv_grad(Grads& grads, const QkvColumns& c, const Tensor& d, const Saved& sx,
                     const std::vector<Tensor>& weights) {
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
      run(op, d.device(), &AgBackend::col_sum,
          AgColSum{grads.slot(4 + i), column(d, c.at[i]), m, c.width(i, i + 1), n, d.dt, 1.0, nullptr});
  if (!grads.needs(0)) return;
  each_run([&](int i) { return adjoins(weights, i); },
           [&](int first, int end) {
             AgGemm g = product(d, false, weights[first], false, m, k, c.width(first, end));
             g.a = column(d, c.at[first]);
             g.lda = n;
             into(g, grads.slot(0));
             gemm(op, d.device(), g);
           });
}

// The products, what is added to them, and the rotation.
static Tensor forward(const char* op, const QkvIn& in, const QkvColumns& c) {
  const Tensor& x = in.x;
  Device* device = x.device();
  const int64_t m = x.shape[0], n = c.at[3];
  Tensor y = empty(device, Shape{m, n}, x.dt);
  const auto one_product = [&](int i) {
    return adjoins(in.weights, i) && (in.biases.empty() || adjoins(in.biases, i));
  };
  each_run(one_product, [&](int first, int end) {
    AgGemm g = product(x, false, in.weights[first], true, m, c.width(first, end), x.shape[1]);
    g.c = column(y, c.at[first]);
    g.ldc = n;
    g.bias = in.biases.empty() ? nullptr : in.biases[first].data();
    gemm(op, device, g);
  });
  if (in.plus)
    run(op, device, &AgBackend::binary,
        AgBinary{AG_ADD, y.data(), y.data(), in.plus->data(), y.numel(), y.numel(), y.dt});
  if (in.position) {
    AgRope r = rotation(y, in, c.dim, 1.0);
    if (in.k_cache) {
      r.k_cache = in.k_cache->data();
      r.v_cache = in.v_cache->data();
      r.slot = device_i32(*in.slots, device);
      for (const Opt* t : {&in.k_cache, &in.v_cache}) (*t)->storage->written();
    }
    run(op, device, &AgBackend::rope, r);
  }
  return y;
}

Tensor qkv_linear(const QkvIn& in) {
  const char* op = "qkvLinear";
  const QkvColumns c = check_qkv(op, in);
  const Tensor& x = in.x;
  if (in.position) check_rotation(op, in, c.dim);
  check(in.position || (!in.cos && !in.sin && !in.k_cache), "ERR_ARGUMENT",
        "[qkvLinear] position: expected one with cos, sin or a cache, got none");
  std::vector<Tensor> inputs{x, in.weights[0], in.weights[1], in.weights[2]};
  for (int i = 0; i < 3; i++) inputs.push_back(in.biases.empty() ? Tensor() : in.biases[i]);
  inputs.push_back(in.plus ? *in.plus : Tensor());
  check(!in.k_cache || !recording(inputs), "ERR_AUTOGRAD",
        "[qkvLinear] kCache: expected to record nothing, got inputs with gradients");
  Tensor y = forward(op, in, c);
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
      run("qkvLinear", d.device(), &AgBackend::rope, rotation(d, rotating, c.dim, -1.0));
    }
    if (grads.needs(7)) grads.add(7, d);
    qkv_grad(grads, c, d, sx, weights);
  });
  return y;
}

}  // namespace ag::ops

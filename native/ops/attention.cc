// Rotary embedding and attention over packed sequences.
#include "ops.h"

namespace ag::ops {

static const AgBackend& table(const Tensor& t) { return *t.device()->backend; }

int64_t head_dim(const char* op, const char* what, const Tensor& x, int64_t heads) {
  want_rank(op, what, x, 2);
  check(heads > 0 && x.shape[1] % heads == 0 && x.shape[1] > 0, "ERR_SHAPE", "[", op, "] ", what, ": expected columns divisible by ",
        heads, " heads, got ", x.shape);
  return x.shape[1] / heads;
}

static void rotate(Device* device, Tensor& y, const Tensor& x, const Tensor& position, const Tensor& cos, const Tensor& sin,
                   int64_t heads, int64_t dim, double sign) {
  AgRope a{};
  a.y = y.data();
  a.x = x.data();
  a.position = device_i32(position, device);
  a.cos = cos.data();
  a.sin = sin.data();
  a.tokens = x.shape[0];
  a.heads = heads;
  a.dim = dim;
  a.ld = heads * dim;
  a.sign = sign;
  a.dt = x.dt;
  run("rope", device, device->backend->rope, a);
}

Tensor rope(const Tensor& x, const Tensor& position, const Tensor& cos, const Tensor& sin, int64_t heads) {
  want_float("rope", "x", x);
  int64_t dim = head_dim("rope", "x", x, heads);
  check(dim % 2 == 0, "ERR_SHAPE", "[rope] head dim: expected an even number, got ", dim);
  want_rank("rope", "cos", cos, 2);
  want_shape("rope", "cos", cos, Shape{cos.shape[0], dim / 2});
  want_shape("rope", "sin", sin, cos.shape);
  for (const Tensor* t : {&cos, &sin}) want_dtype("rope", "cos and sin", *t, acc_dtype(x.dt));
  want_shape("rope", "position", position, Shape{x.shape[0]});
  want_index("rope", "position", position, 0, cos.shape[0]);
  want_same_device("rope", {&x, &cos, &sin});
  Tensor y = empty_like(x);
  Saved sp(position), sc(cos), ss(sin);
  rotate(x.device(), y, x, position, cos, sin, heads, dim, 1.0);
  record("rope", {&y}, {x}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    Tensor dx = empty_like(dy);
    rotate(dy.device(), dx, dy, sp.get(), sc.get(), ss.get(), heads, dim, -1.0);
    grads.add(0, std::move(dx));
  });
  return y;
}

void check_heads(const char* op, int64_t heads, int64_t kv_heads) {
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "ERR_ARGUMENT", "[", op,
        "] heads: expected a multiple of kvHeads, got ", heads, " and ", kv_heads);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets, const Tensor& k_offsets,
                 int64_t heads, int64_t kv_heads, bool causal, double scale) {
  const char* op = "attention";
  want_float(op, "q", q);
  want_dtype(op, "k", k, q.dt);
  want_dtype(op, "v", v, q.dt);
  check_heads(op, heads, kv_heads);
  int64_t dim = head_dim(op, "q", q, heads);
  want_rank(op, "k", k, 2);
  want_shape(op, "k", k, Shape{k.shape[0], kv_heads * dim});
  want_shape(op, "v", v, k.shape);
  int64_t batch = want_offsets(op, "qOffsets", q_offsets, q.shape[0]);
  int64_t batch_k = want_offsets(op, "kOffsets", k_offsets, k.shape[0]);
  check(batch == batch_k, "ERR_SHAPE", "[attention] kOffsets: expected ", batch + 1, " offsets, got ", batch_k + 1);
  want_same_device(op, {&q, &k, &v});
  AgDtype acc = acc_dtype(q.dt);
  Tensor o = empty_like(q), lse = empty(q.device(), Shape{q.shape[0], heads}, acc);
  AgAttention a{};
  a.q = q.data();
  a.k = k.data();
  a.v = v.data();
  a.o = o.data();
  a.lse = lse.data();
  a.ldq = a.ldo = heads * dim;
  a.ldk = a.ldv = kv_heads * dim;
  a.q_offsets = device_i32(q_offsets, q.device());
  a.k_offsets = device_i32(k_offsets, q.device());
  a.batch = batch;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = dim;
  a.q_tokens = q.shape[0];
  a.k_tokens = k.shape[0];
  a.scale = scale;
  a.causal = causal;
  a.dt = q.dt;
  run(op, q.device(), table(q).attention, a, AG_K_ATTENTION);
  if (!recording({&q, &k, &v})) return o;
  Saved kept_q(q), kept_k(k), kept_v(v), kept_o(o), oq(q_offsets), ok(k_offsets);
  record(op, {&o}, {q, k, v}, [=](Grads& grads) {
    const Tensor& d_o = grads.out();
    const Tensor sq = kept_q.get(), sk = kept_k.get(), sv = kept_v.get(), so = kept_o.get();
    Tensor dq = empty_like(sq), dk = empty_like(sk), dv = empty_like(sv);
    AgAttention g = a;  // the saved tensors below keep its pointers alive
    g.q = sq.data();
    g.k = sk.data();
    g.v = sv.data();
    g.o = so.data();
    g.lse = lse.data();
    g.q_offsets = device_i32(oq.get(), d_o.device());
    g.k_offsets = device_i32(ok.get(), d_o.device());
    g.d_o = d_o.data();
    g.dq = dq.data();
    g.dk = dk.data();
    g.dv = dv.data();
    run("attention", d_o.device(), table(d_o).attention_grad, g, AG_K_ATTENTION_GRAD);
    grads.add(0, std::move(dq));
    grads.add(1, std::move(dk));
    grads.add(2, std::move(dv));
  });
  return o;
}

}  // namespace ag::ops

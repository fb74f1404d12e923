// Attention over packed sequences.
#include "ops.h"

namespace ag::ops {

// Queries, keys and values, or their gradients: three tensors, or one with all of them in each row.
struct Operands {
  Tensor q, k, v;  // k and v undefined: their columns follow in q
  int64_t heads, kv_heads, dim;
  bool packed() const { return !k.defined(); }
  void* keys() const { return packed() ? column(q, heads * dim) : k.data(); }
  void* values() const { return packed() ? column(q, (heads + kv_heads) * dim) : v.data(); }
  int64_t key_rows() const { return packed() ? q.shape[0] : k.shape[0]; }
  Operands like() const {
    return {empty_like(q), packed() ? k : empty_like(k), packed() ? v : empty_like(v), heads, kv_heads, dim};
  }
};

static Operands operands(const Tensor& q, const Opt& k, const Opt& v, int64_t heads, int64_t kv_heads) {
  const char* op = "attention";
  want_float(op, "q", q);
  check_heads(op, heads, kv_heads);
  check(bool(k) == bool(v), "ERR_ARGUMENT", "[attention] k and v: expected both or none, got one");
  if (!k) return {q.detached(), Tensor(), Tensor(), heads, kv_heads, head_dim(op, "q", q, heads + 2 * kv_heads)};
  int64_t dim = head_dim(op, "q", q, heads);
  want_dtype(op, "k", *k, q.dt);
  want_dtype(op, "v", *v, q.dt);
  want_rank(op, "k", *k, 2);
  want_shape(op, "k", *k, Shape{k->shape[0], kv_heads * dim});
  want_shape(op, "v", *v, k->shape);
  want_same_device(op, {&q, &*k, &*v});
  return {q.detached(), k->detached(), v->detached(), heads, kv_heads, dim};
}

Tensor attention(const Tensor& q, const Opt& k, const Opt& v, const Tensor& q_offsets, const Tensor& k_offsets,
                 int64_t heads, int64_t kv_heads, bool causal, double scale) {
  const char* op = "attention";
  const Operands in = operands(q, k, v, heads, kv_heads);
  Device* device = q.device();
  int64_t batch = want_offsets(op, "qOffsets", q_offsets, q.shape[0]);
  int64_t batch_k = want_offsets(op, "kOffsets", k_offsets, in.key_rows());
  check(batch == batch_k, "ERR_SHAPE", "[attention] kOffsets: expected ", batch + 1, " offsets, got ", batch_k + 1);
  Tensor o = empty(device, Shape{q.shape[0], heads * in.dim}, q.dt),
         lse = empty(device, Shape{q.shape[0], heads}, acc_dtype(q.dt));
  AgAttention a{};
  a.q = q.data();
  a.k = in.keys();
  a.v = in.values();
  a.o = o.data();
  a.lse = lse.data();
  a.ldq = q.shape[1];
  a.ldk = a.ldv = in.packed() ? q.shape[1] : kv_heads * in.dim;
  a.ldo = heads * in.dim;
  a.q_offsets = device_i32(q_offsets, device);
  a.k_offsets = device_i32(k_offsets, device);
  a.batch = batch;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = in.dim;
  a.q_tokens = q.shape[0];
  a.k_tokens = in.key_rows();
  a.scale = scale;
  a.causal = causal;
  a.dt = q.dt;
  run(op, device, &AgBackend::attention, a);
  const std::vector<Tensor> inputs = k ? std::vector<Tensor>{q, *k, *v} : std::vector<Tensor>{q};
  if (!recording(inputs)) return o;
  const Saved kept_q(in.q), kept_k(in.k), kept_v(in.v), kept_o(o.detached()), oq(q_offsets), ok(k_offsets);
  record(op, {&o}, inputs, [=](Grads& grads) {
    const Tensor& d_o = grads.out();
    const Tensor so = kept_o.get();
    Operands kept = in;
    kept.q = kept_q.get(), kept.k = kept_k.get(), kept.v = kept_v.get();
    Operands d = kept.like();
    AgAttentionGrad g{};
    g.forward = a;  // the saved tensors and `lse` keep its pointers alive
    g.forward.o = so.data();
    g.forward.lse = lse.data();
    g.forward.q_offsets = device_i32(oq.get(), d_o.device());
    g.forward.k_offsets = device_i32(ok.get(), d_o.device());
    g.d_o = d_o.data();
    g.dq = d.q.data();
    g.dk = d.keys();
    g.dv = d.values();
    run("attention", d_o.device(), &AgBackend::attention_grad, g);
    grads.add(0, std::move(d.q));
    if (d.packed()) return;
    grads.add(1, std::move(d.k));
    grads.add(2, std::move(d.v));
  });
  return o;
}

}  // namespace ag::ops

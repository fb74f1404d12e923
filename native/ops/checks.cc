#include "checks.h"

namespace ag::ops {

void want_float(const char* op, const char* what, const Tensor& t) {
  check(is_float(t.dt), "ERR_DTYPE", "[", op, "] ", what, ": expected f32, bf16 or f64, got ", dtype_name(t.dt));
}
void want_dtype(const char* op, const char* what, const Tensor& t, AgDtype dt) {
  check(t.dt == dt, "ERR_DTYPE", "[", op, "] ", what, ": expected ", dtype_name(dt), ", got ", dtype_name(t.dt));
}
void want_shape(const char* op, const char* what, const Tensor& t, const Shape& shape) {
  check(t.shape == shape, "ERR_SHAPE", "[", op, "] ", what, ": expected ", shape, ", got ", t.shape);
}
void want_rank(const char* op, const char* what, const Tensor& t, int rank) {
  check(t.shape.rank == rank, "ERR_SHAPE", "[", op, "] ", what, ": expected rank ", rank, ", got ", t.shape);
}
void want_same_device(const char* op, std::initializer_list<const Tensor*> tensors) {
  Device* first = nullptr;
  for (const Tensor* t : tensors) {
    if (!t || !t->defined()) continue;
    if (!first) first = t->device();
    check(t->device() == first, "ERR_DEVICE", "[", op, "] tensors: expected all on ", device_name(first),
          ", got one on ", device_name(t->device()));
  }
}
const int32_t* host_i32(const Tensor& t) { return t.as<const int32_t>(); }

const int32_t* device_i32(const Tensor& t, Device* device) {
  if (device == t.device()) return host_i32(t);
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(mirror_of(t.storage, device)) + t.offset);
}

void want_i32(const char* op, const char* what, const Tensor& t) {
  want_dtype(op, what, t, AG_I32);
  check(t.device() == &cpu(), "ERR_DEVICE", "[", op, "] ", what, ": expected indices on the cpu, got them on ",
        device_name(t.device()));
}
void want_index(const char* op, const char* what, const Tensor& t, int64_t low, int64_t high) {
  want_i32(op, what, t);
  const int32_t* p = host_i32(t);
  for (int64_t i = 0, n = t.numel(); i < n; i++)
    check(p[i] >= low && p[i] < high, "ERR_RANGE", "[", op, "] ", what, "[", i, "]: expected ", low, "..", high - 1,
          ", got ", p[i]);
}
int64_t want_offsets(const char* op, const char* what, const Tensor& t, int64_t total) {
  want_i32(op, what, t);
  want_rank(op, what, t, 1);
  int64_t n = t.numel();
  check(n >= 1, "ERR_SHAPE", "[", op, "] ", what, ": expected at least one offset, got none");
  const int32_t* p = host_i32(t);
  check(p[0] == 0 && p[n - 1] == total, "ERR_RANGE", "[", op, "] ", what, ": expected 0 .. ", total, ", got ", p[0],
        " .. ", p[n - 1]);
  for (int64_t i = 1; i < n; i++)
    check(p[i] >= p[i - 1], "ERR_RANGE", "[", op, "] ", what, "[", i, "]: expected >= ", p[i - 1], ", got ", p[i]);
  return n - 1;
}

AgUnaryOp parse_activation(const char* op, const std::string& name) {
  static const struct {
    const char* name;
    AgUnaryOp op;
  } known[] = {{"none", AG_NONE}, {"gelu", AG_GELU}, {"gelu_tanh", AG_GELU_TANH}, {"quick_gelu", AG_QUICK_GELU},
               {"silu", AG_SILU}, {"exp", AG_EXP}};
  for (auto& k : known)
    if (name == k.name) return k.op;
  fail("ERR_ARGUMENT", "[", op, "] activation: expected none, gelu, gelu_tanh, quick_gelu, silu or exp, got '", name,
       "'");
}

int64_t head_dim(const char* op, const char* what, const Tensor& x, int64_t heads) {
  want_rank(op, what, x, 2);
  check(heads > 0 && x.shape[1] % heads == 0 && x.shape[1] > 0, "ERR_SHAPE", "[", op, "] ", what,
        ": expected columns divisible by ", heads, " heads, got ", x.shape);
  return x.shape[1] / heads;
}

void check_heads(const char* op, int64_t heads, int64_t kv_heads) {
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "ERR_ARGUMENT", "[", op,
        "] heads: expected a multiple of kvHeads, got ", heads, " and ", kv_heads);
}

}  // namespace ag::ops

// Shapes, elementwise ops and rows.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace ag::ops {

// ---- checks -----------------------------------------------------------------------------------------
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
    check(t->device() == first, "ERR_DEVICE", "[", op, "] tensors: expected all on ", device_name(first), ", got one on ",
          device_name(t->device()));
  }
}
const int32_t* host_i32(const Tensor& t) { return t.as<const int32_t>(); }

const int32_t* device_i32(const Tensor& t, Device* device) {
  if (device == t.device()) return host_i32(t);
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(mirror_of(t.storage, device)) + t.offset);
}

void want_i32(const char* op, const char* what, const Tensor& t) {
  want_dtype(op, what, t, AG_I32);
  check(t.device() == &cpu(), "ERR_DEVICE", "[", op, "] ", what, ": expected indices on the cpu, got them on ", device_name(t.device()));
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
  check(p[0] == 0 && p[n - 1] == total, "ERR_RANGE", "[", op, "] ", what, ": expected 0 .. ", total, ", got ", p[0], " .. ", p[n - 1]);
  for (int64_t i = 1; i < n; i++)
    check(p[i] >= p[i - 1], "ERR_RANGE", "[", op, "] ", what, "[", i, "]: expected >= ", p[i - 1], ", got ", p[i]);
  return n - 1;
}

AgUnaryOp parse_activation(const char* op, const std::string& name) {
  static const struct { const char* name; AgUnaryOp op; } known[] = {
      {"none", AG_NONE}, {"gelu", AG_GELU}, {"gelu_tanh", AG_GELU_TANH}, {"quick_gelu", AG_QUICK_GELU},
      {"silu", AG_SILU}, {"exp", AG_EXP}};
  for (auto& k : known)
    if (name == k.name) return k.op;
  fail("ERR_ARGUMENT", "[", op, "] activation: expected none, gelu, gelu_tanh, quick_gelu, silu or exp, got '", name, "'");
}

static const AgBackend& table(const Tensor& t) { return *t.device()->backend; }

// ---- cast, reshape, slice, concat -------------------------------------------------------------------
static Tensor cast_raw(const Tensor& x, AgDtype dt) {
  Tensor y = empty(x.device(), x.shape, dt);
  run("cast", x.device(), table(x).cast, AgCast{y.data(), dt, x.data(), x.dt, x.numel()});
  return y;
}

Tensor cast(const Tensor& x, const std::string& dtype) {
  AgDtype dt = parse_dtype(dtype), from = x.dt;
  Tensor y = dt == from ? x.detached() : cast_raw(x, dt);
  if (recording({&x})) {
    check(is_float(dt), "ERR_DTYPE", "[cast] a tensor with a gradient: expected a float dtype, got ", dtype_name(dt));
    record("cast", {&y}, {x}, [from](Grads& g) { g.add(0, g.out().dt == from ? g.out() : cast_raw(g.out(), from)); });
  }
  return y;
}

static Tensor to_raw(const Tensor& x, Device* device) {
  Tensor y = empty(device, x.shape, x.dt);
  Device* other = device == &cpu() ? x.device() : device;  // the CPU knows nothing of another device's memory
  copy_bytes(other, y.data(), x.data(), x.bytes());
  if (device == &cpu()) synchronize(other);
  return y;
}

Tensor to(const Tensor& x, Device* device) {
  Device* from = x.device();
  Tensor y = device == from ? x.detached() : to_raw(x, device);
  if (recording({&x})) {
    record("to", {&y}, {x}, [from](Grads& g) { g.add(0, g.out().device() == from ? g.out() : to_raw(g.out(), from)); });
  }
  return y;
}

Tensor reshape(const Tensor& x, const std::vector<int64_t>& dims) {
  Tensor y = x.view(Shape(dims));
  Shape before = x.shape;
  record("reshape", {&y}, {x}, [before](Grads& g) { g.add(0, g.out().view(before)); });
  return y;
}

struct Split {
  int64_t outer, dim, inner;  // inner in bytes
};
static Split split_at(const char* op, const Tensor& x, int64_t dim) {
  check(dim >= 0 && dim < x.shape.rank, "ERR_ARGUMENT", "[", op, "] dim: expected 0..", x.shape.rank - 1, ", got ", dim);
  Split s{1, x.shape.d[dim], dtype_size(x.dt)};
  for (int i = 0; i < dim; i++) s.outer *= x.shape.d[i];
  for (int i = int(dim) + 1; i < x.shape.rank; i++) s.inner *= x.shape.d[i];
  return s;
}

static void copy_rows(const char* op, Device* device, char* dst, int64_t dst_stride, const char* src, int64_t src_stride,
                      int64_t rows, int64_t row_bytes) {
  if (rows && row_bytes) run(op, device, device->backend->copy2d, AgCopy2d{dst, dst_stride, src, src_stride, rows, row_bytes});
}

Tensor slice(const Tensor& x, int64_t dim, int64_t start, int64_t end) {
  Split s = split_at("slice", x, dim);
  check(start >= 0 && start <= end && end <= s.dim, "ERR_RANGE", "[slice] range: expected 0 <= start <= end <= ", s.dim,
        ", got ", start, "..", end);
  Shape shape = x.shape;
  shape.d[dim] = end - start;
  Tensor y;
  if (s.outer == 1) {  // contiguous: a view
    y = x.detached();
    y.shape = shape;
    y.offset += start * s.inner;
  } else {
    y = empty(x.device(), shape, x.dt);
    copy_rows("slice", x.device(), y.as<char>(), (end - start) * s.inner, x.as<char>() + start * s.inner,
              s.dim * s.inner, s.outer, (end - start) * s.inner);
  }
  Shape before = x.shape;
  record("slice", {&y}, {x}, [=](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dx = zeros(dy.device(), before, dy.dt);
    copy_rows("slice", dy.device(), dx.as<char>() + start * s.inner, s.dim * s.inner, dy.as<char>(),
              (end - start) * s.inner, s.outer, (end - start) * s.inner);
    g.add(0, std::move(dx));
  });
  return y;
}

Tensor concat(const std::vector<Tensor>& xs, int64_t dim) {
  check(!xs.empty(), "ERR_ARGUMENT", "[concat] tensors: expected at least one, got none");
  Shape shape = xs[0].shape;
  Split first = split_at("concat", xs[0], dim);
  int64_t total = 0;
  for (const Tensor& x : xs) {
    want_dtype("concat", "tensor", x, xs[0].dt);
    want_same_device("concat", {&xs[0], &x});
    Shape expected = shape;
    check(x.shape.rank == shape.rank, "ERR_SHAPE", "[concat] rank: expected ", shape.rank, ", got ", x.shape);
    expected.d[dim] = x.shape.d[dim];
    want_shape("concat", "tensor", x, expected);
    total += x.shape.d[dim];
  }
  shape.d[dim] = total;
  Tensor y = empty(xs[0].device(), Shape(std::vector<int64_t>(shape.d, shape.d + shape.rank)), xs[0].dt);
  std::vector<Shape> shapes;
  int64_t at = 0;
  for (const Tensor& x : xs) {
    int64_t bytes = x.shape.d[dim] * first.inner;
    copy_rows("concat", y.device(), y.as<char>() + at, total * first.inner, x.as<char>(), bytes, first.outer, bytes);
    at += bytes;
    shapes.push_back(x.shape);
  }
  record("concat", {&y}, xs, [=](Grads& g) {
    const Tensor& dy = g.out();
    int64_t at = 0;
    for (size_t i = 0; i < shapes.size(); i++) {
      int64_t bytes = shapes[i].d[dim] * first.inner;
      if (g.needs(int(i))) {
        Tensor dx = empty(dy.device(), shapes[i], dy.dt);
        copy_rows("concat", dy.device(), dx.as<char>(), bytes, dy.as<char>() + at, total * first.inner, first.outer, bytes);
        g.add(int(i), std::move(dx));
      }
      at += bytes;
    }
  });
  return y;
}

// ---- rows -------------------------------------------------------------------------------------------
static Tensor gather_op(const char* op, const Tensor& x, const Tensor& index) {
  check(x.shape.rank >= 1, "ERR_SHAPE", "[", op, "] expected rank >= 1, got ", x.shape);
  want_rank(op, "index", index, 1);
  want_index(op, "index", index, 0, x.shape.d[0]);
  Shape shape = x.shape;
  int64_t n = index.numel(), rows = x.shape.d[0], cols = 1;
  for (int i = 1; i < x.shape.rank; i++) cols *= x.shape.d[i];
  shape.d[0] = n;
  Tensor y = empty(x.device(), Shape(std::vector<int64_t>(shape.d, shape.d + shape.rank)), x.dt);
  run(op, x.device(), table(x).gather_rows, AgGatherRows{y.data(), x.data(), device_i32(index, x.device()), n, cols, rows, x.dt});
  Saved saved(index);
  record(op, {&y}, {x}, [=](Grads& g) {
    const Tensor& dy = g.out();
    run(op, dy.device(), table(dy).scatter_add,
        AgScatterAdd{g.slot(0), dy.data(), device_i32(saved.get(), dy.device()), n, cols, rows, dy.dt, 1.0}, AG_K_SCATTER_ADD);
  });
  return y;
}

Tensor gather(const Tensor& x, const Tensor& index) { return gather_op("gather", x, index); }

Tensor embedding(const Tensor& ids, const Tensor& weight) {
  want_rank("embedding", "weight", weight, 2);
  want_float("embedding", "weight", weight);
  return gather_op("embedding", weight, ids);
}

// ---- elementwise ------------------------------------------------------------------------------------
static void check_suffix(const char* op, const Tensor& a, const Tensor& b) {
  want_float(op, "a", a);
  want_dtype(op, "b", b, a.dt);
  want_same_device(op, {&a, &b});
  bool ok = b.shape.rank <= a.shape.rank;
  for (int i = 1; ok && i <= b.shape.rank; i++) ok = b.shape[-i] == a.shape[-i];
  check(ok || b.numel() == 1, "ERR_SHAPE", "[", op, "] b: expected a suffix of ", a.shape, " or one element, got ", b.shape);
}

static Tensor binary_raw(const char* op, AgBinaryOp kind, const Tensor& a, const Tensor& b) {
  Tensor y = empty_like(a);
  if (a.numel()) run(op, a.device(), table(a).binary, AgBinary{kind, y.data(), a.data(), b.data(), a.numel(), b.numel(), a.dt});
  return y;
}

static Tensor scale_raw(const Tensor& x, double alpha) {
  Tensor y = empty_like(x);
  run("scale", x.device(), table(x).unary, AgUnary{AG_SCALE, y.data(), x.data(), x.numel(), x.dt, alpha});
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
  run("add", dy.device(), table(dy).col_sum,
      AgColSum{g.slot(input), dy.data(), cols ? dy.numel() / cols : 0, cols, cols, dy.dt, alpha, nullptr}, AG_K_COL_SUM);
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
  run("unary", x.device(), table(x).unary, AgUnary{kind, y.data(), x.data(), x.numel(), x.dt, 1.0});
  record("unary", {&y}, {x}, [kind, saved](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dx = empty_like(dy);
    run("unary", dy.device(), table(dy).unary_grad,
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
  run("siluMul", y.device(), table(y).silu_mul, AgSiluMul{y.data(), gate.data(), up.data(), y.numel(), y.dt});
  record("siluMul", {&y}, {gate, up}, [sg, su](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dg = empty_like(dy), du = empty_like(dy);
    run("siluMul", dy.device(), table(dy).silu_mul_grad,
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
  run(op, x.device(), table(x).sum, AgSum{y.data(), x.data(), x.numel(), x.dt, alpha}, AG_K_SUM);
  Shape shape = x.shape;
  record(op, {&y}, {x}, [shape, alpha](Grads& g) {
    const Tensor& dy = g.out();
    Tensor dx = zeros(dy.device(), shape, dy.dt);
    if (dx.numel()) run("sum", dx.device(), table(dx).binary, AgBinary{AG_ADD, dx.data(), dx.data(), dy.data(), dx.numel(), 1, dx.dt});
    g.add(0, alpha == 1.0 ? dx : scale_raw(dx, alpha));
  });
  return y;
}

Tensor sum(const Tensor& x) { return sum_scaled("sum", x, 1.0); }
Tensor mean(const Tensor& x) {
  check(x.numel() > 0, "ERR_SHAPE", "[mean] expected at least one element, got ", x.shape);
  return sum_scaled("mean", x, 1.0 / double(x.numel()));
}

// ---- in place, outside the tape ---------------------------------------------------------------------
void fill(const Tensor& x, double value) {
  x.storage->written();
  run("fill", x.device(), table(x).fill, AgFill{x.data(), x.dt, x.numel(), value});
}

void copy(const Tensor& dst, const Tensor& src) {
  want_shape("copy", "source", src, dst.shape);
  want_same_device("copy", {&dst, &src});
  dst.storage->written();
  if (dst.dt == src.dt) {
    if (dst.data() != src.data()) copy_bytes(dst.device(), dst.data(), src.data(), dst.bytes());
  } else {
    run("copy", dst.device(), table(dst).cast, AgCast{dst.data(), dst.dt, src.data(), src.dt, src.numel()});
  }
}

void random(const Tensor& x, const std::string& kind, double a, double b, double seed, double offset) {
  want_float("random", "x", x);
  check(kind == "uniform" || kind == "normal", "ERR_ARGUMENT", "[random] kind: expected uniform or normal, got '", kind, "'");
  for (double v : {seed, offset})
    check(v >= 0 && v < 9007199254740992.0 && std::floor(v) == v, "ERR_ARGUMENT",
          "[random] seed and offset: expected integers in 0..2^53-1, got ", v);
  x.storage->written();
  run("random", x.device(), table(x).random,
      AgRandom{x.data(), x.dt, x.numel(), kind == "uniform" ? AG_UNIFORM : AG_NORMAL, a, b, uint64_t(seed), uint64_t(offset)});
}

}  // namespace ag::ops

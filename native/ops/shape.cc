// Shapes, dtypes and devices: the same values another way; and filling, copying, random numbers in place.
#include <cmath>

#include "ops.h"

namespace ag::ops {

static Tensor cast_raw(const Tensor& x, AgDtype dt) {
  Tensor y = empty(x.device(), x.shape, dt);
  run("cast", x.device(), &AgBackend::cast, AgCast{y.data(), dt, x.data(), x.dt, x.numel()});
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
  check(dim >= 0 && dim < x.shape.rank, "ERR_ARGUMENT", "[", op, "] dim: expected 0..", x.shape.rank - 1, ", got ",
        dim);
  Split s{1, x.shape.d[dim], dtype_size(x.dt)};
  for (int i = 0; i < dim; i++) s.outer *= x.shape.d[i];
  for (int i = int(dim) + 1; i < x.shape.rank; i++) s.inner *= x.shape.d[i];
  return s;
}

static void copy_rows(const char* op, Device* device, char* dst, int64_t dst_stride, const char* src,
                      int64_t src_stride, int64_t rows, int64_t row_bytes) {
  if (rows && row_bytes)
    run(op, device, &AgBackend::copy2d, AgCopy2d{dst, dst_stride, src, src_stride, rows, row_bytes});
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
        copy_rows("concat", dy.device(), dx.as<char>(), bytes, dy.as<char>() + at, total * first.inner, first.outer,
                  bytes);
        g.add(int(i), std::move(dx));
      }
      at += bytes;
    }
  });
  return y;
}

// ---- in place, outside the tape ---------------------------------------------------------------------
void fill(const Tensor& x, double value) {
  x.storage->written();
  run("fill", x.device(), &AgBackend::fill, AgFill{x.data(), x.dt, x.numel(), value});
}

void copy(const Tensor& dst, const Tensor& src) {
  want_shape("copy", "source", src, dst.shape);
  want_same_device("copy", {&dst, &src});
  dst.storage->written();
  if (dst.dt == src.dt) {
    if (dst.data() != src.data()) copy_bytes(dst.device(), dst.data(), src.data(), dst.bytes());
  } else {
    run("copy", dst.device(), &AgBackend::cast, AgCast{dst.data(), dst.dt, src.data(), src.dt, src.numel()});
  }
}

void random(const Tensor& x, const std::string& kind, double a, double b, double seed, double offset) {
  want_float("random", "x", x);
  check(kind == "uniform" || kind == "normal", "ERR_ARGUMENT", "[random] kind: expected uniform or normal, got '", kind,
        "'");
  for (double v : {seed, offset})
    check(v >= 0 && v < 9007199254740992.0 && std::floor(v) == v, "ERR_ARGUMENT",
          "[random] seed and offset: expected integers in 0..2^53-1, got ", v);
  x.storage->written();
  run("random", x.device(), &AgBackend::random,
      AgRandom{x.data(), x.dt, x.numel(), kind == "uniform" ? AG_UNIFORM : AG_NORMAL, a, b, uint64_t(seed),
               uint64_t(offset)});
}

}  // namespace ag::ops

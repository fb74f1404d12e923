// Rows by index.
#include "ops.h"

namespace ag::ops {

static Tensor gather_op(const char* op, const Tensor& x, const Tensor& index) {
  check(x.shape.rank >= 1, "ERR_SHAPE", "[", op, "] expected rank >= 1, got ", x.shape);
  want_rank(op, "index", index, 1);
  want_index(op, "index", index, 0, x.shape.d[0]);
  Shape shape = x.shape;
  int64_t n = index.numel(), rows = x.shape.d[0], cols = 1;
  for (int i = 1; i < x.shape.rank; i++) cols *= x.shape.d[i];
  shape.d[0] = n;
  Tensor y = empty(x.device(), Shape(std::vector<int64_t>(shape.d, shape.d + shape.rank)), x.dt);
  run(op, x.device(), &AgBackend::gather_rows,
      AgGatherRows{y.data(), x.data(), device_i32(index, x.device()), n, cols, rows, x.dt});
  Saved saved(index);
  record(op, {&y}, {x}, [=](Grads& g) {
    const Tensor& dy = g.out();
    run(op, dy.device(), &AgBackend::scatter_add,
        AgScatterAdd{g.slot(0), dy.data(), device_i32(saved.get(), dy.device()), n, cols, rows, dy.dt, 1.0});
  });
  return y;
}

Tensor gather(const Tensor& x, const Tensor& index) { return gather_op("gather", x, index); }

Tensor embedding(const Tensor& ids, const Tensor& weight) {
  want_rank("embedding", "weight", weight, 2);
  want_float("embedding", "weight", weight);
  return gather_op("embedding", weight, ids);
}

}  // namespace ag::ops

// Norms and softmax.
#include "cpu_test.h"

namespace cpu_test {
namespace {

struct NormCase {
  Data x, w, b, dy, y, dx, mean, rstd;
  std::vector<double> mu, rs;
  int64_t rows, cols;
  bool layer;
  NormCase(AgDtype dt, int64_t rows, int64_t cols, bool layer)
      : x(dt, rows * cols, -1, 3),
        w(dt, cols, 0.5, 1.5),
        b(dt, cols, -1, 1),
        dy(dt, rows * cols, -1, 1),
        y(dt, rows * cols),
        dx(dt, rows * cols),
        mean(acc_of(dt), rows),
        rstd(acc_of(dt), rows),
        rows(rows),
        cols(cols),
        layer(layer) {
    for (int64_t r = 0; r < rows; r++) {
      double m = 0, v = 0;
      for (int64_t c = 0; c < cols && layer; c++) m += x.get(r * cols + c) / double(cols);
      for (int64_t c = 0; c < cols; c++) v += (x.get(r * cols + c) - m) * (x.get(r * cols + c) - m) / double(cols);
      mu.push_back(m), rs.push_back(1 / std::sqrt(v + 1e-5));
    }
  }
  double hat(int64_t i) const { return (x.get(i) - mu[size_t(i / cols)]) * rs[size_t(i / cols)]; }
};

void test_norm(Fixture f) {
  for (bool layer : {false, true})
    for (int64_t cols : {1, 7, 64, 100, 1029})
      for (int64_t rows : {0, 1, 19, 130}) {
        NormCase k(f.dt, rows, cols, layer);
        void *b = layer ? k.b.p() : nullptr, *mean = layer ? k.mean.p() : nullptr;
        run(f.b.norm, AgNorm{k.y.p(), k.x.p(), k.w.p(), b, mean, k.rstd.p(), rows, cols, 1e-5, f.dt});
        // one column: the variance is zero, rstd 316, and the mean's rounding shows
        double scale = cols == 1 && layer ? 100 : 2;
        auto want = [&](int64_t i) { return k.hat(i) * k.w.get(i % cols) + (layer ? k.b.get(i % cols) : 0); };
        compare("y", k.y, want, tolerance(f.dt, scale));
        compare("rstd", k.rstd, [&](int64_t r) { return k.rs[size_t(r)]; }, tolerance(acc_of(f.dt)));
        if (layer) compare("mean", k.mean, [&](int64_t r) { return k.mu[size_t(r)]; }, tolerance(acc_of(f.dt)));
      }
}

void norm_grad_case(Fixture f, NormCase& k, AgDtype to, int accumulate, bool want_dx, bool want_dw) {
  int64_t rows = k.rows, cols = k.cols;
  for (int64_t r = 0; r < rows; r++) k.mean.set(r, k.mu[size_t(r)]), k.rstd.set(r, k.rs[size_t(r)]);
  Data dw(to, cols, -1, 1), db(to, cols, -1, 1), dw0 = dw, db0 = db;
  AgNormGrad a{want_dx ? k.dx.p() : nullptr,
               {want_dw ? dw.p() : nullptr, to, accumulate},
               {k.layer ? db.p() : nullptr, to, accumulate},
               k.dy.p(),
               k.x.p(),
               k.w.p(),
               k.layer ? k.mean.p() : nullptr,
               k.rstd.p(),
               rows,
               cols,
               f.dt};
  run(f.b.norm_grad, a);
  std::vector<double> s0(static_cast<size_t>(rows)), s1(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows * cols; i++) {
    double d = k.dy.get(i) * k.w.get(i % cols) / double(cols);
    s0[size_t(i / cols)] += k.layer ? d : 0, s1[size_t(i / cols)] += d * k.hat(i);
  }
  auto dx = [&](int64_t i) {
    size_t r = size_t(i / cols);
    return k.rs[r] * (k.dy.get(i) * k.w.get(i % cols) - s0[r] - k.hat(i) * s1[r]);
  };
  if (want_dx) compare("dx", k.dx, dx, tolerance(f.dt, cols == 1 ? 1000 : 8));
  auto column = [&](int64_t c, bool weight) {
    double s = 0;
    for (int64_t r = 0; r < rows; r++) s += k.dy.get(r * cols + c) * (weight ? k.hat(r * cols + c) : 1);
    return s;
  };
  double scale = 1 + std::sqrt(double(rows));
  if (want_dw)
    compare("dw", dw, [&](int64_t c) { return column(c, true) + (accumulate ? dw0.get(c) : 0); }, tolerance(to, scale));
  if (k.layer)
    compare(
        "db", db, [&](int64_t c) { return column(c, false) + (accumulate ? db0.get(c) : 0); }, tolerance(to, scale));
}

void test_norm_grad(Fixture f) {
  for (bool layer : {false, true})
    for (int64_t cols : {1, 7, 64, 1029})
      for (int64_t rows : {0, 1, 19, 333}) {
        NormCase k(f.dt, rows, cols, layer);
        norm_grad_case(f, k, f.dt, 0, true, true);
        norm_grad_case(f, k, acc_of(f.dt), 1, true, true);
        norm_grad_case(f, k, f.dt, 1, false, true);
        norm_grad_case(f, k, f.dt, 0, true, false);
      }
}

void test_softmax(Fixture f) {
  for (int64_t cols : {1, 3, 16, 77, 4001})
    for (int64_t rows : {0, 1, 29}) {
      Data x(f.dt, rows * cols, -20, 20), y(f.dt, rows * cols), dy(f.dt, rows * cols, -1, 1), dx(f.dt, rows * cols);
      if (rows > 1 && cols > 1) x.set(0, -INFINITY);
      run(f.b.softmax, AgSoftmax{y.p(), x.p(), rows, cols, f.dt});
      std::vector<double> top(size_t(rows), -INFINITY), total(static_cast<size_t>(rows)),
          dot(static_cast<size_t>(rows));
      for (int64_t i = 0; i < x.n; i++) top[size_t(i / cols)] = std::fmax(top[size_t(i / cols)], x.get(i));
      for (int64_t i = 0; i < x.n; i++) total[size_t(i / cols)] += std::exp(x.get(i) - top[size_t(i / cols)]);
      compare(
          "y", y, [&](int64_t i) { return std::exp(x.get(i) - top[size_t(i / cols)]) / total[size_t(i / cols)]; },
          tolerance(f.dt, 0.1));
      for (int64_t i = 0; i < x.n; i++) dot[size_t(i / cols)] += dy.get(i) * y.get(i);
      run(f.b.softmax_grad, AgSoftmaxGrad{dx.p(), dy.p(), y.p(), rows, cols, f.dt});
      compare("dx", dx, [&](int64_t i) { return y.get(i) * (dy.get(i) - dot[size_t(i / cols)]); }, tolerance(f.dt));
    }
}

void test_l2norm(Fixture f) {
  AgDtype acc = acc_of(f.dt);
  for (int64_t cols : {1, 5, 512, 771})
    for (int64_t rows : {0, 1, 40}) {
      Data x(f.dt, rows * cols, 0.2, 2), y(f.dt, rows * cols), norm(acc, rows), dy(f.dt, rows * cols, -1, 1),
          dx(f.dt, rows * cols);
      run(f.b.l2norm, AgL2Norm{y.p(), x.p(), norm.p(), rows, cols, f.dt});
      std::vector<double> length(static_cast<size_t>(rows)), dot(static_cast<size_t>(rows));
      for (int64_t i = 0; i < x.n; i++) length[size_t(i / cols)] += x.get(i) * x.get(i);
      for (double& l : length) l = std::sqrt(l);
      compare("y", y, [&](int64_t i) { return x.get(i) / length[size_t(i / cols)]; }, tolerance(f.dt));
      compare("norm", norm, [&](int64_t r) { return length[size_t(r)]; }, tolerance(acc));
      for (int64_t i = 0; i < x.n; i++) dot[size_t(i / cols)] += dy.get(i) * y.get(i);
      run(f.b.l2norm_grad, AgL2NormGrad{dx.p(), dy.p(), y.p(), norm.p(), rows, cols, f.dt});
      auto want = [&](int64_t i) { return (dy.get(i) - y.get(i) * dot[size_t(i / cols)]) / length[size_t(i / cols)]; };
      compare("dx", dx, want, tolerance(f.dt, 3));
    }
}

const Cases kCases(
    "norm", {{"norm", test_norm}, {"norm_grad", test_norm_grad}, {"softmax", test_softmax}, {"l2norm", test_l2norm}});

}  // namespace
}  // namespace cpu_test

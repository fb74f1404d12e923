// Norms and softmax (cuda_test.h).
#include <cmath>

#include "cuda_test.h"

namespace cuda_test {
namespace {

const int64_t kRows[][2] = {{0, 8}, {1, 1}, {5, 37}, {9, 1024}, {3, 1032}, {2, 2047}, {70, 64}};  // rows, cols

void test_norm(Test& t) {
  for (auto& s : kRows)
    for (bool layer : {false, true}) {
      const int64_t rows = s[0], cols = s[1];
      Buffer &x = t.in(rows * cols, -1, 3), &w = t.in(cols, 0.5, 1.5), &b = t.in(cols), &y = t.out("y", rows * cols);
      Buffer &mean = t.out("mean", AG_F32, rows), &rstd = t.out("rstd", AG_F32, rows);
      t.run(layer ? "LayerNorm" : "RMSNorm", &AgBackend::norm, [&] {
        return AgNorm{y.p(), x.p(), w.p(), layer ? b.p() : nullptr, layer ? mean.p() : nullptr, rstd.p(), rows,
                      cols,  1e-5,  t.dt};
      });
      t.clear();
    }
}

void test_norm_grad(Test& t) {
  for (auto& s : kRows)
    for (bool layer : {false, true})
      for (int wanted = 0; wanted < 4; wanted++) {  // dx; dw, db; both; both, accumulated into the other dtype
        const int64_t rows = s[0], cols = s[1];
        const AgDtype to = wanted == 3 && t.dt == AG_F32 ? AG_BF16 : AG_F32;
        Buffer &x = t.in(rows * cols), &dy = t.in(rows * cols), &w = t.in(cols, 0.5, 1.5), &mean = t.in(AG_F32, rows),
               &rstd = t.in(AG_F32, rows, 1, 2);
        Buffer &dx = t.out("dx", rows * cols), &dw = t.in_place("dw", to, cols), &db = t.in_place("db", to, cols);
        t.run(layer ? "LayerNorm gradient" : "RMSNorm gradient", &AgBackend::norm_grad, [&] {
          AgNormGrad a{};
          a.dx = wanted == 1 ? nullptr : dx.p();
          if (wanted) a.dw = grad(dw, wanted == 3);
          if (wanted && layer) a.db = grad(db, wanted == 3);
          a.dy = dy.p(), a.x = x.p(), a.w = w.p(), a.mean = layer ? mean.p() : nullptr, a.rstd = rstd.p();
          a.rows = rows, a.cols = cols, a.dt = t.dt;
          return a;
        });
        t.clear();
      }
}

void test_softmax(Test& t) {
  for (auto& s : kRows) {
    const int64_t rows = s[0], cols = s[1], n = rows * cols;
    Buffer &x = t.in(n, -5, 5), &y = t.out("y", n), &dy = t.in(n), &p = t.in(n, 0, 1), &norm = t.in(AG_F32, rows, 1, 2),
           &length = t.out("norm", AG_F32, rows);
    t.run("softmax", &AgBackend::softmax, [&] { return AgSoftmax{y.p(), x.p(), rows, cols, t.dt}; });
    t.run("softmax_grad", &AgBackend::softmax_grad,
          [&] { return AgSoftmaxGrad{y.p(), dy.p(), p.p(), rows, cols, t.dt}; });
    t.run("l2norm", &AgBackend::l2norm, [&] { return AgL2Norm{y.p(), x.p(), length.p(), rows, cols, t.dt}; });
    t.run("l2norm_grad", &AgBackend::l2norm_grad,
          [&] { return AgL2NormGrad{y.p(), dy.p(), p.p(), norm.p(), rows, cols, t.dt}; });
    if (n) x.set(n / 2, NAN);
    t.run("softmax of a NaN", &AgBackend::softmax, [&] { return AgSoftmax{y.p(), x.p(), rows, cols, t.dt}; });
    t.clear();
  }
}

const Registered kCases[] = {{"norm", test_norm}, {"norm_grad", test_norm_grad}, {"softmax", test_softmax}};

}  // namespace
}  // namespace cuda_test

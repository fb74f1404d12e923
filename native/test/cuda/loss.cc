// Cross entropy (cuda_test.h).
#include <cmath>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_cross_entropy(Test& t) {
  const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 37}, {2, 8200}, {5, 1000}};
  for (auto& s : shapes)
    for (AgDtype to : {AG_F32, AG_BF16}) {
      const int64_t rows = s[0], cols = s[1];
      Buffer &x = t.in(rows * cols, -8, 8), &target = t.ids(rows, cols, -2), &by = t.in(AG_F32, 1, 0.5, 2),
             &nll = t.out("nll", AG_F32, rows), &d = t.out("dlogits", to, rows * cols);
      auto args = [&](const void* logits, void* dlogits, AgDtype dt_d) {
        return AgCrossEntropy{logits, rows, cols, target.i32(), nll.p(), dlogits, 0.125, by.p(), t.dt, dt_d};
      };
      t.run("cross_entropy", &AgBackend::cross_entropy, [&] { return args(x.p(), d.p(), to); });
      t.run("loss only", &AgBackend::cross_entropy, [&] { return args(x.p(), nullptr, to); });
      if (rows) x.set(cols / 2, -INFINITY);
      if (rows) t.run("cross_entropy with -inf", &AgBackend::cross_entropy, [&] { return args(x.p(), d.p(), to); });
      t.clear();
      Buffer &place = t.in_place("dlogits in logits", t.dt, rows * cols, -8, 8), &label = t.ids(rows, cols),
             &loss = t.out("nll", AG_F32, rows);
      t.run("cross_entropy in place", &AgBackend::cross_entropy, [&] {
        return AgCrossEntropy{place.p(), rows, cols, label.i32(), loss.p(), place.p(), 0.125, nullptr, t.dt, t.dt};
      });
      if (rows) place.set(rows * cols / 2, NAN);
      t.run("cross_entropy of a NaN", &AgBackend::cross_entropy, [&] {
        return AgCrossEntropy{place.p(), rows, cols, label.i32(), loss.p(), nullptr, 0.125, nullptr, t.dt, t.dt};
      });
      t.clear();
    }
}

const Registered kCases[] = {{"cross_entropy", test_cross_entropy}};

}  // namespace
}  // namespace cuda_test

// Drawing tokens (cuda_test.h).
#include <cmath>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_sample(Test& t) {
  if (t.dt == AG_BF16) return;  // f32 only
  struct Cut {
    double temperature, top_p;
    int64_t top_k;
  };
  const Cut cuts[] = {{0, 1, 0}, {1, 1, 0}, {0.7, 0.9, 0}, {1.3, 1, 5}, {1, 0.5, 40}, {1, 1e-9, 0}};
  for (const Cut& c : cuts) {
    if (small() && c.temperature != 0 && c.top_k != 40) continue;
    for (int64_t cols : {1, 40, 1500}) {
      if (cols == 1500 && (small() || (c.top_p != 0.9 && c.top_k != 40)))
        continue;  // 1024 fibers meet some hundred times for each row
      const int64_t rows = 6;
      Buffer &x = t.in(AG_F32, rows * cols, -6, 6), &u = t.in(AG_F64, rows, 0, 1),
             &out = t.out("id", AG_I32, rows).exact();
      for (int64_t i = 0; i < cols; i++) {
        x.set(cols + i, double(i % 7 == 3));        // many ties at every cut
        if (i % 3) x.set(2 * cols + i, -INFINITY);  // weights of zero
      }
      u.set(0, 0);
      u.set(1, 0.999999);
      if (cols > 1) x.set(4 * cols + 1, INFINITY);
      x.set(5 * cols + cols / 2, NAN);
      t.run("sample", &AgBackend::sample, [&] {
        return AgSample{static_cast<const float*>(x.p()),
                        rows,
                        cols,
                        c.temperature,
                        c.top_p,
                        c.top_k,
                        static_cast<const double*>(u.p()),
                        static_cast<int32_t*>(out.p())};
      });
      check(out.device(5) == -1, "a NaN gave %g", out.device(5));
      t.clear();
    }
  }
}

const Registered kCases[] = {{"sample", test_sample}};

}  // namespace
}  // namespace cuda_test

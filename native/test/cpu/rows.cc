// Rows by index, and sums over rows.
#include "cpu_test.h"

namespace cpu_test {
namespace {

void test_col_sum(Fixture f) {
  for (int64_t rows : {0, 1, 63, 64, 300, 1500})
    for (int64_t cols : {1, 7, 64, 300, 1029})
      for (int accumulate : {0, 1})
        for (AgDtype to : {f.dt, acc_of(f.dt)}) {
          int64_t ld = cols + (rows & 1 ? 3 : 0);
          Data x(f.dt, rows * ld, -1, 3), y(to, cols, -1, 1), before = y, by(acc_of(f.dt), 1, 1, 2);
          const bool times = rows == 300;
          run(f.b.col_sum,
              AgColSum{{y.p(), to, accumulate}, x.p(), rows, cols, ld, f.dt, 0.5, times ? by.p() : nullptr});
          auto want = [&](int64_t c) {
            double s = 0;
            for (int64_t r = 0; r < rows; r++) s += x.get(r * ld + c);
            return s * 0.5 * (times ? by.get(0) : 1) + (accumulate ? before.get(c) : 0);
          };
          compare("col_sum", y, want, tolerance(to, 2));
        }
}

void test_rows(Fixture f) {
  for (int64_t cols : {1, 5, 64, 1027})
    for (int64_t n : {0, 1, 50}) {
      int64_t rows = 23;
      Data src(f.dt, rows * cols, -1, 1), dst(f.dt, n * cols), index = ids(n, rows);
      run(f.b.gather_rows, AgGatherRows{dst.p(), src.p(), i32(index), n, cols, rows, f.dt});
      compare("gather", dst, [&](int64_t i) { return src.get(i32(index)[i / cols] * cols + i % cols); }, {0, 0});
      Data from(f.dt, n * cols, -1, 1);
      for (int accumulate : {0, 1})
        for (AgDtype dt : {f.dt, acc_of(f.dt)}) {
          Data sum(dt, rows * cols, -1, 1), before = sum, some = index;
          for (int64_t i = 0; i < n; i += 7) some.set(i, -1);
          run(f.b.scatter_add, AgScatterAdd{{sum.p(), dt, accumulate}, from.p(), i32(some), n, cols, rows, f.dt, 0.3});
          std::vector<double> expect(size_t(rows * cols));
          for (int64_t i = 0; i < rows * cols; i++) expect[size_t(i)] = accumulate ? before.get(i) : 0;
          for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < cols && i32(some)[i] >= 0; c++)
              expect[size_t(i32(some)[i] * cols + c)] += 0.3 * from.get(i * cols + c);
          compare("scatter_add", sum, [&](int64_t i) { return expect[size_t(i)]; }, tolerance(dt));
        }
    }
}

const Cases kCases("rows", {{"col_sum", test_col_sum}, {"rows", test_rows}});

}  // namespace
}  // namespace cpu_test

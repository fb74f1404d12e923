// Rows by index, and sums over rows (cuda_test.h).
#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_col_sum(Test& t) {
  const int64_t shapes[][3] = {{0, 5, 5},     {1, 1, 1},     {3, 300, 300},
                               {200, 40, 56}, {1000, 9, 11}, {67, 256, 256}};  // rows, cols, ld
  for (auto& s : shapes)
    for (AgDtype to : {AG_F32, AG_BF16})
      for (bool accumulate : {false, true}) {
        const int64_t rows = s[0], cols = s[1], ld = s[2];
        Buffer &x = t.in(rows * ld, 0, 1), &by = t.in(AG_F32, 1, 0.5, 2), &y = t.in_place("y", to, cols);
        t.run("col_sum", &AgBackend::col_sum, [&] {
          return AgColSum{grad(y, accumulate), x.p(), rows, cols, ld, t.dt, 0.7, accumulate ? by.p() : nullptr};
        });
        t.clear();
      }
}

void test_rows(Test& t) {
  for (AgDtype dt : {t.dt, AG_I32, AG_I64})
    for (int64_t cols : {1, 8, 33, 640}) {
      const int64_t n = 37, rows = 11;
      Buffer &index = t.ids(n, rows), &src = t.in(dt, rows * cols, -9e4, 9e4),
             &dst = t.out("rows", dt, n * cols).exact();
      t.run("gather_rows", &AgBackend::gather_rows,
            [&] { return AgGatherRows{dst.p(), src.p(), index.i32(), n, cols, rows, dt}; });
      t.clear();
    }
}

void scatter_add(Test& t, const std::vector<int32_t>& list, int64_t cols, int64_t rows) {
  const int64_t n = int64_t(list.size());
  for (AgDtype to : {AG_F32, AG_BF16})
    for (bool accumulate : {false, true})
      for (double scale : {0.3, 1.0}) {
        Buffer &index = t.list(list), &src = t.in(n * cols), &dst = t.in_place("rows", to, rows * cols);
        if (scale == 1) dst.exact();  // the products are, so what is left to differ is the order
        t.run("scatter_add", &AgBackend::scatter_add,
              [&] { return AgScatterAdd{grad(dst, accumulate), src.p(), index.i32(), n, cols, rows, t.dt, scale}; });
        t.clear();
      }
}
void test_scatter_add(Test& t) {
  auto draw = [](int64_t n, int64_t rows) {
    std::vector<int32_t> list;
    for (int64_t i = 0; i < n; i++) list.push_back(int32_t(below(rows + 1) - 1));
    return list;
  };
  const int64_t shapes[][3] = {{0, 8, 5}, {1, 1, 1}, {37, 12, 7}, {9, 1300, 4}, {40, 7, 3}};  // n, cols, rows
  for (auto& s : shapes) scatter_add(t, draw(s[0], s[2]), s[1], s[2]);
  scatter_add(t, std::vector<int32_t>(21, 2), 8, 4);
  scatter_add(t, std::vector<int32_t>(21, -1), 8, 4);
  scatter_add(t, draw(1030, 2000), 1, 2000);  // runs of 1024 rows are sorted, then merged
  if (small()) return;
  for (int64_t n : {600, 1024, 2049, 5000}) scatter_add(t, draw(n, n / 3), 8, n / 3);
}

const Registered kCases[] = {{"col_sum", test_col_sum}, {"rows", test_rows}, {"scatter_add", test_scatter_add}};

}  // namespace
}  // namespace cuda_test

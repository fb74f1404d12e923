// Cross entropy.
#include "cpu_test.h"

namespace cpu_test {
namespace {

void cross_entropy_case(Fixture f, int64_t rows, int64_t cols, AgDtype dt_d, bool grad, bool in_place) {
  Data x(f.dt, rows * cols, -12, 12), saved = x, d(dt_d, rows * cols), nll(acc_of(f.dt), rows),
                                      target = ids(rows, cols), by(acc_of(f.dt), 1, 0.5, 2);
  if (rows > 1) static_cast<int32_t*>(target.p())[rows / 2] = AG_IGNORE;
  auto counts = [&](int64_t r) { return i32(target)[r] >= 0; };
  double scale = 0.125 * by.get(0);
  void* out = !grad ? nullptr : in_place ? x.p() : d.p();
  run(f.b.cross_entropy, AgCrossEntropy{x.p(), rows, cols, i32(target), nll.p(), out, 0.125, by.p(), f.dt, dt_d});
  std::vector<double> lse(static_cast<size_t>(rows));
  for (int64_t i = 0; i < x.n; i++) lse[size_t(i / cols)] += std::exp(saved.get(i));
  for (double& l : lse) l = std::log(l);
  auto want = [&](int64_t r) { return counts(r) ? lse[size_t(r)] - saved.get(r * cols + i32(target)[r]) : 0; };
  compare("nll", nll, want, tolerance(acc_of(f.dt), 4));
  auto want_d = [&](int64_t i) {
    if (!counts(i / cols)) return 0.0;
    return scale * (std::exp(saved.get(i) - lse[size_t(i / cols)]) - (i32(target)[i / cols] == i % cols ? 1 : 0));
  };
  if (grad) compare("dlogits", in_place ? x : d, want_d, tolerance(dt_d, 0.3));
  check(x.guards() && d.guards(), "guards");
}
void test_cross_entropy(Fixture f) {
  for (int64_t cols : {1, 2, 33, 1000, 32003})
    for (int64_t rows : {0, 1, 9}) {
      cross_entropy_case(f, rows, cols, f.dt, true, false);
      cross_entropy_case(f, rows, cols, f.dt, true, true);
      cross_entropy_case(f, rows, cols, AG_F32, false, false);
      if (f.dt == AG_F32) cross_entropy_case(f, rows, cols, AG_BF16, true, false);
    }
  // a NaN or an infinite logit must reach the loss
  for (double bad : {double(NAN), double(INFINITY)}) {
    Data x(f.dt, 50, -1, 1), nll(acc_of(f.dt), 1), target = ids(1, 40);
    x.set(45, bad);
    run(f.b.cross_entropy, AgCrossEntropy{x.p(), 1, 50, i32(target), nll.p(), nullptr, 1, nullptr, f.dt, f.dt});
    check(!std::isfinite(nll.get(0)), "logit %g gave a loss of %g", bad, nll.get(0));
  }
}

const Cases kCases("loss", {{"cross_entropy", test_cross_entropy}});

}  // namespace
}  // namespace cpu_test

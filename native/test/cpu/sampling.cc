// Drawing tokens.
#include "cpu_test.h"

namespace cpu_test {
namespace {

int32_t draw(Fixture f, const Data& x, double temperature, int64_t k, double p, double u) {
  Data out(AG_I32, 1);
  run(f.b.sample,
      AgSample{static_cast<const float*>(x.p()), 1, x.n, temperature, p, k, &u, static_cast<int32_t*>(out.p())});
  check(out.guards(), "guards");
  digest(out.p(), 4);
  return int32_t(out.get(0));
}
void test_sample(Fixture f) {
  if (f.dt != AG_F32) return;
  Data x(AG_F32, 8);
  const double p[] = {0.05, 0.3, 0.1, 0.2, 0.15, 0.05, 0.1, 0.05};
  for (int64_t i = 0; i < 8; i++) x.set(i, std::log(p[i]));
  check(draw(f, x, 0, 0, 1, 0.5) == 1, "argmax");
  auto frequencies = [&](double t, int64_t k, double top_p, std::vector<double> want) {
    std::vector<double> seen(8);
    int n = 2000;
    for (int i = 0; i < n; i++) seen[size_t(draw(f, x, t, k, top_p, (i + 0.5) / n))] += 1.0 / n;
    for (size_t i = 0; i < 8; i++)
      check(std::fabs(seen[i] - want[i]) < 0.002, "T %g k %d p %g: id %zu drawn %.3f, expected %.3f", t, int(k), top_p,
            i, seen[i], want[i]);
  };
  frequencies(1, 0, 1, {0.05, 0.3, 0.1, 0.2, 0.15, 0.05, 0.1, 0.05});
  frequencies(1, 2, 1, {0, 0.6, 0, 0.4, 0, 0, 0, 0});
  frequencies(1, 0, 0.62, {0, 0.3 / 0.65, 0, 0.2 / 0.65, 0.15 / 0.65, 0, 0, 0});
  frequencies(1, 3, 0.5, {0, 0.6, 0, 0.4, 0, 0, 0, 0});  // of the three: 0.46, 0.31, 0.23
  frequencies(1, 100, 1e-9, {0, 1, 0, 0, 0, 0, 0, 0});
  double z = 0.05 * 0.05 * 3 + 0.09 + 0.01 * 2 + 0.04 + 0.0225;
  frequencies(0.5, 0, 1, {0.0025 / z, 0.09 / z, 0.01 / z, 0.04 / z, 0.0225 / z, 0.0025 / z, 0.01 / z, 0.0025 / z});
  Data ties(AG_F32, 3000);  // as many equal logits as the cut leaves undecided: transformers keeps them all
  for (int64_t i = 0; i < ties.n; i++) ties.set(i, i % 1000 == 7 ? 2 : 1);
  check(draw(f, ties, 0, 0, 1, 0) == 7, "lowest id of equals");
  check(draw(f, ties, 1, 2, 1, 0.999) == 2007, "ties at the k-th logit stay");
  ties.set(5, -INFINITY);
  check(draw(f, ties, 1, 0, 1, 0) >= 0, "minus infinity");
  for (int64_t i = 0; i < ties.n; i++) ties.set(i, -INFINITY);
  ties.set(11, 0);
  check(draw(f, ties, 1, 0, 1, 0.9999999) == 11, "only one left");
  ties.set(4, NAN);
  check(draw(f, ties, 1, 0, 1, 0) == -1 && draw(f, ties, 0, 0, 1, 0) == -1, "NaN gives -1");
}

const Cases kCases("sampling", {{"sample", test_sample}});

}  // namespace
}  // namespace cpu_test

// Elementwise kernels and sums.
#include "cpu_test.h"

namespace cpu_test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double reference(AgUnaryOp op, double x, double alpha) {
  switch (op) {
    case AG_GELU: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case AG_GELU_TANH: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case AG_QUICK_GELU: return x * sigmoid(1.702 * x);
    case AG_SILU: return x * sigmoid(x);
    case AG_SCALE: return alpha * x;
    case AG_EXP: return std::exp(x);
    default: return x;
  }
}
double slope(AgUnaryOp op, double x, double alpha) {
  if (op == AG_SCALE) return alpha;
  if (op == AG_EXP) return std::exp(x);
  if (op == AG_NONE) return 1;
  double h = 1e-4;  // fourth order, good to 1e-12
  return (8 * (reference(op, x + h, 0) - reference(op, x - h, 0)) -
          (reference(op, x + 2 * h, 0) - reference(op, x - 2 * h, 0))) /
         (12 * h);
}

void test_unary(Fixture f) {
  for (AgUnaryOp op : {AG_NONE, AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU, AG_SCALE, AG_EXP})
    for (int64_t n : {0, 1, 7, 16, 33, 1000, 50001}) {
      Data x(f.dt, n, -9, 9), y(f.dt, n), dy(f.dt, n, -2, 2);
      auto want = [&](int64_t i) { return reference(op, x.get(i), 0.37); };
      run(f.b.unary, AgUnary{op, y.p(), x.p(), n, f.dt, 0.37});
      compare("y", y, want, tolerance(f.dt));
      run(f.b.unary_grad, AgUnaryGrad{op, y.p(), dy.p(), x.p(), n, f.dt, 0.37});
      Tolerance t = tolerance(f.dt, 4);
      if (f.dt == AG_F64) t.abs = 1e-10;  // of the difference quotient
      compare("dx", y, [&](int64_t i) { return dy.get(i) * slope(op, x.get(i), 0.37); }, t);
      Data d2 = dy;
      run(f.b.unary_grad, AgUnaryGrad{op, d2.p(), d2.p(), x.p(), n, f.dt, 0.37});
      check(std::memcmp(d2.p(), y.p(), y.bytes()) == 0, "unary_grad in place");
      Data place = x;
      run(f.b.unary, AgUnary{op, place.p(), place.p(), n, f.dt, 0.37});
      compare("in place", place, want, tolerance(f.dt));
    }
  const double special[] = {0, -0.0, 100, -100, 1e30, -1e30, INFINITY, -INFINITY, NAN, 88.5, -88.5, 1e-30, -1e-30};
  int64_t n = sizeof special / sizeof *special;
  Data x(f.dt, n), y(f.dt, n);
  for (int64_t i = 0; i < n; i++) x.set(i, special[i]);
  for (AgUnaryOp op : {AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU}) {
    run(f.b.unary, AgUnary{op, y.p(), x.p(), n, f.dt, 1});
    // -inf * 0 is NaN in PyTorch too
    compare(
        "special", y, [&](int64_t i) { return x.get(i) == -INFINITY ? y.get(i) : reference(op, x.get(i), 1); },
        tolerance(f.dt, 1e-6));
  }
}

// exp over its whole range in ulps, and erf through GELU; f32 only.
void test_functions(Fixture f) {
  if (f.dt != AG_F32) return;
  int64_t n = 400000;
  Data x(AG_F32, n), y(AG_F32, n);
  for (int64_t i = 0; i < n; i++) x.set(i, -104 + 193.0 * double(i) / double(n));
  run(f.b.unary, AgUnary{AG_EXP, y.p(), x.p(), n, AG_F32, 1});
  digest(y.p(), y.bytes());
  double worst = 0, at = 0;
  for (int64_t i = 0; i < n; i++) {
    double want = std::exp(x.get(i)), got = y.get(i);
    if (want > std::numeric_limits<float>::max()) {
      check(std::isinf(got) || got > 3.4e38, "exp(%.9g): expected infinity, got %.9g", x.get(i), got);
      continue;
    }
    double ulp = std::fmax(std::ldexp(1.0, std::ilogb(want) - 23), 0x1p-149), error = std::fabs(got - want) / ulp;
    if (error > worst) worst = error, at = x.get(i);
  }
  check(worst <= 2, "exp(%.9g) is %.2f ulp off", at, worst);
  double exp_worst = worst;
  for (int64_t i = 0; i < n; i++) x.set(i, -5.5 + 11.0 * double(i) / double(n));
  run(f.b.unary, AgUnary{AG_GELU, y.p(), x.p(), n, AG_F32, 1});
  digest(y.p(), y.bytes());
  worst = 0;
  for (int64_t i = 0; i < n; i++) {  // |gelu error| / |x| is half the error of 1 + erf
    double error = std::fabs(y.get(i) - reference(AG_GELU, x.get(i), 1)) / std::fmax(std::fabs(x.get(i)), 1e-30);
    if (error > worst) worst = error, at = x.get(i);
  }
  check(worst <= 1.3e-7, "gelu(%.9g): error %.3g x", at, worst);
  if (ag_threads() == 1)
    std::printf("  %s: exp within %.2f ulp, gelu within %.2g |x|\n", where.c_str(), exp_worst, worst);
}

void test_binary(Fixture f) {
  for (AgBinaryOp op : {AG_ADD, AG_SUB, AG_MUL})
    for (int64_t nb : {1, 3, 17, 128, 300})
      for (int64_t rows : {0, 1, 7, 200}) {
        int64_t n = rows * nb;
        Data a(f.dt, n, -2, 2), b(f.dt, nb, -2, 2), y(f.dt, n);
        auto want = [&](int64_t i) {
          double p = a.get(i), q = b.get(i % nb);
          return op == AG_ADD ? p + q : op == AG_SUB ? p - q : p * q;
        };
        run(f.b.binary, AgBinary{op, y.p(), a.p(), b.p(), n, nb, f.dt});
        compare("y", y, want, tolerance(f.dt));
        Data place = a;
        run(f.b.binary, AgBinary{op, place.p(), place.p(), b.p(), n, nb, f.dt});
        check(std::memcmp(place.p(), y.p(), y.bytes()) == 0, "in place");
      }
  Data a(f.dt, 0), b(f.dt, 0), y(f.dt, 0);
  run(f.b.binary, AgBinary{AG_ADD, y.p(), a.p(), b.p(), 0, 0, f.dt});
}

void test_silu_mul(Fixture f) {
  for (int64_t n : {0, 1, 15, 64, 40003}) {
    Data g(f.dt, n, -8, 8), u(f.dt, n, -2, 2), dy(f.dt, n, -2, 2), y(f.dt, n), dg(f.dt, n), du(f.dt, n);
    run(f.b.silu_mul, AgSiluMul{y.p(), g.p(), u.p(), n, f.dt});
    compare("y", y, [&](int64_t i) { return g.get(i) * sigmoid(g.get(i)) * u.get(i); }, tolerance(f.dt));
    run(f.b.silu_mul_grad, AgSiluMulGrad{dg.p(), du.p(), dy.p(), g.p(), u.p(), n, f.dt});
    compare("dup", du, [&](int64_t i) { return dy.get(i) * g.get(i) * sigmoid(g.get(i)); }, tolerance(f.dt));
    auto dgate = [&](int64_t i) {
      double s = sigmoid(g.get(i));
      return dy.get(i) * u.get(i) * s * (1 + g.get(i) * (1 - s));
    };
    compare("dgate", dg, dgate, tolerance(f.dt, 4));
  }
}

void test_sums(Fixture f) {
  for (int64_t n : {0, 1, 31, 4097, 300001}) {
    Data x(f.dt, n, 0, 2), y(f.dt, 1);
    run(f.b.sum, AgSum{y.p(), x.p(), n, f.dt, 0.25});
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += x.get(i);
    compare("sum", y, [&](int64_t) { return 0.25 * s; }, tolerance(f.dt));
  }
  Data a(f.dt, 70001, -2, 2), b(AG_F32, 33, -1e30, 1e30), c(AG_BF16, 0), d(AG_BF16, 1000, -3, 3);
  AgSpan spans[] = {{a.p(), f.dt, a.n}, {b.p(), AG_F32, b.n}, {c.p(), AG_BF16, 0}, {d.p(), AG_BF16, d.n}};
  double out = -1, want = 0;
  for (const Data* x : {&a, &d})
    for (int64_t i = 0; i < x->n; i++) want += x->get(i) * x->get(i);
  AgSpan small[] = {spans[0], spans[2], spans[3]};
  run(f.b.sum_squares, AgSumSquares{small, 3, &out});
  check(std::fabs(out - want) <= 1e-12 * want, "sum_squares: expected %.17g, got %.17g", want, out);
  digest(&out, 8);
  for (int64_t i = 0; i < b.n; i++) want += b.get(i) * b.get(i);
  run(f.b.sum_squares, AgSumSquares{spans, 4, &out});
  check(std::fabs(out - want) <= 1e-12 * want, "sum_squares of 1e30: expected %.17g, got %.17g", want, out);
  for (double bad : {double(INFINITY), double(NAN)}) {
    d.set(999, bad);
    run(f.b.sum_squares, AgSumSquares{spans, 4, &out});
    check(!std::isfinite(out), "sum_squares: %g gave %g", bad, out);
  }
  run(f.b.sum_squares, AgSumSquares{nullptr, 0, &out});
  check(out == 0, "sum_squares of nothing");
}

const Cases kCases("elementwise", {{"unary", test_unary},
                                   {"functions", test_functions},
                                   {"binary", test_binary},
                                   {"silu_mul", test_silu_mul},
                                   {"sums", test_sums}});

}  // namespace
}  // namespace cpu_test

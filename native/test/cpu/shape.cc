// Moving, filling, converting, random numbers.
#include "cpu_test.h"

namespace cpu_test {
namespace {

void test_fill(Fixture f) {
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64})
    for (int64_t n : {0, 1, 17, 100003}) {
      Data y(dt, n);
      run(f.b.fill, AgFill{y.p(), dt, n, -3.0});
      compare("y", y, [](int64_t) { return -3.0; }, {0, 0});
    }
  for (int64_t rows : {0, 1, 5, 300}) {
    Data src(AG_F32, rows * 7, -1, 1), dst(AG_F32, rows * 9);
    for (int64_t i = 0; i < dst.n; i++) dst.set(i, 5);
    run(f.b.copy2d, AgCopy2d{dst.p(), 36, src.p(), 28, rows, 20});
    compare("copy2d", dst, [&](int64_t i) { return i % 9 < 5 ? src.get(i / 9 * 7 + i % 9) : 5; }, {0, 0});
    if (!rows) continue;
    run(f.b.copy2d, AgCopy2d{dst.p(), 36, src.p(), 0, rows, 20});
    compare("broadcast", dst, [&](int64_t i) { return i % 9 < 5 ? src.get(i % 9) : 5; }, {0, 0});
  }
}

void test_cast(Fixture f) {
  const AgDtype all[] = {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64};
  for (AgDtype from : all)
    for (AgDtype to : all)
      for (int64_t n : {0, 1, 33, 20001}) {
        Data x(from, n, -1000, 1000), y(to, n), want(to, n);
        run(f.b.cast, AgCast{y.p(), to, x.p(), from, n});
        for (int64_t i = 0; i < n; i++) want.set(i, x.get(i));
        compare("cast", y, [&](int64_t i) { return want.get(i); }, {0, 0});
      }
  // every bf16 there is, and the ties and NaNs between them
  Data x(AG_F32, 65536 * 4), y(AG_BF16, x.n);
  for (uint32_t i = 0; i < 65536 * 4; i++) {
    static const uint32_t low[] = {0, 0x7fff, 0x8000, 0x8001};
    uint32_t u = (i / 4) << 16 | low[i % 4];
    std::memcpy(static_cast<char*>(x.p()) + i * 4, &u, 4);
  }
  run(f.b.cast, AgCast{y.p(), AG_BF16, x.p(), AG_F32, x.n});
  compare("to bf16", y, [&](int64_t i) { return double(bf16_value(bf16_bits(float(x.get(i))))); }, {0, 0});
  int64_t big = (int64_t(1) << 60) + 1, copy = 0;
  run(f.b.cast, AgCast{&copy, AG_I64, &big, AG_I64, 1});
  check(copy == big, "i64 -> i64 lost bits");
}

void test_random(Fixture f) {
  // Known answer: Philox4x32-10 of counter 0, key 0 begins with 6627e8d5 (Random123's kat_vectors).
  for (int64_t n : {0, 1, 5, 50001}) {
    Data y(f.dt, n), again(f.dt, n);
    run(f.b.random, AgRandom{y.p(), f.dt, n, AG_UNIFORM, 2.0, 3.0, 0, 0});
    check(y.guards(), "guards");
    digest(y.p(), y.bytes());
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
      check(y.get(i) >= 2 && y.get(i) < 3, "uniform [2,3): got %.9g", y.get(i));
      sum += y.get(i);
    }
    static const double first[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    for (int64_t i = 0; i < n && i < 4; i++)
      check(std::fabs(y.get(i) - 2 - first[i] * 0x1p-32) < 0.01, "Philox word %lld: %.9g", (long long)i, y.get(i));
    if (n > 1000) check(std::fabs(sum / double(n) - 2.5) < 0.01, "uniform mean %.6g", sum / double(n));
    // offset counts groups of four
    if (n > 8) {
      run(f.b.random, AgRandom{again.p(), f.dt, n - 8, AG_UNIFORM, 2.0, 3.0, 0, 2});
      for (int64_t i = 0; i < n - 8; i += 501) check(again.get(i) == y.get(i + 8), "offset");
    }
  }
  Data y(f.dt, 100000);
  run(f.b.random, AgRandom{y.p(), f.dt, y.n, AG_NORMAL, 1.0, 2.0, 12345678901u, 7});
  digest(y.p(), y.bytes());
  double mean = 0, var = 0, fourth = 0;
  for (int64_t i = 0; i < y.n; i++) mean += y.get(i) / double(y.n);
  for (int64_t i = 0; i < y.n; i++) {
    double d = (y.get(i) - mean) / 2;
    var += d * d / double(y.n), fourth += d * d * d * d / double(y.n);
  }
  check(std::fabs(mean - 1) < 0.03 && std::fabs(var - 1) < 0.03 && std::fabs(fourth - 3) < 0.2,
        "normal moments %g %g %g", mean, var, fourth);
  // [0, 1) must stay below 1 after rounding: enough draws to meet the largest words
  Data u(f.dt, 1 << 20);
  run(f.b.random, AgRandom{u.p(), f.dt, u.n, AG_UNIFORM, 0.0, 1.0, 3, 0});
  double top = 0;
  for (int64_t i = 0; i < u.n; i++) top = std::fmax(top, u.get(i));
  check(top < 1, "uniform [0,1) gave %.9g", top);
}

const Cases kCases("shape", {{"fill", test_fill}, {"cast", test_cast}, {"random", test_random}});

}  // namespace
}  // namespace cpu_test

// The CPU kernels except the matrix product, attention and alignMix, at every level this machine has, against plain
// loops in double. Every case runs with one thread, two threads and two threads again: the bytes must be the same.
// Outputs and scratch lie between guards; scratch starts as NaN. Exit status 1 when a check failed.
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu/level.h"
#include "cpu/pool.h"

// The refusal of an impossible allocation is part of the test.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace {

int g_failed = 0, g_checks = 0, g_shown = 0;
std::string g_where, g_last;
uint64_t g_digest;  // of every output of the case that runs

void check(bool ok, const char* format, ...) __attribute__((format(printf, 2, 3)));
void check(bool ok, const char* format, ...) {
  g_checks++;
  if (ok) return;
  g_failed++;
  g_shown = g_where == g_last ? g_shown + 1 : 1;
  g_last = g_where;
  if (g_shown > 5) return;  // of each case; the count at the end is complete
  va_list args;
  va_start(args, format);
  std::printf("FAIL %s: ", g_where.c_str());
  std::vprintf(format, args);
  std::printf("\n");
  va_end(args);
}

uint64_t g_random = 1;
double uniform(double lo = -1, double hi = 1) {  // splitmix64
  uint64_t z = (g_random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return lo + (hi - lo) * (double((z ^ (z >> 31)) >> 11) * 0x1p-53);
}
int64_t below(int64_t n) { return int64_t(uniform(0, double(n))); }

// ---- typed memory between guards --------------------------------------------------------------------
size_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }
const char* name_of(AgDtype dt) {
  static const char* const names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return names[dt];
}
uint16_t bf16_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float bf16_value(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

struct Data {
  static constexpr size_t kGuard = 128;
  AgDtype dt;
  int64_t n;
  std::vector<uint8_t> raw;
  Data(AgDtype dt, int64_t n) : dt(dt), n(n), raw(bytes() + 2 * kGuard, 0xA5) {}
  Data(AgDtype dt, int64_t n, double lo, double hi) : Data(dt, n) {
    for (int64_t i = 0; i < n; i++) set(i, uniform(lo, hi));
  }
  size_t bytes() const { return size_t(n) * size_of(dt); }
  void* p() { return raw.data() + kGuard; }
  const void* p() const { return raw.data() + kGuard; }
  double get(int64_t i) const {
    const uint8_t* at = raw.data() + kGuard + size_t(i) * size_of(dt);
    float f;
    double d;
    uint16_t h;
    int32_t i32;
    int64_t i64;
    switch (dt) {
      case AG_F32: std::memcpy(&f, at, 4); return f;
      case AG_BF16: std::memcpy(&h, at, 2); return bf16_value(h);
      case AG_F64: std::memcpy(&d, at, 8); return d;
      case AG_I32: std::memcpy(&i32, at, 4); return i32;
      default: std::memcpy(&i64, at, 8); return double(i64);
    }
  }
  void set(int64_t i, double v) {
    uint8_t* at = raw.data() + kGuard + size_t(i) * size_of(dt);
    float f = float(v);
    uint16_t h = bf16_bits(f);
    int32_t i32 = dt == AG_I32 ? int32_t(v) : 0;
    int64_t i64 = dt == AG_I64 ? int64_t(v) : 0;
    switch (dt) {
      case AG_F32: std::memcpy(at, &f, 4); return;
      case AG_BF16: std::memcpy(at, &h, 2); return;
      case AG_F64: std::memcpy(at, &v, 8); return;
      case AG_I32: std::memcpy(at, &i32, 4); return;
      default: std::memcpy(at, &i64, 8); return;
    }
  }
  bool guards() const {
    for (size_t i = 0; i < kGuard; i++)
      if (raw[i] != 0xA5 || raw[raw.size() - 1 - i] != 0xA5) return false;
    return true;
  }
};
Data ids(int64_t n, int64_t limit) {
  Data d(AG_I32, n);
  for (int64_t i = 0; i < n; i++) d.set(i, double(below(limit)));
  return d;
}
const int32_t* i32(const Data& d) { return static_cast<const int32_t*>(d.p()); }
AgDtype acc_of(AgDtype dt) { return dt == AG_F64 ? AG_F64 : AG_F32; }

// ---- running and comparing --------------------------------------------------------------------------
constexpr AgKernel kNoScratch = AgKernel(-1);
template <class A>
AgStatus call(const AgBackend& b, AgStatus (*kernel)(AgCtx*, const A*), const A& args, AgKernel k = kNoScratch) {
  AgCtx ctx{};
  ctx.workspace_bytes = k == kNoScratch ? 0 : b.workspace(k, &args);
  std::vector<uint8_t> raw(size_t(ctx.workspace_bytes) + 192, 0xFF);
  auto base = reinterpret_cast<uintptr_t>(raw.data());
  size_t skip = (64 - base % 64) % 64;
  ctx.workspace = raw.data() + skip;
  AgStatus status = kernel(&ctx, &args);
  bool intact = true;
  for (size_t i = skip + size_t(ctx.workspace_bytes); i < raw.size(); i++) intact = intact && raw[i] == 0xFF;
  check(intact, "wrote past its scratch of %lld bytes", (long long)ctx.workspace_bytes);
  check(status == AG_OK || ctx.error[0], "status %d without a message", int(status));
  return status;
}
template <class A>
void run(const AgBackend& b, AgStatus (*kernel)(AgCtx*, const A*), const A& args, AgKernel k = kNoScratch) {
  AgStatus status = call(b, kernel, args, k);
  check(status == AG_OK, "status %d", int(status));
}

void digest(const void* p, size_t n) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  for (size_t i = 0; i < n; i++) g_digest = (g_digest ^ b[i]) * 0x100000001B3u;
}

struct Tolerance {
  double rel, abs;
};
// What a result in dt may be off by when its sums are kept in acc; `scale` is the size of the terms that cancel.
Tolerance tolerance(AgDtype dt, double scale = 1) {
  if (dt == AG_F64) return {1e-13, 1e-13 * scale};
  if (dt == AG_BF16) return {0.00392, 2e-6 * scale};
  return {1.3e-6, 1e-6 * scale};
}
// got[i] = want(i)
void compare(const char* what, const Data& got, const std::function<double(int64_t)>& want, Tolerance t) {
  check(got.guards(), "%s: wrote outside its buffer", what);
  digest(got.p(), got.bytes());
  double worst = 0;
  int64_t at = -1;
  for (int64_t i = 0; i < got.n; i++) {
    double g = got.get(i), w = want(i);
    double limit = t.rel * std::fabs(w) + t.abs;
    double error = std::isnan(w) || std::isnan(g) ? (std::isnan(w) && std::isnan(g) ? 0 : INFINITY)
                   : g == w                       ? 0
                                                  : std::fabs(g - w) / limit;
    if (error > worst) worst = error, at = i;
  }
  check(worst <= 1, "%s[%lld of %lld]: expected %.9g, got %.9g (%.2f x the tolerance)", what, (long long)at,
        (long long)got.n, at < 0 ? 0 : want(at), at < 0 ? 0 : got.get(at), worst);
}

struct Fixture {
  const AgBackend& b;
  AgDtype dt;
};

// ---- moving and filling -----------------------------------------------------------------------------
void test_fill(Fixture f) {
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64})
    for (int64_t n : {0, 1, 17, 100003}) {
      Data y(dt, n);
      run(f.b, f.b.fill, AgFill{y.p(), dt, n, -3.0});
      compare("y", y, [](int64_t) { return -3.0; }, {0, 0});
    }
  for (int64_t rows : {0, 1, 5, 300}) {
    Data src(AG_F32, rows * 7, -1, 1), dst(AG_F32, rows * 9);
    for (int64_t i = 0; i < dst.n; i++) dst.set(i, 5);
    run(f.b, f.b.copy2d, AgCopy2d{dst.p(), 36, src.p(), 28, rows, 20});
    compare("copy2d", dst, [&](int64_t i) { return i % 9 < 5 ? src.get(i / 9 * 7 + i % 9) : 5; }, {0, 0});
    if (!rows) continue;
    run(f.b, f.b.copy2d, AgCopy2d{dst.p(), 36, src.p(), 0, rows, 20});
    compare("broadcast", dst, [&](int64_t i) { return i % 9 < 5 ? src.get(i % 9) : 5; }, {0, 0});
  }
}

void test_cast(Fixture f) {
  const AgDtype all[] = {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64};
  for (AgDtype from : all)
    for (AgDtype to : all)
      for (int64_t n : {0, 1, 33, 20001}) {
        Data x(from, n, -1000, 1000), y(to, n), want(to, n);
        run(f.b, f.b.cast, AgCast{y.p(), to, x.p(), from, n});
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
  run(f.b, f.b.cast, AgCast{y.p(), AG_BF16, x.p(), AG_F32, x.n});
  compare("to bf16", y, [&](int64_t i) { return double(bf16_value(bf16_bits(float(x.get(i))))); }, {0, 0});
  int64_t big = (int64_t(1) << 60) + 1, copy = 0;
  run(f.b, f.b.cast, AgCast{&copy, AG_I64, &big, AG_I64, 1});
  check(copy == big, "i64 -> i64 lost bits");
}

void test_random(Fixture f) {
  // Known answer: Philox4x32-10 of counter 0, key 0 begins with 6627e8d5 (Random123's kat_vectors).
  for (int64_t n : {0, 1, 5, 50001}) {
    Data y(f.dt, n), again(f.dt, n);
    run(f.b, f.b.random, AgRandom{y.p(), f.dt, n, AG_UNIFORM, 2.0, 3.0, 0, 0});
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
      run(f.b, f.b.random, AgRandom{again.p(), f.dt, n - 8, AG_UNIFORM, 2.0, 3.0, 0, 2});
      for (int64_t i = 0; i < n - 8; i += 501) check(again.get(i) == y.get(i + 8), "offset");
    }
  }
  Data y(f.dt, 100000);
  run(f.b, f.b.random, AgRandom{y.p(), f.dt, y.n, AG_NORMAL, 1.0, 2.0, 12345678901u, 7});
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
  run(f.b, f.b.random, AgRandom{u.p(), f.dt, u.n, AG_UNIFORM, 0.0, 1.0, 3, 0});
  double top = 0;
  for (int64_t i = 0; i < u.n; i++) top = std::fmax(top, u.get(i));
  check(top < 1, "uniform [0,1) gave %.9g", top);
}

// ---- elementwise ------------------------------------------------------------------------------------
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
      run(f.b, f.b.unary, AgUnary{op, y.p(), x.p(), n, f.dt, 0.37});
      compare("y", y, want, tolerance(f.dt));
      run(f.b, f.b.unary_grad, AgUnaryGrad{op, y.p(), dy.p(), x.p(), n, f.dt, 0.37});
      Tolerance t = tolerance(f.dt, 4);
      if (f.dt == AG_F64) t.abs = 1e-10;  // of the difference quotient
      compare("dx", y, [&](int64_t i) { return dy.get(i) * slope(op, x.get(i), 0.37); }, t);
      Data d2 = dy;
      run(f.b, f.b.unary_grad, AgUnaryGrad{op, d2.p(), d2.p(), x.p(), n, f.dt, 0.37});
      check(std::memcmp(d2.p(), y.p(), y.bytes()) == 0, "unary_grad in place");
      Data place = x;
      run(f.b, f.b.unary, AgUnary{op, place.p(), place.p(), n, f.dt, 0.37});
      compare("in place", place, want, tolerance(f.dt));
    }
  const double special[] = {0, -0.0, 100, -100, 1e30, -1e30, INFINITY, -INFINITY, NAN, 88.5, -88.5, 1e-30, -1e-30};
  int64_t n = sizeof special / sizeof *special;
  Data x(f.dt, n), y(f.dt, n);
  for (int64_t i = 0; i < n; i++) x.set(i, special[i]);
  for (AgUnaryOp op : {AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU}) {
    run(f.b, f.b.unary, AgUnary{op, y.p(), x.p(), n, f.dt, 1});
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
  run(f.b, f.b.unary, AgUnary{AG_EXP, y.p(), x.p(), n, AG_F32, 1});
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
  run(f.b, f.b.unary, AgUnary{AG_GELU, y.p(), x.p(), n, AG_F32, 1});
  digest(y.p(), y.bytes());
  worst = 0;
  for (int64_t i = 0; i < n; i++) {  // |gelu error| / |x| is half the error of 1 + erf
    double error = std::fabs(y.get(i) - reference(AG_GELU, x.get(i), 1)) / std::fmax(std::fabs(x.get(i)), 1e-30);
    if (error > worst) worst = error, at = x.get(i);
  }
  check(worst <= 1.3e-7, "gelu(%.9g): error %.3g x", at, worst);
  if (ag_threads() == 1)
    std::printf("  %s: exp within %.2f ulp, gelu within %.2g |x|\n", g_where.c_str(), exp_worst, worst);
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
        run(f.b, f.b.binary, AgBinary{op, y.p(), a.p(), b.p(), n, nb, f.dt});
        compare("y", y, want, tolerance(f.dt));
        Data place = a;
        run(f.b, f.b.binary, AgBinary{op, place.p(), place.p(), b.p(), n, nb, f.dt});
        check(std::memcmp(place.p(), y.p(), y.bytes()) == 0, "in place");
      }
  Data a(f.dt, 0), b(f.dt, 0), y(f.dt, 0);
  run(f.b, f.b.binary, AgBinary{AG_ADD, y.p(), a.p(), b.p(), 0, 0, f.dt});
}

void test_silu_mul(Fixture f) {
  for (int64_t n : {0, 1, 15, 64, 40003}) {
    Data g(f.dt, n, -8, 8), u(f.dt, n, -2, 2), dy(f.dt, n, -2, 2), y(f.dt, n), dg(f.dt, n), du(f.dt, n);
    run(f.b, f.b.silu_mul, AgSiluMul{y.p(), g.p(), u.p(), n, f.dt});
    compare("y", y, [&](int64_t i) { return g.get(i) * sigmoid(g.get(i)) * u.get(i); }, tolerance(f.dt));
    run(f.b, f.b.silu_mul_grad, AgSiluMulGrad{dg.p(), du.p(), dy.p(), g.p(), u.p(), n, f.dt});
    compare("dup", du, [&](int64_t i) { return dy.get(i) * g.get(i) * sigmoid(g.get(i)); }, tolerance(f.dt));
    auto dgate = [&](int64_t i) {
      double s = sigmoid(g.get(i));
      return dy.get(i) * u.get(i) * s * (1 + g.get(i) * (1 - s));
    };
    compare("dgate", dg, dgate, tolerance(f.dt, 4));
  }
}

void test_rope(Fixture f) {
  const AgDtype acc = acc_of(f.dt);
  for (int64_t dim : {2, 6, 64, 80, 128})
    for (int64_t tokens : {0, 1, 37}) {
      const int64_t heads = 4, kv = 2, ld = (heads + 2 * kv) * dim, width = kv * dim, half = dim / 2, places = 50, slots = 60;
      Data x(f.dt, tokens * ld, -2, 2), cos(acc, places * half), sin(acc, places * half);
      for (int64_t i = 0; i < cos.n; i++) {
        double angle = double(i / half) * std::pow(10000.0, -double(i % half) / double(half));
        cos.set(i, std::cos(angle)), sin.set(i, std::sin(angle));
      }
      Data position = ids(tokens, places), slot = ids(tokens, 1);
      for (int64_t t = 0; t < tokens; t++) slot.set(t, double((t * 7 + 3) % slots));  // 7 and 60 have no factor in common
      for (double sign : {1.0, -1.0}) {
        auto rotated = [&](int64_t i) {
          int64_t t = i / ld, c = i % ld, j = c % dim;
          if (c >= (heads + kv) * dim) return x.get(i);
          int64_t at = i32(position)[t] * half + j % half;
          double other = j < half ? -x.get(i + half) : x.get(i - half);
          return x.get(i) * cos.get(at) + sign * other * sin.get(at);
        };
        for (bool cached : {false, true}) {
          Data y = x, k(f.dt, slots * width, -1, 1), v(f.dt, slots * width, -1, 1), k0 = k, v0 = v;
          run(f.b, f.b.rope,
              AgRope{y.p(), i32(position), cos.p(), sin.p(), tokens, heads, kv, dim, sign, cached ? k.p() : nullptr, cached ? v.p() : nullptr,
                     i32(slot), f.dt});
          compare("rope", y, rotated, tolerance(f.dt));
          std::vector<int64_t> from(size_t(slots), -1);
          for (int64_t t = 0; t < tokens && cached; t++) from[size_t(i32(slot)[t])] = t;
          auto in_cache = [&](const Data& before, int64_t first) {
            return [&, first](int64_t i) {
              const int64_t t = from[size_t(i / width)];
              return t < 0 ? before.get(i) : y.get(t * ld + first + i % width);
            };
          };
          compare("keys in the cache", k, in_cache(k0, heads * dim), {0, 0});
          compare("values in the cache", v, in_cache(v0, (heads + kv) * dim), {0, 0});
        }
      }
    }
}

void test_patchify(Fixture f) {
  int64_t images = 2, channels = 3, height = 28, width = 42, patch = 14;
  Data x(f.dt, images * channels * height * width, -1, 1), y(f.dt, x.n);
  run(f.b, f.b.patchify, AgPatchify{y.p(), x.p(), images, channels, height, width, patch, f.dt});
  auto want = [&](int64_t i) {
    int64_t depth = channels * patch * patch, row = i / depth, c = i % depth / (patch * patch), v = i / patch % patch,
            u = i % patch;
    int64_t across = width / patch, down = height / patch, px = row % across, py = row / across % down,
            m = row / (across * down);
    return x.get(((m * channels + c) * height + py * patch + v) * width + px * patch + u);
  };
  compare("patches", y, want, {0, 0});
}

// ---- reductions and rows ----------------------------------------------------------------------------
void test_col_sum(Fixture f) {
  for (int64_t rows : {0, 1, 63, 64, 300, 1500})
    for (int64_t cols : {1, 7, 64, 300, 1029})
      for (int accumulate : {0, 1})
        for (AgDtype to : {f.dt, acc_of(f.dt)}) {
          int64_t ld = cols + (rows & 1 ? 3 : 0);
          Data x(f.dt, rows * ld, -1, 3), y(to, cols, -1, 1), before = y, by(acc_of(f.dt), 1, 1, 2);
          const bool times = rows == 300;
          run(f.b, f.b.col_sum, AgColSum{{y.p(), to, accumulate}, x.p(), rows, cols, ld, f.dt, 0.5, times ? by.p() : nullptr},
              AG_K_COL_SUM);
          auto want = [&](int64_t c) {
            double s = 0;
            for (int64_t r = 0; r < rows; r++) s += x.get(r * ld + c);
            return s * 0.5 * (times ? by.get(0) : 1) + (accumulate ? before.get(c) : 0);
          };
          compare("col_sum", y, want, tolerance(to, 2));
        }
}

void test_sums(Fixture f) {
  for (int64_t n : {0, 1, 31, 4097, 300001}) {
    Data x(f.dt, n, 0, 2), y(f.dt, 1);
    run(f.b, f.b.sum, AgSum{y.p(), x.p(), n, f.dt, 0.25}, AG_K_SUM);
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
  run(f.b, f.b.sum_squares, AgSumSquares{small, 3, &out}, AG_K_SUM_SQUARES);
  check(std::fabs(out - want) <= 1e-12 * want, "sum_squares: expected %.17g, got %.17g", want, out);
  digest(&out, 8);
  for (int64_t i = 0; i < b.n; i++) want += b.get(i) * b.get(i);
  run(f.b, f.b.sum_squares, AgSumSquares{spans, 4, &out}, AG_K_SUM_SQUARES);
  check(std::fabs(out - want) <= 1e-12 * want, "sum_squares of 1e30: expected %.17g, got %.17g", want, out);
  for (double bad : {double(INFINITY), double(NAN)}) {
    d.set(999, bad);
    run(f.b, f.b.sum_squares, AgSumSquares{spans, 4, &out}, AG_K_SUM_SQUARES);
    check(!std::isfinite(out), "sum_squares: %g gave %g", bad, out);
  }
  run(f.b, f.b.sum_squares, AgSumSquares{nullptr, 0, &out}, AG_K_SUM_SQUARES);
  check(out == 0, "sum_squares of nothing");
}

void test_rows(Fixture f) {
  for (int64_t cols : {1, 5, 64, 1027})
    for (int64_t n : {0, 1, 50}) {
      int64_t rows = 23;
      Data src(f.dt, rows * cols, -1, 1), dst(f.dt, n * cols), index = ids(n, rows);
      run(f.b, f.b.gather_rows, AgGatherRows{dst.p(), src.p(), i32(index), n, cols, rows, f.dt});
      compare("gather", dst, [&](int64_t i) { return src.get(i32(index)[i / cols] * cols + i % cols); }, {0, 0});
      Data from(f.dt, n * cols, -1, 1);
      for (int accumulate : {0, 1})
        for (AgDtype dt : {f.dt, acc_of(f.dt)}) {
          Data sum(dt, rows * cols, -1, 1), before = sum, some = index;
          for (int64_t i = 0; i < n; i += 7) some.set(i, -1);
          run(f.b, f.b.scatter_add,
              AgScatterAdd{{sum.p(), dt, accumulate}, from.p(), i32(some), n, cols, rows, f.dt, 0.3}, AG_K_SCATTER_ADD);
          std::vector<double> expect(size_t(rows * cols));
          for (int64_t i = 0; i < rows * cols; i++) expect[size_t(i)] = accumulate ? before.get(i) : 0;
          for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < cols && i32(some)[i] >= 0; c++)
              expect[size_t(i32(some)[i] * cols + c)] += 0.3 * from.get(i * cols + c);
          compare("scatter_add", sum, [&](int64_t i) { return expect[size_t(i)]; }, tolerance(dt));
        }
    }
}

// ---- norms ------------------------------------------------------------------------------------------
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
        run(f.b, f.b.norm, AgNorm{k.y.p(), k.x.p(), k.w.p(), b, mean, k.rstd.p(), rows, cols, 1e-5, f.dt});
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
  run(f.b, f.b.norm_grad, a, AG_K_NORM_GRAD);
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
      run(f.b, f.b.softmax, AgSoftmax{y.p(), x.p(), rows, cols, f.dt});
      std::vector<double> top(size_t(rows), -INFINITY), total(static_cast<size_t>(rows)),
          dot(static_cast<size_t>(rows));
      for (int64_t i = 0; i < x.n; i++) top[size_t(i / cols)] = std::fmax(top[size_t(i / cols)], x.get(i));
      for (int64_t i = 0; i < x.n; i++) total[size_t(i / cols)] += std::exp(x.get(i) - top[size_t(i / cols)]);
      compare(
          "y", y, [&](int64_t i) { return std::exp(x.get(i) - top[size_t(i / cols)]) / total[size_t(i / cols)]; },
          tolerance(f.dt, 0.1));
      for (int64_t i = 0; i < x.n; i++) dot[size_t(i / cols)] += dy.get(i) * y.get(i);
      run(f.b, f.b.softmax_grad, AgSoftmaxGrad{dx.p(), dy.p(), y.p(), rows, cols, f.dt});
      compare("dx", dx, [&](int64_t i) { return y.get(i) * (dy.get(i) - dot[size_t(i / cols)]); }, tolerance(f.dt));
    }
}

void test_l2norm(Fixture f) {
  AgDtype acc = acc_of(f.dt);
  for (int64_t cols : {1, 5, 512, 771})
    for (int64_t rows : {0, 1, 40}) {
      Data x(f.dt, rows * cols, 0.2, 2), y(f.dt, rows * cols), norm(acc, rows), dy(f.dt, rows * cols, -1, 1),
          dx(f.dt, rows * cols);
      run(f.b, f.b.l2norm, AgL2Norm{y.p(), x.p(), norm.p(), rows, cols, f.dt});
      std::vector<double> length(static_cast<size_t>(rows)), dot(static_cast<size_t>(rows));
      for (int64_t i = 0; i < x.n; i++) length[size_t(i / cols)] += x.get(i) * x.get(i);
      for (double& l : length) l = std::sqrt(l);
      compare("y", y, [&](int64_t i) { return x.get(i) / length[size_t(i / cols)]; }, tolerance(f.dt));
      compare("norm", norm, [&](int64_t r) { return length[size_t(r)]; }, tolerance(acc));
      for (int64_t i = 0; i < x.n; i++) dot[size_t(i / cols)] += dy.get(i) * y.get(i);
      run(f.b, f.b.l2norm_grad, AgL2NormGrad{dx.p(), dy.p(), y.p(), norm.p(), rows, cols, f.dt});
      auto want = [&](int64_t i) { return (dy.get(i) - y.get(i) * dot[size_t(i / cols)]) / length[size_t(i / cols)]; };
      compare("dx", dx, want, tolerance(f.dt, 3));
    }
}

// ---- loss, sampling, optimizer ----------------------------------------------------------------------
void cross_entropy_case(Fixture f, int64_t rows, int64_t cols, AgDtype dt_d, bool grad, bool in_place) {
  Data x(f.dt, rows * cols, -12, 12), saved = x, d(dt_d, rows * cols), nll(acc_of(f.dt), rows),
                                      target = ids(rows, cols), by(acc_of(f.dt), 1, 0.5, 2);
  if (rows > 1) static_cast<int32_t*>(target.p())[rows / 2] = AG_IGNORE;
  auto counts = [&](int64_t r) { return i32(target)[r] >= 0; };
  double scale = 0.125 * by.get(0);
  void* out = !grad ? nullptr : in_place ? x.p() : d.p();
  run(f.b, f.b.cross_entropy, AgCrossEntropy{x.p(), rows, cols, i32(target), nll.p(), out, 0.125, by.p(), f.dt, dt_d},
      AG_K_CROSS_ENTROPY);
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
    run(f.b, f.b.cross_entropy, AgCrossEntropy{x.p(), 1, 50, i32(target), nll.p(), nullptr, 1, nullptr, f.dt, f.dt},
        AG_K_CROSS_ENTROPY);
    check(!std::isfinite(nll.get(0)), "logit %g gave a loss of %g", bad, nll.get(0));
  }
}

int32_t draw(Fixture f, const Data& x, double temperature, int64_t k, double p, double u) {
  Data out(AG_I32, 1);
  run(f.b, f.b.sample,
      AgSample{static_cast<const float*>(x.p()), 1, x.n, temperature, p, k, &u, static_cast<int32_t*>(out.p())},
      AG_K_SAMPLE);
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

// The 32 bits of a bf16 parameter's f32 value in the compact state.
double compact_value(const Data& p, const Data& rest, int64_t i) {
  uint32_t bits = (uint32_t(static_cast<const uint16_t*>(p.p())[i]) << 16) + uint32_t(int32_t(static_cast<const int16_t*>(rest.p())[i]));
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct AdamCase {
  AgOptimizerState state;
  Data p, g, master, m, v, p0, w0, m0, v0;
  double lr, decay;
  AdamCase(AgDtype dp, AgDtype dg, AgOptimizerState state, int64_t n, double lr, double decay)
      : state(state),
        p(dp, n, -1, 1),
        g(dg, n, -1, 1),
        master(state == AG_STATE_COMPACT ? AG_BF16 : AG_F32, n),
        m(master.dt, n, -0.1, 0.1),
        v(master.dt, n, 0, 0.1),
        p0(p),
        w0(AG_F32, n),
        m0(m),
        v0(v),
        lr(lr),
        decay(decay) {
    for (int64_t i = 0; i < n; i++) {
      if (state == AG_STATE_COMPACT)
        static_cast<int16_t*>(master.p())[i] = int16_t(i * 4099 % 65536 - 32768);
      else
        master.set(i, p.get(i) + 1e-4 * double(i % 7));
      w0.set(i, state == AG_STATE_COMPACT ? compact_value(p, master, i) : dp == AG_BF16 ? master.get(i) : p.get(i));
    }
  }
  AgAdamWTensor tensor(int64_t first) {
    return {p.p(), p.dt, g.p(), g.dt, state, p.dt == AG_BF16 ? master.p() : nullptr, m.p(), v.p(), p.n, first, lr, decay};
  }
};

std::vector<AdamCase> adam_cases() {
  std::vector<AdamCase> cases;
  for (AgDtype dg : {AG_F32, AG_BF16})
    for (int64_t n : {0, 1, 37, 70001}) {
      for (AgDtype dp : {AG_F32, AG_BF16}) cases.emplace_back(dp, dg, AG_STATE_FULL, n, double(1 + n % 3), n % 2 ? 0.1 : 0);
      cases.emplace_back(AG_BF16, dg, AG_STATE_COMPACT, n, double(1 + n % 3), n % 2 ? 0.1 : 0);
    }
  return cases;
}
std::vector<AgAdamWTensor> adam_tensors(std::vector<AdamCase>& cases) {
  std::vector<AgAdamWTensor> tensors;
  int64_t first = 0;
  for (AdamCase& c : cases) {
    tensors.push_back(c.tensor(first));
    first += c.p.n;
  }
  return tensors;
}

void test_adamw(Fixture f) {
  if (f.dt != AG_F32) return;
  double b1 = 0.9, b2 = 0.999, eps = 1e-8, scale = 0.7, squared = std::pow(1 / scale - 1e-6, 2);
  for (int64_t step : {1, 1000}) {
    std::vector<AdamCase> cases = adam_cases();
    std::vector<AgAdamWTensor> tensors = adam_tensors(cases);
    AgAdamWStep now{1e-2, step};
    run(f.b, f.b.adamw, AgAdamW{tensors.data(), int64_t(tensors.size()), b1, b2, eps, &now, &squared, 1, 7});
    for (AdamCase& c : cases) {
      auto m = [&](int64_t i) { return b1 * c.m0.get(i) + (1 - b1) * c.g.get(i) * scale; };
      auto v = [&](int64_t i) { return b2 * c.v0.get(i) + (1 - b2) * std::pow(c.g.get(i) * scale, 2); };
      auto w = [&](int64_t i) {
        double root = std::sqrt(v(i)) / std::sqrt(1 - std::pow(b2, double(step))) + eps, lr = 1e-2 * c.lr;
        return c.w0.get(i) * (1 - lr * c.decay) - lr / (1 - std::pow(b1, double(step))) * m(i) / root;
      };
      auto moment = [&](double scale) {
        Tolerance t = tolerance(c.m.dt, scale);
        if (c.state == AG_STATE_COMPACT) t.rel *= 2;  // stochastic rounding may take the farther neighbour
        return t;
      };
      compare("m", c.m, m, moment(0.1));
      compare("v", c.v, v, moment(0.01));
      compare("p", c.p, w, tolerance(c.p.dt, 0.5));
      if (c.p.dt == AG_F32) continue;
      Data master(AG_F32, c.p.n);
      for (int64_t i = 0; i < c.p.n; i++)
        master.set(i, c.state == AG_STATE_COMPACT ? compact_value(c.p, c.master, i) : c.master.get(i));
      compare("master", master, w, tolerance(AG_F32, 0.5));
    }
  }
}

// Rounding of the compact moments is right on average, which rounding to the nearest would not be here: each update moves
// v by less than half a unit of bf16.
void test_adamw_rounding(Fixture f) {
  if (f.dt != AG_F32) return;
  const int64_t n = 20000;
  Data p(AG_BF16, n), g(AG_F32, n), rest(AG_BF16, n), m(AG_BF16, n), v(AG_BF16, n);
  for (int64_t i = 0; i < n; i++) {
    g.set(i, 1.1);
    v.set(i, 1);
  }
  AgAdamWTensor t{p.p(), AG_BF16, g.p(), AG_F32, AG_STATE_COMPACT, rest.p(), m.p(), v.p(), n, 0, 1, 0};
  double want = 1;
  for (int64_t step = 1; step <= 20; step++) {
    AgAdamWStep now{1e-3, step};
    run(f.b, f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 3});
    want = 0.999 * want + 0.001 * 1.21;
  }
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += v.get(i) / double(n);
  check(std::fabs(mean - want) < 2e-4, "mean of v: expected %.6f, got %.6f", want, mean);  // 5 standard deviations
  double squared = INFINITY;
  AgAdamWStep now{1, 21};
  Data before = p, v_before = v;
  run(f.b, f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, &squared, 1, 3});
  check(!std::memcmp(before.p(), p.p(), size_t(n) * 2) && !std::memcmp(v_before.p(), v.p(), size_t(n) * 2),
        "a norm that is not finite changed something");
}

// ---- refusals, services -----------------------------------------------------------------------------
void test_refusals(Fixture f) {
  if (f.dt != AG_F32) return;
  double v[8] = {0};
  int32_t zero = 0;
  AgDtype no = AG_I32;
  check(call(f.b, f.b.unary, AgUnary{AG_GELU, v, v, 1, no, 1}) == AG_INVALID, "unary i32");
  check(call(f.b, f.b.unary_grad, AgUnaryGrad{AG_GELU, v, v, v, 1, no, 1}) == AG_INVALID, "unary_grad i32");
  check(call(f.b, f.b.binary, AgBinary{AG_ADD, v, v, v, 1, 1, no}) == AG_INVALID, "binary i32");
  check(call(f.b, f.b.silu_mul, AgSiluMul{v, v, v, 1, no}) == AG_INVALID, "silu_mul i32");
  check(call(f.b, f.b.random, AgRandom{v, no, 1, AG_UNIFORM, 0, 1, 0, 0}) == AG_INVALID, "random i32");
  check(call(f.b, f.b.softmax, AgSoftmax{v, v, 1, 1, no}) == AG_INVALID, "softmax i32");
  check(call(f.b, f.b.col_sum, AgColSum{{v, AG_I64, 0}, v, 1, 1, 1, AG_F32, 1, nullptr}, AG_K_COL_SUM) == AG_INVALID,
        "col_sum into i64");
  check(call(f.b, f.b.scatter_add, AgScatterAdd{{v, no, 0}, v, &zero, 1, 1, 1, AG_F32, 1}, AG_K_SCATTER_ADD) ==
            AG_INVALID,
        "scatter_add into i32");
  AgSpan span{v, no, 1};
  check(call(f.b, f.b.sum_squares, AgSumSquares{&span, 1, v}, AG_K_SUM_SQUARES) == AG_INVALID, "sum_squares i32");
  float m[2] = {0}, s[2] = {0};
  AgAdamWStep now{0.1, 1};
  AgAdamWTensor t{v, AG_F64, v, AG_F32, AG_STATE_FULL, nullptr, m, s, 1, 0, 1, 0};
  check(call(f.b, f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 0}) == AG_INVALID, "adamw f64");
  t.dt_p = AG_F32, t.state = AG_STATE_COMPACT;
  check(call(f.b, f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 0}) == AG_INVALID, "adamw compact f32");
  check(call(f.b, f.b.cross_entropy, AgCrossEntropy{v, 1, 1, &zero, v, v + 1, 1, nullptr, AG_F64, AG_F32}, AG_K_CROSS_ENTROPY) ==
            AG_INVALID,
        "cross_entropy f64 to f32");
}

void test_services(Fixture f) {
  if (f.dt != AG_F32) return;
  check(f.b.version == AG_BACKEND_VERSION && f.b.struct_size == int32_t(sizeof(AgBackend)), "version");
  AgCapabilities c;
  f.b.capabilities(&c);
  check(!std::strcmp(c.name, "cpu") && c.level[0] && c.threads >= 1, "capabilities");
  for (int64_t bytes : {0, 1, 64, 1000003, 9000000}) {
    void* p = nullptr;
    check(f.b.alloc(nullptr, bytes, &p) == AG_OK && reinterpret_cast<uintptr_t>(p) % 64 == 0, "alloc %lld",
          (long long)bytes);
    if (bytes) std::memset(p, 1, size_t(bytes));
    f.b.free(nullptr, p);
  }
  void* p = nullptr;
  check(f.b.alloc(nullptr, int64_t(1) << 60, &p) == AG_OUT_OF_MEMORY, "alloc of 2^60 bytes");
  AgCtx ctx{};
  void* event = nullptr;
  check(f.b.event_create(&event) == AG_OK && f.b.event_record(&ctx, event) == AG_OK &&
            f.b.event_wait(&ctx, event) == AG_OK,
        "events");
  f.b.event_destroy(event);
  check(f.b.synchronize(&ctx) == AG_OK && f.b.graph_begin(&ctx) == AG_UNSUPPORTED && ctx.error[0],
        "graphs are unsupported");
}

// The pool: every chunk once, nested and concurrent callers inline, also while the number of threads changes.
void test_pool() {
  g_where = "pool";
  auto count = [](void* arg, int64_t i, int64_t) {
    __atomic_fetch_add(static_cast<int*>(arg) + i, 1, __ATOMIC_RELAXED);
  };
  auto all_once = [&](int64_t n) {
    std::vector<int> hits(size_t(n) + 1);
    ag_parallel(n, n, count, hits.data());
    bool ok = hits.back() == 0;
    for (int64_t i = 0; i < n; i++) ok = ok && hits[size_t(i)] == 1;
    return ok;
  };
  for (int threads : {1, 2, 5, 3}) {
    ag_set_threads(threads);
    check(ag_threads() == threads, "threads");
    for (int round = 0; round < 300; round++)
      for (int64_t n : {0, 1, 2, 3, 7, 100}) check(all_once(n), "%lld chunks, %d threads", (long long)n, threads);
  }
  std::vector<std::thread> callers;
  int bad[4] = {0};
  for (int t = 0; t < 4; t++)
    callers.emplace_back([&, t] {
      for (int round = 0; round < 500; round++) bad[t] += !all_once(50);
    });
  for (std::thread& t : callers) t.join();
  check(!bad[0] && !bad[1] && !bad[2] && !bad[3], "concurrent callers");
  struct Nested {
    int hits[64] = {0};
  } nested;
  auto outer = [](void* arg, int64_t i, int64_t) {
    struct Inner {
      int* hits;
    } inner{static_cast<Nested*>(arg)->hits + i * 8};
    ag_parallel(8, 8, [](void* a, int64_t j, int64_t) { static_cast<Inner*>(a)->hits[j]++; }, &inner);
  };
  ag_parallel(8, 8, outer, &nested);
  for (int h : nested.hits) check(h == 1, "nested call");
}

struct Test {
  const char* name;
  void (*run)(Fixture);
};
const Test kTests[] = {
    {"fill", test_fill},
    {"cast", test_cast},
    {"random", test_random},
    {"unary", test_unary},
    {"functions", test_functions},
    {"binary", test_binary},
    {"silu_mul", test_silu_mul},
    {"rope", test_rope},
    {"patchify", test_patchify},
    {"col_sum", test_col_sum},
    {"sums", test_sums},
    {"rows", test_rows},
    {"norm", test_norm},
    {"norm_grad", test_norm_grad},
    {"softmax", test_softmax},
    {"l2norm", test_l2norm},
    {"cross_entropy", test_cross_entropy},
    {"sample", test_sample},
    {"adamw", test_adamw},
    {"adamw_rounding", test_adamw_rounding},
    {"refusals", test_refusals},
    {"services", test_services},
};

}  // namespace

int main(int argc, char** argv) {
  for (const char* level : {"portable", "neon", "avx2", "avx512", "avx512bf16", "amx"}) {
    const char* asked = std::getenv("ALIGNGPT_CPU_LEVEL");  // amx is for those who name it
    const AgBackend* b = std::strcmp(level, "amx") || (asked && !std::strcmp(asked, level)) ? ag_cpu_level(level) : nullptr;
    if (!b) {
      std::printf("  %s: not on this machine or not asked for, skipped\n", level);
      continue;
    }
    for (const Test& t : kTests)
      for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
        if (argc > 1 && std::strcmp(argv[1], t.name) != 0) continue;
        g_where = std::string(level) + " " + t.name + " " + name_of(dt);
        uint64_t seen[3];
        for (int turn = 0; turn < 3; turn++) {
          ag_set_threads(turn ? 2 : 1);
          g_random = 1, g_digest = 0xCBF29CE484222325u;
          t.run(Fixture{*b, dt});
          seen[turn] = g_digest;
        }
        check(seen[0] == seen[1], "one and two threads differ");
        check(seen[1] == seen[2], "two runs differ");
      }
  }
  if (argc == 1) test_pool();
  std::printf("%d checks, %d failed\n", g_checks, g_failed);
  return g_failed ? 1 : 0;
}

// Elementwise kernels and the sum of all elements (cuda_test.h).
#include <cmath>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_unary(Test& t) {
  for (AgUnaryOp op : {AG_NONE, AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU, AG_SCALE, AG_EXP})
    for (int64_t n : kLengths) {
      const int64_t shift = n % 2;
      Buffer &x = t.in(n, -9, 9).shifted(shift), &y = t.out("y", n), &dy = t.in(n),
             &place = t.in_place("y in place", t.dt, n);
      t.run("unary", &AgBackend::unary, [&] { return AgUnary{op, y.p(), x.p(), n, t.dt, 0.37}; });
      t.run("unary in place", &AgBackend::unary, [&] { return AgUnary{op, place.p(), place.p(), n, t.dt, 0.37}; });
      t.run("unary_grad", &AgBackend::unary_grad, [&] { return AgUnaryGrad{op, y.p(), dy.p(), x.p(), n, t.dt, 0.37}; });
      t.run("unary_grad in place", &AgBackend::unary_grad,
            [&] { return AgUnaryGrad{op, place.p(), place.p(), x.p(), n, t.dt, 0.37}; });
      t.clear();
    }
  Buffer &x = t.in(8), &y = t.out("y", 8);
  const double special[] = {0, -0.0, 100, -100, INFINITY, NAN, 88.5, -88.5};
  for (int64_t i = 0; i < 8; i++) x.set(i, special[i]);
  for (AgUnaryOp op : {AG_NONE, AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU, AG_SCALE})
    t.run("special", &AgBackend::unary, [&] { return AgUnary{op, y.p(), x.p(), 8, t.dt, 0.37}; });
}

void test_binary(Test& t) {
  const int64_t shapes[][2] = {{1, 1}, {9001, 9001}, {9000, 1}, {720, 24}, {105, 7}, {0, 8}};  // n, nb
  for (AgBinaryOp op : {AG_ADD, AG_SUB, AG_MUL})
    for (auto& s : shapes)
      for (int64_t shift : {0, 1}) {
        const int64_t n = s[0], nb = s[1];
        Buffer &a = t.in(n), &b = t.in(nb).shifted(shift), &y = t.out("y", n),
               &place = t.in_place("y in place", t.dt, n);
        t.run("binary", &AgBackend::binary, [&] { return AgBinary{op, y.p(), a.p(), b.p(), n, nb, t.dt}; });
        t.run("binary in place", &AgBackend::binary,
              [&] { return AgBinary{op, place.p(), place.p(), b.p(), n, nb, t.dt}; });
        t.clear();
      }
}

void test_silu_mul(Test& t) {
  for (int64_t n : kLengths) {
    Buffer &gate = t.in(n, -9, 9), &up = t.in(n).shifted(n % 2), &y = t.out("y", n);
    t.run("silu_mul", &AgBackend::silu_mul, [&] { return AgSiluMul{y.p(), gate.p(), up.p(), n, t.dt}; });
    Buffer &dy = t.in_place("dup in dy", t.dt, n), &dgate = t.out("dgate", n);
    t.run("silu_mul_grad", &AgBackend::silu_mul_grad,
          [&] { return AgSiluMulGrad{dgate.p(), dy.p(), dy.p(), gate.p(), up.p(), n, t.dt}; });
    t.clear();
  }
}

void test_sum(Test& t) {
  for (int64_t n : {0, 1, 7, 16384, 40001})
    for (int64_t shift : {0, 1}) {
      Buffer &x = t.in(n, 0, 1).shifted(shift), &y = t.out("y", 1);
      t.run("sum", &AgBackend::sum, [&] { return AgSum{y.p(), x.p(), n, t.dt, -0.5}; });
      t.clear();
    }
}

const Registered kCases[] = {
    {"unary", test_unary}, {"binary", test_binary}, {"silu_mul", test_silu_mul}, {"sum", test_sum}};

}  // namespace
}  // namespace cuda_test

// Moving, filling, converting, random numbers (cuda_test.h).
#include <cstring>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_fill(Test& t) {
  if (t.dt == AG_BF16) return;  // the loop below has all dtypes
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64})
    for (int64_t n : kLengths)
      for (int64_t shift : {0, 1}) {
        Buffer& y = t.out("dst", dt, n).exact().shifted(shift);
        t.run("fill", &AgBackend::fill, [&] { return AgFill{y.p(), dt, n, -3.37}; });
        t.clear();
      }
}

void test_copy2d(Test& t) {
  if (t.dt == AG_BF16) return;  // bytes
  for (int64_t unit : {1, 2, 4, 16})
    for (int64_t rows : {0, 1, 5, 70})
      for (bool repeat : {false, true}) {
        const int64_t row = 5 * unit, from = 7 * unit, to = 9 * unit;  // bytes
        Buffer &src = t.in(AG_I32, (rows * from + 3) / 4, -1e9, 1e9),
               &dst = t.in_place("dst", AG_I32, (rows * to + 3) / 4, -1e9, 1e9).exact();
        t.run("copy2d", &AgBackend::copy2d,
              [&] { return AgCopy2d{dst.p(), to, src.p(), repeat ? 0 : from, rows, row}; });
        t.clear();
      }
}

void test_cast(Test& t) {
  if (t.dt == AG_BF16) return;  // the loops below have all dtypes
  const AgDtype all[] = {AG_F32, AG_BF16, AG_F64, AG_I32, AG_I64};
  for (AgDtype from : all)
    for (AgDtype to : all)
      for (int64_t n : {0, 1, 6, 5003})
        for (int64_t shift : {0, 1}) {
          Buffer &x = t.in(from, n, -1000, 1000).shifted(shift), &y = t.out("dst", to, n).exact();
          t.run("cast", &AgBackend::cast, [&] { return AgCast{y.p(), to, x.p(), from, n}; });
          t.clear();
        }
  Buffer &x = t.in(AG_F32, 65536 * 2),
         &y = t.out("dst", AG_BF16, x.n).exact();  // ties, infinities and NaNs of every exponent
  for (uint32_t i = 0; i < 65536 * 2; i++) {
    const uint32_t bits = (i / 2) << 16 | (i % 2 ? 0x8000 : 0x7fff);
    std::memcpy(&x.host[i * 4], &bits, 4);
  }
  t.run("to bf16", &AgBackend::cast, [&] { return AgCast{y.p(), AG_BF16, x.p(), AG_F32, x.n}; });
}

void test_random(Test& t) {
  for (int64_t n : {0, 1, 5, 8, 9001})
    for (double b : {3.0, 2.0, 2.000001}) {  // at the last two rounding meets the end of the range
      Buffer& y = t.out("uniform", n).exact();
      t.run("uniform", &AgBackend::random,
            [&] { return AgRandom{y.p(), t.dt, n, AG_UNIFORM, 2.0, b, 12345678901234u, uint64_t(1) << 40}; });
      t.clear();
    }
  Buffer& below_zero = t.out("uniform", 4000).exact();
  t.run("uniform", &AgBackend::random,
        [&] { return AgRandom{below_zero.p(), t.dt, 4000, AG_UNIFORM, -1.0, -0.9999999, 1, 0}; });
  t.clear();
  Buffer& z = t.out("normal", 9001);
  t.run("normal", &AgBackend::random, [&] { return AgRandom{z.p(), t.dt, 9001, AG_NORMAL, 1.0, 2.0, 7, 3}; });
}

const Registered kCases[] = {
    {"fill", test_fill}, {"copy2d", test_copy2d}, {"cast", test_cast}, {"random", test_random}};

}  // namespace
}  // namespace cuda_test

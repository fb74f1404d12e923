// Cases of the matrix product (cuda_test.h): every way of storing, sizes beside those of a tile, every end of a
// product.
#include "cuda_test.h"

namespace cuda_test {
namespace {

struct Shape {
  int64_t m, n, k, gap, shift;  // gap: elements behind each row; shift: before each buffer
};

struct End {
  const char* name;
  bool bias, pre, rows, f32;
  AgUnaryOp act;
  int32_t accumulate;
  int64_t bias_shift = 0;
};
const End kEnds[] = {
    {"plain", false, false, false, false, AG_NONE, 0},
    {"bias, gelu, pre", true, true, false, false, AG_GELU, 0},
    {"bias, silu", true, false, false, false, AG_SILU, 0},
    {"bias at an odd address", true, false, false, false, AG_NONE, 0, 1},
    {"added", false, false, false, false, AG_NONE, 1},
    {"added in f32", false, false, false, true, AG_NONE, 1},
    {"to rows in f32", true, false, true, true, AG_NONE, 0},
};

void product(Test& t, const Shape& s, bool trans_a, bool trans_b, const End& end) {
  const int64_t lda = (trans_a ? s.m : s.k) + s.gap, ldb = (trans_b ? s.k : s.n) + s.gap, ldc = s.n + s.gap;
  const AgDtype dt_c = end.f32 ? AG_F32 : t.dt;
  char label[128];
  std::snprintf(label, sizeof label, "%lld x %lld x %lld %c%c gap %lld, %s", (long long)s.m, (long long)s.n,
                (long long)s.k, trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', (long long)s.gap, end.name);
  Buffer &a = t.in((trans_a ? s.k : s.m) * lda).shifted(s.shift),
         &b = t.in((trans_b ? s.n : s.k) * ldb).shifted(s.shift);
  Buffer &bias = t.in(s.n).shifted(end.bias_shift), &c = t.in_place("c", dt_c, (s.m + 2) * ldc).shifted(s.shift);
  std::vector<int32_t> places;  // backwards, with gaps of their own
  for (int64_t i = 0; i < s.m; i++) places.push_back(int32_t(s.m + 1 - i - (i > s.m / 2)));
  Buffer& rows = t.list(places);
  Buffer* pre = end.pre ? &t.out("pre", dt_c, s.m * s.n) : nullptr;
  t.run(label, &AgBackend::gemm, [&] {
    AgGemm g{};
    g.m = s.m, g.n = s.n, g.k = s.k, g.a = a.p(), g.lda = lda, g.b = b.p(), g.ldb = ldb, g.c = c.p(), g.ldc = ldc;
    g.c_rows = end.rows ? rows.i32() : nullptr, g.bias = end.bias ? bias.p() : nullptr,
    g.pre = pre ? pre->p() : nullptr;
    g.dt = t.dt, g.dt_c = dt_c, g.act = end.act, g.trans_a = trans_a, g.trans_b = trans_b,
    g.accumulate = end.accumulate;
    return g;
  });
  t.clear();
}

}  // namespace

void every_product(Test& t) {
  const Shape every[] = {{1, 1, 1, 0, 0},  {3, 9, 70, 0, 0},   {7, 6, 24, 3, 0},   {8, 24, 520, 0, 0},
                         {9, 17, 5, 3, 1}, {40, 24, 96, 8, 0}, {130, 72, 40, 0, 0}};
  const Shape wide[] = {{72, 136, 64, 0, 0}, {24, 40, 1040, 0, 0}, {17, 3, 600, 0, 0}};  // the last two: parts of k
  for (int way = 0; way < 4; way++) {
    for (const Shape& s : every) {
      if (small() && s.m > 9) continue;
      for (const End& end : kEnds) product(t, s, way & 1, way & 2, end);
    }
    if (!small())
      for (const Shape& s : wide) product(t, s, way & 1, way & 2, kEnds[way < 3 ? way : 4]);
  }
  if (small())
    product(t, {40, 24, 96, 8, 0}, true, false, kEnds[1]), product(t, {24, 40, 520, 0, 0}, false, true, kEnds[5]);
  product(t, {5, 4, 0, 0, 0}, false, true, kEnds[1]);
  product(t, {20, 4, 0, 0, 0}, false, false, kEnds[0]);
}
namespace {

void refusals(Test& t) {
  if (t.dt != AG_F32) return;
  AgGemm g{};
  g.m = g.n = g.k = g.lda = g.ldb = g.ldc = 1, g.dt = AG_F64, g.dt_c = AG_F64;
  t.refuse("f64", &AgBackend::gemm, g, AG_INVALID);
  g.dt = AG_F32, g.dt_c = AG_BF16;
  t.refuse("f32 to bf16", &AgBackend::gemm, g, AG_INVALID);
  g.dt_c = AG_F32;
  t.refuse("no b", &AgBackend::gemm, g, AG_INVALID);
}

Registered a("gemm", every_product), b("gemm_refusals", refusals);

}  // namespace
}  // namespace cuda_test

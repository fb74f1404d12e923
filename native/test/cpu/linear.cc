// Matrix products: odd and tiny sizes, every option.
#include "matrix_test.h"

namespace cpu_test {
namespace {

struct GemmCase {
  int64_t m, n, k;
  bool ta, tb;
  AgDtype dt, dt_c;
  bool bias, pre, accumulate, scatter, packed;
  AgUnaryOp act;
  int64_t gap;  // added to the leading dimensions
};

void test_gemm(const Level& l, const GemmCase& c) {
  where = text(l.name, " gemm ", name_of(c.dt), "->", name_of(c.dt_c), " ", c.m, "x", c.n, "x", c.k, c.ta ? " T" : " N",
               c.tb ? "T" : "N", c.bias ? " bias" : "", c.pre ? " pre" : "", c.accumulate ? " accumulate" : "",
               c.scatter ? " rows" : "", c.packed ? " packed" : "", " act ", int(c.act), " gap ", c.gap);
  int64_t lda = (c.ta ? c.m : c.k) + c.gap, ldb = (c.tb ? c.k : c.n) + c.gap, ldc = c.n + c.gap,
          rows_c = c.scatter ? 2 * c.m + 1 : c.m;
  Buffer A = Buffer::random(c.dt, (c.ta ? c.k : c.m) * lda), B = Buffer::random(c.dt, (c.tb ? c.n : c.k) * ldb);
  Buffer bias = Buffer::random(c.dt, c.n), C = Buffer::random(c.dt_c, rows_c * ldc, 1, 64), pre(c.dt_c, c.m * c.n, 7),
         blob;
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < c.m; i++) rows.push_back(int32_t(2 * (c.m - 1 - i) + 1));
  std::vector<double> want(size_t(C.n)), want_pre(size_t(pre.n), 7);
  for (int64_t i = 0; i < C.n; i++) want[size_t(i)] = C.at(i);
  std::vector<double> a = A.all(), b = B.all();
  for (int64_t i = 0; i < c.m; i++)
    for (int64_t j = 0; j < c.n; j++) {
      double s = 0;
      for (int64_t q = 0; q < c.k; q++)
        s += a[size_t(c.ta ? q * lda + i : i * lda + q)] * b[size_t(c.tb ? j * ldb + q : q * ldb + j)];
      double& w = want[size_t((c.scatter ? rows[size_t(i)] : i) * ldc + j)];
      if (c.accumulate) s += w;
      if (c.bias) s += bias.at(j);
      if (c.pre) want_pre[size_t(i * c.n + j)] = s;
      w = activation(c.act, s);
    }
  AgGemm g{};
  g.m = c.m, g.n = c.n, g.k = c.k;
  g.a = A.p(), g.lda = lda, g.b = B.p(), g.ldb = ldb, g.c = C.p(), g.ldc = ldc;
  g.c_rows = c.scatter ? rows.data() : nullptr;
  g.bias = c.bias ? bias.p() : nullptr;
  g.pre = c.pre ? pre.p() : nullptr;
  g.dt = c.dt, g.dt_c = c.dt_c, g.act = c.act, g.trans_a = c.ta, g.trans_b = c.tb, g.accumulate = c.accumulate;
  if (c.packed) {
    AgPack p{B.p(), c.n, c.k, ldb, c.tb, c.dt, nullptr};
    blob = Buffer(AG_BF16, l.b.pack_bytes(&p) / 2);
    p.blob = blob.p();
    AgCtx ctx{};
    if (blob.n) check(l.b.pack(&ctx, &p) == AG_OK, "pack");
    check(blob.intact(), "pack wrote beyond the blob");
    if (blob.n) g.b_packed = blob.p(), g.b = nullptr;
  }
  on_both({&C, &pre}, [&] { launch("gemm", l.b.gemm, g); });
  double scale = 1;
  for (double w : want) scale = std::max(scale, std::fabs(w) / 4);
  double sum = (c.dt == AG_F64 ? 1e-15 : 4e-7) * std::sqrt(double(c.k + 1)) * scale, act = c.act == AG_NONE ? 0 : 1e-6;
  compare("c", C, want, sum + act + (c.dt_c == AG_BF16 && c.pre ? 2e-3 : 0), unit(c.dt_c) * (c.pre ? 2.5 : 1) + act);
  compare("pre", pre, want_pre, sum, unit(c.dt_c));
}

void test_gemms(const Level& l) {
  const int64_t shapes[][3] = {{0, 3, 2},     {3, 0, 2},     {3, 2, 0},    {1, 1, 1},     {1, 5, 3},      {5, 1, 7},
                               {2, 33, 17},   {3, 64, 40},   {4, 31, 100}, {7, 40, 33},   {8, 130, 65},   {9, 17, 12},
                               {14, 32, 16},  {15, 33, 17},  {13, 70, 72}, {64, 48, 24},  {100, 70, 401}, {29, 300, 31},
                               {70, 20, 500}, {1, 200, 900}, {8, 66, 800}, {600, 40, 50}, {37, 70, 1000}};
  for (auto& s : shapes)
    for (int trans = 0; trans < 4; trans++)
      for (AgDtype dt : {AG_F32, AG_BF16, AG_F64})
        for (AgDtype dt_c : {AG_F32, AG_BF16, AG_F64}) {
          if ((dt == AG_F64) != (dt_c == AG_F64) || (dt == AG_F32 && dt_c == AG_BF16)) continue;
          if (elsewhere(l, dt)) continue;
          GemmCase c{s[0],  s[1],  s[2],  trans >= 2, trans % 2 == 1, dt,      dt_c,
                     false, false, false, false,      false,          AG_NONE, 0};
          test_gemm(l, c);
          for (int v = 0; v < 6; v++) {
            GemmCase d = c;
            d.gap = v % 2 ? 5 : 0;
            d.bias = v == 0 || v == 1 || v == 4;
            d.pre = v == 1 || v == 5;
            d.accumulate = v == 2 || v == 3;
            d.scatter = v >= 3;
            d.packed = v == 0 || v == 2 || v == 4;
            d.act = v == 0 ? AG_GELU : v == 1 ? AG_GELU_TANH : v == 4 ? AG_SILU : v == 5 ? AG_QUICK_GELU : AG_NONE;
            test_gemm(l, d);
          }
        }
  for (int trans = 0; trans < 4; trans++)
    for (AgDtype dt : {AG_F32, AG_BF16}) {
      if (elsewhere(l, dt) || (trans != 2 && std::string(l.name) == "amx_emulated")) continue;  // emulation is slow
      GemmCase c{577, 600, 390, trans >= 2, trans % 2 == 1, dt, dt, false, false, false, false, false, AG_NONE, 0};
      test_gemm(l, c);
      c = GemmCase{90,   2500,  400,   trans >= 2, trans % 2 == 1, dt,      AG_F32,
                   true, false, false, true,       trans == 1,     AG_SILU, 1};
      test_gemm(l, c);
      c = GemmCase{580, 530, 9000, trans >= 2, trans % 2 == 1, dt, dt, true, false, false, false, false, AG_NONE, 0};
      if (std::string(l.name).rfind("avx512", 0) == 0 && trans == 2) test_gemm(l, c);
    }
}

const Cases kCases("linear", test_gemms);

}  // namespace
}  // namespace cpu_test

// Cases of every op but the matrix product, attention and alignMix (cuda_test.h). Sizes are odd and small: the emulation runs them
// thread by thread. Shifted buffers take the paths for addresses that are not aligned to 16 bytes.
#include <cmath>
#include <cstring>

#include "cuda_test.h"

namespace cuda_test {
namespace {

const int64_t kLengths[] = {0, 1, 7, 8, 33, 1000, 9001};

AgGrad grad(const Buffer& x, bool accumulate) { return AgGrad{x.p(), x.dt, accumulate}; }

// ---- moving and filling -----------------------------------------------------------------------------
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
        Buffer &src = t.in(AG_I32, (rows * from + 3) / 4, -1e9, 1e9), &dst = t.in_place("dst", AG_I32, (rows * to + 3) / 4, -1e9, 1e9).exact();
        t.run("copy2d", &AgBackend::copy2d, [&] { return AgCopy2d{dst.p(), to, src.p(), repeat ? 0 : from, rows, row}; });
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
  Buffer &x = t.in(AG_F32, 65536 * 2), &y = t.out("dst", AG_BF16, x.n).exact();  // ties, infinities and NaNs of every exponent
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
      t.run("uniform", &AgBackend::random, [&] { return AgRandom{y.p(), t.dt, n, AG_UNIFORM, 2.0, b, 12345678901234u, uint64_t(1) << 40}; });
      t.clear();
    }
  Buffer& below_zero = t.out("uniform", 4000).exact();
  t.run("uniform", &AgBackend::random, [&] { return AgRandom{below_zero.p(), t.dt, 4000, AG_UNIFORM, -1.0, -0.9999999, 1, 0}; });
  t.clear();
  Buffer& z = t.out("normal", 9001);
  t.run("normal", &AgBackend::random, [&] { return AgRandom{z.p(), t.dt, 9001, AG_NORMAL, 1.0, 2.0, 7, 3}; });
}

// ---- elementwise ------------------------------------------------------------------------------------
void test_unary(Test& t) {
  for (AgUnaryOp op : {AG_NONE, AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU, AG_SCALE, AG_EXP})
    for (int64_t n : kLengths) {
      const int64_t shift = n % 2;
      Buffer &x = t.in(n, -9, 9).shifted(shift), &y = t.out("y", n), &dy = t.in(n), &place = t.in_place("y in place", t.dt, n);
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
        Buffer &a = t.in(n), &b = t.in(nb).shifted(shift), &y = t.out("y", n), &place = t.in_place("y in place", t.dt, n);
        t.run("binary", &AgBackend::binary, [&] { return AgBinary{op, y.p(), a.p(), b.p(), n, nb, t.dt}; });
        t.run("binary in place", &AgBackend::binary, [&] { return AgBinary{op, place.p(), place.p(), b.p(), n, nb, t.dt}; });
        t.clear();
      }
}

void test_silu_mul(Test& t) {
  for (int64_t n : kLengths) {
    Buffer &gate = t.in(n, -9, 9), &up = t.in(n).shifted(n % 2), &y = t.out("y", n);
    t.run("silu_mul", &AgBackend::silu_mul, [&] { return AgSiluMul{y.p(), gate.p(), up.p(), n, t.dt}; });
    Buffer &dy = t.in_place("dup in dy", t.dt, n), &dgate = t.out("dgate", n);
    t.run("silu_mul_grad", &AgBackend::silu_mul_grad, [&] { return AgSiluMulGrad{dgate.p(), dy.p(), dy.p(), gate.p(), up.p(), n, t.dt}; });
    t.clear();
  }
}

void test_rope(Test& t) {
  const int64_t shapes[][4] = {{0, 1, 1, 8}, {5, 4, 2, 16}, {7, 2, 1, 64}, {3, 3, 3, 6}};  // tokens, heads, kv_heads, dim
  for (auto& s : shapes)
    for (double sign : {1.0, -1.0})
      for (bool cached : {false, true}) {
        const int64_t tokens = s[0], heads = s[1], kv = s[2], dim = s[3], slots = 2 * tokens + 1;
        Buffer &position = t.ids(tokens, 11), &cos = t.in(AG_F32, 11 * dim / 2), &sin = t.in(AG_F32, 11 * dim / 2), &slot = t.ids(tokens, slots);
        for (int64_t i = 0; i < tokens; i++) slot.set(i, double(2 * i + i % 2));
        Buffer &x = t.in_place("rows", t.dt, tokens * (heads + 2 * kv) * dim);
        Buffer &k = t.in_place("key cache", t.dt, slots * kv * dim), &v = t.in_place("value cache", t.dt, slots * kv * dim).exact();
        t.run("rope", &AgBackend::rope, [&] {
          return AgRope{x.p(), position.i32(), cos.p(), sin.p(), tokens, heads, kv, dim, sign, cached ? k.p() : nullptr,
                        cached ? v.p() : nullptr, slot.i32(), t.dt};
        });
        t.clear();
      }
}

void test_patchify(Test& t) {
  const int64_t shapes[][5] = {{0, 3, 4, 4, 2}, {2, 3, 28, 42, 14}, {1, 1, 6, 9, 3}};  // images, channels, height, width, patch
  for (auto& s : shapes) {
    const int64_t n = s[0] * s[1] * s[2] * s[3];
    Buffer &pixels = t.in(n), &out = t.out("rows", n).exact();
    t.run("patchify", &AgBackend::patchify, [&] { return AgPatchify{out.p(), pixels.p(), s[0], s[1], s[2], s[3], s[4], t.dt}; });
    t.clear();
  }
}

// ---- reductions -------------------------------------------------------------------------------------
void test_col_sum(Test& t) {
  const int64_t shapes[][3] = {{0, 5, 5}, {1, 1, 1}, {3, 300, 300}, {200, 40, 56}, {1000, 9, 11}, {67, 256, 256}};  // rows, cols, ld
  for (auto& s : shapes)
    for (AgDtype to : {AG_F32, AG_BF16})
      for (bool accumulate : {false, true}) {
        const int64_t rows = s[0], cols = s[1], ld = s[2];
        Buffer &x = t.in(rows * ld, 0, 1), &by = t.in(AG_F32, 1, 0.5, 2), &y = t.in_place("y", to, cols);
        t.run("col_sum", &AgBackend::col_sum,
              [&] { return AgColSum{grad(y, accumulate), x.p(), rows, cols, ld, t.dt, 0.7, accumulate ? by.p() : nullptr}; }, AG_K_COL_SUM);
        t.clear();
      }
}

void test_sum(Test& t) {
  for (int64_t n : {0, 1, 7, 16384, 40001})
    for (int64_t shift : {0, 1}) {
      Buffer &x = t.in(n, 0, 1).shifted(shift), &y = t.out("y", 1);
      t.run("sum", &AgBackend::sum, [&] { return AgSum{y.p(), x.p(), n, t.dt, -0.5}; }, AG_K_SUM);
      t.clear();
    }
}

void test_sum_squares(Test& t) {
  for (int count : {0, 1, 5, 300}) {  // 300 spans take two launches
    if (small() && count == 300) continue;
    std::vector<Buffer*> parts;
    for (int i = 0; i < count; i++) parts.push_back(&t.in(i % 2 ? t.dt : AG_F32, i == 3 ? 0 : count < 10 ? 20000 * i + 5 : 3).shifted(i % 3));
    Buffer& out = t.out("norm squared", AG_F64, 1);
    std::vector<AgSpan> spans;
    auto args = [&] {
      spans.clear();
      for (Buffer* x : parts) spans.push_back(AgSpan{x->p(), x->dt, x->n});
      return AgSumSquares{spans.data(), count, static_cast<double*>(out.p())};
    };
    t.run("sum_squares", &AgBackend::sum_squares, args, AG_K_SUM_SQUARES);
    for (double bad : {double(INFINITY), double(NAN)}) {
      if (count < 5) continue;
      parts[4]->set(parts[4]->n - 1, bad);
      t.run("sum_squares, not finite", &AgBackend::sum_squares, args, AG_K_SUM_SQUARES);
      check(!std::isfinite(out.device(0)), "sum_squares of %g is finite", bad);
    }
    t.clear();
  }
}

// ---- rows by index ----------------------------------------------------------------------------------
void test_rows(Test& t) {
  for (AgDtype dt : {t.dt, AG_I32, AG_I64})
    for (int64_t cols : {1, 8, 33, 640}) {
      const int64_t n = 37, rows = 11;
      Buffer &index = t.ids(n, rows), &src = t.in(dt, rows * cols, -9e4, 9e4), &dst = t.out("rows", dt, n * cols).exact();
      t.run("gather_rows", &AgBackend::gather_rows, [&] { return AgGatherRows{dst.p(), src.p(), index.i32(), n, cols, rows, dt}; });
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
              [&] { return AgScatterAdd{grad(dst, accumulate), src.p(), index.i32(), n, cols, rows, t.dt, scale}; }, AG_K_SCATTER_ADD);
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

// ---- norms ------------------------------------------------------------------------------------------
const int64_t kRows[][2] = {{0, 8}, {1, 1}, {5, 37}, {9, 1024}, {3, 1032}, {2, 2047}, {70, 64}};  // rows, cols

void test_norm(Test& t) {
  for (auto& s : kRows)
    for (bool layer : {false, true}) {
      const int64_t rows = s[0], cols = s[1];
      Buffer &x = t.in(rows * cols, -1, 3), &w = t.in(cols, 0.5, 1.5), &b = t.in(cols), &y = t.out("y", rows * cols);
      Buffer &mean = t.out("mean", AG_F32, rows), &rstd = t.out("rstd", AG_F32, rows);
      t.run(layer ? "LayerNorm" : "RMSNorm", &AgBackend::norm, [&] {
        return AgNorm{y.p(), x.p(), w.p(), layer ? b.p() : nullptr, layer ? mean.p() : nullptr, rstd.p(), rows, cols, 1e-5, t.dt};
      });
      t.clear();
    }
}

void test_norm_grad(Test& t) {
  for (auto& s : kRows)
    for (bool layer : {false, true})
      for (int wanted = 0; wanted < 4; wanted++) {  // dx; dw, db; both; both, accumulated into the other dtype
        const int64_t rows = s[0], cols = s[1];
        const AgDtype to = wanted == 3 && t.dt == AG_F32 ? AG_BF16 : AG_F32;
        Buffer &x = t.in(rows * cols), &dy = t.in(rows * cols), &w = t.in(cols, 0.5, 1.5), &mean = t.in(AG_F32, rows), &rstd = t.in(AG_F32, rows, 1, 2);
        Buffer &dx = t.out("dx", rows * cols), &dw = t.in_place("dw", to, cols), &db = t.in_place("db", to, cols);
        t.run(layer ? "LayerNorm gradient" : "RMSNorm gradient", &AgBackend::norm_grad, [&] {
          AgNormGrad a{};
          a.dx = wanted == 1 ? nullptr : dx.p();
          if (wanted) a.dw = grad(dw, wanted == 3);
          if (wanted && layer) a.db = grad(db, wanted == 3);
          a.dy = dy.p(), a.x = x.p(), a.w = w.p(), a.mean = layer ? mean.p() : nullptr, a.rstd = rstd.p();
          a.rows = rows, a.cols = cols, a.dt = t.dt;
          return a;
        }, AG_K_NORM_GRAD);
        t.clear();
      }
}

void test_softmax(Test& t) {
  for (auto& s : kRows) {
    const int64_t rows = s[0], cols = s[1], n = rows * cols;
    Buffer &x = t.in(n, -5, 5), &y = t.out("y", n), &dy = t.in(n), &p = t.in(n, 0, 1), &norm = t.in(AG_F32, rows, 1, 2), &length = t.out("norm", AG_F32, rows);
    t.run("softmax", &AgBackend::softmax, [&] { return AgSoftmax{y.p(), x.p(), rows, cols, t.dt}; });
    t.run("softmax_grad", &AgBackend::softmax_grad, [&] { return AgSoftmaxGrad{y.p(), dy.p(), p.p(), rows, cols, t.dt}; });
    t.run("l2norm", &AgBackend::l2norm, [&] { return AgL2Norm{y.p(), x.p(), length.p(), rows, cols, t.dt}; });
    t.run("l2norm_grad", &AgBackend::l2norm_grad, [&] { return AgL2NormGrad{y.p(), dy.p(), p.p(), norm.p(), rows, cols, t.dt}; });
    if (n) x.set(n / 2, NAN);
    t.run("softmax of a NaN", &AgBackend::softmax, [&] { return AgSoftmax{y.p(), x.p(), rows, cols, t.dt}; });
    t.clear();
  }
}

// ---- loss, sampling ---------------------------------------------------------------------------------
void test_cross_entropy(Test& t) {
  const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 37}, {2, 8200}, {5, 1000}};
  for (auto& s : shapes)
    for (AgDtype to : {AG_F32, AG_BF16}) {
      const int64_t rows = s[0], cols = s[1];
      Buffer &x = t.in(rows * cols, -8, 8), &target = t.ids(rows, cols, -2), &by = t.in(AG_F32, 1, 0.5, 2), &nll = t.out("nll", AG_F32, rows), &d = t.out("dlogits", to, rows * cols);
      auto args = [&](const void* logits, void* dlogits, AgDtype dt_d) {
        return AgCrossEntropy{logits, rows, cols, target.i32(), nll.p(), dlogits, 0.125, by.p(), t.dt, dt_d};
      };
      t.run("cross_entropy", &AgBackend::cross_entropy, [&] { return args(x.p(), d.p(), to); }, AG_K_CROSS_ENTROPY);
      t.run("loss only", &AgBackend::cross_entropy, [&] { return args(x.p(), nullptr, to); }, AG_K_CROSS_ENTROPY);
      if (rows) x.set(cols / 2, -INFINITY);
      if (rows) t.run("cross_entropy with -inf", &AgBackend::cross_entropy, [&] { return args(x.p(), d.p(), to); }, AG_K_CROSS_ENTROPY);
      t.clear();
      Buffer &place = t.in_place("dlogits in logits", t.dt, rows * cols, -8, 8), &label = t.ids(rows, cols), &loss = t.out("nll", AG_F32, rows);
      t.run("cross_entropy in place", &AgBackend::cross_entropy, [&] {
        return AgCrossEntropy{place.p(), rows, cols, label.i32(), loss.p(), place.p(), 0.125, nullptr, t.dt, t.dt};
      }, AG_K_CROSS_ENTROPY);
      if (rows) place.set(rows * cols / 2, NAN);
      t.run("cross_entropy of a NaN", &AgBackend::cross_entropy, [&] {
        return AgCrossEntropy{place.p(), rows, cols, label.i32(), loss.p(), nullptr, 0.125, nullptr, t.dt, t.dt};
      }, AG_K_CROSS_ENTROPY);
      t.clear();
    }
}

void test_sample(Test& t) {
  if (t.dt == AG_BF16) return;  // f32 only
  struct Cut {
    double temperature, top_p;
    int64_t top_k;
  };
  const Cut cuts[] = {{0, 1, 0}, {1, 1, 0}, {0.7, 0.9, 0}, {1.3, 1, 5}, {1, 0.5, 40}, {1, 1e-9, 0}};
  for (const Cut& c : cuts) {
    if (small() && c.temperature != 0 && c.top_k != 40) continue;
    for (int64_t cols : {1, 40, 1500}) {
      if (cols == 1500 && (small() || (c.top_p != 0.9 && c.top_k != 40))) continue;  // 1024 fibers meet some hundred times for each row
      const int64_t rows = 6;
      Buffer &x = t.in(AG_F32, rows * cols, -6, 6), &u = t.in(AG_F64, rows, 0, 1), &out = t.out("id", AG_I32, rows).exact();
      for (int64_t i = 0; i < cols; i++) {
        x.set(cols + i, double(i % 7 == 3));           // many ties at every cut
        if (i % 3) x.set(2 * cols + i, -INFINITY);      // weights of zero
      }
      u.set(0, 0);
      u.set(1, 0.999999);
      if (cols > 1) x.set(4 * cols + 1, INFINITY);
      x.set(5 * cols + cols / 2, NAN);
      t.run("sample", &AgBackend::sample, [&] {
        return AgSample{static_cast<const float*>(x.p()), rows, cols, c.temperature, c.top_p, c.top_k, static_cast<const double*>(u.p()),
                        static_cast<int32_t*>(out.p())};
      }, AG_K_SAMPLE);
      check(out.device(5) == -1, "a NaN gave %g", out.device(5));
      t.clear();
    }
  }
}

// ---- AdamW ------------------------------------------------------------------------------------------
struct Moments {
  Buffer *p, *g, *master, *m, *v;
};

Moments tensor(Test& t, AgDtype dp, AgDtype dg, bool compact, int64_t n, int64_t shift) {
  const AgDtype state = compact ? AG_BF16 : AG_F32;
  Moments x{&t.in_place("p", dp, n).shifted(shift), &t.in(dg, n), nullptr, &t.in_place("m", state, n, -0.1, 0.1), &t.in_place("v", state, n, 0, 0.1)};
  if (dp == AG_BF16) x.master = &t.in_place("master", compact ? AG_BF16 : AG_F32, n);
  for (int64_t i = 0; compact && i < n; i++) {  // 16 bits that are no number
    const int16_t rest = int16_t(i * 4099 % 65536 - 32768);
    std::memcpy(&x.master->host[size_t(i) * 2], &rest, 2);
  }
  return x;
}

// The rest of a compact parameter is bits: its value is compared together with p, and the buffer itself is left out.
void compare_compact(const Moments& x) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < x.p->n; i++) {
    float value[2];
    for (int side = 0; side < 2; side++) {
      uint16_t high;
      int16_t rest;
      std::memcpy(&high, &x.p->results[side][size_t(i) * 2], 2);
      std::memcpy(&rest, &x.master->results[side][size_t(i) * 2], 2);
      const uint32_t bits = (uint32_t(high) << 16) + uint32_t(int32_t(rest));
      std::memcpy(&value[side], &bits, 4);
    }
    error += double(value[1] - value[0]) * (value[1] - value[0]);
    size += double(value[0]) * value[0];
  }
  check(error <= 1e-10 * size, "compact value: NMSE %.3g", size > 0 ? error / size : 0);
  // The moments are rounded by the same random numbers: they differ only where the last bit of an f32 decides.
  int64_t other = 0;
  for (const Buffer* moment : {x.m, x.v})
    for (int64_t i = 0; i < moment->n; i++) other += moment->cpu(i) != moment->device(i);
  check(other <= 2 + x.p->n / 1000, "%lld of %lld compact moments differ", (long long)other, (long long)(2 * x.p->n));
}

void test_adamw(Test& t) {
  for (int mode = 0; mode < 4; mode++) {  // no norm; a norm; a norm and clipping; a norm that is not finite
    std::vector<Moments> all;
    std::vector<bool> compact;
    for (int64_t n : {5, 0, 4096, 33000}) {
      const bool small = t.dt == AG_BF16 && n % 2 == 0;
      all.push_back(tensor(t, t.dt, n == 5 ? AG_F32 : t.dt, small, n, n == 5));
      compact.push_back(small);
      if (small) all.back().master->is_bits = true;
    }
    AgAdamWStep step{1e-2, 3};
    Buffer &now = t.in(AG_F64, 2), &norm = t.in(AG_F64, 1, 4, 4.1);
    std::memcpy(now.host.data(), &step, sizeof step);
    if (mode == 3) norm.set(0, INFINITY);
    std::vector<AgAdamWTensor> list;
    t.run("adamw", &AgBackend::adamw, [&] {
      list.clear();
      int64_t first = (int64_t(1) << 32) - 100;  // numbers of elements beyond 32 bits
      for (size_t i = 0; i < all.size(); i++) {
        const Moments& x = all[i];
        list.push_back({x.p->p(), x.p->dt, x.g->p(), x.g->dt, compact[i] ? AG_STATE_COMPACT : AG_STATE_FULL, x.master ? x.master->p() : nullptr,
                        x.m->p(), x.v->p(), x.p->n, first, i == 0 ? 0.5 : 1, i == 2 ? 0.1 : 0});
        first += x.p->n;
      }
      return AgAdamW{list.data(), int64_t(list.size()), 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now.p()),
                     mode ? static_cast<const double*>(norm.p()) : nullptr, mode == 2 ? 1.0 : 0, uint64_t(77) << 33};
    });
    for (size_t i = 0; i < all.size(); i++) {
      if (compact[i]) compare_compact(all[i]);
      check(mode != 3 || all[i].p->results[1] == all[i].p->host, "a norm that is not finite changed a parameter");
    }
    t.clear();
  }
}

// The compact state rounds by adding to the bits, and a GPU's NaN has all of them set.
void test_adamw_nan(Test& t) {
  if (t.dt != AG_BF16) return;
  constexpr int64_t n = 9;
  const uint32_t machine_nan = 0x7fffffffu;
  Moments x = tensor(t, AG_BF16, AG_F32, true, n, 0);
  x.master->is_bits = true;
  for (int64_t i = 0; i < n; i++) std::memcpy(&x.g->host[size_t(i) * 4], &machine_nan, 4);
  AgAdamWStep step{1e-2, 1};
  Buffer& now = t.in(AG_F64, 2);
  std::memcpy(now.host.data(), &step, sizeof step);
  AgAdamWTensor one;
  t.run("adamw, NaN", &AgBackend::adamw, [&] {
    one = {x.p->p(), AG_BF16, x.g->p(), AG_F32, AG_STATE_COMPACT, x.master->p(), x.m->p(), x.v->p(), n, 0, 1, 0.01};
    return AgAdamW{&one, 1, 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now.p()), nullptr, 0, 0};
  });
  for (const Buffer* b : {x.p, x.m, x.v})
    for (int64_t i = 0; i < n; i++)
      check(std::isnan(b->cpu(i)) && std::isnan(b->device(i)), "NaN: element %lld became %g on the CPU, %g on the device", (long long)i, b->cpu(i), b->device(i));
}

void test_adamw_many(Test& t) {  // more tensors than one launch takes
  if (small()) return;
  std::vector<Moments> all;
  for (int i = 0; i < 300; i++) all.push_back(tensor(t, AG_F32, t.dt, false, 3, 0));
  AgAdamWStep step{1e-2, 1};
  Buffer& now = t.in(AG_F64, 2);
  std::memcpy(now.host.data(), &step, sizeof step);
  std::vector<AgAdamWTensor> list;
  t.run("adamw of 300 tensors", &AgBackend::adamw, [&] {
    list.clear();
    for (const Moments& x : all)
      list.push_back({x.p->p(), AG_F32, x.g->p(), x.g->dt, AG_STATE_FULL, nullptr, x.m->p(), x.v->p(), 3, 0, 1, 0.01});
    return AgAdamW{list.data(), 300, 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now.p()), nullptr, 0, 0};
  });
}

// ---- refusals, services -----------------------------------------------------------------------------
void test_refusals(Test& t) {
  double v[4] = {0};
  const AgDtype no = AG_F64;
  t.refuse("unary", &AgBackend::unary, AgUnary{AG_GELU, v, v, 1, no, 1}, AG_INVALID);
  t.refuse("random", &AgBackend::random, AgRandom{v, no, 1, AG_UNIFORM, 0, 1, 0, 0}, AG_INVALID);
  t.refuse("softmax", &AgBackend::softmax, AgSoftmax{v, v, 1, 1, no}, AG_INVALID);
  t.refuse("col_sum", &AgBackend::col_sum, AgColSum{{v, AG_I64, 0}, v, 1, 1, 1, t.dt, 1, nullptr}, AG_INVALID);
  t.refuse("norm", &AgBackend::norm, AgNorm{v, v, v, v, v, v, 1, 1, 1e-5, no}, AG_INVALID);
  const AgSpan span{v, AG_I32, 1};
  t.refuse("sum_squares", &AgBackend::sum_squares, AgSumSquares{&span, 1, v}, AG_INVALID);
  AgAdamWTensor tensor{v, AG_F32, v, AG_F32, AG_STATE_COMPACT, nullptr, v, v, 1, 0, 1, 0};
  t.refuse("adamw", &AgBackend::adamw, AgAdamW{&tensor, 1, 0.9, 0.999, 1e-8, nullptr, nullptr, 0, 0}, AG_INVALID);
  tensor.dt_p = no;
  t.refuse("adamw", &AgBackend::adamw, AgAdamW{&tensor, 1, 0.9, 0.999, 1e-8, nullptr, nullptr, 0, 0}, AG_INVALID);
}

// Every entry of the table is there.
void test_table(Test& t) {
  constexpr size_t kHead = 2 * sizeof(int32_t), kEntries = (sizeof(AgBackend) - kHead) / sizeof(void*);
  for (const AgBackend* b : {&t.cpu, &t.device}) {
    void* entries[kEntries];
    std::memcpy(entries, reinterpret_cast<const char*>(b) + kHead, sizeof entries);
    for (size_t i = 0; i < kEntries; i++) check(entries[i], "entry %zu of the %s table is missing", i, b == &t.cpu ? "CPU" : "device");
  }
}

// More than two pinned pieces, and not whole ones; then pinned memory over the two copying streams with events between, as the offloaded optimizer
// does it. The compute stream doubles the numbers in the middle.
void test_copies(Test& t) {
  const AgBackend& b = t.device;
  const int64_t n = 5 * (1 << 20) + 3, bytes = n * 4;
  std::vector<float> there(static_cast<size_t>(n)), back(there.size());
  for (int64_t i = 0; i < n; i++) there[size_t(i)] = float(i % 8191);
  void *p = nullptr, *pinned = nullptr, *up = nullptr, *done = nullptr;
  AgCtx ctx[3] = {};
  for (int i = 0; i < 3; i++) ctx[i].stream = b.stream(AgStream(i));
  AgCtx &compute = ctx[AG_STREAM_COMPUTE], &upload = ctx[AG_STREAM_UPLOAD], &download = ctx[AG_STREAM_DOWNLOAD];
  bool ok = b.alloc(nullptr, bytes, &p) == AG_OK && b.alloc_host(bytes, &pinned) == AG_OK && b.event_create(&up) == AG_OK && b.event_create(&done) == AG_OK;
  check(ok, "memory and events for copies");
  if (!ok) return;
  const AgUnary twice{AG_SCALE, p, p, n, AG_F32, 2.0};
  auto compare = [&](const float* got, float factor, const char* way) {
    int64_t at = 0;
    while (at < n && got[at] == factor * there[size_t(at)]) at++;
    check(at == n, "%s: number %lld of %lld", way, (long long)at, (long long)n);
  };
  ok = b.copy(&compute, p, there.data(), bytes) == AG_OK && b.unary(&compute, &twice) == AG_OK && b.copy(&compute, back.data(), p, bytes) == AG_OK &&
       b.synchronize(&compute) == AG_OK;
  check(ok, "ordinary memory: %s", compute.error);
  compare(back.data(), 2, "ordinary memory");
  std::memcpy(pinned, there.data(), size_t(bytes));
  ok = b.copy(&upload, p, pinned, bytes) == AG_OK && b.event_record(&upload, up) == AG_OK && b.event_wait(&compute, up) == AG_OK &&
       b.unary(&compute, &twice) == AG_OK && b.unary(&compute, &twice) == AG_OK && b.event_record(&compute, done) == AG_OK &&
       b.event_wait(&download, done) == AG_OK && b.copy(&download, pinned, p, bytes) == AG_OK && b.synchronize(&download) == AG_OK;
  check(ok, "pinned memory: %s%s%s", upload.error, compute.error, download.error);
  compare(static_cast<float*>(pinned), 4, "pinned memory");
  b.event_destroy(up);
  b.event_destroy(done);
  b.free_host(pinned);
  b.free(nullptr, p);
}

// A graph keeps the launches and their arguments; what is in device memory is read when it runs.
void test_services(Test& t) {
  const AgBackend& b = t.device;
  AgCapabilities c;
  b.capabilities(&c);
  check(!std::strcmp(c.name, "cuda") && c.level[0] && c.device[0], "capabilities");
  for (int64_t bytes : {0, 1, 64, 1000003}) {
    void* p = nullptr;
    check(b.alloc(nullptr, bytes, &p) == AG_OK && reinterpret_cast<uintptr_t>(p) % 64 == 0, "alloc %lld", (long long)bytes);
    b.free(nullptr, p);
  }
  void *p = nullptr, *event = nullptr, *graph = nullptr;
  check(b.alloc(nullptr, int64_t(1) << 60, &p) == AG_OUT_OF_MEMORY, "alloc of 2^60 bytes");
  AgCtx ctx{};
  check(b.event_create(&event) == AG_OK && b.event_record(&ctx, event) == AG_OK && b.event_wait(&ctx, event) == AG_OK, "events: %s", ctx.error);
  b.event_destroy(event);
  check(b.alloc(nullptr, 4096, &p) == AG_OK, "alloc after a refusal");
  float host[2] = {3, 0};
  check(b.copy(&ctx, p, host, 4) == AG_OK, "copy: %s", ctx.error);
  host[0] = 100;  // the source may change once copy has returned
  check(b.graph_begin(&ctx) == AG_OK, "graph_begin: %s", ctx.error);
  const AgUnary twice{AG_SCALE, p, p, 1, AG_F32, 2.0};
  check(b.unary(&ctx, &twice) == AG_OK && b.graph_end(&ctx, &graph) == AG_OK, "recording: %s", ctx.error);
  for (int i = 0; i < 3; i++) check(b.graph_launch(&ctx, graph) == AG_OK, "graph_launch: %s", ctx.error);
  check(b.copy(&ctx, &host[1], p, 4) == AG_OK && b.synchronize(&ctx) == AG_OK && host[1] == 24, "three launches of a graph: expected 24, got %g", host[1]);
  b.graph_destroy(graph);
  b.free(nullptr, p);
}

const Registered kCases[] = {{"fill", test_fill}, {"copy2d", test_copy2d}, {"cast", test_cast}, {"random", test_random},
  {"unary", test_unary}, {"binary", test_binary}, {"silu_mul", test_silu_mul}, {"rope", test_rope}, {"patchify", test_patchify},
  {"col_sum", test_col_sum}, {"sum", test_sum}, {"sum_squares", test_sum_squares}, {"rows", test_rows}, {"scatter_add", test_scatter_add},
  {"norm", test_norm}, {"norm_grad", test_norm_grad}, {"softmax", test_softmax}, {"cross_entropy", test_cross_entropy}, {"sample", test_sample},
  {"adamw", test_adamw}, {"adamw_many", test_adamw_many}, {"adamw_nan", test_adamw_nan}, {"refusals", test_refusals}, {"table", test_table}, {"services", test_services}, {"copies", test_copies}};

}  // namespace
}  // namespace cuda_test

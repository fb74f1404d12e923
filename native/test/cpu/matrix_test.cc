#include "matrix_test.h"

namespace cpu_test {

void compare(const char* what, const Buffer& got, const std::vector<double>& want, double absolute, double relative) {
  check(int64_t(want.size()) == got.n, text(what, ": size"));
  check(got.intact(), text(what, ": wrote beyond the end"));
  double worst = 0;
  int64_t where = -1;
  for (int64_t i = 0; i < got.n; i++) {
    double g = got.at(i), w = want[size_t(i)];
    if (g == w) continue;
    double excess = std::fabs(g - w) / (absolute + relative * std::fabs(w));
    if (!(excess <= worst)) {
      worst = excess;
      where = i;
      if (std::isnan(excess)) break;
    }
  }
  if (where >= 0)
    check(worst <= 1, text(what, "[", where, "]: expected ", want[size_t(where)], ", got ", got.at(where),
                           ", error/tolerance ", worst));
}

void on_both(const std::vector<Buffer*>& outputs, const std::function<void()>& body) {
  std::vector<std::vector<unsigned char>> before, first;
  for (Buffer* b : outputs) before.push_back(b->bytes);
  ag_set_threads(1);
  body();
  for (size_t i = 0; i < outputs.size(); i++) {
    first.push_back(outputs[i]->bytes);
    outputs[i]->bytes = before[i];
  }
  ag_set_threads(2);
  body();
  for (size_t i = 0; i < outputs.size(); i++)
    check(outputs[i]->bytes == first[i], text("output ", i, " depends on the threads"));
}

double activation(AgUnaryOp op, double x) {
  switch (op) {
    case AG_GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case AG_GELU_TANH: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case AG_QUICK_GELU: return x / (1 + std::exp(-1.702 * x));
    case AG_SILU: return x / (1 + std::exp(-x));
    default: return x;
  }
}

std::vector<int32_t> offsets_of(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> o = {0};
  for (int32_t n : lengths) o.push_back(o.back() + n);
  return o;
}

Reference attention_reference(const Attended& s, double scale, int64_t ldq, int64_t ldk, const std::vector<double>& q,
                              const std::vector<double>& k, const std::vector<double>& v,
                              const std::vector<double>& d_o, const std::vector<double>& old) {
  std::vector<int32_t> qo = offsets_of(s.nq), ko = offsets_of(s.nk);
  Reference r;
  r.o = old;
  r.dq = old;
  r.dk.assign(k.size(), 7);
  r.dv.assign(v.size(), 7);
  r.lse.assign(size_t(qo.back() * s.heads), 0);
  auto clean = [&](std::vector<double>& x, int64_t rows, int64_t ld, int64_t cols) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) x[size_t(i * ld + j)] = 0;
  };
  clean(r.o, qo.back(), ldq, s.heads * s.dim);
  clean(r.dq, qo.back(), ldq, s.heads * s.dim);
  clean(r.dk, ko.back(), ldk, s.kv_heads * s.dim);
  clean(r.dv, ko.back(), ldk, s.kv_heads * s.dim);
  for (size_t b = 0; b < s.nq.size(); b++)
    for (int64_t h = 0; h < s.heads; h++)
      for (int64_t i = 0; i < s.nq[b]; i++) {
        int64_t row = qo[b] + i,
                seen = s.causal ? std::max<int64_t>(0, std::min<int64_t>(s.nk[b], i + s.nk[b] - s.nq[b] + 1)) : s.nk[b];
        const double* qi = &q[size_t(row * ldq + h * s.dim)];
        double* oi = &r.o[size_t(row * ldq + h * s.dim)];
        auto at = [&](auto& x, int64_t j) {
          return &x[size_t((ko[b] + j) * ldk + h / (s.heads / s.kv_heads) * s.dim)];
        };
        std::vector<double> p(static_cast<size_t>(seen));
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < seen; j++) {
          double x = 0;
          for (int64_t d = 0; d < s.dim; d++) x += qi[d] * at(k, j)[d];
          p[size_t(j)] = x * scale;
          top = std::max(top, x * scale);
        }
        for (double& x : p) total += x = std::exp(x - top);
        r.lse[size_t(row * s.heads + h)] = seen ? top + std::log(total) : -INFINITY;
        double delta = 0;
        for (int64_t j = 0; j < seen; j++) {
          p[size_t(j)] /= total;
          for (int64_t d = 0; d < s.dim; d++) oi[d] += p[size_t(j)] * at(v, j)[d];
        }
        const double* doi = &d_o[size_t(row * ldq + h * s.dim)];
        for (int64_t d = 0; d < s.dim; d++) delta += oi[d] * doi[d];
        for (int64_t j = 0; j < seen; j++) {
          double dp = 0;
          for (int64_t d = 0; d < s.dim; d++) dp += doi[d] * at(v, j)[d];
          double ds = p[size_t(j)] * (dp - delta) * scale;
          for (int64_t d = 0; d < s.dim; d++) {
            at(r.dv, j)[d] += p[size_t(j)] * doi[d];
            at(r.dk, j)[d] += ds * qi[d];
            r.dq[size_t(row * ldq + h * s.dim + d)] += ds * at(k, j)[d];
          }
        }
      }
  return r;
}

}  // namespace cpu_test

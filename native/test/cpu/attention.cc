// Attention over packed sequences, its gradient against that of a reference, and the reference against finite
// differences.
#include "matrix_test.h"

namespace cpu_test {
namespace {

void test_attention(const Level& l, const Attended& s, AgDtype dt) {
  std::vector<int32_t> qo = offsets_of(s.nq), ko = offsets_of(s.nk);
  where = text(l.name, " attention ", name_of(dt), s.causal ? " causal" : " full", " heads ", s.heads, "/", s.kv_heads,
               " dim ", s.dim, " batch ", s.nq.size(), " tokens ", qo.back(), " keys ", ko.back(), " gap ", s.gap);
  int64_t ldq = s.heads * s.dim + s.gap, ldk = s.kv_heads * s.dim + s.gap;
  Buffer q = Buffer::random(dt, qo.back() * ldq, 2), k = Buffer::random(dt, ko.back() * ldk, 2),
         v = Buffer::random(dt, ko.back() * ldk);
  Buffer d_o = Buffer::random(dt, q.n), o(dt, q.n, 7), dq(dt, q.n, 7), dk(dt, k.n, 7), dv(dt, k.n, 7);
  Buffer lse(acc_of(dt), qo.back() * s.heads);
  AgAttention a{};
  a.q = q.p(), a.k = k.p(), a.v = v.p(), a.o = o.p(), a.lse = lse.p();
  a.ldq = a.ldo = ldq, a.ldk = a.ldv = ldk;
  a.q_offsets = qo.data(), a.k_offsets = ko.data();
  a.batch = int64_t(s.nq.size()), a.heads = s.heads, a.kv_heads = s.kv_heads, a.dim = s.dim;
  a.q_tokens = qo.back(), a.k_tokens = ko.back();
  a.scale = 1 / std::sqrt(double(s.dim)), a.causal = s.causal, a.dt = dt;
  const AgAttentionGrad g{a, d_o.p(), dq.p(), dk.p(), dv.p()};
  Reference r = attention_reference(s, a.scale, ldq, ldk, q.all(), k.all(), v.all(), d_o.all(), o.all());
  double base = dt == AG_F64   ? 1e-13
                : dt == AG_F32 ? 3e-6
                               : 4e-3,
         rel = dt == AG_F64   ? 1e-12
               : dt == AG_F32 ? 3e-6
                              : 8e-3;
  on_both({&o, &lse}, [&] { launch("attention", l.b.attention, a); });
  compare("o", o, r.o, base, rel);
  compare("lse", lse, r.lse, dt == AG_F64 ? 1e-13 : 2e-6, dt == AG_F64 ? 1e-13 : 1e-6);
  on_both({&dq, &dk, &dv}, [&] { launch("attention_grad", l.b.attention_grad, g); });
  double grad = base * 4 * (dt == AG_BF16 ? 2 : 1);
  compare("dq", dq, r.dq, grad, rel * 2);
  compare("dk", dk, r.dk, grad * 2, rel * 2);
  compare("dv", dv, r.dv, grad, rel * 2);
}

// The reference's gradients against finite differences of its own forward pass.
void test_attention_reference() {
  where = "attention reference";
  Attended s{{3, 2}, {4, 2}, 2, 1, 3, true, 0};
  int64_t ldq = 6, ldk = 3;
  std::vector<double> x[4];
  for (int i = 0; i < 4; i++)
    for (int64_t n = (i == 1 || i == 2 ? 6 * ldk : 5 * ldq); n > 0; n--) x[i].push_back(uniform());
  auto value = [&] {
    Reference r = attention_reference(s, 0.6, ldq, ldk, x[0], x[1], x[2], x[3], x[3]);
    double v = 0;
    for (size_t i = 0; i < r.o.size(); i++) v += r.o[i] * x[3][i];
    return v;
  };
  Reference r = attention_reference(s, 0.6, ldq, ldk, x[0], x[1], x[2], x[3], x[3]);
  const std::vector<double>* grads[] = {&r.dq, &r.dk, &r.dv};
  for (int w = 0; w < 3; w++)
    for (size_t i = 0; i < x[w].size(); i++) {
      double keep = x[w][i];
      x[w][i] = keep + 1e-5;
      double up = value();
      x[w][i] = keep - 1e-5;
      double slope = (up - value()) / 2e-5;
      x[w][i] = keep;
      check(std::fabs(slope - (*grads[w])[i]) < 1e-8,
            text("gradient ", w, " element ", i, ": ", slope, " against ", (*grads[w])[i]));
    }
}

void test_attentions(const Level& l) {
  const Attended shapes[] = {{{1}, {1}, 1, 1, 1, true, 0},       {{}, {}, 2, 1, 8, true, 0},
                             {{0, 2}, {0, 3}, 2, 1, 8, true, 0}, {{3, 2}, {0, 2}, 2, 2, 5, false, 3},
                             {{5}, {2}, 1, 1, 16, true, 0},      {{1, 7, 20}, {1, 9, 20}, 4, 2, 12, true, 4},
                             {{33}, {33}, 2, 1, 32, true, 0},    {{64, 65}, {64, 65}, 2, 2, 64, true, 0},
                             {{130}, {130}, 3, 1, 40, true, 1},  {{70}, {300}, 2, 1, 72, true, 0},
                             {{200}, {140}, 1, 1, 33, true, 0},  {{129, 1}, {257, 128}, 2, 2, 24, false, 0},
                             {{600}, {600}, 1, 1, 64, true, 0},  {{100, 520}, {530, 90}, 1, 1, 16, false, 2}};
  for (const Attended& s : shapes)
    for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
      if (elsewhere(l, dt)) continue;
      test_attention(l, s, dt);
    }
}

const Cases kCases("attention", test_attentions), kReference("attention", test_attention_reference);

}  // namespace
}  // namespace cpu_test

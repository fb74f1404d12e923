// The optimizer.
#include "cpu_test.h"

namespace cpu_test {
namespace {

// The 32 bits of a bf16 parameter's f32 value in the compact state.
double compact_value(const Data& p, const Data& rest, int64_t i) {
  uint32_t bits = (uint32_t(static_cast<const uint16_t*>(p.p())[i]) << 16) +
                  uint32_t(int32_t(static_cast<const int16_t*>(rest.p())[i]));
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
    return {p.p(), p.dt,  g.p(), g.dt,  state, p.dt == AG_BF16 ? master.p() : nullptr,
            m.p(), v.p(), p.n,   first, lr,    decay};
  }
};

std::vector<AdamCase> adam_cases() {
  std::vector<AdamCase> cases;
  for (AgDtype dg : {AG_F32, AG_BF16})
    for (int64_t n : {0, 1, 37, 70001}) {
      for (AgDtype dp : {AG_F32, AG_BF16})
        cases.emplace_back(dp, dg, AG_STATE_FULL, n, double(1 + n % 3), n % 2 ? 0.1 : 0);
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
    run(f.b.adamw, AgAdamW{tensors.data(), int64_t(tensors.size()), b1, b2, eps, &now, &squared, 1, 7});
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

// Rounding of the compact moments is right on average, which rounding to the nearest would not be here: each update
// moves v by less than half a unit of bf16.
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
    run(f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 3});
    want = 0.999 * want + 0.001 * 1.21;
  }
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += v.get(i) / double(n);
  check(std::fabs(mean - want) < 2e-4, "mean of v: expected %.6f, got %.6f", want, mean);  // 5 standard deviations
  double squared = INFINITY;
  AgAdamWStep now{1, 21};
  Data before = p, v_before = v;
  run(f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, &squared, 1, 3});
  check(!std::memcmp(before.p(), p.p(), size_t(n) * 2) && !std::memcmp(v_before.p(), v.p(), size_t(n) * 2),
        "a norm that is not finite changed something");
}

const Cases kCases("adamw", {{"adamw", test_adamw}, {"adamw_rounding", test_adamw_rounding}});

}  // namespace
}  // namespace cpu_test

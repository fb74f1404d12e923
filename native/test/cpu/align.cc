// alignMix, its gradients against finite differences (f64).
#include "matrix_test.h"

namespace cpu_test {
namespace {

struct MixCase {
  int64_t images, patches, features, hidden, levels, gate_hidden;
  AgMixMode mode;
  bool projector, bias;
};

enum MixInput { X, W, B, EMBED, TABLE, GW0, GB0, GW1, GB1, INPUTS };
const char* const kMixNames[] = {"x", "w", "b", "embed", "table", "gw0", "gb0", "gw1", "gb1"};

// A batch: a text-only sample, then samples with one picture each.
struct Mix {
  MixCase c;
  int64_t vocab = 11;
  std::vector<int32_t> token, image_row, align_row, gate_ids, gate_offsets = {0}, level;
  std::vector<double> in[INPUTS], coef, d_out;
  double global = 1;

  explicit Mix(const MixCase& mix) : c(mix) {
    token = {4, 1, 4};
    for (int64_t m = 0; m < c.images; m++) {
      token.push_back(1);
      align_row.push_back(int32_t(token.size()));
      token.push_back(AG_ALIGN_TOKEN);
      image_row.push_back(int32_t(token.size()));
      for (int64_t p = 0; p < c.patches; p++) token.push_back(AG_IMAGE_TOKEN);
      for (int64_t i = 0; i < m % 4; i++) {  // the first picture has no text: its mean is zero
        token.push_back(int32_t(below(vocab)));
        gate_ids.push_back(token.back());
      }
      if (m % 4 == 2) gate_ids.push_back(gate_ids.back());
      gate_offsets.push_back(int32_t(gate_ids.size()));
      level.push_back(int32_t(below(c.levels)));
    }
    double sizes[INPUTS] = {double(c.images * c.patches * c.features),
                            double(c.hidden * c.features),
                            double(c.hidden),
                            double(vocab * c.hidden),
                            double(c.levels * c.hidden),
                            double(c.gate_hidden * c.patches),
                            double(c.gate_hidden),
                            double((c.levels - 1) * c.gate_hidden),
                            double(c.levels - 1)};
    for (int i = 0; i < INPUTS; i++)
      for (double n = 0; n < sizes[i]; n++) in[i].push_back(uniform());
    for (int64_t i = 0; i < c.images * c.levels; i++) coef.push_back(uniform());
    for (size_t i = 0; i < token.size() * size_t(c.hidden); i++) d_out.push_back(uniform());
    if (c.images % 2) global = 0;
  }
};

// The tensors of one run, in one dtype.
struct MixRun {
  Buffer in[INPUTS], out, mean, dots, pre, logits, coef, d_out, grad[INPUTS];
  AgAlignMix a{};
  AgAlignMixGrad g{};
  MixRun(const Mix& x, AgDtype dt, AgDtype dt_grad, bool accumulate) {
    const MixCase& c = x.c;
    bool gate = c.mode == AG_MIX_GATE;
    AgDtype acc = acc_of(dt);
    auto fill = [](AgDtype d, const std::vector<double>& v) {
      Buffer b(d, int64_t(v.size()), 0, 0);
      for (size_t i = 0; i < v.size(); i++) b.set(int64_t(i), v[i]);
      return b;
    };
    for (int i = 0; i < INPUTS; i++) {
      in[i] = fill(dt, x.in[i]);
      grad[i] = Buffer(i == X ? dt : dt_grad, in[i].n, 0.5);
    }
    out = Buffer(dt, int64_t(x.token.size()) * c.hidden, 7);
    mean = Buffer(acc, gate ? c.images * c.hidden : 0);
    dots = Buffer(acc, gate ? c.images * c.patches : 0);
    pre = Buffer(acc, gate ? c.images * c.gate_hidden : 0);
    logits = Buffer(acc, gate ? c.images * (c.levels - 1) : 0);
    coef = Buffer(acc, int64_t(x.coef.size()));
    for (int64_t i = 0; i < coef.n; i++) coef.set(i, x.coef[size_t(i)]);
    d_out = fill(dt, x.d_out);
    a.tokens = int64_t(x.token.size()), a.hidden = c.hidden, a.vocab = x.vocab, a.images = c.images,
    a.patches = c.patches;
    a.features = c.features, a.levels = c.levels, a.gate_hidden = c.gate_hidden;
    a.x = in[X].p(), a.embed = in[EMBED].p(), a.table = in[TABLE].p();
    if (c.projector) a.w = in[W].p();
    if (c.projector && c.bias) a.b = in[B].p();
    a.gw0 = in[GW0].p(), a.gb0 = in[GB0].p(), a.gw1 = in[GW1].p(), a.gb1 = in[GB1].p();
    a.token = x.token.data(), a.image_row = x.image_row.data(), a.align_row = x.align_row.data();
    if (gate) a.gate_ids = x.gate_ids.data(), a.gate_offsets = x.gate_offsets.data();
    a.level = x.level.data(), a.mode = c.mode, a.global = x.global, a.dt = dt;
    a.out = out.p(), a.mean = mean.p(), a.dots = dots.p(), a.gate_pre = pre.p(), a.logits = logits.p(),
    a.coef = coef.p();
    g.forward = a, g.d_out = d_out.p(), g.dx = grad[X].p();
    AgGrad* slots[INPUTS] = {nullptr, &g.dw, &g.db, &g.d_embed, &g.d_table, &g.d_gw0, &g.d_gb0, &g.d_gw1, &g.d_gb1};
    for (int i = W; i < INPUTS; i++) {
      bool present = (i != W || a.w) && (i != B || a.b) && (i < GW0 || gate);
      *slots[i] = AgGrad{present ? grad[i].p() : nullptr, dt_grad, accumulate};
    }
  }
  bool has(int i) const {
    const AgGrad* slots[INPUTS] = {nullptr,  &g.dw,    &g.db,    &g.d_embed, &g.d_table,
                                   &g.d_gw0, &g.d_gb0, &g.d_gw1, &g.d_gb1};
    return i == X || slots[i]->p;
  }
};

// The definition in arguments.h, line by line.
void mix_reference(const Mix& x, std::vector<double>& out, std::vector<double>& mean, std::vector<double>& dots,
                   std::vector<double>& pre, std::vector<double>& logits, std::vector<double>& coef) {
  const MixCase& c = x.c;
  int64_t H = c.hidden, P = c.patches, G = c.gate_hidden, L = c.levels - 1;
  out.assign(x.token.size() * size_t(H), 7);
  coef = x.coef;
  auto in = [&](int i, int64_t at) { return x.in[i][size_t(at)]; };
  for (int64_t m = 0; m < c.images; m++) {
    double* rows = out.data() + x.image_row[size_t(m)] * H;
    double* co = coef.data() + m * c.levels;
    for (int64_t p = 0; p < P; p++)
      for (int64_t h = 0; h < H; h++) {
        double s = c.projector ? (c.bias ? in(B, h) : 0) : in(X, (m * P + p) * H + h);
        for (int64_t f = 0; c.projector && f < c.features; f++)
          s += in(X, (m * P + p) * c.features + f) * in(W, h * c.features + f);
        rows[p * H + h] = s;
      }
    if (c.mode == AG_MIX_LEVEL)
      for (int64_t l = 0; l <= L; l++) co[l] = l == x.level[size_t(m)];
    if (c.mode == AG_MIX_GATE) {
      int64_t from = x.gate_offsets[size_t(m)], n = x.gate_offsets[size_t(m) + 1] - from;
      std::vector<double> mu(size_t(H), 0), d(size_t(P), 0), hidden(size_t(G), 0);
      for (int64_t j = 0; j < n; j++)
        for (int64_t h = 0; h < H; h++) mu[size_t(h)] += in(EMBED, x.gate_ids[size_t(from + j)] * H + h) / double(n);
      for (int64_t p = 0; p < P; p++)
        for (int64_t h = 0; h < H; h++) d[size_t(p)] += rows[p * H + h] * mu[size_t(h)];
      for (int64_t g = 0; g < G; g++) {
        double s = in(GB0, g);
        for (int64_t p = 0; p < P; p++) s += in(GW0, g * P + p) * d[size_t(p)];
        pre.push_back(s);
        hidden[size_t(g)] = activation(AG_GELU, s);
      }
      double total = 0;
      for (int64_t l = 0; l < L; l++) {
        double s = in(GB1, l);
        for (int64_t g = 0; g < G; g++) s += in(GW1, l * G + g) * hidden[size_t(g)];
        logits.push_back(s);
        total += co[l] = std::exp(s);
      }
      for (int64_t l = 0; l < L; l++) co[l] /= total;
      co[L] = x.global;
      mean.insert(mean.end(), mu.begin(), mu.end());
      dots.insert(dots.end(), d.begin(), d.end());
    }
    for (int64_t h = 0; h < H; h++) {
      double s = 0;
      for (int64_t l = 0; l <= L; l++) s += co[l] * in(TABLE, l * H + h);
      out[size_t(x.align_row[size_t(m)] * H + h)] = s;
    }
  }
  for (size_t t = 0; t < x.token.size(); t++)
    for (int64_t h = 0; h < H && x.token[t] >= 0; h++) out[t * size_t(H) + size_t(h)] = in(EMBED, x.token[t] * H + h);
}

double mix_loss(const Mix& x) {
  std::vector<double> out, mean, dots, pre, logits, coef;
  mix_reference(x, out, mean, dots, pre, logits, coef);
  double s = 0;
  for (size_t i = 0; i < out.size(); i++) s += out[i] * x.d_out[i];
  return s;
}

void round_to(AgDtype dt, std::vector<double>& v) {
  Buffer b(dt, 1);
  for (double& e : v) {
    b.set(0, e);
    e = b.at(0);
  }
}

void test_mix(const Level& l, MixCase c, AgDtype dt, AgDtype dt_grad, bool accumulate) {
  where =
      text(l.name, " align_mix ", name_of(dt), " grad ", name_of(dt_grad), " mode ", int(c.mode), " images ", c.images,
           " patches ", c.patches, " features ", c.features, " hidden ", c.hidden, " levels ", c.levels, " gate ",
           c.gate_hidden, c.projector ? " projector" : "", c.bias ? " bias" : "", accumulate ? " accumulate" : "");
  if (!c.projector) c.features = c.hidden;
  Mix x(c);
  for (auto& v : x.in) round_to(dt, v);
  round_to(dt, x.d_out);
  round_to(acc_of(dt), x.coef);
  double width = std::sqrt(double(c.features * c.hidden)) * std::sqrt(double(c.patches) + 1);
  for (auto* v : {&x.in[GW0]})
    for (double& e : *v) e /= width;  // keeps the gate out of saturation
  round_to(dt, x.in[GW0]);
  std::vector<double> out, mean, dots, pre, logits, coef;
  mix_reference(x, out, mean, dots, pre, logits, coef);
  MixRun run(x, dt, dt_grad, accumulate);
  double e = dt == AG_F64 ? 1e-13 : dt == AG_F32 ? 2e-6 : 8e-3, scale = std::sqrt(double(c.features + 1));
  on_both({&run.out, &run.mean, &run.dots, &run.pre, &run.logits, &run.coef},
          [&] { launch("align_mix", l.b.align_mix, run.a); });
  compare("out", run.out, out, e * scale, e);
  if (c.mode == AG_MIX_GATE) {
    compare("mean", run.mean, mean, e, e);
    compare("dots", run.dots, dots, e * scale * std::sqrt(double(c.hidden)), e);
    compare("gate_pre", run.pre, pre, 4 * e, 4 * e);
    compare("logits", run.logits, logits, 8 * e * std::sqrt(double(c.gate_hidden)), 4 * e);
  }
  compare("coef", run.coef, coef, 8 * e * std::sqrt(double(c.gate_hidden)), 4 * e);
  std::vector<Buffer*> grads;
  for (Buffer& g : run.grad) grads.push_back(&g);
  on_both(grads, [&] { launch("align_mix_grad", l.b.align_mix_grad, run.g); });
  for (int i = 0; i < INPUTS; i++) {
    if (!run.has(i)) {
      compare(text("unwanted d_", kMixNames[i]).c_str(), run.grad[i], std::vector<double>(size_t(run.grad[i].n), 0.5),
              0, 0);
      continue;
    }
    std::vector<double> want;
    double most = 1;
    for (double& v : x.in[i]) {
      double keep = v, up;
      v = keep + 1e-5;
      up = mix_loss(x);
      v = keep - 1e-5;
      want.push_back((up - mix_loss(x)) / 2e-5);
      v = keep;
      most = std::max(most, std::fabs(want.back()));
      if (accumulate && i != X) want.back() += 0.5;
    }
    double tolerance = dt == AG_F64 ? 2e-8 : dt == AG_F32 ? 1e-5 : 2e-2;
    compare(text("d_", kMixNames[i]).c_str(), run.grad[i], want, tolerance * most, unit(dt_grad) * 2);
  }
}

// No output wanted: nothing written; and each alone equals what it is among all.
void test_mix_optional(const Level& l, const MixCase& c) {
  where = text(l.name, " align_mix with gradients left out, mode ", int(c.mode));
  Mix x(c);
  MixRun all(x, AG_F32, AG_F32, false);
  launch("align_mix", l.b.align_mix, all.a);
  launch("align_mix_grad", l.b.align_mix_grad, all.g);
  for (int only = 0; only < INPUTS; only++) {
    MixRun one(x, AG_F32, AG_F32, false);
    launch("align_mix", l.b.align_mix, one.a);
    AgGrad* slots[INPUTS] = {nullptr,      &one.g.dw,    &one.g.db,    &one.g.d_embed, &one.g.d_table,
                             &one.g.d_gw0, &one.g.d_gb0, &one.g.d_gw1, &one.g.d_gb1};
    for (int i = W; i < INPUTS; i++)
      if (i != only) slots[i]->p = nullptr;
    if (only != X) one.g.dx = nullptr;
    launch("align_mix_grad", l.b.align_mix_grad, one.g);
    for (int i = 0; i < INPUTS; i++)
      compare(kMixNames[i], one.grad[i],
              i == only ? all.grad[i].all() : std::vector<double>(size_t(one.grad[i].n), 0.5), 0, 0);
  }
}

void test_mixes(const Level& l) {
  const MixCase cases[] = {
      {0, 3, 4, 5, 3, 2, AG_MIX_GATE, true, true},   {0, 3, 4, 5, 3, 2, AG_MIX_LEVEL, true, true},
      {1, 1, 1, 1, 2, 1, AG_MIX_GATE, true, true},   {4, 3, 5, 7, 4, 6, AG_MIX_GATE, true, true},
      {4, 3, 5, 7, 4, 6, AG_MIX_GATE, true, false},  {5, 4, 6, 6, 3, 5, AG_MIX_GATE, false, false},
      {3, 2, 5, 17, 8, 3, AG_MIX_LEVEL, true, true}, {3, 2, 17, 5, 1, 3, AG_MIX_LEVEL, false, false},
      {4, 5, 3, 9, 4, 3, AG_MIX_FIXED, true, true},  {2, 5, 16, 33, 8, 16, AG_MIX_GATE, true, true},
      {3, 9, 3, 4, 2, 20, AG_MIX_GATE, true, true}};
  for (const MixCase& c : cases)
    for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
      if (elsewhere(l, dt)) continue;
      test_mix(l, c, dt, dt == AG_BF16 ? AG_F32 : dt, false);
      test_mix(l, c, dt, dt, true);
    }
  for (AgMixMode mode : {AG_MIX_LEVEL, AG_MIX_GATE, AG_MIX_FIXED})
    test_mix_optional(l, {6, 150, 12, 40, 5, 9, mode, true, true});
}

const Cases kCases("align", test_mixes);

}  // namespace
}  // namespace cpu_test

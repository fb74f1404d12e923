// alignMix (cuda_test.h): the three mixes, with and without a projector, pictures without text, no pictures at all.
#include "cuda_test.h"

namespace cuda_test {
namespace {

struct Shape {
  int64_t images, patches, features, hidden, levels, gate_hidden;
  AgMixMode mode;
  bool projector, bias;
};

// A text-only sample, then samples with a picture each, some without text of their own.
struct Batch {
  std::vector<int32_t> token = {4, 1, 4}, image_row, align_row, gate_ids, gate_offsets = {0}, level;
  Batch(const Shape& s, int64_t vocab) {
    for (int64_t m = 0; m < s.images; m++) {
      token.push_back(1);
      align_row.push_back(int32_t(token.size()));
      token.push_back(AG_ALIGN_TOKEN);
      image_row.push_back(int32_t(token.size()));
      token.insert(token.end(), size_t(s.patches), AG_IMAGE_TOKEN);
      for (int64_t i = 0; i < m % 4; i++) {
        token.push_back(int32_t(below(vocab)));
        gate_ids.push_back(token.back());
      }
      if (m % 4 == 2) gate_ids.push_back(gate_ids.back());
      gate_offsets.push_back(int32_t(gate_ids.size()));
      level.push_back(int32_t(below(s.levels)));
    }
  }
};

enum Kind { kForward, kGradients, kAccumulated };

// dt_grad: of the parameters' gradients. `only`: the one gradient that is wanted, or -1.
void mix(Test& t, const Shape& s, Kind kind, AgDtype dt_grad, int only = -1, int64_t shift = 0) {
  const int64_t vocab = 11, rows = s.images * s.patches, L = s.levels - 1, G = s.gate_hidden, H = s.hidden,
                F = s.features;
  const bool gate = s.mode == AG_MIX_GATE;
  const Batch batch(s, vocab);
  const int64_t T = int64_t(batch.token.size()), on = gate ? s.images : 0;
  Buffer& x = t.in(rows * F).shifted(shift);
  Buffer &w = t.in(H * F), &b = t.in(H), &embed = t.in(vocab * H).shifted(shift), &table = t.in(s.levels * H);
  Buffer &gw0 = t.in(G * s.patches), &gb0 = t.in(G), &gw1 = t.in(L * G), &gb1 = t.in(L);
  Buffer &token = t.list(batch.token), &image_row = t.list(batch.image_row), &align_row = t.list(batch.align_row);
  Buffer &ids = t.list(batch.gate_ids), &offsets = t.list(batch.gate_offsets), &level = t.list(batch.level);
  auto state = [&](const char* name, AgDtype dt, int64_t n) -> Buffer& {
    return kind == kForward ? t.out(name, dt, n) : t.in(dt, n);
  };
  Buffer& out = state("out", t.dt, T * H);
  Buffer &mean = state("mean", AG_F32, on * H), &dots = state("dots", AG_F32, on * s.patches);
  Buffer &pre = state("gate_pre", AG_F32, on * G), &logits = state("logits", AG_F32, on * L);
  Buffer& coef =
      s.mode == AG_MIX_FIXED ? t.in(AG_F32, s.images * s.levels) : state("coef", AG_F32, s.images * s.levels);
  const int64_t sizes[] = {H * F, H, vocab * H, s.levels * H, G * s.patches, G, L * G, L};
  const char* const names[] = {"dw", "db", "d_embed", "d_table", "d_gw0", "d_gb0", "d_gw1", "d_gb1"};
  Buffer *d_out = nullptr, *dx = nullptr, *grads[8] = {};
  if (kind != kForward) {
    d_out = &t.in(T * H);
    if (only < 0 || only == 8) dx = &t.out("dx", rows * F);
    for (int i = 0; i < 8; i++) {
      const bool there = (i > 1 || s.projector) && (i != 1 || s.bias) && (i < 4 || gate) && (only < 0 || only == i);
      if (there)
        grads[i] =
            kind == kAccumulated ? &t.in_place(names[i], dt_grad, sizes[i]) : &t.out(names[i], dt_grad, sizes[i]);
    }
  }
  auto make = [&] {
    AgAlignMix a{};
    a.tokens = T, a.hidden = H, a.vocab = vocab, a.images = s.images, a.patches = s.patches, a.features = F,
    a.levels = s.levels;
    a.gate_hidden = G, a.x = x.p(), a.embed = embed.p(), a.table = table.p(), a.mode = s.mode, a.dt = t.dt;
    if (s.projector) a.w = w.p();
    if (s.projector && s.bias) a.b = b.p();
    a.token = token.i32(), a.image_row = image_row.i32(), a.align_row = align_row.i32(), a.level = level.i32();
    a.gate_ids = ids.i32(), a.gate_offsets = offsets.i32(), a.gate_entries = int64_t(batch.gate_ids.size());
    a.gw0 = gw0.p(), a.gb0 = gb0.p(), a.gw1 = gw1.p(), a.gb1 = gb1.p(), a.global = s.images % 2 ? 0 : 1;
    a.out = out.p(), a.mean = mean.p(), a.dots = dots.p(), a.gate_pre = pre.p(), a.logits = logits.p(),
    a.coef = coef.p();
    return a;
  };
  auto make_grad = [&] {
    AgAlignMixGrad g{};
    g.forward = make(), g.d_out = d_out->p();
    if (dx) g.dx = dx->p();
    AgGrad* const slots[] = {&g.dw, &g.db, &g.d_embed, &g.d_table, &g.d_gw0, &g.d_gb0, &g.d_gw1, &g.d_gb1};
    for (int i = 0; i < 8; i++)
      if (grads[i]) *slots[i] = AgGrad{grads[i]->p(), dt_grad, kind == kAccumulated};
    return g;
  };
  char label[160];
  snprintf(label, sizeof label, "%lld pictures of %lld rows, %lld -> %lld, mode %d%s, gradients %d",
           (long long)s.images, (long long)s.patches, (long long)F, (long long)H, int(s.mode),
           s.projector ? s.bias ? ", bias" : ", no bias" : ", no projector", int(kind));
  if (kind == kForward)
    t.run(label, &AgBackend::align_mix, make);
  else
    t.run(label, &AgBackend::align_mix_grad, make_grad);
  t.clear();
}

const Shape kShapes[] = {
    {3, 5, 24, 40, 8, 16, AG_MIX_GATE, true, true},     {1, 1, 1, 1, 2, 1, AG_MIX_GATE, true, true},
    {5, 9, 33, 35, 4, 7, AG_MIX_GATE, true, false},     {2, 6, 48, 48, 8, 256, AG_MIX_GATE, false, false},
    {4, 3, 16, 24, 8, 0, AG_MIX_LEVEL, true, true},     {2, 4, 21, 21, 3, 0, AG_MIX_LEVEL, false, false},
    {3, 4, 16, 520, 6, 0, AG_MIX_FIXED, true, true},    {0, 4, 16, 24, 8, 8, AG_MIX_GATE, true, true},
    {2, 150, 32, 264, 8, 256, AG_MIX_GATE, true, true},
};

void forward(Test& t) {
  for (const Shape& s : kShapes)
    if (!small() || s.patches < 100) mix(t, s, kForward, AG_F32);
  mix(t, kShapes[0], kForward, AG_F32, -1, 1);  // addresses that are not aligned
}
void gradients(Test& t) {
  for (const Shape& s : kShapes) {
    if (small() && s.patches > 100) continue;
    mix(t, s, kGradients, AG_F32);
    mix(t, s, kAccumulated, t.dt);
  }
  for (int only = 0; only <= 8; only++) mix(t, kShapes[0], kGradients, t.dt, only);
  mix(t, kShapes[0], kGradients, AG_F32, -1, 1);
}

Registered a("align_mix", forward), b("align_mix_grad", gradients);

}  // namespace
}  // namespace cuda_test

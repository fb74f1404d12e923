// Cases of alignMix and its gradient (cuda_test.h): every mode, with and without projector and bias, gradients of either dtype,
// added or not or not wanted, pictures without text, text without pictures, sizes that are no multiple of an access, shifted
// addresses.
#include "cuda_test.h"

namespace cuda_test {
namespace {

struct Shape {
  std::vector<int32_t> words;  // of the text behind each picture
  int64_t patches, features, hidden, vocab, levels, gate_hidden, shift;
};
struct Way {
  const char* name;
  AgMixMode mode;
  bool projector, bias, f32_grads;
  int32_t accumulate;
  double global;
  bool embed, dx;  // whether their gradients are wanted
};
const Way kWays[] = {
    {"gate", AG_MIX_GATE, true, true, true, 0, 1, true, true},
    {"gate, added", AG_MIX_GATE, true, false, false, 1, 0, true, false},
    {"gate, no projector", AG_MIX_GATE, false, false, true, 1, 1, false, true},
    {"level", AG_MIX_LEVEL, true, true, false, 0, 0, true, true},
    {"level, no projector", AG_MIX_LEVEL, false, false, true, 0, 0, true, true},
    {"fixed", AG_MIX_FIXED, true, false, true, 1, 0, true, true},
};

// A sequence: two words, then for each picture its ALIGN row, a word, its rows and its text. The gate reads that text, every
// third word twice; ids repeat within and between pictures.
struct Sequence {
  std::vector<int32_t> token, image_row, align_row, gate_ids, gate_offsets{0};
  explicit Sequence(const Shape& s) {
    auto word = [&] { return token.push_back(int32_t(below(s.vocab))), token.back(); };
    word(), word();
    for (int32_t words : s.words) {
      align_row.push_back(int32_t(token.size()));
      token.push_back(AG_ALIGN_TOKEN);
      word();
      image_row.push_back(int32_t(token.size()));
      token.insert(token.end(), size_t(s.patches), AG_IMAGE_TOKEN);
      for (int32_t i = 0; i < words; i++) gate_ids.insert(gate_ids.end(), i % 3 ? 1 : 2, word());
      gate_offsets.push_back(int32_t(gate_ids.size()));
    }
  }
};

struct Case {
  Test& t;
  const Shape& s;
  const Way& way;
  char label[128];
  AgAlignMix sizes{};
  Buffer *x, *w, *b, *embed, *table, *gw0, *gb0, *gw1, *gb1, *token, *image_row, *align_row, *ids, *offsets, *level;
  Buffer *out, *mean, *dots, *pre, *logits, *coef, *d_out = nullptr, *dx = nullptr, *grads[8] = {};

  Case(Test& t, const Shape& s, const Way& way) : t(t), s(s), way(way) {
    const Sequence q(s);
    const bool gate = way.mode == AG_MIX_GATE;
    const int64_t n = int64_t(s.words.size()), features = way.projector ? s.features : s.hidden;
    std::snprintf(label, sizeof label, "%s, %lld x %lld x %lld -> %lld shift %lld", way.name, (long long)n, (long long)s.patches,
                  (long long)features, (long long)s.hidden, (long long)s.shift);
    sizes.tokens = int64_t(q.token.size()), sizes.hidden = s.hidden, sizes.vocab = s.vocab, sizes.images = n;
    sizes.patches = s.patches, sizes.features = features, sizes.levels = s.levels, sizes.gate_hidden = gate ? s.gate_hidden : 0;
    sizes.mode = way.mode, sizes.global = way.global, sizes.dt = t.dt;
    token = &t.list(q.token), image_row = &t.list(q.image_row), align_row = &t.list(q.align_row);
    ids = &t.list(q.gate_ids), offsets = &t.list(q.gate_offsets), level = &t.ids(n, s.levels);
    auto input = [&](bool there, int64_t size) { return there ? &t.in(size).shifted(s.shift) : nullptr; };
    x = input(true, n * s.patches * features), w = input(way.projector, s.hidden * features), b = input(way.bias, s.hidden);
    embed = input(true, s.vocab * s.hidden), table = input(true, s.levels * s.hidden);
    gw0 = input(gate, s.gate_hidden * s.patches), gb0 = input(gate, s.gate_hidden);
    gw1 = input(gate, (s.levels - 1) * s.gate_hidden), gb1 = input(gate, s.levels - 1);
    auto acc = [&](const char* name, int64_t size) { return gate ? &t.out(name, AG_F32, n * size) : nullptr; };
    out = &t.out("out", sizes.tokens * s.hidden).shifted(s.shift);
    mean = acc("mean", s.hidden), dots = acc("dots", s.patches);
    pre = acc("gate_pre", s.gate_hidden), logits = acc("logits", s.levels - 1);
    coef = way.mode == AG_MIX_FIXED ? &t.in(AG_F32, n * s.levels) : &t.out("coef", AG_F32, n * s.levels);
  }

  static void* at(const Buffer* x) { return x ? x->p() : nullptr; }
  AgAlignMix args() const {
    AgAlignMix a = sizes;
    a.x = at(x), a.w = at(w), a.b = at(b), a.embed = at(embed), a.table = at(table);
    a.gw0 = at(gw0), a.gb0 = at(gb0), a.gw1 = at(gw1), a.gb1 = at(gb1);
    a.token = token->i32(), a.image_row = image_row->i32(), a.align_row = align_row->i32();
    a.gate_ids = ids->i32(), a.gate_offsets = offsets->i32(), a.level = level->i32();
    a.out = at(out), a.mean = at(mean), a.dots = at(dots), a.gate_pre = at(pre), a.logits = at(logits), a.coef = at(coef);
    AgGrad* to[] = {&a.dw, &a.db, &a.d_embed, &a.d_table, &a.d_gw0, &a.d_gb0, &a.d_gw1, &a.d_gb1};
    for (int i = 0; i < 8; i++) *to[i] = AgGrad{at(grads[i]), way.f32_grads ? AG_F32 : t.dt, way.accumulate};
    a.d_out = at(d_out), a.dx = at(dx);
    return a;
  }
  void forward() {
    t.run(label, &AgBackend::align_mix, [&] { return args(); }, AG_K_ALIGN_MIX);
  }
  // Begins with what the CPU's forward has left.
  void backward() {
    for (Buffer** saved : {&out, &mean, &dots, &pre, &logits, &coef}) {
      Buffer* from = *saved;
      if (!from || from->role == Buffer::kInput) continue;
      *saved = &t.in(from->dt, from->n).shifted(from->skip);
      (*saved)->host = from->results[0];
      from->role = Buffer::kInput;
    }
    const Buffer* of[] = {w, b, way.embed ? embed : nullptr, table, gw0, gb0, gw1, gb1};
    const char* names[] = {"dw", "db", "d_embed", "d_table", "d_gw0", "d_gb0", "d_gw1", "d_gb1"};
    for (int i = 0; i < 8; i++)
      if (of[i]) grads[i] = &t.in_place(names[i], way.f32_grads ? AG_F32 : t.dt, of[i]->n).shifted(s.shift);
    d_out = &t.in(out->n).shifted(s.shift);
    if (way.dx) dx = &t.out("dx", x->n).shifted(s.shift);
    t.run(label, &AgBackend::align_mix_grad, [&] { return args(); }, AG_K_ALIGN_MIX_GRAD);
  }
};

void both(Test& t, const Shape& s, const Way& way) {
  {
    Case c(t, s, way);
    c.forward();
    c.backward();
  }
  t.clear();
}

void align_mix(Test& t) {
  for (const Way& way : kWays) {
    both(t, {{3, 0, 5}, 5, 16, 24, 13, 4, 8, 0}, way);
    if (small()) continue;
    both(t, {{1, 40}, 9, 11, 19, 7, 3, 5, 1}, way);  // nothing is a multiple of an access
    both(t, {{}, 4, 8, 16, 5, 3, 8, 0}, way);
  }
  if (small()) return;
  both(t, {{90, 0, 200}, 72, 40, 264, 33, 8, 40, 0}, kWays[0]);  // more rows, columns and entries than a block takes in one turn
  both(t, {{2, 1}, 5, 600, 24, 9, 3, 8, 0}, kWays[0]);  // the projector's sum cut into parts
  both(t, {{0}, 1, 8, 8, 3, 2, 1, 0}, kWays[1]);
  both(t, {{4}, 16, 8, 2056, 3, 40, 16, 0}, kWays[3]);
}

void refusals(Test& t) {
  AgAlignMix a{};
  float v[4] = {0};
  a.dt = AG_F64;
  t.refuse("f64", &AgBackend::align_mix, a, AG_INVALID);
  t.refuse("f64", &AgBackend::align_mix_grad, a, AG_INVALID);
  a.dt = t.dt, a.d_table = AgGrad{v, AG_F64, 0};
  t.refuse("f64 gradient", &AgBackend::align_mix_grad, a, AG_INVALID);
}

Registered a("align_mix", align_mix), b("align_mix_refusals", refusals);

}  // namespace
}  // namespace cuda_test

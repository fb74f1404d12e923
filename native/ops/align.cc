// alignMix: the last projector layer, the mix of the alignment levels and the splice into the packed sequence as one
// op (arXiv 2405.14129, section 3). What is computed is spelled out at AgAlignMix in arguments.h.
#include "ops.h"

namespace ag::ops {

static const char* const op = "alignMix";

static AgMixMode parse_mode(const std::string& mode) {
  if (mode == "level") return AG_MIX_LEVEL;
  if (mode == "gate") return AG_MIX_GATE;
  if (mode == "fixed") return AG_MIX_FIXED;
  fail("ERR_ARGUMENT", "[alignMix] mode: expected level, gate or fixed, got '", mode, "'");
}

static const Tensor& given(const char* what, const Opt& t) {
  check(t.has_value(), "ERR_ARGUMENT", "[alignMix] ", what, ": expected a tensor in this mode, got none");
  return *t;
}

// Every row the op writes must be written once: tokens by id, the image rows by the projector, the align rows by the
// mix.
static void check_layout(const AlignMixIn& in, int64_t tokens, int64_t images) {
  want_index(op, "tokens", in.tokens, AG_IMAGE_TOKEN, in.embed.shape[0]);
  want_index(op, "imageRows", in.image_rows, 0, tokens);
  want_index(op, "alignRows", in.align_rows, 0, tokens);
  const int32_t* t = host_i32(in.tokens);
  int64_t image_rows = 0, align_rows = 0;
  for (int64_t i = 0; i < tokens; i++) {
    image_rows += t[i] == AG_IMAGE_TOKEN;
    align_rows += t[i] == AG_ALIGN_TOKEN;
  }
  check(image_rows == images * in.patches, "ERR_SHAPE", "[alignMix] tokens: expected ", images * in.patches,
        " image rows, got ", image_rows);
  check(align_rows == images, "ERR_SHAPE", "[alignMix] tokens: expected ", images, " alignment rows, got ", align_rows);
  int64_t after = 0;
  for (int64_t m = 0; m < images; m++) {
    int64_t first = host_i32(in.image_rows)[m], align = host_i32(in.align_rows)[m];
    check(first >= after && first + in.patches <= tokens, "ERR_RANGE", "[alignMix] imageRows[", m, "]: expected ",
          after, "..", tokens - in.patches, ", got ", first);
    for (int64_t p = 0; p < in.patches; p++)
      check(t[first + p] == AG_IMAGE_TOKEN, "ERR_RANGE", "[alignMix] tokens[", first + p,
            "]: expected an image row, got ", t[first + p]);
    check(t[align] == AG_ALIGN_TOKEN && (m == 0 || align > host_i32(in.align_rows)[m - 1]), "ERR_RANGE",
          "[alignMix] alignRows[", m, "]: expected the next alignment row, got ", align);
    after = first + in.patches;
  }
}

static void check_gate(const AlignMixIn& in, AgAlignMix& a) {
  check(in.gate.size() == 4, "ERR_ARGUMENT", "[alignMix] gate: expected [w0, b0, w1, b1], got ", in.gate.size(),
        " tensors");
  check(a.levels >= 2, "ERR_SHAPE", "[alignMix] table: expected at least 2 levels for a gate, got ", a.levels);
  want_rank(op, "gate.w0", in.gate[0], 2);
  a.gate_hidden = in.gate[0].shape[0];
  want_shape(op, "gate.w0", in.gate[0], Shape{a.gate_hidden, a.patches});
  want_shape(op, "gate.b0", in.gate[1], Shape{a.gate_hidden});
  want_shape(op, "gate.w1", in.gate[2], Shape{a.levels - 1, a.gate_hidden});
  want_shape(op, "gate.b1", in.gate[3], Shape{a.levels - 1});
  for (const Tensor& t : in.gate) want_dtype(op, "gate", t, in.x.dt);
  for (const Tensor& t : in.gate) want_same_device(op, {&in.x, &t});
  const Tensor &ids = given("gateIds", in.gate_ids), &offsets = given("gateOffsets", in.gate_offsets);
  want_index(op, "gateIds", ids, -1, a.vocab);
  const int32_t* id = host_i32(ids);
  int64_t entries = ids.numel();
  while (entries && id[entries - 1] < 0) entries--;
  for (int64_t i = 0; i < entries; i++)
    check(id[i] >= 0, "ERR_RANGE", "[alignMix] gateIds[", i, "]: expected -1 at the end alone, got -1");
  int64_t n = want_offsets(op, "gateOffsets", offsets, entries);
  check(n == a.images, "ERR_SHAPE", "[alignMix] gateOffsets: expected ", a.images + 1, " offsets, got ", n + 1);
  a.gw0 = in.gate[0].data();
  a.gb0 = in.gate[1].data();
  a.gw1 = in.gate[2].data();
  a.gb1 = in.gate[3].data();
  a.gate_ids = device_i32(ids, in.x.device());
  a.gate_offsets = device_i32(offsets, in.x.device());
  a.gate_entries = ids.numel();
  a.global = in.global ? 1.0 : 0.0;
}

static AgAlignMix check_args(const AlignMixIn& in) {
  want_float(op, "x", in.x);
  want_rank(op, "x", in.x, 2);
  want_rank(op, "embed", in.embed, 2);
  want_rank(op, "table", in.table, 2);
  want_rank(op, "tokens", in.tokens, 1);
  want_rank(op, "imageRows", in.image_rows, 1);
  AgAlignMix a{};
  a.mode = parse_mode(in.mode);
  a.dt = in.x.dt;
  a.tokens = in.tokens.numel();
  a.images = in.image_rows.numel();
  a.patches = in.patches;
  a.features = in.x.shape[1];
  a.vocab = in.embed.shape[0];
  a.hidden = in.embed.shape[1];
  a.levels = in.table.shape[0];
  check(in.patches > 0, "ERR_ARGUMENT", "[alignMix] patches: expected > 0, got ", in.patches);
  want_shape(op, "x", in.x, Shape{a.images * a.patches, a.features});
  want_shape(op, "table", in.table, Shape{a.levels, a.hidden});
  want_shape(op, "alignRows", in.align_rows, Shape{a.images});
  want_dtype(op, "embed", in.embed, a.dt);
  want_dtype(op, "table", in.table, a.dt);
  want_same_device(op, {&in.x, &in.embed, &in.table});
  if (in.weight) {
    want_shape(op, "weight", *in.weight, Shape{a.hidden, a.features});
    want_dtype(op, "weight", *in.weight, a.dt);
    want_same_device(op, {&in.x, &*in.weight});
    a.w = in.weight->data();
    a.w_packed = in.weight->packed(in.weight->shape[0], in.weight->shape[1], true);
    if (in.bias) {
      want_shape(op, "bias", *in.bias, Shape{a.hidden});
      want_dtype(op, "bias", *in.bias, a.dt);
      want_same_device(op, {&in.x, &*in.bias});
      a.b = in.bias->data();
    }
  } else {
    check(a.features == a.hidden, "ERR_SHAPE", "[alignMix] x without a projector: expected width ", a.hidden, ", got ",
          a.features);
  }
  check_layout(in, a.tokens, a.images);
  if (a.mode == AG_MIX_GATE) check_gate(in, a);
  if (a.mode == AG_MIX_LEVEL) {
    const Tensor& levels = given("levels", in.levels);
    want_shape(op, "levels", levels, Shape{a.images});
    want_index(op, "levels", levels, 0, a.levels);
    a.level = device_i32(levels, in.x.device());
  }
  a.x = in.x.data();
  a.embed = in.embed.data();
  a.table = in.table.data();
  a.token = device_i32(in.tokens, in.x.device());
  a.image_row = device_i32(in.image_rows, in.x.device());
  a.align_row = device_i32(in.align_rows, in.x.device());
  return a;
}

enum Input { X, W, B, EMBED, TABLE, GW0, GB0, GW1, GB1 };

// `kept` is everything `a` points to.
static void backward_of(Grads& grads, const AgAlignMix& a, const std::vector<Saved>& kept, const Shape& shape_x) {
  for (const Saved& t : kept) t.get();
  const Tensor& d_out = grads.out();
  AgAlignMixGrad g{};
  g.forward = a;
  g.d_out = d_out.data();
  Tensor dx = grads.needs(X) ? empty(d_out.device(), shape_x, d_out.dt) : Tensor();
  g.dx = dx.defined() ? dx.data() : nullptr;
  g.dw = grads.slot(W);
  g.db = grads.slot(B);
  g.d_embed = grads.slot(EMBED);
  g.d_table = grads.slot(TABLE);
  g.d_gw0 = grads.slot(GW0);
  g.d_gb0 = grads.slot(GB0);
  g.d_gw1 = grads.slot(GW1);
  g.d_gb1 = grads.slot(GB1);
  run(op, d_out.device(), &AgBackend::align_mix_grad, g);
  if (dx.defined()) grads.add(X, std::move(dx));
}

std::vector<Tensor> align_mix(const AlignMixIn& in) {
  AgAlignMix a = check_args(in);
  Device* device = in.x.device();
  AgDtype acc = acc_dtype(a.dt);
  Tensor out = empty(device, Shape{a.tokens, a.hidden}, a.dt);
  bool gate = a.mode == AG_MIX_GATE;
  Tensor mean = zeros(device, Shape{gate ? a.images : 0, a.hidden}, acc);
  Tensor dots = zeros(device, Shape{gate ? a.images : 0, a.patches}, acc);
  Tensor pre = zeros(device, Shape{gate ? a.images : 0, a.gate_hidden}, acc);
  Tensor logits = zeros(device, Shape{gate ? a.images : 0, gate ? a.levels - 1 : 0}, acc);
  Tensor coef = zeros(device, Shape{a.images, a.levels}, acc);
  if (a.mode == AG_MIX_FIXED) {
    const Tensor& c = given("coefficients", in.coefficients);
    want_shape(op, "coefficients", c, coef.shape);
    want_dtype(op, "coefficients", c, acc);
    want_same_device(op, {&in.x, &c});
    copy(coef, c);
  }
  a.out = out.data();
  a.mean = mean.data();
  a.dots = dots.data();
  a.gate_pre = pre.data();
  a.logits = logits.data();
  a.coef = coef.data();
  run(op, device, &AgBackend::align_mix, a);

  std::vector<Tensor> inputs = {in.x, in.weight.value_or(Tensor()), in.bias.value_or(Tensor()), in.embed, in.table};
  for (int i = 0; i < 4; i++) inputs.push_back(gate ? in.gate[i] : Tensor());
  if (recording(inputs)) {
    std::vector<Saved> kept;
    auto keep = [&](const Tensor& t) { kept.emplace_back(t.detached()); };  // the values: `a` has their addresses
    for (const Tensor& t : {out, mean, dots, pre, logits, coef, in.tokens, in.image_rows, in.align_rows}) keep(t);
    for (const Tensor& t : inputs) keep(t);
    for (const Opt* t : {&in.levels, &in.gate_ids, &in.gate_offsets})
      if (*t) keep(**t);
    Shape shape_x = in.x.shape;
    record(op, {&out}, inputs, [a, kept, shape_x](Grads& grads) { backward_of(grads, a, kept, shape_x); });
  }
  return {out, mean, dots, logits, coef};
}

}  // namespace ag::ops

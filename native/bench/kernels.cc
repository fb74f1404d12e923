// The kernels training consists of, without a peer: npm run bench -- [--filter NAME] [--threads N] [--json FILE]
//
// Median milliseconds, how far runs are apart, GFLOP/s, GB/s and the share of this machine's measured peak: of f32
// multiply-add or of a copy, whichever is larger (bf16 products can be above 100 %: the hardware for them is faster).
#include <cmath>

#include "../cpu/pool.h"
#include "../ops/ops.h"
#include "bench.h"

using namespace ag;

namespace {

const char* name_of(AgDtype dt) { return dt == AG_F32 ? "f32" : "bf16"; }

Tensor uniform(const Shape& shape, AgDtype dt, bool grad = false) {
  static double seed = 0;
  Tensor x = empty(&cpu(), shape, dt);
  ops::random(x, "uniform", -0.5, 0.5, ++seed, 0);
  if (grad) set_requires_grad(x, true);
  return x;
}
Tensor integers(const std::vector<int32_t>& values) {
  Tensor x = empty(&cpu(), Shape{int64_t(values.size())}, AG_I32);
  copy_bytes(&cpu(), x.data(), values.data(), int64_t(values.size()) * 4);
  return x;
}
std::vector<int32_t> counted(int64_t n, int64_t step, int64_t modulo) {
  std::vector<int32_t> v;
  for (int64_t i = 0; i < n; i++) v.push_back(int32_t(i * step % modulo));
  return v;
}
double bytes_of(std::initializer_list<const Tensor*> tensors) {
  double sum = 0;
  for (const Tensor* t : tensors) sum += double(t->bytes());
  return sum;
}
// Forward and backward of an op; gradients of earlier runs are dropped first.
void both(const std::function<Tensor()>& op, const Tensor& seed, std::initializer_list<const Tensor*> leaves) {
  for (const Tensor* leaf : leaves) zero_grad(*leaf);
  backward(op(), seed);
}

// ---- matrix products --------------------------------------------------------------------------------
struct Product {
  int64_t m, n, k;
};
const Product kProducts[] = {{512, 512, 512},   {1024, 1024, 1024}, {2048, 2048, 2048}, {2304, 2048, 512},
                             {2304, 512, 2048}, {576, 4096, 1024},  {64, 32000, 512},   {1, 4096, 4096},
                             {8, 4096, 4096},   {1280, 128, 128},   {1280, 512, 128},   {2048, 384, 128}};

void products(bench::Table& table, AgDtype dt) {
  const char* forms[] = {"NN", "NT", "TN"};
  for (const Product& p : kProducts)
    for (int form = 0; form < 3; form++) {
      bool ta = form == 2, tb = form == 1;
      std::string name = cat("gemm ", name_of(dt), " ", p.m, "x", p.n, "x", p.k, " ", forms[form]);
      if (!table.wants(name)) continue;
      Tensor a = uniform(ta ? Shape{p.k, p.m} : Shape{p.m, p.k}, dt),
             b = uniform(tb ? Shape{p.n, p.k} : Shape{p.k, p.n}, dt);
      Tensor c = empty(&cpu(), Shape{p.m, p.n}, dt);
      double flops = 2.0 * double(p.m) * double(p.n) * double(p.k);
      table.row(name, flops, bytes_of({&a, &b, &c}), [&] { ops::matmul(a, b, ta, tb); });
    }
}

void packed_products(bench::Table& table, AgDtype dt) {
  const AgBackend* backend = cpu().backend;
  for (const Product& p : kProducts) {
    std::string name = cat("gemm ", name_of(dt), " ", p.m, "x", p.n, "x", p.k, " NT packed");
    if (!table.wants(name)) continue;
    Tensor a = uniform(Shape{p.m, p.k}, dt), b = uniform(Shape{p.n, p.k}, dt), c = empty(&cpu(), Shape{p.m, p.n}, dt);
    AgPack pack{b.data(), p.n, p.k, p.k, 1, dt, nullptr};
    Storage blob(&cpu(), backend->pack_bytes(&pack));
    pack.blob = blob.p;
    AgCtx ctx = cpu().context();
    call("bench", &cpu(), backend->pack, pack, ctx);
    AgGemm g{};
    g.m = p.m, g.n = p.n, g.k = p.k, g.dt = g.dt_c = dt, g.trans_b = 1;
    g.a = a.data(), g.lda = p.k, g.b_packed = blob.p, g.c = c.data(), g.ldc = p.n;
    double flops = 2.0 * double(p.m) * double(p.n) * double(p.k);
    table.row(name, flops, bytes_of({&a, &b, &c}), [&] { run("bench", &cpu(), &AgBackend::gemm, g); });
  }
}

// ---- attention --------------------------------------------------------------------------------------
void attention(bench::Table& table, AgDtype dt) {
  struct Case {
    int64_t batch, heads, kv_heads, length, dim;
    bool causal;
  };
  const Case cases[] = {{4, 8, 8, 640, 64, true},
                        {4, 8, 8, 577, 64, false},
                        {1, 8, 2, 2048, 64, true},
                        {1, 32, 32, 640, 128, true},
                        {32, 4, 4, 64, 32, true}};
  for (const Case& c : cases) {
    std::string name = cat("attention ", name_of(dt), c.causal ? " causal" : " full", " B", c.batch, " H", c.heads, ":",
                           c.kv_heads, " S", c.length, " D", c.dim);
    if (!table.wants(name)) continue;
    int64_t tokens = c.batch * c.length;
    std::vector<int32_t> at;
    for (int64_t s = 0; s <= c.batch; s++) at.push_back(int32_t(s * c.length));
    Tensor offsets = integers(at);
    Tensor q = uniform(Shape{tokens, c.heads * c.dim}, dt, true),
           k = uniform(Shape{tokens, c.kv_heads * c.dim}, dt, true),
           v = uniform(Shape{tokens, c.kv_heads * c.dim}, dt, true), seed = uniform(q.shape, dt);
    auto op = [&] {
      return ops::attention(q, k, v, offsets, offsets, c.heads, c.kv_heads, c.causal, 1 / std::sqrt(double(c.dim)));
    };
    // one product is 2 S^2 D; two forward, five backward; causal does half
    double product =
        2.0 * double(c.batch * c.heads) * double(c.length) * double(c.length) * double(c.dim) / (c.causal ? 2 : 1);
    bool before = set_grad_enabled(false);
    table.row(name + " forward", 2 * product, bytes_of({&q, &k, &v, &q}), [&] { op(); });
    set_grad_enabled(before);
    table.row(name + " both", 7 * product, bytes_of({&q, &k, &v, &q}) * 3, [&] { both(op, seed, {&q, &k, &v}); });
  }
}

// ---- alignMix ---------------------------------------------------------------------------------------
void align_mix(bench::Table& table, AgDtype dt) {
  struct Case {
    int64_t images, patches, features, hidden;
  };
  for (const Case& c : {Case{2, 576, 4096, 4096}, Case{32, 9, 128, 128}}) {
    std::string name =
        cat("alignMix ", name_of(dt), " ", c.images, "x", c.patches, "x", c.features, " -> ", c.hidden, " both");
    if (!table.wants(name)) continue;
    constexpr int64_t kText = 32, kLevels = 8, kVocab = 1000, kGate = 256;
    int64_t sample = c.patches + 1 + kText, rows = c.images * sample;
    std::vector<int32_t> image_rows, align_rows, gate_offsets = {0}, tokens = counted(rows, 7, kVocab);
    for (int64_t m = 0; m < c.images; m++) {
      align_rows.push_back(int32_t(m * sample));
      image_rows.push_back(int32_t(m * sample + 1));
      gate_offsets.push_back(int32_t((m + 1) * kText));
    }
    ops::AlignMixIn in{};
    in.x = uniform(Shape{c.images * c.patches, c.features}, dt, true);
    in.weight = uniform(Shape{c.hidden, c.features}, dt, true);
    in.bias = uniform(Shape{c.hidden}, dt, true);
    in.embed = uniform(Shape{kVocab, c.hidden}, dt, true);
    in.table = uniform(Shape{kLevels, c.hidden}, dt);
    in.tokens = integers(tokens), in.image_rows = integers(image_rows), in.align_rows = integers(align_rows);
    in.patches = c.patches, in.mode = "gate", in.global = true;
    in.gate_ids = integers(counted(c.images * kText, 3, kVocab)), in.gate_offsets = integers(gate_offsets);
    in.gate = {uniform(Shape{kGate, c.patches}, dt, true), uniform(Shape{kGate}, dt, true),
               uniform(Shape{kLevels - 1, kGate}, dt, true), uniform(Shape{kLevels - 1}, dt, true)};
    Tensor seed = uniform(Shape{rows, c.hidden}, dt);
    double flops = 6.0 * double(c.images * c.patches) * double(c.features) * double(c.hidden);
    table.row(name, flops, 3 * bytes_of({&in.x, &*in.weight, &seed}), [&] {
      both([&] { return ops::align_mix(in)[0]; }, seed,
           {&in.x, &*in.weight, &*in.bias, &in.embed, &in.gate[0], &in.gate[1], &in.gate[2], &in.gate[3]});
    });
  }
}

// ---- elementwise, norms, positions ------------------------------------------------------------------
void pointwise(bench::Table& table, AgDtype dt) {
  constexpr int64_t kRows = 2576, kCols = 512, kWide = 2048, kHeads = 8;
  Tensor x = uniform(Shape{kRows, kCols}, dt, true), w = uniform(Shape{kCols}, dt, true),
         b = uniform(Shape{kCols}, dt, true), wide = uniform(Shape{kRows, kWide}, dt, true),
         up = uniform(Shape{kRows, kWide}, dt, true), seed = uniform(x.shape, dt), wide_seed = uniform(wide.shape, dt);
  ops::QkvIn qkv{
      x,  kHeads, kHeads, {}, {}, {}, integers(counted(kRows, 1, 322)), uniform(Shape{322, kCols / kHeads / 2}, AG_F32),
      {}, {},     {},     {}};
  qkv.sin = uniform(qkv.cos->shape, AG_F32);
  Tensor all = uniform(Shape{3 * kCols, kCols}, dt), qkv_seed = uniform(Shape{kRows, 3 * kCols}, dt);
  for (int64_t i = 0; i < 3; i++) {
    qkv.weights.push_back(ops::slice(all, 0, i * kCols, (i + 1) * kCols));
    set_requires_grad(qkv.weights.back(), true);
  }
  std::string end = cat(" ", name_of(dt), " ", kRows, "x"), narrow = cat(end, kCols, " both");
  double moved = 5.0 * double(x.bytes());  // forward reads one and writes one, backward reads two and writes one
  table.row("rmsNorm" + narrow, 0, moved, [&] { both([&] { return ops::rms_norm(x, w, 1e-5); }, seed, {&x, &w}); });
  table.row("layerNorm" + narrow, 0, moved,
            [&] { both([&] { return ops::layer_norm(x, w, b, 1e-5); }, seed, {&x, &w, &b}); });
  table.row(cat("qkvLinear", end, kCols, " -> ", 3 * kCols, " both"), 18.0 * kRows * kCols * kCols,
            4.0 * double(qkv_seed.bytes()), [&] {
              both([&] { return ops::qkv_linear(qkv); }, qkv_seed,
                   {&x, &qkv.weights[0], &qkv.weights[1], &qkv.weights[2]});
            });
  table.row(cat("gelu", end, kWide, " both"), 0, 5.0 * double(wide.bytes()),
            [&] { both([&] { return ops::unary(wide, "gelu"); }, wide_seed, {&wide}); });
  table.row(cat("siluMul", end, kWide, " both"), 0, 8.0 * double(wide.bytes()),
            [&] { both([&] { return ops::silu_mul(wide, up); }, wide_seed, {&wide, &up}); });
}

// ---- loss and optimizer -----------------------------------------------------------------------------
void lm_head(bench::Table& table, AgDtype dt) {
  constexpr int64_t kRows = 2048, kLabelled = 410, kWidth = 512, kVocab = 32000;
  std::string name =
      cat("lmHeadLoss ", name_of(dt), " ", kLabelled, " of ", kRows, " rows, ", kWidth, " -> ", kVocab, " both");
  if (!table.wants(name)) return;
  Tensor hidden = uniform(Shape{kRows, kWidth}, dt, true), weight = uniform(Shape{kVocab, kWidth}, dt, true);
  Tensor rows = integers(counted(kLabelled, 5, kRows)), targets = integers(counted(kLabelled, 77, kVocab));
  double flops = 6.0 * kLabelled * double(kWidth) * kVocab;
  table.row(name, flops, 3 * bytes_of({&weight}), [&] {
    both([&] { return ops::lm_head_loss(hidden, weight, rows, targets, kLabelled, 256, {})[0]; }, Tensor(),
         {&hidden, &weight});
  });
}

void adamw(bench::Table& table) {
  constexpr int64_t kTensors = 128, kEach = 400000;
  std::string name = cat("adamw f32 ", kTensors, " tensors, ", kTensors * kEach / 1000000, " M");
  if (!table.wants(name)) return;
  std::vector<Tensor> p, g, m, v;
  for (int64_t i = 0; i < kTensors; i++)
    for (auto* list : {&p, &g, &m, &v})
      list->push_back(list == &v ? zeros(&cpu(), Shape{kEach}, AG_F32) : uniform(Shape{kEach}, AG_F32));
  std::vector<ops::Opt> masters(kTensors);
  ops::AdamWIn in{p,
                  g,
                  masters,
                  m,
                  v,
                  std::vector<double>(kTensors, 1),
                  std::vector<double>(kTensors, 0.01),
                  0.9,
                  0.95,
                  1e-8,
                  1e-4,
                  0,
                  std::nullopt,
                  0,
                  0};
  table.row(name, 0, 7.0 * 4 * kTensors * kEach, [&] {
    in.step++;
    ops::adamw(in);
  });
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options o = bench::parse(argc, argv);
  if (o.threads) ag_set_threads(o.threads);
  AgCapabilities c;
  cpu().backend->capabilities(&c);
  std::printf("%s %s, %d threads\n", c.name, c.level, int(c.threads));
  bench::Table table(o, bench::peak_flops(), bench::peak_bytes());
  for (AgDtype dt : {AG_F32, AG_BF16}) {
    products(table, dt);
    packed_products(table, dt);
    attention(table, dt);
    align_mix(table, dt);
    pointwise(table, dt);
    lm_head(table, dt);
  }
  adamw(table);
  table.finish(c.level);
}

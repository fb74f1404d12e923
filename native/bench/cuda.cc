// The kernels of the CUDA backend at the sizes of a 7B model, timed through its table:
//   bench_cuda --library libaligngpt_cuda.so [--filter TEXT] [--context '"date":"...","commit":"..."']
// One JSON line for each row: milliseconds (the fastest of five rounds), GB/s or TFLOP/s, what matrix products run on
// (cublasLt where it is; ALIGNGPT_GEMM=own and another run for the other side), and `context` as it was given. Rows
// with the same name in scripts/bench/cuda_peer.py are PyTorch's. Without a library it says so and does nothing.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../ops/ops.h"
#include "bench.h"

namespace {

struct Options {
  std::string library, filter, context;
};

// The backend and what a row needs of it. Memory is given back at the end of a row.
struct Gpu {
  const AgBackend& b;
  const Options& options;
  std::string name;      // of the device
  std::string products;  // what they run on
  std::vector<void*> blocks = {};

  void* bytes(int64_t n) {
    void* p = nullptr;
    if (b.alloc(nullptr, n, &p) != AG_OK) ag::fail("ERR_MEMORY", "[bench] ", n, " bytes: out of memory");
    blocks.push_back(p);
    return p;
  }
  void* bf16(int64_t n, double low = -0.5, double high = 0.5) {
    void* p = bytes(n * 2);
    AgCtx ctx{};
    const AgRandom a{p, AG_BF16, n, AG_UNIFORM, low, high, uint64_t(blocks.size()), 0};
    ag::check_status("random", b.random.run(&ctx, &a), ctx);
    return p;
  }
  template <class T>
  void* copy(const std::vector<T>& host) {
    void* p = bytes(int64_t(host.size() * sizeof(T)));
    AgCtx ctx{};
    ag::check_status("copy", b.copy(&ctx, p, host.data(), int64_t(host.size() * sizeof(T))), ctx);
    return p;
  }
  void release() {
    for (void* p : blocks) b.free(nullptr, p);
    blocks.clear();
  }
  bool wants(const std::string& row) const { return row.find(options.filter) != std::string::npos; }

  // Work is a number of floating point operations or, when `moved`, of bytes.
  template <class Entry, class Args>
  void row(const std::string& name_of_row, const Entry& kernel, const Args& args, double work, bool moved) {
    AgCtx ctx{};
    ctx.workspace_bytes = kernel.workspace ? kernel.workspace(&args) : 0;
    if (ctx.workspace_bytes) ctx.workspace = bytes(ctx.workspace_bytes);
    const AgStatus first = kernel.run(&ctx, &args);
    if (first == AG_UNSUPPORTED) {
      std::printf("{\"row\":\"%s\",\"unsupported\":true,\"device\":\"%s\"}\n", name_of_row.c_str(), name.c_str());
      return;
    }
    ag::check_status(name_of_row.c_str(), first, ctx);
    ag::check_status(name_of_row.c_str(), b.synchronize(&ctx), ctx);
    timed(name_of_row, [&] { ag::check_status(name_of_row.c_str(), kernel.run(&ctx, &args), ctx); }, work, moved);
  }
  template <class F>
  void timed(const std::string& name_of_row, const F& f, double work, bool moved) {
    AgCtx ctx{};
    auto seconds = [&](int times) {
      const double start = bench::now();
      for (int i = 0; i < times; i++) f();
      ag::check_status(name_of_row.c_str(), b.synchronize(&ctx), ctx);
      return (bench::now() - start) / times;
    };
    const double once = seconds(3);
    const int times = once > 0.05 ? 2 : int(0.1 / once) + 1;
    double best = once;
    for (int round = 0; round < 5; round++) best = std::fmin(best, seconds(times));
    std::printf("{\"row\":\"%s\",\"ms\":%.4f,\"%s\":%.1f,\"products\":\"%s\",\"device\":\"%s\"%s%s}\n",
                name_of_row.c_str(), best * 1e3, moved ? "GB/s" : "TFLOP/s", work / best / (moved ? 1e9 : 1e12),
                products.c_str(), name.c_str(), options.context.empty() ? "" : ",", options.context.c_str());
    std::fflush(stdout);
  }
};

void copies(Gpu& g) {
  constexpr int64_t n = int64_t(1) << 29;
  if (g.wants("copy"))
    g.row("copy bf16 2^29", g.b.copy2d, AgCopy2d{g.bf16(n), n * 2, g.bf16(n), n * 2, 1, n * 2}, 4.0 * n, true);
  g.release();
}

void norms(Gpu& g) {
  constexpr int64_t rows = 16384, cols = 4096, n = rows * cols;
  if (!g.wants("rmsNorm") && !g.wants("siluMul")) return;
  void *x = g.bf16(n), *y = g.bf16(n), *dy = g.bf16(n), *w = g.bf16(cols), *rstd = g.bytes(rows * 4);
  g.row("rmsNorm forward bf16 16384x4096", g.b.norm, AgNorm{y, x, w, nullptr, nullptr, rstd, rows, cols, 1e-5, AG_BF16},
        4.0 * n, true);
  AgNormGrad a{};
  a.dx = y, a.dy = dy, a.x = x, a.w = w, a.rstd = rstd, a.rows = rows, a.cols = cols, a.dt = AG_BF16;
  a.dw = AgGrad{g.bytes(cols * 4), AG_F32, 0};
  g.row("rmsNorm gradient bf16 16384x4096", g.b.norm_grad, a, 6.0 * n, true);
  g.row("siluMul forward bf16 2^26", g.b.silu_mul, AgSiluMul{y, x, dy, n, AG_BF16}, 6.0 * n, true);
  g.release();
}

void optimizer(Gpu& g) {
  constexpr int64_t n = int64_t(1) << 30;
  for (bool compact : {true, false}) {
    const std::string row = std::string("adamw ") + (compact ? "compact" : "full") + " bf16 2^30";
    if (!g.wants(row)) continue;
    const int64_t state = compact ? 2 : 4;
    void *p = g.bf16(n), *grad = g.bf16(n), *master = g.bytes(n * state), *m = g.bytes(n * state),
         *v = g.bytes(n * state);
    AgCtx ctx{};
    for (void* zero : {master, m, v}) {
      const AgFill a{zero, compact ? AG_BF16 : AG_F32, n, 0};
      ag::check_status("fill", g.b.fill.run(&ctx, &a), ctx);
    }
    const AgAdamWTensor t{p, AG_BF16, grad, AG_BF16, compact ? AG_STATE_COMPACT : AG_STATE_FULL, master, m, v,
                          n, 0,       1,    0};
    void* now = g.copy(std::vector<AgAdamWStep>{{1e-5, 1}});
    const AgAdamW a{&t, 1, 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now), nullptr, 0, 1};
    g.row(row, g.b.adamw, a, double(n) * double(2 + 4 + 6 * state), true);
    g.release();
  }
}

void loss(Gpu& g) {
  constexpr int64_t rows = 600, cols = 32000, width = 4096;
  if (!g.wants("lmHead")) return;
  void *hidden = g.bf16(rows * width), *w = g.bf16(cols * width), *logits = g.bf16(rows * cols, -5, 5),
       *nll = g.bytes(rows * 4);
  std::vector<int32_t> labels;
  for (int64_t i = 0; i < rows; i++) labels.push_back(int32_t(i * 53));
  AgGemm gemm{};
  gemm.m = rows, gemm.n = cols, gemm.k = width, gemm.a = hidden, gemm.lda = width, gemm.b = w, gemm.ldb = width,
  gemm.c = logits, gemm.ldc = cols;
  gemm.dt = gemm.dt_c = AG_BF16, gemm.trans_b = 1;
  g.row("lmHead product bf16 600x32000x4096", g.b.gemm, gemm, 2.0 * rows * cols * width, false);
  const AgCrossEntropy a{logits,  rows,    cols,   static_cast<const int32_t*>(g.copy(labels)), nll, logits, 1.0 / rows,
                         nullptr, AG_BF16, AG_BF16};
  g.row("lmHead loss bf16 600x32000", g.b.cross_entropy, a, 4.0 * rows * cols, true);
  g.release();
}

void products(Gpu& g) {
  for (int64_t n : {4096, 8192}) {
    const std::string row = ag::cat("gemm bf16 ", n, "^3");
    if (!g.wants(row)) continue;
    AgGemm a{};
    a.m = a.n = a.k = a.lda = a.ldb = a.ldc = n;
    a.a = g.bf16(n * n), a.b = g.bf16(n * n), a.c = g.bf16(n * n), a.dt = a.dt_c = AG_BF16, a.trans_b = 1;
    g.row(row, g.b.gemm, a, 2.0 * double(n) * double(n) * double(n), false);
    g.release();
  }
  const std::string row = "gemm bf16 gradient of a weight 4096x11008, 8192 rows, added in f32";
  if (!g.wants(row)) return;
  AgGemm a{};
  a.m = a.lda = 4096, a.n = a.ldb = a.ldc = 11008, a.k = 8192;
  a.a = g.bf16(a.m * a.k), a.b = g.bf16(a.n * a.k), a.c = g.bytes(a.m * a.n * 4), a.dt = AG_BF16, a.dt_c = AG_F32,
  a.trans_a = a.accumulate = 1;
  g.row(row, g.b.gemm, a, 2.0 * double(a.m) * double(a.n) * double(a.k), false);
  g.release();
}

// Sequences of these lengths behind each other.
void causal_attention(Gpu& g, const std::string& row, const std::vector<int64_t>& lengths, int64_t dim) {
  if (!g.wants(row)) return;
  std::vector<int32_t> offsets = {0};
  double pairs = 0;  // of a query and a key before it
  for (int64_t length : lengths) {
    offsets.push_back(offsets.back() + int32_t(length));
    pairs += double(length) * double(length) / 2;
  }
  const int64_t tokens = offsets.back(), heads = 2048 / dim, n = tokens * heads * dim;
  AgAttention a{};
  a.q = g.bf16(n), a.k = g.bf16(n), a.v = g.bf16(n), a.o = g.bf16(n), a.lse = g.bytes(tokens * heads * 4);
  a.ldq = a.ldk = a.ldv = a.ldo = heads * dim;
  a.q_offsets = a.k_offsets = static_cast<const int32_t*>(g.copy(offsets));
  a.batch = int64_t(lengths.size()), a.heads = a.kv_heads = heads, a.dim = dim, a.scale = 1 / std::sqrt(double(dim)),
  a.causal = 1, a.dt = AG_BF16;
  const AgAttentionGrad grad{a, g.bf16(n), g.bf16(n), g.bf16(n), g.bf16(n)};
  const double product = 2.0 * double(heads) * pairs * double(dim);
  g.row(row + " forward", g.b.attention, a, 2 * product, false);
  g.row(row + " gradient", g.b.attention_grad, grad, 5 * product, false);
  g.release();
}
void attention(Gpu& g) {
  for (int64_t dim : {64, 128}) {
    for (int64_t length : {1024, 2048, 4096})
      causal_attention(g, ag::cat("attention causal bf16 d", dim, " s", length),
                       std::vector<int64_t>(size_t(16384 / length), length), dim);
    std::vector<int64_t> conversations;  // a picture of 576 rows and 14 to 1,472 tokens, as LLaVA's are
    for (int64_t i = 0; i < 16; i++) conversations.push_back(590 + i * i * 1458 / 225);
    causal_attention(g, ag::cat("attention causal bf16 d", dim, " 16 of 590 to 2048"), conversations, dim);
  }
}

// One token for each of 8 sequences against 4,096 keys, the pages in the order they were handed out.
void decode(Gpu& g) {
  constexpr int64_t batch = 8, heads = 32, dim = 128, keys = 4096, block = 16, pages = keys / block;
  for (int64_t kv_heads : {32, 8}) {
    const std::string row = ag::cat("attentionCached bf16 8x", keys, " d", dim, " ", heads, ":", kv_heads);
    if (!g.wants(row)) continue;
    std::vector<int32_t> offsets, table, lengths(batch, int32_t(keys));
    for (int64_t s = 0; s <= batch; s++) offsets.push_back(int32_t(s));
    for (int64_t s = 0; s < batch; s++)
      for (int64_t i = 0; i < pages; i++) table.push_back(int32_t(i * batch + s));
    auto index = [&](const std::vector<int32_t>& list) { return static_cast<const int32_t*>(g.copy(list)); };
    const int64_t cache = batch * keys * kv_heads * dim;
    AgAttentionCached a{};
    a.q = g.bf16(batch * heads * dim), a.o = g.bf16(batch * heads * dim), a.ldq = a.ldo = heads * dim;
    a.k_cache = g.bf16(cache), a.v_cache = g.bf16(cache), a.q_offsets = index(offsets), a.block_table = index(table),
    a.kv_len = index(lengths);
    a.batch = a.q_tokens = batch, a.max_blocks = pages, a.block_size = block, a.heads = heads, a.kv_heads = kv_heads,
    a.dim = dim;
    a.scale = 1 / std::sqrt(double(dim)), a.dt = AG_BF16;
    g.row(row, g.b.attention_cached, a, 4.0 * double(cache), true);
    g.release();
  }
}

// The gradient of a 7B model's embedding: 10,000 rows, all of different tokens, added to f32.
void embedding(Gpu& g) {
  constexpr int64_t n = 10000, cols = 4096, vocab = 32000;
  if (!g.wants("embedding gradient")) return;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; i++) ids.push_back(int32_t(i * 7919 % vocab));
  const AgGrad to{g.bytes(vocab * cols * 4), AG_F32, 1};
  AgCtx ctx{};
  const AgFill zero{to.p, AG_F32, vocab * cols, 0};
  ag::check_status("fill", g.b.fill.run(&ctx, &zero), ctx);
  const AgScatterAdd a{to, g.bf16(n * cols), static_cast<const int32_t*>(g.copy(ids)), n, cols, vocab, AG_BF16, 1};
  g.row("embedding gradient bf16 10000x4096", g.b.scatter_add, a, double(n) * cols * (2 + 8), true);
  g.release();
}

// ViT-L/14-336 into a 7B model, 16 pictures with 32 words each, the gate deciding.
void align_mix(Gpu& g) {
  if (!g.wants("alignMix")) return;
  constexpr int64_t images = 16, patches = 576, width = 4096, words = 32, vocab = 32000, levels = 8, gate = 256,
                    sample = patches + 1 + words;
  std::vector<int32_t> token, image_row, align_row, ids, offsets = {0};
  for (int64_t m = 0; m < images; m++) {
    align_row.push_back(int32_t(m * sample));
    image_row.push_back(int32_t(m * sample + 1));
    token.push_back(AG_ALIGN_TOKEN);
    token.insert(token.end(), size_t(patches), AG_IMAGE_TOKEN);
    for (int64_t i = 0; i < words; i++) token.push_back(int32_t(m * words + i)), ids.push_back(int32_t(m * words + i));
    offsets.push_back(int32_t(ids.size()));
  }
  auto index = [&](const std::vector<int32_t>& list) { return static_cast<const int32_t*>(g.copy(list)); };
  auto grad = [&](int64_t n) { return AgGrad{g.bytes(n * 4), AG_F32, 0}; };
  AgAlignMix a{};
  a.tokens = images * sample, a.hidden = a.features = width, a.vocab = vocab, a.images = images, a.patches = patches,
  a.levels = levels, a.gate_hidden = gate;
  a.x = g.bf16(images * patches * width), a.w = g.bf16(width * width), a.b = g.bf16(width),
  a.embed = g.bf16(vocab * width), a.table = g.bf16(levels * width);
  a.token = index(token), a.image_row = index(image_row), a.align_row = index(align_row), a.gate_ids = index(ids),
  a.gate_offsets = index(offsets);
  a.mode = AG_MIX_GATE, a.global = 1, a.dt = AG_BF16;
  a.gw0 = g.bf16(gate * patches), a.gb0 = g.bf16(gate), a.gw1 = g.bf16((levels - 1) * gate), a.gb1 = g.bf16(levels - 1);
  a.out = g.bf16(a.tokens * width), a.mean = g.bytes(images * width * 4), a.dots = g.bytes(images * patches * 4);
  a.gate_pre = g.bytes(images * gate * 4), a.logits = g.bytes(images * (levels - 1) * 4),
  a.coef = g.bytes(images * levels * 4);
  const double product = 2.0 * images * patches * width * width;
  g.row("alignMix forward bf16 16x576x4096", g.b.align_mix, a, product, false);
  AgAlignMixGrad to{};
  to.forward = a, to.d_out = g.bf16(a.tokens * width), to.dx = g.bf16(images * patches * width);
  to.dw = grad(width * width), to.db = grad(width), to.d_table = grad(levels * width);
  to.d_gw0 = grad(gate * patches), to.d_gb0 = grad(gate), to.d_gw1 = grad((levels - 1) * gate),
  to.d_gb1 = grad(levels - 1);
  g.row("alignMix gradient bf16 16x576x4096", g.b.align_mix_grad, to, 2 * product, false);
  g.release();
}

// Layers of a LLaMA through the ops and the tape, forward and backward, as a training step runs them.
struct Layer {
  ag::Tensor norm1;
  std::vector<ag::Tensor> qkv;
  ag::Tensor o, norm2, gate, up, down;
};
struct Sizes {
  int64_t layers, batch, length, hidden, heads, inner;
};
ag::Tensor random_tensor(ag::Device* device, const ag::Shape& shape) {
  ag::Tensor t = ag::empty(device, shape, AG_BF16);
  ag::ops::random(t, "uniform", -0.02, 0.02, 1, 0);
  ag::set_requires_grad(t, true);
  return t;
}
ag::Tensor indices(const std::vector<int32_t>& values) {
  ag::Tensor t = ag::empty(&ag::cpu(), ag::Shape{int64_t(values.size())}, AG_I32);
  std::memcpy(t.data(), values.data(), values.size() * sizeof(int32_t));
  return t;
}
struct Packing {
  ag::Tensor offsets, positions, cos, sin;
};
ag::Tensor forward(const Layer& l, const ag::Tensor& x, const Packing& p, int64_t heads) {
  using namespace ag::ops;
  const ag::Tensor n = rms_norm(x, l.norm1, 1e-5);
  const ag::Tensor qkv = qkv_linear({n, heads, heads, l.qkv, {}, {}, p.positions, p.cos, p.sin, {}, {}, {}});
  const double scale = 1 / std::sqrt(double(x.shape[1] / heads));
  const ag::Tensor a = ag::ops::attention(qkv, {}, {}, p.offsets, p.offsets, heads, heads, true, scale);
  const ag::Tensor h = add(x, linear(a, l.o, {}, "none")), m = rms_norm(h, l.norm2, 1e-5);
  return add(h, silu_mul_linear(linear(m, l.gate, {}, "none"), linear(m, l.up, {}, "none"), l.down, {}));
}
void stack(Gpu& g, const std::string& row, const Sizes& s) {
  if (!g.wants(row)) return;
  ag::Device device(&g.b);
  const int64_t tokens = s.batch * s.length, H = s.hidden, dim = H / s.heads;
  {
    std::vector<Layer> layers;
    auto weight = [&](int64_t rows, int64_t cols) { return random_tensor(&device, ag::Shape{rows, cols}); };
    auto vector = [&] { return random_tensor(&device, ag::Shape{H}); };
    auto adjoining = [&] {  // behind each other, as a model has them
      const ag::Tensor all = weight(3 * H, H).detached();
      std::vector<ag::Tensor> parts;
      for (int64_t i = 0; i < 3; i++) {
        parts.push_back(ag::ops::slice(all, 0, i * H, (i + 1) * H));
        ag::set_requires_grad(parts.back(), true);
      }
      return parts;
    };
    for (int64_t i = 0; i < s.layers; i++)
      layers.push_back(
          {vector(), adjoining(), weight(H, H), vector(), weight(s.inner, H), weight(s.inner, H), weight(H, s.inner)});
    std::vector<int32_t> offsets{0}, positions;
    for (int64_t i = 0; i < tokens; i++) positions.push_back(int32_t(i % s.length));
    for (int64_t i = 1; i <= s.batch; i++) offsets.push_back(int32_t(i * s.length));
    const ag::Tensor table = ag::zeros(&device, ag::Shape{s.length, dim / 2}, AG_F32);
    const Packing p{indices(offsets), indices(positions), table, table};
    const ag::Tensor x = weight(tokens, H), seed = random_tensor(&device, ag::Shape{tokens, H}).detached();
    const double parameters = double(s.layers) * (4.0 * double(H * H) + 3.0 * double(H * s.inner));
    const double attention =
        double(s.layers) * 3.5 * 2.0 * double(tokens) * double(s.length) * double(H);  // causal: half of the pairs
    g.timed(
        row,
        [&] {
          ag::Tensor y = x;
          for (const Layer& l : layers) y = forward(l, y, p, s.heads);
          ag::backward(y, seed);
        },
        6.0 * parameters * double(tokens) + attention, false);
  }
  device.memory.trim();
}
void layers(Gpu& g) { stack(g, "4 layers of a 7B forward+backward bf16 16x640", {4, 16, 640, 4096, 32, 11008}); }

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--library") o.library = argv[i + 1];
    if (name == "--filter") o.filter = argv[i + 1];
    if (name == "--context") o.context = argv[i + 1];
  }
  if (o.library.empty()) {
    std::printf("cuda: not run, --library names no libaligngpt_cuda.so\n");
    return 0;
  }
  std::string why;
  const AgBackend* backend = ag::open_backend(o.library, &why);
  if (!backend) {
    std::printf("%s\n", why.c_str());
    return 1;
  }
  AgCapabilities c;
  backend->capabilities(&c);
  const std::string by = c.products;  // "cublasLt 13.1.1 from FILE", "own kernels: why"
  Gpu g{*backend, o, c.device, by.substr(0, std::min(by.find(" from "), by.find(':')))};
  int failed = 0;
  for (void (*rows)(Gpu&) : {copies, norms, optimizer, loss, products, attention, decode, embedding, align_mix, layers})
    try {
      rows(g);
    } catch (const ag::Error& e) {  // the other rows are worth having all the same
      std::fprintf(stderr, "%s\n", e.what());
      g.release();
      failed = 1;
    }
  backend->capabilities(&c);
  std::printf("{\"products\":\"%s\"}\n", c.products);  // with their numbers
  return failed;
}

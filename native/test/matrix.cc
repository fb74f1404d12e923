// Matrix products, attention and alignMix at every CPU level of this machine against plain double loops: odd and tiny
// sizes, every option, gradients against finite differences (f64), one thread against two bit for bit, nothing written
// beyond the outputs, scratch filled with NaN beforehand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../cpu/level.h"
#include "../cpu/pool.h"

namespace {

int failures = 0, checks = 0;
std::string context;

void check(bool ok, const std::string& what) {
  checks++;
  if (ok) return;
  if (++failures <= 40) std::printf("FAIL %s: %s\n", context.c_str(), what.c_str());
}

template <class... T>
std::string text(const T&... parts) {
  std::string s;
  auto add = [&](const auto& p) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(p)>>) {
      char number[32];
      std::snprintf(number, sizeof number, "%.9g", double(p));
      s += number;
    } else {
      s += p;
    }
  };
  (add(parts), ...);
  return s;
}

// ---- levels -----------------------------------------------------------------------------------------
struct Level {
  const char* name;
  bool bf16_only;  // bf16_only: all else is the code of avx512
  AgStatus (*gemm)(AgCtx*, const AgGemm*);
  int64_t (*gemm_workspace)(const AgGemm*);
  AgStatus (*pack)(AgCtx*, const AgPack*);
  int64_t (*pack_bytes)(const AgPack*);
  AgStatus (*attention)(AgCtx*, const AgAttention*);
  int64_t (*attention_workspace)(const AgAttention*);
  AgStatus (*attention_grad)(AgCtx*, const AgAttention*);
  int64_t (*attention_grad_workspace)(const AgAttention*);
  AgStatus (*cached)(AgCtx*, const AgAttentionCached*);
  int64_t (*cached_workspace)(const AgAttentionCached*);
  AgStatus (*mix)(AgCtx*, const AgAlignMix*);
  int64_t (*mix_workspace)(const AgAlignMix*);
  AgStatus (*mix_grad)(AgCtx*, const AgAlignMix*);
  int64_t (*mix_grad_workspace)(const AgAlignMix*);
};

#define LEVEL(name, bf16_only)                                                                                   \
  Level {                                                                                                        \
    #name, bf16_only, name::gemm, name::gemm_workspace, name::pack, name::pack_bytes, name::attention,           \
        name::attention_workspace, name::attention_grad, name::attention_grad_workspace, name::attention_cached, \
        name::attention_cached_workspace, name::align_mix, name::align_mix_workspace, name::align_mix_grad,      \
        name::align_mix_grad_workspace                                                                           \
  }

std::vector<Level> levels() {
  std::vector<Level> all = {LEVEL(portable, false)};
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) all.push_back(LEVEL(avx2, false));
  if (avx512) all.push_back(LEVEL(avx512, false));
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    all.push_back(LEVEL(avx512bf16, true));
    all.push_back(LEVEL(amx_emulated, true));
  }
#ifdef AG_AMX_BUILT
  const char* asked = std::getenv("ALIGNGPT_CPU_LEVEL");  // amx is for those who name it
  if (asked && std::strcmp(asked, "amx") == 0 && ag_cpu_level("amx")) all.push_back(LEVEL(amx, true));
#endif
#elif defined(__aarch64__)
  all.push_back(LEVEL(neon, false));
#endif
  return all;
}

// Whether a level only passes this dtype on: f64 is at portable, f32 of a level for bf16 at avx512.
bool elsewhere(const Level& l, AgDtype dt) {
  return (dt == AG_F64 && std::string(l.name) != "portable") || (dt == AG_F32 && l.bf16_only);
}

// ---- buffers ----------------------------------------------------------------------------------------
int64_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 ? 8 : 4; }
AgDtype acc_of(AgDtype dt) { return dt == AG_F64 ? AG_F64 : AG_F32; }
const char* name_of(AgDtype dt) { return dt == AG_BF16 ? "bf16" : dt == AG_F64 ? "f64" : "f32"; }

uint16_t to_bf16(double x) {
  float f = float(x);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

uint64_t seed = 1;
double uniform() {  // [-1, 1)
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(seed) >> 11) / double(int64_t(1) << 52);
}
int64_t below(int64_t n) { return n <= 0 ? 0 : int64_t((uniform() + 1) / 2 * double(n)) % n; }

// Elements of a dtype. Outputs have a sentinel behind them, inputs nothing: there a sanitizer watches.
struct Buffer {
  AgDtype dt = AG_F32;
  int64_t n = 0;
  std::vector<unsigned char> bytes;
  int64_t tail = 64;

  Buffer() = default;
  Buffer(AgDtype d, int64_t count, double value = 0, int64_t behind = 64)
      : dt(d), n(count), bytes(size_t(count * size_of(d) + behind), 0xA5), tail(behind) {
    for (int64_t i = 0; i < n; i++) set(i, value);
  }
  static Buffer random(AgDtype d, int64_t count, double scale = 1, int64_t behind = 0) {
    Buffer b(d, count, 0, behind);
    for (int64_t i = 0; i < count; i++) b.set(i, uniform() * scale);
    return b;
  }
  void* p() { return bytes.data(); }
  double at(int64_t i) const {
    const unsigned char* q = bytes.data() + i * size_of(dt);
    if (dt == AG_F64) {
      double v;
      std::memcpy(&v, q, 8);
      return v;
    }
    uint32_t u = 0;
    if (dt == AG_F32)
      std::memcpy(&u, q, 4);
    else
      std::memcpy(reinterpret_cast<char*>(&u) + 2, q, 2);
    float f;
    std::memcpy(&f, &u, 4);
    return double(f);
  }
  void set(int64_t i, double v) {
    unsigned char* q = bytes.data() + i * size_of(dt);
    float f = float(v);
    uint16_t h = to_bf16(v);
    if (dt == AG_F64)
      std::memcpy(q, &v, 8);
    else if (dt == AG_F32)
      std::memcpy(q, &f, 4);
    else
      std::memcpy(q, &h, 2);
  }
  std::vector<double> all() const {
    std::vector<double> v;
    for (int64_t i = 0; i < n; i++) v.push_back(at(i));
    return v;
  }
  bool intact() const {
    for (size_t i = bytes.size() - size_t(tail); i < bytes.size(); i++)
      if (bytes[i] != 0xA5) return false;
    return true;
  }
};

// Runs a kernel with exactly the scratch it asked for, full of NaN; true when it succeeded and stayed inside.
template <class Args>
void launch(const char* what, AgStatus (*kernel)(AgCtx*, const Args*), int64_t (*workspace)(const Args*),
            const Args& a) {
  int64_t bytes = workspace(&a);
  std::vector<unsigned char> raw(size_t(bytes) + 128, 0xFF);
  unsigned char* base = raw.data() + (64 - reinterpret_cast<uintptr_t>(raw.data()) % 64) % 64;
  AgCtx ctx{};
  ctx.workspace = base;
  ctx.workspace_bytes = bytes;
  AgStatus s = kernel(&ctx, &a);
  check(s == AG_OK, text(what, ": status ", int(s), " ", ctx.error));
  bool inside = true;
  for (unsigned char* q = base + bytes; q < raw.data() + raw.size(); q++) inside = inside && *q == 0xFF;
  check(inside, text(what, " wrote beyond its scratch"));
}

// Relative precision of a value stored in dt.
double unit(AgDtype dt) { return dt == AG_BF16 ? 1.0 / 256 : dt == AG_F64 ? 1e-15 : 6e-8; }

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

// Runs `body` with 1 and 2 threads and compares the outputs' bytes.
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

// ---- matrix product ---------------------------------------------------------------------------------
double activation(AgUnaryOp op, double x) {
  switch (op) {
    case AG_GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case AG_GELU_TANH: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case AG_QUICK_GELU: return x / (1 + std::exp(-1.702 * x));
    case AG_SILU: return x / (1 + std::exp(-x));
    default: return x;
  }
}

struct GemmCase {
  int64_t m, n, k;
  bool ta, tb;
  AgDtype dt, dt_c;
  bool bias, pre, accumulate, scatter, packed;
  AgUnaryOp act;
  int64_t gap;  // added to the leading dimensions
};

void test_gemm(const Level& l, const GemmCase& c) {
  context =
      text(l.name, " gemm ", name_of(c.dt), "->", name_of(c.dt_c), " ", c.m, "x", c.n, "x", c.k, c.ta ? " T" : " N",
           c.tb ? "T" : "N", c.bias ? " bias" : "", c.pre ? " pre" : "", c.accumulate ? " accumulate" : "",
           c.scatter ? " rows" : "", c.packed ? " packed" : "", " act ", int(c.act), " gap ", c.gap);
  int64_t lda = (c.ta ? c.m : c.k) + c.gap, ldb = (c.tb ? c.k : c.n) + c.gap, ldc = c.n + c.gap,
          rows_c = c.scatter ? 2 * c.m + 1 : c.m;
  Buffer A = Buffer::random(c.dt, (c.ta ? c.k : c.m) * lda), B = Buffer::random(c.dt, (c.tb ? c.n : c.k) * ldb);
  Buffer bias = Buffer::random(c.dt, c.n), C = Buffer::random(c.dt_c, rows_c * ldc, 1, 64), pre(c.dt_c, c.m * c.n, 7),
         blob;
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < c.m; i++) rows.push_back(int32_t(2 * (c.m - 1 - i) + 1));
  std::vector<double> want(size_t(C.n)), want_pre(size_t(pre.n), 7);
  for (int64_t i = 0; i < C.n; i++) want[size_t(i)] = C.at(i);
  std::vector<double> a = A.all(), b = B.all();
  for (int64_t i = 0; i < c.m; i++)
    for (int64_t j = 0; j < c.n; j++) {
      double s = 0;
      for (int64_t q = 0; q < c.k; q++)
        s += a[size_t(c.ta ? q * lda + i : i * lda + q)] * b[size_t(c.tb ? j * ldb + q : q * ldb + j)];
      double& w = want[size_t((c.scatter ? rows[size_t(i)] : i) * ldc + j)];
      if (c.accumulate) s += w;
      if (c.bias) s += bias.at(j);
      if (c.pre) want_pre[size_t(i * c.n + j)] = s;
      w = activation(c.act, s);
    }
  AgGemm g{};
  g.m = c.m, g.n = c.n, g.k = c.k;
  g.a = A.p(), g.lda = lda, g.b = B.p(), g.ldb = ldb, g.c = C.p(), g.ldc = ldc;
  g.c_rows = c.scatter ? rows.data() : nullptr;
  g.bias = c.bias ? bias.p() : nullptr;
  g.pre = c.pre ? pre.p() : nullptr;
  g.dt = c.dt, g.dt_c = c.dt_c, g.act = c.act, g.trans_a = c.ta, g.trans_b = c.tb, g.accumulate = c.accumulate;
  if (c.packed) {
    AgPack p{B.p(), c.n, c.k, ldb, c.tb, c.dt, nullptr};
    blob = Buffer(AG_BF16, l.pack_bytes(&p) / 2);
    p.blob = blob.p();
    AgCtx ctx{};
    if (blob.n) check(l.pack(&ctx, &p) == AG_OK, "pack");
    check(blob.intact(), "pack wrote beyond the blob");
    if (blob.n) g.b_packed = blob.p(), g.b = nullptr;
  }
  on_both({&C, &pre}, [&] { launch("gemm", l.gemm, l.gemm_workspace, g); });
  double scale = 1;
  for (double w : want) scale = std::max(scale, std::fabs(w) / 4);
  double sum = (c.dt == AG_F64 ? 1e-15 : 4e-7) * std::sqrt(double(c.k + 1)) * scale, act = c.act == AG_NONE ? 0 : 1e-6;
  compare("c", C, want, sum + act + (c.dt_c == AG_BF16 && c.pre ? 2e-3 : 0), unit(c.dt_c) * (c.pre ? 2.5 : 1) + act);
  compare("pre", pre, want_pre, sum, unit(c.dt_c));
}

void test_gemms(const Level& l) {
  const int64_t shapes[][3] = {{0, 3, 2},     {3, 0, 2},     {3, 2, 0},    {1, 1, 1},     {1, 5, 3},      {5, 1, 7},
                               {2, 33, 17},   {3, 64, 40},   {4, 31, 100}, {7, 40, 33},   {8, 130, 65},   {9, 17, 12},
                               {14, 32, 16},  {15, 33, 17},  {13, 70, 72}, {64, 48, 24},  {100, 70, 401}, {29, 300, 31},
                               {70, 20, 500}, {1, 200, 900}, {8, 66, 800}, {600, 40, 50}, {37, 70, 1000}};
  for (auto& s : shapes)
    for (int trans = 0; trans < 4; trans++)
      for (AgDtype dt : {AG_F32, AG_BF16, AG_F64})
        for (AgDtype dt_c : {AG_F32, AG_BF16, AG_F64}) {
          if ((dt == AG_F64) != (dt_c == AG_F64) || (dt == AG_F32 && dt_c == AG_BF16)) continue;
          if (elsewhere(l, dt)) continue;
          GemmCase c{s[0],  s[1],  s[2],  trans >= 2, trans % 2 == 1, dt,      dt_c,
                     false, false, false, false,      false,          AG_NONE, 0};
          test_gemm(l, c);
          for (int v = 0; v < 6; v++) {
            GemmCase d = c;
            d.gap = v % 2 ? 5 : 0;
            d.bias = v == 0 || v == 1 || v == 4;
            d.pre = v == 1 || v == 5;
            d.accumulate = v == 2 || v == 3;
            d.scatter = v >= 3;
            d.packed = v == 0 || v == 2 || v == 4;
            d.act = v == 0 ? AG_GELU : v == 1 ? AG_GELU_TANH : v == 4 ? AG_SILU : v == 5 ? AG_QUICK_GELU : AG_NONE;
            test_gemm(l, d);
          }
        }
  for (int trans = 0; trans < 4; trans++)
    for (AgDtype dt : {AG_F32, AG_BF16}) {
      if (elsewhere(l, dt) || (trans != 2 && std::string(l.name) == "amx_emulated")) continue;  // emulation is slow
      GemmCase c{577, 600, 390, trans >= 2, trans % 2 == 1, dt, dt, false, false, false, false, false, AG_NONE, 0};
      test_gemm(l, c);
      c = GemmCase{90,   2500,  400,   trans >= 2, trans % 2 == 1, dt,      AG_F32,
                   true, false, false, true,       trans == 1,     AG_SILU, 1};
      test_gemm(l, c);
      c = GemmCase{580, 530, 9000, trans >= 2, trans % 2 == 1, dt, dt, true, false, false, false, false, AG_NONE, 0};
      if (std::string(l.name).rfind("avx512", 0) == 0 && trans == 2) test_gemm(l, c);
    }
}

// ---- attention --------------------------------------------------------------------------------------
struct Shape {
  std::vector<int32_t> nq, nk;
  int64_t heads, kv_heads, dim;
  bool causal;
  int64_t gap;  // added to the row strides
};

std::vector<int32_t> offsets_of(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> o = {0};
  for (int32_t n : lengths) o.push_back(o.back() + n);
  return o;
}

// Everything in double; gradients by the textbook formulas.
struct Reference {
  std::vector<double> o, lse, dq, dk, dv;
};
Reference attention_reference(const Shape& s, double scale, int64_t ldq, int64_t ldk, const std::vector<double>& q,
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

void test_attention(const Level& l, const Shape& s, AgDtype dt) {
  std::vector<int32_t> qo = offsets_of(s.nq), ko = offsets_of(s.nk);
  context =
      text(l.name, " attention ", name_of(dt), s.causal ? " causal" : " full", " heads ", s.heads, "/", s.kv_heads,
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
  a.d_o = d_o.p(), a.dq = dq.p(), a.dk = dk.p(), a.dv = dv.p();
  Reference r = attention_reference(s, a.scale, ldq, ldk, q.all(), k.all(), v.all(), d_o.all(), o.all());
  double base = dt == AG_F64   ? 1e-13
                : dt == AG_F32 ? 3e-6
                               : 4e-3,
         rel = dt == AG_F64   ? 1e-12
               : dt == AG_F32 ? 3e-6
                              : 8e-3;
  on_both({&o, &lse}, [&] { launch("attention", l.attention, l.attention_workspace, a); });
  compare("o", o, r.o, base, rel);
  compare("lse", lse, r.lse, dt == AG_F64 ? 1e-13 : 2e-6, dt == AG_F64 ? 1e-13 : 1e-6);
  on_both({&dq, &dk, &dv}, [&] { launch("attention_grad", l.attention_grad, l.attention_grad_workspace, a); });
  double grad = base * 4 * (dt == AG_BF16 ? 2 : 1);
  compare("dq", dq, r.dq, grad, rel * 2);
  compare("dk", dk, r.dk, grad * 2, rel * 2);
  compare("dv", dv, r.dv, grad, rel * 2);
}

// The reference's gradients against finite differences of its own forward pass.
void test_attention_reference() {
  context = "attention reference";
  Shape s{{3, 2}, {4, 2}, 2, 1, 3, true, 0};
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
  const Shape shapes[] = {{{1}, {1}, 1, 1, 1, true, 0},       {{}, {}, 2, 1, 8, true, 0},
                          {{0, 2}, {0, 3}, 2, 1, 8, true, 0}, {{3, 2}, {0, 2}, 2, 2, 5, false, 3},
                          {{5}, {2}, 1, 1, 16, true, 0},      {{1, 7, 20}, {1, 9, 20}, 4, 2, 12, true, 4},
                          {{33}, {33}, 2, 1, 32, true, 0},    {{64, 65}, {64, 65}, 2, 2, 64, true, 0},
                          {{130}, {130}, 3, 1, 40, true, 1},  {{70}, {300}, 2, 1, 72, true, 0},
                          {{200}, {140}, 1, 1, 33, true, 0},  {{129, 1}, {257, 128}, 2, 2, 24, false, 0},
                          {{600}, {600}, 1, 1, 64, true, 0},  {{100, 520}, {530, 90}, 1, 1, 16, false, 2}};
  for (const Shape& s : shapes)
    for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
      if (elsewhere(l, dt)) continue;
      test_attention(l, s, dt);
    }
}

void test_cached(const Level& l, const std::vector<int32_t>& nq, const std::vector<int32_t>& kv_len, int64_t heads,
                 int64_t kv_heads, int64_t dim, int64_t block, AgDtype dt) {
  context = text(l.name, " attention_cached ", name_of(dt), " heads ", heads, "/", kv_heads, " dim ", dim, " block ",
                 block, " queries ", nq[0], " keys ", kv_len[0]);
  Shape s{nq, kv_len, heads, kv_heads, dim, true, 0};
  std::vector<int32_t> qo = offsets_of(nq), ko = offsets_of(kv_len);
  int64_t batch = int64_t(nq.size()), longest = *std::max_element(kv_len.begin(), kv_len.end()),
          max_blocks = longest / block + 2;
  int64_t ld = kv_heads * dim, blocks = batch * max_blocks + 1, ldq = heads * dim + 2;
  std::vector<int32_t> table(size_t(batch * max_blocks), -1);
  for (int64_t b = 0; b < batch; b++)  // pages lie in reverse
    for (int64_t i = 0; i <= (kv_len[size_t(b)] - 1) / block; i++)
      table[size_t(b * max_blocks + i)] = int32_t(blocks - 1 - (b * max_blocks + i));
  Buffer q = Buffer::random(dt, qo.back() * ldq, 2), o(dt, q.n, 7), kc(dt, blocks * block * ld, NAN, 0),
         vc(dt, blocks * block * ld, NAN, 0);
  std::vector<double> k, v;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t j = 0; j < kv_len[size_t(b)]; j++)
      for (int64_t i = 0; i < ld; i++) {
        int64_t at = (table[size_t(b * max_blocks + j / block)] * block + j % block) * ld + i;
        kc.set(at, uniform() * 2);
        vc.set(at, uniform());
        k.push_back(kc.at(at));
        v.push_back(vc.at(at));
      }
  AgAttentionCached a{};
  a.q = q.p(), a.ldq = a.ldo = ldq, a.k_cache = kc.p(), a.v_cache = vc.p(), a.o = o.p();
  a.q_offsets = qo.data(), a.block_table = table.data(), a.kv_len = kv_len.data();
  a.batch = batch, a.max_blocks = max_blocks, a.block_size = block, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim;
  a.q_tokens = qo.back(), a.scale = 1 / std::sqrt(double(dim)), a.dt = dt;
  Reference r = attention_reference(s, a.scale, ldq, ld, q.all(), k, v, q.all(), o.all());
  on_both({&o}, [&] { launch("attention_cached", l.cached, l.cached_workspace, a); });
  double base = dt == AG_F64   ? 1e-13
                : dt == AG_F32 ? 3e-6
                               : 4e-3,
         rel = dt == AG_F64   ? 1e-12
               : dt == AG_F32 ? 3e-6
                              : 8e-3;
  compare("o", o, r.o, base, rel);
}

void test_cacheds(const Level& l) {
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
    if (elsewhere(l, dt)) continue;
    test_cached(l, {1}, {1}, 1, 1, 1, 1, dt);
    test_cached(l, {1, 1, 1}, {5, 64, 130}, 4, 2, 20, 16, dt);
    test_cached(l, {1, 4, 0, 9, 70}, {2100, 7, 3, 9, 200}, 2, 1, 64, 16, dt);
    test_cached(l, {3, 2}, {1030, 1024}, 6, 2, 33, 7, dt);
    test_cached(l, {5, 150}, {5, 300}, 3, 3, 72, 32, dt);
  }
}

// ---- alignMix ---------------------------------------------------------------------------------------
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
    a.d_out = d_out.p(), a.dx = grad[X].p();
    AgGrad* slots[INPUTS] = {nullptr, &a.dw, &a.db, &a.d_embed, &a.d_table, &a.d_gw0, &a.d_gb0, &a.d_gw1, &a.d_gb1};
    for (int i = W; i < INPUTS; i++) {
      bool present = (i != W || a.w) && (i != B || a.b) && (i < GW0 || gate);
      *slots[i] = AgGrad{present ? grad[i].p() : nullptr, dt_grad, accumulate};
    }
  }
  bool has(int i) const {
    const AgGrad* slots[INPUTS] = {nullptr,  &a.dw,    &a.db,    &a.d_embed, &a.d_table,
                                   &a.d_gw0, &a.d_gb0, &a.d_gw1, &a.d_gb1};
    return i == X || slots[i]->p;
  }
};

// The definition in backend.h, line by line.
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
  context =
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
          [&] { launch("align_mix", l.mix, l.mix_workspace, run.a); });
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
  on_both(grads, [&] { launch("align_mix_grad", l.mix_grad, l.mix_grad_workspace, run.a); });
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
  context = text(l.name, " align_mix with gradients left out, mode ", int(c.mode));
  Mix x(c);
  MixRun all(x, AG_F32, AG_F32, false);
  launch("align_mix", l.mix, l.mix_workspace, all.a);
  launch("align_mix_grad", l.mix_grad, l.mix_grad_workspace, all.a);
  for (int only = 0; only < INPUTS; only++) {
    MixRun one(x, AG_F32, AG_F32, false);
    launch("align_mix", l.mix, l.mix_workspace, one.a);
    AgGrad* slots[INPUTS] = {nullptr,      &one.a.dw,    &one.a.db,    &one.a.d_embed, &one.a.d_table,
                             &one.a.d_gw0, &one.a.d_gb0, &one.a.d_gw1, &one.a.d_gb1};
    for (int i = W; i < INPUTS; i++)
      if (i != only) slots[i]->p = nullptr;
    if (only != X) one.a.dx = nullptr;
    launch("align_mix_grad", l.mix_grad, l.mix_grad_workspace, one.a);
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

}  // namespace

int main(int argc, char** argv) {
  std::string only = argc > 1 ? argv[1] : "";
  test_attention_reference();
  for (const Level& l : levels()) {
    if (only.empty() || only == "gemm") test_gemms(l);
    if (only.empty() || only == "attention") test_attentions(l);
    if (only.empty() || only == "cached") test_cacheds(l);
    if (only.empty() || only == "align") test_mixes(l);
  }
  std::printf("matrix: %d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}

// Milliseconds and GFLOP/s of attention over packed sequences: forward, and forward + backward. Median over repeats.
//   bench_attention [threads] [batch heads kv_heads length dim]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../backend.h"
#include "../cpu/pool.h"

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class F>
double median_seconds(const F& f) {
  f();
  f();
  std::vector<double> t;
  for (double start = now(); t.size() < 7 || (now() - start < 0.5 && t.size() < 400);) {
    double a = now();
    f();
    t.push_back(now() - a);
  }
  std::sort(t.begin(), t.end());
  return t[t.size() / 2];
}

struct Case {
  int64_t batch, heads, kv_heads, length, dim;
};

void* tensor(const AgBackend* b, int64_t n, AgDtype dt, uint64_t seed) {
  void* p = nullptr;
  b->alloc(nullptr, n * 4 + 64, &p);
  AgCtx ctx{};
  AgRandom r{p, dt, n, AG_UNIFORM, -1, 1, seed, 0};
  b->random(&ctx, &r);
  return p;
}

void bench(const AgBackend* b, const Case& c, AgDtype dt) {
  int64_t tokens = c.batch * c.length, nq = tokens * c.heads * c.dim, nk = tokens * c.kv_heads * c.dim;
  std::vector<int32_t> offsets;
  for (int64_t s = 0; s <= c.batch; s++) offsets.push_back(int32_t(s * c.length));
  AgAttention a{};
  void* lse = tensor(b, tokens * c.heads, AG_F32, 9);
  std::vector<void*> all = {lse};
  auto make = [&](int64_t n, uint64_t seed) {
    all.push_back(tensor(b, n, dt, seed));
    return all.back();
  };
  a.q = make(nq, 1), a.k = make(nk, 2), a.v = make(nk, 3), a.o = make(nq, 4), a.d_o = make(nq, 5);
  a.dq = make(nq, 6), a.dk = make(nk, 7), a.dv = make(nk, 8), a.lse = lse;
  a.ldq = a.ldo = c.heads * c.dim, a.ldk = a.ldv = c.kv_heads * c.dim;
  a.q_offsets = a.k_offsets = offsets.data();
  a.batch = c.batch, a.heads = c.heads, a.kv_heads = c.kv_heads, a.dim = c.dim;
  a.scale = 1 / std::sqrt(double(c.dim)), a.causal = 1, a.dt = dt;
  AgCtx ctx{};
  ctx.workspace_bytes = std::max(b->workspace(AG_K_ATTENTION, &a), b->workspace(AG_K_ATTENTION_GRAD, &a));
  b->alloc(nullptr, ctx.workspace_bytes + 64, &ctx.workspace);
  all.push_back(ctx.workspace);
  double forward = median_seconds([&] { b->attention(&ctx, &a); });
  double both = median_seconds([&] {
    b->attention(&ctx, &a);
    b->attention_grad(&ctx, &a);
  });
  // 2 products forward, 5 backward, half of the square each
  double flops = 2.0 * double(c.batch * c.heads * c.length * c.length * c.dim) / 2;
  std::printf(
      "causal B%ld H%ld/%ld S%ld D%ld %-5s forward %7.2f ms %6.1f GFLOP/s   forward+backward %7.2f ms %6.1f GFLOP/s\n",
      long(c.batch), long(c.heads), long(c.kv_heads), long(c.length), long(c.dim), dt == AG_F32 ? "f32" : "bf16",
      forward * 1e3, 2e-9 * flops / forward, both * 1e3, 7e-9 * flops / both);
  for (void* p : all) b->free(nullptr, p);
}

}  // namespace

int main(int argc, char** argv) {
  const AgBackend* b = ag_cpu_backend();
  if (argc > 1) ag_set_threads(std::atoi(argv[1]));
  AgCapabilities c;
  b->capabilities(&c);
  std::printf("%s %s, %d threads\n", c.name, c.level, int(c.threads));
  std::vector<Case> cases = {{4, 8, 8, 640, 64}, {1, 8, 2, 2048, 64}, {1, 32, 32, 640, 128}, {32, 4, 4, 60, 32}};
  if (argc > 6)
    cases = {{std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6])}};
  for (const Case& s : cases)
    for (AgDtype dt : {AG_F32, AG_BF16}) bench(b, s, dt);
}

// GFLOP/s of the matrix product: the shapes of the models here, row major C = op(A) op(B). Median over repeats, and the
// best of them, which a neighbour on the machine disturbs less.
//   bench_gemm [f32|bf16] [threads] [m n k ...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../backend.h"
#include "../cpu/pool.h"

namespace {

struct Shape {
  int64_t m, n, k;
};
const Shape kShapes[] = {{512, 512, 512},   {1024, 1024, 1024}, {2048, 2048, 2048},
                         {2304, 2048, 512}, {2304, 512, 2048},  {576, 4096, 1024},
                         {64, 32000, 512},  {1, 4096, 4096},    {8, 4096, 4096},
                         {2560, 192, 192},  {2560, 768, 192},   {2560, 192, 768},
                         {192, 192, 2560},  {192, 768, 2560},   {3200, 128, 128}};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class F>
double median_seconds(const F& f, double& best) {
  f();
  f();
  std::vector<double> t;
  for (double start = now(); t.size() < 7 || (now() - start < 0.3 && t.size() < 400);) {
    double a = now();
    f();
    t.push_back(now() - a);
  }
  std::sort(t.begin(), t.end());
  best = t[0];
  return t[t.size() / 2];
}

void* device_random(const AgBackend* b, int64_t n, AgDtype dt, uint64_t seed) {
  void* p = nullptr;
  b->alloc(nullptr, n * 4 + 64, &p);
  AgCtx ctx{};
  AgRandom r{p, dt, n, AG_UNIFORM, -1, 1, seed, 0};
  b->random(&ctx, &r);
  return p;
}

void bench(const AgBackend* b, const Shape& s, int trans, AgDtype dt, bool packed) {
  AgGemm g{};
  g.m = s.m, g.n = s.n, g.k = s.k, g.dt = g.dt_c = dt;
  g.trans_a = trans == 2, g.trans_b = trans == 1;
  void *A = device_random(b, s.m * s.k, dt, 1), *B = device_random(b, s.k * s.n, dt, 2),
       *C = device_random(b, s.m * s.n, dt, 3);
  g.a = A, g.lda = g.trans_a ? s.m : s.k, g.b = B, g.ldb = g.trans_b ? s.k : s.n, g.c = C, g.ldc = s.n;
  AgCtx ctx{};
  void *blob = nullptr, *work = nullptr;
  if (packed) {
    AgPack p{B, s.n, s.k, g.ldb, g.trans_b, dt, nullptr};
    b->alloc(nullptr, b->pack_bytes(&p) + 64, &blob);
    p.blob = blob;
    b->pack(&ctx, &p);
    g.b_packed = blob;
  }
  ctx.workspace_bytes = b->workspace(AG_K_GEMM, &g);
  b->alloc(nullptr, ctx.workspace_bytes + 64, &work);
  ctx.workspace = work;
  double best, t = median_seconds([&] { b->gemm(&ctx, &g); }, best);
  const char* names[] = {"NN", "NT", "TN"};
  std::printf("%5ld %6ld %5ld %s%s %-5s %8.1f GFLOP/s, best %8.1f %7.1f GB/s of B %9.1f us\n", long(s.m), long(s.n), long(s.k),
              names[trans], packed ? "p" : " ", dt == AG_F32 ? "f32" : "bf16", 2e-9 * double(s.m * s.n * s.k) / t, 2e-9 * double(s.m * s.n * s.k) / best,
              1e-9 * double(s.n * s.k * (dt == AG_F32 ? 4 : 2)) / t, t * 1e6);
  std::fflush(stdout);
  for (void* p : {A, B, C, blob, work})
    if (p) b->free(nullptr, p);
}

}  // namespace

int main(int argc, char** argv) {
  const AgBackend* b = ag_cpu_backend();
  if (argc > 2) ag_set_threads(std::atoi(argv[2]));
  AgCapabilities c;
  b->capabilities(&c);
  std::printf("%s %s, %d threads\n", c.name, c.level, int(c.threads));
  for (AgDtype dt : {AG_F32, AG_BF16}) {
    if (argc > 1 && std::strcmp(argv[1], dt == AG_F32 ? "f32" : "bf16") != 0) continue;
    std::vector<Shape> shapes(kShapes, kShapes + sizeof kShapes / sizeof *kShapes);
    if (argc > 5) shapes.clear();
    for (int i = 3; i + 2 < argc; i += 3)
      shapes.push_back({std::atoi(argv[i]), std::atoi(argv[i + 1]), std::atoi(argv[i + 2])});
    for (const Shape& s : shapes) {
      for (int trans = 0; trans < 3; trans++) bench(b, s, trans, dt, false);
      if (s.m <= 64) bench(b, s, 1, dt, true);
    }
  }
}

// What is refused, the services of the table, the pool.
#include <thread>

#include "cpu_test.h"

namespace cpu_test {
namespace {

void test_refusals(Fixture f) {
  if (f.dt != AG_F32) return;
  double v[8] = {0};
  int32_t zero = 0;
  AgDtype no = AG_I32;
  check(call(f.b.unary, AgUnary{AG_GELU, v, v, 1, no, 1}) == AG_INVALID, "unary i32");
  check(call(f.b.unary_grad, AgUnaryGrad{AG_GELU, v, v, v, 1, no, 1}) == AG_INVALID, "unary_grad i32");
  check(call(f.b.binary, AgBinary{AG_ADD, v, v, v, 1, 1, no}) == AG_INVALID, "binary i32");
  check(call(f.b.silu_mul, AgSiluMul{v, v, v, 1, no}) == AG_INVALID, "silu_mul i32");
  check(call(f.b.random, AgRandom{v, no, 1, AG_UNIFORM, 0, 1, 0, 0}) == AG_INVALID, "random i32");
  check(call(f.b.softmax, AgSoftmax{v, v, 1, 1, no}) == AG_INVALID, "softmax i32");
  check(call(f.b.col_sum, AgColSum{{v, AG_I64, 0}, v, 1, 1, 1, AG_F32, 1, nullptr}) == AG_INVALID, "col_sum into i64");
  check(call(f.b.scatter_add, AgScatterAdd{{v, no, 0}, v, &zero, 1, 1, 1, AG_F32, 1}) == AG_INVALID,
        "scatter_add into i32");
  AgSpan span{v, no, 1};
  check(call(f.b.sum_squares, AgSumSquares{&span, 1, v}) == AG_INVALID, "sum_squares i32");
  float m[2] = {0}, s[2] = {0};
  AgAdamWStep now{0.1, 1};
  AgAdamWTensor t{v, AG_F64, v, AG_F32, AG_STATE_FULL, nullptr, m, s, 1, 0, 1, 0};
  check(call(f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 0}) == AG_INVALID, "adamw f64");
  t.dt_p = AG_F32, t.state = AG_STATE_COMPACT;
  check(call(f.b.adamw, AgAdamW{&t, 1, 0.9, 0.999, 1e-8, &now, nullptr, 0, 0}) == AG_INVALID, "adamw compact f32");
  check(call(f.b.cross_entropy, AgCrossEntropy{v, 1, 1, &zero, v, v + 1, 1, nullptr, AG_F64, AG_F32}) == AG_INVALID,
        "cross_entropy f64 to f32");
}

void test_services(Fixture f) {
  if (f.dt != AG_F32) return;
  check(f.b.version == AG_BACKEND_VERSION && f.b.struct_size == int32_t(sizeof(AgBackend)), "version");
  AgCapabilities c;
  f.b.capabilities(&c);
  check(!std::strcmp(c.name, "cpu") && c.level[0] && c.threads >= 1, "capabilities");
  for (int64_t bytes : {0, 1, 64, 1000003, 9000000}) {
    void* p = nullptr;
    check(f.b.alloc(nullptr, bytes, &p) == AG_OK && reinterpret_cast<uintptr_t>(p) % 64 == 0, "alloc %lld",
          (long long)bytes);
    if (bytes) std::memset(p, 1, size_t(bytes));
    f.b.free(nullptr, p);
  }
  void* p = nullptr;
  check(f.b.alloc(nullptr, int64_t(1) << 60, &p) == AG_OUT_OF_MEMORY, "alloc of 2^60 bytes");
  AgCtx ctx{};
  void* event = nullptr;
  check(f.b.event_create(&event) == AG_OK && f.b.event_record(&ctx, event) == AG_OK &&
            f.b.event_wait(&ctx, event) == AG_OK,
        "events");
  f.b.event_destroy(event);
  check(f.b.synchronize(&ctx) == AG_OK && f.b.graph_begin(&ctx) == AG_UNSUPPORTED && ctx.error[0],
        "graphs are unsupported");
}

// The pool: every chunk once, nested and concurrent callers inline, also while the number of threads changes.
void test_pool() {
  auto count = [](void* arg, int64_t i, int64_t) {
    __atomic_fetch_add(static_cast<int*>(arg) + i, 1, __ATOMIC_RELAXED);
  };
  auto all_once = [&](int64_t n) {
    std::vector<int> hits(size_t(n) + 1);
    ag_parallel(n, n, count, hits.data());
    bool ok = hits.back() == 0;
    for (int64_t i = 0; i < n; i++) ok = ok && hits[size_t(i)] == 1;
    return ok;
  };
  for (int threads : {1, 2, 5, 3}) {
    ag_set_threads(threads);
    check(ag_threads() == threads, "threads");
    for (int round = 0; round < 300; round++)
      for (int64_t n : {0, 1, 2, 3, 7, 100}) check(all_once(n), "%lld chunks, %d threads", (long long)n, threads);
  }
  std::vector<std::thread> callers;
  int bad[4] = {0};
  for (int t = 0; t < 4; t++)
    callers.emplace_back([&, t] {
      for (int round = 0; round < 500; round++) bad[t] += !all_once(50);
    });
  for (std::thread& t : callers) t.join();
  check(!bad[0] && !bad[1] && !bad[2] && !bad[3], "concurrent callers");
  struct Nested {
    int hits[64] = {0};
  } nested;
  auto outer = [](void* arg, int64_t i, int64_t) {
    struct Inner {
      int* hits;
    } inner{static_cast<Nested*>(arg)->hits + i * 8};
    ag_parallel(8, 8, [](void* a, int64_t j, int64_t) { static_cast<Inner*>(a)->hits[j]++; }, &inner);
  };
  ag_parallel(8, 8, outer, &nested);
  for (int h : nested.hits) check(h == 1, "nested call");
}

const Cases kCases("services", {{"refusals", test_refusals}, {"services", test_services}});
const Cases kPool("services", test_pool);

}  // namespace
}  // namespace cpu_test

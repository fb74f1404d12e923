// What is refused, and the services of the table (cuda_test.h).
#include <cstring>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_refusals(Test& t) {
  double v[4] = {0};
  const AgDtype no = AG_F64;
  t.refuse("unary", &AgBackend::unary, AgUnary{AG_GELU, v, v, 1, no, 1}, AG_INVALID);
  t.refuse("random", &AgBackend::random, AgRandom{v, no, 1, AG_UNIFORM, 0, 1, 0, 0}, AG_INVALID);
  t.refuse("softmax", &AgBackend::softmax, AgSoftmax{v, v, 1, 1, no}, AG_INVALID);
  t.refuse("col_sum", &AgBackend::col_sum, AgColSum{{v, AG_I64, 0}, v, 1, 1, 1, t.dt, 1, nullptr}, AG_INVALID);
  t.refuse("norm", &AgBackend::norm, AgNorm{v, v, v, v, v, v, 1, 1, 1e-5, no}, AG_INVALID);
  const AgSpan span{v, AG_I32, 1};
  t.refuse("sum_squares", &AgBackend::sum_squares, AgSumSquares{&span, 1, v}, AG_INVALID);
  AgAdamWTensor tensor{v, AG_F32, v, AG_F32, AG_STATE_COMPACT, nullptr, v, v, 1, 0, 1, 0};
  t.refuse("adamw", &AgBackend::adamw, AgAdamW{&tensor, 1, 0.9, 0.999, 1e-8, nullptr, nullptr, 0, 0}, AG_INVALID);
  tensor.dt_p = no;
  t.refuse("adamw", &AgBackend::adamw, AgAdamW{&tensor, 1, 0.9, 0.999, 1e-8, nullptr, nullptr, 0, 0}, AG_INVALID);
}

// More than two pinned pieces, and not whole ones; then pinned memory over the two copying streams with events between,
// as the offloaded optimizer does it. The compute stream doubles the numbers in the middle.
void test_copies(Test& t) {
  const AgBackend& b = t.device;
  const int64_t n = 5 * (1 << 20) + 3, bytes = n * 4;
  std::vector<float> there(static_cast<size_t>(n)), back(there.size());
  for (int64_t i = 0; i < n; i++) there[size_t(i)] = float(i % 8191);
  void *p = nullptr, *pinned = nullptr, *up = nullptr, *done = nullptr;
  AgCtx ctx[3] = {};
  for (int i = 0; i < 3; i++) ctx[i].stream = b.stream(AgStream(i));
  AgCtx &compute = ctx[AG_STREAM_COMPUTE], &upload = ctx[AG_STREAM_UPLOAD], &download = ctx[AG_STREAM_DOWNLOAD];
  bool ok = b.alloc(nullptr, bytes, &p) == AG_OK && b.alloc_host(bytes, &pinned) == AG_OK &&
            b.event_create(&up) == AG_OK && b.event_create(&done) == AG_OK;
  check(ok, "memory and events for copies");
  if (!ok) return;
  const AgUnary twice{AG_SCALE, p, p, n, AG_F32, 2.0};
  auto compare = [&](const float* got, float factor, const char* way) {
    int64_t at = 0;
    while (at < n && got[at] == factor * there[size_t(at)]) at++;
    check(at == n, "%s: number %lld of %lld", way, (long long)at, (long long)n);
  };
  ok = b.copy(&compute, p, there.data(), bytes) == AG_OK && b.unary.run(&compute, &twice) == AG_OK &&
       b.copy(&compute, back.data(), p, bytes) == AG_OK && b.synchronize(&compute) == AG_OK;
  check(ok, "ordinary memory: %s", compute.error);
  compare(back.data(), 2, "ordinary memory");
  std::memcpy(pinned, there.data(), size_t(bytes));
  ok = b.copy(&upload, p, pinned, bytes) == AG_OK && b.event_record(&upload, up) == AG_OK &&
       b.event_wait(&compute, up) == AG_OK && b.unary.run(&compute, &twice) == AG_OK &&
       b.unary.run(&compute, &twice) == AG_OK && b.event_record(&compute, done) == AG_OK &&
       b.event_wait(&download, done) == AG_OK && b.copy(&download, pinned, p, bytes) == AG_OK &&
       b.synchronize(&download) == AG_OK;
  check(ok, "pinned memory: %s%s%s", upload.error, compute.error, download.error);
  compare(static_cast<float*>(pinned), 4, "pinned memory");
  b.event_destroy(up);
  b.event_destroy(done);
  b.free_host(pinned);
  b.free(nullptr, p);
}

// A graph keeps the launches and their arguments; what is in device memory is read when it runs.
void test_services(Test& t) {
  const AgBackend& b = t.device;
  AgCapabilities c;
  b.capabilities(&c);
  check(!std::strcmp(c.name, "cuda") && c.level[0] && c.device[0], "capabilities");
  for (int64_t bytes : {0, 1, 64, 1000003}) {
    void* p = nullptr;
    check(b.alloc(nullptr, bytes, &p) == AG_OK && reinterpret_cast<uintptr_t>(p) % 64 == 0, "alloc %lld",
          (long long)bytes);
    b.free(nullptr, p);
  }
  void *p = nullptr, *event = nullptr, *graph = nullptr;
  check(b.alloc(nullptr, int64_t(1) << 60, &p) == AG_OUT_OF_MEMORY, "alloc of 2^60 bytes");
  AgCtx ctx{};
  check(b.event_create(&event) == AG_OK && b.event_record(&ctx, event) == AG_OK && b.event_wait(&ctx, event) == AG_OK,
        "events: %s", ctx.error);
  b.event_destroy(event);
  check(b.alloc(nullptr, 4096, &p) == AG_OK, "alloc after a refusal");
  float host[2] = {3, 0};
  check(b.copy(&ctx, p, host, 4) == AG_OK, "copy: %s", ctx.error);
  host[0] = 100;  // the source may change once copy has returned
  check(b.graph_begin(&ctx) == AG_OK, "graph_begin: %s", ctx.error);
  const AgUnary twice{AG_SCALE, p, p, 1, AG_F32, 2.0};
  check(b.unary.run(&ctx, &twice) == AG_OK && b.graph_end(&ctx, &graph) == AG_OK, "recording: %s", ctx.error);
  for (int i = 0; i < 3; i++) check(b.graph_launch(&ctx, graph) == AG_OK, "graph_launch: %s", ctx.error);
  check(b.copy(&ctx, &host[1], p, 4) == AG_OK && b.synchronize(&ctx) == AG_OK && host[1] == 24,
        "three launches of a graph: expected 24, got %g", host[1]);
  b.graph_destroy(graph);
  b.free(nullptr, p);
}

const Registered kCases[] = {{"refusals", test_refusals}, {"services", test_services}, {"copies", test_copies}};

}  // namespace
}  // namespace cuda_test

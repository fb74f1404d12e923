// Bytes of global memory that alignMix's forward reads and writes, counted in the emulation
// (native/cuda/emulator/shim.h) and held against the minimum: inputs once, outputs once. The kernels are compiled for
// ThreadSanitizer, which has them call a function at each access; here these functions are not its runtime but a
// counter. It counts in sectors of 32 bytes, and a sector once for each launch that reads it and once for each that
// writes it: what a launch reads again is taken to come from a cache.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "backend.h"
#include "cuda/emulator/shim.h"

extern "C" const AgBackend* ag_cuda_backend(char* message, int64_t message_bytes);

namespace {

constexpr size_t kSector = 32, kMemory = size_t(64) << 20;
constexpr uint8_t kRead = 1, kWritten = 2;
alignas(64) char memory[kMemory];    // all buffers, one behind the other
uint8_t touched[kMemory / kSector];  // by the launch that runs
size_t used = 0;

struct Buffer {
  const char* name;
  void* p;
  size_t bytes;
  int64_t read = 0, written = 0;
};
std::vector<Buffer> buffers;
uint64_t launch = 0;

void end_launch() {
  for (Buffer& b : buffers) {
    const size_t first = size_t(static_cast<char*>(b.p) - memory) / kSector;
    for (size_t at = first; at < first + (b.bytes + kSector - 1) / kSector; at++) {
      b.read += touched[at] & kRead ? int64_t(kSector) : 0;
      b.written += touched[at] & kWritten ? int64_t(kSector) : 0;
      touched[at] = 0;
    }
  }
}
void note(const void* p, size_t bytes, uint8_t what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(memory);
  if (at >= kMemory) return;
  if (launch != shim::launches) end_launch(), launch = shim::launches;
  for (size_t s = at / kSector; s <= (at + bytes - 1) / kSector; s++) touched[s] |= what;
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_read1(void* p) { note(p, 1, kRead); }
void __tsan_read2(void* p) { note(p, 2, kRead); }
void __tsan_read4(void* p) { note(p, 4, kRead); }
void __tsan_read8(void* p) { note(p, 8, kRead); }
void __tsan_read16(void* p) { note(p, 16, kRead); }
void __tsan_read_range(void* p, size_t n) { note(p, n, kRead); }
void __tsan_write1(void* p) { note(p, 1, kWritten); }
void __tsan_write2(void* p) { note(p, 2, kWritten); }
void __tsan_write4(void* p) { note(p, 4, kWritten); }
void __tsan_write8(void* p) { note(p, 8, kWritten); }
void __tsan_write16(void* p) { note(p, 16, kWritten); }
void __tsan_write_range(void* p, size_t n) { note(p, n, kWritten); }
// Other kernels' and the host's; alignMix has none, so they are not counted. One thread runs.
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }
int __tsan_atomic32_load(const volatile int* p, int) { return *p; }
int __tsan_atomic32_fetch_or(volatile int* p, int bits, int) { return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED); }
int __tsan_atomic32_compare_exchange_strong(volatile int* p, int* expected, int x, int, int) {
  return __atomic_compare_exchange_n(p, expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
long __tsan_atomic64_load(const volatile long* p, int) { return *p; }
void __tsan_atomic64_store(volatile long* p, long x, int) { *p = x; }
long __tsan_atomic64_fetch_add(volatile long* p, long by, int) { return __atomic_fetch_add(p, by, __ATOMIC_RELAXED); }
}

namespace {

int failed = 0;
void check(bool ok, const char* what, double expected, double got) {
  if (ok) return;
  failed = 1;
  std::printf("FAIL %s: expected %.4g, got %.4g\n", what, expected, got);
}

template <class T>
T* buffer(const char* name, int64_t n) {
  const size_t bytes = size_t(n) * sizeof(T);
  if (used + bytes > kMemory) std::abort();
  buffers.push_back({name, memory + used, bytes});
  used += (bytes + 63) / 64 * 64;
  return reinterpret_cast<T*>(buffers.back().p);
}
const Buffer& named(const char* name) {
  for (const Buffer& b : buffers)
    if (!std::strcmp(b.name, name)) return b;
  std::abort();
}

// Each picture is an ALIGN row, its rows and its text, which the gate reads; no id is there twice. T: what holds a
// number.
template <class T>
AgAlignMix arguments(AgDtype dt, int64_t images, int64_t patches, int64_t features, int64_t hidden, int64_t words) {
  buffers.clear(), used = 0;
  AgAlignMix a{};
  const int64_t sample = 1 + patches + words, levels = 8, gate = 32;
  a.tokens = images * sample, a.hidden = hidden, a.vocab = images * words, a.images = images, a.patches = patches;
  a.features = features, a.levels = levels, a.gate_hidden = gate, a.mode = AG_MIX_GATE, a.global = 1, a.dt = dt;
  a.x = buffer<T>("x", images * patches * features), a.w = buffer<T>("w", hidden * features),
  a.b = buffer<T>("b", hidden);
  a.embed = buffer<T>("embed", a.vocab * hidden), a.table = buffer<T>("table", levels * hidden);
  a.gw0 = buffer<T>("gw0", gate * patches), a.gb0 = buffer<T>("gb0", gate);
  a.gw1 = buffer<T>("gw1", (levels - 1) * gate), a.gb1 = buffer<T>("gb1", levels - 1);
  int32_t *token = buffer<int32_t>("token", a.tokens), *image_row = buffer<int32_t>("image_row", images);
  int32_t *align_row = buffer<int32_t>("align_row", images), *ids = buffer<int32_t>("gate_ids", a.vocab);
  int32_t* offsets = buffer<int32_t>("gate_offsets", images + 1);
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t m = t / sample, at = t % sample;
    token[t] = at == 0 ? AG_ALIGN_TOKEN : at <= patches ? AG_IMAGE_TOKEN : int32_t(m * words + at - patches - 1);
  }
  for (int64_t i = 0; i < a.vocab; i++) ids[i] = int32_t(i);
  for (int64_t m = 0; m <= images; m++) offsets[m] = int32_t(m * words);
  for (int64_t m = 0; m < images; m++) align_row[m] = int32_t(m * sample), image_row[m] = int32_t(m * sample + 1);
  a.token = token, a.image_row = image_row, a.align_row = align_row, a.gate_ids = ids, a.gate_offsets = offsets;
  a.gate_entries = a.vocab;
  a.out = buffer<T>("out", a.tokens * hidden), a.mean = buffer<float>("mean", images * hidden);
  a.dots = buffer<float>("dots", images * patches), a.gate_pre = buffer<float>("gate_pre", images * gate);
  a.logits = buffer<float>("logits", images * (levels - 1));
  a.coef = buffer<float>("coef", images * levels);
  return a;
}

// Bytes moved over the minimum. The scratch is the last buffer, and not part of the minimum.
double run(const AgAlignMix& a, const char* name) {
  double least = 0, moved = 0;
  for (const Buffer& b : buffers) least += double(b.bytes);
  const AgBackend* backend = ag_cuda_backend(nullptr, 0);
  AgCtx ctx{};
  ctx.workspace_bytes = backend->align_mix.workspace(&a);
  ctx.workspace = buffer<char>("scratch", ctx.workspace_bytes);
  check(backend->align_mix.run(&ctx, &a) == AG_OK, ctx.error, 0, 1);
  end_launch();
  for (const Buffer& b : buffers) {
    moved += double(b.read + b.written);
    if (b.bytes > 4096)
      std::printf("  %-9s %9zu bytes, read %9" PRId64 ", written %9" PRId64 "\n", b.name, b.bytes, b.read, b.written);
  }
  std::printf("alignMix forward %s: %.0f bytes, %.3f of the minimum\n", name, moved, moved / least);
  // The counter sees the copies into shared memory and the stores: of these each byte moves once.
  for (const Buffer& once : {named("x"), named("w")})
    check(once.read == int64_t(once.bytes), once.name, double(once.bytes), double(once.read));
  const Buffer& out = named("out");
  check(out.written == int64_t(out.bytes), "out", double(out.bytes), double(out.written));
  return moved / least;
}

}  // namespace

int main() {
  const double fused = run(arguments<uint16_t>(AG_BF16, 2, 576, 512, 512, 32), "bf16 2x576x512 -> 512");
  check(fused <= 1.15, "own epilogue", 1.15, fused);
  check(named("out").read == 0, "rows read again", 0, double(named("out").read));
  // f32 takes the dot products from the rows as they are stored.
  const AgAlignMix a = arguments<float>(AG_F32, 1, 64, 64, 128, 32);
  run(a, "f32 1x64x64 -> 128");
  const double rows = double(a.patches * a.hidden) * 4;
  check(double(named("out").read) == rows, "rows read again in f32", rows, double(named("out").read));
  return failed;
}

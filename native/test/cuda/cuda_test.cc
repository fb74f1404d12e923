// The program of cuda_test.h.
//   test_cuda [--schedule SEED] [--filter TEXT | --only CASE] [--library libaligngpt_cuda.so] [--small] [--list]
// --schedule: the order of the emulation's threads (native/cuda/emulator/shim.h). Exit status 1 when a check failed, or
// without a device.
#include "cuda_test.h"

#include <dlfcn.h>

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "core/device.h"
#include "cuda/emulator/shim.h"

extern "C" const AgBackend* ag_cuda_backend(char* message, int64_t message_bytes);  // of the emulation, linked in

namespace cuda_test {
namespace {

constexpr size_t kGuard = 256;
constexpr uint8_t kGuardByte = 0xA5;
int g_failed = 0, g_checks = 0, g_shown = 0;
std::string g_case;
uint64_t g_random = 1;
bool g_small = false;

struct Case {
  const char* name;
  void (*body)(Test&);
};
std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

uint16_t narrow(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

[[noreturn]] void end() {
  std::printf("%d checks, %d failed, ended here\n", g_checks, g_failed);
  std::fflush(stdout);
  std::_Exit(1);
}

// The device's outcome of a copy must be there before the host looks at it.
void transfer(const AgBackend& b, void* to, const void* from, size_t bytes) {
  AgCtx ctx{};
  AgStatus status = bytes ? b.copy(&ctx, to, from, int64_t(bytes)) : AG_OK;
  if (status == AG_OK) status = b.synchronize(&ctx);
  check(status == AG_OK, "copy of %zu bytes: status %d %s", bytes, int(status), ctx.error);
}
void* memory_of(const AgBackend& b, const std::vector<uint8_t>& content) {
  void* p = nullptr;
  const AgStatus status = b.alloc(nullptr, int64_t(content.size()), &p);
  check(status == AG_OK, "alloc of %zu bytes: status %d", content.size(), int(status));
  if (status != AG_OK) end();  // a device that failed gives no more memory, and everything after this would be noise
  transfer(b, p, content.data(), content.size());
  return p;
}

}  // namespace

void check(bool ok, const char* format, ...) {
  g_checks++;
  if (ok) return;
  g_failed++;
  if (++g_shown > 6) return;  // of each case; the count at the end is complete
  va_list args;
  va_start(args, format);
  std::printf("FAIL %s: ", g_case.c_str());
  std::vprintf(format, args);
  std::printf("\n");
  va_end(args);
}

bool small() { return g_small; }
double uniform(double lo, double hi) {  // splitmix64
  uint64_t z = (g_random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return lo + (hi - lo) * (double((z ^ (z >> 31)) >> 11) * 0x1p-53);
}
int64_t below(int64_t n) { return int64_t(uniform(0, double(n))); }
size_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }

Registered::Registered(const char* name, void (*body)(Test&)) { cases().push_back({name, body}); }

// ---- buffers ----------------------------------------------------------------------------------------
double Buffer::number(const std::vector<uint8_t>& from, int64_t i) const {
  const uint8_t* at = from.data() + size_t(i) * size_of(dt);
  float f;
  double d;
  uint32_t u;
  uint16_t h;
  int32_t i32;
  int64_t i64;
  switch (dt) {
    case AG_F32: std::memcpy(&f, at, 4); return f;
    case AG_BF16: std::memcpy(&h, at, 2), u = uint32_t(h) << 16, std::memcpy(&f, &u, 4); return f;
    case AG_F64: std::memcpy(&d, at, 8); return d;
    case AG_I32: std::memcpy(&i32, at, 4); return i32;
    default: std::memcpy(&i64, at, 8); return double(i64);
  }
}
void Buffer::set(int64_t i, double x) {
  uint8_t* at = host.data() + size_t(i) * size_of(dt);
  float f = float(x);
  uint16_t h = narrow(f);
  int32_t i32 = dt == AG_I32 ? int32_t(x) : 0;
  int64_t i64 = dt == AG_I64 ? int64_t(x) : 0;
  switch (dt) {
    case AG_F32: std::memcpy(at, &f, 4); return;
    case AG_BF16: std::memcpy(at, &h, 2); return;
    case AG_F64: std::memcpy(at, &x, 8); return;
    case AG_I32: std::memcpy(at, &i32, 4); return;
    default: std::memcpy(at, &i64, 8); return;
  }
}

Buffer& Test::add(const char* name, Buffer::Role role, AgDtype dt, int64_t n) {
  buffers_.emplace_back();
  Buffer& x = buffers_.back();
  x.name = name;
  x.role = role;
  x.dt = dt;
  x.n = n;
  x.host.assign(x.bytes(), 0xff);  // NaN: an output nobody writes is seen
  return x;
}
Buffer& Test::in(AgDtype dt, int64_t n, double lo, double hi) {
  Buffer& x = add("input", Buffer::kInput, dt, n);
  for (int64_t i = 0; i < n; i++) x.set(i, uniform(lo, hi));
  return x;
}
Buffer& Test::ids(int64_t n, int64_t limit, int64_t lowest) {
  Buffer& x = add("ids", Buffer::kInput, AG_I32, n);
  for (int64_t i = 0; i < n; i++) x.set(i, double(lowest + below(limit - lowest)));
  return x;
}
Buffer& Test::list(const std::vector<int32_t>& values) {
  Buffer& x = add("list", Buffer::kInput, AG_I32, int64_t(values.size()));
  for (int64_t i = 0; i < x.n; i++) x.set(i, values[size_t(i)]);
  return x;
}
Buffer& Test::out(const char* name, AgDtype dt, int64_t n) { return add(name, Buffer::kOutput, dt, n); }
Buffer& Test::in_place(const char* name, AgDtype dt, int64_t n, double lo, double hi) {
  Buffer& x = add(name, Buffer::kInPlace, dt, n);
  for (int64_t i = 0; i < n; i++) x.set(i, uniform(lo, hi));
  return x;
}

// ---- one run ----------------------------------------------------------------------------------------
// An input gets memory of its exact size, so that AddressSanitizer sees reads behind it; an output lies between guards.
void Test::upload(const AgBackend& b) {
  for (Buffer& x : buffers_) {
    const bool guarded = x.role != Buffer::kInput;
    const size_t before = (guarded ? kGuard : 0) + size_t(x.skip) * size_of(x.dt);
    std::vector<uint8_t> content(before, kGuardByte);
    content.insert(content.end(), x.host.begin(), x.host.end());
    if (guarded) content.insert(content.end(), kGuard, kGuardByte);
    memory_.push_back(memory_of(b, content));
    x.at = static_cast<char*>(memory_.back()) + before;
  }
}

void* Test::scratch_for(const AgBackend& b, int64_t bytes) {
  scratch_bytes_ = bytes;
  std::vector<uint8_t> content(size_t(bytes), 0xff);
  content.insert(content.end(), kGuard, kGuardByte);
  return memory_of(b, content);
}

void Test::finish(const AgBackend& b, AgCtx& ctx, const char* label, AgStatus status, int side, void* scratch) {
  const AgStatus later = b.synchronize(&ctx);
  const char* who = side ? "device" : "CPU";
  check(status == AG_OK && later == AG_OK, "%s on the %s: status %d, then %d: %s", label, who, int(status), int(later),
        ctx.error);
  auto intact = [&](const uint8_t* p, size_t n) {
    for (size_t i = 0; i < n; i++)
      if (p[i] != kGuardByte) return false;
    return true;
  };
  std::vector<uint8_t> guard(kGuard);
  transfer(b, guard.data(), static_cast<char*>(scratch) + scratch_bytes_, kGuard);
  check(intact(guard.data(), kGuard), "%s on the %s: wrote behind its scratch of %lld bytes", label, who,
        (long long)scratch_bytes_);
  b.free(nullptr, scratch);
  for (size_t i = 0; i < buffers_.size(); i++) {
    Buffer& x = buffers_[i];
    if (x.role != Buffer::kInput) {
      const size_t before = kGuard + size_t(x.skip) * size_of(x.dt);
      std::vector<uint8_t> all(before + x.bytes() + kGuard);
      transfer(b, all.data(), memory_[i], all.size());
      check(intact(all.data(), before), "%s on the %s: wrote before %s", label, who, x.name);
      check(intact(all.data() + before + x.bytes(), kGuard), "%s on the %s: wrote behind %s", label, who, x.name);
      x.results[side].assign(all.begin() + long(before), all.begin() + long(before + x.bytes()));
    }
    b.free(nullptr, memory_[i]);
  }
  memory_.clear();
}

// ---- comparing --------------------------------------------------------------------------------------
void Test::compare(const char* label) {
  for (const Buffer& x : buffers_) {
    if (x.role == Buffer::kInput) continue;
    check(x.may_vary || x.results[1] == x.results[2], "%s: %s differs between two runs", label, x.name);
    if (x.is_bits) continue;
    if (!x.is_exact && x.dt != AG_I32 && x.dt != AG_I64) {
      compare_numbers(label, x);
      continue;
    }
    auto same = [&](int64_t i) {  // which NaN is the machine's own choice
      const size_t bytes = size_of(x.dt), first = size_t(i) * bytes;
      return !std::memcmp(&x.results[0][first], &x.results[1][first], bytes) ||
             (std::isnan(x.cpu(i)) && std::isnan(x.device(i)));
    };
    int64_t at = 0;
    while (at < x.n && same(at)) at++;
    check(at == x.n, "%s: %s[%lld of %lld]: expected exactly %.9g, got %.9g", label, x.name, (long long)at,
          (long long)x.n, at < x.n ? x.cpu(at) : 0, at < x.n ? x.device(at) : 0);
  }
}

void Test::compare_numbers(const char* label, const Buffer& x) {
  const bool half = dt == AG_BF16 || x.dt == AG_BF16;
  double error = 0, size = 0, far = 0;
  int64_t finite = 0, at = -1;
  for (int64_t i = 0; i < x.n; i++) {
    double want = x.cpu(i), got = x.device(i);
    if (!std::isfinite(want) || !std::isfinite(got)) {
      bool same = want == got || (std::isnan(want) && std::isnan(got));
      check(same, "%s: %s[%lld of %lld]: expected %.9g, got %.9g", label, x.name, (long long)i, (long long)x.n, want,
            got);
      continue;
    }
    error += (got - want) * (got - want);
    size += want * want;
    finite++;
  }
  const double limit = half ? 1e-4 : 1e-7, close = half ? 2e-2 : 3e-5,
               rms = std::sqrt(size / double(finite ? finite : 1));
  check(error <= limit * size, "%s: %s: NMSE %.3g of %lld numbers, expected at most %.0e", label, x.name,
        size > 0 ? error / size : INFINITY, (long long)finite, limit);
  for (int64_t i = 0; i < x.n; i++) {
    double want = x.cpu(i), off = std::fabs(x.device(i) - want) / (close * (std::fabs(want) + rms) + 1e-30);
    if (std::isfinite(off) && off > far) far = off, at = i;
  }
  check(far <= 1, "%s: %s[%lld of %lld]: expected %.9g, got %.9g", label, x.name, (long long)at, (long long)x.n,
        at < 0 ? 0 : x.cpu(at), at < 0 ? 0 : x.device(at));
}

// ---- the contract -----------------------------------------------------------------------------------
namespace {
std::set<const void*> g_ran;

// Both tables have every service and every kernel, and when all cases ran, each kernel has been compared.
void check_contract(const AgBackend& device, bool all) {
  for (const AgBackend* b : {ag_cpu_backend(), &device}) {
    for (size_t at = offsetof(AgBackend, capabilities); at < offsetof(AgBackend, fill); at += sizeof(void (*)())) {
      void* entry;
      std::memcpy(&entry, reinterpret_cast<const char*>(b) + at, sizeof entry);
      check(entry != nullptr, "the table of the %s: expected a function at byte %lld, got none",
            b == &device ? "device" : "CPU", (long long)at);
    }
    const char* missing = ag::missing_kernel(*b);
    check(!missing, "the table of the %s: expected every kernel, got none for %s", b == &device ? "device" : "CPU",
          missing);
  }
#define AG_RAN(kernel, Args, memory, products) \
  if (all) check(g_ran.count(&device.kernel), #kernel ": expected a case that compares it, got none");
  AG_KERNELS(AG_RAN)
#undef AG_RAN
}
}  // namespace
void ran(const void* entry) { g_ran.insert(entry); }

// ---- the program ------------------------------------------------------------------------------------
namespace {

struct Options {
  std::string filter, only, library;
  unsigned schedule = 0;
  bool list = false;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (name == "--list") {
      o.list = true;
      continue;
    }
    if (name == "--small") {
      g_small = true;
      continue;
    }
    const bool known = name == "--filter" || name == "--only" || name == "--library" || name == "--schedule";
    if (!known || i + 1 == argc) {
      std::fprintf(
          stderr,
          "usage: test_cuda [--schedule SEED] [--filter TEXT | --only CASE] [--library FILE] [--small] [--list]\n");
      std::exit(2);
    }
    const char* value = argv[++i];
    if (name == "--filter") o.filter = value;
    if (name == "--only") o.only = value;
    if (name == "--library") o.library = value;
    if (name == "--schedule") o.schedule = unsigned(std::strtoul(value, nullptr, 10));
  }
  return o;
}

const AgBackend* open_device(const Options& o) {
  typedef const AgBackend* (*Open)(char*, int64_t);
  Open open = ag_cuda_backend;
  if (!o.library.empty()) {
    void* library = dlopen(o.library.c_str(), RTLD_NOW | RTLD_LOCAL);
    open = library ? reinterpret_cast<Open>(dlsym(library, "ag_cuda_backend")) : nullptr;
    if (!open) std::printf("FAIL %s\n", dlerror());
  }
  char message[256] = "no entry point";
  const AgBackend* b = open ? open(message, sizeof message) : nullptr;
  if (!b) {
    std::printf("FAIL no device: %s\n", message);
  } else if (b->version != AG_BACKEND_VERSION || b->struct_size != int32_t(sizeof(AgBackend))) {
    std::printf("FAIL the library was built from another contract: version %d, %d bytes\n", b->version, b->struct_size);
    b = nullptr;
  }
  return b;
}

void run_case(const Case& c, const AgBackend& device) {
  const auto start = std::chrono::steady_clock::now();
  const int failed = g_failed, checks = g_checks;
  for (AgDtype dt : {AG_F32, AG_BF16}) {
    g_case = std::string(c.name) + (dt == AG_F32 ? " f32" : " bf16");
    g_shown = 0;
    g_random = 1;
    Test t(*ag_cpu_backend(), device, dt);
    c.body(t);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%-4s %-28s %6d checks %7.2f s\n", g_failed == failed ? "ok" : "FAIL", c.name, g_checks - checks,
              seconds);
  std::fflush(stdout);
}

}  // namespace

int run_all(int argc, char** argv) {
  const Options o = parse(argc, argv);
  shim::set_schedule(o.schedule);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash leaves what was said before it
  std::vector<Case> wanted;
  for (const Case& c : cases())
    if (o.only.empty() ? std::strstr(c.name, o.filter.c_str()) != nullptr : o.only == c.name) wanted.push_back(c);
  if (o.list) {
    for (const Case& c : wanted) std::printf("%s\n", c.name);
    return 0;
  }
  const AgBackend* device = open_device(o);
  if (!device) return 1;
  for (const Case& c : wanted) run_case(c, *device);
  g_case = "contract";
  check_contract(*device, o.filter.empty() && o.only.empty());
  if (!o.only.empty() && !wanted.empty()) return g_failed ? 1 : 0;
  AgCapabilities c;
  device->capabilities(&c);
  std::printf("%s (%s), schedule %u, products by %s: %zu cases, %d checks, %d failed\n", c.device, c.level, o.schedule,
              c.products, wanted.size(), g_checks, g_failed);
  return g_failed || wanted.empty() ? 1 : 0;
}

}  // namespace cuda_test

int main(int argc, char** argv) { return cuda_test::run_all(argc, argv); }

// The program of cpu_test.h. Exit status 1 when a check failed.
#include "cpu_test.h"

#include <cstdarg>

// The refusal of an impossible allocation is part of the test.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace cpu_test {

std::string where;

namespace {

int g_failed = 0, g_checks = 0, g_shown = 0;
std::string g_last;
uint64_t g_random = 1;
uint64_t g_digest;  // of every output of the case that runs

struct Entry {
  const char* topic;
  const char* name;
  void (*each)(Fixture) = nullptr;
  void (*level)(const Level&) = nullptr;
  void (*once)() = nullptr;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace

Cases::Cases(const char* topic, std::initializer_list<Case> cases) {
  for (const Case& c : cases) entries().push_back({topic, c.name, c.run});
}
Cases::Cases(const char* topic, void (*run)(const Level&)) { entries().push_back({topic, topic, nullptr, run}); }
Cases::Cases(const char* topic, void (*run)()) { entries().push_back({topic, topic, nullptr, nullptr, run}); }

void check(bool ok, const char* format, ...) {
  g_checks++;
  if (ok) return;
  g_failed++;
  g_shown = where == g_last ? g_shown + 1 : 1;
  g_last = where;
  if (g_shown > 5) return;  // of each case; the count at the end is complete
  va_list args;
  va_start(args, format);
  std::printf("FAIL %s: ", where.c_str());
  std::vprintf(format, args);
  std::printf("\n");
  va_end(args);
}
void check(bool ok, const std::string& what) { check(ok, "%s", what.c_str()); }

double uniform(double lo, double hi) {  // splitmix64
  uint64_t z = (g_random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return lo + (hi - lo) * (double((z ^ (z >> 31)) >> 11) * 0x1p-53);
}
int64_t below(int64_t n) { return int64_t(uniform(0, double(n))); }

// ---- typed memory between guards --------------------------------------------------------------------
size_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }
const char* name_of(AgDtype dt) {
  static const char* const names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return names[dt];
}
uint16_t bf16_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float bf16_value(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

Data::Data(AgDtype dt, int64_t n, double lo, double hi) : Data(dt, n) {
  for (int64_t i = 0; i < n; i++) set(i, uniform(lo, hi));
}
double Data::get(int64_t i) const {
  const uint8_t* at = raw.data() + kGuard + size_t(i) * size_of(dt);
  float f;
  double d;
  uint16_t h;
  int32_t i32;
  int64_t i64;
  switch (dt) {
    case AG_F32: std::memcpy(&f, at, 4); return f;
    case AG_BF16: std::memcpy(&h, at, 2); return bf16_value(h);
    case AG_F64: std::memcpy(&d, at, 8); return d;
    case AG_I32: std::memcpy(&i32, at, 4); return i32;
    default: std::memcpy(&i64, at, 8); return double(i64);
  }
}
void Data::set(int64_t i, double v) {
  uint8_t* at = raw.data() + kGuard + size_t(i) * size_of(dt);
  float f = float(v);
  uint16_t h = bf16_bits(f);
  int32_t i32 = dt == AG_I32 ? int32_t(v) : 0;
  int64_t i64 = dt == AG_I64 ? int64_t(v) : 0;
  switch (dt) {
    case AG_F32: std::memcpy(at, &f, 4); return;
    case AG_BF16: std::memcpy(at, &h, 2); return;
    case AG_F64: std::memcpy(at, &v, 8); return;
    case AG_I32: std::memcpy(at, &i32, 4); return;
    default: std::memcpy(at, &i64, 8); return;
  }
}
bool Data::guards() const {
  for (size_t i = 0; i < kGuard; i++)
    if (raw[i] != 0xA5 || raw[raw.size() - 1 - i] != 0xA5) return false;
  return true;
}
Data ids(int64_t n, int64_t limit) {
  Data d(AG_I32, n);
  for (int64_t i = 0; i < n; i++) d.set(i, double(below(limit)));
  return d;
}

// ---- running and comparing --------------------------------------------------------------------------
void digest(const void* p, size_t n) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  for (size_t i = 0; i < n; i++) g_digest = (g_digest ^ b[i]) * 0x100000001B3u;
}

Tolerance tolerance(AgDtype dt, double scale) {
  if (dt == AG_F64) return {1e-13, 1e-13 * scale};
  if (dt == AG_BF16) return {0.00392, 2e-6 * scale};
  return {1.3e-6, 1e-6 * scale};
}
void compare(const char* what, const Data& got, const std::function<double(int64_t)>& want, Tolerance t) {
  check(got.guards(), "%s: wrote outside its buffer", what);
  digest(got.p(), got.bytes());
  double worst = 0;
  int64_t at = -1;
  for (int64_t i = 0; i < got.n; i++) {
    double g = got.get(i), w = want(i);
    double limit = t.rel * std::fabs(w) + t.abs;
    double error = std::isnan(w) || std::isnan(g) ? (std::isnan(w) && std::isnan(g) ? 0 : INFINITY)
                   : g == w                       ? 0
                                                  : std::fabs(g - w) / limit;
    if (error > worst) worst = error, at = i;
  }
  check(worst <= 1, "%s[%lld of %lld]: expected %.9g, got %.9g (%.2f x the tolerance)", what, (long long)at,
        (long long)got.n, at < 0 ? 0 : want(at), at < 0 ? 0 : got.get(at), worst);
}

// ---- the program ------------------------------------------------------------------------------------
namespace {

void run_each(const Entry& e, const Level& l) {
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
    where = std::string(l.name) + " " + e.name + " " + name_of(dt);
    uint64_t seen[3];
    for (int turn = 0; turn < 3; turn++) {
      ag_set_threads(turn ? 2 : 1);
      g_random = 1, g_digest = 0xCBF29CE484222325u;
      e.each(Fixture{l.b, dt});
      seen[turn] = g_digest;
    }
    check(seen[0] == seen[1], "one and two threads differ");
    check(seen[1] == seen[2], "two runs differ");
  }
}

// Of those that are wanted.
void run_level(const char* name, const std::vector<Entry>& wanted) {
  const char* asked = std::getenv("ALIGNGPT_CPU_LEVEL");  // amx is for those who name it
  const bool emulated = !std::strcmp(name, "amx_emulated");
  const AgBackend* b = std::strcmp(name, "amx") || (asked && !std::strcmp(asked, name)) ? ag_cpu_level(name) : nullptr;
  if (!b) {
    std::printf("  %s: not on this machine or not asked for, skipped\n", name);
    return;
  }
  const Level level{name, *b, emulated || !std::strcmp(name, "amx") || !std::strcmp(name, "avx512bf16")};
  for (const Entry& e : wanted) {
    where = std::string(name) + " " + e.name;
    g_random = 1;
    if (e.each && !emulated) run_each(e, level);
    if (e.level) e.level(level);
  }
}

}  // namespace

int run_all(const std::string& only) {
  std::vector<Entry> wanted;
  for (const Entry& e : entries())
    if (only.empty() || only == e.topic || only == e.name) wanted.push_back(e);
  for (const char* name : {"portable", "neon", "avx2", "avx512", "avx512bf16", "amx_emulated", "amx"})
    run_level(name, wanted);
  for (const Entry& e : wanted)
    if (e.once) where = e.name, e.once();
  std::printf("%d checks, %d failed\n", g_checks, g_failed);
  return g_failed || !g_checks ? 1 : 0;
}

}  // namespace cpu_test

int main(int argc, char** argv) { return cpu_test::run_all(argc > 1 ? argv[1] : ""); }

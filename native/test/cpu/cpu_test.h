// The kernels at every CPU level this machine has, against plain loops in double. Outputs and scratch lie between
// guards; scratch starts as NaN. One program (cpu_test.cc), one file of cases for each topic of native/ops: `test_cpu
// TOPIC` runs one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "cpu/level.h"
#include "cpu/pool.h"

namespace cpu_test {

void check(bool ok, const char* format, ...) __attribute__((format(printf, 2, 3)));
void check(bool ok, const std::string& what);
extern std::string where;  // what a message begins with: level, case, dtype

// The case's own random numbers.
double uniform(double lo = -1, double hi = 1);
int64_t below(int64_t n);

// ---- typed memory between guards --------------------------------------------------------------------
size_t size_of(AgDtype dt);
const char* name_of(AgDtype dt);
uint16_t bf16_bits(float f);
float bf16_value(uint16_t b);
inline AgDtype acc_of(AgDtype dt) { return dt == AG_F64 ? AG_F64 : AG_F32; }

struct Data {
  static constexpr size_t kGuard = 128;
  AgDtype dt;
  int64_t n;
  std::vector<uint8_t> raw;
  Data(AgDtype dt, int64_t n) : dt(dt), n(n), raw(bytes() + 2 * kGuard, 0xA5) {}
  Data(AgDtype dt, int64_t n, double lo, double hi);  // random numbers
  size_t bytes() const { return size_t(n) * size_of(dt); }
  void* p() { return raw.data() + kGuard; }
  const void* p() const { return raw.data() + kGuard; }
  double get(int64_t i) const;
  void set(int64_t i, double v);
  bool guards() const;  // whether nobody wrote into them
};
Data ids(int64_t n, int64_t limit);
inline const int32_t* i32(const Data& d) { return static_cast<const int32_t*>(d.p()); }

// ---- running and comparing --------------------------------------------------------------------------
// Runs a kernel with exactly the scratch it asks for and looks behind it.
template <class Entry, class A>
AgStatus call(const Entry& kernel, const A& args) {
  AgCtx ctx{};
  ctx.workspace_bytes = kernel.workspace ? kernel.workspace(&args) : 0;
  std::vector<uint8_t> raw(size_t(ctx.workspace_bytes) + 192, 0xFF);
  auto base = reinterpret_cast<uintptr_t>(raw.data());
  size_t skip = (64 - base % 64) % 64;
  ctx.workspace = raw.data() + skip;
  AgStatus status = kernel.run(&ctx, &args);
  bool intact = true;
  for (size_t i = skip + size_t(ctx.workspace_bytes); i < raw.size(); i++) intact = intact && raw[i] == 0xFF;
  check(intact, "wrote past its scratch of %lld bytes", (long long)ctx.workspace_bytes);
  check(status == AG_OK || ctx.error[0], "status %d without a message", int(status));
  return status;
}
template <class Entry, class A>
void run(const Entry& kernel, const A& args) {
  AgStatus status = call(kernel, args);
  check(status == AG_OK, "status %d", int(status));
}

void digest(const void* p, size_t n);  // an output: its bytes must be the same in every turn

struct Tolerance {
  double rel, abs;
};
// What a result in dt may be off by when its sums are kept in acc; `scale` is the size of the terms that cancel.
Tolerance tolerance(AgDtype dt, double scale = 1);
// got[i] = want(i)
void compare(const char* what, const Data& got, const std::function<double(int64_t)>& want, Tolerance t);

// ---- cases ------------------------------------------------------------------------------------------
struct Level {
  const char* name;
  const AgBackend& b;
  bool bf16_only;  // all else is the code of avx512
};
struct Fixture {
  const AgBackend& b;
  AgDtype dt;
};
// Puts cases into the program: of a Fixture, for each level and f32, bf16 and f64, with one thread, two threads and two
// threads again, which must give the same bytes; of a Level, for each level, amx_emulated too; of nothing, once.
struct Cases {
  struct Case {
    const char* name;
    void (*run)(Fixture);
  };
  Cases(const char* topic, std::initializer_list<Case> cases);
  Cases(const char* topic, void (*run)(const Level&));
  Cases(const char* topic, void (*run)());
};

}  // namespace cpu_test

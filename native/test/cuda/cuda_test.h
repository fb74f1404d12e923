// Every op of the contract on a device backend against the CPU backend. A case describes its buffers once; run()
// executes the op on the CPU, on the device, and on the device again, each time from the same bytes, and compares every
// output:
//   - device with CPU: NMSE <= 1e-7 (f32) or 1e-4 (bf16), no element far off, NaN and infinity where the CPU has them;
//     integers and buffers marked exact() byte for byte
//   - device with itself: the same bytes, unless they may vary
//   - the guards before and after every output, and behind the scratch
// Cases live in native/test/cuda, one file for each topic of native/ops; a Registered object puts them into the one
// program, which runs with the emulation or, with --library, on a GPU.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "backend.h"

namespace cuda_test {

void check(bool ok, const char* format, ...) __attribute__((format(printf, 2, 3)));
bool small();  // --small: each case in its cheapest form that still takes every path, for sanitizers that run a hundred
               // times slower
double uniform(double lo = -1, double hi = 1);  // the case's own random numbers
int64_t below(int64_t n);
size_t size_of(AgDtype dt);
void ran(const void* entry);  // an entry of the device's table

const int64_t kLengths[] = {0, 1, 7, 8, 33, 1000, 9001};

struct Buffer {
  enum Role { kInput, kOutput, kInPlace };
  const char* name;
  Role role;
  AgDtype dt;
  int64_t n;
  std::vector<uint8_t> host;               // what a run begins with
  std::vector<uint8_t> results[3];         // CPU, device, device again
  bool is_exact = false, is_bits = false;  // bits: no numbers; the case compares them itself
  bool may_vary = false;                   // two runs need not give the same bytes
  int64_t skip = 0;                        // elements before it: an address that is not aligned
  void* at = nullptr;                      // on the side that runs

  void* p() const { return at; }
  const int32_t* i32() const { return static_cast<const int32_t*>(at); }
  double get(int64_t i) const { return number(host, i); }
  void set(int64_t i, double x);
  double cpu(int64_t i) const { return number(results[0], i); }
  double device(int64_t i) const { return number(results[1], i); }
  size_t bytes() const { return size_t(n) * size_of(dt); }
  double number(const std::vector<uint8_t>& from, int64_t i) const;
  Buffer& exact() { return is_exact = true, *this; }
  Buffer& varies(bool may) { return may_vary = may, *this; }
  Buffer& shifted(int64_t elements) { return skip = elements, *this; }
};

// One case in one dtype. Buffers live as long as the case; clear() forgets those of a finished shape.
class Test {
 public:
  Test(const AgBackend& cpu, const AgBackend& device, AgDtype dt) : cpu(cpu), device(device), dt(dt) {}
  const AgBackend& cpu;
  const AgBackend& device;
  const AgDtype dt;  // f32 or bf16

  Buffer& in(AgDtype dt, int64_t n, double lo = -1, double hi = 1);
  Buffer& in(int64_t n, double lo = -1, double hi = 1) { return in(dt, n, lo, hi); }
  Buffer& ids(int64_t n, int64_t limit, int64_t lowest = 0);  // i32 in [lowest, limit)
  Buffer& list(const std::vector<int32_t>& values);
  Buffer& out(const char* name, AgDtype dt, int64_t n);
  Buffer& out(const char* name, int64_t n) { return out(name, dt, n); }
  Buffer& in_place(const char* name, AgDtype dt, int64_t n, double lo = -1, double hi = 1);  // input and output
  void clear() { buffers_.clear(); }

  // `make` returns the op's arguments; it is called once for each side, so that Buffer::p() is the side's address.
  template <class Entry, class Make>
  void run(const char* label, Entry AgBackend::* op, const Make& make) {
    ran(&(device.*op));
    for (int side = 0; side < 3; side++) {
      const AgBackend& b = side ? device : cpu;
      upload(b);
      const Entry& kernel = b.*op;
      const auto args = make();
      void* scratch = scratch_for(b, kernel.workspace ? kernel.workspace(&args) : 0);
      AgCtx ctx{};
      ctx.workspace = scratch;
      ctx.workspace_bytes = scratch_bytes_;
      const AgStatus status = kernel.run(&ctx, &args);
      finish(b, ctx, label, status, side, scratch);
      if (status != AG_OK) return;
    }
    compare(label);
  }
  // The device refuses the arguments with this status and a message.
  template <class Entry, class Args>
  void refuse(const char* label, Entry AgBackend::* op, const Args& args, AgStatus expected) {
    AgCtx ctx{};
    const AgStatus got = (device.*op).run(&ctx, &args);
    check(got == expected && ctx.error[0], "%s: expected status %d with a message, got %d '%s'", label, int(expected),
          int(got), ctx.error);
  }

 private:
  Buffer& add(const char* name, Buffer::Role role, AgDtype dt, int64_t n);
  void upload(const AgBackend& b);
  void* scratch_for(const AgBackend& b, int64_t bytes);
  void finish(const AgBackend& b, AgCtx& ctx, const char* label, AgStatus status, int side, void* scratch);
  void compare(const char* label);
  void compare_numbers(const char* label, const Buffer& x);
  std::deque<Buffer> buffers_;
  std::vector<void*> memory_;  // of the run in progress, one for each buffer
  int64_t scratch_bytes_ = 0;
};

inline AgGrad grad(const Buffer& x, bool accumulate) { return AgGrad{x.p(), x.dt, accumulate}; }

void every_product(Test&);  // the case gemm

struct Registered {
  Registered(const char* name, void (*body)(Test&));
};

}  // namespace cuda_test

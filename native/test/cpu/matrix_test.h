// What the cases of matrix products, attention and alignMix need besides cpu_test.h: outputs that are compared as a
// whole, with one thread against two bit for bit, nothing written beyond them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu_test.h"

namespace cpu_test {

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

// Whether a level only passes this dtype on: f64 is at portable, f32 of a level for bf16 at avx512.
inline bool elsewhere(const Level& l, AgDtype dt) {
  return (dt == AG_F64 && std::string(l.name) != "portable") || (dt == AG_F32 && l.bf16_only);
}

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
    uint16_t h = bf16_bits(f);
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

// Runs a kernel with exactly the scratch it asked for, full of NaN; checks that it succeeded and stayed inside.
template <class Entry, class Args>
void launch(const char* what, const Entry& kernel, const Args& a) {
  int64_t bytes = kernel.workspace(&a);
  std::vector<unsigned char> raw(size_t(bytes) + 128, 0xFF);
  unsigned char* base = raw.data() + (64 - reinterpret_cast<uintptr_t>(raw.data()) % 64) % 64;
  AgCtx ctx{};
  ctx.workspace = base;
  ctx.workspace_bytes = bytes;
  AgStatus s = kernel.run(&ctx, &a);
  check(s == AG_OK, text(what, ": status ", int(s), " ", ctx.error));
  bool inside = true;
  for (unsigned char* q = base + bytes; q < raw.data() + raw.size(); q++) inside = inside && *q == 0xFF;
  check(inside, text(what, " wrote beyond its scratch"));
}

// Relative precision of a value stored in dt.
inline double unit(AgDtype dt) { return dt == AG_BF16 ? 1.0 / 256 : dt == AG_F64 ? 1e-15 : 6e-8; }

void compare(const char* what, const Buffer& got, const std::vector<double>& want, double absolute, double relative);
// Runs `body` with 1 and 2 threads and compares the outputs' bytes.
void on_both(const std::vector<Buffer*>& outputs, const std::function<void()>& body);

double activation(AgUnaryOp op, double x);

// ---- attention --------------------------------------------------------------------------------------
struct Attended {
  std::vector<int32_t> nq, nk;
  int64_t heads, kv_heads, dim;
  bool causal;
  int64_t gap;  // added to the row strides
};

std::vector<int32_t> offsets_of(const std::vector<int32_t>& lengths);

// Everything in double; gradients by the textbook formulas.
struct Reference {
  std::vector<double> o, lse, dq, dk, dv;
};
Reference attention_reference(const Attended& s, double scale, int64_t ldq, int64_t ldk, const std::vector<double>& q,
                              const std::vector<double>& k, const std::vector<double>& v,
                              const std::vector<double>& d_o, const std::vector<double>& old);

}  // namespace cpu_test

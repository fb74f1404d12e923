// Rotation of queries and keys, and the cache they are written to.
#include "cpu_test.h"

namespace cpu_test {
namespace {

void test_rope(Fixture f) {
  const AgDtype acc = acc_of(f.dt);
  for (int64_t dim : {2, 6, 64, 80, 128})
    for (int64_t tokens : {0, 1, 37}) {
      const int64_t heads = 4, kv = 2, ld = (heads + 2 * kv) * dim, width = kv * dim, half = dim / 2, places = 50,
                    slots = 60;
      Data x(f.dt, tokens * ld, -2, 2), cos(acc, places * half), sin(acc, places * half);
      for (int64_t i = 0; i < cos.n; i++) {
        double angle = double(i / half) * std::pow(10000.0, -double(i % half) / double(half));
        cos.set(i, std::cos(angle)), sin.set(i, std::sin(angle));
      }
      Data position = ids(tokens, places), slot = ids(tokens, 1);
      for (int64_t t = 0; t < tokens; t++)
        slot.set(t, double((t * 7 + 3) % slots));  // 7 and 60 have no factor in common
      for (double sign : {1.0, -1.0}) {
        auto rotated = [&](int64_t i) {
          int64_t t = i / ld, c = i % ld, j = c % dim;
          if (c >= (heads + kv) * dim) return x.get(i);
          int64_t at = i32(position)[t] * half + j % half;
          double other = j < half ? -x.get(i + half) : x.get(i - half);
          return x.get(i) * cos.get(at) + sign * other * sin.get(at);
        };
        for (bool cached : {false, true}) {
          Data y = x, k(f.dt, slots * width, -1, 1), v(f.dt, slots * width, -1, 1), k0 = k, v0 = v;
          run(f.b.rope, AgRope{y.p(), i32(position), cos.p(), sin.p(), tokens, heads, kv, dim, sign,
                               cached ? k.p() : nullptr, cached ? v.p() : nullptr, i32(slot), f.dt});
          compare("rope", y, rotated, tolerance(f.dt));
          std::vector<int64_t> from(size_t(slots), -1);
          for (int64_t t = 0; t < tokens && cached; t++) from[size_t(i32(slot)[t])] = t;
          auto in_cache = [&](const Data& before, int64_t first) {
            return [&, first](int64_t i) {
              const int64_t t = from[size_t(i / width)];
              return t < 0 ? before.get(i) : y.get(t * ld + first + i % width);
            };
          };
          compare("keys in the cache", k, in_cache(k0, heads * dim), {0, 0});
          compare("values in the cache", v, in_cache(v0, (heads + kv) * dim), {0, 0});
        }
      }
    }
}

const Cases kCases("qkv", {{"rope", test_rope}});

}  // namespace
}  // namespace cpu_test

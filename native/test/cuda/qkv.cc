// Rotation of queries and keys, and the cache they are written to (cuda_test.h).
#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_rope(Test& t) {
  const int64_t shapes[][4] = {
      {0, 1, 1, 8}, {5, 4, 2, 16}, {7, 2, 1, 64}, {3, 3, 3, 6}};  // tokens, heads, kv_heads, dim
  for (auto& s : shapes)
    for (double sign : {1.0, -1.0})
      for (bool cached : {false, true}) {
        const int64_t tokens = s[0], heads = s[1], kv = s[2], dim = s[3], slots = 2 * tokens + 1;
        Buffer &position = t.ids(tokens, 11), &cos = t.in(AG_F32, 11 * dim / 2), &sin = t.in(AG_F32, 11 * dim / 2),
               &slot = t.ids(tokens, slots);
        for (int64_t i = 0; i < tokens; i++) slot.set(i, double(2 * i + i % 2));
        Buffer& x = t.in_place("rows", t.dt, tokens * (heads + 2 * kv) * dim);
        Buffer &k = t.in_place("key cache", t.dt, slots * kv * dim),
               &v = t.in_place("value cache", t.dt, slots * kv * dim).exact();
        t.run("rope", &AgBackend::rope, [&] {
          return AgRope{x.p(),
                        position.i32(),
                        cos.p(),
                        sin.p(),
                        tokens,
                        heads,
                        kv,
                        dim,
                        sign,
                        cached ? k.p() : nullptr,
                        cached ? v.p() : nullptr,
                        slot.i32(),
                        t.dt};
        });
        t.clear();
      }
}

const Registered kCases[] = {{"rope", test_rope}};

}  // namespace
}  // namespace cuda_test

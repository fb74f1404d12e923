// Patches of images (cuda_test.h).
#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_patchify(Test& t) {
  const int64_t shapes[][5] = {
      {0, 3, 4, 4, 2}, {2, 3, 28, 42, 14}, {1, 1, 6, 9, 3}};  // images, channels, height, width, patch
  for (auto& s : shapes) {
    const int64_t n = s[0] * s[1] * s[2] * s[3];
    Buffer &pixels = t.in(n), &out = t.out("rows", n).exact();
    t.run("patchify", &AgBackend::patchify,
          [&] { return AgPatchify{out.p(), pixels.p(), s[0], s[1], s[2], s[3], s[4], t.dt}; });
    t.clear();
  }
}

const Registered kCases[] = {{"patchify", test_patchify}};

}  // namespace
}  // namespace cuda_test

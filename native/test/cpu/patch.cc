// Patches of images.
#include "cpu_test.h"

namespace cpu_test {
namespace {

void test_patchify(Fixture f) {
  int64_t images = 2, channels = 3, height = 28, width = 42, patch = 14;
  Data x(f.dt, images * channels * height * width, -1, 1), y(f.dt, x.n);
  run(f.b.patchify, AgPatchify{y.p(), x.p(), images, channels, height, width, patch, f.dt});
  auto want = [&](int64_t i) {
    int64_t depth = channels * patch * patch, row = i / depth, c = i % depth / (patch * patch), v = i / patch % patch,
            u = i % patch;
    int64_t across = width / patch, down = height / patch, px = row % across, py = row / across % down,
            m = row / (across * down);
    return x.get(((m * channels + c) * height + py * patch + v) * width + px * patch + u);
  };
  compare("patches", y, want, {0, 0});
}

const Cases kCases("patch", {{"patchify", test_patchify}});

}  // namespace
}  // namespace cpu_test

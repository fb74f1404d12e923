// CLIP's patch embedding.
#include "linear.h"

namespace ag::ops {

struct PatchShape {
  int64_t images, channels, height, width, patch, patches, depth, dim;
};

static PatchShape patch_shape(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position) {
  const char* op = "patchEmbedding";
  want_float(op, "pixels", pixels);
  want_rank(op, "pixels", pixels, 4);
  want_rank(op, "weight", weight, 4);
  for (const Tensor* t : {&weight, &cls, &position}) want_dtype(op, "weights", *t, pixels.dt);
  want_same_device(op, {&pixels, &weight, &cls, &position});
  PatchShape s;
  s.images = pixels.shape[0];
  s.channels = pixels.shape[1];
  s.height = pixels.shape[2];
  s.width = pixels.shape[3];
  s.dim = weight.shape[0];
  s.patch = weight.shape[2];
  want_shape(op, "weight", weight, Shape{s.dim, s.channels, s.patch, s.patch});
  check(s.patch > 0 && s.height % s.patch == 0 && s.width % s.patch == 0, "ERR_SHAPE",
        "[patchEmbedding] pixels: expected a multiple of the patch size ", s.patch, ", got ", pixels.shape);
  s.patches = (s.height / s.patch) * (s.width / s.patch);
  s.depth = s.channels * s.patch * s.patch;
  want_shape(op, "class", cls, Shape{s.dim});
  want_shape(op, "position", position, Shape{s.patches + 1, s.dim});
  return s;
}

Tensor patch_embedding(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position) {
  PatchShape s = patch_shape(pixels, weight, cls, position);
  Device* device = pixels.device();
  const char* op = "patchEmbedding";
  int64_t rows = s.patches + 1, size = dtype_size(pixels.dt);
  Tensor cols = empty(device, Shape{s.images * s.patches, s.depth}, pixels.dt);
  run(op, device, &AgBackend::patchify,
      AgPatchify{cols.data(), pixels.data(), s.images, s.channels, s.height, s.width, s.patch, pixels.dt});
  Tensor y = empty(device, Shape{s.images, rows, s.dim}, pixels.dt);
  for (int64_t i = 0; i < s.images; i++) {  // each image's patches go straight behind its class row
    AgGemm g = product(cols, false, weight, true, s.patches, s.dim, s.depth);
    g.a = cols.as<char>() + i * s.patches * s.depth * size;
    g.c = y.as<char>() + (i * rows + 1) * s.dim * size;
    gemm(op, device, g);
  }
  if (s.images) {
    run(op, device, &AgBackend::copy2d, AgCopy2d{y.data(), rows * s.dim * size, cls.data(), 0, s.images, s.dim * size});
    run(op, device, &AgBackend::binary,
        AgBinary{AG_ADD, y.data(), y.data(), position.data(), y.numel(), rows * s.dim, y.dt});
  }
  Tensor saved = wants_grad(weight) ? cols : Tensor();
  record(op, {&y}, {weight, cls, position}, [=](Grads& grads) {
    const Tensor& dy = grads.out();
    Device* d = dy.device();
    if (grads.needs(2))
      run(op, d, &AgBackend::col_sum,
          AgColSum{grads.slot(2), dy.data(), s.images, rows * s.dim, rows * s.dim, dy.dt, 1.0, nullptr});
    if (grads.needs(1))
      run(op, d, &AgBackend::col_sum,
          AgColSum{grads.slot(1), dy.data(), s.images, s.dim, rows * s.dim, dy.dt, 1.0, nullptr});
    if (grads.needs(0)) {
      Tensor dp = empty(d, Shape{s.images * s.patches, s.dim}, dy.dt);
      int64_t bytes = s.patches * s.dim * size;
      if (bytes && s.images)
        run(op, d, &AgBackend::copy2d,
            AgCopy2d{dp.data(), bytes, dy.as<char>() + s.dim * size, bytes + s.dim * size, s.images, bytes});
      AgGemm g = product(dp, true, saved, false, s.dim, s.depth, s.images * s.patches);
      into(g, grads.slot(0));
      gemm(op, d, g);
    }
  });
  return y;
}

}  // namespace ag::ops

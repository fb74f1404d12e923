// AdamW over all tensors in one call. Memory bound: one pass, everything read and written once.
#include "vec.h"

namespace AG_LEVEL {
namespace {

struct Factors {
  float decay, one_b1, b2, one_b2, step, inv_root2, eps, scale;  // 1 - beta is taken in double: 1 - 0.9f is not 0.1f
};

template <class P, class G>
void adamw_range(const AgAdamWTensor& t, const Factors& f, int64_t lo, int64_t hi) {
  P* p = static_cast<P*>(t.p) + lo;
  const G* g = static_cast<const G*>(t.g) + lo;
  float *ms = t.m + lo, *vs = t.v + lo, *master = t.master ? t.master + lo : nullptr;
  each_vector<float>(hi - lo, [&](int64_t i, int64_t n) {
    vf grad = get(g + i, n) * f.scale, m = get(ms + i, n), v = get(vs + i, n);
    vf w = master ? get(master + i, n) : get(p + i, n);
    m = m + (grad - m) * f.one_b1;
    v = v * f.b2 + grad * grad * f.one_b2;
    w = w * f.decay - m * f.step / (vsqrt(v) * f.inv_root2 + f.eps);
    set(ms + i, m, n);
    set(vs + i, v, n);
    if (master) set(master + i, w, n);
    set(p + i, w, n);
  });
}

constexpr int64_t kPiece = 32768;

void adamw_piece(const AgAdamW* a, const AgAdamWTensor& t, int64_t lo, int64_t hi) {
  double bias1 = 1 - pow(a->beta1, double(a->step)), bias2 = 1 - pow(a->beta2, double(a->step));
  Factors f{float(1 - t.lr * t.weight_decay),
            float(1 - a->beta1),
            float(a->beta2),
            float(1 - a->beta2),
            float(t.lr / bias1),
            float(1 / sqrt(bias2)),
            float(a->eps),
            float(a->grad_scale)};
  if (t.dt_p == AG_F32 && t.dt_g == AG_F32)
    adamw_range<float, float>(t, f, lo, hi);
  else if (t.dt_p == AG_F32)
    adamw_range<float, bf16>(t, f, lo, hi);
  else if (t.dt_g == AG_F32)
    adamw_range<bf16, float>(t, f, lo, hi);
  else
    adamw_range<bf16, bf16>(t, f, lo, hi);
}

}  // namespace

AgStatus adamw(AgCtx* ctx, const AgAdamW* a) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < a->count; i++) {
    const AgAdamWTensor& t = a->tensors[i];
    if (t.dt_p > AG_BF16) return bad_dtype(ctx, "adamw", t.dt_p, "a parameter in f32 or bf16");
    if (t.dt_g > AG_BF16) return bad_dtype(ctx, "adamw", t.dt_g, "a gradient in f32 or bf16");
    pieces += div_up(t.n, kPiece);
  }
  parallel_for(pieces, [&](int64_t piece) {
    int64_t i = 0;
    while (piece >= div_up(a->tensors[i].n, kPiece)) piece -= div_up(a->tensors[i++].n, kPiece);
    adamw_piece(a, a->tensors[i], piece * kPiece, min_of(a->tensors[i].n, (piece + 1) * kPiece));
  });
  return AG_OK;
}

}  // namespace AG_LEVEL

// AdamW over all tensors in one call. Memory bound: one pass, everything read and written once.
#include "vec.h"

namespace AG_LEVEL {
namespace {

struct Factors {
  float decay, one_b1, b2, one_b2, step,  // 1 - beta is taken in double: 1 - 0.9f is not 0.1f
       inv_root2, eps, scale;
};

template <class P, class G>
void adamw_range(const AgAdamWTensor& t, const Factors& f, int64_t lo, int64_t hi) {
  constexpr int W = kWidth<float>;
  P* p = static_cast<P*>(t.p);
  const G* g = static_cast<const G*>(t.g);
  for (int64_t i = lo; i < hi; i += W) {
    int64_t n = min_of(W, hi - i);
    bool whole = n == W;
    vf grad = (whole ? load(g + i) : load_n(g + i, n)) * f.scale;
    vf m = whole ? load(t.m + i) : load_n(t.m + i, n), v = whole ? load(t.v + i) : load_n(t.v + i, n);
    vf w = t.master ? (whole ? load(t.master + i) : load_n(t.master + i, n)) : (whole ? load(p + i) : load_n(p + i, n));
    m = m + (grad - m) * f.one_b1;
    v = v * f.b2 + grad * grad * f.one_b2;
    vf root = {};
    for (int j = 0; j < W; j++) root[j] = __builtin_sqrtf(v[j]);
    w = w * f.decay - m * f.step / (root * f.inv_root2 + f.eps);
    whole ? store(t.m + i, m) : store_n(t.m + i, m, n);
    whole ? store(t.v + i, v) : store_n(t.v + i, v, n);
    if (t.master) whole ? store(t.master + i, w) : store_n(t.master + i, w, n);
    whole ? store(p + i, w) : store_n(p + i, w, n);
  }
}

constexpr int64_t kPiece = 65536;

void adamw_piece(const AgAdamW* a, const AgAdamWTensor& t, int64_t lo, int64_t hi) {
  double bias1 = 1 - pow(a->beta1, double(a->step)), bias2 = 1 - pow(a->beta2, double(a->step));
  Factors f{float(1 - t.lr * t.weight_decay), float(1 - a->beta1), float(a->beta2), float(1 - a->beta2), float(t.lr / bias1),
            float(1 / sqrt(bias2)), float(a->eps), float(a->grad_scale)};
  if (t.dt_p == AG_F32) t.dt_g == AG_F32 ? adamw_range<float, float>(t, f, lo, hi) : adamw_range<float, bf16>(t, f, lo, hi);
  else t.dt_g == AG_F32 ? adamw_range<bf16, float>(t, f, lo, hi) : adamw_range<bf16, bf16>(t, f, lo, hi);
}

}  // namespace

AgStatus adamw(AgCtx*, const AgAdamW* a) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < a->count; i++) pieces += div_up(a->tensors[i].n, kPiece);
  parallel_for(pieces, [&](int64_t piece) {
    int64_t i = 0;
    while (piece >= div_up(a->tensors[i].n, kPiece)) piece -= div_up(a->tensors[i++].n, kPiece);
    adamw_piece(a, a->tensors[i], piece * kPiece, min_of(a->tensors[i].n, (piece + 1) * kPiece));
  });
  return AG_OK;
}

}  // namespace AG_LEVEL

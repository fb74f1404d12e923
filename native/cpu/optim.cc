// AdamW over all tensors in one call. Memory bound: one pass, everything read and written once.
#include "vec.h"

namespace AG_LEVEL {
namespace {

struct Factors {
  float decay, one_b1, b2, one_b2, step, inv_root2, eps, scale;  // 1 - beta is taken in double: 1 - 0.9f is not 0.1f
};

struct State {
  vf w, m, v;
};

State next(const State& s, vf grad, const Factors& f) {
  vf m = s.m + (grad - s.m) * f.one_b1, v = s.v * f.b2 + grad * grad * f.one_b2;
  return {s.w * f.decay - m * f.step / (vsqrt(v) * f.inv_root2 + f.eps), m, v};
}

// f32 moments; w is a bf16 parameter's master, or p itself.
template <class P, class G>
void full_range(const AgAdamWTensor& t, const Factors& f, int64_t lo, int64_t hi) {
  P* p = static_cast<P*>(t.p) + lo;
  const G* g = static_cast<const G*>(t.g) + lo;
  float *ms = static_cast<float*>(t.m) + lo, *vs = static_cast<float*>(t.v) + lo;
  float* master = t.master ? static_cast<float*>(t.master) + lo : nullptr;
  each_vector<float>(hi - lo, [&](int64_t i, int64_t n) {
    State s{master ? get(master + i, n) : get(p + i, n), get(ms + i, n), get(vs + i, n)};
    s = next(s, get(g + i, n) * f.scale, f);
    set(ms + i, s.m, n);
    set(vs + i, s.v, n);
    if (master) set(master + i, s.w, n);
    set(p + i, s.w, n);
  });
}

// ---- compact state: 10 bytes a parameter with its gradient (AgAdamWTensor) -------------------------
template <class V>
inline V mix(V x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The high halves of the lanes, without rounding.
inline void set_high(bf16* p, vu x, int64_t n) {
  constexpr int64_t W = kWidth<float>;
  bf16 t[W];
#if defined(AG_LEVEL_AVX512)
  __m256i h = _mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)(x >> 16));
  if (n == W) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(t), h);
#else
  vh h = __builtin_convertvector(x >> 16, vh);
  if (n == W) return void(memcpy(p, &h, sizeof h));
  memcpy(t, &h, sizeof h);
#endif
  memcpy(p, t, size_t(n) * sizeof(bf16));
}

// For rounding by adding: a NaN with all bits set, as a GPU's gradients have it, would become -0.
inline vu bits_of(vf x) {
  const vu number = (vu)(x == x);
  return ((vu)x & number) | (0x7fc00000u & ~number);
}

template <class G>
void compact_range(const AgAdamWTensor& t, const Factors& f, uint32_t key, int64_t lo, int64_t hi) {
  bf16 *p = static_cast<bf16*>(t.p) + lo, *rest = static_cast<bf16*>(t.master) + lo;
  bf16 *ms = static_cast<bf16*>(t.m) + lo, *vs = static_cast<bf16*>(t.v) + lo;
  const G* g = static_cast<const G*>(t.g) + lo;
  vu lane;
  for (int i = 0; i < kWidth<float>; i++) lane[i] = uint32_t(i);
  each_vector<float>(hi - lo, [&](int64_t i, int64_t n) {
    vu bits = (vu)get(p + i, n) + (vu)((vi)get(rest + i, n) >> 16);
    State s = next({(vf)bits, get(ms + i, n), get(vs + i, n)}, get(g + i, n) * f.scale, f);
    bits = bits_of(s.w);
    vu rounded = (bits + 0x8000u) & 0xffff0000u;
    const uint64_t at = uint64_t(t.first + lo + i);
    vu low = lane + uint32_t(at), r = mix(low ^ mix(uint32_t(at >> 32) ^ key));
    set_high(p + i, rounded, n);
    set_high(rest + i, (bits - rounded) << 16, n);
    set_high(ms + i, bits_of(s.m) + (r & 0xffffu), n);
    set_high(vs + i, bits_of(s.v) + (r >> 16), n);
  });
}

constexpr int64_t kPiece = 32768;

void adamw_piece(const AgAdamW* a, const AgAdamWTensor& t, float scale, int64_t lo, int64_t hi) {
  const double lr = a->now->lr * t.lr_scale, step = double(a->now->step);
  Factors f{float(1 - lr * t.weight_decay),
            float(1 - a->beta1),
            float(a->beta2),
            float(1 - a->beta2),
            float(lr / (1 - pow(a->beta1, step))),
            float(1 / sqrt(1 - pow(a->beta2, step))),
            float(a->eps),
            scale};
  if (t.state == AG_STATE_COMPACT) {
    const uint64_t number = uint64_t(a->now->step);
    const uint32_t key =
        mix(uint32_t(number >> 32) ^ mix(uint32_t(number) ^ mix(uint32_t(a->seed) ^ mix(uint32_t(a->seed >> 32)))));
    return t.dt_g == AG_F32 ? compact_range<float>(t, f, key, lo, hi) : compact_range<bf16>(t, f, key, lo, hi);
  }
  if (t.dt_p == AG_F32 && t.dt_g == AG_F32)
    full_range<float, float>(t, f, lo, hi);
  else if (t.dt_p == AG_F32)
    full_range<float, bf16>(t, f, lo, hi);
  else if (t.dt_g == AG_F32)
    full_range<bf16, float>(t, f, lo, hi);
  else
    full_range<bf16, bf16>(t, f, lo, hi);
}

}  // namespace

AgStatus adamw(AgCtx* ctx, const AgAdamW* a) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < a->count; i++) {
    const AgAdamWTensor& t = a->tensors[i];
    if (t.dt_p > AG_BF16) return bad_dtype(ctx, "adamw", t.dt_p, "a parameter in f32 or bf16");
    if (t.dt_g > AG_BF16) return bad_dtype(ctx, "adamw", t.dt_g, "a gradient in f32 or bf16");
    if (t.state != AG_STATE_FULL && t.dt_p != AG_BF16)
      return bad_dtype(ctx, "adamw", t.dt_p, "bf16 for the compact state");
    pieces += div_up(t.n, kPiece);
  }
  float scale = 1;
  if (a->norm_squared) {
    if (!(*a->norm_squared <= 1.7976931348623157e308)) return AG_OK;  // not finite: the caller sees it there
    if (a->max_norm > 0) scale = float(fmin(1.0, a->max_norm / (sqrt(*a->norm_squared) + 1e-6)));
  }
  parallel_for(pieces, [&](int64_t piece) {
    int64_t i = 0;
    while (piece >= div_up(a->tensors[i].n, kPiece)) piece -= div_up(a->tensors[i++].n, kPiece);
    adamw_piece(a, a->tensors[i], scale, piece * kPiece, min_of(a->tensors[i].n, (piece + 1) * kPiece));
  });
  return AG_OK;
}

}  // namespace AG_LEVEL

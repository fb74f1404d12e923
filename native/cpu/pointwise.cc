// Elementwise kernels, random numbers, rotary embedding, patches.
#include "vec.h"

namespace AG_LEVEL {
namespace {

// y[i] = f(x[i]) over vectors with a tail.
template <class S, class F>
void map(S* y, const S* x, int64_t n, const F& f) {
  constexpr int W = kWidth<Acc<S>>;
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    int64_t i = lo;
    for (; i + W <= hi; i += W) store(y + i, f(load(x + i)));
    if (i < hi) store_n(y + i, f(load_n(x + i, hi - i)), hi - i);
  });
}
template <class S, class F>
void map2(S* y, const S* a, const S* b, int64_t n, const F& f) {
  constexpr int W = kWidth<Acc<S>>;
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    int64_t i = lo;
    for (; i + W <= hi; i += W) store(y + i, f(load(a + i), load(b + i)));
    if (i < hi) store_n(y + i, f(load_n(a + i, hi - i), load_n(b + i, hi - i)), hi - i);
  });
}

template <class D>
void fill_with(void* dst, int64_t n, double value) {
  D* p = static_cast<D*>(dst);
  D v;
  put(&v, value);
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) p[i] = v;
  });
}
template <class D>
void fill_integer(void* dst, int64_t n, double value) {
  D* p = static_cast<D*>(dst);
  for (int64_t i = 0; i < n; i++) p[i] = D(value);
}

// ---- cast: through double only where the types need it ----------------------------------------------
inline void put(int32_t* p, double x) { *p = int32_t(x); }
inline void put(int64_t* p, double x) { *p = int64_t(x); }
inline double to_acc(int32_t x) { return x; }
inline double to_acc(int64_t x) { return double(x); }

template <class D, class S>
void cast_loop(D* d, const S* s, int64_t n) {
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) put(d + i, to_acc(s[i]));
  });
}
template <class S>
void cast_floats(bf16* d, const S* s, int64_t n) {  // f32 <-> bf16 in vectors
  constexpr int W = kWidth<float>;
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    int64_t i = lo;
    for (; i + W <= hi; i += W) store(d + i, load(s + i));
    if (i < hi) store_n(d + i, load_n(s + i, hi - i), hi - i);
  });
}
template <class S>
AgStatus cast_from(AgCtx* ctx, const AgCast* a, const S* s) {
  switch (a->dt_dst) {
    case AG_F32: cast_loop(static_cast<float*>(a->dst), s, a->n); return AG_OK;
    case AG_BF16: cast_loop(static_cast<bf16*>(a->dst), s, a->n); return AG_OK;
    case AG_F64: cast_loop(static_cast<double*>(a->dst), s, a->n); return AG_OK;
    case AG_I32: cast_loop(static_cast<int32_t*>(a->dst), s, a->n); return AG_OK;
    case AG_I64: cast_loop(static_cast<int64_t*>(a->dst), s, a->n); return AG_OK;
  }
  snprintf(ctx->error, sizeof ctx->error, "cast: unknown dtype %d", int(a->dt_dst));
  return AG_INVALID;
}

// ---- Philox4x32-10 (Salmon et al. 2011) -------------------------------------------------------------
struct Words {
  uint32_t w[4];
};
inline Words philox(uint64_t counter, uint64_t key) {
  uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    uint32_t n0 = uint32_t(p1 >> 32) ^ c[1] ^ k0, n2 = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[1] = uint32_t(p1);
    c[3] = uint32_t(p0);
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c[0], c[1], c[2], c[3]}};
}

template <class S>
void random_fill(const AgRandom* a) {
  S* p = static_cast<S*>(a->dst);
  parallel_range(div_up(a->n, 4), kGrain / 8, [&](int64_t lo, int64_t hi) {
    for (int64_t q = lo; q < hi; q++) {
      Words r = philox(uint64_t(q) + a->offset, a->seed);
      double v[4];
      for (int j = 0; j < 4; j++) v[j] = (double(r.w[j]) + 0.5) * 2.3283064365386963e-10;  // (0, 1)
      if (a->kind == AG_NORMAL) {
        for (int j = 0; j < 4; j += 2) {
          double radius = sqrt(-2.0 * log(v[j])), angle = 6.283185307179586 * v[j + 1];
          v[j] = a->a + a->b * radius * cos(angle);
          v[j + 1] = a->a + a->b * radius * sin(angle);
        }
      } else {
        for (int j = 0; j < 4; j++) v[j] = a->a + (a->b - a->a) * v[j];
      }
      for (int64_t j = 0; j < 4 && q * 4 + j < a->n; j++) put(p + q * 4 + j, v[j]);
    }
  });
}

template <class S>
void binary_loop(const AgBinary* g) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  S* y = static_cast<S*>(g->y);
  const S *a = static_cast<const S*>(g->a), *b = static_cast<const S*>(g->b);
  AgBinaryOp op = g->op;
  auto f = [op](Vec<C> x, Vec<C> z) -> Vec<C> { return op == AG_ADD ? x + z : op == AG_SUB ? x - z : x * z; };
  if (g->nb == g->n) return map2(y, a, b, g->n, f);
  if (g->nb == 1) {
    Vec<C> z = splat(to_acc(b[0]));
    return map(y, a, g->n, [&](Vec<C> x) { return f(x, z); });
  }
  int64_t nb = g->nb;
  parallel_range(g->n / nb, row_grain(nb), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      int64_t i = 0;
      for (; i + W <= nb; i += W) store(y + r * nb + i, f(load(a + r * nb + i), load(b + i)));
      if (i < nb) store_n(y + r * nb + i, f(load_n(a + r * nb + i, nb - i), load_n(b + i, nb - i)), nb - i);
    }
  });
}

template <class S>
void rope_loop(const AgRope* a) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  S* y = static_cast<S*>(a->y);
  const S* x = static_cast<const S*>(a->x);
  int64_t half = a->dim / 2;
  parallel_range(a->tokens, row_grain(a->heads * a->dim), [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; t++) {
      const C* cos = static_cast<const C*>(a->cos) + a->position[t] * half;
      const C* sin = static_cast<const C*>(a->sin) + a->position[t] * half;
      for (int64_t h = 0; h < a->heads; h++) {
        const S *x0 = x + t * a->ld + h * a->dim, *x1 = x0 + half;
        S *y0 = y + t * a->ld + h * a->dim, *y1 = y0 + half;
        for (int64_t i = 0; i < half; i += W) {
          int64_t n = min_of(W, half - i);
          bool whole = n == W;
          Vec<C> p = whole ? load(x0 + i) : load_n(x0 + i, n), q = whole ? load(x1 + i) : load_n(x1 + i, n);
          Vec<C> c = whole ? load(cos + i) : load_n(cos + i, n);
          Vec<C> s = (whole ? load(sin + i) : load_n(sin + i, n)) * C(a->sign);
          Vec<C> r0 = p * c - q * s, r1 = q * c + p * s;
          whole ? store(y0 + i, r0) : store_n(y0 + i, r0, n);
          whole ? store(y1 + i, r1) : store_n(y1 + i, r1, n);
        }
      }
    }
  });
}

}  // namespace

AgStatus fill(AgCtx*, const AgFill* a) {
  switch (a->dt) {
    case AG_F32: fill_with<float>(a->dst, a->n, a->value); break;
    case AG_BF16: fill_with<bf16>(a->dst, a->n, a->value); break;
    case AG_F64: fill_with<double>(a->dst, a->n, a->value); break;
    case AG_I32: fill_integer<int32_t>(a->dst, a->n, a->value); break;
    case AG_I64: fill_integer<int64_t>(a->dst, a->n, a->value); break;
  }
  return AG_OK;
}

AgStatus copy2d(AgCtx*, const AgCopy2d* a) {
  parallel_range(a->rows, max_of(1, (int64_t(1) << 16) / max_of(a->row_bytes, 1)), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++)
      memcpy(static_cast<char*>(a->dst) + r * a->dst_stride, static_cast<const char*>(a->src) + r * a->src_stride,
             size_t(a->row_bytes));
  });
  return AG_OK;
}

AgStatus cast(AgCtx* ctx, const AgCast* a) {
  if (a->dt_dst == AG_BF16 && a->dt_src == AG_F32) {
    cast_floats(static_cast<bf16*>(a->dst), static_cast<const float*>(a->src), a->n);
    return AG_OK;
  }
  switch (a->dt_src) {
    case AG_F32: return cast_from(ctx, a, static_cast<const float*>(a->src));
    case AG_BF16: return cast_from(ctx, a, static_cast<const bf16*>(a->src));
    case AG_F64: return cast_from(ctx, a, static_cast<const double*>(a->src));
    case AG_I32: return cast_from(ctx, a, static_cast<const int32_t*>(a->src));
    case AG_I64: return cast_from(ctx, a, static_cast<const int64_t*>(a->src));
  }
  return AG_INVALID;
}

AgStatus random(AgCtx* ctx, const AgRandom* a) {
  return with_float(ctx, "random", a->dt, [&](auto tag) { random_fill<typename decltype(tag)::type>(a); });
}

AgStatus unary(AgCtx* ctx, const AgUnary* a) {
  return with_float(ctx, "unary", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    Vec<C> alpha = splat(C(a->alpha));
    AgUnaryOp op = a->op;
    map(static_cast<S*>(a->y), static_cast<const S*>(a->x), a->n, [=](Vec<C> x) { return activate(op, x, alpha); });
  });
}

AgStatus unary_grad(AgCtx* ctx, const AgUnaryGrad* a) {
  return with_float(ctx, "unary_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    Vec<C> alpha = splat(C(a->alpha));
    AgUnaryOp op = a->op;
    map2(static_cast<S*>(a->dx), static_cast<const S*>(a->dy), static_cast<const S*>(a->x), a->n,
         [=](Vec<C> dy, Vec<C> x) { return dy * slope_of(op, x, alpha, C()); });
  });
}

AgStatus binary(AgCtx* ctx, const AgBinary* a) {
  return with_float(ctx, "binary", a->dt, [&](auto tag) { binary_loop<typename decltype(tag)::type>(a); });
}

AgStatus silu_mul(AgCtx* ctx, const AgSiluMul* a) {
  return with_float(ctx, "silu_mul", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    map2(static_cast<S*>(a->y), static_cast<const S*>(a->gate), static_cast<const S*>(a->up), a->n,
         [](Vec<Acc<S>> g, Vec<Acc<S>> u) { return g * vsigmoid(g) * u; });
  });
}

AgStatus silu_mul_grad(AgCtx* ctx, const AgSiluMulGrad* a) {
  return with_float(ctx, "silu_mul_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Vec<Acc<S>> V;
    constexpr int W = kWidth<Acc<S>>;
    const S *dy = static_cast<const S*>(a->dy), *gate = static_cast<const S*>(a->gate), *up = static_cast<const S*>(a->up);
    S *dg = static_cast<S*>(a->dgate), *du = static_cast<S*>(a->dup);
    parallel_range(a->n, kGrain, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; i += W) {
        int64_t n = min_of(W, hi - i);
        V d = load_n(dy + i, n), g = load_n(gate + i, n), u = load_n(up + i, n), s = vsigmoid(g);
        store_n(dg + i, d * u * s * (1 + g * (1 - s)), n);
        store_n(du + i, d * g * s, n);
      }
    });
  });
}

AgStatus rope(AgCtx* ctx, const AgRope* a) {
  return with_float(ctx, "rope", a->dt, [&](auto tag) { rope_loop<typename decltype(tag)::type>(a); });
}

AgStatus patchify(AgCtx* ctx, const AgPatchify* a) {
  return with_float(ctx, "patchify", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    int64_t p = a->patch, across = a->width / p, down = a->height / p, depth = a->channels * p * p;
    parallel_for(a->images * down * across, [&](int64_t row) {
      int64_t m = row / (down * across), py = row / across % down, px = row % across;
      S* out = static_cast<S*>(a->out) + row * depth;
      for (int64_t c = 0; c < a->channels; c++)
        for (int64_t y = 0; y < p; y++)
          memcpy(out + (c * p + y) * p,
                 static_cast<const S*>(a->pixels) + ((m * a->channels + c) * a->height + py * p + y) * a->width + px * p,
                 size_t(p) * sizeof(S));
    });
  });
}

}  // namespace AG_LEVEL

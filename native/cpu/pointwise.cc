// Elementwise kernels, random numbers, rotary embedding, patches.
#include "functions.h"

namespace AG_LEVEL {
namespace {

// y[i] = f(x[i]).
template <class S, class D, class F>
void map(D* y, const S* x, int64_t n, const F& f) {
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    each_vector<Acc<S>>(hi - lo, [&](int64_t i, int64_t k) { set(y + lo + i, f(get(x + lo + i, k)), k); });
  });
}
// y[i] = f(a[i], b[i]).
template <class S, class F>
void map2(S* y, const S* a, const S* b, int64_t n, const F& f) {
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    each_vector<Acc<S>>(hi - lo,
                        [&](int64_t i, int64_t k) { set(y + lo + i, f(get(a + lo + i, k), get(b + lo + i, k)), k); });
  });
}

// Calls f with the operation as a constant, so that the choice is outside the loop.
template <AgUnaryOp op>
struct Op {
  static constexpr AgUnaryOp value = op;
};
template <class F>
AgStatus with_op(AgCtx* ctx, const char* kernel, AgUnaryOp op, const F& f) {
  switch (op) {
    case AG_NONE: f(Op<AG_NONE>()); return AG_OK;
    case AG_GELU: f(Op<AG_GELU>()); return AG_OK;
    case AG_GELU_TANH: f(Op<AG_GELU_TANH>()); return AG_OK;
    case AG_QUICK_GELU: f(Op<AG_QUICK_GELU>()); return AG_OK;
    case AG_SILU: f(Op<AG_SILU>()); return AG_OK;
    case AG_SCALE: f(Op<AG_SCALE>()); return AG_OK;
    case AG_EXP: f(Op<AG_EXP>()); return AG_OK;
  }
  snprintf(ctx->error, sizeof ctx->error, "[%s] op: unknown number %d", kernel, int(op));
  return AG_INVALID;
}

// The activation and its slope for tensors of S.
template <class S, AgUnaryOp op, class V>
inline V value_for(V x, V alpha) {
  if constexpr (op == AG_GELU && sizeof(S) == 2) return x * normal_of(x).below;
  return activate(op, x, alpha);
}
template <class S, AgUnaryOp op, class V>
inline V slope_for(V x, V alpha) {
  if constexpr (op == AG_GELU && sizeof(S) == 2) {
    Normal n = normal_of(x);
    return n.below + x * n.density;
  }
  return slope_of(op, x, alpha, Acc<S>());
}

// The bits of the value as an integer U: one loop for every dtype of a size.
template <class U, class D>
void fill_with(void* dst, int64_t n, D value) {
  U *p = static_cast<U*>(dst), bits;
  static_assert(sizeof(U) == sizeof(D));
  memcpy(&bits, &value, sizeof bits);
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) p[i] = bits;
  });
}

// ---- cast -------------------------------------------------------------------------------------------
template <class D, class S>
inline D convert(S x) {
  return D(x);
}
template <class D>
inline D convert(bf16 x) {
  return D(to_acc(x));
}
// Between integers and floats directly; to bf16 by way of f32, as PyTorch.
template <class D, class S>
void cast_loop(D* d, const S* s, int64_t n) {
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) d[i] = convert<D>(s[i]);
  });
}
template <class S>
void cast_loop(bf16* d, const S* s, int64_t n) {
  parallel_range(n, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) put(d + i, double(convert<float>(s[i])));
  });
}
void cast_loop(bf16* d, const float* s, int64_t n) {
  map(d, s, n, [](vf x) { return x; });
}
void cast_loop(float* d, const bf16* s, int64_t n) {
  map(d, s, n, [](vf x) { return x; });
}
void cast_loop(bf16* d, const bf16* s, int64_t n) {
  map(d, s, n, [](vf x) { return x; });
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
  return bad_dtype(ctx, "cast", a->dt_dst, "a dtype");
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

// The largest value below b: rounding may have carried a number of [a, b) up to b.
inline float below(float b) {
  int32_t i;
  memcpy(&i, &b, 4);
  i = b > 0 ? i - 1 : b < 0 ? i + 1 : int32_t(0x80000001u);
  memcpy(&b, &i, 4);
  return b;
}
inline double below(double b) {
  int64_t i;
  memcpy(&i, &b, 8);
  i = b > 0 ? i - 1 : b < 0 ? i + 1 : int64_t(0x8000000000000001u);
  memcpy(&b, &i, 8);
  return b;
}
inline void put_below(float* p, double v, double b) { *p = double(float(v)) < b ? float(v) : below(float(b)); }
inline void put_below(double* p, double v, double b) { *p = v < b ? v : below(b); }
inline void put_below(bf16* p, double v, double b) {
  put(p, v);
  if (double(to_acc(*p)) < b) return;
  float f = below(float(b));  // the bf16 next to it in the direction of -infinity
  uint32_t u;
  memcpy(&u, &f, 4);
  p->bits = uint16_t((u >> 16) + (f < 0 && (u & 0xffff) ? 1 : 0));
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
      for (int64_t j = 0; j < 4 && q * 4 + j < a->n; j++) {
        if (a->kind == AG_NORMAL || !(a->a < a->b))
          put(p + q * 4 + j, v[j]);
        else
          put_below(p + q * 4 + j, v[j], a->b);
      }
    }
  });
}

template <class S, class F>
void binary_loop(const AgBinary* g, const F& f) {
  typedef Acc<S> C;
  S* y = static_cast<S*>(g->y);
  const S *a = static_cast<const S*>(g->a), *b = static_cast<const S*>(g->b);
  int64_t nb = g->nb;
  if (nb == g->n) return map2(y, a, b, g->n, f);
  if (nb == 1) {
    Vec<C> z = splat(to_acc(b[0]));
    return map(y, a, g->n, [&](Vec<C> x) { return f(x, z); });
  }
  parallel_range(g->n / nb, row_grain(nb), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++)
      each_vector<C>(nb,
                     [&](int64_t i, int64_t k) { set(y + r * nb + i, f(get(a + r * nb + i, k), get(b + i, k)), k); });
  });
}

template <class S>
void rope_loop(const AgRope* a) {
  typedef Acc<S> C;
  const int64_t half = a->dim / 2, rotated = a->heads + a->kv_heads, width = a->kv_heads * a->dim,
                ld = rotated * a->dim + width;
  const C sign = C(a->sign);
  parallel_range(a->tokens, row_grain(ld), [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; t++) {
      S* row = static_cast<S*>(a->x) + t * ld;
      const C* cos = static_cast<const C*>(a->cos) + a->position[t] * half;
      const C* sin = static_cast<const C*>(a->sin) + a->position[t] * half;
      for (int64_t h = 0; h < rotated; h++) {
        S *first = row + h * a->dim, *second = first + half;
        each_vector<C>(half, [&](int64_t i, int64_t n) {
          Vec<C> p = get(first + i, n), q = get(second + i, n), c = get(cos + i, n), s = get(sin + i, n) * sign;
          set(first + i, p * c - q * s, n);
          set(second + i, q * c + p * s, n);
        });
      }
      if (!a->k_cache) continue;
      const S* keys = row + a->heads * a->dim;
      memcpy(static_cast<S*>(a->k_cache) + a->slot[t] * width, keys, size_t(width) * sizeof(S));
      memcpy(static_cast<S*>(a->v_cache) + a->slot[t] * width, keys + width, size_t(width) * sizeof(S));
    }
  });
}

}  // namespace

AgStatus fill(AgCtx* ctx, const AgFill* a) {
  bf16 half;
  put(&half, a->value);
  switch (a->dt) {
    case AG_F32: fill_with<uint32_t>(a->dst, a->n, float(a->value)); return AG_OK;
    case AG_BF16: fill_with<uint16_t>(a->dst, a->n, half); return AG_OK;
    case AG_F64: fill_with<uint64_t>(a->dst, a->n, a->value); return AG_OK;
    case AG_I32: fill_with<uint32_t>(a->dst, a->n, int32_t(a->value)); return AG_OK;
    case AG_I64: fill_with<uint64_t>(a->dst, a->n, int64_t(a->value)); return AG_OK;
  }
  return bad_dtype(ctx, "fill", a->dt, "a dtype");
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
  switch (a->dt_src) {
    case AG_F32: return cast_from(ctx, a, static_cast<const float*>(a->src));
    case AG_BF16: return cast_from(ctx, a, static_cast<const bf16*>(a->src));
    case AG_F64: return cast_from(ctx, a, static_cast<const double*>(a->src));
    case AG_I32: return cast_from(ctx, a, static_cast<const int32_t*>(a->src));
    case AG_I64: return cast_from(ctx, a, static_cast<const int64_t*>(a->src));
  }
  return bad_dtype(ctx, "cast", a->dt_src, "a dtype");
}

AgStatus random(AgCtx* ctx, const AgRandom* a) {
  return with_float(ctx, "random", a->dt, [&](auto tag) { random_fill<typename decltype(tag)::type>(a); });
}

AgStatus unary(AgCtx* ctx, const AgUnary* a) {
  return with_float_status(ctx, "unary", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    Vec<C> alpha = splat(C(a->alpha));
    return with_op(ctx, "unary", a->op, [&](auto op) {
      map(static_cast<S*>(a->y), static_cast<const S*>(a->x), a->n,
          [=](Vec<C> x) { return value_for<S, decltype(op)::value>(x, alpha); });
    });
  });
}

AgStatus unary_grad(AgCtx* ctx, const AgUnaryGrad* a) {
  return with_float_status(ctx, "unary_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    Vec<C> alpha = splat(C(a->alpha));
    return with_op(ctx, "unary_grad", a->op, [&](auto op) {
      map2(static_cast<S*>(a->dx), static_cast<const S*>(a->dy), static_cast<const S*>(a->x), a->n,
           [=](Vec<C> dy, Vec<C> x) { return dy * slope_for<S, decltype(op)::value>(x, alpha); });
    });
  });
}

AgStatus binary(AgCtx* ctx, const AgBinary* a) {
  return with_float(ctx, "binary", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Vec<Acc<S>> V;
    switch (a->op) {
      case AG_ADD: return binary_loop<S>(a, [](V x, V z) { return x + z; });
      case AG_SUB: return binary_loop<S>(a, [](V x, V z) { return x - z; });
      case AG_MUL: return binary_loop<S>(a, [](V x, V z) { return x * z; });
    }
  });
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
    const S *dy = static_cast<const S*>(a->dy), *gate = static_cast<const S*>(a->gate),
            *up = static_cast<const S*>(a->up);
    S *dgate = static_cast<S*>(a->dgate), *dup = static_cast<S*>(a->dup);
    parallel_range(a->n, kGrain, [&](int64_t lo, int64_t hi) {
      each_vector<Acc<S>>(hi - lo, [&](int64_t k, int64_t n) {
        int64_t i = lo + k;
        V d = get(dy + i, n), g = get(gate + i, n), u = get(up + i, n), s = vsigmoid(g);
        set(dgate + i, d * u * s * (1 + g * (1 - s)), n);
        set(dup + i, d * g * s, n);
      });
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
    const S* pixels = static_cast<const S*>(a->pixels);
    parallel_range(a->images * down * across, row_grain(depth), [&](int64_t lo, int64_t hi) {
      for (int64_t row = lo; row < hi; row++) {
        int64_t m = row / (down * across), py = row / across % down, px = row % across;
        S* out = static_cast<S*>(a->out) + row * depth;
        for (int64_t c = 0; c < a->channels; c++)
          for (int64_t y = 0; y < p; y++)
            memcpy(out + (c * p + y) * p, pixels + ((m * a->channels + c) * a->height + py * p + y) * a->width + px * p,
                   size_t(p) * sizeof(S));
      }
    });
  });
}

}  // namespace AG_LEVEL

// Elementwise kernels, random numbers, rotary embedding, patches.
#include "activation.h"

namespace gpu {
namespace {

constexpr int kThreads = 256;

// ---- outputs[i] = f(inputs[i]) ----------------------------------------------------------------------
template <class T, int I, int O>
struct Arrays {
  const T* in[I];
  T* out[O];
  bool aligned() const {
    bool all = true;
    for (const T* p : in) all = all && aligned16(p);
    for (const T* p : out) all = all && aligned16(p);
    return all;
  }
};

// Elements i .. i + W. Everything is read before anything is written: an output may be an input.
template <int W, class T, int I, int O, class F>
__device__ __forceinline__ void map_at(const Arrays<T, I, O>& a, int64_t i, const F& f) {
  float in[I][W], out[O][W];
#pragma unroll
  for (int k = 0; k < I; k++) load_lanes<W>(in[k], a.in[k] + i);
#pragma unroll
  for (int j = 0; j < W; j++) {
    float x[I], y[O];
#pragma unroll
    for (int k = 0; k < I; k++) x[k] = in[k][j];
    f(x, y);
#pragma unroll
    for (int k = 0; k < O; k++) out[k][j] = y[k];
  }
#pragma unroll
  for (int k = 0; k < O; k++) store_lanes<W>(a.out[k] + i, out[k]);
}

template <int W, class T, int I, int O, class F>
__global__ void __launch_bounds__(kThreads) map_kernel(Arrays<T, I, O> a, int64_t n, F f) {
  for (int64_t i = grid_thread(); i < n / W; i += grid_threads()) map_at<W>(a, i * W, f);
  for (int64_t i = n / W * W + grid_thread(); i < n; i += grid_threads()) map_at<1>(a, i, f);
}

template <class T, int I, int O, class F>
AgStatus map(AgCtx* ctx, const char* op, const Arrays<T, I, O>& a, int64_t n, const F& f) {
  return with_width<T>(a.aligned(), [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(ctx, op, map_kernel<W, T, I, O, F>, grid_for(div_up(n, W), kThreads), kThreads, 0, a, n, f);
  });
}

// ---- activations ------------------------------------------------------------------------------------
template <AgUnaryOp op>
struct ActivationGrad {
  float alpha;
  __device__ float slope(float x) const {
    if constexpr (op == AG_GELU) return gelu_slope(x);
    if constexpr (op == AG_GELU_TANH) {
      const float c = 0.79788456080286535588f, t = tanhf((x + x * x * x * 0.044715f) * c);
      return (t + 1) * 0.5f + x * 0.5f * (1 - t * t) * c * (1 + 3 * 0.044715f * x * x);
    }
    if constexpr (op == AG_QUICK_GELU || op == AG_SILU) {
      const float k = op == AG_SILU ? 1.0f : 1.702f, s = sigmoid(x * k);
      return s + x * s * (1 - s) * k;
    }
    if constexpr (op == AG_SCALE) return alpha;
    if constexpr (op == AG_EXP) return expf(x);
    return x * 0 + 1;  // a NaN stays
  }
  __device__ void operator()(const float (&x)[2], float (&dx)[1]) const { dx[0] = x[0] * slope(x[1]); }
};

template <AgUnaryOp op>
struct OpTag {
  static constexpr AgUnaryOp value = op;
};
template <class F>
AgStatus with_op(AgCtx* ctx, const char* kernel, AgUnaryOp op, const F& f) {
  switch (op) {
    case AG_NONE: return f(OpTag<AG_NONE>());
    case AG_GELU: return f(OpTag<AG_GELU>());
    case AG_GELU_TANH: return f(OpTag<AG_GELU_TANH>());
    case AG_QUICK_GELU: return f(OpTag<AG_QUICK_GELU>());
    case AG_SILU: return f(OpTag<AG_SILU>());
    case AG_SCALE: return f(OpTag<AG_SCALE>());
    case AG_EXP: return f(OpTag<AG_EXP>());
  }
  return fail(ctx, AG_INVALID, "[%s] op: unknown number %d", kernel, int(op));
}

struct SiluMul {
  __device__ void operator()(const float (&x)[2], float (&y)[1]) const { y[0] = x[0] * sigmoid(x[0]) * x[1]; }
};
struct SiluMulGrad {  // dy, gate, up -> dgate, dup
  __device__ void operator()(const float (&x)[3], float (&d)[2]) const {
    const float g = x[1], s = sigmoid(g);
    d[0] = x[0] * x[2] * s * (1 + g * (1 - s));
    d[1] = x[0] * g * s;
  }
};

// ---- y = a op b, b repeated -------------------------------------------------------------------------
template <AgBinaryOp op>
struct Binary {
  __device__ static float of(float a, float b) { return op == AG_ADD ? a + b : op == AG_SUB ? a - b : a * b; }
  __device__ void operator()(const float (&x)[2], float (&y)[1]) const { y[0] = of(x[0], x[1]); }
};

// nb is a multiple of W, so a group of b lies within one repetition.
template <int W, class T, class F>
__global__ void __launch_bounds__(kThreads) binary_repeat(T* y, const T* a, const T* b, int64_t n, int64_t nb, F f) {
  for (int64_t i = grid_thread() * W; i < n; i += grid_threads() * W) {
    float x[W], z[W];
    load_lanes<W>(x, a + i);
    load_lanes<W>(z, b + split(i, nb).rest);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = f.of(x[j], z[j]);
    store_lanes<W>(y + i, x);
  }
}

template <class T, class F>
AgStatus binary_of(AgCtx* ctx, const AgBinary* g, const F& f) {
  T* y = static_cast<T*>(g->y);
  const T *a = static_cast<const T*>(g->a), *b = static_cast<const T*>(g->b);
  if (g->nb == g->n) return map(ctx, "binary", Arrays<T, 2, 1>{{a, b}, {y}}, g->n, f);
  const bool vector = aligned16(y) && aligned16(a) && aligned16(b) && g->nb % Pack<T>::n == 0;
  return with_width<T>(vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(ctx, "binary", binary_repeat<W, T, F>, grid_for(g->n / W, kThreads), kThreads, 0, y, a, b, g->n,
                  g->nb, f);
  });
}

// ---- filling, copying, casting ----------------------------------------------------------------------
template <class U>
__global__ void __launch_bounds__(kThreads) fill_kernel(U* p, U value, int64_t n) {
  constexpr int W = 16 / sizeof(U);
  Group<U, W> all;
#pragma unroll
  for (int j = 0; j < W; j++) all.v[j] = value;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  const int64_t groups = aligned ? n / W : 0;
  for (int64_t i = grid_thread(); i < groups; i += grid_threads()) reinterpret_cast<Group<U, W>*>(p)[i] = all;
  for (int64_t i = groups * W + grid_thread(); i < n; i += grid_threads()) p[i] = value;
}
template <class U, class V>
AgStatus fill_with(AgCtx* ctx, const AgFill* a, V value) {
  static_assert(sizeof(U) == sizeof(V), "the bits of the value");
  U bits;
  memcpy(&bits, &value, sizeof bits);
  return launch(ctx, "fill", fill_kernel<U>, grid_for(div_up(a->n * int64_t(sizeof(U)), 16), kThreads), kThreads, 0,
                static_cast<U*>(a->dst), bits, a->n);
}
uint16_t bf16_bits(double value) {
  const float f = float(value);
  uint32_t u;
  memcpy(&u, &f, 4);
  return (u & 0x7fffffff) > 0x7f800000 ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Rows of U: the widest unit that divides addresses, strides and the row.
template <class U>
__global__ void __launch_bounds__(kThreads)
    copy2d_kernel(char* dst, int64_t dst_stride, const char* src, int64_t src_stride, int64_t rows, int64_t units) {
  for (int64_t i = grid_thread(); i < rows * units; i += grid_threads()) {
    const Split at = split(i, units);
    reinterpret_cast<U*>(dst + at.quotient * dst_stride)[at.rest] =
        reinterpret_cast<const U*>(src + at.quotient * src_stride)[at.rest];
  }
}
template <class U>
AgStatus copy2d_by(AgCtx* ctx, const AgCopy2d* a) {
  const int64_t units = a->row_bytes / int64_t(sizeof(U));
  return launch(ctx, "copy2d", copy2d_kernel<U>, grid_for(a->rows * units, kThreads), kThreads, 0,
                static_cast<char*>(a->dst), a->dst_stride, static_cast<const char*>(a->src), a->src_stride, a->rows,
                units);
}

template <class D, class S>
__device__ __forceinline__ D convert(S x) {
  if constexpr (sizeof(D) == 2)
    return from_float<bf16>(float(x));
  else
    return D(x);
}
template <class D>
__device__ __forceinline__ D convert(bf16 x) {
  return convert<D>(to_float(x));
}
// Four elements a time where both sides are aligned for it.
template <class D, class S>
__global__ void __launch_bounds__(kThreads) cast_kernel(D* d, const S* s, int64_t n) {
  typedef Group<D, 4> DG;
  typedef Group<S, 4> SG;
  const bool aligned =
      reinterpret_cast<uintptr_t>(d) % alignof(DG) == 0 && reinterpret_cast<uintptr_t>(s) % alignof(SG) == 0;
  const int64_t groups = aligned ? n / 4 : 0;
  for (int64_t i = grid_thread(); i < groups; i += grid_threads()) {
    const SG x = reinterpret_cast<const SG*>(s)[i];
    DG y;
#pragma unroll
    for (int j = 0; j < 4; j++) y.v[j] = convert<D>(x.v[j]);
    reinterpret_cast<DG*>(d)[i] = y;
  }
  for (int64_t i = groups * 4 + grid_thread(); i < n; i += grid_threads()) d[i] = convert<D>(s[i]);
}

// Calls f with a null pointer to the type of any dtype.
template <class F>
AgStatus with_any(AgCtx* ctx, const char* op, AgDtype dt, const F& f) {
  switch (dt) {
    case AG_F32: return f(Tag<float>());
    case AG_BF16: return f(Tag<bf16>());
    case AG_F64: return f(Tag<double>());
    case AG_I32: return f(Tag<int32_t>());
    case AG_I64: return f(Tag<int64_t>());
  }
  return bad_dtype(ctx, op, dt);
}

// ---- Philox4x32-10 (Salmon et al. 2011) -------------------------------------------------------------
struct Words {
  uint32_t w[4];
};
__device__ __forceinline__ Words philox(uint64_t counter, uint64_t key) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The largest value of T below b, which rounding may have carried a number of [a, b) up to.
template <class T>
__device__ T below(double b) {
  const float nearest = float(b);
  uint32_t u = __float_as_uint(nearest);
  u = nearest > 0 ? u - 1 : nearest < 0 ? u + 1 : 0x80000001u;
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(u);
  } else {  // the bf16 next to it in the direction of -infinity
    const float f = __uint_as_float(u);
    return from_float<bf16>(__uint_as_float((u & 0xffff0000u) + (f < 0 && (u & 0xffff) ? 0x10000u : 0)));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    random_kernel(T* p, int64_t n, bool normal, double a, double b, uint64_t seed, uint64_t offset) {
  for (int64_t q = grid_thread(); q < div_up(n, 4); q += grid_threads()) {
    const Words r = philox(uint64_t(q) + offset, seed);
    double v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = (double(r.w[j]) + 0.5) * 2.3283064365386963e-10;  // (0, 1)
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      if (normal) {
        const double radius = sqrt(-2.0 * log(v[j])), angle = 6.283185307179586 * v[j + 1];
        v[j] = a + b * radius * cos(angle);
        v[j + 1] = a + b * radius * sin(angle);
      } else {
        v[j] = a + (b - a) * v[j];
        v[j + 1] = a + (b - a) * v[j + 1];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (q * 4 + j >= n) break;
      T x = from_float<T>(float(v[j]));
      if (!normal && a < b && !(double(to_float(x)) < b)) x = below<T>(b);
      p[q * 4 + j] = x;
    }
  }
}

// ---- rotary embedding -------------------------------------------------------------------------------
// A thread turns W pairs of one head. With a cache there are threads for the values too, which only copy.
template <int W, class T>
__global__ void __launch_bounds__(kThreads) rope_kernel(AgRope a) {
  const int64_t half = a.dim / 2, groups = half / W, rotated = a.heads + a.kv_heads,
                ld = (rotated + a.kv_heads) * a.dim;
  const int64_t heads = rotated + (a.k_cache ? a.kv_heads : 0);
  for (int64_t k = grid_thread(); k < a.tokens * heads * groups; k += grid_threads()) {
    const Split of_head = split(k, groups), of_token = split(of_head.quotient, heads);
    const int64_t t = of_token.quotient, h = of_token.rest, i = of_head.rest * W;
    T* at = static_cast<T*>(a.x) + t * ld + h * a.dim + i;
    float p[W], q[W];
    load_lanes<W>(p, at);
    load_lanes<W>(q, at + half);
    if (h < rotated) {
      const int64_t row = int64_t(a.position[t]) * half + i;
      float c[W], s[W];
      load_lanes<W>(c, static_cast<const float*>(a.cos) + row);
      load_lanes<W>(s, static_cast<const float*>(a.sin) + row);
#pragma unroll
      for (int j = 0; j < W; j++) {
        const float x = p[j], y = q[j], turn = s[j] * float(a.sign);
        p[j] = x * c[j] - y * turn;
        q[j] = y * c[j] + x * turn;
      }
      store_lanes<W>(at, p);
      store_lanes<W>(at + half, q);
    }
    if (!a.k_cache || h < a.heads) continue;
    const int64_t head = h - (h < rotated ? a.heads : rotated);
    T* to = static_cast<T*>(h < rotated ? a.k_cache : a.v_cache) + (int64_t(a.slot[t]) * a.kv_heads + head) * a.dim + i;
    store_lanes<W>(to, p);
    store_lanes<W>(to + half, q);
  }
}

// ---- patches ----------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads)
    patchify_kernel(T* out, const T* pixels, int64_t n, int channels, int height, int width, int patch) {
  const int across = width / patch, down = height / patch, depth = channels * patch * patch;
  for (int64_t i = grid_thread(); i < n; i += grid_threads()) {
    const Split row = split(i, depth);
    const Split in_image = split(row.quotient, int64_t(down) * across);
    const int at = int(in_image.rest), e = int(row.rest);
    const int c = e / (patch * patch), y = e / patch % patch + at / across * patch, x = e % patch + at % across * patch;
    out[i] = pixels[((in_image.quotient * channels + c) * height + y) * width + x];
  }
}

}  // namespace

// ---- the table's entries ----------------------------------------------------------------------------
AgStatus fill(AgCtx* ctx, const AgFill* a) {
  switch (a->dt) {
    case AG_F32: return fill_with<uint32_t>(ctx, a, float(a->value));
    case AG_BF16: return fill_with<uint16_t>(ctx, a, bf16_bits(a->value));
    case AG_F64: return fill_with<uint64_t>(ctx, a, a->value);
    case AG_I32: return fill_with<uint32_t>(ctx, a, int32_t(a->value));
    case AG_I64: return fill_with<uint64_t>(ctx, a, int64_t(a->value));
  }
  return bad_dtype(ctx, "fill", a->dt);
}

AgStatus copy2d(AgCtx* ctx, const AgCopy2d* a) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(a->dst) | reinterpret_cast<uintptr_t>(a->src) |
                        uintptr_t(a->dst_stride) | uintptr_t(a->src_stride) | uintptr_t(a->row_bytes);
  if (all % 16 == 0) return copy2d_by<uint4>(ctx, a);
  if (all % 4 == 0) return copy2d_by<uint32_t>(ctx, a);
  if (all % 2 == 0) return copy2d_by<uint16_t>(ctx, a);
  return copy2d_by<uint8_t>(ctx, a);
}

AgStatus cast(AgCtx* ctx, const AgCast* a) {
  return with_any(ctx, "cast", a->dt_src, [&](auto src) {
    return with_any(ctx, "cast", a->dt_dst, [&](auto dst) {
      typedef typename decltype(src)::type S;
      typedef typename decltype(dst)::type D;
      return launch(ctx, "cast", cast_kernel<D, S>, grid_for(div_up(a->n, 4), kThreads), kThreads, 0,
                    static_cast<D*>(a->dst), static_cast<const S*>(a->src), a->n);
    });
  });
}

AgStatus random(AgCtx* ctx, const AgRandom* a) {
  return with_float(ctx, "random", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    return launch(ctx, "random", random_kernel<T>, grid_for(div_up(a->n, 4), kThreads), kThreads, 0,
                  static_cast<T*>(a->dst), a->n, a->kind == AG_NORMAL, a->a, a->b, a->seed, a->offset);
  });
}

AgStatus unary(AgCtx* ctx, const AgUnary* a) {
  return with_float(ctx, "unary", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const Arrays<T, 1, 1> arrays{{static_cast<const T*>(a->x)}, {static_cast<T*>(a->y)}};
    return with_op(ctx, "unary", a->op, [&](auto op) {
      return map(ctx, "unary", arrays, a->n, Activation<decltype(op)::value>{float(a->alpha)});
    });
  });
}

AgStatus unary_grad(AgCtx* ctx, const AgUnaryGrad* a) {
  return with_float(ctx, "unary_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const Arrays<T, 2, 1> arrays{{static_cast<const T*>(a->dy), static_cast<const T*>(a->x)}, {static_cast<T*>(a->dx)}};
    return with_op(ctx, "unary_grad", a->op, [&](auto op) {
      return map(ctx, "unary_grad", arrays, a->n, ActivationGrad<decltype(op)::value>{float(a->alpha)});
    });
  });
}

AgStatus binary(AgCtx* ctx, const AgBinary* a) {
  return with_float(ctx, "binary", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    switch (a->op) {
      case AG_ADD: return binary_of<T>(ctx, a, Binary<AG_ADD>());
      case AG_SUB: return binary_of<T>(ctx, a, Binary<AG_SUB>());
      case AG_MUL: return binary_of<T>(ctx, a, Binary<AG_MUL>());
    }
    return fail(ctx, AG_INVALID, "[binary] op: unknown number %d", int(a->op));
  });
}

AgStatus silu_mul(AgCtx* ctx, const AgSiluMul* a) {
  return with_float(ctx, "silu_mul", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const Arrays<T, 2, 1> arrays{{static_cast<const T*>(a->gate), static_cast<const T*>(a->up)},
                                 {static_cast<T*>(a->y)}};
    return map(ctx, "silu_mul", arrays, a->n, SiluMul());
  });
}

AgStatus silu_mul_grad(AgCtx* ctx, const AgSiluMulGrad* a) {
  return with_float(ctx, "silu_mul_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const Arrays<T, 3, 2> arrays{
        {static_cast<const T*>(a->dy), static_cast<const T*>(a->gate), static_cast<const T*>(a->up)},
        {static_cast<T*>(a->dgate), static_cast<T*>(a->dup)}};
    return map(ctx, "silu_mul_grad", arrays, a->n, SiluMulGrad());
  });
}

AgStatus rope(AgCtx* ctx, const AgRope* a) {
  return with_float(ctx, "rope", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t half = a->dim / 2, pairs = a->tokens * (a->heads + (a->k_cache ? 2 : 1) * a->kv_heads) * half;
    const bool vector = aligned16(a->x) && aligned16(a->cos) && aligned16(a->sin) && aligned16(a->k_cache) &&
                        aligned16(a->v_cache) && half % Pack<T>::n == 0;
    return with_width<T>(vector, [&](auto width) {
      constexpr int W = decltype(width)::value;
      return launch(ctx, "rope", rope_kernel<W, T>, grid_for(pairs / W, kThreads), kThreads, 0, *a);
    });
  });
}

AgStatus patchify(AgCtx* ctx, const AgPatchify* a) {
  return with_float(ctx, "patchify", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type T;
    const int64_t n = a->images * (a->height / a->patch) * (a->width / a->patch) * a->channels * a->patch * a->patch;
    return launch(ctx, "patchify", patchify_kernel<T>, grid_for(n, kThreads), kThreads, 0, static_cast<T*>(a->out),
                  static_cast<const T*>(a->pixels), n, int(a->channels), int(a->height), int(a->width), int(a->patch));
  });
}

}  // namespace gpu

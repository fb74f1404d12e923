// AdamW over all tensors in one launch. Memory bound: one pass, everything read and written once.
#include "gpu.h"

namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 32768;  // elements of a block
constexpr int W = 4;

// The tensors lie in the kernel's arguments: a captured graph keeps them.
constexpr int kMaxTensors = 256;
struct TensorEntry {
  void *p, *master, *m, *v;
  const void* g;
  int64_t n, first, first_piece;
  double lr_scale, weight_decay;
  uint8_t p_bf16, g_bf16, compact, aligned;
};
struct Update {
  int count;
  double beta1, beta2, eps, max_norm;
  const AgAdamWStep* now;
  const double* norm_squared;
  uint64_t seed;
  TensorEntry at[kMaxTensors];
};

struct Factors {
  float decay, one_b1, b2, one_b2, step, inv_root2, eps, scale;  // 1 - beta is taken in double: 1 - 0.9f is not 0.1f
  uint32_t key;
};
struct State {
  float w, m, v;
};
__device__ __forceinline__ State next(const State& s, float grad, const Factors& f) {
  const float m = s.m + (grad - s.m) * f.one_b1, v = s.v * f.b2 + grad * grad * f.one_b2;
  return {s.w * f.decay - m * f.step / (sqrtf(v) * f.inv_root2 + f.eps), m, v};
}

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ Factors factors_of(const Update& u, const TensorEntry& t) {
  const double lr = u.now->lr * t.lr_scale, step = double(u.now->step);
  const uint64_t number = uint64_t(u.now->step);
  Factors f;
  f.decay = float(1 - lr * t.weight_decay);
  f.one_b1 = float(1 - u.beta1);
  f.b2 = float(u.beta2);
  f.one_b2 = float(1 - u.beta2);
  f.step = float(lr / (1 - pow(u.beta1, step)));
  f.inv_root2 = float(1 / sqrt(1 - pow(u.beta2, step)));
  f.eps = float(u.eps);
  f.scale = u.norm_squared && u.max_norm > 0 ? float(fmin(1.0, u.max_norm / (sqrt(*u.norm_squared) + 1e-6))) : 1;
  f.key = mix(uint32_t(number >> 32) ^ mix(uint32_t(number) ^ mix(uint32_t(u.seed) ^ mix(uint32_t(u.seed >> 32)))));
  return f;
}

// f32 moments; w is a bf16 parameter's master, or p itself. N elements from i on.
template <int N, class P, class G>
__device__ __forceinline__ void full_step(const TensorEntry& t, const Factors& f, int64_t i) {
  P* p = static_cast<P*>(t.p) + i;
  float *ms = static_cast<float*>(t.m) + i, *vs = static_cast<float*>(t.v) + i,
        *master = static_cast<float*>(t.master) + i;
  float w[N], m[N], v[N], g[N];
  if constexpr (sizeof(P) == 2)
    load_lanes<N>(w, master);
  else
    load_lanes<N>(w, p);
  load_lanes<N>(m, ms);
  load_lanes<N>(v, vs);
  load_lanes<N>(g, static_cast<const G*>(t.g) + i);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const State s = next({w[j], m[j], v[j]}, g[j] * f.scale, f);
    w[j] = s.w;
    m[j] = s.m;
    v[j] = s.v;
  }
  store_lanes<N>(ms, m);
  store_lanes<N>(vs, v);
  if constexpr (sizeof(P) == 2) store_lanes<N>(master, w);
  store_lanes<N>(p, w);
}

// For rounding by adding: a GPU's NaN, 0x7fffffff, would become -0.
__device__ __forceinline__ uint32_t bits_of(float x) { return x == x ? __float_as_uint(x) : 0x7fc00000u; }

// 10 bytes a parameter with its gradient (AgAdamWTensor). The halves are moved as bits, not as numbers.
template <int N, class G>
__device__ __forceinline__ void compact_step(const TensorEntry& t, const Factors& f, int64_t i) {
  typedef Group<uint16_t, N> Half;
  uint16_t *p = static_cast<uint16_t*>(t.p) + i, *rest = static_cast<uint16_t*>(t.master) + i;
  uint16_t *ms = static_cast<uint16_t*>(t.m) + i, *vs = static_cast<uint16_t*>(t.v) + i;
  Half hp = *reinterpret_cast<Half*>(p), hr = *reinterpret_cast<Half*>(rest), hm = *reinterpret_cast<Half*>(ms),
       hv = *reinterpret_cast<Half*>(vs);
  float g[N];
  load_lanes<N>(g, static_cast<const G*>(t.g) + i);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const uint32_t bits = (uint32_t(hp.v[j]) << 16) + uint32_t(int32_t(int16_t(hr.v[j])));
    const State s = next(
        {__uint_as_float(bits), __uint_as_float(uint32_t(hm.v[j]) << 16), __uint_as_float(uint32_t(hv.v[j]) << 16)},
        g[j] * f.scale, f);
    const uint32_t after = bits_of(s.w), rounded = (after + 0x8000u) & 0xffff0000u;
    const uint64_t number = uint64_t(t.first + i + j);
    const uint32_t random = mix(uint32_t(number) ^ mix(uint32_t(number >> 32) ^ f.key));
    hp.v[j] = uint16_t(rounded >> 16);
    hr.v[j] = uint16_t(after - rounded);
    hm.v[j] = uint16_t((bits_of(s.m) + (random & 0xffffu)) >> 16);
    hv.v[j] = uint16_t((bits_of(s.v) + (random >> 16)) >> 16);
  }
  *reinterpret_cast<Half*>(p) = hp;
  *reinterpret_cast<Half*>(rest) = hr;
  *reinterpret_cast<Half*>(ms) = hm;
  *reinterpret_cast<Half*>(vs) = hv;
}

template <int N, class G>
__device__ __forceinline__ void step_of(const TensorEntry& t, const Factors& f, int64_t lo, int64_t hi) {
  if (t.compact)
    for (int64_t i = lo + threadIdx.x * N; i < hi; i += kThreads * N) compact_step<N, G>(t, f, i);
  else if (t.p_bf16)
    for (int64_t i = lo + threadIdx.x * N; i < hi; i += kThreads * N) full_step<N, bf16, G>(t, f, i);
  else
    for (int64_t i = lo + threadIdx.x * N; i < hi; i += kThreads * N) full_step<N, float, G>(t, f, i);
}
template <class G>
__device__ __forceinline__ void piece_of(const TensorEntry& t, const Factors& f, int64_t lo, int64_t hi) {
  const int64_t whole = t.aligned ? lo + (hi - lo) / W * W : lo;
  step_of<W, G>(t, f, lo, whole);
  step_of<1, G>(t, f, whole, hi);
}

// A norm that is not finite leaves everything as it is; the host looks at it when it likes.
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Update u) {
  SMEM(raw);
  if (u.norm_squared && !(*u.norm_squared <= 1.7976931348623157e308)) return;
  int low = 0, high = u.count;  // the last tensor whose first piece is not behind this one
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (u.at[mid].first_piece <= int64_t(blockIdx.x) ? low : high) = mid;
  }
  const TensorEntry& t = u.at[low];
  Factors* shared = reinterpret_cast<Factors*>(raw);
  if (threadIdx.x == 0) *shared = factors_of(u, t);
  __syncthreads();
  const Factors f = *shared;
  const int64_t lo = (int64_t(blockIdx.x) - t.first_piece) * kPiece, hi = min(lo + kPiece, t.n);
  if (t.g_bf16)
    piece_of<bf16>(t, f, lo, hi);
  else
    piece_of<float>(t, f, lo, hi);
}

AgStatus refuse(AgCtx* ctx, const AgAdamWTensor& t) {
  for (AgDtype dt : {t.dt_p, t.dt_g})
    if (dt != AG_F32 && dt != AG_BF16) return bad_dtype(ctx, "adamw", dt);
  if (t.state == AG_STATE_COMPACT && t.dt_p != AG_BF16)
    return fail(ctx, AG_INVALID, "[adamw] compact state: expected a bf16 parameter, got f32");
  return AG_OK;
}

TensorEntry entry(const AgAdamWTensor& t, int64_t first_piece) {
  const bool aligned = aligned16(t.p) && aligned16(t.g) && aligned16(t.master) && aligned16(t.m) && aligned16(t.v);
  return {t.p,
          t.master,
          t.m,
          t.v,
          t.g,
          t.n,
          t.first,
          first_piece,
          t.lr_scale,
          t.weight_decay,
          t.dt_p == AG_BF16,
          t.dt_g == AG_BF16,
          t.state == AG_STATE_COMPACT,
          aligned};
}

}  // namespace

AgStatus adamw(AgCtx* ctx, const AgAdamW* a) {
  for (int64_t i = 0; i < a->count; i++)
    if (AgStatus status = refuse(ctx, a->tensors[i])) return status;
  for (int64_t first = 0; first < a->count; first += kMaxTensors) {
    Update u{};
    u.beta1 = a->beta1;
    u.beta2 = a->beta2;
    u.eps = a->eps;
    u.max_norm = a->max_norm;
    u.now = a->now;
    u.norm_squared = a->norm_squared;
    u.seed = a->seed;
    int64_t pieces = 0;
    for (int64_t i = first; i < a->count && u.count < kMaxTensors; i++) {
      u.at[u.count++] = entry(a->tensors[i], pieces);
      pieces += div_up(a->tensors[i].n, kPiece);
    }
    if (AgStatus status = launch(ctx, "adamw", adamw_kernel, dim3(unsigned(pieces)), kThreads, sizeof(Factors), u))
      return status;
  }
  return AG_OK;
}

}  // namespace gpu

// Cross entropy and sampling.
#include "gpu.h"

namespace gpu {
namespace {

// ---- cross entropy: a block for each row ------------------------------------------------------------
constexpr int kThreads = 512, kWarps = kThreads / 32;

// The maximum of what was seen and the sum of exp(x - maximum), both in one reading. The maximum passes over a NaN; the
// sum does not.
struct Online {
  float top = -INFINITY, sum = 0;
  template <int W>
  __device__ void take(const float (&v)[W]) {
    float most = top;
#pragma unroll
    for (int j = 0; j < W; j++) most = v[j] > most ? v[j] : most;
    const float base = most == -INFINITY ? 0 : most;
    sum *= expf(top - base);
    top = most;
#pragma unroll
    for (int j = 0; j < W; j++) sum += expf(v[j] - base);
  }
};

template <int W, class T, class D>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const T* logits, int64_t cols, const int32_t* target,
                                                                 float* nll, D* dlogits, float scale, const float* by) {
  SMEM(raw);
  float* scratch = reinterpret_cast<float*>(raw);
  const int64_t r = blockIdx.x;
  const T* x = logits + r * cols;
  const int64_t label = target[r];
  const bool counts = label >= 0;
  const float at = counts ? to_float(x[label]) : 0;  // before anyone writes: dlogits may be logits
  if (by) scale *= *by;
  Online own;
  for (int64_t i = threadIdx.x * W; i < cols; i += kThreads * W) {
    float v[W];
    load_lanes<W>(v, x + i);
    own.take(v);
  }
  const float top = block_reduce<Max, kThreads>(own.top, scratch);
  const float part = own.top == top ? own.sum : own.sum * expf(own.top - top);
  const float total = block_reduce<Add, kThreads>(part, scratch + kWarps);
  if (threadIdx.x == 0) nll[r] = counts ? logf(total) - (at - top) : 0;
  if (!dlogits) return;
  D* d = dlogits + r * cols;
  const float factor = scale / total;
  for (int64_t i = threadIdx.x * W; i < cols; i += kThreads * W) {
    float v[W];
    load_lanes<W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = counts ? expf(v[j] - top) * factor - (i + j == label ? scale : 0) : 0;
    store_lanes<W>(d + i, v);
  }
}

template <class T, class D>
AgStatus cross_entropy_of(AgCtx* ctx, const AgCrossEntropy* a) {
  const bool vector = aligned16(a->logits) && (!a->dlogits || aligned16(a->dlogits)) && a->cols % 8 == 0;
  auto run = [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(ctx, "cross_entropy", cross_entropy_kernel<W, T, D>, dim3(unsigned(a->rows)), kThreads,
                  2 * kWarps * sizeof(float), static_cast<const T*>(a->logits), a->cols, a->target,
                  static_cast<float*>(a->nll), static_cast<D*>(a->dlogits), float(a->grad_scale),
                  static_cast<const float*>(a->scale));
  };
  return vector ? run(Width<8>()) : run(Width<1>());
}

// ---- sampling: a block for each row -----------------------------------------------------------------
// Nothing is sorted. Numbers in falling order begin with those whose key is at least some K, so every question about
// the order (the k-th, the smallest set with a given mass, the draw) is the search for the largest K that holds enough,
// in 32 steps.
constexpr int kSampler = 1024;

// Unsigned integers in the order of the floats; -0 counts as 0.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

constexpr uint32_t kHighest = 0xff800000u;  // of infinity
struct Min {
  __device__ static uint32_t of(uint32_t a, uint32_t b) { return a < b ? a : b; }
};

struct Sampler {
  const float* x;
  const double* weight;
  int64_t cols;
  double* scratch;

  // The sum over the row of f(i), for all threads.
  template <class F>
  __device__ double sum(const F& f) const {
    double own = 0;
    for (int64_t i = threadIdx.x; i < cols; i += kSampler) own += f(i);
    __syncthreads();
    return block_reduce<Add, kSampler>(own, scratch);
  }
  __device__ double count_from(uint32_t key) const {
    return sum([&](int64_t i) { return order_key(x[i]) >= key ? 1.0 : 0.0; });
  }
  __device__ double mass_from(uint32_t key) const {
    return sum([&](int64_t i) { return order_key(x[i]) >= key ? weight[i] : 0.0; });
  }
  // The lowest key whose weight is not zero.
  __device__ uint32_t lowest_possible() const {
    uint32_t own = kHighest;
    for (int64_t i = threadIdx.x; i < cols; i += kSampler)
      if (weight[i] > 0) own = Min::of(own, order_key(x[i]));
    __syncthreads();
    return block_reduce<Min, kSampler>(own, reinterpret_cast<uint32_t*>(scratch));
  }
  // The largest key >= lowest for which enough(key) holds; it is taken to hold for `lowest`.
  template <class F>
  __device__ uint32_t largest(uint32_t lowest, const F& enough) const {
    uint32_t low = lowest, high = kHighest;
    while (low < high) {
      const uint32_t mid = low + (high - low) / 2 + 1;
      if (enough(mid))
        low = mid;
      else
        high = mid - 1;
    }
    return low;
  }
  // The lowest id whose key is `key` after the first `skip` of them; all threads call it.
  __device__ int32_t tie(uint32_t key, int64_t skip) const {
    int32_t found = -1;
    for (int64_t first = 0; first < cols && found < 0; first += kSampler) {
      const int64_t i = first + threadIdx.x;
      const bool hit = i < cols && order_key(x[i]) == key;
      const unsigned vote = __ballot_sync(~0u, hit);
      __syncthreads();
      if (threadIdx.x % 32 == 0) reinterpret_cast<unsigned*>(scratch)[threadIdx.x / 32] = vote;
      __syncthreads();
      for (int w = 0; w < kSampler / 32 && found < 0; w++) {
        unsigned left = reinterpret_cast<unsigned*>(scratch)[w];
        const int here = __popc(left);
        if (skip >= here) {
          skip -= here;
          continue;
        }
        for (; skip > 0; skip--) left &= left - 1;
        found = int32_t(first + w * 32 + __ffs(int(left)) - 1);
      }
    }
    return found;
  }
};

// How many numbers of weight w it takes from `before` until the sum passes `goal` (reaches it when `reach`), at most
// `most`.
__device__ int64_t ties_until(double before, double w, double goal, bool reach, int64_t most) {
  int64_t taken = 1;
  for (double sum = before + w; taken < most && !(reach ? sum >= goal : sum > goal); taken++) sum += w;
  return taken;
}

__device__ int32_t draw(const Sampler& s, double u, double top_p, int64_t top_k) {
  uint32_t edge = 0;  // numbers below it are cut off
  if (top_k > 0 && top_k < s.cols)
    edge = s.largest(0, [&](uint32_t key) { return s.count_from(key) >= double(top_k); });
  double total = s.mass_from(edge);
  int64_t at_edge = s.cols;  // how many of those at the edge stay
  if (top_p < 1) {
    const double goal = top_p * total;
    edge = s.largest(edge, [&](uint32_t key) { return s.mass_from(key) >= goal; });
    const double above = s.mass_from(edge + 1), weight = s.weight[s.tie(edge, 0)];
    at_edge = ties_until(above, weight, goal, true, int64_t(s.count_from(edge) - s.count_from(edge + 1)));
    total = above + double(at_edge) * weight;
  }
  // A weight of zero is never drawn: what rounding leaves of u goes to the last possible number.
  const double goal = u * total;
  const uint32_t lowest = s.lowest_possible();
  const uint32_t key = s.largest(edge > lowest ? edge : lowest, [&](uint32_t k) { return s.mass_from(k) > goal; });
  const double above = s.mass_from(key + 1), weight = s.weight[s.tie(key, 0)];
  const int64_t ties = int64_t(s.count_from(key) - s.count_from(key + 1)),
                most = key == edge && at_edge < ties ? at_edge : ties;
  return s.tie(key, ties_until(above, weight, goal, false, most) - 1);
}

__global__ void __launch_bounds__(kSampler)
    sample_kernel(const float* logits, int64_t cols, double temperature, double top_p, int64_t top_k, const double* u,
                  int32_t* out, double* weights) {
  SMEM(raw);
  const int64_t r = blockIdx.x;
  Sampler s{logits + r * cols, weights ? weights + r * cols : nullptr, cols, reinterpret_cast<double*>(raw)};
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < cols; i += kSampler) top = Max::of(top, s.x[i]);
  top = block_reduce<Max, kSampler>(top, reinterpret_cast<float*>(raw));
  int32_t drawn = -1;
  if (top == top) {  // a NaN gives -1
    __syncthreads();
    if (temperature == 0 || top - top != 0) {  // also when the best is infinite
      drawn = s.tie(order_key(top), 0);
    } else {
      for (int64_t i = threadIdx.x; i < cols; i += kSampler)
        weights[r * cols + i] = exp((double(s.x[i]) - double(top)) / temperature);
      __syncthreads();
      drawn = draw(s, u[r], top_p, top_k);
    }
  }
  if (threadIdx.x == 0) out[r] = drawn;
}

}  // namespace

// ---- the table's entries ----------------------------------------------------------------------------
AgStatus cross_entropy(AgCtx* ctx, const AgCrossEntropy* a) {
  if (a->cols == 0) return AG_OK;
  return with_float(ctx, "cross_entropy", a->dt, [&](auto tag) {
    return with_float(ctx, "cross_entropy", a->dlogits ? a->dt_d : a->dt, [&](auto d) {
      return cross_entropy_of<typename decltype(tag)::type, typename decltype(d)::type>(ctx, a);
    });
  });
}

int64_t sample_workspace(const AgSample* a) {
  return a->temperature == 0 ? 0 : a->rows * a->cols * int64_t(sizeof(double));
}
AgStatus sample(AgCtx* ctx, const AgSample* a) {
  return launch(ctx, "sample", sample_kernel, dim3(unsigned(a->rows)), kSampler, kSampler / 32 * sizeof(double),
                a->logits, a->cols, a->temperature, a->top_p, a->top_k, a->u, a->out,
                a->temperature == 0 ? nullptr : static_cast<double*>(ctx->workspace));
}

}  // namespace gpu

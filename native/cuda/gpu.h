// What every kernel source of this folder begins with: the words of the device in which the kernels are written, for
// nvcc or for the emulation on the host (shim.h), launching, and the small pieces all kernels share.
//
// Rules for kernels: shared memory is the dynamic one (SMEM); a collective is reached by whole warps and __syncthreads
// by whole blocks, so no thread returns early; sums run in an order that depends on the shape only; no float atomics,
// but for those of attention_grad.cu that are asked for (deterministic()).
#pragma once
#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define SMEM(name) extern __shared__ __align__(1024) char name[]

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// `high` in the upper half; round to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 16 bytes from global to shared memory, both aligned to 16; zeros when not `wanted` (`from` must be an address all the
// same).
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's groups are open. Other threads' copies need a __syncthreads after it.
template <int pending>
__device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
// Four 8x8 matrices of 16 bits; lane i points to row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldsm_x4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldsm_x4_t(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// c[16][8] += a[16][16] b[16][8]
__device__ __forceinline__ void mma_bf16_16816(float* c, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#include "emulator/shim.h"
#endif

typedef __nv_bfloat16 bf16;

namespace gpu {

// ---- launching --------------------------------------------------------------------------------------
// Enqueues the kernel; an empty grid is nothing to do. Read what it needs from `args`: they are copied at this moment.
#if defined(__CUDACC__)
template <class... P, class... A>
AgStatus launch(AgCtx* ctx, const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                A... args) {
  if (!grid.x || !grid.y || !grid.z) return AG_OK;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream_of(ctx));
    error = cudaLaunchKernelEx(&config, kernel, P(args)...);
  }
  if (error == cudaSuccess) return AG_OK;
  cudaGetLastError();  // this one is reported here and must not come back from the next call
  return fail(ctx, AG_DEVICE_ERROR, "[%s] launch of %u x %u x %u blocks: %s", op, grid.x, grid.y, grid.z,
              cudaGetErrorString(error));
}
#else
template <class... P, class... A>
AgStatus launch(AgCtx*, const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  if (grid.x && grid.y && grid.z) shim::submit(grid, block, shared_bytes, [=] { kernel(args...); });
  return AG_OK;
}
#endif

// ---- numbers ----------------------------------------------------------------------------------------
__host__ __device__ inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes as numbers: one access of the memory system.
template <class T>
struct alignas(16) Pack {
  static constexpr int n = 16 / int(sizeof(T));
  T v[n];
};
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& x) {
  *reinterpret_cast<Pack<T>*>(p) = x;
}
// W numbers as f32: one access of W * sizeof(T) bytes (at most 16 at a time), which the address is aligned to. W = 1 is
// plain.
template <class T, int W>
struct alignas(W * sizeof(T) > 16 ? 16 : W * sizeof(T)) Group {
  T v[W];
};
template <int W, class T>
__device__ __forceinline__ void load_lanes(float (&out)[W], const T* p) {
  const Group<T, W> x = *reinterpret_cast<const Group<T, W>*>(p);
#pragma unroll
  for (int j = 0; j < W; j++) out[j] = to_float(x.v[j]);
}
template <int W, class T>
__device__ __forceinline__ void store_lanes(T* p, const float (&x)[W]) {
  Group<T, W> out;
#pragma unroll
  for (int j = 0; j < W; j++) out.v[j] = from_float<T>(x[j]);
  *reinterpret_cast<Group<T, W>*>(p) = out;
}
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A gradient of either dtype (AgGrad), element i.
struct GradTarget {
  void* p;
  int32_t bf16, accumulate;
};
template <class T>
__device__ __forceinline__ void grad_put(T* p, bool accumulate, float x) {
  *p = from_float<T>(accumulate ? to_float(*p) + x : x);
}
__device__ __forceinline__ void grad_put(const GradTarget& g, int64_t i, float x) {
  if (g.bf16)
    grad_put(static_cast<::bf16*>(g.p) + i, g.accumulate, x);
  else
    grad_put(static_cast<float*>(g.p) + i, g.accumulate, x);
}
inline GradTarget grad_target(const AgGrad& g) { return {g.p, g.dt == AG_BF16, g.accumulate}; }

// ---- reductions in a fixed order --------------------------------------------------------------------
struct Add {
  template <class T>
  __device__ static T of(T a, T b) {
    return a + b;
  }
};
struct Max {  // a NaN stays
  __device__ static float of(float a, float b) { return a > b || a != a ? a : b; }
};
// All lanes get the result.
template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T x) {
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) x = Op::of(x, __shfl_xor_sync(~0u, x, bits));
  return x;
}
// All threads of the block get the result. `scratch` holds one T for each warp and may be used again after the next
// __syncthreads only.
template <class Op, int kThreads, class T>
__device__ __forceinline__ T block_reduce(T x, T* scratch) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  x = warp_reduce<Op>(x);
  if (kThreads == 32) return x;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; i++) x = Op::of(x, scratch[i]);
  return x;
}

// ---- loops over the grid ----------------------------------------------------------------------------
// Blocks for n pieces of work, one for each thread, in a loop over the grid: enough to fill the device, no more.
inline dim3 grid_for(int64_t n, int threads) {
  const int64_t most = int64_t(device().processors) * (2048 / threads), blocks = div_up(n, threads);
  return dim3(unsigned(blocks < most ? blocks : most));
}
__device__ __forceinline__ int64_t grid_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t(gridDim.x) * blockDim.x; }

// i / by and i % by; by 32 bits where they suffice, which is several times faster.
struct Split {
  int64_t quotient, rest;
};
__device__ __forceinline__ Split split(int64_t i, int64_t by) {
  if ((i | by) >> 32 == 0) return {int64_t(uint32_t(i) / uint32_t(by)), int64_t(uint32_t(i) % uint32_t(by))};
  return {i / by, i % by};
}

// ---- dispatch ---------------------------------------------------------------------------------------
template <class T>
struct Tag {
  typedef T type;
};
template <class F>
AgStatus with_float(AgCtx* ctx, const char* op, AgDtype dt, const F& f) {
  if (dt == AG_F32) return f(Tag<float>());
  if (dt == AG_BF16) return f(Tag<bf16>());
  return bad_dtype(ctx, op, dt);
}

// Calls f with the number of elements of an access as a constant: 16 bytes where `vector`, else one.
template <int W>
struct Width {
  static constexpr int value = W;
};
template <class T, class F>
AgStatus with_width(bool vector, const F& f) {
  if (vector) return f(Width<Pack<T>::n>());
  return f(Width<1>());
}

}  // namespace gpu

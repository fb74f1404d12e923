// The part of CUDA the kernels use, emulated on the host, so that kernels can be tested where there is no GPU (gpu.h
// includes this when nvcc does not compile). One thread of the host runs a grid block by block, each CUDA thread as a
// fiber; shim.cc has the scheduler. What it is for is finding mistakes that a GPU would hide or show only sometimes:
//
//   - several schedules, among them one in which a warp runs ahead as far as it can (a missing barrier changes values)
//   - shared memory starts as NaN; the target of a cp.async is NaN until the wait that the copy must be complete at
//   - misaligned 16-byte accesses, lanes that meet in different collectives, threads that leave before a barrier others
//     wait at, and copies in flight at the end are fatal
//   - AddressSanitizer and UndefinedBehaviorSanitizer see every access; ThreadSanitizer knows the fibers as threads and
//     __syncthreads, __syncwarp as their only synchronisation, so it names the lines of a race
//
// ldmatrix and mma.m16n8k16 have the register layout of the PTX manual. Rounding inside the tensor core, memory order
// between blocks and speed are not emulated. Shared memory is the dynamic one (SMEM); masks of collectives are full.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace shim {

// What the running thread sees.
struct Here {
  dim3 thread, block, block_dim, grid_dim;
  char* shared = nullptr;
};
extern Here here;
extern uint64_t launches;  // so far, the running one included

// 0: threads in order; 1: in reverse order; 2..999: in an order drawn for each block; from 1000 on: warp after warp,
// each as far as it can go, beginning with warp (seed - 1000).
void set_schedule(unsigned seed);
// Runs the grid, or keeps it for a graph that is being recorded (emulated.cc).
void submit(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
[[noreturn]] void die(const char* what);

constexpr int kMaxWords = 12;
typedef uint32_t Words[kMaxWords];  // of one lane
void wait_block(int line);
void wait_warp();
// Every lane gives its words; the last one to arrive calls exchange for all 32; every lane takes its words back. Lanes
// that left read as NaN.
typedef void (*Exchange)(const Words* in, Words* out, const void* argument);
void collective(const char* what, unsigned mask, const void* in, int in_words, void* out, int out_words,
                Exchange exchange, const void* argument);

// A barrier in shared memory (mbarrier), in the 8 bytes it has on a device. Bytes of an arrival are still to come in
// its phase.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_bytes(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);

struct Copy {
  void* to;
  const void* from;  // NULL: zeros
};
void copy_queue(Copy copy);
void copy_commit();
bool copy_next(int pending,
               Copy* out);  // the next copy of the oldest groups, while more than `pending` groups are open

inline void want_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) die(what);
}
inline float widen(uint16_t bits) {
  uint32_t u = uint32_t(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint16_t narrow(float f) {  // round to nearest even; a GPU has one NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Lane l receives the words of lane source(l).
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  collective(
      what, mask, &value, sizeof(T) / 4, &value, sizeof(T) / 4,
      [](const Words* in, Words* out, const void* argument) {
        for (int lane = 0; lane < 32; lane++) {
          const uint32_t* from = in[(*static_cast<const Source*>(argument))(lane) & 31];
          out[lane][0] = from[0];
          out[lane][1] = from[1];
        }
      },
      &source);
  return value;
}

// Four 8x8 matrices of 16 bits; lane i brings row i % 8 of matrix i / 8.
template <bool transposed>
void load_matrices(uint32_t* r, const void* row) {
  want_aligned(row, 16, "ldmatrix: the row is not aligned to 16 bytes");
  uint32_t in[4];
  memcpy(in, row, 16);
  collective(
      transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, in, 4, r, 4,
      [](const Words* in, Words* out, const void*) {
        for (int m = 0; m < 4; m++) {
          auto element = [&](int row, int col) { return in[m * 8 + row][col / 2] >> (16 * (col % 2)) & 0xffff; };
          for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4 * 2;
            out[lane][m] =
                transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
          }
        }
      },
      nullptr);
}

}  // namespace shim

// ---- the language -----------------------------------------------------------------------------------
#define threadIdx (shim::here.thread)
#define blockIdx (shim::here.block)
#define blockDim (shim::here.block_dim)
#define gridDim (shim::here.grid_dim)
#define __syncthreads() shim::wait_block(__LINE__)
#define SMEM(name) char* name = shim::here.shared
inline void __syncwarp(unsigned = ~0u) { shim::wait_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return shim::shuffle("shfl.bfly", mask, value, [bits](int lane) { return lane ^ bits; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return shim::shuffle("shfl.idx", mask, value, [source](int) { return source; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return shim::shuffle("shfl.down", mask, value, [by](int lane) { return lane + by < 32 ? lane + by : lane; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return shim::shuffle("shfl.up", mask, value, [by](int lane) { return lane >= by ? lane - by : lane; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  uint32_t word = predicate != 0;
  shim::collective(
      "vote.ballot", mask, &word, 1, &word, 1,
      [](const shim::Words* in, shim::Words* out, const void*) {
        uint32_t all = 0;
        for (int lane = 0; lane < 32; lane++) all |= uint32_t(in[lane][0] == 1) << lane;
        for (int lane = 0; lane < 32; lane++) out[lane][0] = all;
      },
      nullptr);
  return word;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline int atomicOr(int* p, int bits) {  // fibers take turns, and ThreadSanitizer is told that it is one step
  return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* p, float x) {
  uint32_t was = __atomic_load_n(reinterpret_cast<uint32_t*>(p), __ATOMIC_RELAXED), now;
  do now = __float_as_uint(__uint_as_float(was) + x);
  while (!__atomic_compare_exchange_n(reinterpret_cast<uint32_t*>(p), &was, now, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return __uint_as_float(was);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __bfloat162float(__nv_bfloat16 x) { return shim::widen(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {shim::narrow(x)}; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// ---- what gpu.h writes in PTX -----------------------------------------------------------------------
inline uint32_t pack_bf16(float low, float high) { return shim::narrow(low) | uint32_t(shim::narrow(high)) << 16; }
inline float fast_exp2(float x) { return exp2f(x); }
inline void cp_async16(void* to, const void* from, bool wanted) {
  shim::want_aligned(to, 16, "cp.async: the target is not aligned to 16 bytes");
  shim::want_aligned(from, 16, "cp.async: the source is not aligned to 16 bytes");
  memset(to, 0xff, 16);
  shim::copy_queue({to, wanted ? from : nullptr});
}
inline void cp_commit() { shim::copy_commit(); }
template <int pending>
void cp_wait() {
  for (shim::Copy c; shim::copy_next(pending, &c);) {
    if (c.from)
      memcpy(c.to, c.from, 16);
    else
      memset(c.to, 0, 16);
  }
}
inline void ldsm_x4(uint32_t* r, const void* row) { shim::load_matrices<false>(r, row); }
inline void ldsm_x4_t(uint32_t* r, const void* row) { shim::load_matrices<true>(r, row); }

// c[16][8] += a[16][16] b[16][8]: registers a[4], b[2], c[4] of each lane as the PTX manual has them.
inline void mma_bf16_16816(float* c, const uint32_t* a, const uint32_t* b) {
  uint32_t in[10];
  memcpy(in, a, 16);
  memcpy(in + 4, b, 8);
  memcpy(in + 6, c, 16);
  shim::collective(
      "mma.m16n8k16", ~0u, in, 10, c, 4,
      [](const shim::Words* in, shim::Words* out, const void*) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
          int g = lane / 4, t = lane % 4 * 2;
          for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
              A[g + i % 2 * 8][t + i / 2 * 8 + half] = shim::widen(uint16_t(in[lane][i] >> (16 * half)));
            for (int i = 0; i < 2; i++) B[t + i * 8 + half][g] = shim::widen(uint16_t(in[lane][4 + i] >> (16 * half)));
          }
        }
        for (int lane = 0; lane < 32; lane++)
          for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            float sum = __uint_as_float(in[lane][6 + i]);
            for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][col];
            out[lane][i] = __float_as_uint(sum);
          }
      },
      nullptr);
}

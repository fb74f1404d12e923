// The words of compute capability 9.0 that gpu.h does not have: barriers in shared memory, the tensor memory
// accelerator (TMA), products of a warpgroup (wgmma). In PTX, for sm_90a, or for the emulation: there a load or product
// is done when it is asked for, so a missing wait for a product is not found, one for a barrier is.
#pragma once
#include "gpu.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace gpu {
namespace {

constexpr int kPanel = 64, kPanelRow = kPanel * 2;  // columns, and bytes of a row, that 128-byte swizzling works on

#if defined(__CUDACC__)
// ---- barriers in shared memory: 8 bytes each --------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What barrier_init wrote is seen by the accelerator, once a __syncthreads has followed.
__device__ __forceinline__ void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, and so many bytes that are yet to come.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over; the one before a barrier's first counts as over with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  int done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// ---- loading ----------------------------------------------------------------------------------------
// A box of kPanel columns from `col` of a head and of rows from `row` on, which arrives at `barrier`.
__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int col, int head,
                                         int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(head), "r"(row)
      : "memory");
}
// ---- products ---------------------------------------------------------------------------------------
// A matrix in swizzled panels. `leading`: bytes between panels where the columns are those of the product (else
// unused). Eight rows are 1024 bytes.
__device__ __forceinline__ uint64_t matrix(const char* start, int leading) {
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps what the compiler does with the registers of a product on the side of a wait where it is written.
template <int kBlocks>
__device__ __forceinline__ void hold(float (&x)[kBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(x[j][i])::"memory");
}
template <int kBlocks>
__device__ __forceinline__ void hold(uint32_t (&x)[kBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(x[j][i])::"memory");
}

#define AG_NAMES_8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define AG_NAMES_32                                                                                           \
  AG_NAMES_8(0, 1, 2, 3, 4, 5, 6, 7)                                                                          \
  "," AG_NAMES_8(8, 9, 10, 11, 12, 13, 14, 15) "," AG_NAMES_8(16, 17, 18, 19, 20, 21, 22, 23) "," AG_NAMES_8( \
      24, 25, 26, 27, 28, 29, 30, 31)
#define AG_NAMES_64                                                                                                 \
  AG_NAMES_32                                                                                                       \
      "," AG_NAMES_8(32, 33, 34, 35, 36, 37, 38, 39) "," AG_NAMES_8(40, 41, 42, 43, 44, 45, 46, 47) "," AG_NAMES_8( \
          48, 49, 50, 51, 52, 53, 54, 55) "," AG_NAMES_8(56, 57, 58, 59, 60, 61, 62, 63)
#define AG_SUMS_4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define AG_SUMS_16(c, j) AG_SUMS_4(c, j), AG_SUMS_4(c, j + 1), AG_SUMS_4(c, j + 2), AG_SUMS_4(c, j + 3)

// c[64][128] = a[64][16] b[128][16]^T, both in shared memory, or += with `add`. The warpgroup's accumulators lie like
// those of mma.m16n8k16.
__device__ __forceinline__ void wgmma_scores(float (&c)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" AG_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : AG_SUMS_16(c, 0), AG_SUMS_16(c, 4), AG_SUMS_16(c, 8), AG_SUMS_16(c, 12)
      : "l"(a), "l"(b), "r"(add));
}
// c[64][columns] += a[64][16] b[16][columns]: a in registers, b in shared memory as its rows lie.
__device__ __forceinline__ void wgmma_values(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" AG_NAMES_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"
      : AG_SUMS_16(c, 0), AG_SUMS_16(c, 4), AG_SUMS_16(c, 8), AG_SUMS_16(c, 12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_values(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" AG_NAMES_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
      : AG_SUMS_16(c, 0), AG_SUMS_16(c, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Registers of each thread of this warpgroup from here on.
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- the host's side --------------------------------------------------------------------------------
inline PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) !=
      cudaSuccess)
    cudaGetLastError();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
}

// A tensor [rows, heads, dim] with rows `ld` apart, for boxes of kPanel columns and `box` rows of one head.
inline bool encode(CUtensorMap* map, const void* p, int64_t rows, int64_t heads, int64_t dim, int64_t ld, int box) {
  static const PFN_cuTensorMapEncodeTiled_v12000 entry = find_encode();
  if (!entry) return false;
  const cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(rows)},
                   strides[] = {cuuint64_t(dim) * 2, cuuint64_t(ld) * 2};
  const cuuint32_t boxes[] = {kPanel, 1, cuuint32_t(box)}, steps[] = {1, 1, 1};
  return entry(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), sizes, strides, boxes, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#else
// ---- emulated ---------------------------------------------------------------------------------------
inline void barrier_init(uint64_t* barrier, int arrivals) { shim::barrier_init(barrier, arrivals); }
inline void barrier_publish() {}
inline void barrier_expect(uint64_t* barrier, int bytes) { shim::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(uint64_t* barrier) { shim::barrier_arrive(barrier, 0); }
inline void barrier_wait(uint64_t* barrier, int parity) { shim::barrier_wait(barrier, parity); }

struct CUtensorMap {
  const char* p;
  int64_t rows, heads, dim, ld;
  int box;
};
inline bool encode(CUtensorMap* map, const void* p, int64_t rows, int64_t heads, int64_t dim, int64_t ld, int box) {
  *map = {static_cast<const char*>(p), rows, heads, dim, ld, box};
  return true;
}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int col, int head, int row) {
  shim::want_aligned(to, 1024, "TMA: the target is not aligned to 1024 bytes");
  for (int r = 0; r < map->box; r++)
    for (int chunk = 0; chunk < 8; chunk++) {
      char* at = static_cast<char*>(to) + r * kPanelRow + (chunk ^ r % 8) * 16;
      const bool inside = row + r < map->rows && col + chunk * 8 < map->dim;
      const char* from = inside ? map->p + ((row + r) * map->ld + head * map->dim + col + chunk * 8) * 2 : nullptr;
      inside ? memcpy(at, from, 16) : memset(at, 0, 16);
    }
  shim::barrier_bytes(barrier, map->box * kPanelRow);
}

// Fields as in the descriptor: where it begins, bytes between panels.
inline uint64_t matrix(const char* start, int leading) {
  return uint64_t(start - shim::here.shared) | uint64_t(leading) << 32;
}
inline float element(uint64_t m, int64_t byte) {
  uint64_t at = uint32_t(m) + uint64_t(byte);
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  memcpy(&bits, shim::here.shared + at, 2);
  return shim::widen(bits);
}
inline float by_rows(uint64_t m, int row, int k) { return element(m, row * kPanelRow + k * 2); }
inline float by_columns(uint64_t m, int k, int col) {
  return element(m, col / kPanel * int64_t(m >> 32) + k * kPanelRow + col % kPanel * 2);
}
template <int kBlocks, class A, class B>
void multiply(float (&c)[kBlocks][4], const A& a, const B& b) {
  const int lane = int(threadIdx.x) % 32;
  for (int j = 0; j < kBlocks; j++)
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 16; k++) c[j][i] += a(lane / 4 + i / 2 * 8, k) * b(k, j * 8 + lane % 4 * 2 + i % 2);
}
inline void wgmma_begin() { __syncwarp(); }
inline void wgmma_commit() { __syncwarp(); }
template <int pending>
void wgmma_wait() {
  __syncwarp();
}
template <class T>
void hold(T&) {}
inline void wgmma_scores(float (&c)[16][4], uint64_t a, uint64_t b, int add) {
  if (!add) memset(c, 0, sizeof c);
  const int row0 = int(threadIdx.x) / 32 % 4 * 16;
  multiply(
      c, [=](int row, int k) { return by_rows(a, row0 + row, k); }, [=](int k, int col) { return by_rows(b, col, k); });
}
template <int kBlocks>
void wgmma_values(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  uint32_t rows[4][4];  // register i of lane t of the quad
  for (int i = 0; i < 4; i++)
    for (int t = 0; t < 4; t++)
      rows[i][t] = shim::shuffle("wgmma", ~0u, a[i], [t](int lane) { return (lane & ~3) | t; });
  auto left = [&](int row, int k) {
    const uint32_t pair = rows[(row >= 8) + k / 8 * 2][k % 8 / 2];
    return shim::widen(uint16_t(pair >> (k % 2 * 16)));
  };
  multiply(c, left, [=](int k, int col) { return by_columns(b, k, col); });
}
template <int>
void give_registers() {}
template <int>
void take_registers() {}
#endif

}  // namespace
}  // namespace gpu

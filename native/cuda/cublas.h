// Matrix products by NVIDIA's cublasLt. It is too big to ship, so it is opened at run time, with prototypes of our own:
// no NVIDIA header is needed to build. Values and signatures are those of cublasLt.h in CUDA 12.6 and 13.1, between
// which they do not differ; rung 7 of scripts/cuda/check.mjs compares them with the header where there is one.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "../backend.h"

namespace gpu {
namespace lt {

// cudaDataType
enum : int32_t { kR32F = 0, kR16BF = 14 };
// cublasComputeType_t: products and sums of f32 are f32, never TF32
enum : int32_t { kCompute32F = 68 };
// cublasOperation_t
enum : int32_t { kOpN = 0, kOpT = 1 };
// cublasLtMatmulDescAttributes_t
enum : int32_t { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
// cublasLtEpilogue_t
enum : int32_t { kEpilogueBias = 4 };
// cublasLtMatmulPreferenceAttributes_t
enum : int32_t { kMaxWorkspace = 1, kReductionSchemes = 3, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8 };
// cublasLtReductionScheme_t: parts of k lie in the workspace, and a second kernel adds them in order
enum : int32_t { kReductionComputeType = 2 };
// cublasStatus_t; 0 is success
enum : int32_t { kArchMismatch = 8, kNotSupported = 15 };

struct Algo {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algo algo;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

struct Functions {
  size_t (*get_version)();
  const char* (*status_name)(int status);
  int (*create)(void** handle);
  int (*desc_create)(void** desc, int compute, int scale);
  int (*desc_set)(void* desc, int attribute, const void* value, size_t bytes);
  int (*desc_destroy)(void* desc);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*layout_destroy)(void* layout);
  int (*preference_create)(void** preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(void* preference);
  int (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int wanted,
                   HeuristicResult* results, int* found);
  int (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* layout_a, const void* b,
                void* layout_b, const void* beta, const void* c, void* layout_c, void* d, void* layout_d,
                const Algo* algo, void* workspace, size_t workspace_bytes, void* stream);
};

// The files that are tried, in this order: ALIGNGPT_CUBLASLT alone when it is set (a file or a folder), else the
// loader's path, CUDA_PATH, and what pip or conda installed.
std::vector<std::string> candidates();
// Opens a file and fills in `call`; "" or why it cannot be used.
std::string load(const std::string& file, Functions* call);

}  // namespace lt

constexpr int64_t kCublasWorkspace = int64_t(32) << 20;

// Chooses what products run on, by ALIGNGPT_GEMM (own, cublaslt; unset: cublasLt where it is found), and allocates the
// workspace with services.alloc. False, with a line in `message`, when the environment asks for what cannot be had.
// Again: chooses anew; no product may be running.
bool cublaslt_open(const AgBackend& services, char* message, int64_t message_bytes);

// The product by cublasLt. AG_UNSUPPORTED, and nothing done, when the own kernels have to do it: without cublasLt, for
// what it cannot express, and for what it refuses (counted).
AgStatus cublaslt_gemm(AgCtx*, const AgGemm*);

struct CublasCounts {
  int64_t done, refused;  // products since the last cublaslt_open
};
CublasCounts cublaslt_counts();
// What products run on, for a person: "cublasLt 13.1.1 from FILE", or "own kernels: why". With counts once there are
// any.
std::string cublaslt_line();

}  // namespace gpu

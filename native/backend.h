// The whole contract between the tensor core and a backend (CPU, CUDA): a versioned C table.
//
// A backend receives pointers and int64 sizes and nothing else. Kernels never allocate, never throw and
// never see a Tensor: the ops (native/ops) check, allocate and record, the kernels compute. What each kernel computes
// and takes is in arguments.h. Scratch memory comes in through Ctx; a kernel's `workspace` says how much a call needs.
// Every result is a pure function of the arguments and of the backend's level: never of the number of threads or of
// timing.
#pragma once
#include <stdint.h>

#include "arguments.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AG_BACKEND_VERSION 6

typedef enum {
  AG_OK = 0,
  AG_INVALID,      // an argument the kernel cannot take; Ctx.error says which
  AG_UNSUPPORTED,  // a valid request this backend does not implement
  AG_OUT_OF_MEMORY,
  AG_DEVICE_ERROR,
} AgStatus;

typedef struct AgCtx {
  void* stream;             // backend's own; NULL on the CPU
  void* workspace;          // 64-byte aligned scratch, content undefined
  int64_t workspace_bytes;  // at least what `workspace` asked for
  char error[256];          // filled on a status other than AG_OK
} AgCtx;

// ---- the kernels ------------------------------------------------------------------------------------
// The only list of them: the table below, what backends declare and put into their tables, and what tests ask for are
// made of it.
//
// X(kernel, Args, memory, products)
//   memory    SCRATCH: beside the kernel a backend has int64_t kernel_workspace(const Args*); PLAIN: it has no scratch
//   products  DOT: made of matrix products, which a CPU with instructions for bf16 does another way (cpu/level.h);
//             ANY: not
#define AG_KERNELS(X)                                  \
  X(fill, AgFill, PLAIN, ANY)                          \
  X(copy2d, AgCopy2d, PLAIN, ANY)                      \
  X(cast, AgCast, PLAIN, ANY)                          \
  X(random, AgRandom, PLAIN, ANY)                      \
  X(unary, AgUnary, PLAIN, ANY)                        \
  X(unary_grad, AgUnaryGrad, PLAIN, ANY)               \
  X(binary, AgBinary, PLAIN, ANY)                      \
  X(silu_mul, AgSiluMul, PLAIN, ANY)                   \
  X(silu_mul_grad, AgSiluMulGrad, PLAIN, ANY)          \
  X(col_sum, AgColSum, SCRATCH, ANY)                   \
  X(sum, AgSum, SCRATCH, ANY)                          \
  X(sum_squares, AgSumSquares, SCRATCH, ANY)           \
  X(gather_rows, AgGatherRows, PLAIN, ANY)             \
  X(scatter_add, AgScatterAdd, SCRATCH, ANY)           \
  X(gemm, AgGemm, SCRATCH, DOT)                        \
  X(norm, AgNorm, PLAIN, ANY)                          \
  X(norm_grad, AgNormGrad, SCRATCH, ANY)               \
  X(softmax, AgSoftmax, PLAIN, ANY)                    \
  X(softmax_grad, AgSoftmaxGrad, PLAIN, ANY)           \
  X(l2norm, AgL2Norm, PLAIN, ANY)                      \
  X(l2norm_grad, AgL2NormGrad, PLAIN, ANY)             \
  X(rope, AgRope, PLAIN, ANY)                          \
  X(attention, AgAttention, SCRATCH, DOT)              \
  X(attention_grad, AgAttentionGrad, SCRATCH, DOT)     \
  X(attention_cached, AgAttentionCached, SCRATCH, DOT) \
  X(align_mix, AgAlignMix, SCRATCH, DOT)               \
  X(align_mix_grad, AgAlignMixGrad, SCRATCH, DOT)      \
  X(cross_entropy, AgCrossEntropy, PLAIN, ANY)         \
  X(patchify, AgPatchify, PLAIN, ANY)                  \
  X(adamw, AgAdamW, PLAIN, ANY)                        \
  X(sample, AgSample, SCRATCH, ANY)

// ---- the table --------------------------------------------------------------------------------------
typedef struct {
  char name[64];     // "cpu", "cuda"
  char level[32];    // "portable", "avx2", "avx512", "avx512bf16", "amx", "sm_90"
  char device[128];  // what the machine calls it
  int32_t threads;
  int64_t memory_bytes;  // 0: unknown
  char products[256];    // what matrix products run on and why, in words; empty: nothing to say
} AgCapabilities;

typedef enum { AG_STREAM_COMPUTE = 0, AG_STREAM_UPLOAD, AG_STREAM_DOWNLOAD } AgStream;

typedef struct AgBackend {
  int32_t version;      // AG_BACKEND_VERSION
  int32_t struct_size;  // sizeof(AgBackend): a second check that both sides were built together

  // (a) device services. Work of one stream runs in order, work of different streams as events order it: whoever writes
  // on the upload stream into memory that has been used before lets it wait for an event of the compute stream first.
  void (*capabilities)(AgCapabilities*);
  void* (*stream)(AgStream);                                   // for AgCtx.stream; NULL there means the compute stream
  AgStatus (*alloc)(void* stream, int64_t bytes, void** out);  // 64-byte aligned, uncached
  void (*free)(void* stream, void* p);
  // Host memory that copies to and from the device take at full speed and without waiting: it belongs to the copy until
  // it is done.
  AgStatus (*alloc_host)(int64_t bytes, void** out);
  void (*free_host)(void* p);
  // Any direction; done when synchronize returns. A source in other host memory may change once copy has returned.
  AgStatus (*copy)(AgCtx*, void* dst, const void* src, int64_t bytes);
  AgStatus (*synchronize)(AgCtx*);
  AgStatus (*event_create)(void** out);
  AgStatus (*event_record)(AgCtx*, void* event);
  AgStatus (*event_wait)(AgCtx*, void* event);
  void (*event_destroy)(void* event);
  AgStatus (*graph_begin)(AgCtx*);
  AgStatus (*graph_end)(AgCtx*, void** out);
  AgStatus (*graph_launch)(AgCtx*, void* graph);
  void (*graph_destroy)(void* graph);

  // (c) frozen weights in the backend's own layout; 0 bytes: packing brings nothing for this shape
  int64_t (*pack_bytes)(const AgPack*);
  AgStatus (*pack)(AgCtx*, const AgPack*);

  // (b) kernels; workspace: bytes of scratch this very call needs, NULL for one that has none
#define AG_ENTRY(kernel, Args, memory, products) \
  struct AgEntry_##kernel {                      \
    AgStatus (*run)(AgCtx*, const Args*);        \
    int64_t (*workspace)(const Args*);           \
  } kernel;
  AG_KERNELS(AG_ENTRY)
#undef AG_ENTRY
} AgBackend;

// For AG_KERNELS, in a backend: declares a kernel; puts it into a table `b`. Both go inside the namespace the kernel is
// in.
#define AG_DECLARE_PLAIN(kernel, Args) AgStatus kernel(AgCtx*, const Args*);
#define AG_DECLARE_SCRATCH(kernel, Args) AG_DECLARE_PLAIN(kernel, Args) int64_t kernel##_workspace(const Args*);
#define AG_DECLARE(kernel, Args, memory, products) AG_DECLARE_##memory(kernel, Args)
#define AG_FILL_PLAIN(kernel) b.kernel.run = kernel;
#define AG_FILL_SCRATCH(kernel) AG_FILL_PLAIN(kernel) b.kernel.workspace = kernel##_workspace;
#define AG_FILL(kernel, Args, memory, products) AG_FILL_##memory(kernel)

// The CPU backend, linked in. The level is chosen once: the best the machine has, or ALIGNGPT_CPU_LEVEL.
const AgBackend* ag_cpu_backend(void);

// The entry point of libaligngpt_cuda.so: NULL and one line in `message` when there is no device to use.
typedef const AgBackend* (*AgOpenBackend)(char* message, int64_t message_bytes);

#ifdef __cplusplus
}
#endif

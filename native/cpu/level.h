// What each CPU level exports: every kernel of AG_KERNELS (backend.h), or those in which it differs from another level.
// backend.cc puts them together.
#pragma once
#include "../backend.h"

#define AG_DECLARE_LEVEL(level)      \
  namespace level {                  \
  AG_KERNELS(AG_DECLARE)             \
  AG_DECLARE_PLAIN(pack, AgPack)     \
  int64_t pack_bytes(const AgPack*); \
  }

// A level that differs from avx512 in the products of bf16 only: the rest, f32 included, is avx512's own code.
#define AG_DECLARE_ANY(kernel, Args, memory)
#define AG_DECLARE_DOT(kernel, Args, memory) AG_DECLARE_##memory(kernel, Args)
#define AG_DECLARE_PRODUCT(kernel, Args, memory, products) AG_DECLARE_##products(kernel, Args, memory)
#define AG_DECLARE_DOT_LEVEL(level)  \
  namespace level {                  \
  using avx512::col_sum;             \
  using avx512::col_sum_workspace;   \
  AG_KERNELS(AG_DECLARE_PRODUCT)     \
  AG_DECLARE_PLAIN(pack, AgPack)     \
  int64_t pack_bytes(const AgPack*); \
  }

AG_DECLARE_LEVEL(portable)
AG_DECLARE_LEVEL(avx2)
AG_DECLARE_LEVEL(avx512)
AG_DECLARE_LEVEL(neon)
AG_DECLARE_DOT_LEVEL(avx512bf16)
AG_DECLARE_DOT_LEVEL(amx)
AG_DECLARE_DOT_LEVEL(amx_emulated)  // in test builds only

// The table of one level, or NULL where this machine cannot run it. For tests; everyone else asks ag_cpu_backend.
const AgBackend* ag_cpu_level(const char* name);
// NULL, or why ALIGNGPT_CPU_LEVEL cannot be honoured.
extern "C" const char* ag_cpu_level_error(void);

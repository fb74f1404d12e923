// The CPU backend's table: device services, and the kernels of the best level this machine has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "level.h"
#include "pool.h"
#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

namespace {

// ---- services ---------------------------------------------------------------------------------------
AgStatus alloc(void*, int64_t bytes, void** out) {
  size_t align = bytes >= (4 << 20) ? size_t(2) << 20 : 64;
#ifdef _WIN32
  void* p = _aligned_malloc(size_t(bytes), align);
#else
  void* p = nullptr;
  if (posix_memalign(&p, align, size_t(bytes))) p = nullptr;
#endif
  if (!p) return AG_OUT_OF_MEMORY;
#if defined(__linux__)
  if (align > 64) madvise(p, size_t(bytes), MADV_HUGEPAGE);
#endif
  *out = p;
  return AG_OK;
}
void release(void*, void* p) {
#ifdef _WIN32
  _aligned_free(p);
#else
  std::free(p);
#endif
}
AgStatus copy(AgCtx*, void* dst, const void* src, int64_t bytes) {
  std::memmove(dst, src, size_t(bytes));
  return AG_OK;
}
AgStatus synchronize(AgCtx*) { return AG_OK; }
AgStatus event_create(void** out) {
  *out = nullptr;
  return AG_OK;
}
AgStatus event_nothing(AgCtx*, void*) { return AG_OK; }
void nothing(void*) {}
AgStatus no_graph(AgCtx* ctx) {
  std::strcpy(ctx->error, "the CPU backend has no graphs");
  return AG_UNSUPPORTED;
}
AgStatus no_graph_end(AgCtx* ctx, void**) { return no_graph(ctx); }
AgStatus no_graph_launch(AgCtx* ctx, void*) { return no_graph(ctx); }

// ---- level ------------------------------------------------------------------------------------------
struct Level {
  const char* name;
  bool (*supported)();
  void (*table)(AgBackend&);
  int64_t (*workspace)(AgKernel, const void*);
};

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

#define AG_LEVEL_TABLE(level)                                                              \
  void table_##level(AgBackend& b) {                                                       \
    b.pack_bytes = level::pack_bytes;                                                      \
    b.pack = level::pack;                                                                  \
    b.fill = level::fill;                                                                  \
    b.copy2d = level::copy2d;                                                              \
    b.cast = level::cast;                                                                  \
    b.random = level::random;                                                              \
    b.unary = level::unary;                                                                \
    b.unary_grad = level::unary_grad;                                                      \
    b.binary = level::binary;                                                              \
    b.silu_mul = level::silu_mul;                                                          \
    b.silu_mul_grad = level::silu_mul_grad;                                                \
    b.col_sum = level::col_sum;                                                            \
    b.sum = level::sum;                                                                    \
    b.sum_squares = level::sum_squares;                                                    \
    b.gather_rows = level::gather_rows;                                                    \
    b.scatter_rows = level::scatter_rows;                                                  \
    b.scatter_add = level::scatter_add;                                                    \
    b.gemm = level::gemm;                                                                  \
    b.norm = level::norm;                                                                  \
    b.norm_grad = level::norm_grad;                                                        \
    b.softmax = level::softmax;                                                            \
    b.softmax_grad = level::softmax_grad;                                                  \
    b.l2norm = level::l2norm;                                                              \
    b.l2norm_grad = level::l2norm_grad;                                                    \
    b.rope = level::rope;                                                                  \
    b.attention = level::attention;                                                        \
    b.attention_grad = level::attention_grad;                                              \
    b.attention_cached = level::attention_cached;                                          \
    b.align_mix = level::align_mix;                                                        \
    b.align_mix_grad = level::align_mix_grad;                                              \
    b.cross_entropy = level::cross_entropy;                                                \
    b.patchify = level::patchify;                                                          \
    b.adamw = level::adamw;                                                                \
    b.sample = level::sample;                                                              \
  }                                                                                        \
  int64_t workspace_##level(AgKernel k, const void* a) {                                   \
    switch (k) {                                                                           \
      case AG_K_GEMM: return level::gemm_workspace(as<AgGemm>(a));                         \
      case AG_K_NORM_GRAD: return level::norm_grad_workspace(as<AgNormGrad>(a));           \
      case AG_K_ATTENTION: return level::attention_workspace(as<AgAttention>(a));          \
      case AG_K_ATTENTION_GRAD: return level::attention_grad_workspace(as<AgAttention>(a)); \
      case AG_K_ATTENTION_CACHED: return level::attention_cached_workspace(as<AgAttentionCached>(a)); \
      case AG_K_ALIGN_MIX: return level::align_mix_workspace(as<AgAlignMix>(a));           \
      case AG_K_ALIGN_MIX_GRAD: return level::align_mix_grad_workspace(as<AgAlignMix>(a)); \
      case AG_K_COL_SUM: return level::col_sum_workspace(as<AgColSum>(a));                 \
      case AG_K_SUM: return level::sum_workspace(as<AgSum>(a));                            \
      case AG_K_SUM_SQUARES: return level::sum_squares_workspace(as<AgSumSquares>(a));     \
      case AG_K_SAMPLE: return level::sample_workspace(as<AgSample>(a));                   \
      default: return 0;                                                                   \
    }                                                                                      \
  }

AG_LEVEL_TABLE(portable)
bool always() { return true; }
#ifdef AG_X86
AG_LEVEL_TABLE(avx2)
AG_LEVEL_TABLE(avx512)
// __builtin_cpu_supports asks the operating system too (XGETBV).
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// best first
const Level kLevels[] = {
#ifdef AG_X86
    {"avx512", has_avx512, table_avx512, workspace_avx512},
    {"avx2", has_avx2, table_avx2, workspace_avx2},
#endif
    {"portable", always, table_portable, workspace_portable},
};

struct Chosen {
  AgBackend table{};
  const Level* level = nullptr;
  std::string error;
};

void capabilities(AgCapabilities* c);

Chosen choose() {
  Chosen c;
  const char* wanted = std::getenv("ALIGNGPT_CPU_LEVEL");
  std::string names;
  for (const Level& l : kLevels) {
    bool match = !wanted || !*wanted || std::strcmp(wanted, l.name) == 0;
    if (match && !c.level && l.supported()) c.level = &l;
    names += (names.empty() ? "" : ", ") + std::string(l.name) + (l.supported() ? "" : " (not on this CPU)");
  }
  if (!c.level) {
    c.error = "[cpu] ALIGNGPT_CPU_LEVEL: expected one of " + names + ", got '" + wanted + "'";
    c.level = &kLevels[sizeof kLevels / sizeof *kLevels - 1];
  }
  AgBackend& b = c.table;
  b.version = AG_BACKEND_VERSION;
  b.struct_size = int32_t(sizeof(AgBackend));
  b.capabilities = capabilities;
  b.alloc = alloc;
  b.free = release;
  b.copy = copy;
  b.synchronize = synchronize;
  b.event_create = event_create;
  b.event_record = event_nothing;
  b.event_wait = event_nothing;
  b.event_destroy = nothing;
  b.graph_begin = no_graph;
  b.graph_end = no_graph_end;
  b.graph_launch = no_graph_launch;
  b.graph_destroy = nothing;
  b.workspace = c.level->workspace;
  c.level->table(b);
  return c;
}

const Chosen& chosen() {
  static const Chosen* c = new Chosen(choose());
  return *c;
}

void capabilities(AgCapabilities* c) {
  std::memset(c, 0, sizeof *c);
  std::strcpy(c->name, "cpu");
  std::strncpy(c->level, chosen().level->name, sizeof c->level - 1);
  std::strcpy(c->device, "CPU");
  c->threads = ag_threads();
}

}  // namespace

extern "C" const AgBackend* ag_cpu_backend(void) { return &chosen().table; }
// Null, or why ALIGNGPT_CPU_LEVEL cannot be honoured.
extern "C" const char* ag_cpu_level_error(void) { return chosen().error.empty() ? nullptr : chosen().error.c_str(); }

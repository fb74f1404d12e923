// native/cpu: the kernels on a CPU, compiled once for each level (vec.h), and nothing else. The ops and the tests call
// it, through the table that is made here: device services, and the kernels of the best level this machine has. A file
// here sees backend.h and its own folder.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "level.h"
#include "pool.h"
#ifdef AG_AMX_BUILT
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

namespace {

// ---- services ---------------------------------------------------------------------------------------
// Large blocks are mapped by themselves: free() would keep most of them for the process (glibc raises its threshold for
// mapping up to 32 MB), in pieces between what is still in use. With sanitizers everything goes through malloc.
#if (defined(__linux__) || defined(__APPLE__)) && !defined(__SANITIZE_ADDRESS__)
#define AG_MAPS_BLOCKS 1
constexpr int64_t kMapFrom = int64_t(1) << 20, kHuge = int64_t(2) << 20;
struct Mapped {
  std::mutex m;
  std::unordered_map<void*, size_t> bytes;
};
Mapped& mapped() {
  static Mapped* all = new Mapped();  // never destroyed: tensors may be released after static destructors
  return *all;
}
// `bytes` rounded to pages, from an address that is a multiple of kHuge when a huge page fits.
void* map_block(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page,
                extra = size >= kHuge ? kHuge : 0;
  void* got = mmap(nullptr, size_t(size + extra), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  char *from = static_cast<char*>(got), *p = from;
  if (extra) {
    p += (kHuge - int64_t(reinterpret_cast<uintptr_t>(from) % kHuge)) % kHuge;
    if (p > from) munmap(from, size_t(p - from));
    if (from + extra > p) munmap(p + size, size_t(from + extra - p));
#if defined(__linux__)
    constexpr int kPopulateWrite =
        23;  // MADV_POPULATE_WRITE of Linux 5.14: all pages at once, cheaper than a fault for each
    madvise(p, size_t(size), MADV_HUGEPAGE);
    madvise(p, size_t(size), kPopulateWrite);
#endif
  }
  std::lock_guard<std::mutex> lock(mapped().m);
  mapped().bytes[p] = size_t(size);
  return p;
}
bool unmap_block(void* p) {
  size_t size = 0;
  {
    std::lock_guard<std::mutex> lock(mapped().m);
    auto it = mapped().bytes.find(p);
    if (it == mapped().bytes.end()) return false;
    size = it->second;
    mapped().bytes.erase(it);
  }
  munmap(p, size);
  return true;
}
#endif

AgStatus alloc(void*, int64_t bytes, void** out) {
  void* p = nullptr;
#if defined(AG_MAPS_BLOCKS)
  if (bytes >= kMapFrom && bytes < INT64_MAX / 2) {
    if (!(p = map_block(bytes))) return AG_OUT_OF_MEMORY;
    *out = p;
    return AG_OK;
  }
#endif
#ifdef _WIN32
  p = _aligned_malloc(size_t(bytes), 64);
#else
  if (posix_memalign(&p, 64, bytes > 0 ? size_t(bytes) : 1)) p = nullptr;
#endif
  if (!p) return AG_OUT_OF_MEMORY;
  *out = p;
  return AG_OK;
}
void release(void*, void* p) {
#if defined(AG_MAPS_BLOCKS)
  if (unmap_block(p)) return;
#endif
#ifdef _WIN32
  _aligned_free(p);
#else
  std::free(p);
#endif
}
AgStatus alloc_host(int64_t bytes, void** out) { return alloc(nullptr, bytes, out); }
void free_host(void* p) { release(nullptr, p); }
AgStatus copy(AgCtx*, void* dst, const void* src, int64_t bytes) {
  std::memmove(dst, src, size_t(bytes));
  return AG_OK;
}
AgStatus synchronize(AgCtx*) { return AG_OK; }
void* stream(AgStream) { return nullptr; }
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
  void (*fill)(AgBackend&);  // puts its kernels into a table
  bool by_default;           // or only where ALIGNGPT_CPU_LEVEL names it
};

}  // namespace

// A level's kernels go into a table by its own names for them.
#define AG_LEVEL_TABLE(level)            \
  namespace level {                      \
  static void fill_table(AgBackend& b) { \
    AG_KERNELS(AG_FILL)                  \
    b.pack_bytes = pack_bytes;           \
    b.pack = pack;                       \
  }                                      \
  }
#define AG_FILL_ANY(kernel, memory)
#define AG_FILL_DOT(kernel, memory) AG_FILL_##memory(kernel)
#define AG_FILL_PRODUCT(kernel, Args, memory, products) AG_FILL_##products(kernel, memory)
#define AG_DOT_LEVEL_TABLE(level)        \
  namespace level {                      \
  static void fill_table(AgBackend& b) { \
    avx512::fill_table(b);               \
    AG_KERNELS(AG_FILL_PRODUCT)          \
    b.pack_bytes = pack_bytes;           \
    b.pack = pack;                       \
  }                                      \
  }

AG_LEVEL_TABLE(portable)
#ifdef AG_ARM64
AG_LEVEL_TABLE(neon)
#endif
#ifdef AG_X86
AG_LEVEL_TABLE(avx2)
AG_LEVEL_TABLE(avx512)
AG_DOT_LEVEL_TABLE(avx512bf16)
#ifdef AG_AMX_BUILT
AG_DOT_LEVEL_TABLE(amx)
#endif
#ifdef AG_AMX_EMULATED_BUILT
AG_DOT_LEVEL_TABLE(amx_emulated)
#endif
#endif

namespace {

bool always() { return true; }
#ifdef AG_X86
// __builtin_cpu_supports asks the operating system too (XGETBV).
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#ifdef AG_AMX_BUILT
// The CPU has tiles of the size the kernels take for granted, the operating system switches them, and it lets this
// process use them: Linux wants to be asked, once for all threads (Documentation/arch/x86/xstate.rst).
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512bf16()) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return false;                              // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;  // BF16, TILE
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;  // palette 1: 8 tiles of 16 rows of 64 bytes
  if (a != (1024u << 16 | 8192u) || b != (8u << 16 | 64u) || (c & 0xffff) != 16) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 3u << 17) != 3u << 17) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

// best first
const Level kLevels[] = {
#ifdef AG_AMX_BUILT
    {"amx", has_amx, amx::fill_table, true},
#endif
#ifdef AG_AMX_EMULATED_BUILT
    {"amx_emulated", has_avx512bf16, amx_emulated::fill_table, false},  // of test builds, slow
#endif
#ifdef AG_X86
    {"avx512bf16", has_avx512bf16, avx512bf16::fill_table, true},
    {"avx512", has_avx512, avx512::fill_table, true},
    {"avx2", has_avx2, avx2::fill_table, true},
#endif
#ifdef AG_ARM64
    {"neon", always, neon::fill_table, true},  // every 64-bit ARM has it
#endif
    {"portable", always, portable::fill_table, true},
};
constexpr int kLevelCount = int(sizeof kLevels / sizeof *kLevels);

void device_name(char* out, size_t size) {
  std::strncpy(out, "CPU", size - 1);
#if defined(__linux__)
  std::FILE* f = std::fopen("/proc/cpuinfo", "r");
  if (!f) return;
  char line[256];
  while (std::fgets(line, sizeof line, f)) {
    const char* colon = std::strchr(line, ':');
    if (std::strncmp(line, "model name", 10) != 0 || !colon) continue;
    std::snprintf(out, size, "%.*s", int(std::strcspn(colon + 2, "\n")), colon + 2);
    break;
  }
  std::fclose(f);
#endif
}

template <int level>
void capabilities(AgCapabilities* c) {
  std::memset(c, 0, sizeof *c);
  std::strcpy(c->name, "cpu");
  std::strcpy(c->level, kLevels[level].name);
  device_name(c->device, sizeof c->device);
  c->threads = ag_threads();
#if defined(__linux__)
  c->memory_bytes = int64_t(sysconf(_SC_PHYS_PAGES)) * int64_t(sysconf(_SC_PAGE_SIZE));
#endif
}

template <int level>
const AgBackend* table() {
  static const AgBackend made = [] {
    AgBackend b{};
    b.version = AG_BACKEND_VERSION;
    b.struct_size = int32_t(sizeof(AgBackend));
    b.capabilities = capabilities<level>;
    b.stream = stream;
    b.alloc = alloc;
    b.free = release;
    b.alloc_host = alloc_host;
    b.free_host = free_host;
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
    kLevels[level].fill(b);
    return b;
  }();
  return &made;
}
template <int first = 0>
const AgBackend* table_of(int level) {
  if constexpr (first + 1 < kLevelCount) {
    if (level > first) return table_of<first + 1>(level);
  }
  return table<first>();
}

struct Chosen {
  const AgBackend* table = nullptr;
  std::string error;
};

Chosen choose() {
  Chosen c;
  const char* wanted = std::getenv("ALIGNGPT_CPU_LEVEL");
  if (wanted && !*wanted) wanted = nullptr;
  for (int i = 0; i < kLevelCount && !c.table; i++)  // asks for a level's instructions only where it may be used
    if ((wanted ? std::strcmp(wanted, kLevels[i].name) == 0 : kLevels[i].by_default) && kLevels[i].supported())
      c.table = table_of(i);
  if (!c.table) {
    std::string names;
    for (const Level& l : kLevels)
      names += (names.empty() ? "" : ", ") + std::string(l.name) + (l.supported() ? "" : " (not on this CPU)");
    // whoever loads the backend asks for the error first; the table stays usable all the same
    c.error = "[cpu] ALIGNGPT_CPU_LEVEL: expected one of " + names + ", got '" + wanted + "'";
    c.table = table_of(kLevelCount - 1);
  }
  return c;
}

const Chosen& chosen() {
  static const Chosen* c = new Chosen(choose());
  return *c;
}

}  // namespace

extern "C" const AgBackend* ag_cpu_backend(void) { return chosen().table; }
extern "C" const char* ag_cpu_level_error(void) { return chosen().error.empty() ? nullptr : chosen().error.c_str(); }
const AgBackend* ag_cpu_level(const char* name) {
  for (int i = 0; i < kLevelCount; i++)
    if (std::strcmp(kLevels[i].name, name) == 0 && kLevels[i].supported()) return table_of(i);
  return nullptr;
}

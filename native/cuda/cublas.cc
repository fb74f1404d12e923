#include "cublas.h"

#include <dlfcn.h>
#include <glob.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "kernels.h"

namespace gpu {
namespace lt {

// ---- finding it -------------------------------------------------------------------------------------
static std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}
static const char* const kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

static void add_matches(std::vector<std::string>& to, const std::string& pattern) {
  glob_t found{};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
    for (size_t i = 0; i < found.gl_pathc; i++) to.push_back(found.gl_pathv[i]);
  globfree(&found);
}

std::vector<std::string> candidates() {
  std::vector<std::string> files;
  const std::string chosen = environment("ALIGNGPT_CUBLASLT");
  struct stat is{};
  if (!chosen.empty() && (stat(chosen.c_str(), &is) != 0 || !S_ISDIR(is.st_mode))) return {chosen};
  for (const char* name : kNames) files.push_back(chosen.empty() ? name : chosen + "/" + name);
  if (!chosen.empty()) return files;
  for (const std::string& toolkit : {environment("CUDA_PATH"), std::string("/usr/local/cuda")})
    if (!toolkit.empty())
      for (const char* name : kNames) add_matches(files, toolkit + "/lib64/" + name);
  const std::string home = environment("HOME");
  const std::string local = home.empty() ? "" : home + "/.local";
  const std::string prefixes[] = {environment("VIRTUAL_ENV"), environment("CONDA_PREFIX"), local, "/usr/local", "/usr"};
  for (const std::string& prefix : prefixes) {
    if (prefix.empty()) continue;
    const std::string packages = prefix + "/lib/python3*/*-packages/nvidia/";  // site-packages, Debian's dist-packages
    add_matches(files, packages + "cu13/lib/" + kNames[0]);
    for (const char* name : kNames) add_matches(files, packages + "cublas/lib/" + name);
    for (const char* name : kNames) add_matches(files, prefix + "/lib/" + name);
  }
  return files;
}

template <class F>
static void look_up(void* library, const char* name, F** f, std::string* missing) {
  *f = reinterpret_cast<F*>(dlsym(library, name));
  if (!*f && missing->empty()) *missing = name;
}

// A library stays open: one that has begun to talk to the driver cannot be closed again.
std::string load(const std::string& file, Functions* call) {
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return dlerror();
  std::string missing;
  look_up(library, "cublasLtGetVersion", &call->get_version, &missing);
  look_up(library, "cublasLtGetStatusName", &call->status_name, &missing);
  look_up(library, "cublasLtCreate", &call->create, &missing);
  look_up(library, "cublasLtMatmulDescCreate", &call->desc_create, &missing);
  look_up(library, "cublasLtMatmulDescSetAttribute", &call->desc_set, &missing);
  look_up(library, "cublasLtMatmulDescDestroy", &call->desc_destroy, &missing);
  look_up(library, "cublasLtMatrixLayoutCreate", &call->layout_create, &missing);
  look_up(library, "cublasLtMatrixLayoutDestroy", &call->layout_destroy, &missing);
  look_up(library, "cublasLtMatmulPreferenceCreate", &call->preference_create, &missing);
  look_up(library, "cublasLtMatmulPreferenceSetAttribute", &call->preference_set, &missing);
  look_up(library, "cublasLtMatmulPreferenceDestroy", &call->preference_destroy, &missing);
  look_up(library, "cublasLtMatmulAlgoGetHeuristic", &call->heuristic, &missing);
  look_up(library, "cublasLtMatmul", &call->matmul, &missing);
  if (!missing.empty()) return file + ": has no " + missing;
  const size_t version = call->get_version();  // 130101 for 13.1.1
  if (version / 10000 == 12 || version / 10000 == 13) return "";
  return file + ": expected version 12 or 13, got " + std::to_string(version / 10000) + "." +
         std::to_string(version / 100 % 100);
}

}  // namespace lt

namespace {

// ---- what is kept -----------------------------------------------------------------------------------
// What a choice of the algorithm depends on; see key_of.
typedef std::array<int64_t, 15> Key;
struct Plan {
  lt::Algo algo;
  bool refused;
};
constexpr size_t kMostPlans = 4096;  // a packed batch has a new number of rows at every step

struct State {
  lt::Functions call{};
  void* handle = nullptr;  // NULL: the own kernels
  void* workspace = nullptr;
  void* compute_stream = nullptr;
  std::string line = "own kernels";
  std::atomic<int64_t> done{0}, refused{0};
  std::mutex mutex;  // of the plans
  std::map<Key, Plan> plans;
};
State& state() {
  static State* only = new State();  // never destroyed: other threads may multiply until the process ends
  return *only;
}

std::string file_of(const lt::Functions& call) {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(call.create), &info) && info.dli_fname ? info.dli_fname : "?";
}

// ---- opening ----------------------------------------------------------------------------------------
// The first candidate that can be used, or why there is none: what is wrong with the first that is there.
std::string open_library(lt::Functions* call, void** handle) {
  std::string problem;
  const char* chosen = std::getenv("ALIGNGPT_CUBLASLT");
  const bool named = chosen && *chosen;
  for (const std::string& file : lt::candidates()) {
    std::string why = lt::load(file, call);
    const bool absent = why.rfind(file + ": cannot open shared object file", 0) == 0;
    if (why.empty()) {
      const int status = call->create(handle);
      if (status == 0) return "";
      *handle = nullptr;
      why = file_of(*call) + ": cublasLtCreate: " + call->status_name(status);
    }
    if (problem.empty() && (named || !absent)) problem = why;
  }
  if (named) return std::string("ALIGNGPT_CUBLASLT=") + chosen + ", so nothing else was tried: " + problem;
  if (!problem.empty()) return problem;
  return "cublasLt not found: libcublasLt.so.13 or .12 (ALIGNGPT_CUBLASLT names a file or a folder)";
}

std::string open_all(const AgBackend& services, State& s) {
  lt::Functions call{};
  void* handle = nullptr;
  const std::string why = open_library(&call, &handle);
  if (!why.empty()) return why;
  if (services.alloc(nullptr, kCublasWorkspace, &s.workspace) != AG_OK) {
    s.workspace = nullptr;
    return "cublasLt's workspace of 32 MiB: out of memory";
  }
  s.call = call;
  s.handle = handle;
  s.compute_stream = services.stream(AG_STREAM_COMPUTE);
  return "";
}

// ---- one product ------------------------------------------------------------------------------------
// What cublasLt computes of an AgGemm: d = a b (+ d) (+ bias), in row-major terms. Activations follow in a kernel of
// our own: its GELU is the tanh one.
struct Product {
  const AgGemm& g;
  void* d;
  int64_t ldd;
};
Product product_of(const AgGemm* g) { return g->pre ? Product{*g, g->pre, g->n} : Product{*g, g->c, g->ldc}; }

bool expressible(const State& s, const AgCtx* ctx, const AgGemm* g) {
  if (!s.handle || g->k == 0 || g->c_rows) return false;
  if (ctx->stream && ctx->stream != s.compute_stream) return false;  // the workspace belongs to the work of one stream
  if (g->bias && g->dt_c != g->dt) return false;                     // a bias is of the type of the result
  // its alignment cannot be told, and is taken for granted
  if (reinterpret_cast<uintptr_t>(g->bias) % 16) return false;
  if (g->act > AG_SILU || (g->act != AG_NONE && g->ldc != g->n)) return false;
  if (g->pre && g->accumulate) return false;
  return g->lda >= (g->trans_a ? g->m : g->k) && g->ldb >= (g->trans_b ? g->k : g->n) && g->ldc >= g->n;
}

uint32_t alignment(const void* p) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p) | 256;
  return uint32_t(bits & -bits);
}
Key key_of(const Product& p) {
  const AgGemm& g = p.g;
  // clang-format off
  return {g.m, g.n, g.k, g.lda, g.ldb, p.ldd, g.dt, g.dt_c, g.trans_a != 0, g.trans_b != 0, g.accumulate != 0,
          alignment(g.a), alignment(g.b), alignment(p.d), g.bias ? alignment(g.bias) : 0};
  // clang-format on
}

// Descriptors of one call. A row-major matrix is the transpose of the column-major one in the same memory, so D^T =
// op(B)^T op(A)^T: the operands change places and keep their transposition flags, and the bias, one number for each row
// of D^T, is ours.
class Descriptors {
 public:
  Descriptors(const lt::Functions& call, const Product& p) : call_(call) {
    const AgGemm& g = p.g;
    const int in = g.dt == AG_BF16 ? lt::kR16BF : lt::kR32F, out = g.dt_c == AG_BF16 ? lt::kR16BF : lt::kR32F;
    did(call.desc_create(&desc, lt::kCompute32F, lt::kR32F), "cublasLtMatmulDescCreate");
    set(lt::kTransA, int32_t(g.trans_b ? lt::kOpT : lt::kOpN));
    set(lt::kTransB, int32_t(g.trans_a ? lt::kOpT : lt::kOpN));
    if (g.bias) {
      set(lt::kEpilogue, uint32_t(lt::kEpilogueBias));
      set(lt::kBiasPointer, g.bias);
    }
    layout(&left, in, g.trans_b ? g.k : g.n, g.trans_b ? g.n : g.k, g.ldb);
    layout(&right, in, g.trans_a ? g.m : g.k, g.trans_a ? g.k : g.m, g.lda);
    layout(&result, out, g.n, g.m, p.ldd);
  }
  ~Descriptors() {
    if (desc) call_.desc_destroy(desc);
    for (void* layout : {left, right, result})
      if (layout) call_.layout_destroy(layout);
    if (preference) call_.preference_destroy(preference);
  }
  Descriptors(const Descriptors&) = delete;

  void prefer(const Product& p) {
    did(status ? status : call_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    prefer(lt::kMaxWorkspace, uint64_t(kCublasWorkspace));
    prefer(lt::kReductionSchemes, uint32_t(lt::kReductionComputeType));  // the others add in place, or in bf16
    prefer(lt::kAlignA, alignment(p.g.b));
    prefer(lt::kAlignB, alignment(p.g.a));
    prefer(lt::kAlignC, alignment(p.d));
    prefer(lt::kAlignD, alignment(p.d));
  }
  // Keeps the first failure.
  bool did(int result_of_step, const char* name) {
    if (!status && result_of_step) status = result_of_step, step = name;
    return !status;
  }

  void *desc = nullptr, *left = nullptr, *right = nullptr, *result = nullptr, *preference = nullptr;
  int status = 0;
  const char* step = "";

 private:
  template <class T>
  void set(int attribute, T value) {
    if (!status) did(call_.desc_set(desc, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  }
  template <class T>
  void prefer(int attribute, T value) {
    if (!status)
      did(call_.preference_set(preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
  }
  void layout(void** out, int type, int64_t rows, int64_t cols, int64_t ld) {
    if (!status) did(call_.layout_create(out, type, uint64_t(rows), uint64_t(cols), ld), "cublasLtMatrixLayoutCreate");
  }
  const lt::Functions& call_;
};

bool is_refusal(int status) { return status == lt::kNotSupported || status == lt::kArchMismatch; }

// From the plans, or by cublasLt's heuristic, whose answer is kept.
Plan plan_for(State& s, const Key& key, const Product& p, Descriptors& d) {
  std::lock_guard<std::mutex> lock(s.mutex);
  const auto known = s.plans.find(key);
  if (known != s.plans.end()) return known->second;
  lt::HeuristicResult best{};
  int found = 0;
  d.prefer(p);
  if (d.status) return {};
  const int status =
      s.call.heuristic(s.handle, d.desc, d.left, d.right, d.result, d.result, d.preference, 1, &best, &found);
  const bool refused = is_refusal(status) || (status == 0 && (found < 1 || is_refusal(best.status)));
  if (!refused && !d.did(status ? status : best.status, "cublasLtMatmulAlgoGetHeuristic")) return {};
  if (s.plans.size() >= kMostPlans) s.plans.clear();
  return s.plans[key] = {best.algo, refused};
}

void forget(State& s, const Key& key) {
  std::lock_guard<std::mutex> lock(s.mutex);
  s.plans[key].refused = true;
}

// What cublasLt left to do: the activation, from `pre` where it is kept.
AgStatus finish(AgCtx* ctx, const AgGemm* g) {
  const int64_t size = g->dt_c == AG_BF16 ? 2 : 4;
  if (g->act != AG_NONE) {
    const AgUnary a{g->act, g->c, g->pre ? g->pre : g->c, g->m * g->n, g->dt_c, 1.0};
    return unary(ctx, &a);
  }
  if (!g->pre) return AG_OK;
  const AgCopy2d a{g->c, g->ldc * size, g->pre, g->n * size, g->m, g->n * size};
  return copy2d(ctx, &a);
}

}  // namespace

bool cublaslt_open(const AgBackend& services, char* message, int64_t message_bytes) {
  State& s = state();
  if (s.workspace) services.free(nullptr, s.workspace);
  s.workspace = s.handle = nullptr;
  s.plans.clear();
  s.done = s.refused = 0;
  const char* wanted = std::getenv("ALIGNGPT_GEMM");
  const std::string choice = wanted ? wanted : "";
  if (choice != "" && choice != "own" && choice != "cublaslt") {
    std::snprintf(message, size_t(message_bytes), "[cuda] ALIGNGPT_GEMM: expected own or cublaslt, got %s", wanted);
    return false;
  }
  const std::string why = choice == "own" ? "ALIGNGPT_GEMM=own" : open_all(services, s);
  if (why.empty()) {
    const size_t v = s.call.get_version();
    const std::string version =
        std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
    s.line = "cublasLt " + version + " from " + file_of(s.call);
    return true;
  }
  s.line = "own kernels: " + why;
  if (choice != "cublaslt") return true;
  std::snprintf(message, size_t(message_bytes),
                "[cuda] ALIGNGPT_GEMM: expected cublasLt for the products, got none: %s", why.c_str());
  return false;
}

AgStatus cublaslt_gemm(AgCtx* ctx, const AgGemm* g) {
  State& s = state();
  if (!expressible(s, ctx, g)) return AG_UNSUPPORTED;
  void* const stream = stream_of(ctx);  // before any question: it makes the device this thread's
  const Product p = product_of(g);
  const Key key = key_of(p);
  Descriptors d(s.call, p);
  const Plan plan = d.status ? Plan{} : plan_for(s, key, p, d);
  const float one = 1, beta = g->accumulate ? 1.0f : 0.0f;
  if (!d.status && !plan.refused) {
    const int status = s.call.matmul(s.handle, d.desc, &one, g->b, d.left, g->a, d.right, &beta, p.d, d.result, p.d,
                                     d.result, &plan.algo, s.workspace, size_t(kCublasWorkspace), stream);
    if (is_refusal(status))
      forget(s, key);
    else if (d.did(status, "cublasLtMatmul"))
      return s.done++, finish(ctx, g);
  }
  if (d.status)
    return fail(ctx, AG_DEVICE_ERROR, "[gemm] %s of %lld x %lld x %lld: %s (ALIGNGPT_GEMM=own does without it)", d.step,
                (long long)g->m, (long long)g->n, (long long)g->k, s.call.status_name(d.status));
  s.refused++;
  return AG_UNSUPPORTED;
}

CublasCounts cublaslt_counts() { return {state().done, state().refused}; }

std::string cublaslt_line() {
  const CublasCounts n = cublaslt_counts();
  if (n.done + n.refused == 0) return state().line;
  return state().line + ": " + std::to_string(n.done) + " products, " + std::to_string(n.refused) +
         " refused and run by own kernels";
}

}  // namespace gpu

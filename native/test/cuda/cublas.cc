// Cases of products by cublasLt (cuda_test.h), on the emulation and a stand-in for the library (cublaslt/fake.c),
// whatever device the other cases run on: a GPU's own cublasLt is tested by every case that multiplies.
#include "cuda/cublas.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "../cublaslt/fake.h"
#include "../cublaslt/values.h"
#include "cuda_test.h"

extern "C" const AgBackend* ag_cuda_backend(char* message, int64_t message_bytes);  // of the emulation, linked in

namespace cuda_test {
namespace {

const std::string kFolder = std::string(AG_FAKES) + "/fake_cublaslt", kFile = kFolder + "/libcublasLt.so.13";
const std::string kIncomplete = std::string(AG_FAKES) + "/fake_cublaslt_incomplete/libcublasLt.so.13";

const AgBackend& emulation() {
  char message[512];
  return *ag_cuda_backend(message, sizeof message);
}
FakeCublasLt& fake() {
  static void* library = dlopen(kFile.c_str(), RTLD_NOW | RTLD_LOCAL);
  return *static_cast<FakeCublasLt*>(dlsym(library, "fake_cublaslt"));
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A variable of the environment, set or (NULL) not set until the end of the scope.
class Setting {
 public:
  Setting(const char* name, const char* value)
      : name_(name), was_set_(getenv(name)), before_(was_set_ ? getenv(name) : "") {
    put(value);
  }
  ~Setting() { put(was_set_ ? before_.c_str() : nullptr); }
  void put(const char* value) { value ? setenv(name_, value, 1) : unsetenv(name_); }

 private:
  const char* name_;
  bool was_set_;
  std::string before_;
};

// The environment, and the choice it makes, until the end of the scope; then the own kernels again.
class Chosen {
 public:
  explicit Chosen(const std::string& file, const char* gemm = nullptr)
      : file_("ALIGNGPT_CUBLASLT", file.c_str()), gemm_("ALIGNGPT_GEMM", gemm) {
    fake() = FakeCublasLt{130101, 0, 0, 0, 0, 1, 0, 0, 0, ""};
    usable = reopen(emulation());
  }
  ~Chosen() {
    gemm_.put("own");
    reopen(emulation());
  }
  bool reopen(const AgBackend& services) { return gpu::cublaslt_open(services, message, sizeof message); }
  bool usable;
  char message[512] = "";

 private:
  Setting file_, gemm_;
};

// ---- values -----------------------------------------------------------------------------------------
void constants(Test& t) {
  if (t.dt != AG_F32) return;
#define SAME(name, value, ours) \
  check(gpu::lt::ours == value, #ours ": expected %d (" #name "), got %d", value, int(gpu::lt::ours));
  CUBLASLT_VALUES(SAME)
#undef SAME
  check(sizeof(gpu::lt::Algo) == 64 && sizeof(gpu::lt::HeuristicResult) == 96, "sizes of an algorithm and of a result");
}

// ---- products ---------------------------------------------------------------------------------------
void products(Test& t) {
  Chosen chosen(kFile);
  Test with(t.cpu, emulation(), t.dt);
  every_product(with);
  const gpu::CublasCounts n = gpu::cublaslt_counts();
  const FakeCublasLt& f = fake();
  check(!f.problem[0], "cublasLt was used wrongly: %s", f.problem);
  check(n.done > 20 && n.done == f.products && n.refused == 0, "%lld products and %lld refused, the library saw %lld",
        (long long)n.done, (long long)n.refused, (long long)f.products);
  check(f.heuristics < f.products, "%lld heuristics for %lld products: none was kept", (long long)f.heuristics,
        (long long)f.products);
  check(f.alive == 0, "%lld descriptors were not given back", (long long)f.alive);
  check(contains(gpu::cublaslt_line(), "cublasLt 13.1.1 from " + kFile + ": "), "line: %s",
        gpu::cublaslt_line().c_str());
}

// One product of 24 x 40 x 16, with a bias; false when the backend reports an error, which is in `error`.
bool multiply(Test& t, std::string* error = nullptr, bool compare = true) {
  Test with(t.cpu, emulation(), t.dt);
  Buffer &a = with.in(24 * 16), &b = with.in(40 * 16), &bias = with.in(40), &c = with.out("c", 24 * 40);
  auto make = [&] {
    AgGemm g{};
    g.m = 24, g.n = 40, g.k = 16, g.a = a.p(), g.lda = 16, g.b = b.p(), g.ldb = 16, g.c = c.p(), g.ldc = 40;
    g.bias = bias.p(), g.dt = g.dt_c = t.dt, g.trans_b = 1;
    return g;
  };
  if (compare) return with.run("24 x 40 x 16", &AgBackend::gemm, make), true;
  std::vector<uint64_t> memory(4096);  // zeros in place of every operand
  AgCtx ctx{};
  AgGemm g = make();
  g.a = g.b = g.bias = memory.data(), g.c = memory.data() + 2048;
  const AgStatus status = emulation().gemm.run(&ctx, &g);
  if (error) *error = ctx.error;
  return status == AG_OK;
}

// Where cublasLt does not do a product the own kernel does, and it is counted; where it fails nobody hides it.
void refused(Test& t) {
  struct Row {
    const char* what;
    int FakeCublasLt::* answer;
    int value;
    int64_t heuristics;  // for two runs
  };
  for (const Row& row : {Row{"heuristic without an answer", &FakeCublasLt::heuristic_finds, 0, 1},
                         Row{"heuristic: not supported", &FakeCublasLt::heuristic_status, gpu::lt::kNotSupported, 1},
                         Row{"result: not supported", &FakeCublasLt::heuristic_result, gpu::lt::kNotSupported, 1},
                         Row{"product: not supported", &FakeCublasLt::matmul_status, gpu::lt::kNotSupported, 1}}) {
    Chosen chosen(kFile);
    fake().*row.answer = row.value;
    multiply(t);
    const gpu::CublasCounts n = gpu::cublaslt_counts();
    check(n.done == 0 && n.refused == 2, "%s: %lld products, %lld refused, expected 0 and 2", row.what,
          (long long)n.done, (long long)n.refused);
    check(fake().heuristics == row.heuristics && fake().alive == 0, "%s: %lld heuristics, %lld alive", row.what,
          (long long)fake().heuristics, (long long)fake().alive);
    check(contains(gpu::cublaslt_line(), "2 refused and run by own kernels"), "%s: line %s", row.what,
          gpu::cublaslt_line().c_str());
  }
  for (const Row& row : {Row{"cublasLtMatmulAlgoGetHeuristic", &FakeCublasLt::heuristic_status, 14, 1},
                         Row{"cublasLtMatmul", &FakeCublasLt::matmul_status, 13, 1}}) {
    Chosen chosen(kFile);
    fake().*row.answer = row.value;
    std::string error;
    const bool done = multiply(t, &error, false);
    check(!done && contains(error, std::string("[gemm] ") + row.what + " of 24 x 40 x 16: CUBLAS_STATUS_OF_THE_FAKE"),
          "%s: '%s'", row.what, error.c_str());
    fake().*row.answer = 0;
    check(multiply(t, nullptr, false) && fake().products == 1 && fake().alive == 0, "%s: the next product", row.what);
  }
}

// More shapes than are kept, then one of them at an address that is less aligned: it goes on, and asks again.
void many_shapes(Test& t) {
  if (t.dt != AG_F32) return;
  Chosen chosen(kFile);
  std::vector<float> memory(20000);
  AgCtx ctx{};
  AgGemm g{};
  g.n = g.k = g.ldb = g.ldc = 1, g.a = g.b = memory.data(), g.c = memory.data() + 10000, g.dt = g.dt_c = AG_F32;
  const int64_t shapes = 5000;
  for (int64_t i = 0; i < 2 * shapes; i++) {
    g.m = 1, g.lda = 1 + i % shapes;
    check(emulation().gemm.run(&ctx, &g) == AG_OK, "shape %lld: %s", (long long)i, ctx.error);
  }
  check(fake().products == 2 * shapes && fake().heuristics > shapes && !fake().problem[0], "%lld heuristics %s",
        (long long)fake().heuristics, fake().problem);
  g.a = memory.data() + 1;
  const int64_t asked = fake().heuristics;
  check(emulation().gemm.run(&ctx, &g) == AG_OK && fake().heuristics == asked + 1 && !fake().problem[0],
        "another alignment: %s %s", ctx.error, fake().problem);
}

// Several threads of the host multiply at once: each gets its result, and the plans stay whole (ThreadSanitizer looks
// on).
void threads(Test& t) {
  if (t.dt != AG_F32) return;
  Chosen chosen(kFile);
  emulation();  // opened before the threads
  constexpr int64_t kThreads = 4, kTurns = 400, kShapes = 60;
  std::vector<std::thread> all;
  std::vector<int64_t> right(kThreads);
  for (int64_t n = 0; n < kThreads; n++)
    all.emplace_back([&right, n] {
      AgCtx ctx{};
      for (int64_t turn = 0; turn < kTurns; turn++) {
        const float a[] = {float(turn), 2}, b[] = {3, float(n)};
        float c = 0;
        AgGemm g{};
        g.m = g.n = g.ldc = g.ldb = 1, g.k = 2, g.lda = 2 + turn % kShapes, g.a = a, g.b = b, g.c = &c,
        g.dt = g.dt_c = AG_F32;
        right[size_t(n)] += emulation().gemm.run(&ctx, &g) == AG_OK && c == float(3 * turn + 2 * n);
      }
    });
  for (std::thread& one : all) one.join();
  for (int64_t n : right) check(n == kTurns, "%lld of %lld products are right", (long long)n, (long long)kTurns);
  check(gpu::cublaslt_counts().done == kThreads * kTurns && fake().alive == 0, "%lld products",
        (long long)gpu::cublaslt_counts().done);
}

// ---- opening ----------------------------------------------------------------------------------------
void opening(Test& t) {
  if (t.dt != AG_F32) return;
  struct Row {
    const char* what;
    std::string file;
    const char* gemm;
    bool usable;
    std::string says;  // the line, or the message of what cannot be used
  };
  const Row rows[] = {
      {"a file", kFile, nullptr, true, "cublasLt 13.1.1 from " + kFile},
      {"a folder", kFolder, nullptr, true, "cublasLt 13.1.1 from " + kFile},
      {"a file, demanded", kFile, "cublaslt", true, "cublasLt 13.1.1 from " + kFile},
      {"own kernels", kFile, "own", true, "own kernels: ALIGNGPT_GEMM=own"},
      {"another word", kFile, "mine", false, "[cuda] ALIGNGPT_GEMM: expected own or cublaslt, got mine"},
      {"a file that is not there", "/nowhere/lt.so", nullptr, true,
       "own kernels: ALIGNGPT_CUBLASLT=/nowhere/lt.so, so nothing else was tried: /nowhere/lt.so: cannot open"},
      {"a folder without it", "/", nullptr, true,
       "own kernels: ALIGNGPT_CUBLASLT=/, so nothing else was tried: //libcublasLt.so.13: cannot open"},
      {"not there, demanded", "/nowhere/lt.so", "cublaslt", false,
       "[cuda] ALIGNGPT_GEMM: expected cublasLt for the products, got none: ALIGNGPT_CUBLASLT="},
      {"another library", "libm.so.6", nullptr, true, "libm.so.6: has no cublasLtGetVersion"},
      {"a symbol missing", kIncomplete, nullptr, true, "has no cublasLtMatmulAlgoGetHeuristic"},
  };
  for (const Row& row : rows) {
    Chosen chosen(row.file, row.gemm);
    const std::string said = chosen.usable ? gpu::cublaslt_line() : chosen.message;
    check(chosen.usable == row.usable && contains(said, row.says) && !contains(said, "\n"), "%s: %s", row.what,
          said.c_str());
    const bool ours = contains(said, "own kernels") || !chosen.usable;
    check(multiply(t, nullptr, false) && (fake().products == 0) == ours, "%s: the product", row.what);
  }
}

void failures(Test& t) {
  if (t.dt != AG_F32) return;
  Chosen chosen(kFile);
  const auto says = [&](const char* what, const AgBackend& services, const char* part) {
    const bool usable = chosen.reopen(services);
    check(
        usable && contains(gpu::cublaslt_line(), std::string("own kernels: ")) && contains(gpu::cublaslt_line(), part),
        "%s: %s", what, gpu::cublaslt_line().c_str());
  };
  fake().create_status = 1;
  says("no device", emulation(), "libcublasLt.so.13: cublasLtCreate: CUBLAS_STATUS_OF_THE_FAKE");
  fake().create_status = 0;
  fake().version = 110402;
  says("an old version", emulation(), "expected version 12 or 13, got 11.4");
  fake().version = 120605;
  AgBackend poor = emulation();
  poor.alloc = [](void*, int64_t, void**) { return AG_OUT_OF_MEMORY; };
  says("no memory", poor, "workspace of 32 MiB: out of memory");
  check(chosen.reopen(emulation()) && contains(gpu::cublaslt_line(), "cublasLt 12.6.5 from "), "version 12: %s",
        gpu::cublaslt_line().c_str());
}

// Where it is looked for: first the loader's path, then CUDA_PATH, then a virtual environment.
void search(Test& t) {
  if (t.dt != AG_F32) return;
  char folder[] = "/tmp/aligngpt-cublaslt-XXXXXX";
  check(mkdtemp(folder) != nullptr, "a folder for the test");
  std::string at = folder;
  std::vector<std::string> made;
  const auto put = [&](const std::string& path) {  // an empty file at this path below the folder
    for (size_t i = path.find('/'); i != std::string::npos; i = path.find('/', i + 1))
      if (mkdir((at + "/" + path.substr(0, i)).c_str(), 0700) == 0) made.push_back(at + "/" + path.substr(0, i));
    if (FILE* f = std::fopen((at + "/" + path).c_str(), "w")) std::fclose(f);
    made.push_back(at + "/" + path);
    return at + "/" + path;
  };
  const std::string expected[] = {"libcublasLt.so.13", "libcublasLt.so.12", put("toolkit/lib64/libcublasLt.so.12"),
                                  put("venv/lib/python3.11/site-packages/nvidia/cu13/lib/libcublasLt.so.13"),
                                  put("venv/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12")};
  const Setting any("ALIGNGPT_CUBLASLT", nullptr), toolkit("CUDA_PATH", (at + "/toolkit").c_str());
  const Setting environment("VIRTUAL_ENV", (at + "/venv").c_str());
  const std::vector<std::string> files = gpu::lt::candidates();
  size_t next = 0;
  for (const std::string& file : files)
    if (next < 5 && file == expected[next]) next++;
  check(next == 5, "candidate %zu, %s, is not there or not in its place", next, next < 5 ? expected[next].c_str() : "");
  for (size_t i = made.size(); i-- > 0;) std::remove(made[i].c_str());
  check(rmdir(folder) == 0, "the folder is empty again");
}

// The real library, where there is one: it loads without a driver, and takes our descriptors.
void real(Test& t) {
  if (t.dt != AG_F32) return;
  gpu::lt::Functions call{};
  std::string file;
  for (const std::string& candidate : gpu::lt::candidates())
    if (file.empty() && gpu::lt::load(candidate, &call).empty()) file = candidate;
  std::printf("     the real cublasLt: %s\n", file.empty() ? "not here, so not asked" : file.c_str());
  if (file.empty()) return;
  void *desc = nullptr, *layout = nullptr, *preference = nullptr;
  const int32_t transposed = gpu::lt::kOpT, epilogue = gpu::lt::kEpilogueBias, schemes = gpu::lt::kReductionComputeType,
                align = 16;
  const uint64_t workspace = gpu::kCublasWorkspace;
  const void* bias = &desc;
  check(call.desc_create(&desc, gpu::lt::kCompute32F, gpu::lt::kR32F) == 0 &&
            call.layout_create(&layout, gpu::lt::kR16BF, 24, 40, 48) == 0 && call.preference_create(&preference) == 0,
        "descriptors");
  for (int attribute : {gpu::lt::kTransA, gpu::lt::kTransB})
    check(call.desc_set(desc, attribute, &transposed, 4) == 0, "transposition");
  check(call.desc_set(desc, gpu::lt::kEpilogue, &epilogue, 4) == 0 &&
            call.desc_set(desc, gpu::lt::kBiasPointer, &bias, 8) == 0,
        "bias");
  check(call.desc_set(desc, gpu::lt::kBiasPointer, &bias, 4) != 0, "a pointer of 4 bytes is refused");
  check(call.preference_set(preference, gpu::lt::kMaxWorkspace, &workspace, 8) == 0, "workspace");
  check(call.preference_set(preference, gpu::lt::kReductionSchemes, &schemes, 4) == 0, "reductions");
  for (int attribute : {gpu::lt::kAlignA, gpu::lt::kAlignB, gpu::lt::kAlignC, gpu::lt::kAlignD})
    check(call.preference_set(preference, attribute, &align, 4) == 0, "alignment");
  check(!std::strcmp(call.status_name(gpu::lt::kNotSupported), "CUBLAS_STATUS_NOT_SUPPORTED"), "name of 15: %s",
        call.status_name(gpu::lt::kNotSupported));
  check(!std::strcmp(call.status_name(gpu::lt::kArchMismatch), "CUBLAS_STATUS_ARCH_MISMATCH"), "name of 8: %s",
        call.status_name(gpu::lt::kArchMismatch));
  check(call.desc_destroy(desc) == 0 && call.layout_destroy(layout) == 0 && call.preference_destroy(preference) == 0,
        "given back");
}

const Registered kCases[] = {
    {"cublaslt_constants", constants},     {"cublaslt_products", products}, {"cublaslt_refused", refused},
    {"cublaslt_many_shapes", many_shapes}, {"cublaslt_opening", opening},   {"cublaslt_failures", failures},
    {"cublaslt_search", search},           {"cublaslt_real", real},         {"cublaslt_threads", threads}};

}  // namespace
}  // namespace cuda_test

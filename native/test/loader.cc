// Opening the CUDA backend: what is said when there is none, and that what was opened stays usable. The first argument
// is a library with the emulated backend.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/tensor.h"
#include "cuda/probe.h"

namespace {

int failed = 0;

void want(bool ok, const char* what, const std::string& got) {
  if (!ok) failed++;
  std::printf("%s %s: %s\n", ok ? "ok  " : "FAIL", what, got.c_str());
}
bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_probe() {
  struct Row {
    gpu::Probe probe;
    bool usable;
    const char* says;
  };
  const Row rows[] = {
      {{false, 0, 13000, 0, 0, 0, 0, ""}, false, "libcuda.so.1"},
      {{true, 12040, 13000, 0, 1, 9, 0, "H100"}, false, "expected one for CUDA 13.0 or newer, got one for CUDA 12.4"},
      {{true, 13000, 13000, 100, 0, 0, 0, ""}, false, "the driver shows none"},
      {{true, 13000, 13000, 0, 0, 0, 0, ""}, false, "the driver shows none"},
      {{true, 13000, 13000, 0, 0, 0, 0, "", "system not yet initialized"},
       false,
       "got an error: system not yet initialized"},
      {{true, 13000, 13000, 999, 0, 0, 0, ""}, false, "cuInit failed with error 999"},
      {{true, 13000, 13000, 0, 1, 7, 5, "T4"}, false, "expected compute capability 8.0 or newer, got 7.5 (T4)"},
      {{true, 13000, 13010, 0, 1, 9, 0, "H100"}, true, "H100, compute capability 9.0, driver for CUDA 13.0"},
      {{true, 14020, 13000, 0, 2, 12, 1, "GB10"}, true, "CUDA 14.2"},
  };
  for (const Row& row : rows) {
    char message[512] = "";
    const bool usable = gpu::judge(row.probe, message, sizeof message);
    want(usable == row.usable && contains(message, row.says) && !std::strchr(message, '\n'), "probe", message);
  }
}

}  // namespace

int main(int argc, char** argv) {
  test_probe();
  std::string why;
  want(!ag::open_backend("/nowhere/libaligngpt_cuda.so", &why) && contains(why, "/nowhere/"), "missing file", why);
  want(!ag::open_backend("libm.so.6", &why) && contains(why, "without ag_cuda_backend"), "another library", why);
  setenv("ALIGNGPT_CUDA_LIBRARY", "/nowhere/else.so", 1);
  want(!ag::cuda(&why) && contains(why, "/nowhere/else.so"), "chosen by the environment", why);
  if (argc < 2) return failed || (std::printf("FAIL expected a library as the argument\n"), 1);
  setenv("ALIGNGPT_CUDA_LIBRARY", argv[1], 1);
  setenv("ALIGNGPT_CUBLASLT", "/nowhere/lt.so", 1);
  setenv("ALIGNGPT_GEMM", "cublaslt", 1);
  want(!ag::cuda(&why) && contains(why, "ALIGNGPT_GEMM: expected cublasLt") && contains(why, "/nowhere/lt.so"),
       "cublasLt demanded", why);
  unsetenv("ALIGNGPT_GEMM");
  ag::Device* device = ag::cuda(&why);
  want(device && device == ag::cuda(&why), "emulated library", why);
  if (!device) return 1;
  AgCapabilities caps;
  device->backend->capabilities(&caps);
  want(contains(caps.products, "own kernels: ALIGNGPT_CUBLASLT=/nowhere/lt.so"), "what products run on", caps.products);
  AgBackend table = *device->backend;
  want(!ag::missing_kernel(table), "a whole table", "every kernel is there");
  table.norm_grad.workspace = nullptr;
  const char* missing = ag::missing_kernel(table);
  want(missing && !std::strcmp(missing, "norm_grad"), "a table without the scratch of a kernel",
       missing ? missing : "-");
  const int64_t rows = 3, cols = 5;
  ag::Tensor x = ag::zeros(device, ag::Shape{rows, cols}, AG_F32);
  std::vector<float> host(size_t(rows * cols), 1);
  ag::copy_bytes(device, host.data(), x.data(), x.bytes());
  ag::synchronize(device);
  want(host[0] == 0 && host[14] == 0, "a tensor on the device", ag::cat(host[0]));
  device->memory.fail_after(0);
  try {
    ag::empty(device, ag::Shape{1}, AG_F32);
    want(false, "an allocation that fails", "nothing was thrown");
  } catch (const ag::Error& e) {
    want(!std::strcmp(e.code, "ERR_MEMORY"), "an allocation that fails", e.what());
  }
  want(ag::zeros(device, ag::Shape{7}, AG_BF16).defined(), "allocating after it", "works");
  want(device->memory.counters().in_use == 64 && ag::cpu().memory.counters().in_use == 0, "counters of each device",
       ag::cat(device->memory.counters().in_use));
  return failed != 0;
}

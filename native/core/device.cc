#include "device.h"

#include <cstdlib>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace ag {

std::unique_lock<std::recursive_mutex> Device::turn() {
  return this == &cpu() ? std::unique_lock<std::recursive_mutex>() : std::unique_lock<std::recursive_mutex>(turn_);
}

void* Device::allocate(int64_t bytes, int64_t* actual, bool ahead) {
  auto turn = this->turn();
  Allocator::Pool* pool = recording && !ahead ? recording->pool.get() : nullptr;
  return memory.allocate(bytes, actual, recording != nullptr, pool);
}

AgCtx Device::context() const {
  AgCtx ctx{};
  ctx.stream = stream;
  return ctx;
}

void copy_bytes(Device* device, void* dst, const void* src, int64_t bytes) {
  if (bytes == 0) return;
  auto turn = device->turn();
  AgCtx ctx = device->context();
  check_status("copy", device->backend->copy(&ctx, dst, src, bytes), ctx);
}

void synchronize(Device* device) {
  auto turn = device->turn();
  AgCtx ctx = device->context();
  check_status("synchronize", device->backend->synchronize(&ctx), ctx);
}

// ---- finding them: the CPU is linked in, the CUDA backend is a library beside this one ---------------
const char* missing_kernel(const AgBackend& backend) {
  constexpr bool kPLAIN = false, kSCRATCH = true;
#define AG_LOOK(kernel, Args, memory, products) \
  if (!backend.kernel.run || (k##memory && !backend.kernel.workspace)) return #kernel;
  AG_KERNELS(AG_LOOK)
#undef AG_LOOK
  return nullptr;
}

// Never destroyed: storages held by other threads may outlive main().
Device& cpu() {
  static Device* device = new Device(ag_cpu_backend());
  return *device;
}

#if defined(__linux__)
// ALIGNGPT_CUDA_LIBRARY, or the file in the folder of the library (or program) this code is in.
static std::string cuda_library() {
  const char* chosen = std::getenv("ALIGNGPT_CUDA_LIBRARY");
  if (chosen && *chosen) return chosen;
  Dl_info self;
  std::string folder = dladdr(reinterpret_cast<void*>(&cuda_library), &self) && self.dli_fname ? self.dli_fname : "";
  return folder.substr(0, folder.rfind('/') + 1) + "libaligngpt_cuda.so";
}

// The library is never unloaded: memory of it and its driver may be in use until the process ends.
const AgBackend* open_backend(const std::string& file, std::string* why) {
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  const char* problem = library ? nullptr : dlerror();
  auto open = library ? reinterpret_cast<AgOpenBackend>(dlsym(library, "ag_cuda_backend")) : nullptr;
  if (!open) {
    *why = cat("[cuda] library: expected the CUDA backend in ", file,
               ", got: ", problem ? problem : "a library without ag_cuda_backend");
    return nullptr;
  }
  char message[512] = "";
  const AgBackend* backend = open(message, sizeof message);
  *why = message;
  if (!backend) return nullptr;
  if (backend->version == AG_BACKEND_VERSION && backend->struct_size == int32_t(sizeof(AgBackend))) {
    const char* missing = missing_kernel(*backend);
    if (!missing) return backend;
    *why = cat("[cuda] library: expected every kernel of the contract in ", file, ", got none for ", missing);
    return nullptr;
  }
  *why = cat("[cuda] library: expected contract ", AG_BACKEND_VERSION, " (", sizeof(AgBackend), " bytes) in ", file,
             ", got ", backend->version, " (", backend->struct_size, " bytes): built from another version of aligngpt");
  return nullptr;
}
#else
static std::string cuda_library() { return ""; }
const AgBackend* open_backend(const std::string&, std::string* why) {
  *why = "[cuda] the CUDA backend is there for Linux only";
  return nullptr;
}
#endif

Device* cuda(std::string* why) {
  static std::mutex mutex;
  static Device* device = nullptr;
  static std::string line;
  std::lock_guard<std::mutex> lock(mutex);
  if (!device)  // tried again as long as it fails: the environment may have changed
    if (const AgBackend* backend = open_backend(cuda_library(), &line)) device = new Device(backend);
  if (why) *why = line;
  return device;
}

Device& device_named(const std::string& name) {
  if (name == "cpu") return cpu();
  check(name == "cuda", "ERR_DEVICE", "[device] expected cpu or cuda, got '", name, "'");
  std::string why;
  Device* device = cuda(&why);
  check(device != nullptr, "ERR_DEVICE", why);
  return *device;
}
const char* device_name(const Device* device) { return device == &cpu() ? "cpu" : "cuda"; }

}  // namespace ag

#include "probe.h"

#include <cstdio>

namespace gpu {

// Within one major version of CUDA an older driver runs newer libraries.
bool judge(const Probe& p, char* message, int64_t message_bytes) {
  auto say = [&](const char* format, auto... values) {
    std::snprintf(message, size_t(message_bytes), format, values...);
  };
  const int have = p.driver_version / 1000, want = p.runtime_version / 1000;
  constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE
  if (!p.driver)
    say("[cuda] driver: expected libcuda.so.1 on this machine, found none%s", "");
  else if (have < want)
    say("[cuda] driver: expected one for CUDA %d.0 or newer, got one for CUDA %d.%d", want, have,
        p.driver_version % 1000 / 10);
  else if (p.runtime_error)
    say("[cuda] device: expected at least one, got an error: %s", p.runtime_error);
  else if (p.init_error == kNoDevice || (p.init_error == 0 && p.devices == 0))
    say("[cuda] device: expected at least one, the driver shows none%s (CUDA_VISIBLE_DEVICES?)", "");
  else if (p.init_error)
    say("[cuda] driver: cuInit failed with error %d", p.init_error);
  else if (p.major < kOldestMajor)
    say("[cuda] device: expected compute capability %d.0 or newer, got %d.%d (%s)", kOldestMajor, p.major, p.minor,
        p.name);
  else
    say("%s, compute capability %d.%d, driver for CUDA %d.%d", p.name, p.major, p.minor, have,
        p.driver_version % 1000 / 10);
  return p.driver && have >= want && p.init_error == 0 && p.devices > 0 && p.major >= kOldestMajor;
}

}  // namespace gpu

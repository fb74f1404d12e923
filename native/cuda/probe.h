// Whether there is a device this library can use, as one line for a person. No CUDA header: the tests include it.
#pragma once
#include <stdint.h>

namespace gpu {

struct Probe {
  bool driver = false;      // libcuda.so.1 could be opened
  int driver_version = 0;   // as cuDriverGetVersion has it: 13000 for CUDA 13.0
  int runtime_version = 0;  // that this library was built with
  int init_error = 0;       // of cuInit
  int devices = 0;
  int major = 0, minor = 0;  // compute capability of the device that would be used
  char name[256] = "";
  const char* runtime_error = nullptr;  // what the runtime said instead of showing its devices
};

constexpr int kOldestMajor = 8;  // cp.async, bf16 on the tensor cores

// False and the reason in `message`; else what was found.
bool judge(const Probe& probe, char* message, int64_t message_bytes);

}  // namespace gpu

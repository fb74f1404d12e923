// Tensor bytes to and from files: the only place where they pass.
#pragma once
#include <string>

#include "tensor.h"

namespace ag {

// Fills `t` with t.numel() elements stored as `dtype` (f32, f16, bf16, f64, i32, i64) at byte `offset` of `path`,
// converting to t's dtype. A short file is an error; nothing is written then beyond what was read.
void read_file(const Tensor& t, const std::string& path, int64_t offset, const std::string& dtype);
// Writes t's bytes at `offset`, creating the file if needed.
void write_file(const Tensor& t, const std::string& path, int64_t offset);

}  // namespace ag

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

// Every call to the file system of this file counts as one, and so do those of JavaScript that save (ts/src/disk.ts).
int64_t file_calls();
// Counts one about `path`. Throws ERR_FILE when the test hook says so.
void file_call(const std::string& path);
// Test hook: the `after`-th call from now (from 0) and the `count` - 1 behind it fail as on a full disk, or end the
// process as kill -9 does. A negative `after`: off.
void fail_files(int64_t after, int64_t count, bool kill);

}  // namespace ag

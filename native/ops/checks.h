// What ops ask of their arguments. Each throws "[op] what: expected, got".
#pragma once
#include <initializer_list>
#include <optional>
#include <string>

#include "core/tape.h"

namespace ag::ops {

using Opt = std::optional<Tensor>;

void want_float(const char* op, const char* what, const Tensor& t);
void want_dtype(const char* op, const char* what, const Tensor& t, AgDtype dt);
void want_shape(const char* op, const char* what, const Tensor& t, const Shape& shape);
void want_rank(const char* op, const char* what, const Tensor& t, int rank);
void want_same_device(const char* op, std::initializer_list<const Tensor*> tensors);
// i32 on the CPU
void want_i32(const char* op, const char* what, const Tensor& t);
// i32 indices, each in [low, high)
void want_index(const char* op, const char* what, const Tensor& t, int64_t low, int64_t high);
// i32 [batch+1], ascending from 0 to `total`; returns batch
int64_t want_offsets(const char* op, const char* what, const Tensor& t, int64_t total);
// from column c of row 0 on
inline void* column(const Tensor& t, int64_t c) { return t.as<char>() + c * dtype_size(t.dt); }
// columns of x [T, heads*dim] -> dim
int64_t head_dim(const char* op, const char* what, const Tensor& x, int64_t heads);
void check_heads(const char* op, int64_t heads, int64_t kv_heads);
AgUnaryOp parse_activation(const char* op, const std::string& name);
// Indices, offsets and ids live on the CPU, where they are checked: their values there, ...
const int32_t* host_i32(const Tensor& t);
// ... and on the device whose kernel reads them, copied once.
const int32_t* device_i32(const Tensor& t, Device* device);

}  // namespace ag::ops

#include "shape.h"

#include <algorithm>

namespace ag {

int64_t dtype_size(AgDtype dt) {
  switch (dt) {
    case AG_F32: return 4;
    case AG_BF16: return 2;
    case AG_F64: return 8;
    case AG_I32: return 4;
    case AG_I64: return 8;
  }
  fail("ERR_DTYPE", "[tensor] dtype: expected 0..4, got ", int(dt));
}

const char* dtype_name(AgDtype dt) {
  static const char* names[] = {"f32", "bf16", "f64", "i32", "i64"};
  return names[dt];
}

AgDtype parse_dtype(const std::string& name) {
  for (int i = 0; i < 5; i++)
    if (name == dtype_name(AgDtype(i))) return AgDtype(i);
  fail("ERR_DTYPE", "[tensor] dtype: expected f32, bf16, f64, i32 or i64, got '", name, "'");
}

Shape::Shape(const int64_t* dims, size_t n) {
  check(n <= size_t(kMaxRank), "ERR_SHAPE", "[tensor] rank: expected at most ", int(kMaxRank), ", got ", n);
  rank = int(n);
  // 2^47 elements of 8 bytes stay below 2^50 bytes, so no later size computation can overflow.
  int64_t total = 1;
  for (int i = 0; i < rank; i++) {
    check(dims[i] >= 0, "ERR_SHAPE", "[tensor] dimension ", i, ": expected >= 0, got ", dims[i]);
    d[i] = dims[i];
    int64_t m = std::max<int64_t>(dims[i], 1);
    check(m <= (int64_t(1) << 47) / total, "ERR_SHAPE", "[tensor] shape: too many elements (over 2^47)");
    total *= m;
  }
}

int64_t Shape::numel() const {
  int64_t n = 1;
  for (int i = 0; i < rank; i++) n *= d[i];
  return n;
}

int64_t Shape::leading() const {
  int64_t n = 1;
  for (int i = 0; i + 1 < rank; i++) n *= d[i];
  return n;
}

Shape Shape::with_last(int64_t n) const {
  std::vector<int64_t> dims(d, d + rank);
  check(rank > 0, "ERR_SHAPE", "[tensor] rank: expected at least 1, got 0");
  dims.back() = n;
  return Shape(dims);
}

bool Shape::operator==(const Shape& o) const { return rank == o.rank && std::equal(d, d + rank, o.d); }

std::string Shape::str() const {
  std::string s = "[";
  for (int i = 0; i < rank; i++) s += (i ? ", " : "") + std::to_string(d[i]);
  return s + "]";
}

}  // namespace ag

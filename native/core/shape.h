// Dtypes and shapes.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "error.h"

namespace ag {

int64_t dtype_size(AgDtype dt);
const char* dtype_name(AgDtype dt);
AgDtype parse_dtype(const std::string& name);
inline bool is_float(AgDtype dt) { return dt == AG_F32 || dt == AG_BF16 || dt == AG_F64; }
// The type sums are kept in (arguments.h): f64 for f64, f32 for f32 and bf16.
inline AgDtype acc_dtype(AgDtype dt) { return dt == AG_F64 ? AG_F64 : AG_F32; }

struct Shape {
  static constexpr int kMaxRank = 6;
  int rank = 0;
  int64_t d[kMaxRank] = {0, 0, 0, 0, 0, 0};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(dims.begin(), dims.size()) {}
  explicit Shape(const std::vector<int64_t>& dims) : Shape(dims.data(), dims.size()) {}
  Shape(const int64_t* dims, size_t n);  // checks rank, signs and overflow of the product

  int64_t operator[](int i) const { return d[i < 0 ? i + rank : i]; }
  int64_t numel() const;
  int64_t rows() const { return rank == 0 ? 1 : d[rank - 1] == 0 ? leading() : numel() / d[rank - 1]; }
  int64_t cols() const { return rank == 0 ? 1 : d[rank - 1]; }
  Shape with_last(int64_t n) const;
  bool operator==(const Shape& o) const;
  bool operator!=(const Shape& o) const { return !(*this == o); }
  std::string str() const;

 private:
  int64_t leading() const;
};
inline std::ostream& operator<<(std::ostream& s, const Shape& x) { return s << x.str(); }

}  // namespace ag

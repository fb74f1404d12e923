// Inference: drawing tokens. Nothing here is recorded.
#include <cmath>

#include "ops.h"

namespace ag::ops {

std::vector<double> sample(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                           const std::vector<double>& uniform) {
  const char* op = "sample";
  want_rank(op, "logits", logits, 2);
  want_dtype(op, "logits", logits, AG_F32);
  check(logits.shape[1] > 0, "ERR_SHAPE", "[sample] logits: expected at least one column, got ", logits.shape);
  check(int64_t(uniform.size()) == logits.shape[0], "ERR_SHAPE", "[sample] uniform: expected ", logits.shape[0],
        " numbers, got ", uniform.size());
  check(temperature >= 0 && std::isfinite(temperature), "ERR_ARGUMENT", "[sample] temperature: expected >= 0, got ",
        temperature);
  check(top_k >= 0, "ERR_ARGUMENT", "[sample] topK: expected >= 0, got ", top_k);
  check(top_p > 0 && top_p <= 1, "ERR_ARGUMENT", "[sample] topP: expected in (0, 1], got ", top_p);
  for (double u : uniform) check(u >= 0 && u < 1, "ERR_ARGUMENT", "[sample] uniform: expected in [0, 1), got ", u);
  Device* device = logits.device();
  const int64_t rows = logits.shape[0];
  Tensor u = empty(device, Shape{rows}, AG_F64), out = empty(device, Shape{rows}, AG_I32);
  copy_bytes(device, u.data(), uniform.data(), u.bytes());
  run(op, device, &AgBackend::sample,
      AgSample{logits.as<const float>(), rows, logits.shape[1], temperature, top_p, top_k, u.as<const double>(),
               out.as<int32_t>()});
  std::vector<int32_t> ids(uniform.size());
  copy_bytes(device, ids.data(), out.data(), out.bytes());
  synchronize(device);
  for (size_t i = 0; i < ids.size(); i++)
    check(ids[i] >= 0, "ERR_ARGUMENT", "[sample] logits[", i, "]: expected numbers, got a NaN");
  return std::vector<double>(ids.begin(), ids.end());
}

}  // namespace ag::ops

// The optimizer and the gradients' norm (cuda_test.h).
#include <cmath>
#include <cstring>

#include "cuda_test.h"

namespace cuda_test {
namespace {

void test_sum_squares(Test& t) {
  for (int count : {0, 1, 5, 300}) {  // 300 spans take two launches
    if (small() && count == 300) continue;
    std::vector<Buffer*> parts;
    for (int i = 0; i < count; i++)
      parts.push_back(&t.in(i % 2 ? t.dt : AG_F32, i == 3 ? 0 : count < 10 ? 20000 * i + 5 : 3).shifted(i % 3));
    Buffer& out = t.out("norm squared", AG_F64, 1);
    std::vector<AgSpan> spans;
    auto args = [&] {
      spans.clear();
      for (Buffer* x : parts) spans.push_back(AgSpan{x->p(), x->dt, x->n});
      return AgSumSquares{spans.data(), count, static_cast<double*>(out.p())};
    };
    t.run("sum_squares", &AgBackend::sum_squares, args);
    for (double bad : {double(INFINITY), double(NAN)}) {
      if (count < 5) continue;
      parts[4]->set(parts[4]->n - 1, bad);
      t.run("sum_squares, not finite", &AgBackend::sum_squares, args);
      check(!std::isfinite(out.device(0)), "sum_squares of %g is finite", bad);
    }
    t.clear();
  }
}

struct Moments {
  Buffer *p, *g, *master, *m, *v;
};

Moments tensor(Test& t, AgDtype dp, AgDtype dg, bool compact, int64_t n, int64_t shift) {
  const AgDtype state = compact ? AG_BF16 : AG_F32;
  Moments x{&t.in_place("p", dp, n).shifted(shift), &t.in(dg, n), nullptr, &t.in_place("m", state, n, -0.1, 0.1),
            &t.in_place("v", state, n, 0, 0.1)};
  if (dp == AG_BF16) x.master = &t.in_place("master", compact ? AG_BF16 : AG_F32, n);
  for (int64_t i = 0; compact && i < n; i++) {  // 16 bits that are no number
    const int16_t rest = int16_t(i * 4099 % 65536 - 32768);
    std::memcpy(&x.master->host[size_t(i) * 2], &rest, 2);
  }
  return x;
}

// The rest of a compact parameter is bits: its value is compared together with p, and the buffer itself is left out.
void compare_compact(const Moments& x) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < x.p->n; i++) {
    float value[2];
    for (int side = 0; side < 2; side++) {
      uint16_t high;
      int16_t rest;
      std::memcpy(&high, &x.p->results[side][size_t(i) * 2], 2);
      std::memcpy(&rest, &x.master->results[side][size_t(i) * 2], 2);
      const uint32_t bits = (uint32_t(high) << 16) + uint32_t(int32_t(rest));
      std::memcpy(&value[side], &bits, 4);
    }
    error += double(value[1] - value[0]) * (value[1] - value[0]);
    size += double(value[0]) * value[0];
  }
  check(error <= 1e-10 * size, "compact value: NMSE %.3g", size > 0 ? error / size : 0);
  // The moments are rounded by the same random numbers: they differ only where the last bit of an f32 decides.
  int64_t other = 0;
  for (const Buffer* moment : {x.m, x.v})
    for (int64_t i = 0; i < moment->n; i++) other += moment->cpu(i) != moment->device(i);
  check(other <= 2 + x.p->n / 1000, "%lld of %lld compact moments differ", (long long)other, (long long)(2 * x.p->n));
}

void test_adamw(Test& t) {
  for (int mode = 0; mode < 4; mode++) {  // no norm; a norm; a norm and clipping; a norm that is not finite
    std::vector<Moments> all;
    std::vector<bool> compact;
    for (int64_t n : {5, 0, 4096, 33000}) {
      const bool small = t.dt == AG_BF16 && n % 2 == 0;
      all.push_back(tensor(t, t.dt, n == 5 ? AG_F32 : t.dt, small, n, n == 5));
      compact.push_back(small);
      if (small) all.back().master->is_bits = true;
    }
    AgAdamWStep step{1e-2, 3};
    Buffer &now = t.in(AG_F64, 2), &norm = t.in(AG_F64, 1, 4, 4.1);
    std::memcpy(now.host.data(), &step, sizeof step);
    if (mode == 3) norm.set(0, INFINITY);
    std::vector<AgAdamWTensor> list;
    t.run("adamw", &AgBackend::adamw, [&] {
      list.clear();
      int64_t first = (int64_t(1) << 32) - 100;  // numbers of elements beyond 32 bits
      for (size_t i = 0; i < all.size(); i++) {
        const Moments& x = all[i];
        list.push_back({x.p->p(), x.p->dt, x.g->p(), x.g->dt, compact[i] ? AG_STATE_COMPACT : AG_STATE_FULL,
                        x.master ? x.master->p() : nullptr, x.m->p(), x.v->p(), x.p->n, first, i == 0 ? 0.5 : 1,
                        i == 2 ? 0.1 : 0});
        first += x.p->n;
      }
      return AgAdamW{list.data(),
                     int64_t(list.size()),
                     0.9,
                     0.999,
                     1e-8,
                     static_cast<const AgAdamWStep*>(now.p()),
                     mode ? static_cast<const double*>(norm.p()) : nullptr,
                     mode == 2 ? 1.0 : 0,
                     uint64_t(77) << 33};
    });
    for (size_t i = 0; i < all.size(); i++) {
      if (compact[i]) compare_compact(all[i]);
      check(mode != 3 || all[i].p->results[1] == all[i].p->host, "a norm that is not finite changed a parameter");
    }
    t.clear();
  }
}

// The compact state rounds by adding to the bits, and a GPU's NaN has all of them set.
void test_adamw_nan(Test& t) {
  if (t.dt != AG_BF16) return;
  constexpr int64_t n = 9;
  const uint32_t machine_nan = 0x7fffffffu;
  Moments x = tensor(t, AG_BF16, AG_F32, true, n, 0);
  x.master->is_bits = true;
  for (int64_t i = 0; i < n; i++) std::memcpy(&x.g->host[size_t(i) * 4], &machine_nan, 4);
  AgAdamWStep step{1e-2, 1};
  Buffer& now = t.in(AG_F64, 2);
  std::memcpy(now.host.data(), &step, sizeof step);
  AgAdamWTensor one;
  t.run("adamw, NaN", &AgBackend::adamw, [&] {
    one = {x.p->p(), AG_BF16, x.g->p(), AG_F32, AG_STATE_COMPACT, x.master->p(), x.m->p(), x.v->p(), n, 0, 1, 0.01};
    return AgAdamW{&one, 1, 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now.p()), nullptr, 0, 0};
  });
  for (const Buffer* b : {x.p, x.m, x.v})
    for (int64_t i = 0; i < n; i++)
      check(std::isnan(b->cpu(i)) && std::isnan(b->device(i)),
            "NaN: element %lld became %g on the CPU, %g on the device", (long long)i, b->cpu(i), b->device(i));
}

void test_adamw_many(Test& t) {  // more tensors than one launch takes
  if (small()) return;
  std::vector<Moments> all;
  for (int i = 0; i < 300; i++) all.push_back(tensor(t, AG_F32, t.dt, false, 3, 0));
  AgAdamWStep step{1e-2, 1};
  Buffer& now = t.in(AG_F64, 2);
  std::memcpy(now.host.data(), &step, sizeof step);
  std::vector<AgAdamWTensor> list;
  t.run("adamw of 300 tensors", &AgBackend::adamw, [&] {
    list.clear();
    for (const Moments& x : all)
      list.push_back({x.p->p(), AG_F32, x.g->p(), x.g->dt, AG_STATE_FULL, nullptr, x.m->p(), x.v->p(), 3, 0, 1, 0.01});
    return AgAdamW{list.data(), 300, 0.9, 0.999, 1e-8, static_cast<const AgAdamWStep*>(now.p()), nullptr, 0, 0};
  });
}

const Registered kCases[] = {{"sum_squares", test_sum_squares},
                             {"adamw", test_adamw},
                             {"adamw_many", test_adamw_many},
                             {"adamw_nan", test_adamw_nan}};

}  // namespace
}  // namespace cuda_test

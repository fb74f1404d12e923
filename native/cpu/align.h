// What alignMix and its gradient share.
#pragma once
#include "functions.h"
#include "microkernel.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kStripe = 256;  // columns of a task where columns are shared out

template <class C>
C gelu(C x) {
  return activate(AG_GELU, splat(x), Vec<C>{})[0];
}
template <class A, class B>
Acc<A> dot(const A* a, const B* b, int64_t n) {
  constexpr int W = kWidth<Acc<A>>;
  Vec<Acc<A>> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + W) * load(b + i + W);
  }
  for (; i < n; i += W) {
    int64_t k = min_of(W, n - i);
    s0 += load_n(a + i, k) * load_n(b + i, k);
  }
  return sum_lanes(s0 + s1);
}

// t += by * x
template <class S, class C>
void add_scaled(C* t, C by, const S* x, int64_t n) {
  constexpr int W = kWidth<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(t + i, load(t + i) + load(x + i) * by);
  for (; i < n; i++) t[i] += by * C(to_acc(x[i]));
}

inline bool has_projector(const AgAlignMix* a) { return a->w || a->w_packed; }

}  // namespace
}  // namespace AG_LEVEL

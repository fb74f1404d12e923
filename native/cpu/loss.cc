// Cross entropy and sampling.
#include "functions.h"

namespace AG_LEVEL {
namespace {

// Sum of exp(x - top) with eight running sums: a vocabulary is a long chain for one.
template <class S>
Acc<S> sum_exp(const S* x, int64_t cols, Acc<S> top) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  Vec<C> s[8] = {};
  int64_t i = 0;
  for (; i + 8 * W <= cols; i += 8 * W)
    for (int j = 0; j < 8; j++) s[j] += vexp(load(x + i + j * W) - top);
  for (; i < cols; i += W) {
    int64_t n = min_of(W, cols - i);
    Vec<C> e = vexp(get(x + i, n) - top);
    s[0] += n < W ? first<C>(e, n) : e;
  }
  return lane_sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}

template <class S>
Acc<S> highest(const S* x, int64_t cols) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> top[4];
  for (int j = 0; j < 4; j++) top[j] = splat(to_acc(x[0]));
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W)
    for (int j = 0; j < 4; j++) top[j] = vmax(load(x + i + j * W), top[j]);
  Acc<S> best = lane_max(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
  for (; i < cols; i++) best = to_acc(x[i]) > best ? to_acc(x[i]) : best;
  return best;
}

// Three passes over a row, of which two find it in L2.
template <class S, class D>
void cross_entropy_rows(const AgCrossEntropy* a) {
  typedef Acc<S> C;
  int64_t cols = a->cols;
  const double by = a->scale ? double(*static_cast<const C*>(a->scale)) : 1;
  parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* x = static_cast<const S*>(a->logits) + r * cols;
      int64_t target = a->target[r];
      D* d = a->dlogits ? static_cast<D*>(a->dlogits) + r * cols : nullptr;
      if (target < 0) {
        static_cast<C*>(a->nll)[r] = 0;
        if (d) each_vector<C>(cols, [&](int64_t i, int64_t n) { set(d + i, splat(C(0)), n); });
        continue;
      }
      C top = highest(x, cols), total = sum_exp(x, cols, top), at = to_acc(x[target]);
      // A NaN anywhere must reach the loss: the maximum may have skipped it, the sum has not.
      static_cast<C*>(a->nll)[r] = C(log(double(total)) - (double(at) - double(top)));
      if (!d) continue;
      C scale = C(a->grad_scale * by), factor = scale / total;
      each_vector<C>(cols, [&](int64_t i, int64_t n) { set(d + i, vexp(get(x + i, n) - top) * factor, n); });
      put(d + target, double(C(exp(double(at - top))) * factor - scale));
    }
  });
}

// ---- sampling ---------------------------------------------------------------------------------------
struct Item {
  float logit;
  int32_t id;
};
// Highest first, lower id first among equals.
inline bool before(const Item& a, const Item& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

void sift(Item* h, int64_t i, int64_t n) {
  for (;;) {
    int64_t c = 2 * i + 1;
    if (c >= n) return;
    if (c + 1 < n && before(h[c + 1], h[c])) c++;
    if (!before(h[c], h[i])) return;
    Item t = h[c];
    h[c] = h[i];
    h[i] = t;
    i = c;
  }
}

// Items in falling order, taken from a heap one at a time: a draw rarely needs more than a few of a vocabulary. Those
// taken lie at the end of the array, the first taken last.
struct Ranking {
  Item* heap;
  int64_t cols, taken = 0;
  Ranking(const float* x, int64_t cols, Item* heap) : heap(heap), cols(cols) {
    for (int64_t i = 0; i < cols; i++) heap[i] = Item{x[i], int32_t(i)};
    for (int64_t i = cols / 2 - 1; i >= 0; i--) sift(heap, i, cols);
  }
  const Item& operator[](int64_t k) {
    while (taken <= k) {
      int64_t last = cols - 1 - taken++;
      Item t = heap[0];
      heap[0] = heap[last];
      heap[last] = t;
      sift(heap, 0, last);
    }
    return heap[cols - 1 - k];
  }
};

int32_t sample_row(const float* x, int64_t cols, const AgSample* a, double u, Item* heap) {
  int64_t best = 0;
  for (int64_t i = 1; i < cols; i++)
    if (x[i] > x[best]) best = i;
  float top = x[best];
  if (a->temperature == 0 || top - top != 0) return int32_t(best);  // also when the best is infinite
  Ranking rank(x, cols, heap);
  double scale = 1 / a->temperature, total = 0;
  auto weight = [&](float logit) { return exp((double(logit) - double(top)) * scale); };
  int64_t keep = cols;
  if (a->top_k > 0 && a->top_k < cols) {  // what ties with the k-th stays
    float edge = rank[a->top_k - 1].logit;
    for (keep = 0; keep < cols && rank[keep].logit >= edge; keep++) total += weight(rank[keep].logit);
  } else {
    for (int64_t i = 0; i < cols; i++) total += weight(x[i]);
  }
  if (a->top_p < 1) {
    double sum = 0;
    int64_t k = 0;
    do sum += weight(rank[k++].logit);
    while (k < keep && sum < a->top_p * total);
    keep = k;
    total = sum;
  }
  double at = u * total, sum = 0;
  int32_t last = int32_t(best);
  for (int64_t k = 0; k < keep; k++) {
    double w = weight(rank[k].logit);
    if (w == 0) break;  // rounding left a rest of u: the last possible one is drawn
    last = rank[k].id;
    sum += w;
    if (at < sum) break;
  }
  return last;
}

}  // namespace

AgStatus cross_entropy(AgCtx* ctx, const AgCrossEntropy* a) {
  AgDtype dt_d = a->dlogits ? a->dt_d : a->dt;
  return with_float_status(ctx, "cross_entropy", a->dt, [&](auto tag) {
    return with_float_status(ctx, "cross_entropy", dt_d, [&](auto d) {
      typedef typename decltype(tag)::type S;
      typedef typename decltype(d)::type D;
      if constexpr (sizeof(Acc<S>) != sizeof(Acc<D>)) {
        return bad_dtype(ctx, "cross_entropy", dt_d, "f64 with f64 only");
      } else {
        if (a->cols > 0) cross_entropy_rows<S, D>(a);
        return AG_OK;
      }
    });
  });
}

int64_t sample_workspace(const AgSample* a) { return a->temperature == 0 ? 0 : a->cols * int64_t(sizeof(Item)); }
AgStatus sample(AgCtx* ctx, const AgSample* a) {
  for (int64_t r = 0; r < a->rows; r++) {
    const float* x = a->logits + r * a->cols;
    bool numbers = true;
    for (int64_t i = 0; i < a->cols; i++) numbers = numbers && x[i] == x[i];
    a->out[r] = numbers ? sample_row(x, a->cols, a, a->u[r], static_cast<Item*>(ctx->workspace)) : -1;
  }
  return AG_OK;
}

}  // namespace AG_LEVEL

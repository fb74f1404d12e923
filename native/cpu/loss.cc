// Cross entropy and sampling.
#include "vec.h"

namespace AG_LEVEL {
namespace {

template <class S, class D>
void cross_entropy_rows(const AgCrossEntropy* a) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  int64_t cols = a->cols;
  parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* x = static_cast<const S*>(a->logits) + r * cols;
      Vec<C> tops = splat(to_acc(x[0]));
      int64_t i = 0;
      for (; i + W <= cols; i += W) tops = vmax(tops, load(x + i));
      C top = lane_max(tops);
      for (; i < cols; i++) top = to_acc(x[i]) > top ? to_acc(x[i]) : top;
      Vec<C> sums = {};
      for (i = 0; i + W <= cols; i += W) sums += vexp(load(x + i) - top);
      C total = lane_sum(sums);
      if (i < cols) {
        Vec<C> e = vexp(load_n(x + i, cols - i) - top);
        for (int64_t j = 0; j < cols - i; j++) total += e[j];
      }
      int64_t target = a->target[r];
      C at = to_acc(x[target]);
      // A NaN anywhere must reach the loss: the maximum may have skipped it, the sum has not.
      static_cast<C*>(a->nll)[r] = C(log(double(total))) - (at - top);
      if (!a->dlogits) continue;
      D* d = static_cast<D*>(a->dlogits) + r * cols;
      C scale = C(a->grad_scale), factor = scale / total;
      for (i = 0; i < cols; i += W) {
        int64_t n = min_of(W, cols - i);
        store_n(d + i, vexp(load_n(x + i, n) - top) * factor, n);
      }
      put(d + target, double(C(exp(double(at - top))) * factor - scale));
    }
  });
}

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

// Draws from one row: items leave a heap in order of probability until the cut.
int32_t sample_row(const float* x, int64_t cols, const AgSample* a, double u, Item* heap, double* weight) {
  int64_t best = 0;
  for (int64_t i = 1; i < cols; i++)
    if (x[i] > x[best]) best = i;
  if (a->temperature == 0) return int32_t(best);
  double top = double(x[best]), total = 0;
  int64_t keep = a->top_k > 0 ? min_of(a->top_k, cols) : cols;
  for (int64_t i = 0; i < cols; i++) heap[i] = Item{x[i], int32_t(i)};
  for (int64_t i = cols / 2 - 1; i >= 0; i--) sift(heap, i, cols);
  // The k best move to the end of the array in falling order.
  for (int64_t n = cols, k = 0; k < keep; k++) {
    Item t = heap[0];
    heap[0] = heap[--n];
    heap[n] = t;
    sift(heap, 0, n);
    weight[k] = exp((double(t.logit) - top) / a->temperature);
    total += weight[k];
  }
  int64_t used = keep;
  if (a->top_p < 1) {
    double sum = 0;
    for (int64_t k = 0; k < keep; k++) {
      sum += weight[k];
      if (sum >= a->top_p * total) {
        used = k + 1;
        total = sum;
        break;
      }
    }
  }
  double at = u * total, sum = 0;
  for (int64_t k = 0; k < used; k++) {
    sum += weight[k];
    if (at < sum) return heap[cols - 1 - k].id;
  }
  return heap[cols - used].id;
}

}  // namespace

AgStatus cross_entropy(AgCtx* ctx, const AgCrossEntropy* a) {
  if (a->cols == 0) return AG_OK;
  if ((a->dt == AG_F64) != (a->dt_d == AG_F64)) {
    snprintf(ctx->error, sizeof ctx->error, "cross_entropy: f64 goes with f64 only");
    return AG_INVALID;
  }
  return with_float(ctx, "cross_entropy", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    with_float(ctx, "cross_entropy", a->dt_d,
               [&](auto d) {
                 typedef typename decltype(d)::type D;
                 if constexpr (sizeof(Acc<S>) == sizeof(Acc<D>)) cross_entropy_rows<S, D>(a);
               });
  });
}

int64_t sample_workspace(const AgSample* a) { return a->temperature == 0 ? 0 : a->cols * int64_t(sizeof(Item) + sizeof(double)) + 64; }
AgStatus sample(AgCtx* ctx, const AgSample* a) {
  double* weight = static_cast<double*>(ctx->workspace);
  Item* heap = reinterpret_cast<Item*>(weight + a->cols);
  for (int64_t r = 0; r < a->rows; r++) {
    const float* x = a->logits + r * a->cols;
    for (int64_t i = 0; i < a->cols; i++)
      if (x[i] != x[i]) {
        snprintf(ctx->error, sizeof ctx->error, "logits[%lld, %lld]: expected a number, got NaN", (long long)r, (long long)i);
        return AG_INVALID;
      }
    a->out[r] = sample_row(x, a->cols, a, a->u[r], heap, weight);
  }
  return AG_OK;
}

}  // namespace AG_LEVEL

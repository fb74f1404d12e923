// LayerNorm, RMSNorm, softmax, L2 normalisation: rows.
#include "vec.h"

namespace AG_LEVEL {
namespace {

// Sum over a row of f(i, n) vectors: f reads n lanes at i and zeroes the others.
template <class C, class F>
C row_sum(int64_t cols, const F& f) {
  constexpr int W = kWidth<C>;
  Vec<C> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= cols; i += 2 * W) {
    s0 += f(i, W);
    s1 += f(i + W, W);
  }
  for (; i < cols; i += W) s0 += f(i, min_of(W, cols - i));
  return lane_sum(s0 + s1);
}
template <class C, class F>
void row_each(int64_t cols, const F& f) {
  constexpr int W = kWidth<C>;
  for (int64_t i = 0; i < cols; i += W) f(i, min_of(W, cols - i));
}
template <class S>
Vec<Acc<S>> get(const S* p, int64_t n) {
  return n == kWidth<Acc<S>> ? load(p) : load_n(p, n);
}
template <class S>
void set(S* p, Vec<Acc<S>> v, int64_t n) {
  n == kWidth<Acc<S>> ? store(p, v) : store_n(p, v, n);
}
// Zero outside the first n lanes.
template <class C>
Vec<C> first(Vec<C> v, int64_t n) {
  for (int64_t i = n; i < kWidth<C>; i++) v[i] = 0;
  return v;
}

template <class S>
void norm_rows(const AgNorm* a) {
  typedef Acc<S> C;
  const S *w = static_cast<const S*>(a->w), *b = static_cast<const S*>(a->b);
  int64_t cols = a->cols;
  parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* x = static_cast<const S*>(a->x) + r * cols;
      S* y = static_cast<S*>(a->y) + r * cols;
      C mean = 0;
      if (a->mean) mean = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(x + i, n); }) / C(cols);
      C var = row_sum<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> d = get(x + i, n) - mean;
        if (n < kWidth<C>) d = first<C>(d, n);
        return d * d;
      }) / C(cols);
      C rstd = C(1) / C(sqrt(double(var + C(a->eps))));
      row_each<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> v = (get(x + i, n) - mean) * rstd * get(w + i, n);
        set(y + i, b ? v + get(b + i, n) : v, n);
      });
      if (a->mean) static_cast<C*>(a->mean)[r] = mean;
      static_cast<C*>(a->rstd)[r] = rstd;
    }
  });
}

int64_t norm_blocks(int64_t rows) { return min_of(16, max_of(1, rows / 16)); }

// One pass over blocks of rows: dx of each row, and the block's part of dw and db in scratch; then the blocks in order.
template <class S>
void norm_grad_rows(AgCtx* ctx, const AgNormGrad* a) {
  typedef Acc<S> C;
  int64_t cols = a->cols, blocks = norm_blocks(a->rows), per = div_up(a->rows, blocks);
  bool params = a->dw.p || a->db.p;
  C* partial = static_cast<C*>(ctx->workspace);
  const S* w = static_cast<const S*>(a->w);
  parallel_for(blocks, [&](int64_t block) {
    C *pw = partial + block * 2 * cols, *pb = pw + cols;
    if (params) memset(pw, 0, size_t(2 * cols) * sizeof(C));
    for (int64_t r = block * per, end = min_of(a->rows, r + per); r < end; r++) {
      const S *x = static_cast<const S*>(a->x) + r * cols, *dy = static_cast<const S*>(a->dy) + r * cols;
      C mean = a->mean ? static_cast<const C*>(a->mean)[r] : 0, rstd = static_cast<const C*>(a->rstd)[r];
      C s0 = 0;  // mean of dy*w (LayerNorm only)
      if (a->mean) s0 = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(w + i, n); }) / C(cols);
      C s1 = row_sum<C>(cols, [&](int64_t i, int64_t n) {
        return get(dy + i, n) * get(w + i, n) * ((get(x + i, n) - mean) * rstd);
      }) / C(cols);
      row_each<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> d = get(dy + i, n), hat = (get(x + i, n) - mean) * rstd;
        if (a->dx) set(static_cast<S*>(a->dx) + r * cols + i, (d * get(w + i, n) - s0 - hat * s1) * rstd, n);
        if (params) {
          set(pw + i, get(pw + i, n) + d * hat, n);
          set(pb + i, get(pb + i, n) + d, n);
        }
      });
    }
  });
  if (!params) return;
  parallel_range(cols, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t c = lo; c < hi; c++) {
      C sw = 0, sb = 0;
      for (int64_t b = 0; b < blocks; b++) {
        sw += partial[b * 2 * cols + c];
        sb += partial[b * 2 * cols + cols + c];
      }
      if (a->dw.p) grad_put(a->dw, c, double(sw));
      if (a->db.p) grad_put(a->db, c, double(sb));
    }
  });
}

template <class S>
void softmax_rows(const AgSoftmax* a) {
  typedef Acc<S> C;
  int64_t cols = a->cols;
  parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) {
      const S* x = static_cast<const S*>(a->x) + r * cols;
      S* y = static_cast<S*>(a->y) + r * cols;
      C top = to_acc(x[0]);
      for (int64_t i = 1; i < cols; i++) top = to_acc(x[i]) > top ? to_acc(x[i]) : top;
      C total = row_sum<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> e = vexp(get(x + i, n) - top);
        return n < kWidth<C> ? first<C>(e, n) : e;
      });
      row_each<C>(cols, [&](int64_t i, int64_t n) { set(y + i, vexp(get(x + i, n) - top) / total, n); });
    }
  });
}

}  // namespace

AgStatus norm(AgCtx* ctx, const AgNorm* a) {
  return with_float(ctx, "norm", a->dt, [&](auto tag) { norm_rows<typename decltype(tag)::type>(a); });
}
int64_t norm_grad_workspace(const AgNormGrad* a) { return norm_blocks(a->rows) * 2 * a->cols * (a->dt == AG_F64 ? 8 : 4); }
AgStatus norm_grad(AgCtx* ctx, const AgNormGrad* a) {
  return with_float(ctx, "norm_grad", a->dt, [&](auto tag) { norm_grad_rows<typename decltype(tag)::type>(ctx, a); });
}

AgStatus softmax(AgCtx* ctx, const AgSoftmax* a) {
  if (a->cols == 0) return AG_OK;
  return with_float(ctx, "softmax", a->dt, [&](auto tag) { softmax_rows<typename decltype(tag)::type>(a); });
}
AgStatus softmax_grad(AgCtx* ctx, const AgSoftmaxGrad* a) {
  return with_float(ctx, "softmax_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    int64_t cols = a->cols;
    parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++) {
        const S *y = static_cast<const S*>(a->y) + r * cols, *dy = static_cast<const S*>(a->dy) + r * cols;
        C s = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(y + i, n); });
        row_each<C>(cols, [&](int64_t i, int64_t n) {
          set(static_cast<S*>(a->dx) + r * cols + i, get(y + i, n) * (get(dy + i, n) - s), n);
        });
      }
    });
  });
}

AgStatus l2norm(AgCtx* ctx, const AgL2Norm* a) {
  return with_float(ctx, "l2norm", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    int64_t cols = a->cols;
    parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++) {
        const S* x = static_cast<const S*>(a->x) + r * cols;
        C length = C(sqrt(double(row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(x + i, n) * get(x + i, n); }))));
        row_each<C>(cols, [&](int64_t i, int64_t n) { set(static_cast<S*>(a->y) + r * cols + i, get(x + i, n) / length, n); });
        static_cast<C*>(a->norm)[r] = length;
      }
    });
  });
}
AgStatus l2norm_grad(AgCtx* ctx, const AgL2NormGrad* a) {
  return with_float(ctx, "l2norm_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    int64_t cols = a->cols;
    parallel_range(a->rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++) {
        const S *y = static_cast<const S*>(a->y) + r * cols, *dy = static_cast<const S*>(a->dy) + r * cols;
        C s = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(y + i, n); });
        C length = static_cast<const C*>(a->norm)[r];
        row_each<C>(cols, [&](int64_t i, int64_t n) {
          set(static_cast<S*>(a->dx) + r * cols + i, (get(dy + i, n) - get(y + i, n) * s) / length, n);
        });
      }
    });
  });
}

}  // namespace AG_LEVEL

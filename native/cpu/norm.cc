// LayerNorm, RMSNorm, softmax, L2 normalisation: rows.
#include "functions.h"

namespace AG_LEVEL {
namespace {

// Sum over a row of f(i, lanes), which is zero outside its lanes. Four running sums: short chains, no waiting for an
// add.
template <class C, class F>
inline __attribute__((always_inline)) C row_sum(int64_t cols, const F& f) {
  constexpr int64_t W = kWidth<C>;
  Vec<C> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W)
    for (int j = 0; j < 4; j++) s[j] += f(i + j * W, W);
  for (; i + W <= cols; i += W) s[0] += f(i, W);
  if (i < cols) s[1] += f(i, cols - i);
  return lane_sum((s[0] + s[1]) + (s[2] + s[3]));
}
template <class S>
Acc<S> row_max(const S* x, int64_t cols) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> top = splat(to_acc(x[0]));
  int64_t i = 0;
  for (; i + W <= cols; i += W) top = vmax(load(x + i), top);
  Acc<S> best = lane_max(top);
  for (; i < cols; i++) best = to_acc(x[i]) > best ? to_acc(x[i]) : best;
  return best;
}
template <class F>
void each_row(int64_t rows, int64_t cols, const F& f) {
  parallel_range(rows, row_grain(cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; r++) f(r);
  });
}

template <bool layer, class S>
void norm_row(const AgNorm* a, int64_t r) {
  typedef Acc<S> C;
  int64_t cols = a->cols;
  const S *x = static_cast<const S*>(a->x) + r * cols, *w = static_cast<const S*>(a->w),
          *b = static_cast<const S*>(a->b);
  S* y = static_cast<S*>(a->y) + r * cols;
  C mean = 0;
  if (layer) mean = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(x + i, n); }) / C(cols);
  C var = row_sum<C>(cols,
                     [&](int64_t i, int64_t n) {
                       Vec<C> d = layer ? get(x + i, n) - mean : get(x + i, n);
                       if (layer && n < kWidth<C>) d = first<C>(d, n);
                       return d * d;
                     }) /
          C(cols);
  C rstd = C(1 / sqrt(double(var) + a->eps));
  each_vector<C>(cols, [&](int64_t i, int64_t n) {
    Vec<C> v = (layer ? get(x + i, n) - mean : get(x + i, n)) * rstd * get(w + i, n);
    set(y + i, layer && b ? v + get(b + i, n) : v, n);
  });
  if (layer) static_cast<C*>(a->mean)[r] = mean;
  static_cast<C*>(a->rstd)[r] = rstd;
}

// ---- gradient of the norms --------------------------------------------------------------------------
int64_t norm_blocks(int64_t rows) { return min_of(32, max_of(1, rows / 16)); }

// Rows lo..hi: dx of each row; their part of dw (and db) is added to pw (and pb).
template <bool layer, class S>
void norm_grad_block(const AgNormGrad* a, int64_t lo, int64_t hi, Acc<S>* pw, Acc<S>* pb) {
  typedef Acc<S> C;
  int64_t cols = a->cols;
  const S* w = static_cast<const S*>(a->w);
  for (int64_t r = lo; r < hi; r++) {
    const S *x = static_cast<const S*>(a->x) + r * cols, *dy = static_cast<const S*>(a->dy) + r * cols;
    C mean = layer ? static_cast<const C*>(a->mean)[r] : C(0), rstd = static_cast<const C*>(a->rstd)[r];
    auto hat = [&](int64_t i, int64_t n) { return (layer ? get(x + i, n) - mean : get(x + i, n)) * rstd; };
    if (S* dx = a->dx ? static_cast<S*>(a->dx) + r * cols : nullptr) {
      C s0 = 0;
      if (layer) s0 = row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(w + i, n); }) / C(cols);
      C s1 =
          row_sum<C>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(w + i, n) * hat(i, n); }) / C(cols);
      each_vector<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> d = get(dy + i, n), h = hat(i, n), g = d * get(w + i, n) - h * s1;
        set(dx + i, (layer ? g - s0 : g) * rstd, n);
        if (pw) set(pw + i, get(pw + i, n) + d * h, n);
        if (pb) set(pb + i, get(pb + i, n) + d, n);
      });
    } else {
      each_vector<C>(cols, [&](int64_t i, int64_t n) {
        Vec<C> d = get(dy + i, n);
        if (pw) set(pw + i, get(pw + i, n) + d * hat(i, n), n);
        if (pb) set(pb + i, get(pb + i, n) + d, n);
      });
    }
  }
}

// Blocks of rows in one pass over x and dy, their parts of dw and db in scratch; then the blocks in order.
template <class S>
void norm_grad_rows(AgCtx* ctx, const AgNormGrad* a) {
  typedef Acc<S> C;
  int64_t cols = a->cols, blocks = norm_blocks(a->rows), per = div_up(a->rows, blocks);
  C* partial = static_cast<C*>(ctx->workspace);
  parallel_for(blocks, [&](int64_t block) {
    C* own = partial + block * 2 * cols;
    C *pw = a->dw.p ? own : nullptr, *pb = a->db.p ? own + cols : nullptr;
    if (pw || pb) memset(own, 0, size_t(2 * cols) * sizeof(C));
    int64_t lo = min_of(a->rows, block * per), hi = min_of(a->rows, lo + per);
    a->mean ? norm_grad_block<true, S>(a, lo, hi, pw, pb) : norm_grad_block<false, S>(a, lo, hi, pw, pb);
  });
  const AgGrad* grads[] = {&a->dw, &a->db};
  for (int which = 0; which < 2; which++) {
    if (!grads[which]->p) continue;
    const C* from = partial + which * cols;
    parallel_range(cols, kGrain, [&](int64_t lo, int64_t hi) {
      each_vector<C>(hi - lo, [&](int64_t i, int64_t n) {
        Vec<C> s = {};
        for (int64_t b = 0; b < blocks; b++) s += get(from + b * 2 * cols + lo + i, n);
        for (int64_t j = 0; j < n; j++) grad_put(*grads[which], lo + i + j, double(s[j]));
      });
    });
  }
}

template <class S>
void softmax_row(const S* x, S* y, int64_t cols) {
  typedef Acc<S> C;
  C top = row_max(x, cols);
  C total = row_sum<C>(cols, [&](int64_t i, int64_t n) {
    Vec<C> e = vexp(get(x + i, n) - top);
    return n < kWidth<C> ? first<C>(e, n) : e;
  });
  C factor = 1 / total;
  each_vector<C>(cols, [&](int64_t i, int64_t n) { set(y + i, vexp(get(x + i, n) - top) * factor, n); });
}

template <class S>
void l2norm_row(const AgL2Norm* a, int64_t r) {
  typedef Acc<S> C;
  const S* x = static_cast<const S*>(a->x) + r * a->cols;
  S* y = static_cast<S*>(a->y) + r * a->cols;
  C length = C(sqrt(double(row_sum<C>(a->cols, [&](int64_t i, int64_t n) { return get(x + i, n) * get(x + i, n); }))));
  each_vector<C>(a->cols, [&](int64_t i, int64_t n) { set(y + i, get(x + i, n) / length, n); });
  static_cast<C*>(a->norm)[r] = length;
}

// Sum of dy * y over row r of two matrices of the same shape.
template <class S>
Acc<S> dot_row(const S* dy, const S* y, int64_t cols) {
  return row_sum<Acc<S>>(cols, [&](int64_t i, int64_t n) { return get(dy + i, n) * get(y + i, n); });
}

}  // namespace

AgStatus norm(AgCtx* ctx, const AgNorm* a) {
  return with_float(ctx, "norm", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    each_row(a->rows, a->cols, [&](int64_t r) { a->mean ? norm_row<true, S>(a, r) : norm_row<false, S>(a, r); });
  });
}
int64_t norm_grad_workspace(const AgNormGrad* a) {
  return a->dw.p || a->db.p ? norm_blocks(a->rows) * 2 * a->cols * (a->dt == AG_F64 ? 8 : 4) : 0;
}
AgStatus norm_grad(AgCtx* ctx, const AgNormGrad* a) {
  const AgGrad* grads[] = {&a->dw, &a->db};
  for (const AgGrad* g : grads)
    if (g->p && g->dt > AG_F64) return bad_dtype(ctx, "norm_grad", g->dt, "f32, bf16 or f64");
  return with_float(ctx, "norm_grad", a->dt, [&](auto tag) { norm_grad_rows<typename decltype(tag)::type>(ctx, a); });
}

AgStatus softmax(AgCtx* ctx, const AgSoftmax* a) {
  return with_float(ctx, "softmax", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    if (a->cols == 0) return;
    each_row(a->rows, a->cols, [&](int64_t r) {
      softmax_row(static_cast<const S*>(a->x) + r * a->cols, static_cast<S*>(a->y) + r * a->cols, a->cols);
    });
  });
}
AgStatus softmax_grad(AgCtx* ctx, const AgSoftmaxGrad* a) {
  return with_float(ctx, "softmax_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    each_row(a->rows, a->cols, [&](int64_t r) {
      const S *y = static_cast<const S*>(a->y) + r * a->cols, *dy = static_cast<const S*>(a->dy) + r * a->cols;
      S* dx = static_cast<S*>(a->dx) + r * a->cols;
      C s = dot_row(dy, y, a->cols);
      each_vector<C>(a->cols, [&](int64_t i, int64_t n) { set(dx + i, get(y + i, n) * (get(dy + i, n) - s), n); });
    });
  });
}

AgStatus l2norm(AgCtx* ctx, const AgL2Norm* a) {
  return with_float(ctx, "l2norm", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    each_row(a->rows, a->cols, [&](int64_t r) { l2norm_row<S>(a, r); });
  });
}
AgStatus l2norm_grad(AgCtx* ctx, const AgL2NormGrad* a) {
  return with_float(ctx, "l2norm_grad", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    typedef Acc<S> C;
    each_row(a->rows, a->cols, [&](int64_t r) {
      const S *y = static_cast<const S*>(a->y) + r * a->cols, *dy = static_cast<const S*>(a->dy) + r * a->cols;
      S* dx = static_cast<S*>(a->dx) + r * a->cols;
      C s = dot_row(dy, y, a->cols), length = static_cast<const C*>(a->norm)[r];
      each_vector<C>(a->cols,
                     [&](int64_t i, int64_t n) { set(dx + i, (get(dy + i, n) - get(y + i, n) * s) / length, n); });
    });
  });
}

}  // namespace AG_LEVEL

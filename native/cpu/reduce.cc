// Sums in a fixed order, and rows by index.
#include "vec.h"

namespace AG_LEVEL {
namespace {

int64_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }

// ---- sums of everything -----------------------------------------------------------------------------
constexpr int64_t kSumBlock = 8192;

// Short blocks and several running sums: the rounding errors of a long chain do not build up.
template <class S>
Acc<S> block_sum(const S* p, int64_t n) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> s[8] = {};
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W)
    for (int j = 0; j < 8; j++) s[j] += load(p + i + j * W);
  for (; i < n; i += W) s[0] += get(p + i, min_of(W, n - i));
  return lane_sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}

template <class S>
double block_squares(const S* p, int64_t n) {
  constexpr int W = kWidth<double>;
  vd s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) {
      vd x = load_wide(p + i + j * W);
      s[j] += x * x;
    }
  double sum = lane_sum((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; i++) sum += double(to_acc(p[i])) * double(to_acc(p[i]));
  return sum;
}
double span_squares(const AgSpan& s, int64_t from, int64_t n) {
  if (s.dt == AG_F32) return block_squares(static_cast<const float*>(s.p) + from, n);
  if (s.dt == AG_BF16) return block_squares(static_cast<const bf16*>(s.p) + from, n);
  return block_squares(static_cast<const double*>(s.p) + from, n);
}

// ---- sums of columns --------------------------------------------------------------------------------
constexpr int64_t kStripe = 2048;  // columns of a task: its partial sums stay in L1

// One block needs no scratch: its sums go straight to y.
int64_t col_sum_blocks(int64_t rows) { return min_of(64, max_of(1, rows / 64)); }

// f(c, sum of x[r0..r1][c], lanes) for the columns c0..c1; `sums` holds kStripe numbers. Eight rows are added to each
// other before they join the running sum: fewer trips through L1 and shorter chains.
template <class S, class F>
void stripe_sum(const S* x, int64_t ld, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Acc<S>* sums, const F& f) {
  typedef Acc<S> C;
  int64_t r = r0, cols = c1 - c0;
  bool started = false;
  for (; r + 8 <= r1; r += 8) {
    const S* p = x + r * ld + c0;
    each_vector<C>(cols, [&](int64_t c, int64_t n) {
      const S* q = p + c;
      Vec<C> a = (get(q, n) + get(q + ld, n)) + (get(q + 2 * ld, n) + get(q + 3 * ld, n));
      Vec<C> b = (get(q + 4 * ld, n) + get(q + 5 * ld, n)) + (get(q + 6 * ld, n) + get(q + 7 * ld, n));
      set(sums + c, started ? get(sums + c, n) + (a + b) : a + b, n);
    });
    started = true;
  }
  each_vector<C>(cols, [&](int64_t c, int64_t n) {
    Vec<C> s = started ? get(sums + c, n) : Vec<C>{};
    for (int64_t k = r; k < r1; k++) s += get(x + k * ld + c0 + c, n);
    f(c0 + c, s, n);
  });
}

template <class S, class D>
void col_sum_loop(AgCtx* ctx, const AgColSum* a) {
  typedef Acc<S> C;
  const S* x = static_cast<const S*>(a->x);
  int64_t blocks = col_sum_blocks(a->rows), per = div_up(a->rows, blocks), stripes = div_up(a->cols, kStripe);
  C* partial = static_cast<C*>(ctx->workspace);
  C scale = C(a->scale) * (a->by ? *static_cast<const C*>(a->by) : C(1));
  int64_t group = max_of(1, kGrain / max_of(1, per * min_of(a->cols, kStripe)));  // small tasks go together
  parallel_range(blocks * stripes, group, [&](int64_t t0, int64_t t1) {
    alignas(64) C sums[kStripe];
    for (int64_t task = t0; task < t1; task++) {
      int64_t block = task / stripes, c0 = task % stripes * kStripe, c1 = min_of(a->cols, c0 + kStripe);
      int64_t r0 = min_of(a->rows, block * per), r1 = min_of(a->rows, r0 + per);
      if (blocks == 1)
        stripe_sum(x, a->ld, r0, r1, c0, c1, sums,
                   [&](int64_t c, Vec<C> s, int64_t n) { grad_set<D, C>(a->y, c, s * scale, n); });
      else
        stripe_sum(x, a->ld, r0, r1, c0, c1, sums,
                   [&](int64_t c, Vec<C> s, int64_t n) { set(partial + block * a->cols + c, s, n); });
    }
  });
  if (blocks == 1) return;
  parallel_range(a->cols, kStripe, [&](int64_t lo, int64_t hi) {
    each_vector<C>(hi - lo, [&](int64_t c, int64_t n) {
      Vec<C> s = {};
      for (int64_t b = 0; b < blocks; b++) s += get(partial + b * a->cols + lo + c, n);
      grad_set<D, C>(a->y, lo + c, s * scale, n);
    });
  });
}

// ---- rows by index ----------------------------------------------------------------------------------
// Every row of dst has the list of its sources, in order; the row is summed in registers and written once. So no two
// threads meet, and a bf16 row is rounded once.
template <class S, class D>
void scatter_add_rows(const AgScatterAdd* a, const int32_t* head, const int32_t* next, int64_t lo, int64_t hi) {
  typedef Acc<S> C;
  constexpr int K = 4, W = kWidth<C>;
  const S* src = static_cast<const S*>(a->src);
  C scale = C(a->scale);
  for (int64_t r = lo; r < hi; r++) {
    D* dst = static_cast<D*>(a->dst.p) + r * a->cols;
    if (head[r] < 0) {
      if (!a->dst.accumulate) memset(static_cast<void*>(dst), 0, size_t(a->cols) * sizeof(D));
      continue;
    }
    int64_t c = 0;
    for (; c + K * W <= a->cols; c += K * W) {
      Vec<C> s[K];
      for (int j = 0; j < K; j++) s[j] = a->dst.accumulate ? load(dst + c + j * W) : Vec<C>{};
      for (int32_t i = head[r]; i >= 0; i = next[i])
        for (int j = 0; j < K; j++) s[j] += load(src + i * a->cols + c + j * W) * scale;
      for (int j = 0; j < K; j++) store(dst + c + j * W, s[j]);
    }
    for (; c < a->cols; c += W) {
      int64_t n = min_of(W, a->cols - c);
      Vec<C> s = a->dst.accumulate ? get(dst + c, n) : Vec<C>{};
      for (int32_t i = head[r]; i >= 0; i = next[i]) s += get(src + i * a->cols + c, n) * scale;
      set(dst + c, s, n);
    }
  }
}

template <class S, class D>
void scatter_add_loop(AgCtx* ctx, const AgScatterAdd* a) {
  int32_t *head = static_cast<int32_t*>(ctx->workspace), *next = head + a->dst_rows;
  for (int64_t r = 0; r < a->dst_rows; r++) head[r] = -1;
  for (int64_t i = a->n - 1; i >= 0; i--) {  // backwards, so that a list runs forwards
    int32_t r = a->index[i];
    if (r < 0) continue;
    next[i] = head[r];
    head[r] = int32_t(i);
  }
  parallel_range(a->dst_rows, row_grain(a->cols),
                 [&](int64_t lo, int64_t hi) { scatter_add_rows<S, D>(a, head, next, lo, hi); });
}

}  // namespace

int64_t col_sum_workspace(const AgColSum* a) {
  int64_t blocks = col_sum_blocks(a->rows);
  return blocks == 1 ? 0 : blocks * a->cols * (a->dt == AG_F64 ? 8 : 4);
}
AgStatus col_sum(AgCtx* ctx, const AgColSum* a) {
  if (!a->y.p) return AG_OK;
  return with_float_status(ctx, "col_sum", a->dt, [&](auto src) {
    return with_float(ctx, "col_sum", a->y.dt, [&](auto dst) {
      col_sum_loop<typename decltype(src)::type, typename decltype(dst)::type>(ctx, a);
    });
  });
}

int64_t sum_workspace(const AgSum* a) { return div_up(a->n, kSumBlock) * 8; }
AgStatus sum(AgCtx* ctx, const AgSum* a) {
  return with_float(ctx, "sum", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    double* partial = static_cast<double*>(ctx->workspace);
    const S* x = static_cast<const S*>(a->x);
    int64_t blocks = div_up(a->n, kSumBlock);
    parallel_range(blocks, 4, [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; b++)
        partial[b] = double(block_sum(x + b * kSumBlock, min_of(kSumBlock, a->n - b * kSumBlock)));
    });
    double s = 0;
    for (int64_t b = 0; b < blocks; b++) s += partial[b];
    put(static_cast<S*>(a->y), s * a->scale);
  });
}

int64_t sum_squares_workspace(const AgSumSquares* a) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < a->count; i++) pieces += div_up(a->spans[i].n, kGrain);
  return pieces * 8;
}
AgStatus sum_squares(AgCtx* ctx, const AgSumSquares* a) {
  for (int64_t i = 0; i < a->count; i++)
    if (a->spans[i].dt > AG_F64) return bad_dtype(ctx, "sum_squares", a->spans[i].dt, "f32, bf16 or f64");
  int64_t pieces = sum_squares_workspace(a) / 8;
  double *partial = static_cast<double*>(ctx->workspace), total = 0;
  parallel_for(pieces, [&](int64_t task) {
    int64_t i = 0, piece = task;
    while (piece >= div_up(a->spans[i].n, kGrain)) piece -= div_up(a->spans[i++].n, kGrain);
    const AgSpan& s = a->spans[i];
    partial[task] = span_squares(s, piece * kGrain, min_of(kGrain, s.n - piece * kGrain));
  });
  for (int64_t p = 0; p < pieces; p++) total += partial[p];
  *a->out = total;
  return AG_OK;
}

AgStatus gather_rows(AgCtx*, const AgGatherRows* a) {
  int64_t bytes = a->cols * size_of(a->dt);
  parallel_range(a->n, row_grain(a->cols), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++)
      memcpy(static_cast<char*>(a->dst) + i * bytes, static_cast<const char*>(a->src) + int64_t(a->index[i]) * bytes,
             size_t(bytes));
  });
  return AG_OK;
}

int64_t scatter_add_workspace(const AgScatterAdd* a) { return (a->dst_rows + a->n) * int64_t(sizeof(int32_t)); }
AgStatus scatter_add(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.p) return AG_OK;
  return with_float_status(ctx, "scatter_add", a->dt, [&](auto src) {
    return with_float_status(ctx, "scatter_add", a->dst.dt, [&](auto dst) {
      typedef typename decltype(src)::type S;
      typedef typename decltype(dst)::type D;
      if constexpr (sizeof(Acc<S>) != sizeof(Acc<D>)) {
        return bad_dtype(ctx, "scatter_add", a->dst.dt, "f64 with f64 only");
      } else {
        scatter_add_loop<S, D>(ctx, a);
        return AG_OK;
      }
    });
  });
}

}  // namespace AG_LEVEL

// Sums in a fixed order, and rows by index.
#include "vec.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kSumBlock = 4096;

// Sum of f over p[0..n) with W running sums.
template <class S>
Acc<S> block_sum(const S* p, int64_t n) {
  constexpr int W = kWidth<Acc<S>>;
  Vec<Acc<S>> s = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) s += load(p + i);
  if (i < n) s += load_n(p + i, n - i);
  return lane_sum(s);
}

template <class S>
double block_squares(const S* p, int64_t n) {
  double s[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < n; i++) {
    double v = double(to_acc(p[i]));
    s[i & 3] += v * v;
  }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

double span_squares(const AgSpan& s, int64_t from, int64_t n) {
  if (s.dt == AG_F32) return block_squares(static_cast<const float*>(s.p) + from, n);
  if (s.dt == AG_BF16) return block_squares(static_cast<const bf16*>(s.p) + from, n);
  return block_squares(static_cast<const double*>(s.p) + from, n);
}

int64_t col_sum_blocks(int64_t rows) { return min_of(16, max_of(1, rows / 64)); }

// Partial sums of row blocks, then the blocks in order.
template <class S>
void col_sum_loop(AgCtx* ctx, const AgColSum* a) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  const S* x = static_cast<const S*>(a->x);
  int64_t blocks = col_sum_blocks(a->rows), per = div_up(a->rows, blocks), stripes = div_up(a->cols, 256);
  C* partial = static_cast<C*>(ctx->workspace);
  parallel_for(blocks * stripes, [&](int64_t task) {
    int64_t block = task / stripes, c0 = task % stripes * 256, c1 = min_of(a->cols, c0 + 256);
    int64_t r1 = min_of(a->rows, (block + 1) * per);
    for (int64_t c = c0; c < c1; c += W) {
      int64_t n = min_of(W, c1 - c);
      Vec<C> s = {};
      for (int64_t r = block * per; r < r1; r++) s += n == W ? load(x + r * a->ld + c) : load_n(x + r * a->ld + c, n);
      store_n(partial + block * a->cols + c, s, n);
    }
  });
  parallel_range(a->cols, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t c = lo; c < hi; c++) {
      C s = 0;
      for (int64_t b = 0; b < blocks; b++) s += partial[b * a->cols + c];
      grad_put(a->y, c, double(s * C(a->scale)));
    }
  });
}

// Columns are shared out, so every row of dst collects its sources in the order of i.
template <class S, class D>
void scatter_add_loop(const AgScatterAdd* a) {
  constexpr int64_t stripe = 64;
  D* dst = static_cast<D*>(a->dst.p);
  const S* src = static_cast<const S*>(a->src);
  parallel_for(div_up(a->cols, stripe), [&](int64_t task) {
    int64_t c0 = task * stripe, c1 = min_of(a->cols, c0 + stripe);
    if (!a->dst.accumulate)
      for (int64_t r = 0; r < a->dst_rows; r++) memset(dst + r * a->cols + c0, 0, size_t(c1 - c0) * sizeof(D));
    for (int64_t i = 0; i < a->n; i++) {
      if (a->index[i] < 0) continue;
      D* row = dst + int64_t(a->index[i]) * a->cols;
      const S* from = src + i * a->cols;
      for (int64_t c = c0; c < c1; c++) put(row + c, double(to_acc(row[c])) + a->scale * double(to_acc(from[c])));
    }
  });
}

template <class S>
void gather_loop(const AgGatherRows* a) {
  parallel_range(a->n, row_grain(a->cols), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++)
      memcpy(static_cast<S*>(a->dst) + i * a->cols, static_cast<const S*>(a->src) + int64_t(a->index[i]) * a->cols,
             size_t(a->cols) * sizeof(S));
  });
}

int64_t size_of(AgDtype dt) { return dt == AG_BF16 ? 2 : dt == AG_F64 || dt == AG_I64 ? 8 : 4; }

}  // namespace

int64_t col_sum_workspace(const AgColSum* a) { return col_sum_blocks(a->rows) * a->cols * (a->dt == AG_F64 ? 8 : 4); }
AgStatus col_sum(AgCtx* ctx, const AgColSum* a) {
  if (!a->y.p || a->cols == 0) return AG_OK;
  return with_float(ctx, "col_sum", a->dt, [&](auto tag) { col_sum_loop<typename decltype(tag)::type>(ctx, a); });
}

int64_t sum_workspace(const AgSum* a) { return div_up(a->n, kSumBlock) * 8; }
AgStatus sum(AgCtx* ctx, const AgSum* a) {
  return with_float(ctx, "sum", a->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    double* partial = static_cast<double*>(ctx->workspace);
    const S* x = static_cast<const S*>(a->x);
    int64_t blocks = div_up(a->n, kSumBlock);
    parallel_for(blocks, [&](int64_t b) {
      partial[b] = double(block_sum(x + b * kSumBlock, min_of(kSumBlock, a->n - b * kSumBlock)));
    });
    double s = 0;
    for (int64_t b = 0; b < blocks; b++) s += partial[b];
    put(static_cast<S*>(a->y), s * a->scale);
  });
}

int64_t sum_squares_workspace(const AgSumSquares* a) {
  int64_t most = 0;
  for (int64_t i = 0; i < a->count; i++) most = max_of(most, div_up(a->spans[i].n, kGrain));
  return most * 8;
}
AgStatus sum_squares(AgCtx* ctx, const AgSumSquares* a) {
  double total = 0;
  double* partial = static_cast<double*>(ctx->workspace);
  for (int64_t i = 0; i < a->count; i++) {
    const AgSpan& s = a->spans[i];
    int64_t blocks = div_up(s.n, kGrain);
    parallel_for(blocks, [&](int64_t b) { partial[b] = span_squares(s, b * kGrain, min_of(kGrain, s.n - b * kGrain)); });
    for (int64_t b = 0; b < blocks; b++) total += partial[b];
  }
  *a->out = total;
  return AG_OK;
}

AgStatus gather_rows(AgCtx*, const AgGatherRows* a) {
  int64_t size = size_of(a->dt);
  if (size == 2) gather_loop<uint16_t>(a);
  else if (size == 4) gather_loop<uint32_t>(a);
  else gather_loop<uint64_t>(a);
  return AG_OK;
}

AgStatus scatter_rows(AgCtx*, const AgScatterRows* a) {
  int64_t bytes = a->cols * size_of(a->dt);
  for (int64_t i = 0; i < a->n; i++)
    memcpy(static_cast<char*>(a->dst) + int64_t(a->index[i]) * bytes, static_cast<const char*>(a->src) + i * bytes, size_t(bytes));
  return AG_OK;
}

AgStatus scatter_add(AgCtx* ctx, const AgScatterAdd* a) {
  if (!a->dst.p) return AG_OK;
  return with_float(ctx, "scatter_add", a->dt, [&](auto src) {
    with_float(ctx, "scatter_add", a->dst.dt, [&](auto dst) {
      scatter_add_loop<typename decltype(src)::type, typename decltype(dst)::type>(a);
    });
  });
}

}  // namespace AG_LEVEL
